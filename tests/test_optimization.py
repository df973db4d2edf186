"""Settings reach diffusers, what excludes each other is refused, and the benchmark's numbers are what they say."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inference import seeded, write_adapter

from vidtrl import InferenceOptimization, toy
from vidtrl.inference import CausalVideoPipeline, FewStepFlowScheduler
from vidtrl.inference.benchmark import deviation, measure
from vidtrl.inference.export import load_adapters
from vidtrl.inference.optimization import fuse_adapters
from vidtrl.models import VideoModel


TOY = dict(height=32, width=32, num_frames=5)
CALL = dict(tiny_pipelines.WAN_LIKE, output_type="latent")


def make(name="wan"):
    pipe, _ = tiny_pipelines.ALL[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=8, **call):
    return pipe("a red circle", num_inference_steps=steps, generator=seeded(0), **(CALL | call)).frames


@pytest.mark.parametrize(
    "options, low, high",
    [
        ({"attention_backend": "_native_math"}, 0, 1e-5),
        ({"compile": True, "compile_kwargs": {"fullgraph": True, "backend": "eager"}}, 0, 1e-5),
        ({"layerwise_casting": torch.float8_e4m3fn}, 1e-3, 1),
        ({"cache": diffusers.FirstBlockCacheConfig(threshold=0.5)}, 1e-3, 10),
        ({"cache": diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)}, 1e-3, 10),
    ],
)
def test_settings_take_effect(options, low, high, attention_default):
    plain, pipe = run(make()), make()
    assert InferenceOptimization(**options).apply(pipe, num_inference_steps=8) is pipe
    changed = run(pipe)
    assert low <= (changed - plain).abs().max() <= high
    if "cache" in options:
        assert pipe.transformer.is_cache_enabled
        assert torch.allclose(run(pipe), changed, atol=1e-5)  # nothing is carried over to the next video


def test_vae_settings():
    pipe = InferenceOptimization(vae_tiling=True, vae_slicing=True).apply(make())
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    assert not make().vae.use_tiling


@pytest.mark.parametrize("name", ["toy", "ltx", "cogvideox", "mochi", "hunyuan"])
def test_decoding_in_another_dtype(name):
    """The decoder alone computes in it; latents, the encoder and what comes out are as before."""

    def decode(dtype, seed=0):
        if name == "toy":
            pipe, call = diffusers.WanPipeline.from_pretrained(toy.pipeline_path()), TOY
        else:
            pipe, call = tiny_pipelines.ALL[name]()
        InferenceOptimization(vae_dtype=dtype).apply(pipe)
        model = VideoModel(pipe)
        z = torch.randn(
            1, *model.latent_shape(call["num_frames"], call["height"], call["width"]), generator=seeded(seed)
        )
        with torch.no_grad():
            pixels = pipe.vae.decode(model.denormalize(z), return_dict=False)[0]
            moments = pipe.vae.encode(pixels.clamp(-1, 1)).latent_dist.mean
        assert pixels.dtype == moments.dtype == pipe.vae.dtype == torch.float32
        assert next(pipe.vae.decoder.parameters()).dtype == (dtype or torch.float32)
        return pixels

    plain, half, same = decode(None), decode(torch.bfloat16), decode(torch.float32)
    error, spread = (half - plain).norm(), (decode(None, 1) - plain).norm()
    assert torch.equal(same, plain) and 0 < error < 0.1 * spread


def test_a_compiled_decoder_with_channels_last_decodes_the_same():
    plain, pipe = make(), make()
    InferenceOptimization(vae_compile=True, vae_channels_last=True, compile_kwargs={"backend": "eager"}).apply(pipe)
    assert pipe.vae.decoder._compiled_call_impl is not None
    assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    videos = [run(p, 1, output_type="pt") for p in (plain, pipe)]
    torch.testing.assert_close(*videos)


@pytest.mark.parametrize("name", ["wan", "hunyuan15", "allegro"])
def test_fused_adapters_are_the_same_model_without_adapters(tmp_path, name):
    pipe = make(name)
    for i in (1, 2):
        write_adapter(tmp_path / str(i), i, tiny_pipelines.ALL[name])
    call = tiny_pipelines.ALL[name]()[1]
    base = pipe("a cat", num_inference_steps=2, generator=seeded(0), output_type="latent", **call).frames
    load_adapters(pipe, {"one": tmp_path / "1", "two": tmp_path / "2"})
    before = pipe("a cat", num_inference_steps=2, generator=seeded(0), output_type="latent", **call).frames
    InferenceOptimization(fuse_lora=True).apply(pipe)
    after = pipe("a cat", num_inference_steps=2, generator=seeded(0), output_type="latent", **call).frames
    assert torch.allclose(before, after, atol=1e-4) and (after - base).abs().max() > 1e-2
    assert not any("lora" in key for key in pipe.transformer.state_dict())
    fuse_adapters(pipe)  # without adapters nothing happens


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention_backend": "flash_5"}, "no attention backend 'flash_5'; it has .*_native_cudnn"),
        ({"offload": "disk"}, "model, sequential, group"),
        ({"quantization": object(), "layerwise_casting": torch.float8_e4m3fn}, "set one of them"),
        ({"quantization": object(), "fuse_lora": True}, "Merge first"),
        ({"offload": "group", "compile": True}, "'fullgraph': False"),
    ],
)
def test_settings_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceOptimization(**options)


@pytest.mark.parametrize(
    "options, steps, message",
    [
        ({"cache": diffusers.FirstBlockCacheConfig()}, 4, "4 steps are too far apart"),
        ({"cache": diffusers.FirstBlockCacheConfig()}, None, "needs num_inference_steps"),
        ({"quantization": object()}, None, "load_kwargs"),
        ({"attention_backend": "flash"}, None, "'flash' cannot be used.*flash-attn"),
        ({"context_parallel": object()}, None, "torchrun"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(options, steps, message):
    pipe = make()
    before = run(pipe)
    with pytest.raises(ValueError, match=message):
        InferenceOptimization(**options).apply(pipe, steps)
    assert torch.allclose(run(pipe), before, atol=1e-5) and not pipe.transformer.is_cache_enabled


def test_a_students_number_of_steps_is_known():
    pipe = make()
    pipe.scheduler = FewStepFlowScheduler()
    with pytest.raises(ValueError, match="FirstBlockCacheConfig reuses.*4 steps"):
        InferenceOptimization(cache=diffusers.FirstBlockCacheConfig()).apply(pipe)
    pipe.scheduler = FewStepFlowScheduler(denoising_steps=list(range(1000, 0, -100)))
    InferenceOptimization(cache=diffusers.FirstBlockCacheConfig()).check(pipe)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="offloading works on this machine")
@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloading_without_an_accelerator(offload):
    with pytest.raises(ValueError, match="needs an accelerator"):
        InferenceOptimization(offload=offload).apply(make())


def test_quantization_goes_to_from_pretrained():
    config = object()
    assert InferenceOptimization(quantization=config).load_kwargs == {"quantization_config": config}
    assert InferenceOptimization().load_kwargs == {}


def causal():
    return CausalVideoPipeline(make(), denoising_steps=[1000, 500], shift=5.0, frames_per_block=2)


def test_causal_pipelines_compile_each_block_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    call = dict(height=16, width=16, max_sequence_length=16, output_type="latent")
    plain = causal()("a cat", num_blocks=4, generator=seeded(0), **call)
    pipe = causal().optimize(InferenceOptimization(compile=True, compile_kwargs={"backend": backend}))
    stream = pipe.stream("a cat", generator=seeded(0), **call)
    blocks = [next(stream) for _ in range(2)]
    compiled = len(graphs)
    blocks += [next(stream) for _ in range(2)]
    assert 0 < compiled == len(graphs)  # although there are more keys to attend to
    assert torch.allclose(torch.cat(blocks, 2), plain, atol=1e-5)
    torch.compiler.reset()


HALVES = """
import sys, torch, tiny_pipelines
from diffusers import ContextParallelConfig
from vidtrl import InferenceOptimization

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
pipe, _ = tiny_pipelines.wan()
call = tiny_pipelines.WAN_LIKE | dict(height=32, width=32, num_frames=13, output_type="latent", num_inference_steps=3)
run = lambda: pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames
whole, tokens = run(), []
fast = InferenceOptimization(context_parallel=ContextParallelConfig(ulysses_degree=2))
try:
    fast.apply(pipe)
