"""Checkpoint directories: complete or absent, and only ever resumed by the run they belong to."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .ema import WeightAverage
from .sharding import fill


MANIFEST = "vidtrl.json"
ROLE_WEIGHTS = "roles.safetensors"
RAW_WEIGHTS = "training_weights.safetensors"  # beside an average, the weights that training itself continues from


def weights_fingerprint(module: nn.Module) -> str:
    """
    Tell checkpoints apart by a hash over names, shapes and the first values of all parameters.

    Values are rounded to bfloat16, so that a checkpoint loaded in another precision is still the same. Of quantised
    parameters only name and shape count: not every backend's tensors can be sliced, and there are others to go by.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach()
        if type(values) is torch.Tensor:
            values = values.flatten()[:32].cpu()
            if values.is_floating_point():
                values = values.to(torch.bfloat16).view(torch.int16)
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_identity(pipeline: str, name_or_path: str, denoisers: dict[str, nn.Module]) -> dict:
    """What makes two runs train the same base model, as plain JSON values. Call it before any weight changes."""
    denoiser = next(iter(denoisers.values()))
    config = {name: value for name, value in dict(denoiser.config).items() if not name.startswith("_")}
    config.pop("use_cache", None)  # transformers.Trainer writes this into the configuration of every model
    return {
        "pipeline": pipeline,
        "name_or_path": name_or_path,
        "denoiser": ", ".join(denoisers),
        "denoiser_class": type(denoiser).__name__,
        "denoiser_config": json.loads(json.dumps(config, default=str)),
        "base_weights": ", ".join(weights_fingerprint(module) for module in denoisers.values()),
    }


def differences(expected: dict, found: dict, prefix: str = "") -> list[str]:
    """One line for each value in which two manifests differ; a moved directory (`name_or_path`) is no difference."""
    lines = []
    for name in sorted(set(expected) | set(found)):
        ours, theirs = expected.get(name), found.get(name)
        if name == "name_or_path" or ours == theirs:
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lines += differences(ours, theirs, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: this run has {ours!r}, the directory has {theirs!r}")
    return lines


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(directory: Path, *, step: int, **identity: dict | None) -> None:
    """Describe a finished directory: whose run it is (model, adapter, data), and the size and hash of each file."""
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    content = {**identity, "step": step, "files": files}
    (directory / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True))


