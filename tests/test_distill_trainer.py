"""VideoDistillTrainer: whose turn it is, what has a gradient, what is averaged, resumed, evaluated and logged."""

import math

import pytest
import torch
from datasets import Dataset
from distill_setup import PROMPTS, dataset, distance, history, make_args, make_trainer, weights
from peft import LoraConfig
from sft_setup import digest
from tiny_pipelines import wan
from transformers import TrainerCallback

from vidtrl import VideoDistillTrainer
from vidtrl.diffusion.distribution_matching import dmd_gradient
from vidtrl.models import VideoModel
from vidtrl.trainer.draws import generators, randn


class AtStep(TrainerCallback):
    """Calls functions around each optimizer step."""

    def __init__(self, begin=None, end=None):
        self.begin, self.end = begin, end

    def on_step_begin(self, args, state, control, **kwargs):
        if self.begin:
            self.begin(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.end:
            self.end(state.global_step)


def batch(trainer, number=0) -> dict:
    loader = list(trainer.get_train_dataloader())
    return trainer.prepare_batch(loader[number])


def calls(trainer) -> list[tuple[str, bool]]:
    """Role, and whether gradients are on, of every call of the denoiser from now on."""
    found = []

    def hook(module, args, kwargs):
        found.append((trainer.policies.current, torch.is_grad_enabled()))

    trainer.video_model.denoisers["transformer"].register_forward_pre_hook(hook, with_kwargs=True)
    return found


# ---- Turns ----


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "schedule, number, expected",
    [
        ("exclusive", 2, ["F", "F", "S", "F", "F", "S"]),
        ("every_step", 2, ["F", "SF", "F", "SF"]),
        ("exclusive", 1, ["F", "S", "F"]),
    ],
)
def test_a_step_changes_the_roles_whose_turn_it_is_and_nothing_else(
    tmp_path, cache_dir, schedule, number, expected, lora
):
    config = dict(critic_schedule=schedule, fake_updates_per_student=number, max_steps=len(expected), lora=lora)
    trainer = make_trainer(tmp_path, cache_dir, weight_decay=0.1, **config)
    if lora:
        modules, names = [trainer.model], ["lora_A", "lora_B"]
        base = {n: p for n, p in trainer.model.named_parameters() if not any(name in n for name in names)}
    else:
        base = trainer.policies._roles["teacher"].module.state_dict()
        modules = [role.module for role in trainer.policies._roles.values()]
        assert len({id(module) for module in modules}) == 3
    before, present, changed = digest(base), {}, []

    def begin(step):
        present.update({role: digest(weights(trainer, role)) for role in ("student", "fake")})

    def end(step):
        roles = [r[0].upper() for r in ("student", "fake") if digest(weights(trainer, r)) != present[r]]
        changed.append("".join(roles))

    trainer.add_callback(AtStep(begin, end))
    trainer.train()
    assert changed == expected
    assert digest(base) == before
    for name in ("student", "fake"):
        turns = [name[0].upper() in roles for roles in expected]
        assert len(history(trainer, f"loss/{name}")) == sum(turns)


def test_there_is_one_copy_of_the_base(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, ema_decay=0.9)
    modules = {id(role.module) for role in trainer.policies._roles.values()}
    assert modules == {id(trainer.model)}
    adapters = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
    both = sum(p.numel() for role in ("student", "fake") for p in trainer.policies.parameters(role).values())
    plain = sum(p.numel() for p in wan()[0].transformer.parameters())
    assert adapters == both and sum(p.numel() for p in trainer.model.parameters()) == plain + adapters
    trainer.train()
    state = trainer.optimizer.state
    assert sum(s["exp_avg"].numel() for s in state.values()) == adapters


def test_learning_rates_of_the_roles(tmp_path, cache_dir):
    config = dict(learning_rate=1e-3, fake_learning_rate=2e-4, weight_decay=0.03)
    trainer = make_trainer(tmp_path, cache_dir, **config)
    groups = trainer.create_optimizer().param_groups
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in groups] == [
        (1e-3, 0.03, (0.9, 0.999)),
        (2e-4, 0.03, (0.9, 0.999)),
    ]
    for lora, expected in ((True, 5e-5), (False, 5e-7)):
        by_recipe = make_trainer(tmp_path, cache_dir, lora=lora, learning_rate=None, fake_learning_rate=None)
        assert [g["lr"] for g in by_recipe.create_optimizer().param_groups] == [expected] * 2