except ValueError as error:
    assert "there is none here" in str(error)
torch.accelerator.device_count = lambda: 2  # diffusers divides by it, and has no other need of an accelerator
fast.apply(pipe)
pipe.transformer.blocks[1].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
assert torch.allclose(run(), whole, atol=1e-5) and set(tokens) == {8}, tokens  # of 4 frames of 2 x 2
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_a_sequence(tmp_path):
    (tmp_path / "halves.py").write_text(HALVES)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "halves.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_does_not_go_with_a_kv_cache():
    with pytest.raises(ValueError, match="know no blocks"):
        causal().optimize(InferenceOptimization(cache=diffusers.FirstBlockCacheConfig()))
    with pytest.raises(ValueError, match="context_parallel"):
        causal().optimize(InferenceOptimization(context_parallel=object()))


# ---- Measuring ----


def test_clocks_and_counts():
    denoiser = torch.nn.Linear(2, 2)

    def sample(output_type):
        time.sleep(0.3)  # the text encoder
        for _ in range(3):
            time.sleep(0.02)
            denoiser(torch.zeros(2))
        if output_type == "pt":
            time.sleep(0.3)  # the VAE
        return torch.ones(1, 2)

    result, latents = measure("x", sample, [denoiser], "cpu", 3, repeats=1)
    assert result.evaluations == 3 and result.psnr is None
    assert 0.04 <= result.denoise_seconds < 0.3 and result.total_seconds >= 0.66
    result, _ = measure("x", sample, [denoiser], "cpu", 3, repeats=1, reference=latents * torch.tensor([1.0, 0.5]))
    assert math.isfinite(result.psnr) and result.cosine < 1


def test_peak_memory_is_that_of_the_timed_runs():
    def sample(output_type):
        return torch.ones(64 * 2**20 if output_type == "pt" else 1, dtype=torch.float32)

    small, _ = measure("x", lambda _: torch.ones(1), [torch.nn.Linear(1, 1)], "cpu", 1, repeats=1)
    large, _ = measure("x", sample, [torch.nn.Linear(1, 1)], "cpu", 1, repeats=1)
    assert large.peak_memory - small.peak_memory > 200 * 2**20


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-4, 0.5), st.integers(0, 100))
def test_psnr_and_cosine_of_known_noise(size, seed):
    generator = seeded(seed)
    reference = torch.rand(20_000, generator=generator)
    noise = torch.randn(20_000, generator=generator) * size
    psnr, cosine = deviation(reference + noise, reference)
    assert psnr == pytest.approx(-20 * math.log10(size), abs=0.2)  # of a range of 1
    assert cosine == pytest.approx((1 + 3 * size**2) ** -0.5, abs=0.01)  # E[reference^2] = 1/3
    assert deviation(reference, reference) == (math.inf, pytest.approx(1.0))
