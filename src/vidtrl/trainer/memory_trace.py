"""Memory that torch operations would take, counted without taking it: fake tensors, and models built from their configs.

A fake tensor (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html) has a shape, a dtype and a device but no
data: its storage is on the meta device. Real modules run on such tensors, forward and backward, under autocast and gradient
checkpointing. Every storage is born in an operation and dies with its last reference, so the sum over those alive is what a
device would hold.
"""

import contextlib
import copy
import os
import re
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
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary
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


class KnownValues(FakeTensorMode):
    """
    Fake tensors of which the small ones have their values as well, where these follow from real tensors and constants alone.

    Masks and indices do, whatever the weights are, so a model may decide by them what it computes: by how many text tokens a
    mask lets through, or by whether there is an image.
    """

    largest = 2**24  # values of a tensor that are kept

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self._values: dict[Tensor, Tensor] = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor:  # a known mask says how many there will be, also of unknown values
            args = args[0], self._positions(args[1])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = all(self._value(x) is not None for x in tensors) and not self._arbitrary(func, tensors)
        values = tree_map(lambda x: self._value(x) if isinstance(x, Tensor) else x, (args, kwargs))
        try:
            found = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not known:
                raise
            real = func(*values[0], **values[1])
            found = tree_map(lambda x: self.from_tensor(x) if isinstance(x, Tensor) else x, real)
            self._keep(found, real)
            return found
        if known and all(x.numel() <= self.largest for x in tree_leaves(found) if isinstance(x, Tensor)):
            self._keep(found, func(*values[0], **values[1]))
        elif func._schema.is_mutable:
            self._forget(tensors)
        return found

    def _value(self, tensor: Tensor) -> Tensor | None:
        if isinstance(tensor, FakeTensor):
            return self._values.get(tensor)
        return tensor if tensor.device.type == "cpu" and tensor.numel() <= self.largest else None

    @staticmethod
    def _arbitrary(func, tensors: list[Tensor]) -> bool:
        """Whether the result is random or uninitialised, or in a real tensor, which would be written to twice."""
        writes = func._schema.is_mutable and not all(isinstance(x, FakeTensor) for x in tensors)
        return writes or torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name()

    def _positions(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Indices with the positions of what a mask lets through instead of the mask, where it is known."""
        found = []
        for index in indices:
            value = self._value(index) if index is not None and index.dtype == torch.bool else None
            found += [index] if value is None else [self.from_tensor(i) for i in value.nonzero(as_tuple=True)]
        return found

    def _keep(self, found: Any, real: Any) -> None:
        for fake, value in zip(tree_leaves(found), tree_leaves(real), strict=True):
            if isinstance(fake, FakeTensor):
                self._values[fake] = value

    def _forget(self, tensors: Iterable[Tensor]) -> None:
        """What was written to with unknown values is unknown, as are all views of it."""
        written = {v.untyped_storage().data_ptr() for v in map(self._values.get, tensors) if v is not None}
        for fake, value in list(self._values.items()):
            if value.untyped_storage().data_ptr() in written:
                del self._values[fake]


class PaddedTokenizer:
    """
    Stands in for a tokenizer whose files were not fetched: every text has the largest number of tokens.

    Attributes:
        markers (`dict[str, int]`): What pipelines look for in a text, and their tokens.
    """

    model_max_length = 512

    def __init__(self):
        self.markers = {"<|end_header_id|>": 2}

    def __call__(self, text, max_length: int | None = None, padding: bool | str = True, **kwargs) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        # without a limit "longest" is asked for to see what was truncated: nothing
        length = max_length or (1 if padding == "longest" else self.model_max_length)
        ids = torch.ones(len(texts), length, dtype=torch.long)
        for row, one in zip(ids, texts, strict=True):
            found = [self.markers[name] for name in re.findall("|".join(map(re.escape, self.markers)), one)]
            if found:  # as the last ones, where a pipeline expects the end of its template
                row[-len(found) :] = torch.tensor(found)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, conversations, tokenize: bool = True, **kwargs) -> BatchEncoding | str:
        return self([""] * len(conversations), **kwargs) if tokenize else ""

    def encode(self, text: str, **kwargs) -> list[int]:
        return [1] * len(text.split())

    def decode(self, ids, **kwargs) -> str:
        return ""

    def batch_decode(self, ids, **kwargs) -> list[str]:
        return [""] * len(ids)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.markers[token]


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
        parts = dict(model.components)
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                parts[name] = _empty_like(part)
                dtypes = {n: p.dtype for n, p in part.named_parameters()}
                _materialise(parts[name], fake, lambda n, p, d=dtypes: d.get(n, p.dtype))
        pipe = copy.copy(model)  # with what its user has set, such as a number of tokens
        pipe.register_modules(**parts)
        return pipe
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
    image_token = getattr(getattr(parts.get("text_encoder"), "config", None), "image_token_index", None)
    for part in parts.values():
        if isinstance(part, PaddedTokenizer) and image_token is not None:
            part.markers["<image>"] = image_token
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
    config = module.config.get_text_config()  # of a model that reads images as well
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
