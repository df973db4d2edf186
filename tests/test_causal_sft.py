"""VideoSFTTrainer with `causal`: teacher forcing and diffusion forcing."""

import re
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from sft_setup import digest, make_trainer, trained_weights

from vidtrl import VideoSFTConfig
from vidtrl.data.video import write_video
from vidtrl.diffusion import flow
from vidtrl.diffusion.distribution_matching import training_weight
from vidtrl.models import KVCache
from vidtrl.rollout import causal_rollout
from vidtrl.toy.world import captions, render
from vidtrl.trainer.clip_data import collate
from vidtrl.trainer.draws import generators


MODES = ["teacher_forcing", "diffusion_forcing"]
BLOCKS = dict(num_frames=13, frames_per_block=2)  # 4 latent frames


@pytest.fixture(scope="module")
def longer_clips(tmp_path_factory):
    """Six clips of 13 frames, 16x16 pixels."""
    directory, rows = tmp_path_factory.mktemp("longer"), []
    for i in range(6):
        caption = captions()[i * 11 % 72]
        write_video(directory / f"{i}.mp4", render(caption, seed=i)[:13, :, ::4, ::4], fps=8)
        rows.append({"video": str(directory / f"{i}.mp4"), "prompt": caption})
    return Dataset.from_list(rows)


@pytest.fixture
def make(longer_clips, cache_dir, tmp_path):
    count = iter(range(100))

    def build(mode="teacher_forcing", **config):
        config = {**BLOCKS, "causal": mode, **config}
        clips = config.pop("clips", longer_clips)
        return make_trainer(config.pop("output_dir", tmp_path / str(next(count))), clips, cache_dir, **config)

    return build


def batch_of(trainer, *rows):
    return collate([trainer.train_dataset[(i, 100 + i)] for i in rows])


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_loss_is_the_error_of_each_block_upon_its_past(make, mode):
    """By hand, block by block with a cache: after clean blocks, or after the noisy ones at their own levels."""
    trainer = make(mode, caption_dropout=0.0)
    batch = batch_of(trainer, 0, 3)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs["sigma"].shape == outputs["error"].shape == (2, 2)
    assert len(set(outputs["sigma"].flatten().tolist())) == 4

    model, errors = trainer.video_model, torch.zeros(2, 2)
    for row in range(2):
        source, again = (generators(batch["draws"])[row] for _ in range(2))
        x0 = batch["mean"][row] + batch["std"][row] * torch.randn(batch["mean"][row].shape, generator=source)
        noise = torch.randn(x0.shape, generator=source)
        u = flow.sample_u("logit_normal", 2, again)
        sigma = 3 * u / (1 + 2 * u)  # the scheduler's shift is 3
        torch.testing.assert_close(outputs["sigma"][row], sigma)
        cache = KVCache()
        for b, s in enumerate(sigma.tolist()):
            clean, e = x0[None, :, 2 * b : 2 * b + 2], noise[None, :, 2 * b : 2 * b + 2]
            x = (1 - s) * clean + s * e
            with trainer.causal.cached(cache):
                velocity = model.velocity(x, s, batch["condition"][row])
            past, level = (clean, 0.0) if mode == "teacher_forcing" else (x, s)
            with trainer.causal.cached(cache, store=True):
                model.velocity(past, level, batch["condition"][row])
            errors[row, b] = (velocity - (e - clean)).square().mean()
    torch.testing.assert_close(outputs["error"], errors, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, errors.mean(), rtol=1e-5, atol=1e-6)


def test_the_bell_weighs_each_block_by_its_own_level(make):
    trainer = make(caption_dropout=0.0, loss_weighting="bell", shift=5.0)
    loss, outputs = trainer.compute_loss(trainer.model, batch_of(trainer, 0, 3), return_outputs=True)
    weight = training_weight(outputs["sigma"], shift=5.0)
    assert loss.item() == pytest.approx((weight * outputs["error"]).mean().item(), rel=1e-6)
    assert len(set(weight.flatten().tolist())) == 4 and abs(loss.item() / outputs["error"].mean().item() - 1) > 1e-2
    grid = trainer.video_model.training_sigma(torch.arange(1, 1001) / 1000, shift=5.0)
    assert trainer.loss_weight(grid, (16, 4, 2, 2)).mean().item() == pytest.approx(1, abs=2e-3)


def test_modes_differ_and_are_not_bidirectional(make):
    losses = {}
    for mode in (*MODES, None):
        trainer = make(mode)
        losses[mode] = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert len({round(loss, 5) for loss in losses.values()}) == 3


