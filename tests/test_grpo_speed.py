"""Nothing is done twice: each saving gives the gradient that the long way gives, with the evaluations it promises."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_pipelines import WAN_LIKE, WORDS, wan

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer
from vidtrl.trainer import grpo_choices, grpo_trainer


def reward(prompts, videos, **kwargs):
    """Fixed by position alone, so that no last bit of a video can matter."""
    return [float(i * 7919 % 13) for i in range(len(videos))]


def make_trainer(tmp_path, lora=True, pipe=None, **config) -> VideoGRPOTrainer:
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
        reuse_rollout=False,
        batch_guidance=False,
    )
    config = {**defaults, **config}
    config.setdefault("per_device_train_batch_size", 2 * config["num_generations"])
    return VideoGRPOTrainer(
        model=wan()[0] if pipe is None else pipe,
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


@pytest.mark.parametrize("recipe", ["flash-grpo", "longcat", "tempflow-grpo", "g2rpo", "e-grpo"])
def test_left_open_the_graph_is_kept_where_each_video_draws_once(tmp_path, recipe):
    """The memory is that of the update's own micro-batch then, and the gradient is the same with checkpointing, too."""
    config = dict(recipe=recipe, gradient_checkpointing=True, **SHARING[recipe])
    open_, again = make_trainer(tmp_path / "a", reuse_rollout=None, **config), make_trainer(tmp_path / "b", **config)
    assert open_.reuse_rollout and not again.reuse_rollout
    batches = generation(open_)
    assert sum(map(len, batches)) <= open_.args.per_device_train_batch_size
    assert_close(gradient(open_, batches)[0], gradient(again, generation(again))[0])
    if recipe == "flash-grpo":
        control = make_trainer(tmp_path / "c", reuse_rollout=None, seed=1, **config)
        assert relative(gradient(control, generation(control))[0], gradient(again, generation(again))[0]) > 1e-2


RECOMPUTED = {
    "noised again": dict(recipe="awm", num_inference_steps=2),
    "micro-steps": dict(per_device_train_batch_size=4, gradient_accumulation_steps=2),
    "used several times": dict(num_iterations=2),
    "takes the place": dict(lora=False, beta=0.1),
    "at several steps": dict(recipe="flow-grpo", num_inference_steps=3),
}


def test_left_open_dropout_is_still_found(tmp_path):
    pipe = wan()[0]
    pipe.transformer.blocks[0].attn1.to_out[1].p = 0.1
    trainer = make_trainer(tmp_path, pipe=pipe, reuse_rollout=None)
    assert not trainer.reuse_rollout
    with pytest.raises(ValueError, match="deviates from 1 by .*dropout"):
        trainer.train()


@pytest.mark.parametrize("reason", RECOMPUTED)
def test_left_open_the_update_recomputes_where_it_must_and_says_why(tmp_path, monkeypatch, reason):
    said = []
    monkeypatch.setattr(grpo_choices.logger, "info", said.append)
    trainer = make_trainer(tmp_path, reuse_rollout=None, **RECOMPUTED[reason])
    assert not trainer.reuse_rollout and len(said) == 1 and reason in said[0]
    trainer.train()
    assert len(said) == 1


def test_kept_graphs_do_not_keep_rewards_from_overlapping(tmp_path):
    """Prompts are still sampled a few at a time, so that the rewards of some are computed while others are sampled."""
    calls = []

    def count(videos, **kwargs):
        calls.append(len(videos))
        return [float(i) for i in range(len(videos))]

    small = make_trainer(tmp_path / "a", reuse_rollout=True, rollout_batch_size=1)
    small.rewards = type(small.rewards)(count)
    generation(small)
    assert calls == [4, 4]


