"""Every place where transformers.Trainer breaks over a diffusers pipeline, and the fix for it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sft_setup import SIZE, digest, make_args, make_trainer, trained_weights
from tiny_pipelines import wan

from vidtrl import VideoSFTConfig, VideoSFTTrainer


CALL = dict(SIZE, num_inference_steps=2, guidance_scale=2.0, output_type="latent")


def sample(pipe, prompt="a red circle moving right", **call):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**CALL, **call}).frames


@pytest.fixture(scope="module")
def lora_run(clips, cache_dir, tmp_path_factory):
    """A finished LoRA run with checkpoints, evaluation and TensorBoard."""
    out = tmp_path_factory.mktemp("lora")
    trainer = make_trainer(
        out / "run",
        clips,
        cache_dir,
        eval_clips=clips.select(range(3)),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to=["tensorboard"],
        validation_steps=4,
        num_validation_videos=2,
        validation_num_inference_steps=2,
        validation_guidance_scale=2.0,
    )
    base = {k: v.clone() for k, v in trainer.model.named_parameters() if not v.requires_grad}
    start = trained_weights(trainer)
    trainer.train()
    trainer.save_model()
    return trainer, out / "run", base, start


def test_lora_changes_and_base_does_not(lora_run):
    trainer, _, base, start = lora_run
    for name, before in base.items():
        assert torch.equal(before, trainer.model.get_parameter(name)), name
    unchanged = [name for name, before in start.items() if torch.equal(before, trainer.model.get_parameter(name))]
    assert not unchanged


@pytest.mark.parametrize("directory", [".", "checkpoint-4"])
def test_stock_load_lora_weights_gives_equal_latents(lora_run, directory):
    trainer, out, _, _ = lora_run
    live, fresh = sample(trainer.pipe), wan()[0]
    before = sample(fresh)
    fresh.load_lora_weights(str(out / directory))
    assert torch.equal(sample(fresh), live)
    assert (before - live).abs().max() > 1e-3


def test_dora_round_trip(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, lora=LoraConfig(r=4, lora_alpha=8, use_dora=True))
    trainer.train()
    trainer.save_model()
    fresh = wan()[0]
    fresh.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(sample(fresh), sample(trainer.pipe), rtol=0, atol=1e-5)


def test_without_metadata_the_adapter_would_be_rescaled(lora_run, tmp_path):
    trainer, out, _, _ = lora_run
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    fresh = wan()[0]
    fresh.load_lora_weights(str(tmp_path))
    assert (sample(fresh) - sample(trainer.pipe)).abs().max() > 1e-3


def test_adapter_file_says_alpha(lora_run):
    _, out, _, _ = lora_run
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == 8 and metadata["transformer.r"] == 4


def test_checkpoint_holds_adapter_and_no_pickled_arguments(lora_run):
    _, out, _, _ = lora_run
    names = {p.name for p in (out / "checkpoint-4").iterdir()}
    assert names == {
        "optimizer.pt",
        "pytorch_lora_weights.safetensors",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.json",
        "vidtrl.json",
    }
    assert not list(out.rglob("*.bin"))


def test_evaluation_reports_nine_noise_levels(lora_run):
    trainer, _, _, _ = lora_run
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    strata = [evaluations[0][f"eval_loss_sigma_{i / 10:.1f}"] for i in range(1, 10)]
    assert evaluations[0]["eval_loss"] == pytest.approx(sum(strata) / 9)
    again = trainer.evaluate()
    assert again["eval_loss"] == evaluations[-1]["eval_loss"]  # same weights, same noise
    assert evaluations[0]["eval_loss"] != evaluations[-1]["eval_loss"]


def test_evaluation_does_not_depend_on_its_batch_size(lora_run):
    trainer, _, _, _ = lora_run
    expected = trainer.evaluate()["eval_loss"]
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_train_loss_per_sigma_bin_and_speed_are_logged(lora_run):
    trainer, _, _, _ = lora_run
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert any(re.fullmatch(r"loss_sigma_0\.\d-\d\.\d", name) for name in logged)
    assert "clips_per_second" in logged


def test_tensorboard_gets_curves_and_videos(lora_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out, _, _ = lora_run
    events = EventAccumulator(str(next((out / "runs").iterdir())), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "eval/loss_sigma_0.1", "eval/loss_sigma_0.9"} <= set(tags["scalars"])
    assert len(tags["images"]) == 2
    assert len(events.Images(tags["images"][0])) == 2  # before training, and at step 4
    assert "model_config/text_summary" in tags["tensors"]


def test_validation_videos_are_what_the_stock_pipeline_generates(lora_run):
    from vidtrl.data.video import read_video

    trainer, out, _, _ = lora_run
    folder = out / "validation" / "step_000004"
    prompts = json.loads((folder / "prompts.json").read_text())
    assert len(prompts) == 2
    name, prompt = next(iter(prompts.items()))
    written = read_video(folder / name).float() / 255
    fresh = wan()[0]
    fresh.load_lora_weights(str(out))
    video = sample(fresh, prompt, output_type="pt")[0]
    assert written.shape == video.shape == (9, 3, 16, 16)
    assert (written - video).abs().mean() < 0.05  # h264
    before = read_video(out / "validation" / "step_000000" / name).float() / 255
    assert (before - written).abs().mean() > 1e-4


def test_full_fine_tuning_round_trip(clips, cache_dir, tmp_path):
    from diffusers import WanTransformer3DModel

    trainer = make_trainer(tmp_path, clips, cache_dir, lora=False, save_strategy="steps", save_steps=2)
    start = trained_weights(trainer)
    assert set(start) == {name for name, _ in trainer.video_model.pipe.transformer.named_parameters()}
    trainer.train()
    trainer.save_model()
    assert all(not torch.equal(start[name], p) for name, p in trainer.model.named_parameters())
    live = sample(trainer.pipe)
    fresh = wan()[0]
    assert not torch.equal(sample(fresh), live)
    fresh.transformer = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")
    loaded = dict(fresh.transformer.named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in trainer.model.named_parameters())
    torch.testing.assert_close(sample(fresh), live, rtol=0, atol=1e-5)  # memory-mapped weights: other alignment
    assert (tmp_path / "checkpoint-2" / "transformer" / "config.json").is_file()


def test_gradient_checkpointing_changes_nothing_but_memory(clips, cache_dir, tmp_path):
    on = make_trainer(tmp_path / "on", clips, cache_dir, gradient_checkpointing=True)
    off = make_trainer(tmp_path / "off", clips, cache_dir, gradient_checkpointing=False)
    assert on.video_model.pipe.transformer.is_gradient_checkpointing
    assert not off.video_model.pipe.transformer.is_gradient_checkpointing
    on.train(), off.train()
    assert on.args.gradient_checkpointing  # the configuration still says what was asked for
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (on, off)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, value in trained_weights(off).items():
        torch.testing.assert_close(trained_weights(on)[name], value, rtol=1e-4, atol=1e-6)


def test_batch_split_does_not_matter(clips, cache_dir, tmp_path):
    whole = make_trainer(tmp_path / "a", clips, cache_dir, per_device_train_batch_size=4, max_steps=4)
    split = make_trainer(
        tmp_path / "b", clips, cache_dir, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4
    )
    other = make_trainer(tmp_path / "c", clips, cache_dir, per_device_train_batch_size=4, max_steps=4, seed=1)
    for trainer in (whole, split, other):
        trainer.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, split, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
    for name, value in trained_weights(whole).items():
        torch.testing.assert_close(trained_weights(split)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_load_best_model_at_end_restores_the_best_weights(clips, cache_dir, tmp_path, ema_decay):
    # the loss falls from the start, so calling the largest one best makes the last checkpoint a wrong answer
    trainer = make_trainer(
        tmp_path,
        clips,
        cache_dir,
        eval_clips=clips.select(range(3)),
        max_steps=4,
        greater_is_better=True,
        ema_decay=ema_decay,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = 1 + history.index(max(history))
    assert best < 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}" / "pytorch_lora_weights.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "pytorch_lora_weights.safetensors")
    trainer.save_model(str(tmp_path / "final"))
    final = load_file(tmp_path / "final" / "pytorch_lora_weights.safetensors")
    assert digest(final) == digest(saved) != digest(last)
    assert trainer.evaluate()["eval_loss"] == max(history)


def test_adapter_start_follows_the_seed(clips, cache_dir, tmp_path):
    def start(name, seed):
        torch.rand(3)  # the caller's generator is in another state each time
        return digest(trained_weights(make_trainer(tmp_path / name, clips, cache_dir, seed=seed)))

    assert start("a", 1) == start("b", 1) != start("c", 2)


def test_trainer_defaults_that_fit_diffusers(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir)
    assert trainer.args.remove_unused_columns is False
    assert trainer.args.ddp_find_unused_parameters is False
    assert trainer.processing_class is None
    # without an accelerator torch would warn at every loader; the Trainer's own rule needs use_cpu=True
    assert VideoSFTConfig("x").dataloader_pin_memory is torch.accelerator.is_available()
    assert VideoSFTTrainer.loss_is_scaled_for_ga is False
    # Trainer writes `use_cache` into the model's configuration, which diffusers means to freeze
    trainer.video_model.pipe.transformer.save_config(tmp_path / "config")
    assert type(trainer.video_model.pipe.transformer).load_config(tmp_path / "config")
    with pytest.raises(ValueError, match="remove_unused_columns"):
        VideoSFTConfig("x", remove_unused_columns=True)


def test_several_gpus_in_one_process_are_refused(clips, cache_dir, tmp_path):
    args = make_args(tmp_path, cache_dir)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        VideoSFTTrainer(wan()[0], args, clips, peft_config=LoraConfig(r=2))


def test_model_card_snippet_runs(clips, cache_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wan()[0].save_pretrained(tmp_path / "base")
    for name, lora in (("adapter", True), ("full", False)):
        trainer = make_trainer(
            tmp_path / name, clips, cache_dir, pipe=str(tmp_path / "base"), lora=lora, max_steps=1, cache=False
        )
        assert trainer.model_identity["name_or_path"] == str(tmp_path / "base")  # not ".../base/transformer"
        trainer.args.validation_num_inference_steps = 2
        trainer.train()
        trainer.save_model()
        trainer.create_model_card(dataset_name="me/clips", tags="toy")
        card = (tmp_path / name / "README.md").read_text()
        assert "vidtrl" in card and "text-to-video" in card and "- toy" in card and "me/clips" in card
        assert ("- lora" in card) == lora
        snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
        exec(compile(snippet, "card", "exec"), {})
        assert (tmp_path / "video.mp4").stat().st_size > 0
        (tmp_path / "video.mp4").unlink()


def test_progress_bar_shows_loss_speed_and_time_left(clips, cache_dir, tmp_path, capsys):
    trainer = make_trainer(tmp_path, clips, cache_dir, disable_tqdm=False)
    trainer.train()
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss=" in shown and "clips/s=" in shown
    assert re.search(r"1/3 \[\d\d:\d\d<\d\d:\d\d", shown)  # passed, and left
    assert "train_runtime" not in shown  # the Trainer's own bar and printer are gone


@pytest.mark.slow
def test_trackio_gets_curves_and_videos(clips, cache_dir, tmp_path):
    """In its own process: trackio starts a server."""
    code = f"""