@pytest.mark.parametrize("mode", MODES)
def test_training_lowers_the_held_out_loss(make, longer_clips, mode):
    trainer = make(mode, eval_clips=longer_clips, max_steps=30, per_device_train_batch_size=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.97 * before


def test_held_out_loss_is_that_of_the_mode(make):
    """The same level in every block, after clean blocks."""
    trainer = make(caption_dropout=0.0)
    logged = trainer.evaluate(trainer.train_dataset)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    noise = torch.stack([torch.randn(batch["mean"].shape[1:], generator=g) for g in generators(batch["draws"])])
    x0, s, f = batch["mean"], 0.3, batch["mean"].shape[2]
    with torch.no_grad(), trainer.causal.teacher_forcing(2):
        levels = torch.tensor([[0.0] * f + [s] * f] * len(x0))
        latents = torch.cat([x0, (1 - s) * x0 + s * noise], 2)
        velocity = trainer.video_model.velocity(latents, levels, batch["condition"])[:, :, f:]
    assert len(x0) == len(trainer.train_dataset)  # one batch
    expected = (velocity - (noise - x0)).square().mean().item()
    assert logged["eval_loss_sigma_0.3"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_exact(make, tmp_path, mode):
    config = dict(max_steps=4, save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    whole = make(mode, output_dir=tmp_path / "run", **config)
    whole.train()
    again = make(mode, output_dir=tmp_path / "run", **config)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert digest(trained_weights(whole)) == digest(trained_weights(again))
    other = make(mode, seed=1, **config)
    other.train()
    assert digest(trained_weights(whole)) != digest(trained_weights(other))


@pytest.mark.parametrize("mode", MODES)
def test_one_batch_of_four_equals_two_of_two(make, mode):
    weights = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = make(mode, per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd")
        trainer.train()
        weights.append(trained_weights(trainer))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_no_gradient(make, mode):
    gradients = []
    for checkpointing in (False, True):
        trainer = make(mode, gradient_checkpointing=checkpointing)
        trainer.compute_loss(trainer.model, batch_of(trainer, 0, 1)).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_gradients_only_where_they_should_be(make):
    """The adapter learns and the base does not; a block's error depends on no later block."""
    trainer = make()
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = trained_weights(trainer)
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in trained_weights(trainer).items())
    assert all(torch.equal(base[n], p) for n, p in trainer.model.named_parameters() if n in base)

    for mode in MODES:
        trainer = make(mode)
        mean, _, condition = trainer.clean_latents(batch_of(trainer, 0))
        x0, noise = mean.clone().requires_grad_(), torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        error = trainer.velocity_error(trainer.model, x0, noise, torch.tensor([[0.4, 0.7]]), condition)
        (first,) = torch.autograd.grad(error[0, 0], x0, retain_graph=True)
        (second,) = torch.autograd.grad(error[0, 1], x0)
        assert not first[:, :, 2:].any() and first[:, :, :2].any()
        assert second[:, :, :2].any() and second[:, :, 2:].any()


def test_validation_videos_are_made_block_by_block(make):
    options = dict(validation_steps=2, num_validation_videos=2, validation_num_inference_steps=3)
    trainer = make(**options, validation_guidance_scale=2.0, max_steps=2)
    trainer.train()
    prompt = trainer.validation_prompts()[0]
    (video,) = trainer.generate_videos([prompt], seeds=[5])
    assert video.shape == (13, 3, 16, 16)
    assert len(list(Path(trainer.args.output_dir, "validation").glob("step_00000[02]/*.mp4"))) == 4
    model = trainer.video_model
    model.restore_encoders()
    size = dict(height=16, width=16, num_frames=13, max_sequence_length=16)
    condition, negative = model.condition(prompt, **size), model.condition("", **size, negative=True)
    noise = torch.randn(1, *condition.latent_shape, generator=torch.Generator().manual_seed(5))
    blocks = causal_rollout(
        model,
        trainer.causal,
        condition,
        noise,
        model.sigmas(3, condition.latent_shape)[:-1].tolist(),
        frames_per_block=2,
        sampler="ode",
        negative_condition=negative,
        guidance_scale=2.0,
    )
    expected = model.decode(torch.cat(list(blocks), 2))[0]
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
    stock = trainer.pipe(
        prompt,
        **size,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames[0]
    assert float((stock - video).abs().max()) > 1e-3  # what the stock pipeline would have shown
    with pytest.raises(ValueError, match="negative_prompt cannot be set"):
        trainer.generate_videos([prompt], seeds=[5], negative_prompt="")


def test_card_says_how_to_sample(make):
    trainer = make()
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert "It generates 2 latent frames at a time" in card and "frames_per_block=2" in card
    assert card.index("## A causal model") < card.index("## Training")


@pytest.mark.parametrize("name", ["wan22_ti2v", "skyreels", "ltx"])
@pytest.mark.parametrize("mode", MODES)
def test_families(make, name, mode):
    pipe, call = tiny_pipelines.ALL[name]()
    trainer = make(
        mode, pipe=pipe, max_steps=1, height=call["height"], width=call["width"], gradient_checkpointing=True
    )
    trainer.train()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [("wan22", "two experts"), ("wan_i2v", "image condition"), ("cogvideox", "attend to each other")],
)
def test_families_that_cannot(make, name, reason):
    with pytest.raises(ValueError, match=reason):
        make(pipe=tiny_pipelines.ALL[name]()[0])


def test_frames_that_do_not_divide(make):
    with pytest.raises(
        ValueError, match=r"3 latent frames \(9 video frames\).* 2 \(5 video frames\) and 4 \(13 video"
    ):
        make(num_frames=9)
    with pytest.raises(ValueError, match=re.escape("8k+5; the nearest are 5 and 13")):
        make(num_frames=None, height=None, width=None, buckets=["9x16x16"])
    trainer = make(num_frames=None, height=None, width=None, resolution=[16], token_budget=100)
    assert all(shape[0] % 8 == 5 for shape in trainer.train_dataset.dataset.shapes)


@pytest.mark.parametrize(
    ("config", "message"),
    [(dict(causal="masked"), "teacher_forcing"), (dict(frames_per_block=0), "at least 1")],
)
def test_bad_configuration(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        VideoSFTConfig(str(tmp_path), **config)
