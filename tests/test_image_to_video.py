"""Image-to-video through all three trainers: the condition of every family, what no loss may count, and the image column."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import distill_setup
import grpo_setup
import numpy as np
import pytest
import sft_setup
import tiny_pipelines
import torch
import yaml
from datasets import Dataset
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from sft_setup import trained_weights

from vidtrl.cli.main import main
from vidtrl.data import build_cache, plan_dataset
from vidtrl.data.video import condition_image, resize_crop, write_video
from vidtrl.diffusion import flow
from vidtrl.inference import StudentConfig, load_student
from vidtrl.inference.export import student_scheduler
from vidtrl.models import VideoModel, check_model
from vidtrl.models.capture import bind_call
from vidtrl.models.causal import CausalAttention
from vidtrl.models.families import find_family
from vidtrl.models.layout import CHANNEL_DIM
from vidtrl.rollout.few_step import few_step_rollout
from vidtrl.rollout.sampling import sample
from vidtrl.toy.world import captions, render


GIVEN = ["wan22_ti2v_i2v", "ltx_i2v", "hunyuan_i2v"]  # their first latent frame is the image's
CHANNELS = ["wan_i2v", "cogvideox_i2v", "hunyuan_i2v_concat"]  # they generate every frame
PROMPTS = grpo_setup.PROMPTS


def quick(recipes):
    """Every recipe with every family that is given frames; one family each is quick."""
    pairs = [(i, j) for i in range(len(recipes)) for j in range(len(GIVEN))]
    marks = [() if i % len(GIVEN) == j else pytest.mark.slow for i, j in pairs]
    return [pytest.param(recipes[i], GIVEN[j], marks=mark) for (i, j), mark in zip(pairs, marks, strict=True)]


def picture(seed: int, height=32, width=32) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def build(family: str, **changes):
    """(pipeline, fields of a configuration): sizes, and what else its pipeline is called with."""
    pipe, call = tiny_pipelines.ALL[family]()
    call = {name: value for name, value in call.items() if name != "image"} | changes
    if "prompt_template" in call:
        call["pipeline_kwargs"] = {"prompt_template": call.pop("prompt_template")}
    return pipe, call


def prompts(images) -> Dataset:
    return Dataset.from_list([{"prompt": p, "image": i} for p, i in zip(PROMPTS, images, strict=False)])


def clips(directory, images=None, size=32, frames=9) -> Dataset:
    rows = []
    for i in range(3):
        path = Path(directory) / f"{i}.mp4"
        write_video(path, render(captions()[i], seed=i)[:frames, :, :: 64 // size, :: 64 // size], fps=8)
        rows.append({"video": str(path), "prompt": captions()[i]} | ({"image": images[i]} if images else {}))
    return Dataset.from_list(rows)


def sft(tmp_path, family, rows, **config):
    pipe, call = build(family)
    return sft_setup.make_trainer(tmp_path / "sft", rows, tmp_path / "cache", pipe=pipe, **{**call, **config})


def grpo(tmp_path, family, rows, **config):
    pipe, call = build(family)
    config = dict(num_inference_steps=3, max_steps=1, guidance_scale=1.0, transition="flow-sde") | config
    return grpo_setup.make_trainer(tmp_path / "grpo", pipe=pipe, rows=rows, **{**call, **config})


def distill(tmp_path, family, rows, **config):
    pipe, call = build(family)
    config = dict(max_steps=2, denoising_steps=[1000, 500]) | config
    return distill_setup.make_trainer(tmp_path / "distill", tmp_path / "cache", pipe=pipe, rows=rows, **call | config)


def counted(module, name: str) -> list:
    """The first argument of every call of a method from now on."""
    seen, original = [], getattr(module, name)

    def method(x, *args, **kwargs):
        seen.append(x)
        return original(x, *args, **kwargs)

    setattr(module, name, method)
    return seen


def garbage(latents: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Other values where the image's are."""
    return torch.where(free > 0, latents, latents + 3)


# ---- Models ----