def test_a_rate_that_is_set_later_is_kept(tmp_path, cache_dir):
    args = make_args(tmp_path, cache_dir, learning_rate=None)
    args.learning_rate = 3e-3
    VideoDistillTrainer(wan()[0], args=args, train_dataset=dataset(), peft_config=LoraConfig(r=4))
    assert args.learning_rate == 3e-3


# ---- Gradients ----


def test_gradient_at_the_sample_is_the_normalised_score_difference(tmp_path, cache_dir):
    """By hand: fake score and guided teacher on the noised sample, with models of their own."""
    trainer = make_trainer(tmp_path, cache_dir, teacher_guidance_scale=3.5, negative_prompt="a green cat", max_steps=1)
    trainer.train()  # the fake score has learned something
    inputs, kept = batch(trainer), {}
    rollout = trainer.rollout

    def watched(*args, **kwargs):
        x, mask = rollout(*args, **kwargs)
        kept["x"] = x
        x.retain_grad()
        return x, mask

    trainer.rollout = watched
    loss, _ = trainer.student_loss(inputs)
    loss.backward()
    x = kept["x"]

    sources = generators(inputs["draws"])
    rollout(inputs, sources, grad=False)
    sigma = trainer.score_sigma(sources)
    noise = randn(x.shape[1:], sources)
    x_s = torch.lerp(x, noise, sigma.reshape(-1, 1, 1, 1, 1)).detach()
    base = VideoModel(wan()[0])
    size = dict(height=16, width=16, num_frames=9, max_sequence_length=16)
    negative = base.condition("a green cat", negative=True, **size)
    with torch.no_grad():
        text, none = (base.velocity(x_s, sigma, c) for c in (inputs["condition"], negative))
        v_real = none + 3.5 * (text - none)
        with trainer.policies.active("fake", frozen=True) as denoiser:
            v_fake = trainer.video_model.velocity(x_s, sigma, inputs["condition"], denoiser=denoiser)
    real, fake = (x_s - sigma.reshape(-1, 1, 1, 1, 1) * v for v in (v_real, v_fake))
    expected = dmd_gradient(x, fake, real) / x.numel()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-8)
    assert len(set(sigma.tolist())) == 2  # one for each sample
    assert loss.item() == pytest.approx(0.5 * (expected * x.numel()).square().mean().item(), rel=1e-4)
    with torch.no_grad():  # controls: the other form of guidance, and the base in place of the fake score
        others = [(text + 3.5 * (text - none), v_fake), (v_real, text)]
    for v_r, v_f in others:
        r, f = (x_s - sigma.reshape(-1, 1, 1, 1, 1) * v for v in (v_r, v_f))
        assert (dmd_gradient(x, f, r) / x.numel() - x.grad).norm() > 0.02 * x.grad.norm()


def test_the_student_s_gradient_is_that_of_a_plain_backward(tmp_path, cache_dir):
    """training_step leaves what autograd gives for the same loss, and nothing on the fake score."""
    trainer = make_trainer(tmp_path, cache_dir, max_grad_norm=0.0, optim="sgd", learning_rate=1.0, max_steps=2)
    seen = {}
    trainer.add_callback(AtStep(begin=lambda step: seen.update({step: weights(trainer)})))
    losses = []
    original = trainer.student_loss

    def watched(inputs):
        loss, x = original(inputs)
        parameters = trainer.policies.parameters("student")
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        losses.append(dict(zip(parameters, gradients, strict=True)))
        return loss, x

    trainer.student_loss = watched
    trainer.train()
    after = weights(trainer)
    moved = {n: seen[1][n] - after[n] - 0.01 * seen[1][n] for n in after}  # weight decay
    assert len(losses) == 1
    for name, gradient in losses[0].items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("exit_step", [0, 2])
