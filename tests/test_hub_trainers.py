"""Runs that are pushed: what each hub_strategy uploads and when, their cards, and their code in fresh processes."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parent))

import distill_setup  # noqa: E402
import grpo_setup  # noqa: E402
import sft_setup  # noqa: E402
from hub_server import ME, card_data, card_problems, hub  # noqa: E402, F401
from tiny_pipelines import wan, wan22  # noqa: E402

from vidtrl.cli.sft import fit  # noqa: E402
from vidtrl.hub import HubError, pull_from_hub, push_to_hub, upload  # noqa: E402


WEIGHTS = "pytorch_lora_weights.safetensors"
SECRET = "hf_MeMayWriteEverything1"
LICENCE = b"---\nlicense: other\nlicense_name: toy-1.0\nlicense_link: LICENSE\n---\n# Tiny Wan\n"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(upload, "WAIT", 0.01)


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory):
    """A pipeline as files."""
    folder = tmp_path_factory.mktemp("base")
    wan()[0].save_pretrained(folder)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {**files, "README.md": LICENCE}


def pushing(tmp_path, clips, cache_dir, **config):
    saving = dict(save_strategy="steps", save_steps=1, max_steps=2, push_to_hub=True, hub_model_id="me/wan-sft")
    return sft_setup.make_trainer(tmp_path / "run", clips, cache_dir, **{**saving, **config})


# ---- What is uploaded, and when ----


TRAINING_STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_hub_strategy(hub, clips, cache_dir, tmp_path, strategy):  # noqa: F811
    trainer = pushing(tmp_path, clips, cache_dir, hub_strategy=strategy, hub_always_push=True, hub_token=SECRET)
    repo = hub.repo("me/wan-sft")
    assert repo.messages == ["initial commit"]
    trainer.train()
    in_between = [] if strategy == "end" else [f"Training in progress, step {step}" for step in (1, 2)]
    assert repo.messages[1:] == in_between
    before = repo.files()
    trainer.push_to_hub(dataset_name="me/clips")
    assert repo.messages[1 + len(in_between) :] == ["End of training"]

    files = repo.files()
    folders = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}.get(
        strategy, []
    )
    assert {f.split("/")[0] for f in files if f.split("/")[-1] in TRAINING_STATE} == set(folders)
    assert {f for f in files if "/" not in f} == {"README.md", WEIGHTS, "training_args.json", "vidtrl.json"}
    for folder in folders:
        local = tmp_path / "run" / ("checkpoint-2" if folder == "last-checkpoint" else folder)
        for path in local.iterdir():
            assert files[f"{folder}/{path.name}"] == path.read_bytes()
    if strategy != "end":
        assert before[WEIGHTS] == (tmp_path / "run" / "checkpoint-2" / WEIGHTS).read_bytes()
    assert files[WEIGHTS] == (tmp_path / "run" / WEIGHTS).read_bytes()
    assert "me/clips" in files["README.md"].decode() and not card_problems(files["README.md"].decode())
    assert not list((tmp_path / "run").glob("_push*"))
    assert not [f for f, data in files.items() if SECRET.encode() in data]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_a_run_resumes_from_the_pulled_checkpoint(hub, clips, cache_dir, tmp_path):  # noqa: F811
    straight = sft_setup.make_trainer(tmp_path / "straight", clips, cache_dir, max_steps=2)
    straight.train()
    expected = sft_setup.digest(sft_setup.trained_weights(straight))
    trainer = pushing(tmp_path, clips, cache_dir, hub_strategy="checkpoint")
    trainer.args.max_steps = 2
    trainer.add_callback(StopAfter(1))
    trainer.train()
    pulled = pull_from_hub("me/wan-sft", tmp_path / "pulled", checkpoints=True)
    again = sft_setup.make_trainer(tmp_path / "again", clips, cache_dir, max_steps=2)
    again.train(resume_from_checkpoint=str(pulled / "last-checkpoint"))
    assert sft_setup.digest(sft_setup.trained_weights(again)) == expected
    assert not (pull_from_hub("me/wan-sft", tmp_path / "without") / "last-checkpoint").exists()


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class HoldTheHub(TrainerCallback):
    """The Hub answers nothing until the second checkpoint is written and the first one is gone."""

    def __init__(self, hub, run):  # noqa: F811
        self.hub, self.run, self.weights = hub, run, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.hub.lock.acquire()

    def on_save(self, args, state, control, **kwargs):
        self.weights.append((self.run / f"checkpoint-{state.global_step}" / WEIGHTS).read_bytes())
        if state.global_step == 2:
            assert not (self.run / "checkpoint-1").exists() and len(self.hub.repo("me/wan-sft").commits) == 1
            self.hub.lock.release()


def test_an_upload_is_what_was_saved_whatever_training_does_meanwhile(hub, clips, cache_dir, tmp_path):  # noqa: F811
    trainer = pushing(tmp_path, clips, cache_dir, hub_strategy="checkpoint", hub_always_push=True, save_total_limit=1)
    watch = HoldTheHub(hub, tmp_path / "run")
    trainer.add_callback(watch)
    trainer.train()
    repo = hub.repo("me/wan-sft")
    commits = list(repo.commits.values())[1:]
    for files, weights in zip(commits, watch.weights, strict=True):
        assert files[WEIGHTS].data == files[f"last-checkpoint/{WEIGHTS}"].data == weights
    assert watch.weights[0] != watch.weights[1]


def test_a_save_during_an_upload_is_left_out_and_says_so(hub, clips, cache_dir, tmp_path, caplog):  # noqa: F811
    trainer = pushing(tmp_path, clips, cache_dir, save_total_limit=1)
    trainer.add_callback(HoldTheHub(hub, tmp_path / "run"))
    trainer.train()
    assert hub.repo("me/wan-sft").messages[1:] == ["Training in progress, step 1"]
    assert "step 2 is not uploaded" in caplog.text and "hub_always_push" in caplog.text


def test_training_goes_on_without_the_hub_and_says_so(hub, clips, cache_dir, tmp_path, caplog):  # noqa: F811
    trainer = pushing(tmp_path, clips, cache_dir, hub_always_push=True)
    refused = hub.fail("POST", "/commit/", 403, message=f"not you, {ME}", times=1)
    broken = hub.fail("POST", "/commit/", 503, times=upload.ATTEMPTS)
    trainer.train()
    assert trainer.state.global_step == 2 and refused.hits == 1 and broken.hits == upload.ATTEMPTS
    for step, why in (("step 1", "write access"), ("step 2", "out of order")):
        (said,) = [r.getMessage() for r in caplog.records if f"in progress, {step}'" in r.getMessage()]
        assert why in said and "Training goes on" in said
    assert ME not in caplog.text and not list((tmp_path / "run").glob("_push*"))

    hub.fail("POST", "/commit/", 403, times=9)
    with pytest.raises(HubError, match="cannot push to me/wan-sft.*write access"):
        trainer.push_to_hub()
    assert (tmp_path / "run" / WEIGHTS).is_file() and not hub.repo("me/wan-sft").files()


def test_branch_and_privacy(hub, clips, cache_dir, tmp_path):  # noqa: F811
    trainer = pushing(tmp_path, clips, cache_dir, hub_revision="try-1", hub_private_repo=True, hub_strategy="end")
    trainer.train()
    commit = trainer.push_to_hub()
    repo = hub.repo("me/wan-sft")
    assert repo.private and WEIGHTS in repo.files("try-1") and not repo.files("main")
    assert repo.refs["try-1"] in str(commit)
    job = trainer.push_to_hub(blocking=False, revision="try-1", commit_message="again")
    assert job.result(timeout=60) is not None
    hub.put("me/open", {})
    with pytest.raises(ValueError, match="me/open is there already and public"):  # before training
        pushing(tmp_path, clips, cache_dir, hub_model_id="me/open", hub_private_repo=True)


def test_a_command_pushes_once_at_its_end(hub, clips, cache_dir, tmp_path):  # noqa: F811
    trainer = pushing(tmp_path, clips, cache_dir, hub_strategy="end")
    before = len(hub.repo("me/wan-sft").messages)
    assert fit(trainer, SimpleNamespace(dataset_name=str(tmp_path))) == 0
    assert hub.repo("me/wan-sft").messages[before:] == ["End of training"]
    assert hub.repo("me/wan-sft").files()[WEIGHTS] == (tmp_path / "run" / WEIGHTS).read_bytes()


def test_full_weights_and_two_experts(hub, clips, cache_dir, tmp_path):  # noqa: F811
    config = dict(hub_strategy="end", max_steps=1, save_strategy="no")
    trainer = pushing(tmp_path, clips, cache_dir, lora=False, hub_model_id="me/full", **config)
    trainer.train(), trainer.push_to_hub()
    files = hub.repo("me/full").files()
    assert "transformer/diffusion_pytorch_model.safetensors" in files and "transformer/config.json" in files
    assert 'from_pretrained("me/full", subfolder="transformer"' in files["README.md"].decode()

    shutil.rmtree(tmp_path / "run")
    trainer = pushing(tmp_path, clips, cache_dir, pipe=wan22()[0], hub_model_id="me/experts", **config)
    trainer.train(), trainer.push_to_hub()
    files = hub.repo("me/experts").files()
    names = [f"pytorch_lora_weights_{level}_noise.safetensors" for level in ("high", "low")]
    card = files["README.md"].decode()
    for name in names:
        assert name in files and f'load_lora_weights("me/experts", weight_name="{name}"' in card


BY_ID = """
import json
from safetensors.torch import save_file
latents = {{}}

