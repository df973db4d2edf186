"""The causal benchmark: its stages build on each other, and what it measures is what clips show."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vidtrl.models import VideoModel
from vidtrl.toy import captions, parse_caption, render


def load_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "toy_causal.py"
    spec = importlib.util.spec_from_file_location("toy_causal", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy_causal = load_benchmark()
RANKS = {"teacher": 2, "causal": 3, "consistency": 4, "student": 7, "direct": 3}
# the fourth step is the first that trains a student
NUM_STEPS = {"teacher": 2, "causal": 2, "consistency": 2, "student": 4, "direct": 4}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """All stages, two or four steps of each."""
    path = tmp_path_factory.mktemp("toy_causal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_causal, "NUM_CLIPS", 4)
        patch.setattr(toy_causal, "RANK", RANKS)
        settings = {
            stage: options | {"max_steps": NUM_STEPS[stage], "per_device_train_batch_size": 2, "warmup_steps": 0}
            for stage, options in toy_causal.SETTINGS.items()
        }
        patch.setattr(toy_causal, "SETTINGS", settings)
        for stage in toy_causal.STAGES:
            toy_causal.train(stage, path, points=1, clips=1)
        for stage in toy_causal.STAGES:
            toy_causal.train(stage, path, points=1, clips=1)  # nothing is left to do
    return path


def test_held_out_captions_are_never_trained_on(output):
    kinds = [tuple(parse_caption(c)[name] for name in ("color", "shape")) for c in toy_causal.HELD_OUT]
    assert len(kinds) == len(set(kinds)) == 18
    assert not set(toy_causal.HELD_OUT) & set(toy_causal.TRAINED_ON)
    prompts = toy_causal.clean_clips(output)["prompt"]
    assert prompts and set(prompts) == set(captions()[:4]) & set(toy_causal.TRAINED_ON) < set(captions()[:4])


def test_stages_leave_what_the_next_one_needs(output):
    ranks = {}
    for stage, steps in NUM_STEPS.items():
        report = json.loads((output / stage / "stage.json").read_text())
        assert [point["step"] for point in report["curve"]] == [0, steps]
        weights = load_file(output / stage / toy_causal.ADAPTER_FILE)
        (ranks[stage],) = {w.shape[0] for name, w in weights.items() if "lora_A" in name}
        assert any(w.count_nonzero() for name, w in weights.items() if "lora_B" in name)
    assert ranks == RANKS
    for stage in toy_causal.START:
        start, end = (load_file(output / name / toy_causal.ADAPTER_FILE) for name in (f"{stage}-start", stage))
        assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)


@torch.no_grad()
def test_merged_adapter_acts_as_both(output):
    def velocity(*adapters):
        model = VideoModel(toy_causal.load(output, adapters))
        condition = model.condition("a red circle moving right", 64, 64, 17, max_sequence_length=16)
        latents = torch.randn(1, *condition.latent_shape, generator=torch.Generator().manual_seed(0))
        return model.velocity(latents, 0.7, condition)

    merged, both, one = velocity("student-start"), velocity("causal", "consistency"), velocity("causal")
    torch.testing.assert_close(merged, both, rtol=1e-4, atol=1e-5)
    assert (merged - one).abs().max() > 1e-4


def test_judge_sees_a_shape_that_turns_into_another():
    right = render("a red square moving right", seed=1).float() / 255
    turned = torch.cat([right[:9], render("a red circle moving right", seed=1)[9:].float() / 255])
    rows = toy_causal.judge([right, right.flip(0), turned], ["a red square moving right"] * 3)
    assert rows[0]["all"] and rows[0]["halves"]
    assert rows[1]["color"] and rows[1]["shape"] and not rows[1]["direction"] and not rows[1]["all"]
    assert rows[2]["all"] and not rows[2]["halves"]  # most of it is a square


def test_table_and_pictures(output, tmp_path):
    table, sheet = toy_causal.compare(output, 2)
    assert list(table) == list(sheet) == ["real clips", *(name for name, *_ in toy_causal.MODELS)]
    assert table["real clips"]["halves"]["value"] == 1.0
    energies = [row["energy"]["value"] for row in table.values()]
    assert min(energies) > 0 and len(set(energies)) == len(energies)  # every model is another one
    toy_causal.contact_sheet(sheet, tmp_path / "sheet.png", clips=(0, 1))
    assert (tmp_path / "sheet.png").stat().st_size > 5_000
    pytest.importorskip("matplotlib")
    stages = {stage: json.loads((output / stage / "stage.json").read_text()) for stage in toy_causal.STAGES}
    toy_causal.plot(stages, table, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_streaming_yields_blocks_of_the_same_video(output):
    times = toy_causal.stream_times(output, repeats=1)
    assert times["frames"] == [1, 4, 4, 4, 4] and len(times["blocks"]) == 5
    assert times["blocks"] == sorted(times["blocks"]) and times["blocks"][0] > 0
    assert times["streamed_equals_whole"] < 0.02  # the VAE runs in bfloat16 here