def test_only_the_exit_step_has_a_gradient(tmp_path, cache_dir, monkeypatch, exit_step):
    trainer = make_trainer(tmp_path, cache_dir)
    inputs, found = batch(trainer), calls(trainer)
    monkeypatch.setattr("vidtrl.trainer.distill_trainer.random.Random", lambda seed: FixedDraw(exit_step))
    trainer.model.train()
    trainer.student_loss(inputs)
    scores = [("fake", False), ("teacher", False), ("teacher", False)]
    assert found == [("student", False)] * exit_step + [("student", True)] + scores
    found.clear()
    with trainer.policies.active("fake"):
        trainer.fake_loss(inputs)
    assert found == [("student", False)] * (exit_step + 1) + [("fake", True)]


class FixedDraw:
    def __init__(self, value):
        self.value = value

    def randrange(self, number):
        assert self.value < number
        return self.value


def test_one_exit_step_for_all_micro_batches(tmp_path, cache_dir):
    class Watching(VideoDistillTrainer):
        exits = []

        def _few_steps(self, condition, sources, exit_step=None, grad=False):
            self.exits.append((self.state.global_step, exit_step))
            return super()._few_steps(condition, sources, exit_step, grad)

    Watching.exits = []
    config = dict(gradient_accumulation_steps=2, per_device_train_batch_size=1, max_steps=12)
    make_trainer(tmp_path, cache_dir, cls=Watching, **config).train()
    assert len(Watching.exits) == 24
    by_step = {step: {e for s, e in Watching.exits if s == step} for step in range(12)}
    assert all(len(exits) == 1 for exits in by_step.values())
    assert len({e for exits in by_step.values() for e in exits}) > 2


@pytest.mark.parametrize("schedule", ["exclusive", "every_step"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_accumulation_changes_nothing(tmp_path, cache_dir, schedule, lora):
    results = {}
    for size, steps in ((4, 1), (1, 4)):
        config = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, critic_schedule=schedule)
        config |= dict(optim="sgd", learning_rate=0.1, fake_learning_rate=0.1, max_steps=4, lora=lora)
        trainer = make_trainer(tmp_path / str(size), cache_dir, fake_updates_per_student=2, **config)
        start = {role: weights(trainer, role) for role in ("student", "fake")}
        trainer.train()
        results[size] = {role: weights(trainer, role) for role in start}, history(trainer, "loss")
    for role in ("student", "fake"):
        moved = distance(results[4][0][role], start[role])
        assert moved > 1e-4
        assert distance(results[4][0][role], results[1][0][role]) < 1e-4 * moved
    assert results[1][1] == pytest.approx(results[4][1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path, cache_dir):
    results = []
    for on in (False, True):
        config = dict(gradient_checkpointing=on, loss_type="sid", max_steps=4)  # gradients through all roles
        trainer = make_trainer(tmp_path / str(on), cache_dir, **config)
        trainer.train()
        assert trainer.video_model.denoisers["transformer"].is_gradient_checkpointing == on
        results.append([weights(trainer, role) for role in ("student", "fake")])
    for a, b in zip(*results, strict=True):
        assert distance(a, b) == 0


def test_bf16_keeps_gradients(tmp_path, cache_dir):
    """Weights cast in the steps without a gradient are cast again where there is one."""
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path / str(bf16), cache_dir, bf16=bf16, max_steps=4)
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        assert all((after[n] != before[n]).any() for n in after if "lora_B" in n)
        losses[bf16] = history(trainer, "loss")
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] != losses[False]


def test_adapters_on_a_bfloat16_base_are_float32(tmp_path, cache_dir):
    wan()[0].save_pretrained(tmp_path / "pipe")
    trainer = make_trainer(tmp_path / "run", cache_dir, pipe=str(tmp_path / "pipe"), bf16=True, ema_decay=0.9)
    dtypes = {p.dtype for role in ("student", "fake") for p in trainer.policies.parameters(role).values()}
    base = next(p for n, p in trainer.model.named_parameters() if n.endswith("to_q.base_layer.weight"))
    assert dtypes == {torch.float32} and base.dtype == torch.bfloat16
    trainer.train(), trainer.save_model()
    assert all(math.isfinite(loss) for loss in history(trainer, "loss"))


