"""Few-step sampling in stock pipelines, and every form a student is exported to, reloaded in a fresh process."""

import functools
import json
import os
import subprocess
import sys

import diffusers
import pytest
import tiny_pipelines
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file

from vidtrl import toy
from vidtrl.cli.main import main
from vidtrl.diffusion.distribution_matching import few_step_sigmas
from vidtrl.inference import (
    FewStepFlowScheduler,
    StudentConfig,
    export_student,
    load_student,
    read_distill_config,
    write_distill_config,
)
from vidtrl.inference.optimization import fuse_adapters
from vidtrl.models import VideoModel
from vidtrl.models.causal import CausalAttention
from vidtrl.rollout import sample
from vidtrl.rollout.causal import causal_rollout
from vidtrl.rollout.few_step import few_step_rollout
from vidtrl.trainer.lora import add_lora, save_adapter


STEPS = [1000, 750, 500, 250]
RENOISE = dict(denoising_steps=STEPS, shift=5.0)
TOY = dict(height=64, width=64, num_frames=17, max_sequence_length=16, guidance_scale=1.0)
TINY = dict(tiny_pipelines.WAN_LIKE, guidance_scale=1.0)
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def run(pipe, prompt="a red circle moving right", seeds=(0,), **call):
    call = {"num_inference_steps": 4, **call, "output_type": "latent"}
    return pipe(prompt, generator=seeded(*seeds), **call).frames


@pytest.fixture(scope="module")
def toy_pipe():
    pipe = diffusers.WanPipeline.from_pretrained(toy.pipeline_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tiny():
    pipe, _ = tiny_pipelines.wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- The scheduler ----


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True).map(lambda s: sorted(s, reverse=True)),
    st.floats(0.2, 12),
    st.sampled_from(["renoise", "ode"]),
)
def test_visits_exactly_the_trained_noise_levels(steps, shift, sampler):
    scheduler = FewStepFlowScheduler(denoising_steps=steps, shift=shift, sampler=sampler)
    expected = few_step_sigmas(steps, shift)
    uniform = [1 - i / len(steps) for i in range(len(steps))]
    for call in ({"num_inference_steps": len(steps)}, {"sigmas": uniform, "mu": 0.7}):  # as Wan and LTX call it
        scheduler.set_timesteps(**call, device="cpu")
        assert torch.equal(scheduler.sigmas, torch.cat([expected, torch.zeros(1)]))
        assert torch.equal(scheduler.timesteps, expected * 1000)


def test_stock_schedulers_visit_other_timesteps_or_do_not_renoise():
    """Why the scheduler exists; the day this fails, diffusers can do without it."""
    ours = FewStepFlowScheduler()
    assert ours.timesteps.tolist() == pytest.approx([1000, 937.5, 833.333, 625], abs=1e-3)
    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"):
        stock = getattr(diffusers, name)(shift=5.0)
        stock.set_timesteps(4)
        assert (stock.timesteps - ours.timesteps).abs().max() > 100


def few_step_loop(model, condition, noise, sampler, generator, sigmas):
    """The sampler as the papers write it, over the model's own velocity."""
    x = noise
    for sigma, sigma_next in zip(sigmas, [*sigmas[1:], torch.zeros(())], strict=True):
        v = model.velocity(x, float(sigma), condition)
        x0 = x - sigma * v
        if sigma_next == 0:
            return x0
        e = torch.randn(x.shape, generator=generator) if sampler == "renoise" else x + (1 - sigma) * v
        x = (1 - sigma_next) * x0 + sigma_next * e


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_the_pipeline_follows_the_papers_loop(toy_pipe, sampler):
    toy_pipe.scheduler = FewStepFlowScheduler(denoising_steps=STEPS, shift=5.0, sampler=sampler)
    model = VideoModel(toy_pipe)
    size = dict(height=64, width=64, num_frames=17, max_sequence_length=16)
    condition = model.condition(["a red circle moving right", "a blue square moving up"], **size)
    noise = torch.randn(2, *condition.latent_shape, generator=seeded(3))
    expected = few_step_loop(model, condition, noise, sampler, seeded(7), few_step_sigmas(STEPS, 5.0))

    class Seeded(FewStepFlowScheduler):  # WanPipeline hands no generator to its scheduler
        step = functools.partialmethod(FewStepFlowScheduler.step, generator=seeded(7))

    toy_pipe.scheduler = Seeded(denoising_steps=STEPS, shift=5.0, sampler=sampler)
    prompts = ["a red circle moving right", "a blue square moving up"]
    got = run(toy_pipe, prompts, latents=noise, **TOY)
    assert torch.allclose(got, expected, atol=2e-5), (got - expected).abs().max()
    fresh = seeded(7)
    draw = lambda step: torch.randn(noise.shape, generator=fresh)  # noqa: E731
    trained = few_step_rollout(model, condition, noise, few_step_sigmas(STEPS, 5.0), draw=draw, sampler=sampler)
    assert torch.allclose(got, trained, atol=2e-5)
    other = few_step_loop(model, condition, noise, sampler, seeded(8), few_step_sigmas(STEPS, 3.0))
    assert (got - other).abs().max() > 0.1


