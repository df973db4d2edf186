"""Two-expert models: which expert a noise level trains, what a step does to each, files, stages, memory, guidance."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from grpo_setup import Watching, dataset, history
from grpo_setup import make_trainer as make_grpo_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors import safe_open
from sft_setup import SIZE, digest, make_trainer, trained_weights
from test_distributed import run  # noqa: F401 (a fixture)
from tiny_pipelines import wan, wan22
from transformers import TrainerCallback

from vidtrl.models import VideoModel
from vidtrl.rollout import sample
from vidtrl.trainer.experts import ExpertSwap
from vidtrl.trainer.lora import EXPERT_FILES, add_lora, load_base_adapters, save_adapter


HIGH, LOW = "transformer", "transformer_2"
CALL = dict(SIZE, num_inference_steps=6, guidance_scale=1.0, output_type="latent")


def latents(pipe, **call):
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **{**CALL, **call}).frames


def of(weights, expert):
    return {name: value for name, value in weights.items() if name.startswith(f"{expert}.")}


class Recording:
    """Mixed into a trainer: the expert of each micro-batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self.__dict__.setdefault("used", []).append(self._unwrapped().last)
        return result


def recorded(trainer):
    trainer.__class__ = type("Recorded", (Recording, type(trainer)), {})
    return trainer


# ---- Supervised ----


@pytest.fixture(scope="module")
def untrained(clips, cache_dir, tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("untrained"), clips, cache_dir, pipe=wan22()[0])


@pytest.mark.parametrize("sampling, batch", [("uniform", 1), ("logit_normal", 1), ("uniform", 3)])
@pytest.mark.parametrize("boundary", [0.875, 0.6])
def test_shares_follow_boundary_and_distribution(untrained, monkeypatch, sampling, batch, boundary):
    model, number, shape = untrained.video_model, 900, (16, 3, 2, 2)
    monkeypatch.setattr(untrained.args, "sigma_sampling", sampling)
    monkeypatch.setattr(model, "boundary", boundary)
    sigmas = [untrained.sample_sigma(list(range(i, i + batch)), shape) for i in range(0, number * batch, batch)]
    for sigma in sigmas:  # a micro-batch goes to one expert
        assert len({model.expert(s) for s in sigma.tolist()}) == 1
    if sampling == "uniform":
        u = (torch.arange(100_000) + 0.5) / 100_000
    else:
        u = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    everywhere = model.training_sigma(u, shape)
    for position in (0, batch - 1):  # the last sample of a batch is distributed as the first
        drawn = torch.stack([sigma[position] for sigma in sigmas])
        for level in (boundary, 0.5, 0.8):
            share = (everywhere >= level).float().mean().item()
            got = (drawn >= level - 1e-3).float().mean().item()
            assert abs(got - share) < 4 * math.sqrt(share * (1 - share) / number) + 2e-3


