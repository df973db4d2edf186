"""Memory that torch operations would take, counted without taking it: fake tensors, and models built from their configs.

A fake tensor (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html) has a shape, a dtype and a device but no
data: its storage is on the meta device. Real modules run on such tensors, forward and backward, under autocast and gradient
checkpointing. Every storage is born in an operation and dies with its last reference, so the sum over those alive is what a
device would hold.
"""

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models import VideoModel
from ..models.capture import patched
from ..models.loading import pipeline_index


class MemoryTrace(TorchDispatchMode):
    """
    The bytes alive by part, and what they were when the sum was largest.

    A storage is counted once, however many views it has. New ones belong to `"activations"` until [`MemoryTrace.own`] says
    otherwise.

    Attributes:
        live (`Counter`): Bytes alive at present, by part.
        peak (`dict[str, int]`): Bytes by part at the moment when their sum was largest.

    Example:

    ```python
    >>> import torch
    >>> from vidtrl.trainer.memory_trace import MemoryTrace

    >>> with MemoryTrace() as trace:
    ...     kept = torch.ones(10) + torch.ones(10)  # 40 bytes each
    >>> sum(trace.peak.values()), trace.live["activations"]
    (120, 40)
    ```
    """

    def __init__(self):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._storages: dict[int, tuple[int, str]] = {}  # bytes and part, by the storage's id

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = len(self._storages)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._storages:
                self.own([tensor], "activations")
        if len(self._storages) != before:
            self._compare()
        return result

    def own(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors, new ones and those counted before, as `part`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._storages:
                size, old = self._storages[key]
                self.live[old] -= size
            else:
                size = storage.nbytes()
                weakref.finalize(storage, self._freed, key).atexit = False
            self._storages[key] = size, part
            self.live[part] += size
        self._compare()

    def _freed(self, key: int) -> None:
        size, part = self._storages.pop(key)
        self.live[part] -= size

    def _compare(self) -> None:
        if self.live.total() >= sum(self.peak.values()):  # of equal moments the last, which knows the parts best
            self.peak = {part: size for part, size in self.live.items() if size}

    def restart(self) -> None:
        """Forget the largest sum so far."""
        self.peak = {}
        self._compare()


class PaddedTokenizer:
    """Stands in for a tokenizer whose files were not fetched: every text has the largest number of tokens."""

    model_max_length = 512

    def __call__(self, text, max_length: int | None = None, **kwargs) -> BatchEncoding:
        number = 1 if isinstance(text, str) else len(text)
        ids = torch.ones(number, max_length or self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def pipeline_skeleton(
    model: str | os.PathLike | DiffusionPipeline, dtype: torch.dtype | None, fake: FakeTensorMode, **hub: Any
) -> DiffusionPipeline:
    """
    A pipeline whose models have shapes and no weights.

    Args:
        model (`str`, `PathLike` or `DiffusionPipeline`): Hub id or directory, of which only `model_index.json` and the
            components' configurations are read; or a loaded pipeline, which is left as it is.
        dtype (`torch.dtype` or `None`): Of the weights, as `from_pretrained` would load them; `None` keeps a loaded
            pipeline's own.
        fake (`FakeTensorMode`): What the weights are made in.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        `ValueError`: If nothing can be read from there, or the family is not supported.
    """
    if isinstance(model, DiffusionPipeline):
        cls, parts = type(model), dict(model.components)
        options = {name: value for name, value in model.config.items() if name not in parts and name[0] != "_"}
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                parts[name] = _empty_like(part)
                dtypes = {n: p.dtype for n, p in part.named_parameters()}
                _materialise(parts[name], fake, lambda n, p, d=dtypes: d.get(n, p.dtype))
    else:
        path = os.fspath(model)
        index = pipeline_index(path, **hub)
        cls, parts, options = getattr(diffusers, index["_class_name"]), {}, {}
        for name, value in index.items():
            if name.startswith("_"):
                continue
            if not isinstance(value, (list, tuple)):
                options[name] = value
                continue
            parts[name] = None if value[0] is None else _component(path, name, *value, hub)
            if isinstance(parts[name], nn.Module):
                kept = set(getattr(parts[name], "_keep_in_fp32_modules", None) or ())
                # transformers keeps its own list in float32 for float16 only
                kept = kept if isinstance(parts[name], diffusers.ModelMixin) or dtype == torch.float16 else set()
                rule = lambda n, p, kept=kept: torch.float32 if kept & set(n.split(".")) else dtype  # noqa: E731
                _materialise(parts[name], fake, rule)
    return cls(**parts, **options)


def _component(path: str, name: str, library: str, class_name: str, hub: dict[str, Any]) -> Any:
    try:
        if library == "transformers" and ("tokenizer" in name or "processor" in name and "image" not in name):
            return PaddedTokenizer()
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), class_name, None)
        if cls is None:
            raise ValueError(
                f"the component {name!r} of {path!r} is {library}.{class_name}, which this installation does not have: "
                "upgrade diffusers and transformers"
            )
        if issubclass(cls, diffusers.ModelMixin):
            with init_empty_weights():
                return cls.from_config(cls.load_config(path, subfolder=name, **hub))
        if issubclass(cls, transformers.PreTrainedModel):
            config = cls.config_class.from_pretrained(path, subfolder=name, **hub)
            return _empty_transformer(cls, config)
        return cls.from_pretrained(path, subfolder=name, **hub)
    except OSError as error:
        raise ValueError(
            f"cannot read the configuration of {name!r} in {path!r}: {error}. An estimate needs model_index.json and each "
            "component's config.json, from a directory, the cache, or the Hub with HF_HUB_OFFLINE unset"
        ) from error