@pytest.mark.parametrize("shared, expected", [(False, [4, 4, 4, 4]), (True, [16])])
def test_as_many_prompts_are_sampled_together_as_fill_a_batch(tmp_path, shared, expected):
    """Each video's own noise: one prompt, and its async rewards overlap with the next. One latent a prompt: all of them."""
    calls = []

    def count(videos, **kwargs):
        calls.append(len(videos))
        return [float(i) for i in range(len(videos))]

    trainer = make_trainer(tmp_path, shared_noise=shared, per_device_train_batch_size=16, rollout_batch_size=4)
    trainer.rewards = type(trainer.rewards)(count)
    generation(trainer)
    assert calls == expected


@pytest.mark.parametrize("recipe", ["flash-grpo", "longcat"])
def test_guidance_in_one_call_has_the_gradient_of_two(tmp_path, recipe):
    """Chosen before the first rollout: on a CPU one call."""
    open_ = make_trainer(tmp_path / "a", recipe=recipe, batch_guidance=None)
    calls = []
    hook = lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"]))  # noqa: E731
    open_.video_model.denoisers["transformer"].register_forward_pre_hook(hook, with_kwargs=True)
    assert open_.batch_guidance is None
    batches = generation(open_)
    assert open_.batch_guidance is True and max(calls) == 2 * open_.args.per_device_train_batch_size
    together, separate = gradient(open_, batches)[0], make_trainer(tmp_path / "b", recipe=recipe)
    assert_close(together, gradient(separate, generation(separate))[0])
    control = make_trainer(tmp_path / "c", recipe=recipe, batch_guidance=None, guidance_scale=2.0)
    assert relative(gradient(control, generation(control))[0], together) > 1e-2


def test_trying_one_call_leaves_nothing_behind(tmp_path):
    """What an accelerator does before its first rollout: gradients, random state and weights are as they were."""
    trainer = make_trainer(tmp_path, batch_guidance=None, rollout_batch_size=16)
    batches = generation(trainer)
    expected, _ = gradient(trainer, batches)
    trainer.model.zero_grad()
    trainer.batch_guidance, state = None, torch.get_rng_state()
    sizes = []
    hook = lambda module, args, kwargs: sizes.append((len(kwargs["hidden_states"]), torch.is_grad_enabled()))  # noqa: E731
    handle = trainer.video_model.denoisers["transformer"].register_forward_pre_hook(hook, with_kwargs=True)
    assert grpo_choices.try_one_call(trainer, 0) is not None
    handle.remove()
    assert sizes == [(32, False), (16, True)]  # the rollout's largest, the update's; both branches of each
    assert trainer.batch_guidance is None and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.batch_guidance = True
    assert torch.equal(gradient(trainer, batches)[0], expected)


def test_without_room_for_one_call_there_are_two(tmp_path):
    trainer = make_trainer(tmp_path, batch_guidance=None)
    generation(trainer)
    trainer.batch_guidance = None

    def full(module, args, kwargs):
        if len(kwargs["hidden_states"]) > trainer.args.per_device_train_batch_size:
            raise torch.OutOfMemoryError("out of memory")

    trainer.video_model.denoisers["transformer"].register_forward_pre_hook(full, with_kwargs=True)
    assert grpo_choices.try_one_call(trainer, 0) is None
    assert trainer.batch_guidance is None
    trainer.batch_guidance = False
    generation(trainer)  # control: two calls have room


def test_trying_kept_graphs_leaves_nothing_behind(tmp_path):
    """What an accelerator does before its first rollout: the graphs of all calls are alive while a video is decoded."""
    trainer = make_trainer(tmp_path, reuse_rollout=None, rollout_batch_size=4)
    batches = generation(trainer)
    expected, _ = gradient(trainer, batches)
    trainer.model.zero_grad()
    done, state = [], torch.get_rng_state()

    def forward(module, args, kwargs, output):
        done.append(len(kwargs["hidden_states"]))
        output[0].register_hook(lambda gradient: done.append("backward"))

    handles = [
        trainer.video_model.denoisers["transformer"].register_forward_hook(forward, with_kwargs=True),
        trainer.video_model.pipe.vae.post_quant_conv.register_forward_pre_hook(lambda *_: done.append("decode")),
    ]
    assert grpo_choices.try_kept_graphs(trainer, 0, rows=6) is not None
    for handle in handles:
        handle.remove()
    # both branches of guidance, of four latents and of the other two
    assert done == [4, 4, 2, 2, "decode"] + 4 * ["backward"]
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in trainer.model.parameters())
    trainer = make_trainer(tmp_path, reuse_rollout=None, rollout_batch_size=4)
    assert_close(gradient(trainer, generation(trainer))[0], expected)


