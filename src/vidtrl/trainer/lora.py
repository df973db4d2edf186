"""LoRA on a diffusers denoiser: which layers by default, and files that `pipe.load_lora_weights` reads."""

import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence

from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


ADAPTER_FILE = "pytorch_lora_weights.safetensors"
# of a run that trains both experts of a model; diffusers loads the second with `load_into_transformer_2=True`
EXPERT_FILES = {
    "transformer": "pytorch_lora_weights_high_noise.safetensors",
    "transformer_2": "pytorch_lora_weights_low_noise.safetensors",
}
PREFIX = "transformer."  # diffusers prefixes the weights of every video denoiser with this, also the second expert's


def repeated_blocks(denoiser: nn.Module) -> dict[str, nn.ModuleList]:
    """
    The denoiser's stacks of transformer blocks, by attribute name.

    Only direct children count: a token refiner inside the text embedder is also a `ModuleList`, but no repeated block
    of the denoiser.
    """
    stacks = {name: child for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList)}
    return {
        name: stack
        for name, stack in stacks.items()
        if any(isinstance(module, nn.Linear) for module in stack.modules())
    }


def default_target_modules(denoiser: nn.Module) -> str:
    """
    The default LoRA targets: every Linear layer inside the repeated blocks, as a regular expression for PEFT.

    A list of suffixes such as `["to_q", ...]` would also hit text-token refiners and time-embedding poolers of several
    families.

    Example:

    ```python
    >>> default_target_modules(pipe.transformer)
    '(blocks)\\.\\d+\\.(attn1\\.to_k|attn1\\.to_out\\.0|...)'
    ```
    """
    stacks = repeated_blocks(denoiser)
    inside = {
        name.removesuffix(".base_layer")  # of a layer that carries an adapter already
        for stack in stacks.values()
        for block in stack
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    if not inside:
        raise ValueError(
            f"{type(denoiser).__name__} has no repeated block with Linear layers: name the layers yourself in "
            "LoraConfig(target_modules=...)"
        )
    return rf"({'|'.join(stacks)})\.\d+\.({'|'.join(re.escape(name) for name in sorted(inside))})"


def add_lora(denoiser: nn.Module, config: LoraConfig) -> PeftModel:
    """
    Freeze the denoiser and inject a LoRA (or DoRA) adapter named `"default"` into it, in place.

    Args:
        denoiser (`nn.Module`): The denoiser of a pipeline. Adapters that it carries already stay under the new one.
        config (`LoraConfig`): Without `target_modules`, [`default_target_modules`] is used.

    Returns:
        `PeftModel`: A wrapper; the pipeline's own denoiser carries the adapter as well.

    Raises:
        `ValueError`: If a target matches no layer, or the denoiser already has an adapter of that name.
    """
    if "default" in active_adapters(denoiser):
        raise ValueError(
            f"{type(denoiser).__name__} already carries an adapter named 'default', the name of the one to train: load it "
            "with another adapter_name, or merge it with pipe.fuse_lora() and pipe.unload_lora_weights()"
        )
    targets = config.target_modules
    if targets is None:
        config = dataclasses.replace(config, target_modules=default_target_modules(denoiser))
    else:
        names = [name for name, _ in denoiser.named_modules()]
        wanted = [targets] if isinstance(targets, str) else sorted(targets)
        missing = [
            target
            for target in wanted
            if target != "all-linear"
            and not any(
                re.fullmatch(target, name)
                if isinstance(targets, str)
                else name == target or name.endswith(f".{target}")
                for name in names
            )
        ]
        if missing:
            linear = {
                re.sub(r"\.\d+\.", ".N.", name)
                for name, module in denoiser.named_modules()
                if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"LoRA target {', '.join(map(repr, missing))} matches no layer of {type(denoiser).__name__}. "
                f"Its Linear layers (N is a number): {', '.join(sorted(linear))}. Leave target_modules unset for those "
                "inside the repeated blocks."
            )
    denoiser.requires_grad_(False)
    with one_more_adapter():
        return get_peft_model(denoiser, config)


@contextlib.contextmanager
def one_more_adapter() -> Iterator[None]:
    """Without PEFT's warnings that a model has an adapter already: they stack here, as each stage's is saved for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model")
        yield


def active_adapters(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that take part in the denoiser's forward, in their order."""
    names: dict[str, None] = {}
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
            names |= dict.fromkeys(layer.active_adapters)
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class BaseAdapter:
    """
    An adapter of an earlier stage, as it was loaded.

    Args:
        source (`str`): Directory, file or Hub id.
        denoiser (`str`): Into which denoiser.
        name (`str`): Its name there.
        weight_name (`str`, *optional*): The file in `source`, where it holds one for each expert.
    """

    source: str
    denoiser: str
    name: str
    weight_name: str | None = None


def load_base_adapters(pipe: DiffusionPipeline, denoisers: Sequence[str], adapters: list[str]) -> list[BaseAdapter]:
    """
    Load adapters with diffusers' own loader and switch all of them on, beside those that are on already.

    Where a model has two experts, a directory with a file for each gives each its own; a single file belongs to the expert
    that it was trained for, or that its name says (`high_noise`, `low_noise`).

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        denoisers (`Sequence[str]`): Which of its denoisers they are for.
        adapters (`list[str]`): Directories, files or Hub ids.

    Returns:
        `list[BaseAdapter]`: What was loaded into what.

    Raises:
        `ValueError`: If an adapter cannot be found, or is not for these denoisers.
    """
    loaded, two_experts = [], pipe.components.get("transformer_2") is not None
    names = {denoiser: list(active_adapters(getattr(pipe, denoiser))) for denoiser in denoisers}
    for i, adapter in enumerate(adapters):
        if adapter.startswith((".", "/", "~")) and not os.path.exists(os.path.expanduser(adapter)):
            raise ValueError(f"base_adapters: there is no adapter at {adapter!r}")
        try:
            files = _files_of_experts(adapter, denoisers) if two_experts else {denoisers[0]: None}
            for denoiser, file in files.items():
                with one_more_adapter():
                    load_lora(pipe, denoiser, os.path.expanduser(adapter), f"base_{i}", file)
                names[denoiser].append(f"base_{i}")
                loaded.append(BaseAdapter(adapter, denoiser, f"base_{i}", file))
        except OSError as error:
            raise ValueError(f"base_adapters: cannot load {adapter!r}: {error}") from error
    for denoiser, active in names.items():
        for layer in getattr(pipe, denoiser).modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter(active)
    return loaded


def load_lora(
    pipe: DiffusionPipeline, denoiser_name: str, source: str, adapter_name: str, weight_name: str | None = None
) -> None:
    """
    Load an adapter with the pipeline's LoRA loader; without one (HunyuanVideo 1.5) with the denoiser's, else with PEFT.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        denoiser_name (`str`): Into which of its denoisers.
        source (`str`): Directory, file or Hub id.
        adapter_name (`str`): Its name there.
        weight_name (`str`, *optional*): Which file of a directory or repository.
    """
    denoiser = getattr(pipe, denoiser_name)
    loader = lora_loader(pipe, denoiser)
    file = {} if weight_name is None else {"weight_name": weight_name}
    if loader == "pipeline":
        second = {"load_into_transformer_2": True} if denoiser_name == "transformer_2" else {}
        pipe.load_lora_weights(source, adapter_name=adapter_name, **file, **second)
        return
    path = source if os.path.isfile(source) else find_file(source, weight_name or ADAPTER_FILE)
    if path is None:
        raise FileNotFoundError(f"there is no {weight_name or ADAPTER_FILE} in {source!r}")
    if loader == "denoiser":
        # without weight_name, diffusers 0.42 does not read the file's metadata here, and the adapter's scale is lost
        folder, file_name = os.path.split(path)
        prefix = PREFIX.removesuffix(".")
        denoiser.load_lora_adapter(folder, weight_name=file_name, prefix=prefix, adapter_name=adapter_name)
        return
    with safe_open(path, framework="pt") as opened:
        config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if not config:
        raise ValueError(
            f"{source!r} does not say its rank and scale, and {type(pipe).__name__} has no LoRA loader in diffusers that would "
            "guess them: merge the adapter into the weights"
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    config = {name: value for key, value in config.items() if (name := key.removeprefix(PREFIX)) in known}
    inject_adapter_in_model(LoraConfig(**config), denoiser, adapter_name=adapter_name)
    weights = {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}
    set_peft_model_state_dict(denoiser, weights, adapter_name=adapter_name)


def find_file(source: str, name: str) -> str | None:
    """The path of a file in a directory or (downloaded) of a Hub repository; `None` if it has none of that name."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(source, name)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def _files_of_experts(adapter: str, denoisers: Sequence[str]) -> dict[str, str | None]:
    """{denoiser: file in `adapter`}; `None` for the only file."""
    source = os.path.expanduser(adapter)
    if not os.path.isfile(source):
        found = {d: name for d, name in EXPERT_FILES.items() if find_file(source, name)}
        if missing := [EXPERT_FILES[d] for d in denoisers if found and d not in found]:
            raise ValueError(f"base_adapters: there is no {missing[0]} in {adapter!r}")
        if found:
            return {d: found[d] for d in denoisers}
    owner = _expert_of_file(source if os.path.isfile(source) else find_file(source, ADAPTER_FILE))
    if owner is None and len(denoisers) > 1:
        raise ValueError(
            f"base_adapters: {adapter!r} does not say which of the two experts it is for: pass a file whose name has "
            "high_noise or low_noise in it, or train one expert (experts='high' or 'low')"
        )
    if owner is not None and owner not in denoisers:
        raise ValueError(
            f"base_adapters: {adapter!r} is for the {owner}, which this run does not train: set experts='both', or leave "
            "it out"
        )
    return {owner or denoisers[0]: None}


def _expert_of_file(path: str | None) -> str | None:
    if path is None:
        return None
    for name, denoiser in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        if name in os.path.basename(path):
            return denoiser
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("denoiser")


def save_adapter(
    model: PeftModel,
    directory: str | os.PathLike,
    state_dict: dict | None = None,
    name: str = "default",
    file: str = ADAPTER_FILE,
    denoiser: str | None = None,
) -> None:
    """
    Write the adapter as stock diffusers loads it, with its configuration in the file's metadata.

    Without the metadata `load_lora_weights` assumes `lora_alpha == r` and silently rescales the adapter. Written here
    and not through `pipe.save_lora_weights`, because some pipelines have no LoRA loader and all get the same file.

    Args:
        model (`PeftModel`): The model that carries the adapter.
        directory (`str` or `PathLike`): Where `pytorch_lora_weights.safetensors` goes; must exist.
        state_dict (`dict`, *optional*): Weights that FSDP or ZeRO-3 gathered; default: the model's own.
        name (`str`, *optional*, defaults to `"default"`): Which of the model's adapters.
        file (`str`, *optional*): The file's name, of [`EXPERT_FILES`] where both experts of a model are trained.
        denoiser (`str`, *optional*): Which denoiser of a two-expert model it is for; noted in the file.
    """
    if state_dict is not None:
        state_dict = {name.removeprefix("base_model.model."): value for name, value in state_dict.items()}
    weights = get_peft_model_state_dict(model.get_base_model(), state_dict=state_dict, adapter_name=name)
    weights = {PREFIX + name: value.detach().cpu().contiguous() for name, value in weights.items()}
    config = model.peft_config[name].to_dict()
    metadata = {PREFIX + name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    path = os.path.join(directory, file)
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)}
    metadata |= {} if denoiser is None else {"denoiser": denoiser}
    save_file(weights, path + ".tmp", metadata=metadata)
    os.replace(path + ".tmp", path)  # a crash or a full disk leaves the file that was there


def load_adapter(model: PeftModel, directory: str | os.PathLike, file: str = ADAPTER_FILE) -> None:
    """
    Read back what [`save_adapter`] wrote, into the adapter `"default"` of the same shape.

    Raises:
        `ValueError`: If there is none, or its weights do not fit or would be scaled in another way.
    """
    path = os.path.join(os.path.expanduser(directory), file)
    if not os.path.isfile(path):
        raise ValueError(f"there is no {file} in {os.fspath(directory)!r}")
    with safe_open(path, framework="pt") as file:
        saved = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    summary = adapter_summary(model)
    names = ("r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    different = [n for n in names if PREFIX + n in saved and saved[PREFIX + n] != summary.get(n)]
    if different:
        values = ", ".join(f"{n}={saved[PREFIX + n]!r} (this run has {summary.get(n)!r})" for n in different)
        raise ValueError(f"the adapter in {os.fspath(directory)!r} has {values}: pass that in peft_config")
    weights = load_file(path)
    result = set_peft_model_state_dict(
        model.get_base_model(), {name.removeprefix(PREFIX): value for name, value in weights.items()}
    )
    expected = {PREFIX + name for name in get_peft_model_state_dict(model.get_base_model())}
    if result.unexpected_keys or expected != set(weights):
        raise ValueError(
            f"{directory} does not fit this run's adapter. Only in the file: "
            f"{sorted(set(weights) - expected)[:4]}; only in the run: {sorted(expected - set(weights))[:4]}"
        )


def adapter_summary(model: PeftModel) -> dict:
    """What two adapters must share for one's weights to fit and mean the same in the other."""
    config = model.peft_config["default"].to_dict()
    names = ("peft_type", "r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "bias", "rank_pattern")
    names += ("alpha_pattern", "modules_to_save", "lora_dropout")
    plain = {name: config[name] for name in names if name in config}
    return json.loads(json.dumps(plain, default=sorted, sort_keys=True))


def lora_loader(pipe: DiffusionPipeline, denoiser: nn.Module) -> str:
    """Which object of diffusers loads an adapter file: `"pipeline"`, `"denoiser"` or `"none"`."""
    if isinstance(pipe, LoraBaseMixin):
        return "pipeline"
    return "denoiser" if isinstance(denoiser, PeftAdapterMixin) else "none"