def test_equal_seeds_give_equal_videos_in_any_batch(toy_pipe):
    toy_pipe.scheduler = FewStepFlowScheduler()
    state = torch.get_rng_state()
    prompts = ["a red circle moving right", "a blue square moving up"]
    both = run(toy_pipe, prompts, seeds=(1, 2), **TOY)
    assert torch.allclose(both, run(toy_pipe, prompts, seeds=(1, 2), **TOY), atol=1e-5)
    alone = run(toy_pipe, prompts[1], seeds=(2,), **TOY)
    assert torch.allclose(both[1:], alone, atol=1e-4)
    assert (alone - run(toy_pipe, prompts[1], seeds=(3,), **TOY)).abs().max() > 0.1
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not touched


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True), st.integers(0, 3), st.booleans())
def test_a_clips_fresh_noise_is_its_own(seeds, row, hand_over_generators):
    row %= len(seeds)
    velocity = torch.randn(4, 3, 2, generator=seeded(0))

    def sample_clips(chosen):
        scheduler, generators = FewStepFlowScheduler(), [torch.Generator().manual_seed(s) for s in chosen]
        x = torch.stack([torch.randn(3, 2, generator=g) for g in generators])
        scheduler.set_timesteps(4)
        xs = []
        for t in scheduler.timesteps:
            extra = {"generator": generators} if hand_over_generators else {}
            x = scheduler.step(velocity[:1].expand_as(x), t, x, **extra).prev_sample
            xs.append(x)
        return torch.stack(xs, 1)

    together = sample_clips(seeds)
    assert torch.equal(together[row : row + 1], sample_clips([seeds[row]]))
    for other in range(len(seeds)):
        assert other == row or not torch.equal(together[row], together[other])


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_latents_keep_their_precision_whatever_the_model_computes_in(sampler):
    x, v = torch.randn(1, 8, generator=seeded(0)), torch.randn(1, 8, generator=seeded(1)).bfloat16()
    steps = [FewStepFlowScheduler(sampler=sampler).step(u, 1000.0, x).prev_sample for u in (v, v.float())]
    assert steps[0].dtype == torch.float32 and torch.equal(*steps)
    half = FewStepFlowScheduler(sampler=sampler).step(v, 1000.0, x.bfloat16()).prev_sample
    assert half.dtype == torch.bfloat16