def test_a_step_moves_the_experts_that_had_samples_and_leaves_the_other_alone(clips, cache_dir, tmp_path):
    trainer = make_trainer(
        tmp_path, clips, cache_dir, pipe=wan22()[0], max_steps=8, per_device_train_batch_size=1, weight_decay=0.1
    )
    recorded(trainer)
    seen = [trained_weights(trainer)]

    class Snapshots(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(trained_weights(trainer))

    trainer.add_callback(Snapshots())
    trainer.train()
    assert set(trainer.used) == {HIGH, LOW}  # or this run shows nothing
    for used, logs in zip(trainer.used, trainer.state.log_history, strict=False):
        assert logs[f"{used}/loss"] == pytest.approx(logs["loss"], rel=1e-5)
        assert f"{LOW if used == HIGH else HIGH}/loss" not in logs
    for used, before, after in zip(trainer.used, seen[:-1], seen[1:], strict=True):
        idle = LOW if used == HIGH else HIGH
        assert digest(of(before, idle)) == digest(of(after, idle))  # no decay, no momentum
        assert digest(of(before, used)) != digest(of(after, used))
    names = dict(trainer.model.named_parameters())
    for expert in (HIGH, LOW):
        counts = {
            int(trainer.optimizer.state[p]["step"])
            for name, p in names.items()
            if p.requires_grad and name.startswith(f"{expert}.")
        }
        assert counts == {trainer.used.count(expert)}


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_samples(clips, cache_dir, tmp_path):
    config = dict(per_device_train_batch_size=1, gradient_accumulation_steps=6, max_steps=1)
    config |= dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
    trainer = make_trainer(tmp_path, clips, cache_dir, pipe=wan22()[0], **config)
    start = trained_weights(trainer)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    total, experts = dict.fromkeys(start, 0), set()
    trainer.get_train_dataloader()
    trainer._train_sampler.set_epoch(0)
    for inputs in trainer.get_train_dataloader():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
        experts.add(trainer.model.last)
        mine = {n: p for n, p in parameters.items() if n.startswith(f"{trainer.model.last}.")}
        gradients = torch.autograd.grad(loss / 6, list(mine.values()), allow_unused=True)
        for name, gradient in zip(mine, gradients, strict=True):
            total[name] = total[name] + (0 if gradient is None else gradient)
    assert experts == {HIGH, LOW}
    trainer.train()
    for name, after in trained_weights(trainer).items():
        torch.testing.assert_close(start[name] - after, total[name] + torch.zeros_like(after), rtol=1e-4, atol=1e-7)


def test_two_files_load_in_a_fresh_process_by_the_cards_lines(clips, cache_dir, tmp_path):
    pipe, _ = wan22()
    before = latents(pipe)
    trainer = make_trainer(tmp_path / "run", clips, cache_dir, pipe=pipe, max_steps=6, ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    for name in EXPERT_FILES.values():
        with safe_open(tmp_path / "run" / name, "pt") as file:
            assert all(key.startswith("transformer.blocks") for key in file.keys())
    card = (tmp_path / "run" / "README.md").read_text()
    assert "one for each expert" in card
    lines = re.findall(r"^pipe\.load_lora_weights.*$", card, re.MULTILINE)
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_pipelines import wan22
pipe, _ = wan22()
{chr(10).join(lines)}
frames = pipe("a red circle", generator=torch.Generator().manual_seed(0), **{CALL!r}).frames
torch.save(frames, {str(tmp_path / "latents.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    expected = latents(trainer.pipe)
    torch.testing.assert_close(torch.load(tmp_path / "latents.pt"), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3
    swapped, _ = wan22()  # negative control: which file goes where matters
    for name, file in zip(reversed(EXPERT_FILES), EXPERT_FILES.values(), strict=True):
        swapped.load_lora_weights(str(tmp_path / "run"), weight_name=file, load_into_transformer_2=name == LOW)
    assert (latents(swapped) - expected).abs().max() > 1e-3


def test_all_weights_of_both(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, pipe=wan22()[0], lora=False, max_steps=4, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "transformer=transformer, transformer_2=transformer_2" in card
    fresh, _ = wan22()
    untrained = latents(fresh)
    for name in (HIGH, LOW):
        module = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, subfolder=name)
        fresh.register_modules(**{name: module})
    torch.testing.assert_close(latents(fresh), latents(trainer.pipe), rtol=0, atol=1e-6)
    assert (latents(fresh) - untrained).abs().max() > 1e-3


def test_a_skipped_loss_leaves_the_idle_expert_alone(clips, cache_dir, tmp_path):
    trainer = make_trainer(tmp_path, clips, cache_dir, pipe=wan22()[0], on_nan="skip")
    trainer.finite_or_skip(torch.tensor(float("nan")), ["a"]).backward()
    got = {name.split(".")[0] for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert got == {HIGH} and trainer.num_skipped_batches == 1  # nothing was called yet: the first


CONFIG = dict(per_device_train_batch_size=1, max_steps=6, save_steps=3, ema_decay=0.9)


def test_resumes_bit_exactly(clips, cache_dir, tmp_path):
    def train(name, **kwargs):
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
        config = {**CONFIG, "save_strategy": "steps", "gradient_accumulation_steps": 2}
        trainer = make_trainer(tmp_path / name, clips, cache_dir, pipe=wan22()[0], lora=lora, **config)
        trainer.train(**kwargs)
        return digest(trained_weights(trainer))

    whole = train("whole")
    assert train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")) == whole
    manifest = json.loads((tmp_path / "whole" / "checkpoint-3" / "vidtrl.json").read_text())
    assert manifest["model"]["denoiser"] == f"{HIGH}, {LOW}" and set(EXPERT_FILES.values()) <= set(manifest["files"])
    one = make_trainer(tmp_path / "one", clips, cache_dir, pipe=wan22()[0], experts="high")
    with pytest.raises(ValueError, match="belongs to another run.*denoiser: this run has 'transformer'"):
        one.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_two_processes_equal_one(run):  # noqa: F811
    """Experts are called by one process and not by the other, or by none: gradients are exchanged all the same."""
    one = run("one", pipe="wan22", config={**CONFIG, "gradient_accumulation_steps": 2})
    two = run("two", 2, pipe="wan22", config=CONFIG)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)


# ---- Stages ----


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Adapters of earlier runs: of both experts, of one each."""
    root = tmp_path_factory.mktemp("stages")
    for folder, names in (("both", (HIGH, LOW)), ("high", (HIGH,)), ("low", (LOW,)), ("untold", (HIGH,))):
        (root / folder).mkdir()
        for i, name in enumerate(names):
            torch.manual_seed(len(folder) + i)
            model = add_lora(getattr(wan22()[0], name), LoraConfig(r=2, lora_alpha=6, init_lora_weights=False))
            file = {"file": EXPERT_FILES[name]} if folder == "both" else {}
            save_adapter(model, root / folder, denoiser=None if folder == "untold" else name, **file)
    return root


def test_base_adapters_of_both(clips, cache_dir, tmp_path, stages, monkeypatch):
    monkeypatch.chdir(stages)
    adapters = ["./both", "./high", "./low"]
    trainer = make_trainer(tmp_path, clips, cache_dir, pipe=wan22()[0], base_adapters=adapters, max_steps=4)
    assert [(a.denoiser, a.source, a.name) for a in trainer.base_adapters] == [
        (HIGH, "./both", "base_0"), (LOW, "./both", "base_0"), (HIGH, "./high", "base_1"), (LOW, "./low", "base_2"),
    ]  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    fresh, _ = wan22()
    code = re.search(r"^pipe = .*?\n(.*)^pipe\.to", card, re.MULTILINE | re.DOTALL).group(1)
    assert code.count("load_into_transformer_2=True") == 3
    exec(code, {"pipe": fresh})
    torch.testing.assert_close(latents(fresh), latents(trainer.pipe), rtol=0, atol=1e-5)
    fresh.transformer_2.set_adapters(["base_0", "trained"])  # negative control
    assert (latents(fresh) - latents(trainer.pipe)).abs().max() > 1e-4


@pytest.mark.parametrize(
    "adapters, names, message",
    [
        (["untold"], [HIGH, LOW], "does not say which of the two experts"),
        (["low"], [HIGH], "is for the transformer_2, which this run does not train: set experts='both'"),
        (["./nothing"], [HIGH], "there is no adapter at './nothing'"),
    ],
)
def test_base_adapters_that_do_not_fit(stages, monkeypatch, adapters, names, message):
    monkeypatch.chdir(stages)
    with pytest.raises(ValueError, match=message):
        load_base_adapters(wan22()[0], names, adapters)


def test_a_files_name_says_its_expert(stages, tmp_path):
    file = tmp_path / "low_noise_model.safetensors"
    file.write_bytes((stages / "untold" / "pytorch_lora_weights.safetensors").read_bytes())
    (loaded,) = load_base_adapters(wan22()[0], [HIGH, LOW], [str(file)])
    assert loaded.denoiser == LOW


def test_an_adapter_of_both_serves_a_run_of_one(stages):
    pipe, _ = wan22()
    (loaded,) = load_base_adapters(pipe, [LOW], [str(stages / "both")])
    assert (loaded.denoiser, loaded.weight_name) == (LOW, EXPERT_FILES[LOW])
    assert not any(".lora_" in name for name, _ in pipe.transformer.named_parameters())


# ---- Memory ----


@pytest.mark.parametrize("lora", [True, False])
def test_a_swap_moves_what_is_not_trained(clips, cache_dir, tmp_path, lora):
    """That it does is for tests/test_gpu.py: the CPU is one device."""
    trainer = make_trainer(tmp_path, clips, cache_dir, pipe=wan22()[0], lora=lora)
    for name in (HIGH, LOW):
        movable = {id(tensor) for tensor in trainer.swap.movable(getattr(trainer.model, name))}
        for parameter in getattr(trainer.model, name).parameters():
            assert (id(parameter) in movable) == (not parameter.requires_grad)


def test_calling_an_expert_swaps_it_in_and_a_later_trainer_takes_over():
    pipe, _ = wan22()
    model = VideoModel(pipe)
    condition = model.condition("a red circle", height=16, width=16, num_frames=9)
    swaps = [ExpertSwap(model.denoisers, "cpu") for _ in range(2)]
    for sigma, name in ((0.95, HIGH), (0.2, LOW), (0.9, HIGH)):
        model.velocity(torch.zeros(1, *condition.latent_shape), sigma, condition)
        assert swaps[1].current == name
    assert swaps[0].current is None  # its hooks are gone


def test_quantised_weights_are_not_moved():
    class Packed(torch.nn.Parameter):
        pass

    linear = torch.nn.Linear(2, 2)
    linear.weight = Packed(torch.zeros(2, 2), requires_grad=False)
    assert [id(t) for t in ExpertSwap({HIGH: linear}, "cpu").movable(linear)] == [id(linear.bias)]


# ---- Reinforcement learning ----

RL = dict(num_inference_steps=6, sde_range=[0.0, 1.0], max_steps=2, max_sequence_length=16)


@pytest.mark.parametrize("recipe", ["flow-grpo", "diffusion-nft", "awm"])
def test_each_step_is_routed_to_its_expert(tmp_path, recipe):
    trainer = make_grpo_trainer(tmp_path, pipe=wan22()[0], cls=Watching, recipe=recipe, beta=0.01, **RL)
    boundary, wrong = trainer.video_model.boundary, []
    calls = {HIGH: 0, LOW: 0}

    def hook(module, args, kwargs, name):
        calls[name] += torch.is_grad_enabled()
        if (kwargs["timestep"] >= boundary * 1000).any() != (name == HIGH):
            wrong.append(name)

    for name in calls:
        module = getattr(trainer.model, name)
        module.register_forward_pre_hook(lambda m, a, k, name=name: hook(m, a, k, name), with_kwargs=True)
    start = trained_weights(trainer)
    trainer.train()
    assert not wrong and all(calls.values())
    for batch in (batch for part in trainer.generations[0]["slices"] for batch in part):
        assert len({trainer.video_model.expert(item.noise_level) for item in batch}) == 1
    items = [item for part in trainer.generations[0]["slices"] for batch in part for item in batch]
    useful = [i for i in trainer.generations[0]["items"] if (i.advantages != 0).any() and (i.weight > 0).any()]
    assert {id(item) for item in useful} <= {id(item) for item in items}  # cutting by expert loses none
    after = trained_weights(trainer)
    for expert in (HIGH, LOW):
        assert digest(of(after, expert)) != digest(of(start, expert))
        assert math.isfinite(history(trainer, f"{expert}/ratio/mean")[0])
        assert math.isfinite(history(trainer, f"{expert}/kl")[0])
    assert history(trainer, "ratio/mean")[0] == pytest.approx(1, abs=1e-6)


def test_reference_and_resume_of_both(tmp_path):
    config = dict(recipe="diffusion-nft", beta=0.01, ema_decay=0.9, save_strategy="steps", save_steps=1, **RL)

    def train(name, **kwargs):
        trainer = make_grpo_trainer(tmp_path / name, pipe=wan22()[0], **config)
        trainer.train(**kwargs)
        return digest(trained_weights(trainer)), digest(trainer.role_weights())

    whole = train("whole")
    assert train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1")) == whole


def euler(pipe):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


@settings(max_examples=5, deadline=None)
@given(first=st.sampled_from([2.0, 5.0]), second=st.sampled_from([1.0, 3.0, 4.0]))
def test_each_expert_has_its_guidance_as_in_the_pipeline(first, second):
    pipe = euler(wan22()[0])
    model = VideoModel(pipe)
    noise = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    condition = model.condition("a red circle", 16, 16, 9, max_sequence_length=16)
    negative = model.condition("", 16, 16, 9, negative=True, max_sequence_length=16)
    scales = dict(guidance_scale=first, guidance_scale_2=second)
    stock = pipe("a red circle", latents=noise, **{**CALL, **scales}).frames

    def ours(scale):
        return sample(model, condition, negative, guidance_scale=scale, num_inference_steps=6, latents=noise)

    torch.testing.assert_close(ours({HIGH: first, LOW: second}), stock, rtol=0, atol=1e-5)
    if first != second:
        assert (ours(first) - stock).abs().max() > 1e-4  # negative control


def test_rollouts_and_evaluation_use_both_scales(tmp_path):
    scales = dict(guidance_scale=3.0, guidance_scale_2=1.0)
    trainer = make_grpo_trainer(
        tmp_path, pipe=euler(wan22()[0]), recipe="flow-grpo", eval_num_inference_steps=2,
        trainer={"eval_dataset": dataset(1)}, **{**RL, **scales, "max_steps": 1},
    )  # fmt: skip
    seen = []
    pipe = trainer.video_model.pipe
    handle = pipe.transformer_2.register_forward_pre_hook(
        lambda *_: seen.append((pipe._guidance_scale, pipe._guidance_scale_2))
    )
    trainer.evaluate()
    assert set(seen) == {(3.0, 1.0)}
    handle.remove()
    negative = trainer.negative_condition.samples[0]["encoder_hidden_states"]
    guided = {HIGH: [], LOW: []}

    def hook(module, args, kwargs, name):
        if torch.is_grad_enabled():
            guided[name] += [torch.equal(row, negative[0]) for row in kwargs["encoder_hidden_states"]]

    for name in guided:
        module = getattr(trainer.model, name)
        module.register_forward_pre_hook(lambda m, a, k, name=name: hook(m, a, k, name), with_kwargs=True)
    trainer.train()
    assert guided[LOW] and not any(guided[LOW])  # a scale of 1 needs no second branch
    assert sum(guided[HIGH]) * 2 == len(guided[HIGH]) > 0
    high = sum(s >= trainer.video_model.boundary for s in trainer.grid[:-1].tolist())
    assert 0 < high < 6 and trainer.guidance_scale == {HIGH: 3.0, LOW: 1.0}
    trainer.create_model_card()
    assert "guidance_scale_2=1.0" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(guidance_scale=1.0, guidance_scale_2=3.0), "guidance_scale=1 turns guidance off in the pipeline"),
        (dict(reuse_rollout=True, recipe="flow-grpo"), "keeps graphs across calls of both experts"),
        (dict(reuse_rollout=True, recipe="flow-grpo", experts="high"), "offload_experts=False"),
        (dict(experts="first"), "experts must be 'both', 'high' or 'low'"),
    ],
)
def test_what_does_not_work_says_what_does(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        make_grpo_trainer(tmp_path, pipe=wan22()[0], **config)


@pytest.mark.parametrize("config", [dict(experts="both"), dict(guidance_scale_2=3.0)])
def test_one_denoiser_has_no_experts(clips, cache_dir, tmp_path, config):
    with pytest.raises(ValueError, match="needs a model with two denoisers; WanPipeline has one"):
        make_trainer(tmp_path, clips, cache_dir, pipe=wan()[0], **config)
