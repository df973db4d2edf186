"""Adapters in the layout that ComfyUI loads: named after the layers of the original model, with `alpha` beside the weights.

ComfyUI adds `alpha / rank * lora_up @ lora_down` to the weight that a key names, and without an `alpha` takes
`alpha = rank`. Where the original model computes several of diffusers' layers at once (a fused query, key and value), their
adapters become one of the summed rank: the `lora_down` one below the other, the `lora_up` block-diagonal.

One row of `KEY_MAPS` is what a family needs. diffusers reads the result back for Wan, SkyReels-V2, LTX and HunyuanVideo.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..models.families import FAMILIES, find_family
from ..trainer.checkpoint import MANIFEST
from ..trainer.lora import ADAPTER_FILE, EXPERT_FILES, PREFIX
from .model_card import is_hub_id
from .upload import retried


logger = logging.get_logger(__name__)

COMFYUI_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class KeyMap:
    """
    From diffusers' layers to those of the original model; `{n}` stands for a block's number.

    Args:
        layers: diffusers' layer to the original one.
        fused: an original layer to the layers of diffusers that it holds, in its order, each with its number of outputs in
            units of its inputs (for a layer that the adapter leaves out).
        swapped: layers of diffusers whose halves the original has in the other order.
        alpha_keys: whether diffusers' loader of the original layout takes `alpha` keys. Where it refuses files that have
            them, the scale is multiplied into `lora_up`, which every loader understands; so it is for layers outside the
            blocks, where diffusers' loader of Wan takes none.
    """

    layers: Mapping[str, str]
    fused: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    alpha_keys: bool = True


def _joined(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_WAN = KeyMap(
    layers={
        **_joined("blocks.{n}.attn1", "blocks.{n}.self_attn", _ATTENTION),
        **_joined("blocks.{n}.attn2", "blocks.{n}.cross_attn", _ATTENTION),
        **_joined("blocks.{n}.attn2", "blocks.{n}.cross_attn", {"add_k_proj": "k_img", "add_v_proj": "v_img"}),
        **_joined("blocks.{n}.ffn", "blocks.{n}.ffn", {"net.0.proj": "0", "net.2": "2"}),
        **_joined("condition_embedder.time_embedder", "time_embedding", {"linear_1": "0", "linear_2": "2"}),
        **_joined("condition_embedder.text_embedder", "text_embedding", {"linear_1": "0", "linear_2": "2"}),
        **_joined("condition_embedder.image_embedder.ff", "img_emb.proj", {"net.0.proj": "1", "net.2": "3"}),
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
    }
)
_LTX = KeyMap(  # the original has diffusers' names
    layers={
        f"transformer_blocks.{{n}}.{name}": f"transformer_blocks.{{n}}.{name}"
        for name in (
            *(f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in _ATTENTION),
            "ff.net.0.proj",
            "ff.net.2",
        )
    },
    alpha_keys=False,
)
_HUNYUAN_VIDEO = KeyMap(
    layers={
        **_joined(
            "transformer_blocks.{n}",
            "double_blocks.{n}",
            {
                "attn.to_out.0": "img_attn_proj",
                "attn.to_add_out": "txt_attn_proj",
                "norm1.linear": "img_mod.linear",
                "norm1_context.linear": "txt_mod.linear",
                "ff.net.0.proj": "img_mlp.fc1",
                "ff.net.2": "img_mlp.fc2",
                "ff_context.net.0.proj": "txt_mlp.fc1",
                "ff_context.net.2": "txt_mlp.fc2",
            },
        ),
        **_joined(
            "single_transformer_blocks.{n}",
            "single_blocks.{n}",
            {"proj_out": "linear2", "norm.linear": "modulation.linear"},
        ),
    },
    fused={
        "double_blocks.{n}.img_attn_qkv": tuple((f"transformer_blocks.{{n}}.attn.to_{x}", 1) for x in "qkv"),
        "double_blocks.{n}.txt_attn_qkv": tuple((f"transformer_blocks.{{n}}.attn.add_{x}_proj", 1) for x in "qkv"),
        "single_blocks.{n}.linear1": (
            *((f"single_transformer_blocks.{{n}}.attn.to_{x}", 1) for x in "qkv"),
            ("single_transformer_blocks.{n}.proj_mlp", 4),
        ),
    },
    alpha_keys=False,
)
_MOCHI = KeyMap(
    layers=_joined(
        "transformer_blocks.{n}",
        "blocks.{n}",
        {
            "attn1.to_out.0": "attn.proj_x",
            "attn1.to_add_out": "attn.proj_y",
            "ff.net.0.proj": "mlp_x.w1",
            "ff.net.2": "mlp_x.w2",
            "ff_context.net.0.proj": "mlp_y.w1",
            "ff_context.net.2": "mlp_y.w2",
            "norm1.linear": "mod_x",
            "norm1_context.linear": "mod_y",
            "norm1_context.linear_1": "mod_y",  # of the last block, which has no text stream after it
        },
    ),
    fused={
        "blocks.{n}.attn.qkv_x": tuple((f"transformer_blocks.{{n}}.attn1.to_{x}", 1) for x in "qkv"),
        # the text stream is narrower than the video stream, whose width keys and values must have
        "blocks.{n}.attn.qkv_y": tuple((f"transformer_blocks.{{n}}.attn1.add_{x}_proj", 0) for x in "qkv"),
    },
    swapped=("transformer_blocks.{n}.ff.net.0.proj", "transformer_blocks.{n}.ff_context.net.0.proj"),
)

# a family of models/families.py -> its map
KEY_MAPS: dict[str, KeyMap] = {
    **dict.fromkeys(("wan", "wan-i2v", "skyreels-v2", "skyreels-v2-i2v"), _WAN),
    **dict.fromkeys(("ltx", "ltx-i2v"), _LTX),
    **dict.fromkeys(("hunyuan-video", "hunyuan-video-i2v", "hunyuan-video-i2v-concat"), _HUNYUAN_VIDEO),
    "mochi": _MOCHI,
}


def export_comfyui(
    source: str | os.PathLike,
    output: str | os.PathLike,
    family: str | None = None,
    alpha_keys: bool | None = None,
) -> list[Path]:
    """
    Write a trained adapter for ComfyUI's LoRA loaders.

    Args:
        source (`str` or `PathLike`): What a trainer saved: a directory, an adapter file in it, or a Hub id.
        output (`str` or `PathLike`): The file to write (`.safetensors`), or the directory for it. Of a model with two
            experts, two files are written, whose names end in `_high_noise` and `_low_noise`.
        family (`str`, *optional*): The model's family as in `vidtrl.models.families`, such as `"wan"`. Default: what the
            directory's `vidtrl.json` says.
        alpha_keys (`bool`, *optional*): Write the scale as `alpha` keys, or multiply it into the weights. Default: keys,
            unless diffusers' loader of this family's layout refuses files that have them (LTX, HunyuanVideo).

    Returns:
        `list[Path]`: The files written.

    Raises:
        `ValueError`: No adapter there, the family is not known or has no map, or the adapter has what the layout cannot
            hold (DoRA, biases, layers outside the map). The message says which and what to do.
        [`HubError`]: The Hub refused, or could not be reached.

    Example:

    ```python
    >>> from vidtrl.hub import export_comfyui

    >>> export_comfyui("wan-grpo", "ComfyUI/models/loras/wan-grpo.safetensors")
    [PosixPath('ComfyUI/models/loras/wan-grpo.safetensors')]
    ```
    """
    files, directory = _adapter_files(source)
    key_map = _key_map(family, directory)
    if below := sorted(directory.glob("base_adapters/*/*.safetensors")):
        logger.warning(
            f"this adapter was trained upon {len(below)} of earlier stages: export them as well, with the family named "
            f"({', '.join(map(str, below))}), and load all of them in ComfyUI"
        )
    output = Path(output)
    if output.suffix != ".safetensors":
        output = output / f"{Path(os.fspath(source)).resolve().name.removesuffix('.safetensors')}.safetensors"
    written = []
    for file in files:
        weights = to_comfyui(*_read(file), key_map, alpha_keys)
        noise = next((f"_{level}" for level in ("high_noise", "low_noise") if file.stem.endswith(level)), "")
        path = output.with_name(f"{output.stem.removesuffix(noise)}{noise}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        save_file(weights, partial, metadata={"format": "pt"})
        partial.replace(path)
        written.append(path)
    return written


def to_comfyui(
    weights: Mapping[str, Tensor], config: Mapping, key_map: KeyMap, alpha_keys: bool | None = None
) -> dict[str, Tensor]:
    """
    Translate an adapter.

    Args:
        weights (`Mapping[str, Tensor]`): Of diffusers' file without its prefix, `LAYER.lora_A.weight` (rank, inputs) and
            `LAYER.lora_B.weight` (outputs, rank).
        config (`Mapping`): Its PEFT configuration; empty means `lora_alpha == r`.
        key_map ([`KeyMap`]): The family's.
        alpha_keys (`bool`, *optional*): As in [`export_comfyui`].

    Returns:
        `dict[str, Tensor]`: `diffusion_model.LAYER.lora_down.weight`, `.lora_up.weight` and `.alpha`; without `alpha_keys`,
            `.lora_A.weight` and `.lora_B.weight`.

    Raises:
        `ValueError`: As in [`export_comfyui`].
    """
    alpha_keys = key_map.alpha_keys if alpha_keys is None else alpha_keys
    pairs = _pairs(weights, config)
    names = {name: _pattern(name) for name in pairs}
    parts = {ours: theirs for theirs, members in key_map.fused.items() for ours, _ in members}
    unknown = sorted(set(names.values()) - key_map.layers.keys() - parts.keys())
    if unknown:
        raise ValueError(
            f"the ComfyUI layout of this family has no place for {', '.join(unknown)}: train without these layers "
            "(LoraConfig without target_modules takes those inside the blocks), or merge the adapter into the weights"
        )
    layers: dict[str, tuple[Tensor, Tensor, float]] = {}
    groups: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
    for name, pattern in names.items():
        down, up, scale = pairs[name]
        if pattern in key_map.swapped:
            up = torch.cat(up.chunk(2)[::-1])
        number = name.split(".")[1] if pattern != name else ""
        if pattern in parts:
            groups.setdefault(parts[pattern].replace("{n}", number), {})[pattern] = down, up, scale
        else:
            layers[key_map.layers[pattern].replace("{n}", number)] = down, up, scale
    for name, members in groups.items():
        layers[name] = _fuse(key_map.fused[_pattern(name)], members)
    # ComfyUI reads both spellings; diffusers reads the second one where there is no alpha
    names = ("lora_down", "lora_up") if alpha_keys else ("lora_A", "lora_B")
    result = {}
    for name, (down, up, scale) in layers.items():
        key, keep = f"{COMFYUI_PREFIX}{name}", alpha_keys and _pattern(name) != name
        up = up if keep else (up.float() * scale).to(up.dtype)
        result |= {f"{key}.{n}.weight": value.contiguous() for n, value in zip(names, (down, up), strict=True)}
        if keep:
            result[f"{key}.alpha"] = torch.tensor(scale * down.shape[0])
    return result


def _pattern(layer: str) -> str:
    return re.sub(r"^(\w+)\.\d+\.", r"\1.{n}.", layer)


def _pairs(weights: Mapping[str, Tensor], config: Mapping) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer: (lora_A, lora_B, scale)}."""
    strange = sorted(name for name in weights if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if any("magnitude" in name for name in strange):
        raise ValueError(
            "this is a DoRA adapter, and its magnitudes have no place in the layout that ComfyUI and diffusers share: train "
            "without use_dora, or merge the adapter into the weights (pipe.fuse_lora)"
        )
    if strange:
        raise ValueError(f"the ComfyUI layout holds LoRA weights alone, and there is {', '.join(strange[:3])}")
    pairs = {}
    for name in weights:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up = weights[name], weights[f"{layer}.lora_B.weight"]
            pairs[layer] = down, up, _scale(layer, down.shape[0], config)
    return pairs


def _scale(layer: str, rank: int, config: Mapping) -> float:
    """What PEFT multiplies `lora_B @ lora_A` by: alpha / r, with rsLoRA alpha / sqrt(r)
    (https://huggingface.co/papers/2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), config.get("lora_alpha", rank)
    )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fuse(
    members: tuple[tuple[str, int], ...], adapters: Mapping[str, tuple[Tensor, Tensor, float]]
) -> tuple[Tensor, Tensor, float]:
    """One adapter for all members; what has none gets zeros."""
    scales = {scale for _, _, scale in adapters.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0  # different ones go into the weights
    inputs = next(iter(adapters.values()))[0].shape[1]
    width = max(up.shape[0] for _, up, _ in adapters.values())
    downs, ups, rank = [], [], 0
    for name, factor in members:
        if name not in adapters:
            ups.append((factor * inputs or width, 0, None))
            continue
        down, up, own = adapters[name]
        up = up if own == scale else (up.float() * own).to(up.dtype)
        downs.append(down)
        ups.append((up.shape[0], rank, up))
        rank += down.shape[0]
    fused = downs[0].new_zeros(sum(rows for rows, _, _ in ups), rank)
    row = 0
    for rows, first, up in ups:
        if up is not None:
            fused[row : row + rows, first : first + up.shape[1]] = up
        row += rows
    return torch.cat(downs), fused, scale


def _adapter_files(source: str | os.PathLike) -> tuple[list[Path], Path]:
    """The adapter files of a source and the directory they are in."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path], path.parent
    if not path.is_dir():
        name = os.fspath(source)
        if isinstance(source, Path) or not is_hub_id(name):
            raise ValueError(f"there is nothing at {name!r} (and a Hub id looks like 'organisation/name')")
        wanted = {"allow_patterns": ["*.safetensors", MANIFEST], "ignore_patterns": "*checkpoint*"}
        path = Path(retried(lambda: snapshot_download(name, **wanted), f"cannot pull {name}"))
    files = [path / name for name in (ADAPTER_FILE, *EXPERT_FILES.values()) if (path / name).is_file()]
    if not files:
        raise ValueError(
            f"there is no {ADAPTER_FILE} in {os.fspath(source)!r}: the ComfyUI layout is for adapters. A model whose weights were "
            "all trained goes to ComfyUI as a checkpoint"
        )
    return files, path


def _key_map(family: str | None, directory: Path) -> KeyMap:
    if family is None:
        manifest = directory / MANIFEST
        pipeline = json.loads(manifest.read_text()).get("model", {}).get("pipeline") if manifest.is_file() else None
        if pipeline is None:
            raise ValueError(
                f"{directory} does not say which model its adapter is for (no {MANIFEST}): pass family (--family), one of "
                f"{', '.join(KEY_MAPS)}"
            )
        family = find_family(pipeline).name
    if family not in KEY_MAPS:
        known = family in {row.name for row in FAMILIES}
        raise ValueError(
            (
                f"no ComfyUI key map of the {family} family has been verified, and a guessed one would load without effect: "
                "use the adapter with diffusers"
                if known
                else f"there is no family {family!r}"
            )
            + f". Families with a map: {', '.join(KEY_MAPS)}"
        )
    return KEY_MAPS[family]


def _read(file: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights and configuration of an adapter file, both without diffusers' prefix."""
    with safe_open(file, framework="pt") as opened:
        weights = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return weights, {name.removeprefix(PREFIX): value for name, value in config.items()}