def test_only_the_families_that_are_given_frames_have_them():
    for family in [*GIVEN, *CHANNELS]:
        pipe, call = tiny_pipelines.ALL[family]()
        condition = VideoModel(pipe).condition("a cat", **call)
        free = condition.free()
        if family in CHANNELS:
            assert free is None and condition.samples[0]["hidden_states"].shape[1 if "cog" not in family else 2] > 1
        else:
            assert torch.equal(free, torch.ones_like(free).index_fill(2, torch.tensor([0]), 0))
            x = torch.randn(2, *condition.latent_shape)
            put = condition.with_fixed(x)
            assert torch.equal(put[:, :, 1:], x[:, :, 1:]) and not torch.equal(put[:, :, :1], x[:, :, :1])


BROKEN = {
    "first frame not known to be given": ("hunyuan_i2v", dict(fixed_frames=0), "parity, guidance 1"),
    "two frames given instead of one": ("hunyuan_i2v", dict(fixed_frames=2), "parity, guidance 1"),
    "negative prompt with the image": ("hunyuan_i2v", dict(negative_branch=False), "arguments, guidance 3"),
    "four frames too many": ("hunyuan_i2v_concat", dict(dropped_frames=0), "oracle"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_is_wrong_about_the_image_is_caught(name):
    family, change, check = BROKEN[name]
    pipe, call = tiny_pipelines.ALL[family]()
    row = VideoModel(pipe).family
    report = check_model(VideoModel(pipe, family=replace(row, **change)), **call)
    assert not next(r for r in report.rows if r.check == check).ok, str(report)
    assert check_model(pipe, **call).ok


def test_the_denoiser_tells_hunyuan_rows_apart():
    name = "HunyuanVideoImageToVideoPipeline"
    assert find_family(name, {"image_condition_type": "token_replace"}).fixed_frames == 1
    assert find_family(name, {"image_condition_type": "latent_concat"}).dropped_frames == 4
    with pytest.raises(ValueError, match="configured with .*latent_concat.* or .*token_replace"):
        find_family(name, {"image_condition_type": None})


@pytest.mark.parametrize("family", [*GIVEN, *CHANNELS])
def test_an_image_is_encoded_once_for_all_its_conditions(family):
    pipe, call = tiny_pipelines.ALL[family]()
    model = VideoModel(pipe)
    seen = counted(pipe.vae, "encode")
    call["image"] = condition_image(call["image"], call["height"], call["width"])
    first = model.condition("a cat", **call)
    negative = model.condition("", negative=True, **call)
    again = model.condition("a dog", **call)
    assert len(seen) == 1
    other = model.condition("a cat", **dict(call, image=call["image"].rotate(90)))
    assert len(seen) == 2  # another image is another encoding
    model.condition("a cat", **call)
    assert len(seen) == 3  # only the last one is kept
    alone = VideoModel(tiny_pipelines.ALL[family]()[0]).condition("a dog", **call)
    for name in again.samples[0]:
        assert torch.equal(again.samples[0][name], alone.samples[0][name]), name
    name = "fixed_latents" if family in GIVEN else "hidden_states"
    assert torch.equal(first.samples[0][name], negative.samples[0][name])
    assert not torch.equal(first.samples[0][name], other.samples[0][name])


def test_another_last_image_is_another_encoding():
    pipe, call = tiny_pipelines.ALL["wan_i2v"]()
    model = VideoModel(pipe)
    turned = call["image"].rotate(90)
    conditions = [model.condition("a cat", **call, last_image=last) for last in (call["image"], turned)]
    alone = VideoModel(pipe).condition("a cat", **call, last_image=turned)
    first, second, expected = (c.samples[0]["hidden_states"] for c in (*conditions, alone))
    assert torch.equal(second, expected) and not torch.equal(first, second)


@pytest.mark.parametrize("family", GIVEN)
def test_given_frames_are_the_image_at_every_step(family):
    pipe, call = tiny_pipelines.ALL[family]()
    model = VideoModel(pipe)
    condition = model.condition("a cat", **call)
    fixed, steps = condition.with_fixed(torch.zeros(1, *condition.latent_shape)), []
    noise = torch.randn(1, *condition.latent_shape, generator=torch.Generator().manual_seed(0))
    negative = model.condition("", negative=True, **call)
    sample(
        model,
        condition,
        negative,
        guidance_scale=3.0,
        num_inference_steps=3,
        latents=noise,
        callback=lambda i, x: steps.append(x),
    )
    calls = counted(model, "velocity")
    with torch.no_grad():
        steps.append(few_step_rollout(model, condition, noise, [1.0, 0.7, 0.3], draw=lambda i: noise))
    assert len(steps) == 4 and len(calls) == 3
    for x in [*steps, *calls]:
        assert torch.equal(x[:, :, 0], fixed[:, :, 0])
        assert not torch.equal(x[:, :, 1:], fixed[:, :, 1:])


@torch.no_grad()
@pytest.mark.parametrize("family", [*GIVEN, *CHANNELS, "cogvideox15_i2v", "sana_i2v"])
def test_the_stock_pipeline_samples_a_student_as_the_loop_of_training(family):
    """With its own scheduler calls, from its own first latents."""
    pipe, call = tiny_pipelines.ALL[family]()
    model, seen, steps = VideoModel(pipe), [], [1000, 750, 500, 250]
    condition = model.condition("a cat", **call)
    shape, image = condition.latent_shape, call.pop("image")
    sigmas = model.training_sigma(torch.tensor(steps) / 1000, shape, 3.0).tolist()
    student = StudentConfig("base", steps, 3.0, "ode")
    pipe.scheduler = student_scheduler(student, model.family, pipe.scheduler)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(bind_call(module, args, kwargs)["hidden_states"]), with_kwargs=True
    )
    size = {name: call.pop(name) for name in ("height", "width", "num_frames")}
    with model.guidance(1.0) as off:
        call = model.call_arguments(**size, pipeline_kwargs=call) | off
        call["generator"] = torch.Generator().manual_seed(0)  # that of conditions: some draw the image's latent
        got = pipe(prompt="a cat", image=image, num_inference_steps=4, output_type="latent", **call).frames
    dim = CHANNEL_DIM[model.family.layout]
    first = model.unpack(seen[0].narrow(dim, 0, model.pack(torch.zeros(1, *shape)).shape[dim]), shape)
    expected = few_step_rollout(model, condition, first, sigmas, sampler="ode")
    if family == "hunyuan_i2v_concat":  # what it leaves out of the video it leaves out here
        expected = expected[:, :, 1:]
    elif model.family.layout == "BFCHW" or got.ndim == 3:
        got = model.unpack(got, shape)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    other = few_step_rollout(model, condition, first, [1.0, 0.75, 0.5, 0.25], sampler="ode")
    assert (other[:, :, -1] - expected[:, :, -1]).abs().max() > 1e-2  # control: without the shift


@pytest.mark.parametrize("family", ["wan21_i2v", "hunyuan_i2v", "hunyuan_i2v_concat", "skyreels_i2v", "sana_i2v"])
def test_causal_attention_refuses_images(family):
    with pytest.raises(ValueError, match="cannot be made causal"):
        CausalAttention(VideoModel(tiny_pipelines.ALL[family]()[0]))


# ---- SFT ----


@pytest.mark.parametrize("family", GIVEN)
def test_sft_loss_is_the_mean_over_what_is_predicted(tmp_path, family):
    size = tiny_pipelines.ALL[family]()[1]["height"]
    trainer = sft(tmp_path, family, clips(tmp_path, size=size))
    inputs = next(iter(trainer.get_train_dataloader()))
    x0, _, condition = trainer.clean_latents(inputs)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    free, sigma = condition.free(), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        error = trainer.velocity_error(trainer.model, x0, noise, sigma, condition)
        velocity = trainer.video_model.velocity(flow.add_noise(x0, noise, sigma), sigma, condition)
        squares = (velocity - (noise - x0)).square()
        torch.testing.assert_close(error, squares[:, :, 1:].flatten(1).mean(1))
        assert not torch.allclose(error, squares.flatten(1).mean(1), rtol=1e-2)  # control: all frames
        other = trainer.velocity_error(trainer.model, garbage(x0, free), garbage(noise, free) * 2, sigma, condition)
        assert not torch.equal(other, error)  # noise * 2 is seen in the free frames
        same = trainer.velocity_error(trainer.model, garbage(x0, free), garbage(noise, free), sigma, condition)
    torch.testing.assert_close(same, error, rtol=1e-6, atol=0)


def test_image_columns_of_all_kinds_give_one_condition(tmp_path):
    images = [picture(i, 40, 64) for i in range(3)]
    paths = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    given = {
        "PIL": clips(tmp_path, images),
        "path": clips(tmp_path, paths),
        "feature": clips(tmp_path, paths).cast_column("image", datasets.Image()),
    }
    found = {}
    for name, rows in given.items():
        for cache in (True, False):
            trainer = sft(tmp_path / f"{name}{cache}", "wan_i2v", rows, cache=cache)
            trainer.args.output_dir = str(tmp_path)
            inputs = [trainer.train_dataset[i, 0] for i in range(3)]
            conditions = [
                trainer.clean_latents(trainer._prepare_inputs(trainer.data_collator([item])))[2] for item in inputs
            ]
            found[name, cache] = [c.samples[0]["hidden_states"] for c in conditions]
            assert trainer.validation_image(1).size == (16, 16)
    wanted = VideoModel(tiny_pipelines.wan_i2v()[0])
    size = dict(height=16, width=16, num_frames=9, max_sequence_length=16)
    for i, image in enumerate(images):
        array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        cropped = (resize_crop(array, 16, 16)[0] * 255).round().byte().permute(1, 2, 0).numpy()
        want = wanted.condition("a cat", image=Image.fromarray(cropped), **size).samples[0]["hidden_states"]
        stretched = wanted.condition("a cat", image=image, **size).samples[0]["hidden_states"]
        assert not torch.equal(stretched, want)  # control: what the pipeline does to another aspect ratio
        for name, hidden in found.items():
            assert torch.equal(hidden[i], want), name


@pytest.mark.parametrize("cache", [True, False])
def test_sft_drops_what_cannot_be_read_and_falls_back_to_the_first_frame(tmp_path, cache, caplog, capsys):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    picture(0).save(tmp_path / "good.png")
    images = [str(tmp_path / "broken.png"), None, str(tmp_path / "good.png")]
    with caplog.at_level(logging.WARNING):
        trainer = sft(tmp_path, "wan_i2v", clips(tmp_path, images), cache=cache, max_bad_fraction=0.5, max_steps=2)
        encoded = [trainer.train_dataset[i, 0] for i in range(len(trainer.train_dataset))]
        trainer.train()
    assert len([r for r in caplog.records if "broken.png" in r.getMessage()]) == 1
    assert "first frame" not in capsys.readouterr().out  # there is a column
    prompts = [item["prompt"] for item in encoded]
    assert prompts == (captions()[1:3] if cache else [captions()[1], captions()[1], captions()[2]])
    first = sft(tmp_path / "none", "wan_i2v", clips(tmp_path), cache=cache, max_steps=1)
    assert "the image of each clip is its first frame" in capsys.readouterr().out
    ours, theirs = (
        trainer.clean_latents(trainer._prepare_inputs(trainer.data_collator([item])))[2].samples[0]["hidden_states"]
        for trainer, item in ((trainer, encoded[-2]), (first, first.train_dataset[1, 0]))
    )
    assert torch.equal(ours, theirs)


def test_the_image_is_part_of_the_cache_key(tmp_path):
    counts = []
    for seed in (0, 0, 1):
        pipe, call = build("wan_i2v")
        seen = counted(pipe.vae, "encode")
        rows = clips(tmp_path, [picture(seed), picture(5), picture(6)])
        config = dict(caption_dropout=0.5, **call)  # prompt and empty prompt share the image
        sft_setup.make_trainer(tmp_path / f"run{len(counts)}", rows, tmp_path / "cache", pipe=pipe, **config)
        counts.append(len(seen))
    assert counts == [6, 0, 1]  # clips and images; nothing; the new image


def test_a_cache_needs_images_and_one_kind_of_other_prompt(tmp_path):
    rows = [{"prompt": p} for p in PROMPTS]
    plan = plan_dataset(
        rows, frame_multiple=4, frame_offset=1, pixel_multiple=16, spatial_factor=8, temporal_factor=4,
        height=16, width=16, num_frames=9,
    )  # fmt: skip
    options = dict(
        cache_dir=tmp_path, fingerprint={"model": "m"}, text_only=True, condition_columns=("prompt", "image")
    )
    with pytest.raises(ValueError, match="every row needs an image"):
        build_cache(rows, plan, None, None, **options)
    with pytest.raises(ValueError, match="set empty_prompt=False"):
        build_cache(rows, plan, None, None, negative_prompt="blurry", **options)


# ---- GRPO ----


def images_of(number=4, size=32):
    return [picture(i, size, size) for i in range(number)]


@pytest.mark.parametrize("recipe, family", quick(["flow-grpo", "diffusion-nft", "awm", "dppo"]))
def test_grpo_losses_do_not_see_given_frames(tmp_path, family, recipe):
    config = dict(loss_type="dppo") if recipe == "dppo" else dict(recipe=recipe)
    config |= dict(ratio_normalization=True) if family == "ltx_i2v" and recipe == "flow-grpo" else {}
    trainer = grpo(
        tmp_path,
        family,
        prompts(images_of(2)),
        cls=grpo_setup.Watching,
        per_device_train_batch_size=4,
        num_generations=2,
        beta=0.1,
        **config,
    )
    before = trained_weights(trainer)
    trainer.train()
    assert distill_setup.distance(before, trained_weights(trainer)) > 1e-4  # the gradient reaches the denoiser
    generation = trainer.generations[0]
    for decision in [item.decision for item in generation["items"] if item.decision is not None]:
        given_ = trainer._group_conditions[decision.group].samples[0]["fixed_latents"][0, :, 0]
        assert torch.equal(decision.latents[:, 0], given_) and torch.equal(decision.old_mean[:, 0], given_)
        assert all(torch.equal(x[:, 0], given_) for x in decision.next_latents)
    batch = next(b for part in generation["slices"] for b in part)
    for item in batch:
        if item.decision is None:
            given_ = trainer._group_conditions[item.group].samples[0]["fixed_latents"][0, :, 0]
            assert torch.equal(item.x0[:, 0], given_)

    def loss():
        with torch.no_grad():
            total, parts = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        return torch.cat([total.reshape(1), parts["ratio"], parts["kl"]])

    clean = loss()
    for item in batch:
        free = trainer._group_conditions[item.group].free()[0]
        if item.decision is None:
            item.noise = garbage(item.noise, free)
        else:
            item.decision.latents = garbage(item.decision.latents, free)
            item.decision.next_latents = garbage(item.decision.next_latents, free)
            item.decision.old_mean = garbage(item.decision.old_mean, free)
    torch.testing.assert_close(loss(), clean, rtol=1e-5, atol=1e-6)
    for item in batch:  # control: a frame that is generated
        if item.decision is None:
            item.noise[:, -1] += 0.1
        else:
            item.decision.next_latents[:, :, -1] += 0.1
    assert not torch.allclose(loss(), clean, rtol=1e-5, atol=1e-6)


def test_grpo_shows_rewards_the_image_and_encodes_it_once(tmp_path):
    seen = []

    def brightness(videos, image, prompts, **kwargs):
        seen.extend(zip(prompts, image, strict=True))
        return grpo_setup.brightness(videos)

    rows = prompts(images_of(2, 48))
    pipe, call = build("wan_i2v")
    encoded = counted(pipe.vae, "encode")
    config = dict(num_inference_steps=2, max_steps=3, per_device_train_batch_size=4, num_generations=2)
    config |= dict(guidance_scale=2.0, rewards=brightness)
    trainer = grpo_setup.make_trainer(tmp_path, pipe=pipe, rows=rows, **call | config)
    trainer.train()
    assert len({id(image) for _, image in seen}) == 6  # fitted once for both videos of a row
    assert len(seen) == 12 and len(encoded) == 2  # three generations, two branches of guidance, two images
    for prompt, image in seen:  # of every member of a group
        want = condition_image(rows[PROMPTS.index(prompt)]["image"], 16, 16)
        assert image.size == (16, 16) and image.tobytes() == want.tobytes()
    assert trainer.validation_image(1).size == (16, 16)


def test_grpo_and_distillation_need_images(tmp_path, caplog):
    rows = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    for make in (grpo, distill):
        with pytest.raises(ValueError, match="WanImageToVideoPipeline starts from an image: give .* a column image"):
            make(tmp_path, "wan_i2v", rows)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    picture(0).save(tmp_path / "good.png")
    paths = [str(tmp_path / name) for name in ("good.png", "broken.png", "good.png", "missing.png")]
    for make in (grpo, distill):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            bad = dict(max_bad_fraction=0.9) if make is distill else {}
            trainer = make(tmp_path / make.__name__, "wan_i2v", prompts(paths), **bad)
        kept = trainer.train_dataset["prompt"] if make is grpo else trainer.train_dataset.dataset.dataset._prompt
        assert list(map(str, kept)) == [PROMPTS[0], PROMPTS[2]]
        for name in ("broken.png", "missing.png"):
            assert len([r for r in caplog.records if name in r.getMessage()]) == 1
    with pytest.raises(ValueError, match="no image of the dataset can be read"):
        grpo(tmp_path, "wan_i2v", prompts(paths[1:2]))


def test_an_image_column_of_a_text_model_is_for_the_rewards(tmp_path):
    seen = []

    def reward(videos, image, **kwargs):
        seen.extend(image)
        return [0.0] * len(videos)

    config = dict(max_steps=1, num_inference_steps=2, per_device_train_batch_size=4, num_generations=2)
    trainer = grpo_setup.make_trainer(tmp_path, rows=prompts(images_of(2)), rewards=reward, **config)
    trainer.train()
    assert {image.size for image in seen} == {(32, 32)}


# ---- Distillation ----


@pytest.mark.parametrize("recipe, family", quick(["dmd2", "lcm"]))
def test_distillation_losses_do_not_see_given_frames(tmp_path, family, recipe):
    size = tiny_pipelines.ALL[family]()[1]["height"]
    rows = prompts(images_of(2)) if recipe == "dmd2" else clips(tmp_path, images_of(3), size=size)
    config = {} if recipe == "dmd2" else dict(ema_decay=0.9, teacher_steps=4)
    config["teacher_guidance_scale"] = 1.0 if family == "hunyuan_i2v" else 2.0  # it takes guidance as an input
    trainer = distill(tmp_path, family, rows, recipe=recipe, **config)
    before = trained_weights(trainer)
    trainer.train()
    assert distill_setup.distance(before, trained_weights(trainer)) > 1e-4
    inputs = trainer.prepare_batch(next(iter(trainer.get_train_dataloader())))
    condition = inputs["condition"]
    free, fixed = condition.free(), condition.with_fixed(torch.zeros(2, *condition.latent_shape))
    velocity = trainer.video_model.velocity

    def loss(inputs):
        with torch.no_grad(), trainer.policies.active("student"):
            return trainer.student_loss(inputs)[0].double()

    clean = loss(inputs)
    if recipe == "lcm":
        noisy = dict(inputs, mean=garbage(inputs["mean"], free))
        torch.testing.assert_close(loss(noisy), clean, rtol=1e-5, atol=1e-9)
        noisy["mean"] = inputs["mean"] + 0.3 * free
        assert not torch.allclose(loss(noisy), clean, rtol=1e-3)  # control
        return
    with torch.no_grad(), trainer.policies.active("student"):
        _, x = trainer.student_loss(inputs)
    assert torch.equal(x[:, :, 0], fixed[:, :, 0])
    # whatever the scores say of the image's frames is left out; control: of the others it is not
    for frame, same in ((0, True), (1, False)):

        def disturbed(latents, sigma, condition, frame=frame, **kwargs):
            v = velocity(latents, sigma, condition, **kwargs)
            if trainer.policies.current == "fake":
                v = v.clone()
                v[:, :, frame] += 0.5
            return v

        trainer.video_model.velocity = disturbed
        assert torch.allclose(loss(inputs), clean, rtol=1e-6) == same
        with torch.no_grad(), trainer.policies.active("fake"):
            error = trainer.fake_loss(inputs, x)[0]
        trainer.video_model.velocity = velocity
        with torch.no_grad(), trainer.policies.active("fake"):
            assert torch.allclose(trainer.fake_loss(inputs, x)[0], error, rtol=1e-6) == same


def test_both_branches_of_a_teachers_guidance_encode_the_image_once(tmp_path):
    pipe, call = build("wan22_ti2v_i2v")
    seen = counted(pipe.vae, "encode")
    config = dict(call, teacher_guidance_scale=3.0, max_steps=1)
    make = dict(pipe=pipe, rows=prompts(images_of(4)))
    trainer = distill_setup.make_trainer(tmp_path / "run", tmp_path / "cache", **make, **config)
    assert len(seen) == 4 and trainer.validation_image(1).size == (32, 32)
    inputs = next(iter(trainer.get_train_dataloader()))
    positive, negative = inputs["condition"].samples[0], inputs["negative_condition"].samples[0]
    assert torch.equal(positive["fixed_latents"], negative["fixed_latents"])
    assert not torch.equal(positive["encoder_hidden_states"], negative["encoder_hidden_states"])
    model = VideoModel(tiny_pipelines.wan22_ti2v_i2v()[0])
    image = condition_image(make["rows"][inputs["index"][0]]["image"], 32, 32)
    size = {name: call[name] for name in ("height", "width", "num_frames", "max_sequence_length")}
    want = model.condition(trainer.args.negative_prompt, image=image, negative=True, **size).samples[0]
    assert all(torch.equal(negative[name], want[name]) for name in want)


# ---- What comes out ----

FRESH = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import tiny_pipelines
from PIL import Image
for family, adapter, call, out in json.loads(sys.argv[2]):
    pipe, defaults = tiny_pipelines.ALL[family]()
    pipe.load_lora_weights(adapter)
    pipe.set_progress_bar_config(disable=True)
    extra = {k: v for k, v in defaults.items() if k == "prompt_template"}
    image = Image.open(call.pop("image"))
    latents = pipe(image=image, generator=torch.Generator().manual_seed(0), output_type="latent", **call, **extra).frames
    torch.save(latents, out)
"""


def test_the_pipeline_and_a_fresh_process_sample_the_trained_weights(tmp_path):
    image = picture(3)
    image.save(tmp_path / "image.png")
    jobs, wanted = [], {}
    for family, make in (("wan22_ti2v_i2v", sft), ("ltx_i2v", grpo), ("hunyuan_i2v", sft)):
        pipe, call = tiny_pipelines.ALL[family]()
        size = {name: call[name] for name in ("height", "width", "num_frames")}
        rows = prompts(images_of(2)) if make is grpo else clips(tmp_path, size=call["height"])
        config = dict(per_device_train_batch_size=4, num_generations=2) if make is grpo else dict(max_steps=1)
        trainer = make(tmp_path / family, family, rows, **config)
        trainer.train()
        trainer.save_model()
        asked = dict(size, prompt="a red circle", num_inference_steps=2, max_sequence_length=16)
        extra = {name: value for name, value in call.items() if name == "prompt_template"}
        asked_now = dict(asked, **extra, image=image, output_type="latent")
        with torch.no_grad():
            seeded = dict(generator=torch.Generator().manual_seed(0))
            wanted[family] = trainer.pipe(**asked_now, **seeded).frames
            untrained = pipe(**asked_now, generator=torch.Generator().manual_seed(0)).frames
        assert not torch.allclose(wanted[family], untrained, atol=1e-6)  # control: without the adapter
        asked["image"] = str(tmp_path / "image.png")
        jobs.append([family, trainer.args.output_dir, asked, str(tmp_path / f"{family}.pt")])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(Path(__file__).parent), json.dumps(jobs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for family, _, _, path in jobs:
        torch.testing.assert_close(torch.load(path), wanted[family], rtol=0, atol=1e-6)


# those above are given frames; these are given channels, the last one on two experts
FROM_CHANNELS = ["cogvideox_i2v", "hunyuan_i2v_concat", "wan21_i2v", "cogvideox15_i2v", "wan22_i2v"]


def two_experts():
    """Wan 2.2 A14B for images: a second denoiser of the same kind."""
    pipe, call = tiny_pipelines.wan_i2v()
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    second = tiny_pipelines.tiny_wan_transformer((36, 16), seed=1)
    return WanImageToVideoPipeline(**parts, transformer_2=second, boundary_ratio=0.9), call


@pytest.mark.parametrize(
    "make, family",
    [
        pytest.param(make, family, marks=() if i < 2 else pytest.mark.slow)
        for make in (sft, grpo, distill)
        for i, family in enumerate(FROM_CHANNELS)
        if (make, family) != (distill, "wan22_i2v")  # refused: test_experts.py
    ],
)
def test_a_fresh_pipeline_samples_what_was_trained_from_images(tmp_path, make, family, monkeypatch):
    monkeypatch.setitem(tiny_pipelines.ALL, "wan22_i2v", two_experts)
    fresh, call = tiny_pipelines.ALL[family]()
    size = {name: call[name] for name in ("height", "width", "num_frames")}
    rows, config = prompts(images_of(2)), {}
    if make is sft:
        rows, config = clips(tmp_path, images_of(3), size["height"], size["num_frames"]), dict(max_steps=4)
    elif make is grpo:
        config = dict(per_device_train_batch_size=4, num_generations=2)
        config |= dict(transition="ddim", noise_level=1.0) if "cogvideox" in family else {}
        config |= dict(num_inference_steps=6, sde_range=[0.0, 1.0], max_steps=3) if family == "wan22_i2v" else {}
    trainer = make(tmp_path, family, rows, **config)
    trainer.train()
    trainer.save_model()

    call |= {"true_cfg_scale" if "hunyuan" in family else "guidance_scale": 1.0}
    call |= dict(image=condition_image(picture(3), size["height"], size["width"]), prompt="a red circle")
    call |= dict(num_inference_steps=2, output_type="pt")

    @torch.no_grad()
    def video(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, generator=torch.Generator().manual_seed(5)).frames[0]

    if make is distill:
        load_student(trainer.args.output_dir, fresh).unload_lora_weights()  # what is left is its scheduler
        untrained, expected = video(fresh), trainer.generate_videos(["a red circle"], [5], [call["image"]])[0]
        load_student(trainer.args.output_dir, fresh)
    else:
        untrained, expected = video(fresh), video(trainer.pipe)
        if family == "wan22_i2v":
            high, low = (f"pytorch_lora_weights_{level}_noise.safetensors" for level in ("high", "low"))
            for name in (high, low):  # both were trained
                weights = load_file(Path(trainer.args.output_dir, name))
                assert max(w.abs().max() for n, w in weights.items() if "lora_B" in n) > 1e-3
            fresh.load_lora_weights(trainer.args.output_dir, weight_name=high)
            fresh.load_lora_weights(trainer.args.output_dir, weight_name=low, load_into_transformer_2=True)
        else:
            fresh.load_lora_weights(trainer.args.output_dir)
    torch.testing.assert_close(video(fresh), expected, rtol=0, atol=1e-5)
    assert (expected - untrained).abs().max() > 5e-5  # control: without the adapter


# ---- Command line ----


@pytest.fixture
def folder(tmp_path):
    """Clips with images beside them, and prompts with the same images."""
    pipe, _ = tiny_pipelines.wan22_ti2v_i2v()
    pipe.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for i, row in enumerate(clips(data)):
        picture(i).save(data / "images" / f"{i}.png")
        rows.append({"file_name": f"{i}.mp4", "prompt": row["prompt"], "image": f"images/{i}.png"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [{name: row[name] for name in ("prompt", "image")} for row in rows]
    (data / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.parametrize("command", ["sft", "grpo", "distill"])
def test_command_line(folder, command, capsys):
    values = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data" if command == "sft" else folder / "data" / "prompts.jsonl"),
        "output_dir": str(folder / "out"),
        "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16,
        "use_peft": True, "lora_r": 4, "use_cpu": True, "gradient_checkpointing": False, "check_model": False,
        "max_steps": 1, "logging_steps": 1, "report_to": "none", "per_device_train_batch_size": 2,
    }  # fmt: skip
    if command != "grpo":
        values["cache_dir"] = str(folder / "cache")
    if command == "grpo":
        values |= {"reward_funcs": ["toy-color"], "num_inference_steps": 2, "num_generations": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert main([command, "--config", str(folder / "config.yaml")]) == 0
    assert (folder / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert "is its first frame" not in capsys.readouterr().out
    if command == "grpo":  # a path that leaves the folder
        (folder / "data" / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "image": "../model/x.png"}))
        again = [command, "--config", str(folder / "config.yaml"), "--output_dir", str(folder / "again")]
        assert main(again) != 0 and "'../model/x.png' leaves the dataset's directory" in capsys.readouterr().err
