"""`distill_config.json`: what a distilled student's weights do not say, namely how it must be sampled."""

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


CONFIG_FILE = "distill_config.json"


@dataclass(frozen=True)
class StudentConfig:
    """
    How a few-step student is sampled.

    Args:
        base_model (`str`): Hub id or path of the pipeline that the student was trained on.
        denoising_steps (`list[float]`): Timesteps before the shift, descending, in (0, 1000].
        shift (`float`): sigma = shift u / (1 + (shift - 1) u) with u = step / 1000.
        sampler (`str`, *optional*, defaults to `"renoise"`): `"renoise"` or `"ode"`, as in [`FewStepFlowScheduler`].
        integer_timesteps (`bool`, *optional*, defaults to `False`): The model was given whole timesteps in training.
        guidance_scale (`float`, *optional*, defaults to 1.0): Always 1: a student has its guidance built in.
        frames_per_block (`int`, *optional*): Latent frames that a causal student generates at a time; `None` for a
            bidirectional student, to which the following three do not apply.
        window (`int`, *optional*): How many latent frames attention spans, the block's own and the sink's included;
            `None` for all.
        sink (`int`, *optional*, defaults to 0): How many of the first latent frames every block attends to.
        context_noise (`float`, *optional*, defaults to 0.0): Noise level in [0, 1) at which a finished block enters
            the KV cache.
        base_adapters (`list[str]`, *optional*): LoRA adapters that stay active under the student, in their order: Hub
            ids, absolute paths, or paths relative to the file.

    Raises:
        `ValueError`: A value outside its range; the message says which values are valid.
        `TypeError`: A value of a wrong type.
    """

    base_model: str
    denoising_steps: list[float]
    shift: float
    sampler: str = "renoise"
    integer_timesteps: bool = False
    guidance_scale: float = 1.0
    frames_per_block: int | None = None
    window: int | None = None
    sink: int = 0
    context_noise: float = 0.0
    base_adapters: list[str] = field(default_factory=list)

    def __post_init__(self):
        _check(self.base_model, str, "base_model", "a Hub id or a path")
        _check(self.denoising_steps, (list, tuple), "denoising_steps", "a list such as [1000, 750, 500, 250]")
        for step in self.denoising_steps:
            _check(step, (int, float), "denoising_steps", "a list of numbers")
        steps = list(self.denoising_steps)
        if not steps or steps != sorted(set(steps), reverse=True) or not 0 < steps[-1] <= steps[0] <= 1000:
            raise ValueError(
                f"denoising_steps must be descending timesteps in (0, 1000], such as [1000, 750, 500, 250]; got {steps}."
            )
        _check(self.shift, (int, float), "shift", "a number")
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}; 1 leaves denoising_steps as they are.")
        if self.sampler not in ("renoise", "ode"):
            raise ValueError(f"sampler must be 'renoise' or 'ode', got {self.sampler!r}.")
        _check(self.integer_timesteps, bool, "integer_timesteps", "true or false")
        if self.guidance_scale != 1.0:
            raise ValueError(
                f"guidance_scale must be 1.0, got {self.guidance_scale}: a student has its teacher's guidance built in."
            )
        for name, low in (("frames_per_block", 1), ("window", 1), ("sink", 0)):
            value = getattr(self, name)
            if value is None and name != "sink":
                continue
            _check(value, int, name, "a number of latent frames")
            if value < low:
                raise ValueError(f"{name} counts latent frames and must be at least {low}, got {value}.")
        if self.causal and self.window is not None and self.window < self.sink + self.frames_per_block:
            raise ValueError(
                f"window={self.window} includes the sink and the present block, so it must be at least sink + "
                f"frames_per_block = {self.sink + self.frames_per_block}."
            )
        _check(self.context_noise, (int, float), "context_noise", "a noise level")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise is a noise level in [0, 1), got {self.context_noise}.")
        if self.frames_per_block is None and (self.window is not None or self.sink or self.context_noise):
            raise ValueError(
                "window, sink and context_noise belong to causal students: set frames_per_block, or leave them out."
            )
        _check(self.base_adapters, (list, tuple), "base_adapters", "a list of paths or Hub ids")
        for adapter in self.base_adapters:
            _check(adapter, str, "base_adapters", "a list of paths or Hub ids")

    @property
    def causal(self) -> bool:
        """Whether the student generates block after block."""
        return self.frames_per_block is not None


def write_distill_config(directory: str | os.PathLike, **fields: Any) -> StudentConfig:
    """
    Write `distill_config.json`.

    Args:
        directory (`str` or `PathLike`): Where the student's adapter is or will be; made if it does not exist.
        **fields: Those of [`StudentConfig`].

    Returns:
        [`StudentConfig`]: What was written.

    Raises:
        `ValueError`, `TypeError`: An unknown or missing field, or a value that is not valid; nothing is written then.

    Example:

    ```python
    >>> write_distill_config("student", base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", denoising_steps=[1000, 500], shift=5.0)
    >>> read_distill_config("student").sampler
    'renoise'
    ```
    """
    config = _from_fields(fields, "write_distill_config")
    path = Path(directory, CONFIG_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    partial.replace(path)  # a crash leaves the file that was there
    return config


def read_distill_config(directory: str | os.PathLike) -> StudentConfig:
    """
    Read what [`write_distill_config`] wrote.

    Args:
        directory (`str` or `PathLike`): The student's directory.

    Raises:
        `ValueError`, `TypeError`: The file is missing, is no JSON, or a field is not valid; the message names the
        file.
    """
    path = Path(directory, CONFIG_FILE)
    if not path.is_file():
        raise ValueError(
            f"There is no {CONFIG_FILE} in {os.fspath(directory)!r}: pass the directory of a student that "
            "VideoDistillTrainer saved, or describe one with write_distill_config(directory, ...)."
        )
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return _from_fields(fields, str(path))


def _from_fields(fields: dict[str, Any], where: str) -> StudentConfig:
    known = {f.name: f for f in dataclasses.fields(StudentConfig)}
    for name in fields.keys() - known.keys():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise ValueError(f"{where}: unknown field {name!r}; {hint}")
    needed = [n for n in ("base_model", "denoising_steps", "shift") if n not in fields]
    if needed:
        raise ValueError(f"{where}: {', '.join(needed)} must be given.")
    try:
        return StudentConfig(**fields)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error


def _check(value: Any, kind: type | tuple[type, ...], name: str, what: str) -> None:
    """JSON's true is an int to Python; only the flag may be one."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {what}, got {value!r}.")
