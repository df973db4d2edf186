"""How much memory a training run will need, counted before it starts.

The pipeline is built from its configurations without weights, and one step of the trainer runs on fake tensors: the same
modules, adapters, autocast, gradient checkpointing, roles, rollouts, losses and optimizer. What is alive is counted after
every operation (memory_trace.py), so activations are counted, not modelled. Only what several devices share is
arithmetic, as in ZeRO (https://huggingface.co/papers/1910.02054, section 5) and FSDP
(https://huggingface.co/papers/2304.11277, section 3.2).

Left out: the accelerator's context (about 0.5 GB), fragmentation, workspaces of kernels, communication buffers of NCCL and
DeepSpeed, reward models, and the frames that data workers hold in ordinary memory.
"""

import copy
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig
from torch import nn

from . import distill_base, sharding
from .base_config import VideoTrainingConfig
from .distill_config import VideoDistillConfig
from .grpo_config import VideoGRPOConfig
from .lora import repeated_blocks
from .memory_run import Phase, Run, nbytes
from .memory_steps import trace_run
from .sft_config import VideoSFTConfig


CONFIGS = {"sft": VideoSFTConfig, "grpo": VideoGRPOConfig, "distill": VideoDistillConfig}
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
PARTS = {
    "denoiser": "denoiser weights",
    "adapters": "adapter weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "ema": "moving average",
    "roles": "further roles",
    "text_encoder": "text and image encoders",
    "vae": "VAE weights",
    "activations": "activations, temporaries",
    "kv_cache": "KV cache",
    "latents": "latents, videos, conditions",
    "communication": "gathered and exchanged",
}
GB = 10**9


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes on one device, by phase of a run and by part.

    Args:
        trainer (`str`): `"sft"`, `"grpo"` or `"distill"`.
        model (`str`): Path, Hub id or class of the pipeline.
        setting (`dict`): What the figures depend on: shape, batch size, precision, checkpointing, trained parameters.
        strategy (`str`): `"ddp"`, `"fsdp2"`, `"zero2"` or `"zero3"`.
        num_processes (`int`): Devices.
        phases (`dict[str, dict[str, int]]`): For each phase the bytes of each part (keys of `PARTS`) at the moment when the
            phase needs most. `"preparation"` is the encoding of text and clips before training.
    """

    trainer: str
    model: str
    setting: dict[str, Any]
    strategy: str
    num_processes: int
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part in the phase that needs most."""
        return self.phases[self.peak_phase]

    @property
    def total(self) -> int:
        """Bytes that one device needs."""
        return sum(self.parts.values())

    def table(self) -> str:
        """Phases as columns, parts as rows, in GB (10^9 bytes; of less than one in MB)."""
        unit, name = (GB, "GB") if self.total >= GB else (10**6, "MB")
        used = [part for part in PARTS if any(phase.get(part) for phase in self.phases.values())]
        width = max(len(PARTS[part]) for part in [*used, "denoiser"]) + 2
        columns = [max(12, len(phase) + 2) for phase in self.phases]

        def row(title: str, cells: list[str]) -> str:
            return f"{title:{width}}" + "".join(f"{c:>{n}}" for c, n in zip(cells, columns, strict=True))

        lines = [row(name, list(self.phases))]
        for part in used:
            cells = [phase.get(part, 0) for phase in self.phases.values()]
            lines.append(row(PARTS[part], [f"{size / unit:.2f}" if size else "-" for size in cells]))
        lines.append(row("total", [f"{sum(phase.values()) / unit:.2f}" for phase in self.phases.values()]))
        devices = f"{self.strategy}, {self.num_processes} processes" if self.num_processes > 1 else "one device"
        head = f"{self.trainer} of {self.model}, {devices}; " + ", ".join(f"{k} {v}" for k, v in self.setting.items())
        return "\n".join(
            [head, *lines, f"largest: {self.total / unit:.2f} {name} on each device, in the phase {self.peak_phase!r}"]
        )

    def to_json(self) -> str:
        """All of it, with the totals, as JSON."""
        return json.dumps({**asdict(self), "total": self.total, "peak_phase": self.peak_phase}, indent=2)