def test_noise_of_the_fake_score_is_not_that_of_the_sample(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, critic_schedule="every_step")
    inputs = batch(trainer)
    drawn = []

    def recorded(shape, sources):
        drawn.append(randn(shape, sources))
        return drawn[-1]

    import vidtrl.trainer.distill_trainer as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn", recorded)
        _, x = trainer.student_loss(inputs)
        with trainer.policies.active("fake"):
            trainer.fake_loss(inputs, x)
    last = drawn[-1].flatten(1)
    for other in drawn[:-1]:
        other = other.flatten(1)
        for shift in range(-3, 4):
            a, b = last[:, 4:-4], other[:, 4 + shift : other.shape[1] - 4 + shift]
            assert abs(torch.corrcoef(torch.stack([a[0], b[0]]))[0, 1]) < 0.3


# ---- Wrong or missing gradients ----


def test_a_loss_without_the_role_raises(tmp_path, cache_dir):
    class Detached(VideoDistillTrainer):
        def fake_loss(self, inputs, x=None):
            loss, x = super().fake_loss(inputs, x)
            return loss.detach().requires_grad_(), x

    with pytest.raises(RuntimeError, match="'fake' got no gradient in a step for fake"):
        make_trainer(tmp_path, cache_dir, cls=Detached).train()

    class Zero(VideoDistillTrainer):
        def fake_loss(self, inputs, x=None):
            loss, x = super().fake_loss(inputs, x)
            return 0 * loss, x

    with pytest.raises(RuntimeError, match="gradient of the role 'fake' is exactly zero at step 1"):
        make_trainer(tmp_path, cache_dir, cls=Zero).train()


def test_a_gradient_on_another_role_raises(tmp_path, cache_dir):
    class Leaking(VideoDistillTrainer):
        def fake_loss(self, inputs, x=None):
            parameter = next(iter(self.policies.parameters("student").values()))
            parameter.grad = torch.zeros_like(parameter)
            return super().fake_loss(inputs, x)

    with pytest.raises(RuntimeError, match="'student' has gradients in a step that trains fake"):
        make_trainer(tmp_path, cache_dir, cls=Leaking).train()


def test_nan_is_raised_or_skipped(tmp_path, cache_dir):
    class Broken(VideoDistillTrainer):
        def fake_loss(self, inputs, x=None):
            loss, x = super().fake_loss(inputs, x)
            return (loss * math.nan if self.state.global_step == 2 else loss), x

    with pytest.raises(ValueError, match="the loss is nan at step 3, samples row-.*on_nan='skip'"):
        make_trainer(tmp_path / "1", cache_dir, cls=Broken, max_steps=4).train()
    for lora in (True, False):
        trainer = make_trainer(tmp_path / str(lora), cache_dir, cls=Broken, max_steps=4, on_nan="skip", lora=lora)
        trainer.train()
        assert all(p.isfinite().all() for role in ("student", "fake") for p in weights(trainer, role).values())
        assert history(trainer, "num_skipped_batches") == [1, 1]
        assert len(history(trainer, "loss/fake")) == 1 and len(history(trainer, "loss")) == 3


def test_training_again_after_an_interruption_inside_a_step(tmp_path, cache_dir):
    class Interrupted(VideoDistillTrainer):
        number = 0

        def fake_loss(self, inputs, x=None):
            self.number += 1
            if self.number == 2:
                raise KeyboardInterrupt
            return super().fake_loss(inputs, x)

    config = dict(gradient_accumulation_steps=2, per_device_train_batch_size=1, max_steps=1, lora=False, optim="sgd")
    trainer = make_trainer(tmp_path / "1", cache_dir, cls=Interrupted, **config)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    plain = make_trainer(tmp_path / "2", cache_dir, **config)
    plain.train()
    assert digest(weights(trainer, "fake")) == digest(weights(plain, "fake"))


# ---- Average ----