def sample(name, pipe):
    source = torch.Generator().manual_seed(0)
    latents[name] = pipe("a red circle", generator=source, **{call!r}).frames

def load(pipe):
{experts}

pipe = WanPipeline.from_pretrained("lab/tiny-wan22")
sample("base", pipe)
load(pipe)
sample("experts", pipe)
{full}
sample("full", pipe.to(torch.float32))
save_file(latents, "latents.safetensors")
"""


def test_two_experts_and_full_weights_are_loaded_by_id(hub, clips, cache_dir, tmp_path, tiny_wan):  # noqa: F811
    """By stock diffusers in a fresh process, with the lines of their cards."""
    hub.put("lab/tiny-wan", tiny_wan)
    wan22()[0].save_pretrained(tmp_path / "wan22")
    files = {str(p.relative_to(tmp_path / "wan22")): p for p in (tmp_path / "wan22").rglob("*") if p.is_file()}
    hub.put("lab/tiny-wan22", {name: path.read_bytes() for name, path in files.items()})
    call = dict(sft_setup.SIZE, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    expected, cards = {}, {}
    for name, base, lora in (("experts", "lab/tiny-wan22", True), ("full", "lab/tiny-wan", False)):
        config = dict(hub_strategy="end", max_steps=4, save_strategy="no", learning_rate=1e-2)
        trainer = pushing(tmp_path / name, clips, cache_dir, pipe=base, lora=lora, hub_model_id=f"me/{name}", **config)
        trainer.train(), trainer.push_to_hub()
        expected[name] = trainer.pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames
        cards[name] = hub.repo(f"me/{name}").files()["README.md"].decode()
        assert f"lab/tiny-wan{'22' if lora else ''}" in cards[name] and not card_problems(cards[name])
    shutil.rmtree(tmp_path / "experts"), shutil.rmtree(tmp_path / "full")
    lines = [line for line in snippet(cards["experts"]).splitlines() if "load_lora" in line]
    assert len(lines) == 2
    full = snippet(cards["full"]).replace("torch.bfloat16", "torch.float32")
    code = snippet(cards["experts"]) + BY_ID.format(call=call, experts="\n".join(f"    {x}" for x in lines), full=full)
    run_fresh(hub, code, tmp_path)
    latents = load_file(tmp_path / "latents.safetensors")
    for name, live in expected.items():
        torch.testing.assert_close(latents[name], live, rtol=1e-4, atol=1e-4)
        assert (latents["base"] - live).abs().max() > 1e-3


# ---- Cards ----


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def run_fresh(hub, code, tmp_path, **environment):  # noqa: F811
    return hub.run("-c", code, folder=tmp_path, **environment)


def test_the_card_of_a_grpo_run(hub, clips, cache_dir, tmp_path, tiny_wan):  # noqa: F811
    """Two stages, of which the second is pushed; everything on its page is true, and its code runs elsewhere."""
    hub.put("lab/tiny-wan", tiny_wan)
    sft = sft_setup.make_trainer(tmp_path / "sft", clips, cache_dir, max_steps=1)
    sft.train(), sft.save_model()

    def moving(videos, **kwargs):
        return [100 * v.diff(dim=0).abs().mean().item() for v in videos]

    trainer = grpo_setup.make_trainer(
        tmp_path / "grpo",
        pipe="lab/tiny-wan",
        rewards=[grpo_setup.brightness, moving],
        reward_weights=[1.0, 0.5],
        recipe="flow-grpo",
        base_adapters=[str(tmp_path / "sft")],
        max_steps=3,
        push_to_hub=True,
        hub_model_id="me/wan-grpo",
        hub_token=SECRET,
        validation_steps=3,
        validation_prompts=["a cat & a dog", "a red circle"],
        validation_num_inference_steps=2,
        validation_guidance_scale=1.0,
        log_completions=True,
        num_completions_to_print=0,
        log_completions_hub_repo="me/wan-grpo-log",
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="me/prompts")
    repo = hub.repo("me/wan-grpo")
    files = repo.files()
    card = files["README.md"].decode()
    assert not card_problems(card)
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-video")
    assert (data.base_model, data.base_model_relation) == ("lab/tiny-wan", "adapter")
    assert (data.license, data["license_name"], data["license_link"]) == ("other", "toy-1.0", "LICENSE")
    assert {"vidtrl", "grpo", "lora", "text-to-video", "arxiv:2505.05470"} <= set(data.tags)
    assert data.datasets == ["me/prompts"] and "https://huggingface.co/papers/2505.05470" in card

    assert [one["text"] for one in card_data(card)["widget"]] == ["a cat & a dog", "a red circle"]
    for one in card_data(card)["widget"]:
        path = one["output"]["url"]
        assert files[path] == (tmp_path / "grpo" / path).read_bytes()
        assert f'src="{hub.url}/me/wan-grpo/resolve/main/{path}"' in card
    assert sum(f.endswith(".mp4") for f in files) == 2  # those of the last validation

    for name in ("brightness", "moving"):
        values = [f"{v:.4g}" for v in grpo_setup.history(trainer, f"rewards/{name}/mean")]
        assert len(values) == 3 and f"| {name} | {values[0]} | {values[-1]} |" in card
    assert files["curves/rewards.png"].startswith(b"\x89PNG") and "](curves/rewards.png)" in card
    assert "| rewards | 1 x brightness, 0.5 x moving |" in card and "| training data | 4 rows |" in card

    assert not [f for f in files if "completions" in f or "checkpoint" in f]
    log = hub.repo("me/wan-grpo-log", "dataset").files()
    assert b'"advantage"' in log["metadata.jsonl"] and any(f.endswith(".mp4") for f in log)
    assert str(tmp_path) not in card
    assert files["base_adapters/0/transformer.safetensors"] == (tmp_path / "sft" / WEIGHTS).read_bytes()
    assert [f for f in files if f.endswith(WEIGHTS)] == [WEIGHTS]  # load_lora_weights(id) takes the first of several

    call = dict(grpo_setup.SIZE, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    live = trainer.pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames
    shutil.rmtree(tmp_path / "sft")
    run_fresh(
        hub,
        f"""
{snippet(card)}
import os, torch
from diffusers import WanPipeline
from safetensors.torch import save_file
assert os.path.getsize("video.mp4") > 0
assert pipe.get_active_adapters() == ["base_0", "trained"]
pipe = WanPipeline.from_pretrained("lab/tiny-wan")
latents = {{}}
def sample(name):
    latents[name] = pipe("a red circle", generator=torch.Generator().manual_seed(0), **{call!r}).frames
