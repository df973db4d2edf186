"""Let the stock pipeline prepare a denoiser call, and keep what it prepared.

`capture` runs a pipeline up to its first denoiser call and returns that call's keyword arguments; `Condition` is the
part of them that does not depend on the noisy latents: text, masks, rotary embeddings, image conditions, flags.
"""

import contextlib
import inspect
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class _Captured(Exception):
    """Leaves the pipeline's `__call__` at the first denoiser call."""


class _NoBar(contextlib.AbstractContextManager):
    """Stands in for tqdm while the pipeline runs on our behalf."""

    def __init__(self, iterable=None, total=None):
        self.iterable = iterable

    def __iter__(self):
        return iter(self.iterable)

    def __exit__(self, *exc_info):
        return None

    def update(self, n=1):
        pass


@contextlib.contextmanager
def patched(target: object, **attributes: Any) -> Iterator[None]:
    """Set instance attributes for the duration of the block, then restore exactly what was there."""
    before = {name: vars(target)[name] for name in attributes if name in vars(target)}
    try:
        for name, value in attributes.items():
            object.__setattr__(target, name, value)
        yield
    finally:
        for name in attributes:
            if name in before:
                object.__setattr__(target, name, before[name])
            elif name in vars(target):
                object.__delattr__(target, name)


def quiet(pipe) -> contextlib.AbstractContextManager:
    """No progress bar from `pipe` inside the block."""
    return patched(pipe, progress_bar=_NoBar)


def bind_call(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Name the positional arguments of a forward call of `module`."""
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
    named = {**bound.arguments, **bound.kwargs}  # arguments swallowed by **kwargs are listed by their own name too
    variadic = {p.name for p in bound.signature.parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return {name: value for name, value in named.items() if name != "self" and name not in variadic}


@torch.no_grad()
def capture(pipe, denoisers: dict[str, nn.Module], skip: int = 0, **call: Any) -> dict[str, Any]:
    """Run `pipe(**call)` up to its first denoiser call, or a later one.

    Args:
        pipe: a diffusers pipeline.
        denoisers: the modules to watch, by component name.
        skip: how many calls to let pass, answered with their own input instead of by the denoiser.
        **call: arguments of the pipeline.

    Returns:
        The denoiser's keyword arguments (tensors cloned). Every hook is removed and offloaded components are put back,
        also when the pipeline raises; its exceptions pass through unchanged.
    """
    caught: dict[str, Any] = {}

    calls = itertools.count()

    def hook(module, args, kwargs):
        if next(calls) == skip:
            caught.update(map_tensors(bind_call(module, args, kwargs), lambda t: t.detach().clone()))
            raise _Captured

    # before the hook with which FSDP waits for the shards of other processes, which may have nothing to capture
    handles = [module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for module in denoisers.values()]
    try:
        with quiet(pipe), contextlib.suppress(_Captured), contextlib.ExitStack() as stack:
            for module in denoisers.values() if skip else ():
                stack.enter_context(patched(module, forward=lambda hidden_states, **_: (hidden_states,)))
            pipe(**call)
    finally:
        for handle in handles:
            handle.remove()
        pipe.maybe_free_model_hooks()
    assert caught, f"{type(pipe).__name__} finished without calling {list(denoisers)}"
    return caught


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors inside a nested value by references into `tensors`; the rest is JSON."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {k: _pack(v, f"{path}.{k}", tensors) for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"The denoiser argument {path!r} is a {type(value).__name__}, which cannot be stored.")


def _unpack(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind in ("tuple", "list"):
        items = [_unpack(v, tensors) for v in value]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in value.items()}
    return value


def _trim(tensor: Tensor) -> Tensor:
    """Drop the all-zero tail along dimension 1 (what pipelines pad text with, and the empty image condition)."""
    if tensor.ndim < 3:
        return tensor
    used = tensor[0].flatten(1).ne(0).any(1).nonzero()
    return tensor[:, : int(used[-1]) + 1 if len(used) else 0]


def map_tensors(value: Any, function) -> Any:
    """Apply `function` to every tensor inside nested tuples, lists and dicts; everything else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b.to(a)).all())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@dataclass