def test_the_average_follows_the_student_s_updates(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, ema_decay=0.5, fake_updates_per_student=2, max_steps=6)
    expected, found, number = weights(trainer), [], 0
    assert set(trainer.average.parameters) == set(trainer.policies.parameters("student"))

    def end(step):
        nonlocal number
        if step % 3 == 0:
            decay = min(0.5, (1 + number) / (10 + number))
            for name, value in weights(trainer).items():
                expected[name] = decay * expected[name] + (1 - decay) * value
            number += 1
        found.append(distance(expected, trainer.average.average))

    trainer.callback_handler.callbacks.append(AtStep(end=end))  # after the one that averages
    trainer.train()
    assert max(found) < 1e-6 and trainer.average.num_updates == 2
    assert distance(weights(trainer), trainer.average.average) == 0  # what it holds after training


# ---- Resuming ----


@pytest.mark.parametrize(
    "config",
    [
        dict(ema_decay=0.9, critic_schedule="every_step", lr_scheduler_type="cosine"),
        dict(lora=False, fake_updates_per_student=2),
        dict(recipe="self-forcing", frames_per_block=1, gradient_accumulation_steps=2, per_device_train_batch_size=1),
    ],
    ids=["every step", "full", "self-forcing"],
)
def test_resume_bit_exactly(tmp_path, cache_dir, config):
    config = {**config, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", cache_dir, **config)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", cache_dir, **config)
    start = digest(weights(resumed))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for role in ("student", "fake"):
        assert digest(weights(resumed, role)) == digest(weights(whole, role)) != start
    assert history(resumed, "loss") == history(whole, "loss")
    states = [list(t.optimizer.state_dict()["state"].values()) for t in (whole, resumed)]
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(*states, strict=True))


def test_a_checkpoint_of_another_method_or_other_prompts_is_refused(tmp_path, cache_dir):
    config = dict(max_steps=1, save_strategy="steps", save_steps=1)
    make_trainer(tmp_path / "run", cache_dir, **config).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    other = make_trainer(tmp_path / "other", cache_dir, recipe="self-forcing", frames_per_block=1, **config)
    with pytest.raises(ValueError, match="method.recipe: this run has 'self-forcing', the directory has 'dmd2'"):
        other.train(resume_from_checkpoint=checkpoint)
    rows = Dataset.from_list([{"prompt": prompt} for prompt in reversed(PROMPTS)])
    reversed_ = make_trainer(tmp_path / "reversed", cache_dir, rows=rows, **config)
    with pytest.raises(ValueError, match="other clips.*sha256 of prompts"):
        reversed_.train(resume_from_checkpoint=checkpoint)