def test_fresh_noise_is_standard_normal_and_new_at_every_step():
    scheduler = FewStepFlowScheduler(denoising_steps=[1000, 900, 800], shift=1.0)
    scheduler.set_timesteps(3)
    x = torch.randn(1, 100_000, generator=seeded(0))
    noises = []
    for t, sigma_next in zip(scheduler.timesteps[:2], (0.9, 0.8), strict=True):
        velocity = x / (float(t) / 1000)  # x0^ = 0, so that the next sample is sigma' e_new
        noises.append(scheduler.step(velocity, t, x).prev_sample / sigma_next)
    for e in noises:
        assert abs(e.mean()) < 0.02 and abs(e.std() - 1) < 0.02
    correlation = torch.corrcoef(torch.cat([x, *noises]))
    assert (correlation - torch.eye(3)).abs().max() < 0.02


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["wan22", "wan22_ti2v", "skyreels", "ltx", "hunyuan", "hunyuan15", "sana", "easyanimate"]
)
def test_other_flow_pipelines_take_it(name):
    pipe, call = tiny_pipelines.ALL[name]()
    call = dict(call)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FewStepFlowScheduler(denoising_steps=[1000, 600, 200], shift=3.0, sampler="ode")
    model = VideoModel(pipe)
    condition = model.condition("a cat", **call)
    noise = torch.randn(1, *condition.latent_shape, generator=seeded(0))
    expected = sample(model, condition, num_inference_steps=3, latents=noise)
    height, width, frames = call.pop("height"), call.pop("width"), call.pop("num_frames")
    sizes = model.call_arguments(height, width, frames, pipeline_kwargs=call)
    with model.guidance(1.0) as off:
        got = pipe(
            "a cat", num_inference_steps=3, latents=model.pack(noise), output_type="latent", **sizes, **off
        ).frames
    assert torch.allclose(model.unpack(got, condition.latent_shape).float(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="num_inference_steps=3"), model.guidance(1.0) as off:
        pipe("a cat", num_inference_steps=4, output_type="latent", **sizes, **off)


def test_whole_timesteps_for_students_trained_with_them(tiny):
    tiny.scheduler = FewStepFlowScheduler(integer_timesteps=True)
    assert tiny.scheduler.timesteps.tolist() == [1000, 937, 833, 625]
    assert tiny.scheduler.sigmas.tolist() == FewStepFlowScheduler().sigmas.tolist()
    assert VideoModel(tiny).timestep(torch.tensor(0.9375)) == 937
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    tiny.scheduler = unipc
    assert VideoModel(tiny).timestep(torch.tensor(0.9375)) == 937  # what a trainer over Wan's own scheduler feeds it


def test_scheduler_comes_back_from_disk(tmp_path):
    made = dict(denoising_steps=[1000, 500], shift=3.0, sampler="ode", integer_timesteps=True)
    FewStepFlowScheduler(**made).save_pretrained(tmp_path)
    loaded = FewStepFlowScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in made} == made
    assert loaded.timesteps.tolist() == [1000, 750]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"denoising_steps": []}, "descending"),
        ({"denoising_steps": [250, 500]}, "descending"),
        ({"denoising_steps": [1000, 1000]}, "descending"),
        ({"denoising_steps": [1001]}, "1000"),
        ({"denoising_steps": [1000, 0]}, "descending"),
        ({"shift": 0}, "shift"),
        ({"sampler": "euler"}, "'renoise' or 'ode'"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FewStepFlowScheduler(**fields)


def test_other_grids_are_refused():
    scheduler = FewStepFlowScheduler()
    with pytest.raises(ValueError, match="num_inference_steps=4"):
        scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match="leave out sigmas"):
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match="leave out sigmas"):
        scheduler.set_timesteps(timesteps=[1000, 900, 500, 100])
    with pytest.raises(ValueError, match="not one of"):
        scheduler.step(torch.zeros(1, 2), 700.0, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="2 generators for 1 clips"):
        scheduler.step(torch.zeros(1, 2), 1000.0, torch.zeros(1, 2), generator=seeded(0, 1))


# ---- distill_config.json ----

CONFIG = dict(base_model="me/base", denoising_steps=STEPS, shift=5.0)


def test_distill_config_comes_back(tmp_path):
    causal = CONFIG | dict(
        sampler="ode", frames_per_block=3, window=9, sink=3, context_noise=0.1, base_adapters=["../sft"]
    )
    for fields in (CONFIG, causal):
        written = write_distill_config(tmp_path / "student", **fields)
        assert read_distill_config(tmp_path / "student") == written == StudentConfig(**fields)
    assert written.causal and json.loads((tmp_path / "student/distill_config.json").read_text())["window"] == 9


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"denoising_steps": [250, 1000]}, "descending"),
        ({"denoising_steps": "1000"}, "list"),
        ({"denoising_steps": [1000, "750"]}, "numbers"),
        ({"shift": -1}, "positive"),
        ({"shift": True}, "number"),
        ({"sampler": "lcm"}, "'renoise' or 'ode'"),
        ({"guidance_scale": 5.0}, "must be 1.0"),
        ({"frames_per_block": 0}, "at least 1"),
        ({"frames_per_block": 1.5}, "latent frames"),
        ({"window": 6}, "set frames_per_block"),
        ({"frames_per_block": 3, "window": 5, "sink": 3}, "at least sink . frames_per_block = 6"),
        ({"frames_per_block": 3, "context_noise": 1.0}, r"\[0, 1\)"),
        ({"base_adapters": "sft"}, "list of paths"),
        ({"denoising_step": [1000]}, "did you mean 'denoising_steps'"),
        ({"base_model": ...}, "base_model must be given"),
    ],
)
def test_mistakes_in_distill_config_are_named(tmp_path, fields, message):
    fields = {name: value for name, value in (CONFIG | fields).items() if value is not ...}
    with pytest.raises((ValueError, TypeError), match=message):
        write_distill_config(tmp_path, **fields)
    assert not list(tmp_path.iterdir())
    (tmp_path / "distill_config.json").write_text(json.dumps(fields))
    with pytest.raises((ValueError, TypeError), match=f"distill_config.json.*{message}"):
        read_distill_config(tmp_path)


