"""From a distilled student's adapter to what stock diffusers samples with, and back into a pipeline."""

import dataclasses
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import (
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    SchedulerMixin,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
)
from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer

from ..models.families import Family, find_family
from ..models.loading import load_pipeline, looks_like_hub_id
from ..models.schedule import NoiseSchedule
from ..trainer.lora import ADAPTER_FILE, load_lora
from . import scheduler as scheduler_file
from .distill_config import CONFIG_FILE, StudentConfig, read_distill_config, write_distill_config
from .optimization import fuse_adapters
from .scheduler import FewStepFlowScheduler, FewStepVPScheduler


FORMATS = {
    "lora": "a bidirectional student: its adapter and its scheduler, for the base model's own pipeline",
    "skyreels-v2": "a causal student of Wan 2.1 or SkyReels-V2: a whole SkyReelsV2DiffusionForcingPipeline",
}
SCHEDULER_MODULE = "few_step_flow_scheduler"


def load_student(
    directory: str | os.PathLike,
    base_model: str | os.PathLike | DiffusionPipeline | None = None,
    torch_dtype: Any | None = None,
    **load_kwargs: Any,
) -> DiffusionPipeline:
    """
    The base model's own pipeline with the student's adapters and scheduler in place.

    A bidirectional student is sampled with `pipe(prompt, num_inference_steps=len(denoising_steps),
    guidance_scale=1.0)`; a causal one through [`CausalVideoPipeline`].

    Args:
        directory (`str` or `PathLike`): What the trainer saved or [`export_student`] wrote as `"lora"`: the adapter
            (or `transformer/`, where all weights were trained) and `distill_config.json`. A directory or a Hub id.
        base_model (`str`, `PathLike` or `DiffusionPipeline`, *optional*): Instead of the one that the student names; a
            loaded pipeline is changed in place.
        torch_dtype (`torch.dtype`, *optional*): To load the base model in.
        **load_kwargs: For `DiffusionPipeline.from_pretrained`.

    Returns:
        `DiffusionPipeline`: With the active adapters `"base_0"`, ... (earlier stages) and `"student"`, or the
        student's own weights.

    Raises:
        `ValueError`: Nothing to load there, or a family whose pipeline cannot visit the student's timesteps.

    Example:

    ```python
    >>> pipe = load_student("me/wan-4-steps", torch_dtype=torch.bfloat16).to("cuda")
    >>> video = pipe("a dog", num_inference_steps=4, guidance_scale=1.0).frames[0]
    ```
    """
    directory = student_directory(directory)
    config = read_distill_config(directory)
    pipe = _load_base(config, directory, base_model, torch_dtype, load_kwargs)
    _load_student_weights(pipe, config, directory)
    family = find_family(type(pipe).__name__)
    pipe.scheduler = student_scheduler(config, family, pipe.scheduler)
    if family.vae_tiling:  # its VAE decodes no other way
        pipe.vae.enable_tiling()
    if family.guidance == "guider":
        pipe.guider = ClassifierFreeGuidance(guidance_scale=1.0)
    return pipe