def test_load_best_model(tmp_path, cache_dir):
    config = dict(max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    config |= dict(load_best_model_at_end=True, metric_for_best_model="eval_loss/fake")
    trainer = make_trainer(tmp_path, cache_dir, trainer=dict(eval_dataset=dataset(2)), **config)
    kept = {}
    trainer.add_callback(AtStep(end=lambda step: kept.update({step: weights(trainer)})))
    trainer.train()
    best = trainer.state.best_global_step
    assert best in (2, 4) and distance(weights(trainer), kept[best]) == 0


# ---- Evaluation, metrics, sampling ----


def test_metrics(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, max_steps=8, logging_steps=8)
    trainer.train()
    logs = trainer.state.log_history[0]
    expected = {
        "loss", "grad_norm", "learning_rate", "loss/student", "loss/fake", "dmd_gradient", "student_norm",
        "generated/mean", "generated/std", "generated/temporal_difference",
    }  # fmt: skip
    assert expected <= set(logs) and all(math.isfinite(v) for v in logs.values())
    bins = {name: value for name, value in logs.items() if name.startswith("critic_loss_sigma_")}
    assert "critic_loss_sigma_0.8-1.0" in bins and all(value > 0 for value in bins.values())
    assert logs["loss"] == pytest.approx((logs["loss/student"] + logs["loss/fake"]) / 2, rel=1e-5)
    norm = torch.stack([p.norm() for p in weights(trainer).values()]).norm().item()
    assert logs["student_norm"] == pytest.approx(norm, rel=1e-6)


def test_generated_metrics_are_those_of_the_samples(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir, max_steps=1)
    kept = []
    rollout = trainer.rollout
    trainer.rollout = lambda *args, **kwargs: kept.append(rollout(*args, **kwargs)) or kept[-1]
    trainer.train()
    x, logs = kept[0][0].double(), trainer.state.log_history[0]
    assert logs["generated/mean"] == pytest.approx(x.mean().item(), rel=1e-4)
    assert logs["generated/std"] == pytest.approx(x.flatten(1).std(1).mean().item(), rel=1e-4)
    assert logs["generated/temporal_difference"] == pytest.approx(x.diff(dim=2).square().mean().item(), rel=1e-4)


def test_evaluation(tmp_path, cache_dir):
    config = dict(per_device_eval_batch_size=2, ema_decay=0.9, max_steps=4)
    evaluation = {"seen": dataset(3), "new": Dataset.from_list([{"prompt": "a cat"}])}
    trainer = make_trainer(tmp_path, cache_dir, trainer=dict(eval_dataset=evaluation), **config)
    found = calls(trainer)
    state = torch.get_rng_state()
    first = trainer.evaluate()
    assert not any(grad for _, grad in found)  # nothing is kept for a backward pass
    assert {"eval_seen_loss", "eval_new_loss", "eval_seen_loss/fake", "eval_new_dmd_gradient"} <= set(first)
    again = trainer.evaluate()
    for name in ("eval_seen_loss", "eval_new_loss/fake"):
        assert first[name] == again[name]
    assert torch.equal(torch.get_rng_state(), state)
    trainer.train()
    assert trainer.evaluate()["eval_seen_loss"] != first["eval_seen_loss"]
    other = trainer.evaluate(Dataset.from_list([{"prompt": "a blue cat"}]))  # its conditions are made now
    assert other["eval_loss"] > 0 and trainer.policies.current == "student"


def test_training_with_evaluation_is_the_same_training(tmp_path, cache_dir):
    results = []
    for on in (False, True):
        config = dict(max_steps=4, recipe="longlive", frames_per_block=1, window=3, sink=1, stream_num_frames=7)
        config |= dict(stream_overlap=1, eval_strategy="steps", eval_steps=1) if on else dict(stream_overlap=1)
        config |= dict(validation_steps=2, num_validation_videos=1) if on else {}
        trainer = make_trainer(tmp_path / str(on), cache_dir, trainer=dict(eval_dataset=dataset(2)), **config)
        trainer.train()
        results.append(digest(weights(trainer)))
    assert results[0] == results[1]
    videos = sorted(path.relative_to(tmp_path) for path in (tmp_path / "True" / "validation").rglob("*.mp4"))
    assert [video.parent.name for video in videos] == ["step_000000", "step_000002", "step_000004"]


def test_generate_videos_is_the_stock_pipeline_without_guidance(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir)
    trainer.train()
    videos = trainer.generate_videos(PROMPTS[:2], seeds=[3, 4], batch_size=2)
    assert [tuple(v.shape) for v in videos] == [(9, 3, 16, 16)] * 2
    found = calls(trainer)
    call = dict(height=16, width=16, num_frames=9, max_sequence_length=16, output_type="pt")
    with torch.no_grad():
        again = trainer.pipe(
            PROMPTS[0], num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(3), **call
        ).frames[0]
    assert [role for role, _ in found] == ["student"] * 4
    torch.testing.assert_close(again, videos[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="num_inference_steps=4"):
        trainer.pipe(PROMPTS[0], num_inference_steps=20, **call)


def test_mapped_columns_and_epochs(tmp_path, cache_dir):
    rows = Dataset.from_dict({"caption": PROMPTS, "number": list(range(4))}).map(lambda r: {"caption": r["caption"]})
    trainer = make_trainer(
        tmp_path, cache_dir, rows=rows, max_steps=-1, num_train_epochs=3, fake_updates_per_student=2
    )
    trainer.train()
    assert trainer.state.global_step == 6 and len(history(trainer, "loss/student")) == 2


def test_a_cached_dataset_is_refused(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir)
    with pytest.raises(TypeError, match="pass the rows as a datasets.Dataset"):
        make_trainer(tmp_path, cache_dir, rows=trainer.train_dataset.dataset)