def test_missing_or_broken_distill_config(tmp_path):
    with pytest.raises(ValueError, match="no distill_config.json"):
        read_distill_config(tmp_path)
    (tmp_path / "distill_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_distill_config(tmp_path)


# ---- Export ----


def write_adapter(folder, seed, build=tiny_pipelines.wan):
    """A random adapter with lora_alpha != r, as the trainers write it."""
    denoiser = build()[0].transformer
    model = add_lora(denoiser, LoraConfig(r=4, lora_alpha=8))
    generator = seeded(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipelines.wan()[0].save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def students(tmp_path_factory, base):
    """Trained directories by name: what a trainer leaves."""
    root = tmp_path_factory.mktemp("students")
    write_adapter(root / "sft", 1)
    common = dict(base_model=base, base_adapters=["../sft"])
    write_distill_config(root / "renoise", **common, denoising_steps=STEPS, shift=5.0)
    write_distill_config(root / "ode", **common, denoising_steps=STEPS, shift=5.0, sampler="ode")
    write_distill_config(
        root / "causal", **common, denoising_steps=STEPS, shift=1.0, sampler="ode", frames_per_block=2
    )
    for name in ("renoise", "ode", "causal"):
        write_adapter(root / name, 2)
    # the same causal student with all weights of its own, and one on SkyReels-V2
    write_distill_config(
        root / "whole", base_model=base, denoising_steps=STEPS, shift=1.0, sampler="ode", frames_per_block=2
    )
    pipe = load_student(root / "causal")
    fuse_adapters(pipe)
    pipe.transformer.save_pretrained(root / "whole" / "transformer")
    tiny_pipelines.skyreels()[0].save_pretrained(root / "skyreels_base")
    skyreels = dict(
        common, base_model=str(root / "skyreels_base"), base_adapters=[], sampler="ode", frames_per_block=2
    )
    write_distill_config(root / "skyreels", **skyreels, denoising_steps=STEPS, shift=1.0)
    write_adapter(root / "skyreels", 2, tiny_pipelines.skyreels)
    return root


RELOAD = """
import sys, torch
from diffusers import FlowMapEulerDiscreteScheduler, SkyReelsV2DiffusionForcingPipeline, WanPipeline
from safetensors.torch import save_file

base, root, out = sys.argv[1:]
call = dict(height=16, width=16, max_sequence_length=16, guidance_scale=1.0, num_inference_steps=4, output_type="latent")
latents = {}

def sample(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("a red circle moving right", generator=seed, **(call | kwargs)).frames.contiguous()

def stock(name):
    pipe = WanPipeline.from_pretrained(base)
    pipe.load_lora_weights(f"{root}/{name}/base_adapters/0", adapter_name="sft")
    pipe.load_lora_weights(f"{root}/{name}", adapter_name="student")
    pipe.set_adapters(["sft", "student"])
    return pipe

pipe = stock("ode")
pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(f"{root}/ode", subfolder="scheduler")
latents["ode"] = sample(pipe, num_frames=9)

sys.path.insert(0, f"{root}/renoise/scheduler")
from few_step_flow_scheduler import FewStepFlowScheduler
pipe = stock("renoise")
pipe.scheduler = FewStepFlowScheduler.from_pretrained(f"{root}/renoise", subfolder="scheduler")
latents["renoise"] = sample(pipe, num_frames=9)

pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(f"{root}/causal", trust_remote_code=True)
latents["causal"] = sample(pipe, num_frames=13, ar_step=4)
for name in ("whole", "skyreels"):
    other = SkyReelsV2DiffusionForcingPipeline.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    latents[name] = sample(other, num_frames=13, ar_step=4)
latents["causal_one_block"] = sample(pipe, num_frames=5, ar_step=4)
assert pipe.transformer.config.num_frame_per_block == 2
assert "vidtrl" not in sys.modules

import vidtrl
assert type(vidtrl.FewStepFlowScheduler).__name__ == "type"
latents["load_student"] = sample(vidtrl.load_student(f"{root}/renoise"), num_frames=9)
save_file(latents, out)
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, students, base):
    """Latents of every exported form, sampled by a process that has plain diffusers."""
    root, out = tmp_path_factory.mktemp("exports"), tmp_path_factory.mktemp("latents") / "latents.safetensors"
    assert main(["export", str(students / "renoise"), str(root / "renoise"), "--format", "lora"]) == 0
    export_student(students / "ode", root / "ode", format="lora")
    export_student(students / "causal", root / "causal", format="skyreels-v2")
    export_student(students / "skyreels", root / "skyreels", format="skyreels-v2")
    argv = ["export", str(students / "whole"), str(root / "whole"), "--format", "skyreels-v2", "--dtype", "float32"]
    assert main(argv) == 0
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, base, str(root), str(out)], capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, load_file(out)


@pytest.mark.parametrize("name", ["renoise", "ode"])
def test_bidirectional_export_samples_alike_in_plain_diffusers(students, reloaded, name):
    root, latents = reloaded
    here = run(load_student(students / name), **TINY)
    assert torch.allclose(latents[name], here, atol=1e-5)
    stock = (root / name / "scheduler/scheduler_config.json").read_text()
    assert ("FlowMapEulerDiscreteScheduler" in stock) == (name == "ode")
    without_sft = load_student(students / name)
    without_sft.set_adapters(["student"])
    assert (run(without_sft, **TINY) - here).abs().max() > 1e-2


def test_an_exported_directory_is_a_student_again(reloaded, students):
    _, latents = reloaded
    assert torch.allclose(latents["load_student"], latents["renoise"], atol=1e-5)


def cached_rollout(student, **options):
    model = VideoModel(load_student(student))
    causal = CausalAttention(model)
    condition = model.condition("a red circle moving right", **(tiny_pipelines.WAN_LIKE | {"num_frames": 13}))
    sigmas, seed = few_step_sigmas(STEPS, 1.0).tolist(), seeded(0)
    noise = torch.randn(1, *condition.latent_shape, generator=seed)
    blocks = list(causal_rollout(model, causal, condition, noise, sigmas, frames_per_block=2, **options))
    return torch.cat(blocks, 2), model


def test_causal_export_samples_as_the_cached_rollout(students, reloaded):
    _, latents = reloaded
    here, model = cached_rollout(students / "causal", sampler="ode")
    assert torch.allclose(latents["causal"], here, atol=1e-5)
    forgetful, _ = cached_rollout(students / "causal", sampler="ode", window=2)
    assert (latents["causal"] - forgetful).abs().max() > 1e-3
    first = run(model.pipe, **(TINY | {"num_frames": 5}))  # one block is the bidirectional network on that block
    assert torch.allclose(latents["causal_one_block"], first, atol=1e-5)


def test_causal_exports_of_whole_weights_and_of_skyreels(students, reloaded, tmp_path):
    _, latents = reloaded
    assert torch.allclose(latents["whole"], latents["causal"], atol=1e-5)  # the same student, fused
    assert (latents["skyreels"] - latents["causal"]).abs().max() > 1e-2
    assert torch.allclose(latents["skyreels"], cached_rollout(students / "skyreels", sampler="ode")[0], atol=1e-5)
    with pytest.raises(ValueError, match="stock diffusers loads already"):
        write_distill_config(tmp_path, base_model="me/base", **RENOISE)
        (tmp_path / "transformer").mkdir()
        export_student(tmp_path, base_model=tiny_pipelines.wan()[0])


def test_a_pipeline_with_source_beside_it_is_loaded_only_on_request(reloaded):
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.SkyReelsV2DiffusionForcingPipeline.from_pretrained(reloaded[0] / "causal")


def test_export_in_place_completes_the_trained_directory(students, tmp_path, base):
    write_adapter(tmp_path / "student", 2)
    write_distill_config(tmp_path / "student", base_model=base, base_adapters=[str(students / "sft")], **RENOISE)
    before = run(load_student(tmp_path / "student"), **TINY)
    for _ in range(2):  # again changes nothing
        assert export_student(tmp_path / "student") == tmp_path / "student"
        assert read_distill_config(tmp_path / "student").base_adapters == ["base_adapters/0"]
    moved = (tmp_path / "student").rename(tmp_path / "moved")
    assert torch.allclose(before, run(load_student(moved), **TINY), atol=1e-5)


def test_a_loaded_pipeline_can_be_the_base(students):
    pipe = tiny_pipelines.wan()[0]
    assert load_student(students / "renoise", base_model=pipe) is pipe
    assert pipe.get_active_adapters() == ["base_0", "student"]
    with pytest.raises(ValueError, match="loaded pipeline"):
        load_student(students / "renoise", base_model=pipe, torch_dtype=torch.float32)


@pytest.mark.parametrize("name", ["hunyuan15", "allegro", "easyanimate"])
def test_families_whose_pipeline_has_no_loader(tmp_path, name):
    pipe, call = tiny_pipelines.ALL[name]()
    write_adapter(tmp_path / "sft", 1, tiny_pipelines.ALL[name])
    write_adapter(tmp_path / "student", 2, tiny_pipelines.ALL[name])
    adapter = str(tmp_path / "sft" / "pytorch_lora_weights.safetensors")  # a file keeps its scale too
    write_distill_config(tmp_path / "student", base_model="me/base", base_adapters=[adapter], **RENOISE)
    pipe = load_student(tmp_path / "student", base_model=pipe)
    assert getattr(pipe, "guider", None) is None or pipe.guider.guidance_scale == 1.0
    layer = next(m for m in pipe.transformer.modules() if getattr(m, "scaling", None))
    assert layer.scaling == {"base_0": 2.0, "student": 2.0} and layer.active_adapters == ["base_0", "student"]
    if name == "hunyuan15":
        student = run(pipe, **call)
        pipe.transformer.disable_adapters()
        assert (student - run(pipe, **call)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "fields, format, message",
    [
        ({"frames_per_block": 3}, "lora", "format='skyreels-v2'.*CausalVideoPipeline"),
        ({"frames_per_block": 3, "window": 6}, "lora", "all others. Sample with vidtrl's CausalVideoPipeline"),
        ({}, "skyreels-v2", "use format='lora'"),
        ({"frames_per_block": 1}, "skyreels-v2", "blocks of two or more.*CausalVideoPipeline"),
        ({"frames_per_block": 3, "window": 6}, "skyreels-v2", "window has 6.*CausalVideoPipeline"),
        ({"frames_per_block": 3, "context_noise": 0.1}, "skyreels-v2", "context_noise=0.1.*CausalVideoPipeline"),
        ({}, "anyflow", "'lora' for.*'skyreels-v2' for"),
    ],
)
def test_formats_refuse_what_they_cannot_hold(tmp_path, base, fields, format, message):
    write_distill_config(tmp_path / "student", base_model=base, **RENOISE, **fields)
    with pytest.raises(ValueError, match=message):
        export_student(tmp_path / "student", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("wan22", {}, "two experts"),
        ("ltx", {"frames_per_block": 2}, "ltx family.*CausalVideoPipeline"),
        ("toy", {"frames_per_block": 2}, "compress 4 times in space, and it does 8 times.*CausalVideoPipeline"),
    ],
)
def test_families_that_cannot_hold_a_student(tmp_path, name, fields, message):
    build = tiny_pipelines.ALL.get(name, lambda: [diffusers.WanPipeline.from_pretrained(toy.pipeline_path())])
    pipe = build()[0]
    write_adapter(tmp_path / "student", 1, build)
    write_distill_config(tmp_path / "student", base_model="me/base", **RENOISE, **fields)
    with pytest.raises(ValueError, match=message):
        if fields:
            export_student(tmp_path / "student", tmp_path / "out", format="skyreels-v2", base_model=pipe)
        else:
            load_student(tmp_path / "student", base_model=pipe)


def test_what_is_missing_is_named(tmp_path, base, students):
    with pytest.raises(ValueError, match="No such directory"):
        load_student(tmp_path / "nowhere")
    write_distill_config(tmp_path, base_model=base, **RENOISE)
    for call in (load_student, export_student):
        with pytest.raises(ValueError, match="no pytorch_lora_weights.safetensors"):
            call(tmp_path)
    write_adapter(tmp_path, 1)
    write_distill_config(tmp_path, base_model=base, base_adapters=["./sft"], **RENOISE)
    with pytest.raises(ValueError, match="nothing at './sft'"):
        load_student(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        export_student(students / "causal", tmp_path, format="skyreels-v2")