def export_student(
    directory: str | os.PathLike,
    output: str | os.PathLike | None = None,
    format: str = "lora",
    base_model: str | os.PathLike | DiffusionPipeline | None = None,
    torch_dtype: Any | None = None,
    **load_kwargs: Any,
) -> Path:
    """
    Write a student in a form that diffusers loads without vidtrl.

    `"lora"` holds `pytorch_lora_weights.safetensors`, those of earlier stages in `base_adapters/`, and `scheduler/`.
    The scheduler is diffusers' [`FlowMapEulerDiscreteScheduler`] where that is exact, for `sampler="ode"` on a uniform
    list such as [1000, 750, 500, 250]; otherwise [`FewStepFlowScheduler`] (of CogVideoX and Allegro
    [`FewStepVPScheduler`]), with its source beside it:

    ```python
    pipe = WanPipeline.from_pretrained(base_model)
    pipe.load_lora_weights("student")
    pipe.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained("student", subfolder="scheduler")
    # or
    sys.path.insert(0, "student/scheduler")
    from few_step_flow_scheduler import FewStepFlowScheduler
    pipe.scheduler = FewStepFlowScheduler.from_pretrained("student", subfolder="scheduler")
    ```

    `"skyreels-v2"` holds a whole pipeline with all adapters merged (or the student's own weights, where all were trained). `trust_remote_code` is for the scheduler's source:

    ```python
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained("student-df", trust_remote_code=True)
    pipe(prompt, num_inference_steps=4, ar_step=4, guidance_scale=1.0)  # ar_step: one block after the other
    ```

    With `ar_step` equal to the number of steps that is the causal rollout over all of the past, recomputed instead of
    cached. The pipeline hands the model whole timesteps (937 for 937.5), as `integer_timesteps` says the student was
    trained; where it was not, that is a deviation of less than one in a thousand.

    Args:
        directory (`str` or `PathLike`): What the trainer saved: the adapter and `distill_config.json`. A directory or
            a Hub id.
        output (`str` or `PathLike`, *optional*): Where to write; for `"lora"` the student's own directory if left out.
        format (`str`, *optional*, defaults to `"lora"`): `"lora"` or `"skyreels-v2"`.
        base_model, torch_dtype, **load_kwargs: As in [`load_student`]. `"lora"` reads only the pipeline's name;
            `"skyreels-v2"` merges and saves in `torch_dtype`.

    Returns:
        `Path`: The directory written.

    Raises:
        `ValueError`: The format cannot hold this student (the message says which one can), or `output` is not empty.
    """
    if format not in FORMATS:
        listed = "; ".join(f"{name!r} for {what}" for name, what in FORMATS.items())
        raise ValueError(f"format must be one of: {listed}. Got {format!r}.")
    directory = student_directory(directory)
    config = read_distill_config(directory)
    if format == "lora":
        index = _pipeline_index(config, directory, base_model)
        family = find_family(index["_class_name"])
        if config.causal:
            other = _why_not_skyreels(config, family)
            raise ValueError(
                "format='lora' cannot hold a causal student: the stock pipeline lets every frame attend to all others. "
                + ("Use format='skyreels-v2', or sample" if other is None else "Sample")
                + " with vidtrl's CausalVideoPipeline, which reads the student's directory as it is."
            )
        if (directory / "transformer").is_dir():
            raise ValueError(
                "format='lora' holds an adapter, and all weights of this student were trained. Its directory is what stock "
                "diffusers loads already: transformer/ with the class's from_pretrained, and scheduler/."
            )
        stock = _base_scheduler(config, directory, base_model, index) if family.prediction != "flow" else None
        scheduler = student_scheduler(config, family, stock)
        return _export_lora(directory, config, Path(output) if output is not None else directory, scheduler)
    if output is None:
        raise ValueError("format='skyreels-v2' writes a whole pipeline; say where with output.")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{os.fspath(output)!r} exists already; choose another output, or delete it.")
    family = find_family(_pipeline_index(config, directory, base_model)["_class_name"])
    if not config.causal:
        raise ValueError(
            "format='skyreels-v2' is for causal students, and this one is bidirectional: use format='lora'."
        )
    if (reason := _why_not_skyreels(config, family)) is not None:
        raise ValueError(
            f"format='skyreels-v2' cannot hold this student: {reason}. Sample with vidtrl's CausalVideoPipeline, which reads "
            "the student's directory as it is."
        )
    pipe = _load_base(config, directory, base_model, torch_dtype, load_kwargs)
    return _export_skyreels(directory, config, output, pipe)


def load_adapters(pipe: DiffusionPipeline, adapters: dict[str, str | os.PathLike]) -> None:
    """
    Load LoRA adapters, all of them active, one upon the other.

    Args:
        pipe (`DiffusionPipeline`): The pipeline; its `transformer` gets them.
        adapters (`dict`): Name -> directory, file or Hub id.
    """
    for name, source in adapters.items():
        load_lora(pipe, "transformer", os.fspath(source), name, None if os.path.isfile(source) else ADAPTER_FILE)
    for layer in pipe.transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(adapters))


def student_scheduler(
    config: StudentConfig, family: Family, scheduler: SchedulerMixin | None = None
) -> FewStepFlowScheduler:
    """
    The student's scheduler.

    Args:
        config ([`StudentConfig`]): The student.
        family (`Family`): Its row.
        scheduler (`SchedulerMixin`, *optional*): The base model's own; its table is needed for VP families.

    Raises:
        `ValueError`: The family's pipeline cannot visit these timesteps.
    """
    if family.prediction != "flow":
        assert scheduler is not None, family.name
        schedule = NoiseSchedule(scheduler, family, (1, 1))
        u = torch.tensor([float(step) for step in config.denoising_steps]) / 1000
        timesteps = schedule.timestep(schedule.training_sigma(u, shift=config.shift)).round().int().tolist()
        if len(set(timesteps)) < len(timesteps):
            raise ValueError(
                f"denoising_steps={config.denoising_steps} with shift={config.shift:g} meet in the whole timesteps {timesteps} "
                f"of the {family.name} family's table: set steps that are further apart."
            )
        return FewStepVPScheduler(
            alphas_cumprod=scheduler.alphas_cumprod.float().tolist(),
            denoising_steps=timesteps,
            prediction_type=family.prediction,
            sampler=config.sampler,
            integer_timesteps=schedule.integer_timesteps,
        )
    if family.grid == "linear_quadratic" and len(config.denoising_steps) == 1:
        raise ValueError(
            f"A one-step student of the {family.name} family does not run in its stock pipeline, which computes a grid of its "
            "own first and divides by zero for one step: set two or more denoising_steps."
        )
    return FewStepFlowScheduler(
        denoising_steps=list(config.denoising_steps),
        shift=config.shift,
        sampler=config.sampler,
        integer_timesteps=config.integer_timesteps,
        reversed_time=family.timestep == "clean",
    )