import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
from datasets import load_from_disk
from sft_setup import make_trainer
trainer = make_trainer({str(tmp_path / "run")!r}, load_from_disk({str(tmp_path / "clips")!r}), {str(cache_dir)!r},
    report_to=["trackio"], validation_steps=2, num_validation_videos=1, validation_num_inference_steps=1,
    max_steps=2, project="test-sft", run_name="r")
trainer.train()
"""
    clips.save_to_disk(tmp_path / "clips")
    env = dict(os.environ, TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    media = list((tmp_path / "trackio").rglob("*.mp4"))
    assert len(media) == 2


@pytest.mark.slow
def test_wandb_gets_curves_and_videos(clips, cache_dir, tmp_path):
    """In its own process and offline: what a run would upload lies in its folder."""
    pytest.importorskip("wandb")
    code = f"""
import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import wandb
from datasets import load_from_disk
from sft_setup import make_trainer
from test_completions import CompletionLog, completions
logged = []
log = wandb.Run.log
wandb.Run.log = lambda run, data, *args, **kwargs: logged.append(data) or log(run, data, *args, **kwargs)
clips = load_from_disk({str(tmp_path / "clips")!r})
trainer = make_trainer({str(tmp_path / "run")!r}, clips, {str(cache_dir)!r}, eval_clips=clips.select(range(2)),
    report_to=["wandb"], validation_steps=2, num_validation_videos=2, validation_num_inference_steps=1,
    max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2, run_name="r")