def test_without_room_for_kept_graphs_beside_decoding_they_are_not_kept(tmp_path):
    trainer = make_trainer(tmp_path, reuse_rollout=None)
    generation(trainer)
    assert trainer.reuse_rollout and trainer._graphs_tried  # a CPU's memory is not what limits a run
    free, full = grpo_choices.try_kept_graphs(trainer, 0, 8), torch.OutOfMemoryError("out of memory")

    def decode(module, args):
        raise full

    handle = trainer.video_model.pipe.vae.post_quant_conv.register_forward_pre_hook(decode)
    assert free is not None and grpo_choices.try_kept_graphs(trainer, 0, 8) is None
    handle.remove()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("recipe, expected", [("flash-grpo", 8), ("longcat", 2), ("tempflow-grpo", 4)])
def test_as_many_graphs_are_tried_as_will_be_kept(tmp_path, monkeypatch, recipe, expected):
    tried, keep = [], grpo_trainer.keep_graphs
    monkeypatch.setattr(grpo_trainer, "keep_graphs", lambda *args: tried.append(args[1:]) or keep(*args))
    config = {"tempflow-grpo": dict(num_latents=2, num_generations=4)}.get(recipe, {})
    trainer = make_trainer(tmp_path, recipe=recipe, reuse_rollout=None, **config)
    batches = generation(trainer)
    assert grpo_choices.kept_rows(*tried[0]) == expected == sum(map(len, batches))
    # of two processes, the one that samples the first group and half of the second
    assert grpo_choices.kept_rows(tried[0][0], [range(4), range(2)]) == {8: 6, 2: 2, 4: 3}[expected]
    generation(trainer)
    assert len(tried) == 1


def test_a_resumed_run_recomputes_if_the_one_before_did(tmp_path):
    config = dict(reuse_rollout=None, max_steps=2, save_strategy="steps", save_steps=1)
    for kept in (True, False):
        trainer = make_trainer(tmp_path / f"{kept}", **config)
        trainer.reuse_rollout, trainer._graphs_tried = kept, True
        trainer.train()
        again = make_trainer(tmp_path / "again", **config)
        again.load_rank_state(tmp_path / f"{kept}/checkpoint-1")
        assert again.reuse_rollout is kept and again._graphs_tried
        # whatever the run before did: several passes need a forward of their own
        several = make_trainer(tmp_path / "several", num_iterations=2, **config)
        several.load_rank_state(tmp_path / f"{kept}/checkpoint-1")
        assert several.reuse_rollout is False


def test_a_resumed_run_keeps_its_choice(tmp_path):
    trainer = make_trainer(tmp_path / "run", batch_guidance=None, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run/checkpoint-1"
    again = make_trainer(tmp_path / "again", batch_guidance=None, max_steps=2)
    again.load_rank_state(folder)
    assert again.batch_guidance is True
    explicit = make_trainer(tmp_path / "explicit", batch_guidance=False, max_steps=2)
    explicit.load_rank_state(folder)
    assert explicit.batch_guidance is False


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
    assert relative(movement("left open", batch_guidance=None, reuse_rollout=None), default) < 1e-4
    assert relative(movement("control", seed=1), default) > 1e-2
    # autocast keeps casts of the weights from the steps without gradient: they must not cut the kept graph
    late = dict(bf16=True, sde_range=[0.5, 1.0])
    assert relative(movement("reuse in bfloat16", reuse_rollout=True, **late), movement("bfloat16", **late)) < 0.05
