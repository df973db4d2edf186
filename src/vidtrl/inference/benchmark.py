"""How long a pipeline takes, where, with how much memory, and what an optimisation does to its latents."""

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn


@dataclass
class Measurement:
    """
    One configuration of a pipeline.

    Args:
        name (`str`): What was measured.
        num_inference_steps (`int`): Steps.
        evaluations (`int`): Calls of the denoiser for one video: the steps, twice that under guidance; a causal
            student makes the steps for each block, and one more to remember it.
        denoise_seconds (`float`): From the first of these calls to the clean latents; median over the repeats.
        total_seconds (`float`): The whole pipeline call: prompt to frames; median over the repeats.
        peak_memory (`int`): Bytes on a CUDA or XPU device; elsewhere of the process.
        warmup_seconds (`float`): The first call, with compilation and all.
        psnr (`float`, *optional*): Of the latents against the unoptimised run with the same seed, in dB over the range
            of its latents; infinite if they are the same.
        cosine (`float`, *optional*): Cosine similarity of the two.
    """

    name: str
    num_inference_steps: int
    evaluations: int
    denoise_seconds: float
    total_seconds: float
    peak_memory: int
    warmup_seconds: float
    psnr: float | None = None
    cosine: float | None = None


def measure(
    name: str,
    sample: Callable[[str], Any],
    denoisers: Iterable[nn.Module],
    device: torch.device | str,
    num_inference_steps: int,
    *,
    warmup: int = 1,
    repeats: int = 3,
    reference: Tensor | None = None,
) -> tuple[Measurement, Tensor]:
    """
    Time a sampler. Everything that is queued on the device is waited for before a clock is read.

    Denoising is timed in runs of its own, which stop at the latents, so that no clock is read within the runs that
    time the whole.

    Args:
        name (`str`): For the result.
        sample (`Callable`): Makes one video from a fixed seed; gets the output type, `"pt"` or `"latent"`.
        denoisers (`Iterable[nn.Module]`): The modules whose calls are counted.
        device (`torch.device` or `str`): Where they compute.
        num_inference_steps (`int`): For the result.
        warmup (`int`, *optional*, defaults to 1): Runs before the clock; at least one.
        repeats (`int`, *optional*, defaults to 3): Timed runs.
        reference (`Tensor`, *optional*): Latents to compare with.

    Returns:
        `tuple[Measurement, Tensor]`: The result, and the latents of the last run, float32 on the CPU.
    """
    device = torch.device(device)
    calls, started = 0, 0.0

    def before_call(*_):
        nonlocal started
        if not calls:
            _synchronize(device)
            started = time.perf_counter()

    def after_call(*_):  # a call that only prepares a condition never ends
        nonlocal calls
        calls += 1

    def run(output_type: str) -> tuple[float, Any]:
        _synchronize(device)
        start = time.perf_counter()
        output = sample(output_type)
        _synchronize(device)
        return time.perf_counter() - start, output

    warmup_seconds = [run("pt")[0] for _ in range(warmup)][0]
    with peak_memory(device) as peak:
        totals = [run("pt")[0] for _ in range(repeats)]
    denoise = []
    denoisers = list(denoisers)
    handles = [module.register_forward_pre_hook(before_call) for module in denoisers]
    handles += [module.register_forward_hook(after_call) for module in denoisers]
    try:
        for _ in range(repeats):
            calls = 0
            _, latents = run("latent")
            denoise.append(time.perf_counter() - started)
    finally:
        for handle in handles:
            handle.remove()
    latents = latents.float().cpu()
    psnr, cosine = (None, None) if reference is None else deviation(latents, reference)
    result = Measurement(
        name=name,
        num_inference_steps=num_inference_steps,
        evaluations=calls,
        denoise_seconds=statistics.median(denoise),
        total_seconds=statistics.median(totals),
        peak_memory=peak[0],
        warmup_seconds=warmup_seconds,
        psnr=psnr,
        cosine=cosine,
    )
    return result, latents


def deviation(latents: Tensor, reference: Tensor) -> tuple[float, float]:
    """
    PSNR over the reference's range, in dB, and cosine similarity, both in float64.

    Example:

    ```python
    >>> deviation(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    (inf, 1.0)
    ```
    """
    a, b = latents.double().flatten(), reference.double().flatten()
    error, span = (a - b).square().mean().item(), (b.max() - b.min()).item()
    psnr = math.inf if error == 0 else 10 * math.log10(span**2 / error)
    return psnr, torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device | str, children: bool = False, interval: float = 0.01) -> Iterator[list[int]]:
    """
    The peak inside the block, in bytes, as the one item of a list that is complete when the block has ended.

    Args:
        device (`torch.device` or `str`): A CUDA or XPU device counts its own allocations; anywhere else it is the resident
            memory of the process, looked at now and then.
        children (`bool`, *optional*, defaults to `False`): Add the processes that this one has started. What they share
            counts once for each.
        interval (`float`, *optional*, defaults to `0.01`): Seconds between two looks at the process.
    """
    device, peak = torch.device(device), [0]
    if device.type in ("cuda", "xpu"):
        memory = torch.get_device_module(device)
        memory.reset_peak_memory_stats(device)
        yield peak
        peak[0] = memory.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()

    def resident() -> int:
        total = process.memory_info().rss
        for child in process.children(recursive=True) if children else ():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                total += child.memory_info().rss
        return total

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], resident())

    peak[0] = resident()  # however short the block is
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], resident())
