"""What makes the toy's VAE (`AutoencoderKLWan`) decode faster on a CPU, and what that does to the pixels.

    OMP_NUM_THREADS=1 python benchmarks/vae_decoding.py               # about half a minute on an idle core
    OMP_NUM_THREADS=1 python benchmarks/vae_decoding.py --compile     # also torch.compile, minutes for the first call

Milliseconds of CPU time a clip of 17 frames of 64x64, the quickest of several calls, so that other load on the machine counts
little. PSNR is that of the pixels against float32, over their range of 2. Last, what the profiler finds one clip's time in.
"""

import argparse
import copy
import math
import time

import torch
from diffusers import WanPipeline

from vidtrl import InferenceOptimization
from vidtrl.toy import pipeline_path


ARMS = {
    "as loaded": {},
    "channels last": {"vae_channels_last": True},
    "bfloat16": {"vae_dtype": torch.bfloat16},
    "bfloat16, channels last": {"vae_dtype": torch.bfloat16, "vae_channels_last": True},
}
COMPILED = {
    "compiled": {"vae_compile": True},
    "bfloat16, compiled": {"vae_dtype": torch.bfloat16, "vae_compile": True},
}


@torch.no_grad()
def seconds(vae, latents: torch.Tensor, repeats: int) -> float:
    """CPU seconds of the quickest call."""
    vae.decode(latents)
    best = math.inf
    for _ in range(repeats):
        began = time.process_time()
        vae.decode(latents)
        best = min(best, time.process_time() - began)
    return best


@torch.no_grad()
def busiest(vae, latents: torch.Tensor) -> str:
    """The operators that one call spends most of its CPU time in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        vae.decode(latents)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return ", ".join(f"{event.key} {event.self_cpu_time_total / total:.0%}" for event in events[:3])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stock = WanPipeline.from_pretrained(pipeline_path())
    z = torch.randn(4, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = stock.vae.decode(z[:1]).sample.clamp(-1, 1)
    print(f"{'':26} {'1 a call':>9} {'2':>7} {'4':>7}  PSNR")
    for name, settings in (ARMS | (COMPILED if options.compile else {})).items():
        pipe = WanPipeline(**{**stock.components, "vae": copy.deepcopy(stock.vae)})
        InferenceOptimization(**settings).apply(pipe)
        per_clip = [seconds(pipe.vae, z[:n], options.repeats) / n * 1000 for n in (1, 2, 4)]
        with torch.no_grad():
            error = (pipe.vae.decode(z[:1]).sample.clamp(-1, 1) - reference).square().mean().item()
        psnr = f"{10 * math.log10(4 / error):.1f} dB" if error else "identical"
        print(f"{name:26} {per_clip[0]:6.1f} ms {per_clip[1]:7.1f} {per_clip[2]:7.1f}  {psnr}", flush=True)
    print(f"one clip, as loaded, is in: {busiest(stock.vae, z[:1])}")
