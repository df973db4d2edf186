"""Block-causal attention over unmodified diffusers transformers: one masked pass, teacher forcing, a KV cache.

A causal video model denoises a clip block after block: the frames of a block see each other and all earlier frames, never
later ones (CausVid, https://huggingface.co/papers/2412.07772). Three ways to evaluate the same function:

- `block_causal`: all frames in one pass, each block sees itself and the blocks before it. With one noise level per block
  this trains diffusion forcing (https://huggingface.co/papers/2407.01392).
- `teacher_forcing`: [clean | noisy] in one pass; a noisy block sees itself and the clean blocks before it. What it returns
  for the noisy half is what the cached evaluation returns for each block, given the same clean past.
- `cached`: one block at a time; keys and values of the past come from a `KVCache`.

No weight and no line of the transformer is changed: attention processors and a hook on its rotary embedding do it, and
outside the three modes they pass every call on untouched. There is no mask either. Each block attends to slices of the
keys, so that every attention backend works and what is masked costs nothing.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from .video_model import VideoModel


PROCESSORS = (WanAttnProcessor, SkyReelsV2AttnProcessor, LTXVideoAttnProcessor)

_JOINT = "its text and video tokens attend to each other, so the text would carry later frames into earlier ones."
_IMAGE = (
    "its image condition is made for a whole clip, not for one block after another; use the text-to-video pipeline."
)
_OTHER = "no block-causal form of its attention has been verified."
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "cogvideox",
            "cogvideox-i2v",
            "hunyuan-video",
            "hunyuan-video-1.5",
            "mochi",
            "easyanimate",
            "motif-video",
        ),
        _JOINT,
    ),
    **dict.fromkeys(("wan-i2v", "skyreels-v2-i2v", "ltx-i2v"), _IMAGE),
    **dict.fromkeys(("sana-video", "sana-video-i2v"), "its attention is linear and has no keys and values to cache."),
}
SUPPORTED = ("wan", "skyreels-v2", "ltx")

Ranges = list[tuple[int, int]]  # of frames, [start, stop)


def visible_frames(stop: int, window: int | None = None, sink: int = 0, first: int = 0) -> Ranges:
    """The frames that a block ending at `stop` sees, of those from `first` on.

    Args:
        stop: frame behind the block's last.
        window: how many frames are seen, the block's own and the sink's included; None for all.
        sink: how many of the very first frames stay visible (LongLive, https://huggingface.co/papers/2509.22622).
        first: the first frame there is.

    Example:
        >>> visible_frames(21, window=12, sink=3)
        [(0, 3), (12, 21)]
    """
    if window is None or stop - first <= window:
        return [(first, stop)]
    recent = (stop - (window - sink), stop)
    return [(first, first + sink), recent] if sink else [recent]


def _check_window(window: int | None, sink: int) -> None:
    if sink < 0 or (window is not None and window <= sink):
        raise ValueError(
            f"window={window} must be larger than sink={sink} (both in latent frames, the window includes the sink)."
        )


@dataclass(frozen=True)
class _Block:
    """Keys and values of the frames [start, stop), (B, tokens, heads, channels), one pair per layer."""

    start: int
    stop: int
    layers: tuple[tuple[Tensor, Tensor], ...]


@dataclass
class _Text:
    """Keys and values of the cross-attention layers for one prompt tensor."""

    source: Tensor | None = None
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class KVCache:
    """What a causal model remembers of the blocks before: keys and values per block and layer, and of the prompt.

    Every entry is detached and never written to again, so that no gradient can reach an earlier block, and a recomputation
    under gradient checkpointing finds what its forward pass saw. Belongs to one rollout of one set of weights.

    Args:
        window: how many latent frames attention spans, the present block and the sink included; None for all. Frames
            that no later block can see leave memory.
        sink: how many of the very first latent frames stay in the window.

    Attributes:
        num_frames: latent frames seen so far: the position of the next block's first frame.
        blocks: those that later ones can still see, each with `start` and `stop` (latent frames) and `layers`, (keys,
            values) of each.

    Raises:
        ValueError: a window that has no room besides its sink.
    """

    def __init__(self, window: int | None = None, sink: int = 0):
        _check_window(window, sink)
        self.window, self.sink = window, sink
        self.reset()

    def reset(self, num_frames: int = 0) -> None:
        """Forget everything; the next block's first frame gets the position `num_frames`."""
        self.num_frames = self._first = num_frames
        self.blocks: tuple[_Block, ...] = ()
        self._text = _Text()

    def _append(self, frames: int, layers: tuple[tuple[Tensor, Tensor], ...]) -> None:
        blocks = (*self.blocks, _Block(self.num_frames, self.num_frames + frames, layers))
        self.num_frames += frames
        ranges = visible_frames(self.num_frames + 1, self.window, self.sink, self._first)
        self.blocks = tuple(b for b in blocks if any(b.start < stop and start < b.stop for start, stop in ranges))


@dataclass
class _Mode:
    """How attention works at present. `frame_tokens` is set by the forward pass, `stored` collects what it computes."""

    kind: str
    frames_per_block: int = 0
    window: int | None = None
    sink: int = 0
    first: int = 0
    offset: int = 0
    past: tuple[_Block, ...] = ()
    text: _Text | None = None
    stored: dict[int, tuple[Tensor, Tensor]] | None = None
    frame_tokens: int = 0

    def spans(self, frames: int) -> list[tuple[tuple[int, int], Ranges]]:
        """[(frames of a block, frames it sees), ...] in a pass over `frames` frames."""
        half = frames // 2 if self.kind == "teacher_forcing" else 0
        length, blocks = frames - half, []
        for start in range(0, length, self.frames_per_block):
            stop = start + self.frames_per_block
            blocks.append(((start, stop), visible_frames(stop, self.window, self.sink)))
        if half:
            for (start, stop), seen in list(blocks):
                past = [(a, min(b, start)) for a, b in seen if a < start]
                blocks.append(((half + start, half + stop), [*past, (half + start, half + stop)]))
        return blocks


@dataclass
class _State:
    """What processors and hooks share: the modes entered, the last one counts. Small, as it is copied with the module."""

    frame_rule: tuple[int, int]  # temporal factor and offset of the VAE, to speak of video frames
    modes: list[_Mode | None] = field(default_factory=list)

    @property
    def mode(self) -> _Mode | None:
        return self.modes[-1] if self.modes else None

    def check_frames(self, frames: int, frames_per_block: int) -> None:
        if frames_per_block < 1:
            raise ValueError(f"frames_per_block must be at least 1, got {frames_per_block}.")
        if frames % frames_per_block or not frames:
            factor, offset = self.frame_rule
            below = frames // frames_per_block * frames_per_block
            counts = [n for n in (below, below + frames_per_block) if n]
            names = " and ".join(f"{n} ({(n - offset) * factor + offset} video frames)" for n in counts)
            raise ValueError(
                f"{frames} latent frames ({(frames - offset) * factor + offset} video frames) do not divide into blocks "
                f"of {frames_per_block}; the nearest counts that do: {names}."
            )

    def positions(self, frames: int) -> tuple[int, int, int]:
        """Check a forward pass over `frames` frames; (first position, position behind the last, how often repeated)."""
        mode = self.mode
        repeat = 2 if mode.kind == "teacher_forcing" else 1
        if frames % repeat:
            raise ValueError(f"teacher_forcing takes [clean | noisy] along the frames, but {frames} is an odd number.")
        length, block = frames // repeat, frames
        if mode.kind != "cached":
            self.check_frames(length, mode.frames_per_block)
            block = mode.frames_per_block
        if mode.window is not None and mode.window - mode.sink < block:
            raise ValueError(
                f"window={mode.window} leaves {mode.window - mode.sink} frames besides the sink, fewer than a block of "
                f"{block}; enlarge the window."
            )
        return mode.offset, mode.offset + length, repeat


class CausalAttention:
    """Installs block-causal attention on a model's denoiser. Off, unless one of its modes is entered.

    Off, outputs are those of the stock model bit for bit. LoRA may be injected before or after, and users' attention
    backends (`set_attention_backend`) keep working. A second instance over the same denoiser controls the same state.

    Args:
        model: of a supported family: Wan 2.1, Wan 2.2-TI2V-5B, SkyReels-V2 and LTX, text-to-video.

    Raises:
        ValueError: another family; the message has the reason.

    Example:
        >>> causal = CausalAttention(model)
        >>> with causal.block_causal(frames_per_block=3):
        ...     velocity = model.velocity(latents, sigma, condition)  # sigma (B, f): one level per frame
        >>> cache = KVCache(window=12, sink=3)
        >>> with torch.no_grad(), causal.cached(cache, store=True):
        ...     model.velocity(first_block, 0.0, condition)  # its keys and values are now in the cache
        >>> with causal.cached(cache):
        ...     velocity = model.velocity(second_block, 0.9, condition)
    """

    def __init__(self, model: VideoModel):
        self.model = model
        name, transformer = model.family.name, next(iter(model.denoisers.values()))
        refusal = f"{type(model.pipe).__name__} cannot be made causal: "
        if name not in SUPPORTED:
            raise ValueError(f"{refusal}{REFUSED.get(name, _OTHER)} Supported families: {', '.join(SUPPORTED)}.")
        if len(model.denoisers) > 1:
            raise ValueError(
                f"{refusal}it has two experts, and what one stores of the past means nothing to the other. Use a model "
                "with one transformer (Wan 2.1, Wan 2.2-TI2V-5B)."
            )
        if model.frame_multiple != model.temporal_factor:
            raise ValueError(f"{refusal}its tokens span several latent frames.")
        if transformer.config.get("num_frame_per_block", 1) > 1:
            raise ValueError(
                f"{refusal}it already is, by its own dense mask. Switch that off first: "
                "pipe.transformer.register_to_config(num_frame_per_block=1)."
            )
        self._state = self._install(transformer)

    def _install(self, transformer: nn.Module) -> _State:
        modules = dict(transformer.named_modules())
        layers = {
            kind: [module for name, module in modules.items() if name.rpartition(".")[2] == kind]
            for kind in ("attn1", "attn2")
        }
        processor = layers["attn1"][0].processor
        if isinstance(processor, _CausalProcessor):
            return processor.state
        state = _State((self.model.temporal_factor, self.model.family.frame_offset))
        for attentions in layers.values():
            for i, attention in enumerate(attentions):
                if not isinstance(attention.processor, PROCESSORS):
                    raise ValueError(
                        f"The transformer has the attention processor {type(attention.processor).__name__}; causal "
                        "attention replaces the stock ones only. Load the pipeline without it."
                    )
                attention.set_processor(_CausalProcessor(attention.processor, state, i))
        for name, module in modules.items():
            leaf = name.rpartition(".")[2]
            if leaf == "rope":
                place = _place_ltx if self.model.family.layout == "packed" else _place_wan
                module.register_forward_hook(functools.partial(place, state), with_kwargs=True)
            elif leaf in ("text_embedder", "caption_projection"):
                module.register_forward_pre_hook(functools.partial(_watch_prompt, state))
        return state

    def check_frames(self, latent_frames: int, frames_per_block: int) -> None:
        """Refuse a number of frames that `frames_per_block` does not divide.

        Raises:
            ValueError: `latent_frames` do not divide into blocks; the message says the nearest counts that do.
        """
        self._state.check_frames(latent_frames, frames_per_block)

    def copied(self, denoiser: nn.Module) -> nn.Module:
        """A deep copy of the denoiser whose attention follows this instance, too."""
        return copy.deepcopy(denoiser, {id(self._state): self._state})

    @contextlib.contextmanager
    def _entered(self, mode: _Mode | None) -> Iterator[None]:
        self._state.modes.append(mode)
        try:
            yield
        finally:
            self._state.modes.pop()

    def block_causal(
        self, frames_per_block: int, *, window: int | None = None, sink: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """One pass over all frames: each block sees itself and the blocks before it.

        Args:
            frames_per_block: latent frames of a block; `velocity` raises ValueError for latents that do not divide into
                blocks.
            window, sink: as in `KVCache`.
        """
        _check_window(window, sink)
        return self._entered(_Mode("block_causal", frames_per_block, window, sink))

    def teacher_forcing(
        self, frames_per_block: int, *, window: int | None = None, sink: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """One pass over [clean | noisy] along the frames, both halves at the same positions.

        `velocity` takes latents (B, C, 2f, h, w) and sigma (B, 2f), and the second half of what it returns counts. Clean
        blocks see clean blocks up to their own; a noisy block sees itself and the clean blocks before it.

        Args:
            frames_per_block, window, sink: as in `block_causal`.
        """
        _check_window(window, sink)
        return self._entered(_Mode("teacher_forcing", frames_per_block, window, sink))

    @contextlib.contextmanager
    def cached(self, cache: KVCache, store: bool = False) -> Iterator[None]:
        """The latents are the block that follows those in `cache`.

        Without gradients, the keys and values of the prompt are kept in the cache as well, and made anew when `velocity`
        gets other prompt tensors. Pass the same `Condition` object at every step, on the model's device and in its dtype,
        to make use of them.

        Args:
            cache: what the model remembers.
            store: append the block's keys and values when the context ends. Only under `torch.no_grad`, with one forward
                pass inside.
        """
        assert not (store and torch.is_grad_enabled()), "keys and values are stored without gradients"
        mode = _Mode(
            "cached",
            window=cache.window,
            sink=cache.sink,
            first=cache._first,
            offset=cache.num_frames,
            past=cache.blocks,
            text=cache._text,
            stored={} if store else None,
        )
        with self._entered(mode):
            yield
        if store:
            assert mode.stored, "nothing was evaluated that could be stored"
            layers = tuple(mode.stored[i] for i in range(len(mode.stored)))
            cache._append(layers[0][0].shape[1] // mode.frame_tokens, layers)

    def snapshot(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """The present mode with all that its cache holds now, as a context that is entered to recompute a forward pass.

        Nothing is stored in it. `vidtrl.models.roles.checkpoint_under(causal)` is gradient checkpointing with it.
        """
        mode = self._state.mode
        mode = None if mode is None else replace(mode, stored=None)
        return lambda: self._entered(mode)


class _CausalProcessor:
    """Attention of one layer; `stock` does it outside the causal modes."""

    def __init__(self, stock, state: _State, layer: int):
        self.stock, self.state, self.layer = stock, state, layer

    # what `set_attention_backend` and `enable_parallelism` set
    @property
    def _attention_backend(self):
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend):
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self):
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config):
        self.stock._parallel_config = config

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mode = self.state.mode
        cross = encoder_hidden_states is not None
        if mode is None or (cross and (mode.text is None or mode.text.source is None or torch.is_grad_enabled())):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if not mode.frame_tokens:
            raise RuntimeError(
                "A block is recomputed in another mode than that of its forward pass; switch gradient checkpointing on "
                "with enable_gradient_checkpointing(vidtrl.models.roles.checkpoint_under(causal))."
            )
        if self._parallel_config is not None:
            raise ValueError("Causal attention does not work with context parallelism; switch enable_parallelism off.")
        if attn.fused_projections:
            raise ValueError(
                "Causal attention needs separate projections; call pipe.transformer.unfuse_qkv_projections()."
            )
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        if cross:
            if self.layer not in mode.text.layers:
                mode.text.layers[self.layer] = self._keys_values(attn, encoder_hidden_states)
            key, value = mode.text.layers[self.layer]
            if attention_mask is not None:
                attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(key))
                attention_mask = attention_mask.view(len(key), attn.heads, -1, attention_mask.shape[-1])
            out = self._attend(query, key, value, attention_mask)
        else:
            key, value = self._keys_values(attn, hidden_states)
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
            if mode.kind == "cached":
                out = self._attend(query, *self._with_past(mode, key, value))
                if mode.stored is not None:
                    assert self.layer not in mode.stored, "store=True takes one forward pass"
                    mode.stored[self.layer] = (key.detach(), value.detach())
            else:
                n = mode.frame_tokens
                out = torch.cat(
                    [
                        self._attend(_cut(query, [span], n), _cut(key, seen, n), _cut(value, seen, n))
                        for span, seen in mode.spans(query.shape[1] // n)
                    ],
                    1,
                )
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))

    def _keys_values(self, attn, context: Tensor) -> tuple[Tensor, Tensor]:
        key = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        return key, attn.to_v(context).unflatten(2, (attn.heads, -1))

    def _with_past(self, mode: _Mode, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        n = mode.frame_tokens
        seen = visible_frames(mode.offset + key.shape[1] // n, mode.window, mode.sink, mode.first)
        keys, values = [], []
        for block in mode.past:
            k, v = block.layers[self.layer]
            if len(k) != len(key):
                raise ValueError(
                    f"The cache holds {len(k)} clips, but {len(key)} are evaluated; use one cache per batch, and prompts "
                    "of one padded length."
                )
            part = [
                (max(a, block.start) - block.start, min(b, block.stop) - block.start)
                for a, b in seen
                if max(a, block.start) < min(b, block.stop)
            ]
            if part:
                keys.append(_cut(k, part, n))
                values.append(_cut(v, part, n))
        return torch.cat([*keys, key], 1), torch.cat([*values, value], 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)


def _cut(x: Tensor, ranges: Ranges, frame_tokens: int) -> Tensor:
    """The tokens of some frames."""
    parts = [x[:, start * frame_tokens : stop * frame_tokens] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent channel pairs (all three families); x is (B, tokens, heads, channels)."""
    if cos.ndim == 3:  # LTX: over the channels of all heads
        cos, sin = (t.unflatten(2, (x.shape[2], -1)) for t in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def _place_wan(state: _State, rope: nn.Module, args: tuple, kwargs: dict, output: tuple[Tensor, Tensor]):
    """The rotary embedding of Wan and SkyReels-V2 at the positions of the present mode."""
    mode = state.mode
    if mode is None:
        return None
    frames = args[0].shape[2]
    mode.frame_tokens = output[0].shape[1] // frames
    start, stop, repeat = state.positions(frames)
    if stop > rope.max_seq_len:
        raise ValueError(
            f"The next block would end at latent frame {stop}, but the model knows {rope.max_seq_len} positions; start a "
            "new cache (`recache` restarts one from the last clean frames)."
        )
    if (start, repeat) == (0, 1):
        return None

    def place(freqs: Tensor, table: Tensor) -> Tensor:
        time = table[start:stop, : rope.t_dim].repeat(repeat, 1).repeat_interleave(mode.frame_tokens, 0)
        return torch.cat([time[None, :, None], freqs[..., rope.t_dim :]], -1)

    return place(output[0], rope.freqs_cos), place(output[1], rope.freqs_sin)


def _place_ltx(state: _State, rope: nn.Module, args: tuple, kwargs: dict, output: tuple[Tensor, Tensor]):
    """The rotary embedding of LTX, from coordinates at the positions of the present mode."""
    mode = state.mode
    if mode is None:
        return None
    hidden, _, height, width, scale, _ = args
    mode.frame_tokens = height * width
    start, stop, repeat = state.positions(hidden.shape[1] // mode.frame_tokens)
    axes = [torch.arange(*r, dtype=torch.float32, device=hidden.device) for r in ((start, stop), (height,), (width,))]
    patches = (rope.patch_size_t, rope.patch_size, rope.patch_size)
    axes = [axis * factor * patch for axis, factor, patch in zip(axes, scale, patches, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).repeat(1, repeat)
    return rope.forward(hidden, video_coords=grid[None].expand(len(hidden), -1, -1))


def _watch_prompt(state: _State, embedder: nn.Module, args: tuple) -> None:
    """Other prompt tensors make the cached keys and values of the text worthless."""
    text = state.mode and state.mode.text
    if text is not None and not torch.is_grad_enabled() and text.source is not args[0]:
        text.source, text.layers = args[0], {}