sample("base")
{chr(10).join(line for line in snippet(card).splitlines() if "load_lora" in line or "set_adapters" in line)}
sample("trained")
save_file(latents, "latents.safetensors")
""",
        tmp_path,
    )
    latents = load_file(tmp_path / "latents.safetensors")
    torch.testing.assert_close(latents["trained"], live, rtol=1e-4, atol=1e-5)
    assert (latents["base"] - live).abs().max() > 1e-3


def test_a_saved_run_goes_up_later(hub, clips, cache_dir, tmp_path, tiny_wan):  # noqa: F811
    """`vidtrl push` of what save_model left, card and all; the card's code then loads from the Hub."""
    hub.put("lab/tiny-wan", tiny_wan)
    trainer = sft_setup.make_trainer(
        tmp_path / "run", clips, cache_dir, pipe="lab/tiny-wan", eval_clips=clips.select(range(2)), max_steps=2,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train(), trainer.save_model()
    local = (tmp_path / "run" / "README.md").read_text()
    assert f'"{tmp_path / "run"}"' in local and "## Evaluation" in local
    before, after = grpo_setup.history(trainer, "eval_loss")
    assert f"| loss | {before:.4g} | {after:.4g} | 2 |" in local
    push_to_hub(tmp_path / "run", "me/later")
    card = hub.repo("me/later").files()["README.md"].decode()
    assert 'load_lora_weights("me/later")' in card and str(tmp_path) not in card
    assert card_data(card)["license_name"] == "toy-1.0" and not card_problems(card)
    assert "curves/loss.png" in hub.repo("me/later").files()


def test_a_distilled_student(hub, clips, cache_dir, tmp_path, tiny_wan):  # noqa: F811
    """With its scheduler folder; its card's code runs in a fresh process."""
    hub.put("lab/tiny-wan", tiny_wan)
    sft = sft_setup.make_trainer(tmp_path / "sft", clips, cache_dir, max_steps=1)
    sft.train(), sft.save_model()
    trainer = distill_setup.make_trainer(
        tmp_path / "run", cache_dir, pipe="lab/tiny-wan", max_steps=2, recipe="dmd2", base_adapters=[str(tmp_path / "sft")], push_to_hub=True,
        hub_model_id="me/student", save_strategy="steps", save_steps=2, hub_always_push=True,
    )  # fmt: skip
    trainer.train()
    middle = hub.repo("me/student").files()
    trainer.push_to_hub()
    files = hub.repo("me/student").files()
    for one in (middle, files):
        assert {"distill_config.json", WEIGHTS, "README.md"} <= set(one)
        assert any(f.startswith("scheduler/") for f in one)
        assert [f for f in one if f.endswith(WEIGHTS)] == [WEIGHTS]  # load_lora_weights(id) takes the first of several
        assert "base_adapters/0/transformer.safetensors" in one
    card = files["README.md"].decode()
    assert not card_problems(card) and "https://huggingface.co/papers/2405.14867" in card
    code = snippet(card)
    assert '"me/student"' in code and str(tmp_path) not in code
    shutil.rmtree(tmp_path / "sft")
    check = 'assert len(video) == 9 and pipe.get_active_adapters() == ["base_0", "student"]'
    run_fresh(hub, f"{code}\n{check}", tmp_path)
    assert (tmp_path / "video.mp4").stat().st_size > 0


def test_an_enhancer(hub, tmp_path):  # noqa: F811
    from vidtrl.prompts import PromptEnhancer
    from vidtrl.toy.paraphrases import enhancer_path

    enhancer = PromptEnhancer(enhancer_path(), max_new_tokens=24)
    enhancer.push_to_hub("me/prompts", private=True)
    loaded = PromptEnhancer.from_pretrained("me/prompts")
    assert loaded.settings() == enhancer.settings()
    assert loaded.generate(["a red circle"]) == enhancer.generate(["a red circle"])
    enhancer.save_pretrained(tmp_path / "prompts")
    push_to_hub(tmp_path / "prompts", "me/later")
    assert 'from_pretrained("me/later")' in hub.repo("me/later").files()["README.md"].decode()


def test_every_recipe_has_its_paper():
    from vidtrl.hub import papers
    from vidtrl.trainer import distill_recipes, grpo_recipes

    page = (Path(__file__).parent.parent / "docs" / "papers.md").read_text()
    for recipes, known in ((grpo_recipes.RECIPES, papers.GRPO), (distill_recipes.RECIPES, papers.DISTILL)):
        assert set(recipes) == set(known)
        for recipe, (_, paper) in known.items():
            (row,) = [line for line in page.splitlines() if f"| `{recipe}` |" in line]
            assert f"papers/{paper})" in row


def test_curves_show_their_points(tmp_path):
    from PIL import Image

    from vidtrl.hub.curves import HEIGHT, WIDTH, draw_curves

    up = [(step, step / 10) for step in range(11)]
    draw_curves(tmp_path / "a.png", {"up": up, "down": [(s, -v) for s, v in up], "one": [(3, 2.0)], "none": []})
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert image.size == (3 * WIDTH, HEIGHT)
    blue = [
        [
            y
            for y in range(HEIGHT)
            for x in (column,)
            if image.getpixel((x, y))[2] > 180 > 100 > image.getpixel((x, y))[0]
        ]
        for column in (110, WIDTH - 40, WIDTH + 110, 2 * WIDTH - 40)
    ]
    (up_left, up_right, down_left, down_right) = [sum(ys) / len(ys) for ys in blue]
    assert up_left > up_right and down_left < down_right
    draw_curves(tmp_path / "b.png", {"broken": [(1, float("nan"))]})
    assert Image.open(tmp_path / "b.png").size == (WIDTH, HEIGHT)