def _empty_like(module: nn.Module) -> nn.Module:
    if not isinstance(module, diffusers.ModelMixin):
        return _empty_transformer(type(module), module.config)
    with init_empty_weights():
        return type(module).from_config(module.config)


def _empty_transformer(cls: type[nn.Module], config: Any) -> nn.Module:
    with init_empty_weights():
        module = cls(config)
    module.tie_weights()  # again: those made inside that context are apart
    return module


def _materialise(module: nn.Module, fake: FakeTensorMode, dtype_of) -> None:
    """Parameters on the meta device become fake ones on the CPU."""

    def make(name: str, parameter: nn.Parameter) -> Tensor:
        with fake:
            return torch.empty(parameter.shape, dtype=dtype_of(name, parameter), device="cpu")

    _replace_parameters(module, make)
    module.requires_grad_(False).eval()


def _replace_parameters(module: nn.Module, make: Callable[[str, nn.Parameter], Tensor]) -> None:
    made: dict[int, nn.Parameter] = {}  # shared ones stay shared
    for prefix, child in module.named_modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                data = make(f"{prefix}.{name}".lstrip("."), parameter)
                made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            child._parameters[name] = made[id(parameter)]


@contextlib.contextmanager
def on_meta(module: nn.Module, fake: FakeTensorMode) -> Iterator[None]:
    """The module's parameters are on the meta device inside this context, where PEFT can inject adapters, and fake after it."""
    _replace_parameters(module, lambda name, p: torch.empty(p.shape, dtype=p.dtype, device="meta"))
    yield
    with fake:
        _replace_parameters(module, lambda name, p: torch.empty(p.shape, dtype=p.dtype, device="cpu"))


@contextlib.contextmanager
def stubbed_encoders(model: VideoModel) -> Iterator[None]:
    """Text and image encoders, and the VAE's encoder, return zeros of the right shape inside this context."""
    with contextlib.ExitStack() as stack:
        for name, module in model.pipe.components.items():
            if isinstance(module, transformers.PreTrainedModel):
                stack.enter_context(patched(module, forward=_encoder_stub(module)))
            elif name == "vae":
                stack.enter_context(patched(module, encode=_vae_stub(model)))
        yield


def _encoder_stub(module: nn.Module):
    config = module.config
    width, depth = config.hidden_size, config.num_hidden_layers

    def forward(input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs):
        if input_ids is not None:
            batch, length = input_ids.shape
        else:
            batch, length = len(pixel_values), (config.image_size // config.patch_size) ** 2 + 1
        state = torch.zeros(batch, length, width, dtype=module.dtype)
        return BaseModelOutputWithPooling(state, state[:, 0], (state,) * (depth + 1))

    return forward


def _vae_stub(model: VideoModel):
    def encode(pixels: Tensor, *args, **kwargs):
        batch, _, frames, height, width = pixels.shape
        _, f, h, w = model.latent_shape(model.nearest_frames(frames), *model.nearest_size(height, width))
        f = 1 if frames == 1 else f
        moments = torch.zeros(batch, 2 * model.latent_channels, f, h, w, dtype=pixels.dtype)
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments))

    return encode