def estimate(
    trainer: str,
    config: VideoTrainingConfig | dict[str, Any],
    model: str | os.PathLike | DiffusionPipeline,
    *,
    peft_config: PeftConfig | None = None,
    teacher_model: str | os.PathLike | DiffusionPipeline | None = None,
    quantization_bits: int | None = None,
    strategy: str = "ddp",
    num_processes: int = 1,
) -> MemoryEstimate:
    """
    What a training run will need on each device. No weight is read, downloaded or allocated.

    Args:
        trainer (`str`): `"sft"`, `"grpo"` or `"distill"`.
        config ([`VideoTrainingConfig`] or `dict`): The trainer's configuration, or its fields. In a dict, `bf16` is on
            unless it, `fp16` or `use_cpu` says otherwise: a run is planned for an accelerator, wherever the planning happens.
        model (`str`, `PathLike` or `DiffusionPipeline`): As the trainer takes it. Of a path or Hub id the configurations are
            read alone; a loaded pipeline is left as it is.
        peft_config (`LoraConfig`, *optional*): As the trainer takes it; `None` trains all weights.
        teacher_model (`str`, `PathLike` or `DiffusionPipeline`, *optional*): Of a distillation.
        quantization_bits (`int`, *optional*): 4 or 8: the Linear layers of the frozen denoiser are quantised (bitsandbytes).
        strategy (`str`, *optional*, defaults to `"ddp"`): `"ddp"`, `"fsdp2"`, `"zero2"` or `"zero3"`: what is sharded over
            the devices.
        num_processes (`int`, *optional*, defaults to `1`): Devices.

    Returns:
        [`MemoryEstimate`]

    Raises:
        `ValueError`: For arguments that do not fit, and for configurations that cannot be read.

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from vidtrl import toy
    >>> from vidtrl.trainer.memory import estimate

    >>> size = dict(height=64, width=64, num_frames=17)
    >>> found = estimate("sft", size, toy.pipeline_path(), peft_config=LoraConfig(r=8))
    >>> found.peak_phase, found.parts["optimizer"] > 2 * found.parts["adapters"]
    ('training step', True)
    ```
    """
    if trainer not in CONFIGS:
        raise ValueError(f"trainer must be one of {', '.join(CONFIGS)}, not {trainer!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, not {num_processes}")
    if quantization_bits not in (None, 4, 8):
        raise ValueError(f"quantization_bits must be 4 or 8, not {quantization_bits!r}")
    if quantization_bits and peft_config is None:
        raise ValueError("quantised weights cannot be trained: pass a peft_config")
    if teacher_model is not None and trainer != "distill":
        raise ValueError(f"teacher_model is for trainer='distill', not {trainer!r}")
    config = as_config(trainer, config, num_processes)
    run, phases = trace_run(trainer, config, model, peft_config, teacher_model, sharded=strategy != "ddp")
    if strategy != "ddp":
        _check_sharded(trainer, run, "FSDP" if strategy == "fsdp2" else "DeepSpeed")
    share = _quantised_share(run.denoiser, quantization_bits)
    for name, phase in phases.items():
        phase["denoiser"] = round(phase["denoiser"] * share)
        if num_processes > 1 and name != "preparation":  # each process loads and encodes with the whole model
            phases[name] = _sharded(phase, run, strategy, num_processes)
    setting = run.setting() | ({"quantised to": f"{quantization_bits} bit"} if quantization_bits else {})
    return MemoryEstimate(trainer, run.name, setting, strategy, num_processes, phases)


def _check_sharded(trainer: str, run: Run, kind: str) -> None:
    """Refuse what the trainer refuses of sharded weights."""
    args = run.args
    sharding.check_sharded(args, 2 if run.both_trained else 1, kind)
    if trainer == "distill":
        distill_base.check_sharded(args, run.peft_config, kind)


def planned_config(cls: type[VideoTrainingConfig], num_processes: int) -> type[VideoTrainingConfig]:
    """A configuration's class for a run of so many processes, which need not be there while it is planned."""
    return type(cls.__name__, (cls,), {"world_size": property(lambda self: num_processes), "__doc__": cls.__doc__})


def as_config(
    trainer: str, config: VideoTrainingConfig | dict[str, Any], num_processes: int = 1
) -> VideoTrainingConfig:
    """The trainer's configuration from its fields; see [`estimate`]."""
    if isinstance(config, dict):
        given = {"output_dir": "estimate", "report_to": [], **config}
        config = planned_config(CONFIGS[trainer], num_processes)(**{**given, "use_cpu": True})
        if given.get("bf16") is None and not given.get("fp16") and not given.get("use_cpu"):
            config.bf16 = True
        config.use_cpu = bool(given.get("use_cpu"))  # what it was made with only keeps it from looking for a device
    if not isinstance(config, CONFIGS[trainer]):
        raise TypeError(f"config must be a {CONFIGS[trainer].__name__} or a dict, not {type(config).__name__}")
    return config


def _quantised_share(denoiser: nn.Module, bits: int | None) -> float:
    """Bytes of the quantised denoiser over those of the present one."""
    if bits is None:
        return 1.0
    layers = [m.weight for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n]
    before = sum(p.nbytes for n, p in denoiser.named_parameters() if ".lora_" not in n)
    # bitsandbytes: NF4 has a float32 scale for each 64 weights, LLM.int8 one for each row
    after = sum(w.numel() / 2 + w.numel() / 16 if bits == 4 else w.numel() + 4 * len(w) for w in layers)
    return 1 - (sum(w.nbytes for w in layers) - after) / before


