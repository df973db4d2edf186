"""`vidtrl env`: versions and hardware, for bug reports."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from .. import __version__
from .errors import Parser


PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "av",
)
OPTIONAL = ("bitsandbytes", "torchao", "deepspeed", "trackio", "wandb", "tensorboard", "xformers", "flash-attn")


def package_versions() -> dict[str, str]:
    """Installed version of each package that matters, without importing it; optional ones only where installed."""
    versions = {"vidtrl": __version__, "Python": platform.python_version()}
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    for name in (*PACKAGES, *OPTIONAL):
        version = installed.get(name.replace("_", "-"))
        if version or name in PACKAGES:
            versions[name] = version or "not installed"
    return versions


def hardware() -> dict[str, str]:
    """Operating system, CPU cores usable by this process, memory and accelerators."""
    import torch

    # a container's limit on cores shows in the affinity, which only Linux has
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    facts = {
        "Platform": platform.platform(),
        "CPU": f"{platform.processor() or platform.machine()}, {cores} cores, {torch.get_num_threads()} torch threads",
    }
    if sys.platform == "linux":
        facts["Memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    if not torch.accelerator.is_available():
        facts["Accelerator"] = "none"
        return facts
    kind = torch.accelerator.current_accelerator().type
    facts["Accelerator"] = f"{torch.accelerator.device_count()} x {kind}"
    if kind == "cuda":
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            facts[f"GPU {i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}"
        facts["CUDA / ROCm"] = torch.version.cuda or torch.version.hip or "unknown"
    return facts


def run(argv: Sequence[str]) -> int:
    """Print one `name: value` a line. No path, user name or token is among them."""
    Parser(prog="vidtrl env", description=__doc__.split(": ", 1)[1]).parse_args(argv)
    for name, value in (package_versions() | hardware()).items():
        print(f"{name}: {value}")
    return 0