class Condition:
    """What a pipeline hands its denoiser besides the noisy latents and the timestep, for a batch of clips.

    Each clip keeps its own tensors with a leading dimension of 1, so that batches can be cut and joined freely;
    `VideoModel.velocity` joins those of equal shape and calls the denoiser once per shape.

    Args:
        samples: one dict per clip, denoiser argument -> tensor (1, ...). Besides true arguments it may hold
            "hidden_states" (extra input channels in the model's layout: image condition and mask),
            "timestep" (1 for tokens to denoise, 0 for given ones), "fixed_mask" and "fixed_latents" (the same in
            canonical latents).
        shared: arguments that are the same for every clip of this size.
        latent_shape: (C, f, h, w).
        dtype: the denoiser's dtype at capture; tensors of this dtype follow the denoiser's dtype later.
        timestep_dtype: the dtype in which the pipeline passes its timestep.

    Example:
        >>> condition = model.condition(["a red circle", "a blue square"], height=64, width=64, num_frames=17)
        >>> len(condition), len(condition[:1])
        (2, 1)
        >>> tensors, meta = condition.state()
        >>> same = Condition.from_state(tensors, meta)
    """

    samples: list[dict[str, Tensor]]
    shared: dict[str, Any]
    latent_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    timestep_dtype: torch.dtype
    _batches: dict = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice | list[int]) -> "Condition":
        """The clips at `index` (an int keeps the batch dimension; a list may repeat clips)."""
        if isinstance(index, slice):
            samples = self.samples[index]
        else:
            samples = [self.samples[i] for i in ([index] if isinstance(index, int) else index)]
        return Condition(samples, self.shared, self.latent_shape, self.dtype, self.timestep_dtype)

    @classmethod
    def cat(cls, conditions: list["Condition"]) -> "Condition":
        """Join batches of one size.

        Raises:
            ValueError: they were made for different heights, widths, frame counts or pipeline arguments.
        """
        first = conditions[0]
        for other in conditions[1:]:
            if first.latent_shape != other.latent_shape:
                raise ValueError(
                    f"Conditions of different sizes cannot be one batch: latent shapes {first.latent_shape} and "
                    f"{other.latent_shape}. Batch clips of one bucket."
                )
            names = sorted({*first.shared, *other.shared})
            different = [n for n in names if not _same(first.shared.get(n), other.shared.get(n))]
            if different:
                raise ValueError(
                    f"Conditions made with different pipeline arguments cannot be one batch: {', '.join(different)} differ."
                )
        # DeepSpeed's bfloat16 changes the denoiser's dtype between what is captured before and in training
        alike = [c if c.dtype == first.dtype else c.to(dtype=first.dtype) for c in conditions]
        samples = [s for c in alike for s in c.samples]
        return cls(samples, first.shared, first.latent_shape, first.dtype, first.timestep_dtype)

    def free(self, device: torch.device | str | None = None) -> Tensor | None:
        """Which latents are to be generated: (B, 1, f, h, w) of 1, and 0 where an image gives them; None for all."""
        if not self.samples or "fixed_mask" not in self.samples[0]:
            return None
        return 1 - torch.cat([sample["fixed_mask"] for sample in self.samples]).to(device)

    def with_fixed(self, latents: Tensor) -> Tensor:
        """Latents (B, C, f, h, w) with what an image gives in its place, at any noise level; the condition may be of one clip."""
        free = self.free(latents.device)
        if free is None:
            return latents
        given = torch.cat([sample["fixed_latents"] for sample in self.samples]).to(latents)
        return torch.where(free > 0, latents, given)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Condition":
        """Move to `device`; tensors that had the denoiser's dtype change to `dtype`, others (masks, RoPE) keep theirs."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if dtype is not None and t.dtype == self.dtype else t.dtype)

        samples = [{k: move(v) for k, v in s.items()} for s in self.samples]
        # rotary tables and other shared tensors stay in the precision the pipeline chose
        shared = map_tensors(self.shared, lambda t: t.to(device=device))
        return Condition(samples, shared, self.latent_shape, dtype or self.dtype, self.timestep_dtype)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for a safetensors file and JSON-able metadata; zero padding is trimmed and restored by `from_state`."""
        tensors: dict[str, Tensor] = {}
        padded: dict[str, int] = {}
        for i, sample in enumerate(self.samples):
            for name, tensor in sample.items():
                key = f"{i}.{name}"
                tensors[key] = _trim(tensor.detach()).cpu().contiguous().clone()
                if tensors[key].shape != tensor.shape:
                    padded[key] = tensor.shape[1]
        shared = {name: _pack(value, f"shared.{name}", tensors) for name, value in self.shared.items()}
        meta = {
            "format": 1,
            "num_samples": len(self.samples),
            "padded": padded,
            "shared": shared,
            "latent_shape": list(self.latent_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "timestep_dtype": str(self.timestep_dtype).removeprefix("torch."),
        }
        return tensors, json.loads(json.dumps(meta))

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> "Condition":
        """Rebuild exactly what `state` stored."""
        if meta.get("format") != 1:
            raise ValueError(f"Unknown condition format {meta.get('format')!r}; rebuild the cache with this version.")
        samples: list[dict[str, Tensor]] = [{} for _ in range(meta["num_samples"])]
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            if index == "shared":
                continue
            if key in meta["padded"]:
                length = meta["padded"][key]
                full = tensor.new_zeros(1, length, *tensor.shape[2:])
                full[:, : tensor.shape[1]] = tensor
                tensor = full
            samples[int(index)][name] = tensor
        shared = {name: _unpack(node, tensors) for name, node in meta["shared"].items()}
        dtype, timestep_dtype = (getattr(torch, meta[k]) for k in ("dtype", "timestep_dtype"))
        return cls(samples, shared, tuple(meta["latent_shape"]), dtype, timestep_dtype)

    def batches(self) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Groups of clips whose tensors have equal shapes: [(their indices, {name: (n, ...)}), ...].

        Almost always one group; pipelines that do not pad their text (Kandinsky 5) give one per text length.
        """
        if not self._batches:
            groups: dict[tuple, list[int]] = {}
            for i, sample in enumerate(self.samples):
                groups.setdefault(tuple((k, v.shape) for k, v in sorted(sample.items())), []).append(i)
            self._batches["groups"] = [
                (rows, {k: torch.cat([self.samples[i][k] for i in rows]) for k in self.samples[rows[0]]})
                for rows in groups.values()
            ]
        return self._batches["groups"]