def _sharded(phase: Phase, run: Run, strategy: str, number: int) -> Phase:
    """
    What each of `number` devices has of a phase.

    DDP: everything, and the buckets in which gradients are exchanged. FSDP2 and ZeRO-3: an N-th of weights, gradients and
    optimizer states; two blocks at a time are gathered (the one at work and the one fetched ahead), with FSDP2 also what lies
    outside the blocks, and a block's gradient is whole until it is scattered. ZeRO-2: an N-th of gradients and states.
    FSDP gathers weights in their own dtype. DeepSpeed computes in weights of the autocast's dtype and keeps float32 ones
    beside the optimizer states; in distillation it gets whole gradients, that DDP's way exchanges.
    """
    phase, args = dict(phase), run.args
    width = 2 if args.bf16 or args.fp16 else 4
    parameters = list(run.trained.parameters())
    trained = {id(p) for p in run.trained_parameters()}
    blocks = [list(block.parameters()) for stack in repeated_blocks(run.denoiser).values() for block in stack]
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block))

    def size(p: nn.Parameter) -> int:
        return p.nbytes if strategy == "fsdp2" else width * p.numel()

    communication = 0
    if strategy == "ddp":
        communication = sum(p.nbytes for p in parameters if id(p) in trained)
    elif strategy in ("fsdp2", "zero3"):
        communication = 2 * sum(size(p) for p in largest)
        communication += sum(size(p) for p in largest if id(p) in trained)
    if strategy == "fsdp2":
        inside = {id(p) for block in blocks for p in block}
        communication += sum(size(p) for p in parameters if id(p) not in inside)
    if strategy in ("zero2", "zero3"):
        phase["optimizer"] = phase.get("optimizer", 0) + 4 * sum(p.numel() for p in parameters if id(p) in trained)
        if width == 2:
            for part, of_adapters in (("denoiser", False), ("adapters", True)):
                own = [p for n, p in run.trained.named_parameters() if (".lora_" in n) == of_adapters]
                phase[part] = phase.get(part, 0) - sum(p.nbytes - width * p.numel() for p in own)
            phase["gradients"] = phase.get("gradients", 0) // 2
    kept = ("gradients", "optimizer") if strategy != "ddp" else ()
    if isinstance(args, VideoDistillConfig) and strategy in ("zero2", "zero3"):
        kept, communication = ("optimizer",), communication + phase.get("gradients", 0)
    # another teacher is whole on each device
    apart = {"roles": nbytes(next(iter(run.teacher.denoisers.values())).parameters())} if run.own_teacher else {}
    for part in kept if strategy in ("ddp", "zero2") else (*kept, "denoiser", "adapters", "ema", "roles"):
        fixed = apart.get(part, 0)
        phase[part] = fixed + math.ceil((phase.get(part, fixed) - fixed) / number)
    phase["communication"] = communication
    return phase


def alternatives(
    trainer: str, config: VideoTrainingConfig | dict[str, Any], model: Any, **kwargs: Any
) -> list[tuple[str, MemoryEstimate]]:
    """
    What single changes of a run would make of its memory.

    Args:
        trainer, config, model, **kwargs: As for [`estimate`].

    Returns:
        `list[tuple[str, MemoryEstimate]]`: A change in the words of the configuration, and the estimate with it; the smallest
            total first.
    """
    config = as_config(trainer, config, kwargs.get("num_processes", 1))
    batch = config.per_device_train_batch_size
    # that it was asked for, a run with more than one micro-step or with sharded weights refuses
    reusing = isinstance(config, VideoGRPOConfig) and config.reuse_rollout
    anew, and_anew = ({"reuse_rollout": False}, ", reuse_rollout=False") if reusing else ({}, "")
    checkpointing = not config.gradient_checkpointing
    changes: list[tuple[str, dict, dict]] = [
        (f"gradient_checkpointing={checkpointing}", {"gradient_checkpointing": checkpointing}, {})
    ]
    if batch > 1:
        accumulated = config.gradient_accumulation_steps * batch
        fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulated}
        text = f"per_device_train_batch_size=1, gradient_accumulation_steps={accumulated}"
        if trainer == "grpo":
            fields["steps_per_generation"] = config.steps_per_generation * batch
            text += f", steps_per_generation={fields['steps_per_generation']}"
        changes.append((text + and_anew, fields | anew, {}))
    if not getattr(config, "cache", True):
        changes.append(("cache=True", {"cache": True}, {}))
    if not (config.bf16 or config.fp16):
        changes.append(("bf16=True", {"bf16": True}, {}))
    if kwargs.get("peft_config") is None:
        changes.append(("a LoRA adapter of rank 32 (use_peft)", {}, {"peft_config": LoraConfig(r=32)}))
    elif kwargs.get("quantization_bits") is None:
        changes.append(("load_in_4bit=True", {}, {"quantization_bits": 4}))
    if kwargs.get("strategy", "ddp") in ("ddp", "zero2"):
        number = max(8, kwargs.get("num_processes", 1))
        changes.append(
            (f"FSDP2 over {number} devices{and_anew}", anew, {"strategy": "fsdp2", "num_processes": number})
        )
    found = []
    for text, fields, options in changes:
        changed = copy.copy(config)
        for name, value in fields.items():
            setattr(changed, name, value)
        try:
            found.append((text, estimate(trainer, changed, model, **{**kwargs, **options})))
        except ValueError:
            if options.get("strategy") != "fsdp2":
                raise  # else the trainer would refuse this change
    return sorted(found, key=lambda one: one[1].total)
