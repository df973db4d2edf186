"""The memory of each stage of `vidtrl run`, estimated before anything is trained."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from .launch import shipped_configs
from .run_plan import Pipeline, Stage
from .run_state import output_files


GB = 1e9


def estimated_memory(pipeline: Pipeline, parsed: dict[str, tuple]) -> dict[str, str]:
    """
    What each stage needs on each device, as a table, or why that is not known.

    Args:
        pipeline ([`Pipeline`]): All of it.
        parsed (`dict[str, tuple]`): For each stage what its command's parser made of its settings.

    Returns:
        `dict[str, str]`: A text for each stage.
    """
    texts: dict[str, str] = {}
    below: dict[str, int] = {}  # bytes of the adapters that later stages stack on
    for stage in pipeline.stages:
        try:
            if stage.name == "prompt":
                texts[stage.name] = _prompt_weights(stage, *parsed[stage.name][:2])
                continue
            found = _estimate(stage, parsed[stage.name])
            absent = {name: size for name, size in below.items() if not output_files(pipeline.stage(name))}
            text = found.table()
            if absent:
                size = sum(absent.values()) / GB
                text += f"\nand {size:.2f} GB for the adapters of {', '.join(absent)}, which are not there to be counted yet"
            texts[stage.name] = text
            below[stage.name] = found.parts.get("adapters", 0)
        # the plan is worth reading without it: no network, a family that is not supported, ...
        except (OSError, ValueError, ImportError, NotImplementedError) as error:
            texts[stage.name] = f"unknown: {type(error).__name__}: {' '.join(str(error).split())}"
    return texts


def _estimate(stage: Stage, parsed: tuple):
    from ..trainer.memory import estimate

    script, training, lora, quantization, launch = parsed
    known = {field.name for field in dataclasses.fields(training) if field.init}
    leave = ("output_dir", "resume_from_checkpoint", "report_to")
    # what was given, not what this machine makes of the rest: the run may be planned for another one
    given = [k for k, v in stage.settings.items() if k in known and k not in leave and v is not None]
    config = {k: stage.settings[k] if k == "bf16" else getattr(training, k) for k in given}
    if "base_adapters" in config:  # of the stages before it, those that have run
        own = stage.folder.parent
        config["base_adapters"] = [a for a in config["base_adapters"] if Path(a).parent != own or Path(a).exists()]
    bits = 4 if quantization.load_in_4bit else 8 if quantization.load_in_8bit else None
    teacher = {"teacher_model": script.teacher_model_name_or_path} if stage.name == "distill" else {}
    return estimate(
        stage.name,
        config,
        script.model_name_or_path,
        peft_config=lora.peft_config(),
        quantization_bits=bits,
        strategy=_strategy(launch.accelerate_config),
        num_processes=launch.num_processes or _devices(launch.accelerate_config),
        **teacher,
    )


def _accelerate_file(config: str) -> dict[str, Any]:
    with open(config) as file:
        return yaml.safe_load(file)


def _strategy(config: str) -> str:
    if config in shipped_configs():
        return config if config in ("fsdp2", "zero2", "zero3") else "ddp"
    content = _accelerate_file(config)
    kind = content.get("distributed_type")
    if kind == "DEEPSPEED":
        return f"zero{content.get('deepspeed_config', {}).get('zero_stage', 2)}"
    return "fsdp2" if kind == "FSDP" else "ddp"


def _devices(config: str) -> int:
    if config not in shipped_configs():
        return int(_accelerate_file(config).get("num_processes") or 1)
    import torch

    return 1 if config == "single" else max(1, torch.accelerator.device_count())


def _prompt_weights(stage: Stage, script, lora) -> str:
    """Weights alone: the estimate knows the trainers of video models."""
    import torch
    from accelerate import init_empty_weights
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..trainer.memory_trace import pipeline_skeleton

    config = AutoConfig.from_pretrained(script.model_name_or_path)
    with init_empty_weights():
        language = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    width = 2 if lora.use_peft else 16  # bfloat16 under an adapter; float32 with gradients and two moments
    text = f"weights: language model {language * width / GB:.2f} GB"
    text += "" if lora.use_peft else " with gradients and optimizer states"
    if "grpo" in script.steps:
        pipe = pipeline_skeleton(script.video_model_name_or_path, torch.bfloat16, FakeTensorMode())
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        size = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
        text += f", frozen video model {size / GB:.2f} GB"
    return f"{text}; activations come on top"