def claim_output_dir(output_dir: str | os.PathLike, identity: dict) -> None:
    """Note whose runs `output_dir` holds, and put in order what a run killed while saving has left there."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for replaced in output_dir.glob("_*.old"):  # killed inside `publish`
        final = output_dir / replaced.name.removeprefix("_").removesuffix(".old")
        if not final.exists():
            os.replace(replaced, final)
    for leftover in output_dir.glob("_checkpoint-*"):
        shutil.rmtree(leftover)
    unfinished = output_dir / f"_{MANIFEST}.tmp"
    unfinished.write_text(json.dumps({"model": identity}, indent=2, sort_keys=True))
    os.replace(unfinished, output_dir / MANIFEST)


def publish(staging: Path, final: Path) -> None:
    """
    Turn a fully written staging directory into `final`; a crash at any point leaves the old or the new one.

    Where `final` existed and the crash comes between the two renamings, `claim_output_dir` puts the old one back.
    """
    for path in [*staging.rglob("*"), staging]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    replaced = final.with_name(f"_{final.name}.old")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(staging, final)
    shutil.rmtree(replaced, ignore_errors=True)
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_denoiser(model: nn.Module, final: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """
    Write a diffusers model into a directory of its own, complete or not at all.

    Args:
        model (`nn.Module`): A diffusers model.
        final (`Path`): The directory; what was there is replaced.
        state_dict (`dict[str, torch.Tensor]`, *optional*): Weights that FSDP or ZeRO-3 gathered; default: the model's own.
    """
    staging = final.with_name(f"_{final.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    if state_dict is None:
        model.save_pretrained(staging)
    else:
        model.save_config(staging)
        weights = {name: value.cpu().contiguous() for name, value in state_dict.items()}
        save_file(weights, staging / "diffusion_pytorch_model.safetensors")
    publish(staging, final)


def save_average(average: WeightAverage, directory: Path) -> None:
    """
    Write the weights that training itself continues from; what is saved as the model's are their averages.

    Sharded weights are left to what writes the optimizer's shards, and their average to [`save_roles`].
    """
    sharded = average.engine is not None or any(isinstance(p, DTensor) for p in average.parameters.values())
    raw = {} if sharded else {name: p.detach().cpu() for name, p in average.parameters.items()}
    raw["num_updates"] = torch.tensor(average.num_updates)
    save_file(raw, directory / RAW_WEIGHTS)


def load_average(average: WeightAverage, directory: str | os.PathLike) -> None:
    """
    Read back what [`save_average`] wrote. The module holds the average before, and its own weights afterwards.

    Raises:
        `ValueError`: If the run had no average.
    """
    raw = Path(directory, RAW_WEIGHTS)
    if not raw.is_file():
        raise ValueError(f"cannot resume from {directory}: it was written without ema_decay")
    weights = load_file(raw)
    average.num_updates = int(weights.pop("num_updates"))
    if not weights:  # sharded
        return
    average.reset()
    with torch.no_grad():
        for name, parameter in average.parameters.items():
            parameter.copy_(weights[name])


def save_roles(weights: dict[str, Tensor], directory: Path) -> None:
    """Write the (whole) weights of further policies, if there are any."""
    if weights:
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, directory / ROLE_WEIGHTS)


def load_roles(weights: dict[str, Tensor], directory: str | os.PathLike) -> None:
    """Fill the weights of further policies, in place, from what [`save_roles`] wrote."""
    if weights:
        saved = load_file(Path(directory, ROLE_WEIGHTS))
        for name, tensor in weights.items():
            fill(tensor, saved[name])


def verify_checkpoint(directory: str | os.PathLike, **identity: dict | None) -> None:
    """
    Raise unless a checkpoint is whole and belongs to a run of this model, adapter and data.

    Raises:
        `ValueError`: If a file is missing, truncated or altered, or if model, adapter or data differ; says which and how.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"cannot resume: there is no checkpoint directory {directory}")
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        recorded = manifest["files"]
    except FileNotFoundError as error:
        raise ValueError(
            f"cannot resume from {directory}: it has no {MANIFEST}, so vidtrl did not write it (or not completely)"
        ) from error
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"cannot resume from {directory}: its {MANIFEST} is damaged ({error})") from error
    data = identity.pop("data")
    problems = differences(identity, {name: manifest.get(name) for name in identity})
    if problems:
        raise ValueError(f"cannot resume from {directory}: it belongs to another run. " + "; ".join(problems))
    problems = differences({"data": data}, {"data": manifest.get("data")})
    if problems:
        raise ValueError(
            f"cannot resume from {directory}: its run trains on other clips. {'; '.join(problems)}. To go on with these, "
            "start a new run from its weights: load them into the pipeline (an adapter: pipe.load_lora_weights, "
            "pipe.fuse_lora, pipe.unload_lora_weights) and pass that as model"
        )
    for name, expected in recorded.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        elif file_digest(path) != expected["sha256"]:
            problems.append(f"{name} was altered after it was written")
    if problems:
        raise ValueError(
            f"cannot resume from {directory}: it is damaged. " + "; ".join(problems) + ". Resume from an older one."
        )


def check_output_dir(output_dir: str | os.PathLike, identity: dict) -> None:
    """Raise if `output_dir` already holds the results of a run of another model."""
    for path in [Path(output_dir, MANIFEST), *sorted(Path(output_dir).glob(f"checkpoint-*/{MANIFEST}"))]:
        if path.is_file():
            problems = differences(identity, json.loads(path.read_text()).get("model") or {})
            if problems:
                raise ValueError(
                    f"output_dir {os.fspath(output_dir)!r} holds a run of another model; choose another directory. "
                    + "; ".join(problems)
                )
