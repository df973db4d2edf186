"""VideoGRPOTrainer: rewards, metrics, what is trained, what is not, resuming, evaluation, other families."""

import asyncio
import json
import math

import pandas as pd
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from grpo_setup import PROMPTS, Watching, brightness, dataset, history, make_args, make_trainer
from peft import LoraConfig
from sft_setup import digest, trained_weights
from tiny_pipelines import wan
from transformers import TrainerCallback

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer
from vidtrl.rewards.runner import RewardError, RewardRunner
from vidtrl.trainer.ema import WeightAverage
from vidtrl.trainer.grpo_logging import GenerationMetrics
from vidtrl.trainer.memory import planned_config


def constant(videos, **kwargs):
    return [0.25] * len(videos)


def contrast(videos, **kwargs):
    return [v.std().item() for v in videos]


def snapshot(weights: dict) -> dict:
    return {name: tensor.clone() for name, tensor in weights.items()}


def distance(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


class AtStep(TrainerCallback):
    """Calls a function after every optimizer step, or once before one."""

    def __init__(self, end=None, begin=None):
        self.end, self.begin = end, begin

    def on_step_begin(self, args, state, control, **kwargs):
        if self.begin:
            self.begin(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.end:
            self.end(state.global_step)


# ---- Metrics ----


def test_metrics_have_trls_names(tmp_path):
    trainer = make_trainer(tmp_path, recipe="flow-grpo", rewards=[brightness, contrast], num_inference_steps=3)
    trainer.train()
    logs = trainer.state.log_history[0]
    expected = {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl", "ratio/mean",
        "rewards/brightness/mean", "rewards/brightness/std", "rewards/contrast/mean", "rewards/contrast/std",
        "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/region_mean", "grad_norm/step_0", "grad_norm/step_1",
        "nfe", "rollout_time", "reward_time", "update_time", "step_time", "reward_std/within_prompt",
    }  # fmt: skip
    assert expected <= set(logs) and "grad_norm/step_2" not in logs
    assert all(math.isfinite(value) for value in logs.values())
    assert logs["reward"] == pytest.approx(logs["rewards/brightness/mean"] + logs["rewards/contrast/mean"], rel=1e-5)
    assert 0 < logs["rollout_time"] + logs["update_time"] <= logs["step_time"] < 60


def test_reward_metrics_are_the_rewards(tmp_path):
    trainer = make_trainer(
        tmp_path, cls=Watching, rewards=[brightness, contrast], reward_weights=[1.0, -2.0], max_steps=1
    )
    trainer.train()
    rewards, logs = trainer.generations[0]["rewards"], trainer.state.log_history[0]
    total = rewards[..., 0] - 2 * rewards[..., 1]
    assert logs["reward"] == pytest.approx(total.mean().item(), rel=1e-6)
    assert logs["reward_std"] == pytest.approx(total.std().item(), rel=1e-6)  # as in TRL
    assert logs["reward_std/within_prompt"] == pytest.approx(total.std(1).mean().item(), rel=1e-6)
    assert logs["rewards/contrast/std"] == pytest.approx(rewards[..., 1].std().item(), rel=1e-6)
    own = [(r - r.mean(1, keepdim=True)) / (r.std(unbiased=False) + 1e-4) for r in rewards.double().unbind(2)]
    expected = (own[0] - 2 * own[1]).clamp(-5, 5)  # each normalised, then weighted
    for (group, _, member), advantage in trainer.generations[0]["advantages"].items():
        assert advantage == pytest.approx(expected[group, member].item(), rel=1e-3)


# ---- The reward contract ----


def test_none_leaves_a_reward_out(tmp_path):
    def sometimes(prompts, videos, **kwargs):
        return [None if "red" in p else v.mean().item() for p, v in zip(prompts, videos, strict=True)]

    def never(videos, **kwargs):
        return [None] * len(videos)

    config = dict(cls=Watching, rewards=[sometimes, never], max_steps=1, per_device_train_batch_size=16)
    trainer = make_trainer(tmp_path, **config)
    trainer.train()
    generation = trainer.generations[0]
    silent = [g for g in range(4) if generation["rewards"][g, :, 0].isnan().all()]
    assert len(silent) == 1 and generation["rewards"][..., 1].isnan().all()
    for (group, _, _), advantage in generation["advantages"].items():
        assert (advantage == 0) == (group in silent)
    trained = {
        item.group for slices in generation["slices"] for batch in slices for item in batch if item.weight.any()
    }
    assert trained == set(range(4)) - set(silent)
    assert history(trainer, "frac_reward_zero_std") == [0.25]


def test_columns_state_and_logged_values(tmp_path):
    seen = {}

    def reward(prompts, videos, completions, strength, trainer_state, log_metric, log_extra, **kwargs):
        seen.setdefault("strength", []).extend(strength)
        seen["step"] = trainer_state.global_step
        assert len(prompts) == len(videos) == len(completions) == len(strength)
        assert all(v.shape == (9, 3, 16, 16) and v.dtype == torch.float32 for v in videos)
        assert all(0 <= v.min() and v.max() <= 1 for v in videos)
        log_metric("mean_strength", sum(strength) / len(strength))
        log_extra("strength", strength)
        return [s * v.mean().item() for s, v in zip(strength, videos, strict=True)]

    rows = Dataset.from_list([{"prompt": p, "strength": float(i)} for i, p in enumerate(PROMPTS)])
    trainer = make_trainer(tmp_path, rewards=reward, rows=rows, per_device_train_batch_size=16, max_steps=2)
    trainer.train()
    assert sorted(seen["strength"][:16]) == [0.0] * 4 + [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    assert seen["step"] == 1 and history(trainer, "mean_strength") == [1.5, 1.5]


def test_rewards_get_the_videos_of_their_prompts(tmp_path):
    """The rewards are those of the stock decoder on the latents that each member was given."""
    kept = []

    def reward(prompts, videos, **kwargs):
        kept.extend(zip(prompts, videos, strict=True))
        return brightness(videos)

    trainer = make_trainer(tmp_path, cls=Watching, rewards=reward, max_steps=1, rollout_batch_size=1)
    trainer.train()
    generation = trainer.generations[0]
    prompts = [row["prompt"] for _, row in sorted(next(iter(trainer.get_train_dataloader())))]
    assert [prompt for prompt, _ in kept] == [prompt for prompt in prompts for _ in range(4)]
    got = torch.tensor([brightness([video])[0] for _, video in kept])
    torch.testing.assert_close(got, generation["rewards"].flatten())
    assert len(set(got.tolist())) == 8


def test_async_rewards(tmp_path):
    async def slow(videos, **kwargs):
        await asyncio.sleep(0.01)
        return brightness(videos)

    plain, waited = (make_trainer(tmp_path / n, rewards=f) for n, f in (("plain", brightness), ("async", slow)))
    plain.train(), waited.train()
    assert digest(trained_weights(plain)) == digest(trained_weights(waited))


@pytest.mark.parametrize("recipe", ["flash-grpo", "dance-grpo"])
def test_equal_rewards_change_nothing(tmp_path, recipe):
    trainer = make_trainer(tmp_path, recipe=recipe, rewards=constant, weight_decay=0.1, num_inference_steps=3)
    before = digest(trained_weights(trainer))
    trainer.train()
    assert trainer.state.global_step == 2 and digest(trained_weights(trainer)) == before
    assert history(trainer, "frac_reward_zero_std") == [1.0, 1.0] and history(trainer, "loss") == [0.0, 0.0]


def test_a_silent_generation_between_others(tmp_path):
    """The ratio check looks at the first micro-batch of its own generation, or at nothing."""

    def reward(videos, trainer_state, **kwargs):
        return constant(videos) if trainer_state.global_step == 2 else brightness(videos)

    trainer = make_trainer(tmp_path, rewards=reward, num_iterations=2, max_steps=6)
    weights = {}
    trainer.add_callback(AtStep(end=lambda step: weights.update({step: digest(trained_weights(trainer))})))
    trainer.train()
    assert history(trainer, "frac_reward_zero_std") == [0.0, 1.0, 0.0]
    assert weights[2] == weights[3] == weights[4] != weights[5]


# ---- Rollout and update see the same policy ----


def test_ratio_check_trips_on_dropout(tmp_path):
    pipe = wan()[0]
    block = pipe.transformer.blocks[0]
    dropout = torch.nn.Dropout(0.1)
    block.register_forward_hook(lambda module, args, output: dropout(output))
    trainer = make_trainer(tmp_path, pipe=pipe, reuse_rollout=False)
    with pytest.raises(ValueError, match="policy ratio deviates from 1 by .*dropout"):
        trainer.train()
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        make_trainer(tmp_path, lora=LoraConfig(r=4, lora_dropout=0.1))


def test_ratio_check_trips_on_a_changed_policy(tmp_path):
    class Forgetful(VideoGRPOTrainer):
        change = 0.0

        def generate(self, inputs):
            slices = super().generate(inputs)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(self.change * torch.randn_like(parameter))
            return slices

    make_trainer(tmp_path, cls=Forgetful, reuse_rollout=False).train()
    trainer = make_trainer(tmp_path, cls=Forgetful, reuse_rollout=False)
    trainer.change = 1e-2
    with pytest.raises(ValueError, match="before the first update of a generation the policy ratio deviates"):
        trainer.train()


@pytest.mark.parametrize("recipe", ["flash-grpo", "cps", "g2rpo"])
def test_micro_batch_sizes_do_not_move_the_ratio(tmp_path, recipe):
    config = dict(recipe=recipe, num_inference_steps=4, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    config |= dict(num_generations=6, rollout_batch_size=5, max_steps=1)
    trainer = make_trainer(tmp_path, **config)
    trainer.train()
    assert history(trainer, "ratio/mean")[0] == pytest.approx(1, abs=1e-6)


# ---- The reference ----


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_divergence_from_the_reference(tmp_path, lora):
    config = dict(recipe="flow-grpo", lora=lora, num_inference_steps=3, max_steps=3, learning_rate=1e-3)
    trainer = make_trainer(tmp_path, cls=Watching, **config)
    start = snapshot(trained_weights(trainer))
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == 0 and 0 < kl[1] and 0 < kl[2]
    assert ("reference" in trainer.roles) == (not lora)
    if not lora:
        assert distance(trainer.roles["reference"].average, start) == 0
    # by hand: the reference is the untrained model
    item = trainer.generations[-1]["items"][0]
    d = item.decision
    _, outputs = trainer.compute_loss(trainer.model, [item], return_outputs=True)
    sigma = torch.tensor([d.sigma])
    untrained = wan()[0].transformer
    with torch.no_grad():
        new = trainer._velocity(trainer._unwrapped(), d.latents[None], sigma, [d.group])
        old = trainer._velocity(untrained, d.latents[None], sigma, [d.group])
    mean, reference = (trainer.transition(d.latents[None], v, d.sigma, d.sigma_next) for v in (new, old))
    expected = (mean.mean - reference.mean).square().mean() / (2 * mean.std**2)
    torch.testing.assert_close(outputs["kl"], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_beta_holds_the_policy_back(tmp_path):
    moved = {}
    for beta in (0.0, 1e4):
        config = dict(recipe="flow-grpo", beta=beta, num_inference_steps=3, max_steps=6, learning_rate=1e-3)
        trainer = make_trainer(tmp_path / str(beta), **config)
        assert bool(history(trainer, "kl")) is False
        trainer.train()
        rows = next(iter(trainer.get_train_dataloader()))
        x = torch.randn(2, *trainer.latent_shape, generator=torch.Generator().manual_seed(0))
        trainer.generate(rows)
        with torch.no_grad():
            v = trainer._velocity(trainer._unwrapped(), x, torch.tensor([0.9, 0.9]), [0, 1])
            with trainer._unwrapped().disable_adapter():
                v_ref = trainer._velocity(trainer._unwrapped(), x, torch.tensor([0.9, 0.9]), [0, 1])
        moved[beta] = (v - v_ref).square().mean().item()
    assert moved[1e4] < 0.7 * moved[0.0]


def test_reference_leaves_the_adapter_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, recipe="flow-grpo", num_inference_steps=3)
    trainer.train()
    flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    before, mode = digest(trained_weights(trainer)), trainer.model.training
    with trainer._reference():
        pass
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == flags
    assert digest(trained_weights(trainer)) == before and trainer.model.training == mode


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_sync_ref_model(tmp_path, lora):
    config = dict(recipe="flow-grpo", lora=lora, num_inference_steps=3, max_steps=5, learning_rate=1e-3)
    config |= dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.75)
    trainer = make_trainer(tmp_path, **config)
    expected, kl = snapshot(trained_weights(trainer)), []

    def end(step):
        present = trained_weights(trainer)
        if step % 2 == 0:
            for name in expected:
                expected[name] = 0.25 * expected[name] + 0.75 * present[name]
        kl.append(distance(trainer.roles["reference"].average, expected))

    trainer.add_callback(AtStep(end=end))
    trainer.train()
    assert len(kl) == 5 and max(kl) < 1e-6
    assert distance(trainer.roles["reference"].average, trained_weights(trainer)) > 1e-5


# ---- Updates ----


@pytest.mark.parametrize("recipe", ["flash-grpo", "longcat", "diffusion-nft"])
def test_splitting_a_batch_changes_nothing(tmp_path, recipe):
    weights = []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        config = dict(recipe=recipe, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate)
        trainer = make_trainer(tmp_path / str(batch), optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **config)
        trainer.train()
        weights.append(trained_weights(trainer))
    start = trained_weights(make_trainer(tmp_path / "start", recipe=recipe))
    for other in weights[1:]:
        assert distance(weights[0], other) < 1e-5 * distance(weights[0], start)


def test_several_updates_share_out_the_videos(tmp_path):
    config = dict(recipe="flow-grpo", steps_per_generation=2, per_device_train_batch_size=4, num_inference_steps=3)
    trainer = make_trainer(tmp_path, cls=Watching, max_steps=4, beta=0.0, learning_rate=1e-3, **config)
    trainer.train()
    assert len(trainer.generations) == 2  # two updates each
    slices = trainer.generations[0]["slices"]
    assert [{item.group for batch in part for item in batch} for part in slices] == [{0}, {1}]
    assert all({item.step for batch in part for item in batch} == {0, 1} for part in slices)
    ratio = history(trainer, "ratio/mean")
    assert ratio[0] == ratio[2] == 1 and ratio[1] != 1 and ratio[3] != 1


@pytest.mark.parametrize("generation", [dict(steps_per_generation=4), dict(generation_batch_size=8)])
def test_steps_per_generation_of_several_accumulations(tmp_path, generation):
    config = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, **generation)
    trainer = make_trainer(tmp_path, cls=Watching, max_steps=4, **config)
    trainer.train()
    assert len(trainer.generations) == 2
    slices = trainer.generations[0]["slices"]
    assert len(slices) == 4
    for update in (slices[:2], slices[2:]):  # each update's loss is a mean over its own children
        items = [item for part in update for batch in part for item in batch]
        assert sum((item.weight > 0).sum().item() for item in items) == 4


def test_a_generations_videos_are_those_of_all_processes():
    config = dict(use_cpu=True, report_to=[], per_device_train_batch_size=8, generation_batch_size=32)
    for num_processes, steps in ((1, 4), (2, 2), (4, 1)):
        args = planned_config(VideoGRPOConfig, num_processes)("unused", **config)
        assert (args.steps_per_generation, args.num_prompts) == (steps, 4)


@pytest.mark.parametrize("recipe", ["flash-grpo", "diffusion-nft", "awm"])
def test_num_iterations(tmp_path, recipe):
    trainer = make_trainer(tmp_path, cls=Watching, recipe=recipe, num_iterations=2, max_steps=4, learning_rate=1e-3)
    trainer.train()
    assert len(trainer.generations) == 2
    ratio = history(trainer, "ratio/mean")
    assert ratio[0] == pytest.approx(1, abs=1e-6) and ratio[2] == pytest.approx(1, abs=1e-6)
    if recipe != "diffusion-nft":
        assert ratio[1] != ratio[0] and ratio[3] != ratio[2]
    # both passes train on the same prompts
    keys = [[key[:2] + key[3:] for key, _ in batch] for batch in trainer.get_train_dataloader()]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_clipping_stops_what_moved_far_enough(tmp_path):
    trainer = make_trainer(tmp_path, cls=Watching, num_iterations=2, max_steps=2, learning_rate=1e-3, epsilon=1e-6)
    trainer.train()
    region = history(trainer, "clip_ratio/region_mean")
    assert region[0] == 0 and region[1] > 0.5
    assert history(trainer, "grad_norm")[1] < history(trainer, "grad_norm")[0]


def test_extremes_are_logged_as_extremes():
    metrics = GenerationMetrics()
    for value in (0.1, 0.3):
        for name in ("clip_ratio/low_min", "clip_ratio/low_mean", "clip_ratio/high_max", "kl"):
            metrics.values[name].append(torch.tensor(value))
    found = metrics.collect()
    assert found == pytest.approx(
        {"clip_ratio/low_min": 0.1, "clip_ratio/low_mean": 0.2, "clip_ratio/high_max": 0.3, "kl": 0.2}
    )
    assert metrics.collect() == {}


def test_clipping_is_logged_per_child_and_the_extreme_micro_batch(tmp_path):
    """Micro-batches of one and three children: means are over the four, as TRL's are over tokens."""
    metrics, args = GenerationMetrics(), make_args(tmp_path, epsilon=0.1, beta=0.1)
    for ratios, signs in (([0.5], [-1.0]), ([1.5, 1.0, 0.5], [1.0, 1.0, 1.0])):
        ratio, sign = torch.tensor(ratios), torch.tensor(signs)
        metrics.policy(args, [0], torch.zeros(1), ratio, ratio, torch.ones_like(ratio), sign)
    found = metrics.collect()
    expected = {"low_mean": 0.25, "low_min": 0.0, "high_mean": 0.25, "high_max": 1 / 3, "region_mean": 0.5}
    assert {name: found[f"clip_ratio/{name}"] for name in expected} == pytest.approx(expected)
    assert found["ratio/mean"] == found["kl"] == pytest.approx(3.5 / 4)


def test_videos_without_any_reward_are_no_zeros_in_the_mean(tmp_path):
    metrics, runner = GenerationMetrics(), RewardRunner(brightness)
    metrics.rewards(runner, torch.tensor([[[1.0], [float("nan")]], [[2.0], [4.0]]]))
    found = metrics.collect()
    assert found["reward"] == pytest.approx(7 / 3) == found["rewards/brightness/mean"]
    assert found["reward_std"] == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item())
    assert found["reward_std/within_prompt"] == pytest.approx((0 + 2**0.5) / 2)


def test_training_again_samples_anew(tmp_path):
    trainer = make_trainer(tmp_path, cls=Watching, max_steps=1)
    trainer.train(), trainer.train()
    first, second = trainer.generations
    assert not torch.equal(first["rewards"], second["rewards"])  # the same noise, but a trained policy


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"])
@pytest.mark.parametrize("recipe", ["flash-grpo", "longcat", "tempflow-grpo"])
def test_reused_rollout_gives_the_same_update(tmp_path, recipe, lora):
    config = dict(recipe=recipe, lora=lora, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1)
    if recipe == "tempflow-grpo":
        config |= dict(num_generations=4, num_latents=2)
    weights = {}
    for reuse in (False, True):
        trainer = make_trainer(tmp_path / str(reuse), reuse_rollout=reuse, **config)
        start = trained_weights(trainer)
        trainer.train()
        weights[reuse] = trained_weights(trainer)
    assert distance(*weights.values()) < 1e-5 * distance(weights[True], start)


@pytest.mark.parametrize("recipe", ["flash-grpo", "dance-grpo", "branch-grpo", "g2rpo"])
def test_unshared_rollout_gives_the_same_update(tmp_path, recipe):
    config = dict(recipe=recipe, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1)
    config |= {
        "branch-grpo": dict(tree_splits=[0, 2]),
        "g2rpo": dict(num_generations=6, per_device_train_batch_size=12),
    }.get(recipe, {})
    weights = {}
    for share in (False, True):
        trainer = make_trainer(tmp_path / str(share), share_prefix=share, **config)
        start = trained_weights(trainer)
        trainer.train()
        weights[share] = trained_weights(trainer)
    assert distance(*weights.values()) < 1e-5 * distance(weights[True], start)


# ---- Old policy, average, resuming ----


@pytest.mark.parametrize("recipe", ["diffusion-nft", "awm"])
def test_old_policy_follows_and_samples(tmp_path, recipe):
    decay = [0.3, 0.5]
    trainer = make_trainer(tmp_path, cls=Watching, recipe=recipe, old_policy_decay=decay, max_steps=4)
    old, expected, number = trainer.roles["old"].average, snapshot(trained_weights(trainer)), 0
    before, after = {}, []

    def begin(step):
        before[step] = snapshot(trained_weights(trainer))

    trainer.add_callback(AtStep(begin=begin, end=lambda step: after.append(snapshot(old))))
    trainer.train()
    for number in range(4):
        keep = min(decay[0] * number, decay[1])
        expected = {name: keep * expected[name] + (1 - keep) * before[number][name] for name in expected}
        assert distance(after[number], expected) < 1e-6
    assert distance(after[-1], before[3]) > 1e-3


CONFIG = dict(max_steps=5, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine", num_inference_steps=3)
RESUMED = {
    "flash-grpo": dict(recipe="flash-grpo", ema_decay=0.9, ema_update_steps=2),
    "full": dict(recipe="flow-grpo", lora=False, sync_ref_model=True, ref_model_sync_steps=2, learning_rate=1e-3),
    "diffusion-nft": dict(recipe="diffusion-nft", ema_decay=0.9, ema_update_steps=1),
    "awm": dict(recipe="awm", num_train_sigmas=2),
    "dance-grpo": dict(recipe="dance-grpo"),
    # a generation of two updates: the checkpoint lies at its end, inside the epoch
    "two updates": dict(num_iterations=2, max_steps=5, save_steps=2),
}


@pytest.mark.parametrize(
    "case", [*list(RESUMED)[:3], *(pytest.param(c, marks=pytest.mark.slow) for c in list(RESUMED)[3:])]
)
def test_interrupted_equals_uninterrupted(tmp_path, case):
    config = {**CONFIG, **RESUMED[case]}
    whole = make_trainer(tmp_path / "whole", **config)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **config)
    untrained = digest(trained_weights(resumed))
    checkpoint = tmp_path / "whole" / f"checkpoint-{config['save_steps']}"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert digest(trained_weights(resumed)) == digest(trained_weights(whole)) != untrained
    assert history(resumed, "loss") == history(whole, "loss") and history(resumed, "reward") == history(
        whole, "reward"
    )
    for role, weights in whole.roles.items():
        assert digest(resumed.roles[role].average) == digest(weights.average)
    if whole.average is not None:
        assert digest(resumed.average.average) == digest(whole.average.average)
    assert ("roles.safetensors" in {p.name for p in checkpoint.iterdir()}) == bool(whole.roles)


def test_a_damaged_old_policy_would_be_noticed(tmp_path):
    """Negative control: the roles in the checkpoint are what makes the resumed run equal."""
    config = {**CONFIG, **RESUMED["diffusion-nft"], "old_policy_decay": [0.2, 0.9]}
    whole = make_trainer(tmp_path / "whole", **config)
    whole.train()

    class Amnesiac(VideoGRPOTrainer):
        def _load_from_checkpoint(self, *args, **kwargs):
            super()._load_from_checkpoint(*args, **kwargs)
            self.roles["old"].reset()

    resumed = make_trainer(tmp_path / "resumed", cls=Amnesiac, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert digest(trained_weights(resumed)) != digest(trained_weights(whole))


def test_checkpoint_of_another_recipe_is_refused(tmp_path):
    make_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    other = make_trainer(tmp_path / "other", recipe="mix-grpo", sde_steps=1)
    with pytest.raises(
        ValueError, match="belongs to another run. method.recipe: this run has 'mix-grpo', the directory"
    ):
        other.train(resume_from_checkpoint=checkpoint)
    fewer = make_trainer(tmp_path / "fewer", rows=dataset(3))
    with pytest.raises(ValueError, match="num_prompts: this run has 3, the directory has 4"):
        fewer.train(resume_from_checkpoint=checkpoint)
    reworded = dataset(4).map(lambda row: {"prompt": row["prompt"] + " slowly"})
    with pytest.raises(ValueError, match="sha256 of prompts"):
        make_trainer(tmp_path / "reworded", rows=reworded).train(resume_from_checkpoint=checkpoint)


def test_average_is_what_is_held_after_training(tmp_path):
    config = dict(ema_decay=0.9, ema_update_steps=1, max_steps=3)
    trainer = make_trainer(tmp_path, **config)
    by_hand = WeightAverage(trainer.model, 0.9)
    trainer.add_callback(AtStep(end=lambda step: by_hand.update()))
    trainer.train()
    assert distance(trained_weights(trainer), by_hand.average) == 0
    # shorter than the interval: what was learned is not lost
    short = make_trainer(tmp_path / "short", ema_decay=0.9, ema_update_steps=8)
    start = trained_weights(short)
    short.train()
    assert distance(trained_weights(short), start) > 1e-3


def test_a_skipped_micro_batch_is_its_share_of_a_step(tmp_path):
    """Of a step's many micro-batches one has a NaN loss: the step still has a loss, the mean of the others."""

    class Broken(VideoGRPOTrainer):
        losses = []

        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            self.losses.append(loss.item())
            return loss * math.nan if len(self.losses) == 2 else loss

    config = dict(
        recipe="flow-grpo", reuse_rollout=False, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer = make_trainer(tmp_path, cls=Broken, on_nan="skip", max_steps=1, **config)
    trainer.train()
    number, (logged,) = len(trainer.losses), history(trainer, "loss")
    assert number > 2 and history(trainer, "num_skipped_batches") == [1]
    assert logged == pytest.approx((sum(trainer.losses) - trainer.losses[1]) * number / (number - 1), rel=1e-4)


# ---- Evaluation ----


def test_evaluation(tmp_path):
    counted = []

    def untrained(videos, **kwargs):
        counted.append(len(videos))
        return contrast(videos)

    arguments = dict(eval_dataset=dataset(3), eval_reward_funcs=[untrained])
    config = dict(eval_num_inference_steps=3, num_generations_eval=2, validation_seed=5)
    trainer = make_trainer(tmp_path, trainer=arguments, rewards=[brightness, "toy-steadiness"], **config)
    metrics = trainer.evaluate()
    names = {f"eval_rewards/{n}/{k}" for n in ("brightness", "toy-steadiness", "untrained") for k in ("mean", "std")}
    assert names | {"eval_reward", "eval_runtime"} <= set(metrics) and counted == [6]
    trained = metrics["eval_rewards/brightness/mean"] + metrics["eval_rewards/toy-steadiness/mean"]
    assert metrics["eval_reward"] == pytest.approx(trained, rel=1e-5)
    # the stock pipeline's own solver, from fixed seeds
    pipe, videos = wan()[0], []
    for i in range(6):
        generator = torch.Generator().manual_seed(5 + i)
        call = dict(prompt=PROMPTS[i // 2], height=16, width=16, num_frames=9, max_sequence_length=16)
        call |= dict(
            num_inference_steps=3, guidance_scale=4.5, negative_prompt="", output_type="pt", generator=generator
        )
        videos += pipe(**call).frames.float()
    expected = sum(brightness(videos)) / 6
    assert metrics["eval_rewards/brightness/mean"] == pytest.approx(expected, rel=1e-4)
    again = trainer.evaluate()
    assert again["eval_reward"] == metrics["eval_reward"]


def test_videos_without_a_reward_do_not_count_in_evaluation(tmp_path):
    def some(prompts, videos, **kwargs):
        return [None if prompt == PROMPTS[0] else 2.0 for prompt in prompts]

    arguments = dict(eval_dataset=dataset(2))
    metrics = make_trainer(tmp_path, trainer=arguments, rewards=some, eval_num_inference_steps=1).evaluate()
    assert metrics["eval_reward"] == metrics["eval_rewards/some/mean"] == 2.0


def test_evaluation_during_training_uses_the_average_and_leaves_no_trace(tmp_path):
    class Evaluated(VideoGRPOTrainer):
        def generate_videos(self, *args, **kwargs):
            with self.averaged_weights():
                weights.append(digest(trained_weights(self)))
            return super().generate_videos(*args, **kwargs)

    weights, digests = [], []
    config = dict(ema_decay=0.5, ema_update_steps=1, max_steps=3, eval_num_inference_steps=1)
    for name, more in (("plain", {}), ("watched", dict(eval_strategy="steps", eval_steps=1))):
        arguments = dict(eval_dataset=dataset(1))
        trainer = make_trainer(tmp_path / name, cls=Evaluated, trainer=arguments, **config, **more)
        averages = []
        trainer.add_callback(AtStep(end=lambda step, t=trainer, a=averages: a.append(digest(t.average.average))))
        trainer.train()
        digests.append(digest(trained_weights(trainer)))
    assert digests[0] == digests[1] and weights == averages
    assert len(history(trainer, "eval_reward")) == 3


def test_several_evaluation_datasets(tmp_path):
    arguments = dict(eval_dataset={"two": dataset(2), "one": dataset(1)})
    config = dict(eval_num_inference_steps=2, eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer = make_trainer(tmp_path, trainer=arguments, **config)
    trainer.train()
    assert len(history(trainer, "eval_two_reward")) == len(history(trainer, "eval_one_reward")) == 1
    metrics = trainer.evaluate(dataset(2), metric_key_prefix="test")
    assert metrics["test_reward"] == pytest.approx(trainer.evaluate()["eval_two_reward"], rel=1e-6)


def test_evaluation_needs_prompts(tmp_path):
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        make_trainer(tmp_path).evaluate()


# ---- Completions ----


def test_log_completions(tmp_path, capsys):
    def reward(videos, log_extra, **kwargs):
        log_extra("mean", [round(v.mean().item(), 4) for v in videos])
        return [None, *brightness(videos)[1:]]

    config = dict(log_completions=True, logging_steps=2, max_steps=3, num_completions_to_print=2, recipe="branch-grpo")
    config |= dict(tree_splits=[0, 2], rollout_batch_size=1)
    trainer = make_trainer(tmp_path, cls=Watching, rewards=[reward, contrast], **config)
    trainer.train()
    folder = tmp_path / "completions"
    assert sorted(p.name for p in folder.glob("*.parquet")) == [
        "completions_00000.parquet",
        "completions_00002.parquet",
    ]
    table = pd.read_parquet(folder / "completions_00002.parquet")
    assert len(table) == 8 and len(list(folder.glob("step_000002/*.mp4"))) == 8
    generation = trainer.generations[2]
    assert table["contrast"].tolist() == pytest.approx(generation["rewards"][..., 1].flatten().tolist())
    assert table["reward"].isna().sum() == 2 and table["mean"].notna().all()
    # a video's advantage is the mean of what was drawn for it; its seed that of its first noise, shared by the tree
    advantages = generation["advantages"]
    for i, row in table.iterrows():
        group, member = divmod(i, 4)
        mine = [advantages[group, 0, member // 2 * 2], advantages[group, 2, member]]
        assert row["advantage"] == pytest.approx(sum(mine) / 2, rel=1e-5, abs=1e-6)
    assert table["seed"].nunique() == 2
    assert "Step 2" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 2}


# ---- Other families ----


def position(videos, **kwargs):
    """Fixed by position alone."""
    return [float(i * 7919 % 13) for i in range(len(videos))]


FAMILIES = {
    "ltx": {},
    "ltx_i2v": {},
    "wan_i2v": {},
    "hunyuan": dict(guidance_scale=1.0, transition="flow-sde"),
    "cogvideox": dict(transition="ddim", noise_level=1.0),
    "wan22_ti2v_i2v": dict(recipe="dance-grpo"),
    "mochi": dict(recipe="awm", num_train_sigmas=2),
    "sana_i2v": dict(recipe="diffusion-nft"),
    "hunyuan15": dict(recipe="longcat"),
    "kandinsky5": dict(recipe="flow-grpo"),
    # its tiny random VAE decodes everything to grey
    "allegro": dict(transition="ddim", noise_level=1.0, rewards=position),
    "hunyuan_i2v": dict(guidance_scale=1.0),
}
QUICK = list(FAMILIES)[:5]
OTHERS = [name for name in tiny_pipelines.ALL if name not in QUICK]


def family_setup(name, **config):
    pipe, call = tiny_pipelines.ALL[name]()
    rows = dataset()
    if "image" in call:
        image = call.pop("image")
        images = [image.rotate(90 * i) for i in range(4)]
        rows = Dataset.from_list([{**row, "image": image} for row, image in zip(rows, images, strict=True)])
    if "prompt_template" in call:
        call["pipeline_kwargs"] = {"prompt_template": call.pop("prompt_template")}
    return dict(pipe=pipe, rows=rows, max_sequence_length=None) | call | config


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_family_trains(tmp_path, name):
    trainer = make_trainer(tmp_path, **family_setup(name, num_inference_steps=3, **FAMILIES.get(name, {})))
    start = trained_weights(trainer)
    trainer.train()
    assert history(trainer, "frac_reward_zero_std")[0] < 1
    assert history(trainer, "ratio/mean")[0] == pytest.approx(1, abs=1e-6)
    assert distance(trained_weights(trainer), start) > 1e-4


def test_prompts_are_encoded_once(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5)  # 5 x 2 groups of 4 videos: each of 4 prompts more than once
    encoded, encode = [], trainer._encoded.encode
    trainer._encoded.encode = lambda prompt, *args: encoded.append(prompt) or encode(prompt, *args)
    trainer.train()
    assert sorted(encoded) == sorted(PROMPTS)


def test_decoding_in_chunks_changes_no_reward(tmp_path):
    rewards = []
    for size in (1, 3, 8):
        trainer = make_trainer(tmp_path / str(size), cls=Watching, max_steps=1, vae_batch_size=size)
        calls = []
        decode = trainer.pipe.vae.decode
        trainer.pipe.vae.decode = lambda z, *args, calls=calls, decode=decode, **kwargs: (
            calls.append(len(z)) or decode(z, *args, **kwargs)
        )
        trainer.train()
        assert calls == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[size]
        assert not trainer.pipe.vae.use_tiling
        rewards.append(trainer.generations[0]["rewards"])
    for other in rewards[1:]:
        torch.testing.assert_close(other, rewards[0], rtol=0, atol=1e-4)
    assert rewards[0].std() > 1e-2


@pytest.mark.parametrize("value, expected", [(None, 6.0), (2.5, 2.5)])
def test_guidance_as_an_input_is_the_same_in_rollout_update_and_evaluation(tmp_path, value, expected):
    config = dict(guidance_scale=1.0, embedded_guidance=value, max_steps=1, eval_num_inference_steps=1)
    rows = dataset(1)
    trainer = make_trainer(tmp_path, trainer={"eval_dataset": rows}, **family_setup("hunyuan", **config))
    seen = []
    trainer.model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs["guidance"].tolist())), with_kwargs=True
    )
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 5 and all(guidance == {expected * 1000} for guidance in seen)


def test_a_model_without_guidance_as_an_input_takes_none(tmp_path):
    with pytest.raises(ValueError, match="embedded_guidance is for models that take guidance as an input"):
        make_trainer(tmp_path, embedded_guidance=6.0)


def test_a_family_without_a_sigma_per_sample(tmp_path):
    """No stock family is like that, but its row could say so: a micro-batch is then cut by noise level."""
    weights = []
    for per_sample in (True, False):
        config = dict(recipe="flow-grpo", num_inference_steps=3, max_steps=1)
        config |= dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
        trainer = make_trainer(tmp_path / str(per_sample), **config)
        start = trained_weights(trainer)
        trainer.video_model.per_sample_sigma = per_sample
        trainer.train()
        weights.append(trained_weights(trainer))
    assert distance(*weights) < 1e-5 * distance(weights[0], start)
    with pytest.raises(ValueError, match="one sigma per batch"):  # what the cutting avoids
        x = torch.zeros(2, *trainer.latent_shape)
        trainer.video_model.velocity(x, torch.tensor([0.5, 0.6]), trainer._group_conditions[0])


def test_guidance_of_image_models_keeps_the_image(tmp_path):
    trainer = make_trainer(tmp_path, **family_setup("wan_i2v", max_steps=1))
    trainer.train()
    for group, condition in trainer._group_conditions.items():
        positive, negative = condition.samples[0], trainer._group_negatives[group].samples[0]
        assert torch.equal(positive["hidden_states"], negative["hidden_states"])
        assert positive["encoder_hidden_states"].shape != negative["encoder_hidden_states"].shape or not torch.equal(
            positive["encoder_hidden_states"], negative["encoder_hidden_states"]
        )


def test_evaluation_and_validation_of_image_models(tmp_path):
    config = family_setup("wan_i2v", max_steps=1, eval_num_inference_steps=2, validation_steps=1)
    config |= dict(num_validation_videos=2, validation_num_inference_steps=1)
    trainer = make_trainer(tmp_path, trainer=dict(eval_dataset=config["rows"].select([2, 0])), **config)
    shown = [trainer.validation_image(i).tobytes() for i in range(2)]
    assert shown == [config["rows"][i]["image"].tobytes() for i in (2, 0)]
    trainer.train()
    assert len(list((tmp_path / "validation" / "step_000001").glob("*.mp4"))) == 2
    assert math.isfinite(trainer.evaluate()["eval_reward"])


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("recipe", ["flow-grpo", "awm"])
def test_only_the_expert_in_training_is_credited(tmp_path, expert, recipe):
    config = dict(experts=expert, sde_range=[0.0, 1.0], num_inference_steps=6, max_steps=2)
    trainer = make_trainer(tmp_path, cls=Watching, **family_setup("wan22", recipe=recipe, **config))
    other = trainer.video_model.denoisers["transformer" if expert == "low" else "transformer_2"]
    before, start = digest(dict(other.named_parameters())), trained_weights(trainer)
    trainer.train()
    low, high = trainer.sigma_range
    assert 0 < len([s for s in trainer.grid[:-1].tolist() if low <= s < high]) < 6
    sigmas = {item.sigma if item.decision is None else item.decision.sigma for item in trainer.generations[0]["items"]}
    assert all(low <= sigma <= high for sigma in sigmas) and len(sigmas) > 1
    assert digest(dict(other.named_parameters())) == before and distance(trained_weights(trainer), start) > 1e-4


# ---- Bad input ----


def raising(videos, **kwargs):
    raise KeyError("no model")


def too_short(videos, **kwargs):
    return [1.0] * (len(videos) - 1)


def not_finite(videos, **kwargs):
    return [float("nan"), *brightness(videos)[1:]]


async def hanging(videos, **kwargs):
    await asyncio.sleep(60)


@pytest.mark.parametrize("reward", [raising, too_short, not_finite, hanging])
def test_failing_reward_names_function_prompt_and_fix(tmp_path, reward):
    trainer = make_trainer(tmp_path, rewards=[brightness, reward], reward_timeout=0.2 if reward is hanging else None)
    with pytest.raises(RewardError, match=f"'{reward.__name__}' failed .*prompt '.*reward_error='skip'"):
        trainer.train()


@pytest.mark.parametrize("reward", [raising, not_finite, hanging])
def test_failing_reward_is_skipped_and_counted_on_request(tmp_path, reward):
    timeout = 0.2 if reward is hanging else None
    config = dict(rewards=[brightness, reward], reward_error="skip", reward_timeout=timeout, cls=Watching)
    trainer = make_trainer(tmp_path, max_steps=1, **config)
    trainer.train()
    skipped = trainer.generations[0]["rewards"].isnan().all(-1).sum().item()
    assert history(trainer, "num_skipped_rewards") == [float(skipped)]
    assert skipped == (1 if reward is not_finite else 8)


BAD = {
    "num_generations must be at least 2, not 1": dict(num_generations=1),
    "multiple of num_generations=4": dict(per_device_train_batch_size=6),
    "the window of 9 steps lies outside the schedule": dict(recipe="mix-grpo", sde_steps=9),
    "holds no step of a schedule": dict(sde_range=[0.9, 1.0]),
    "sde_range must be two increasing shares": dict(sde_range=[0.5, 0.2]),
    "sde_steps=5 but there are 2 steps": dict(sde_schedule="random", sde_steps=5),
    r"steps \[3, 9\] lie outside the schedule": dict(recipe="branch-grpo", tree_splits=[0, 3, 9], num_generations=8),
    "a tree with 2 splits has 4 leaves": dict(recipe="branch-grpo", tree_splits=[0, 1], num_generations=2),
    "draws no usable noise at step": dict(transition="flow-sde", noise_level=0.0),
    "noise_level must be in": dict(transition="cps", noise_level=1.5),
    "beta=0 never uses": dict(sync_ref_model=True),
    "ref_model_mixup_alpha must lie in": dict(sync_ref_model=True, beta=0.1, ref_model_mixup_alpha=1.5),
    "needs window_mode": dict(sde_schedule="window"),
    "needs stochastic steps": dict(sde_schedule="none"),
    "samples deterministically": dict(recipe="diffusion-nft", sde_schedule="single"),
    "contradict each other": dict(shared_noise=True, num_latents=2),
    "num_latents=3 must divide": dict(num_latents=3),
    "antithetic pairs share a latent": dict(antithetic=True),
    "baseline='latent' compares videos of one latent": dict(baseline="latent"),
    "train_fraction must lie in": dict(train_fraction=0.0),
    "must be a multiple of gradient_accumulation_steps": dict(steps_per_generation=3, gradient_accumulation_steps=2),
    r"generation_batch_size=12 must be a multiple of 8 videos \(per_device_train_batch_size=8 x 1 processes": dict(
        generation_batch_size=12
    ),
    "is 2 micro-steps, and steps_per_generation=3 says otherwise": dict(
        generation_batch_size=16, steps_per_generation=3
    ),
    "needs a method with stochastic steps": dict(reuse_rollout=True, num_iterations=2),
    "transition must be one of": dict(transition="flow_sde"),
    "num_inference_steps must be at least 1": dict(num_inference_steps=0),
    "multiple of the 3 granularities": dict(recipe="g2rpo", num_generations=4),
    "reuse_rollout keeps a graph": dict(recipe="flow-grpo", reuse_rollout=True, lora=False),
    "is not valid for": dict(height=17),
    "has two denoisers|needs a model with two denoisers": dict(experts="low"),
    "no merged step": dict(recipe="e-grpo", sde_range=[0.25, 0.5], merge_threshold=1e9),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configuration_fails_at_the_start(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **BAD[message])


def test_a_kernel_that_is_singular_at_a_step(tmp_path):
    """LTX starts at sigma = 1, where MA-SDE's variance is infinite; from the second step on it is fine."""
    config = dict(transition="ma-sde", num_inference_steps=6)
    with pytest.raises(
        ValueError, match="ma-sde transition has infinite variance: start its window at the second step"
    ):
        make_trainer(tmp_path, **family_setup("ltx", **config))
    make_trainer(tmp_path, **family_setup("ltx", sde_range=[0.2, 0.6], **config)).train()


def test_guidance_of_a_distilled_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="guidance is distilled.*set guidance_scale=1.0"):
        make_trainer(tmp_path, **family_setup("hunyuan"))


def test_arguments_of_the_wrong_kind(tmp_path):
    with pytest.raises(TypeError, match="args must be a VideoGRPOConfig"):
        VideoGRPOTrainer(wan()[0], brightness, args={}, train_dataset=dataset())
    with pytest.raises(ValueError, match="train_dataset is required"):
        VideoGRPOTrainer(wan()[0], brightness, args=make_args(tmp_path))
    with pytest.raises(ValueError, match="prompt"):
        make_trainer(tmp_path, rows=Dataset.from_list([{"words": "a"}]))
    with pytest.raises(ValueError, match="valid names|there is no|unknown"):
        make_trainer(tmp_path, rewards="toy-colour")
    with pytest.raises(ValueError, match="weight"):
        make_trainer(tmp_path, reward_weights=[1.0, 2.0])


def test_few_videos_are_warned_about(tmp_path, caplog):
    make_trainer(tmp_path)
    assert "2 prompts x 4 generations = 8 videos per generation: below 64" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, per_device_train_batch_size=64)
    assert "below 64" not in caplog.text


def test_an_adapters_rate_for_all_weights_is_warned_about(tmp_path, caplog):
    text = "is the recipe's for an adapter, and without peft_config all weights are trained"
    for config in (
        dict(learning_rate=None),
        dict(lora=False),
        dict(lora=False, recipe="dance-grpo", learning_rate=None),
        dict(lora=False, learning_rate=None, max_steps=1),
    ):
        make_trainer(tmp_path, **config)
        assert (text in caplog.text) == ("max_steps" in config), config
    assert f"learning_rate=0.0001 {text}" in caplog.text
