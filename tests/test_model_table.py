"""docs/supported_models.md is what the installed diffusers and this version's refusals say."""

import inspect
import re
import sys
from pathlib import Path

import diffusers
import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import model_table  # noqa: E402

from vidtrl.models import FAMILIES, UNSUPPORTED, VideoModel  # noqa: E402


def rows(section=0):
    """The rows of the page's tables as lists of cells: of what can be trained (0), or of what cannot (1)."""
    text = model_table.PAGE.read_text(encoding="utf-8").split("## What cannot")[section]
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line[:3] == "| `"
    ]


@pytest.fixture(scope="module")
def names():
    return model_table.video_pipelines()


def test_every_video_pipeline_has_a_verdict(names):
    can = {row[0].strip("`") for row in rows()}
    cannot = {name.strip("`"): reason for name, reason in rows(1)}
    assert can | set(cannot) == set(names) and not can & set(cannot)
    assert can == {name for family in FAMILIES for name in family.pipelines}
    assert cannot == UNSUPPORTED
    assert f"diffusers {diffusers.__version__}," in model_table.PAGE.read_text(encoding="utf-8")


# a rule of another kind: what the components are. These have a video transformer and make single images
IMAGES = {"JoyImageEditPipeline", "JoyImageEditPlusPipeline", "Kandinsky5I2IPipeline", "Kandinsky5T2IPipeline"}
PARTS = re.compile(r"3DModel|VideoTransformer|UNet3D|UNetMotion|UNetSpatioTemporal|MotionAdapter|Video\b")


def test_no_class_is_missed(names):
    for name in dir(diffusers):
        if not name.endswith("Pipeline"):
            continue
        cls = getattr(diffusers, name)
        if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
            continue
        annotations = " ".join(str(p.annotation) for p in inspect.signature(cls.__init__).parameters.values())
        if PARTS.search(annotations) and name not in IMAGES:
            assert name in names, f"{name} is made of {annotations}"


class NewVideoPipeline(diffusers.DiffusionPipeline):
    def __call__(self, prompt, num_frames=17):
        return None


class NewImagePipeline(diffusers.DiffusionPipeline):
    def __call__(self, prompt, num_images=1):
        return None


def test_a_new_class_needs_a_verdict(monkeypatch):
    monkeypatch.setattr(diffusers, "NewVideoPipeline", NewVideoPipeline, raising=False)
    monkeypatch.setattr(diffusers, "NewImagePipeline", NewImagePipeline, raising=False)
    with pytest.raises(AssertionError, match="no verdict on NewVideoPipeline: add them to UNSUPPORTED"):
        model_table.page()


def test_verdicts_are_current():
    """Rows, families, causal verdicts and notes; the trainers' own verdicts where they are not a plain yes."""
    expected = [
        (name, key)
        for name in dict.fromkeys(n for family in FAMILIES for n in family.pipelines)
        for key in model_table.rows_of(name)
    ]
    builds = model_table.builds()
    assert len(rows()) == len(expected)
    for row, (name, key) in zip(rows(), expected, strict=True):
        model = VideoModel(builds[key]()[0])
        causal, why = model_table.causal_verdict(builds[key])
        assert row[:3] == [f"`{name}`", model_table.VARIANTS.get(key, ""), f"`{model.family.name}`"]
        assert row[3] == "yes" and row[6] == causal and (not why or f"causal: {why}" in row[7]), key
        # two experts cannot be distilled; a guidance-distilled model takes no second branch
        known = "no" if len(model.denoisers) > 1 else "yes"
        assert row[5] == known or row[5] == "`teacher_guidance_scale=1.0`", key
        assert row[4] == "yes" or row[4] == "`guidance_scale=1.0`", key


@pytest.mark.parametrize("key", ["wan", "wan22", "hunyuan", "hunyuan_i2v"])
def test_trainers_say_what_the_page_says(key):
    build = model_table.builds()[key]
    name = type(build()[0]).__name__
    row = next(row for row in rows() if row[:2] == [f"`{name}`", model_table.VARIANTS.get(key, "")])
    assert model_table.trainer_verdict(build, "GRPO", model_table.GUIDANCE_OFF["GRPO"])[0] == row[4]
    verdict, why = model_table.trainer_verdict(build, "Distill", model_table.GUIDANCE_OFF["Distill"])
    assert verdict == row[5] and (not why or f"distillation: {why}" in row[7])


@pytest.mark.slow
def test_page_is_what_the_script_writes():
    assert model_table.page() == model_table.PAGE.read_text(encoding="utf-8")