def student_directory(directory: str | os.PathLike) -> Path:
    """
    The student's directory, downloaded if it is a Hub id.

    Raises:
        `ValueError`: There is no such directory.
    """
    path = Path(directory).expanduser()
    if path.is_dir():
        return path
    if isinstance(directory, Path) or not looks_like_hub_id(str(directory)):
        raise ValueError(f"No such directory: {os.fspath(directory)!r} (and a Hub id looks like 'organisation/name').")
    patterns = [CONFIG_FILE, ADAPTER_FILE, "base_adapters/*", "transformer/*"]
    return Path(snapshot_download(str(directory), allow_patterns=patterns))


def _export_lora(directory: Path, config: StudentConfig, output: Path, scheduler: SchedulerMixin) -> Path:
    if _stock_scheduler_is_exact(config, scheduler):
        scheduler = FlowMapEulerDiscreteScheduler(shift=config.shift)
    _adapter_file(directory)
    output.mkdir(parents=True, exist_ok=True)
    bases = [_copy_base_adapter(i, base, directory, output) for i, base in enumerate(config.base_adapters)]
    if output.resolve() != directory.resolve():
        shutil.copyfile(directory / ADAPTER_FILE, output / ADAPTER_FILE)
    save_scheduler(scheduler, output / "scheduler")
    write_distill_config(output, **dataclasses.asdict(dataclasses.replace(config, base_adapters=bases)))
    return output


def _stock_scheduler_is_exact(config: StudentConfig, scheduler: SchedulerMixin) -> bool:
    number = len(config.denoising_steps)
    uniform = [1000 * (number - i) / number for i in range(number)]
    on_grid = all(abs(step - u) < 1e-6 for step, u in zip(config.denoising_steps, uniform, strict=True))
    special = isinstance(scheduler, FewStepVPScheduler) or scheduler.config.reversed_time or config.integer_timesteps
    return config.sampler == "ode" and on_grid and not special


def _copy_base_adapter(i: int, adapter: str, directory: Path, output: Path) -> str:
    """A Hub id stays one; a file is copied, so that the student is complete wherever it goes."""
    source = _resolve(adapter, directory)
    if isinstance(source, str):
        return source
    source = source if source.is_file() else _adapter_file(source)
    target = output / "base_adapters" / str(i) / ADAPTER_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
    return target.parent.relative_to(output).as_posix()


def save_scheduler(scheduler: SchedulerMixin, folder: Path) -> None:
    """Write a scheduler, with its source beside it where diffusers does not have the class."""
    scheduler.save_pretrained(folder)
    if isinstance(scheduler, FewStepFlowScheduler):
        shutil.copyfile(inspect.getfile(scheduler_file), folder / f"{SCHEDULER_MODULE}.py")


def _why_not_skyreels(config: StudentConfig, family: Family) -> str | None:
    if family.name not in ("wan", "skyreels-v2"):
        return f"its weights are of the {family.name} family, and the format is for Wan and SkyReels-V2 text-to-video"
    if config.frames_per_block == 1:
        return "SkyReelsV2Transformer3DModel masks blocks of two or more latent frames, and this one's have one"
    if config.window is not None:
        return f"the format attends to all of the past, and this student's window has {config.window} latent frames"
    if config.context_noise:
        return f"the format's past is clean, and this student's has context_noise={config.context_noise:g}"
    return None


