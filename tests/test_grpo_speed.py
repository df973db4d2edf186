"""Nothing is done twice: each saving gives the gradient that the long way gives, with the evaluations it promises."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_pipelines import WAN_LIKE, WORDS, wan

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer


def reward(prompts, videos, **kwargs):
    """Fixed by position alone, so that no last bit of a video can matter."""
    return [float(i * 7919 % 13) for i in range(len(videos))]


def make_trainer(tmp_path, lora=True, **config) -> VideoGRPOTrainer:
    """Two prompts x `num_generations` videos of a tiny Wan; the model is made anew, with equal weights."""
    defaults = dict(
        WAN_LIKE,
        recipe="flash-grpo",
        num_generations=4,
        num_inference_steps=4,
        learning_rate=1e-2,
        max_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        check_model=False,
    )
    config = {**defaults, **config}
    config.setdefault("per_device_train_batch_size", 2 * config["num_generations"])
    return VideoGRPOTrainer(
        model=wan()[0],
        reward_funcs=reward,
        args=VideoGRPOConfig(str(tmp_path), **config),
        train_dataset=Dataset.from_dict({"prompt": [f"a {w} moves" for w in WORDS[2:10]]}),
        peft_config=LoraConfig(r=4, lora_alpha=8, init_lora_weights=False) if lora else None,
    )


def generation(trainer):
    """The first generation's micro-batches."""
    loader = trainer.get_train_dataloader()
    trainer.model.train()
    (batches,) = trainer.generate(next(iter(loader)))
    return batches


def gradient(trainer, batches):
    """The gradient of one optimizer step, and the samples that went through the denoiser with one."""
    evaluated = []
    denoiser = trainer.video_model.denoisers["transformer"]
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: evaluated.append(len(kwargs["hidden_states"]) * torch.is_grad_enabled()),
        with_kwargs=True,
    )
    trainer.model.zero_grad()
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    hook.remove()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat(grads), sum(evaluated)


def by_member(batches):
    """The same generation, with a decision and a forward of its own for each child."""
    items = []
    for item in [item for batch in batches for item in batch]:
        d = item.decision
        for i in range(len(d.children)):
            one = dataclasses.replace(
                d,
                children=[d.children[i]],
                next_latents=d.next_latents[i : i + 1],
                old_log_prob=d.old_log_prob[i : i + 1],
            )
            own = {name: getattr(item, name)[i : i + 1] for name in ("advantages", "weight", "kl_weight")}
            items.append(dataclasses.replace(item, decision=one, **own))
    return [items[i : i + 2] for i in range(0, len(items), 2)]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def assert_close(a, b):
    # the sums of float32 come in another order in a batch of another size
    assert float((a - b).abs().max()) < 1e-6 and relative(a, b) < 5e-6


SHARING = {
    "flash-grpo": dict(shared_noise=True),
    "longcat": {},
    "mix-grpo": dict(num_inference_steps=6, sde_steps=2),
    "tempflow-grpo": dict(num_inference_steps=6, num_latents=2, num_generations=4),
    "g2rpo": dict(num_inference_steps=6, num_generations=6),
    "e-grpo": dict(num_inference_steps=6),
    "branch-grpo": dict(num_inference_steps=6, tree_splits=[0, 2], num_generations=4),
    "flow-grpo-fast": dict(num_inference_steps=6),
}


@pytest.mark.parametrize("recipe", SHARING)
def test_one_update_per_decision_has_the_gradient_of_one_per_member(tmp_path, recipe):
    trainer = make_trainer(tmp_path, recipe=recipe, **SHARING[recipe])
    batches = generation(trainer)
    together, evaluated = gradient(trainer, batches)
    singly, evaluated_singly = gradient(trainer, by_member(batches))
    items = [item for batch in batches for item in batch]
    assert evaluated == 2 * len(items)  # both branches of guidance
    assert evaluated_singly == 2 * sum(len(item.advantages) for item in items) > evaluated
    assert_close(together, singly)
    for item in items:  # control: who earned what matters
        item.advantages = item.advantages.roll(1)
    assert relative(gradient(trainer, batches)[0], together) > 1e-2


@pytest.mark.parametrize("recipe", SHARING)
def test_sharing_changes_no_gradient(tmp_path, recipe):
    """Rollout, advantages and update together: the generation that shares nothing teaches the same."""
    config = dict(recipe=recipe, **SHARING[recipe])
    shared = make_trainer(tmp_path / "a", **config)
    unshared = make_trainer(tmp_path / "b", share_prefix=False, **config)
    mine, evaluated = gradient(shared, generation(shared))
    other, evaluated_unshared = gradient(unshared, generation(unshared))
    assert evaluated < evaluated_unshared
    assert shared.metrics.values["nfe"][0] < unshared.metrics.values["nfe"][0]
    assert_close(mine, other)
    if recipe == "flash-grpo":
        control = make_trainer(tmp_path / "c", seed=1, **config)
        assert relative(gradient(control, generation(control))[0], mine) > 1e-2


@pytest.mark.parametrize(("lora", "beta"), [(True, 0.0), (True, 0.1), (False, 0.0)])
@pytest.mark.parametrize("recipe", ["flash-grpo", "mix-grpo"])
def test_reused_graph_has_the_gradient_of_a_second_forward(tmp_path, recipe, lora, beta):
    """Also beside a divergence from the reference, which is the adapter switched off."""
    config = dict(SHARING[recipe], recipe=recipe, beta=beta, lora=lora)
    reusing = make_trainer(tmp_path / "a", reuse_rollout=True, **config)
    again = make_trainer(tmp_path / "b", **config)
    mine, evaluated = gradient(reusing, generation(reusing))
    other, evaluated_again = gradient(again, generation(again))
    assert evaluated == 0 and evaluated_again > 0
    assert_close(mine, other)
    assert float(mine.norm()) > 0
    if lora:
        control = make_trainer(tmp_path / "c", reuse_rollout=True, **{**config, "beta": 0.5})
        assert relative(gradient(control, generation(control))[0], mine) > 1e-2


def test_a_reference_of_its_own_cannot_be_swapped_in_beside_a_kept_graph(tmp_path):
    with pytest.raises(ValueError, match="reuse_rollout"):
        make_trainer(tmp_path, reuse_rollout=True, lora=False, beta=0.1)


def test_training_with_each_saving_ends_in_the_same_weights(tmp_path):
    """End to end: one `train()` each."""

    def movement(name, **config):
        trainer = make_trainer(
            tmp_path / name,
            shared_noise=True,
            ema_decay=0.0,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            **config,
        )
        before = copy.deepcopy([p.detach() for p in trainer.model.parameters() if p.requires_grad])
        trainer.train()
        after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])

    default = movement("default")
    assert float(default.norm()) > 0
    assert relative(movement("reuse", reuse_rollout=True), default) < 1e-4
    assert relative(movement("unshared", share_prefix=False), default) < 1e-4
    assert relative(movement("batched", batch_guidance=True), default) < 1e-4
    assert relative(movement("control", seed=1), default) > 1e-2
    # autocast keeps casts of the weights from the steps without gradient: they must not cut the kept graph
    late = dict(bf16=True, sde_range=[0.5, 1.0])
    assert relative(movement("reuse in bfloat16", reuse_rollout=True, **late), movement("bfloat16", **late)) < 0.05