trainer.train()
CompletionLog({str(tmp_path)!r}).write(**completions(), report_to=["wandb"])
wandb.finish()
names = {{name for data in logged for name in data}}
assert {{"train/loss", "eval/loss_sigma_0.1", "eval/loss_sigma_0.9", "completions"}} <= names, names
videos = [data for data in logged if "validation/videos" in data]
assert [data["train/global_step"] for data in videos] == [0, 2] and len(videos[0]["validation/videos"]) == 2
"""
    clips.save_to_disk(tmp_path / "clips")
    env = dict(
        os.environ, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true", WANDB_ERROR_REPORTING="false"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    media = [path.parent.name for path in (tmp_path / "wandb").glob("offline-run-*/files/media/videos/**/*.mp4")]
    assert sorted(media) == ["completions"] * 3 + ["validation"] * 4


# last: arguments that find their device start accelerate's state anew, under a trainer that is still evaluated
def test_no_file_and_no_tracker_gets_a_token(tmp_path):
    kwargs = {"token": "hf_secret", "revision": "main"}
    args = make_args(tmp_path, tmp_path, model_init_kwargs=kwargs, hub_token="hf_other")
    written = [args.to_json_string(), json.dumps(args.to_dict()), str(args.to_sanitized_dict())]
    assert all("hf_" not in text and "main" in text for text in written)
    assert args.model_init_kwargs == kwargs  # with which the model is loaded