def _export_skyreels(directory: Path, config: StudentConfig, output: Path, pipe: DiffusionPipeline) -> Path:
    _load_student_weights(pipe, config, directory)
    fuse_adapters(pipe)
    base = pipe.transformer
    known = inspect.signature(SkyReelsV2Transformer3DModel.__init__).parameters
    fields = {name: value for name, value in base.config.items() if name in known}
    with init_empty_weights(include_buffers=False):
        transformer = SkyReelsV2Transformer3DModel(**fields | {"num_frame_per_block": config.frames_per_block})
    transformer.load_state_dict(base.state_dict(), strict=True, assign=True)
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae")}
    scheduler = student_scheduler(config, find_family(type(pipe).__name__), pipe.scheduler)
    exported = SkyReelsV2DiffusionForcingPipeline(**parts, transformer=transformer, scheduler=scheduler)
    factors = [(p.vae_scale_factor_temporal, p.vae_scale_factor_spatial) for p in (exported, pipe)]
    if factors[0] != factors[1]:  # it computes them for Wan 2.1's VAE, which has no patches
        raise ValueError(
            f"format='skyreels-v2' cannot hold this student: diffusers' pipeline takes its VAE to compress "
            f"{factors[0][1]} times in space, and it does {factors[1][1]} times, so that videos would have another size. "
            "Sample with vidtrl's CausalVideoPipeline, which reads the student's directory as it is."
        )
    staging = output.with_name(f"_{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    exported.save_pretrained(staging)
    save_scheduler(scheduler, staging / "scheduler")
    index = json.loads((staging / "model_index.json").read_text())
    index["scheduler"] = [SCHEDULER_MODULE, FewStepFlowScheduler.__name__]
    (staging / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(directory / CONFIG_FILE, staging / CONFIG_FILE)
    if output.exists():
        output.rmdir()
    staging.rename(output)
    return output


def _load_base(
    config: StudentConfig,
    directory: Path,
    base_model: str | os.PathLike | DiffusionPipeline | None,
    torch_dtype: Any | None,
    load_kwargs: dict[str, Any],
) -> DiffusionPipeline:
    options = load_kwargs | ({"dtype": torch_dtype} if torch_dtype is not None else {})
    if isinstance(base_model, DiffusionPipeline):
        if options:
            raise ValueError(f"{', '.join(options)} apply when a path or Hub id is loaded, not to a loaded pipeline.")
        pipe = base_model
    else:
        pipe = load_pipeline(_resolve(base_model or config.base_model, directory), **options)
    if pipe.components.get("transformer_2") is not None:
        raise ValueError(
            f"{type(pipe).__name__} has two experts here, and a student's adapter belongs to one denoiser: load a model "
            "with one transformer, such as Wan 2.1 or Wan 2.2 5B."
        )
    return pipe


def _pipeline_index(
    config: StudentConfig, directory: Path, base_model: str | os.PathLike | DiffusionPipeline | None
) -> dict[str, Any]:
    """`model_index.json` of the base model."""
    if isinstance(base_model, DiffusionPipeline):
        return {"_class_name": type(base_model).__name__}
    source = _resolve(base_model or config.base_model, directory)
    try:
        return DiffusionPipeline.load_config(source)
    except OSError as error:
        raise ValueError(
            f"Cannot read the pipeline of base_model={os.fspath(source)!r}; pass base_model=... if it has moved."
        ) from error


def _base_scheduler(
    config: StudentConfig,
    directory: Path,
    base_model: str | os.PathLike | DiffusionPipeline | None,
    index: dict[str, Any],
) -> SchedulerMixin:
    if isinstance(base_model, DiffusionPipeline):
        return base_model.scheduler
    kind = getattr(diffusers, index["scheduler"][1])
    return kind.from_pretrained(_resolve(base_model or config.base_model, directory), subfolder="scheduler")


def _load_student_weights(pipe: DiffusionPipeline, config: StudentConfig, directory: Path) -> None:
    if (directory / "transformer").is_dir():  # all weights were trained
        kind, dtype = type(pipe.transformer), pipe.transformer.dtype
        pipe.register_modules(transformer=kind.from_pretrained(directory, subfolder="transformer", dtype=dtype))
        return
    _adapter_file(directory)
    sources = {f"base_{i}": _resolve(base, directory) for i, base in enumerate(config.base_adapters)}
    load_adapters(pipe, sources | {"student": directory})


def _adapter_file(directory: Path) -> Path:
    path = directory / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(
            f"There is no {ADAPTER_FILE} in {os.fspath(directory)!r}; a student is loaded from its adapter."
        )
    return path


def _resolve(name: str | os.PathLike, directory: Path) -> Path | str:
    """A path as given, a path relative to the student's directory, or else a Hub id."""
    for path in (Path(name).expanduser(), directory / name):
        if path.exists():
            return path
    if isinstance(name, Path) or not looks_like_hub_id(str(name)):
        raise ValueError(f"There is nothing at {os.fspath(name)!r} (and a Hub id looks like 'organisation/name').")
    return str(name)
