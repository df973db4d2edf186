"""Load a pipeline from a path or the Hub; what cannot work is refused in one line before gigabytes are read."""

import difflib
import os
from typing import Any

from diffusers import DiffusionPipeline

from .families import find_family


def pipeline_index(path: str, **hub: Any) -> dict[str, Any]:
    """The `model_index.json` of a supported family.

    Args:
        path: Hub id or local directory.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: nothing can be loaded from there, or the family is not supported.
    """
    _check_path(path)
    try:
        index = DiffusionPipeline.load_config(path, **hub)
    except OSError as error:
        raise ValueError(
            f"Cannot load a pipeline from {path!r}: it is neither a local directory with a model_index.json nor a Hub "
            "repository that is cached or can be reached. Check the spelling, the network and your token."
        ) from error
    find_family(index["_class_name"])
    return index


def load_pipeline(model: str | os.PathLike, **options: Any) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained` for a supported family.

    Raises:
        TypeError: `model` is neither a string nor a path.
        ValueError: nothing can be loaded from there, or the family is not supported.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a Hub id, a path or a diffusers pipeline, got {type(model).__name__}.")
    path = os.fspath(model)
    pipeline_index(
        path,
        **{k: options[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in options},
    )
    return DiffusionPipeline.from_pretrained(path, **options)


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's, `"organisation/name"`, and not that of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _check_path(path: str) -> None:
    """One clear line for a path that is not there, before the Hub is asked for it."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "model_index.json")):
            raise ValueError(f"{path!r} has no model_index.json; pass the directory that pipe.save_pretrained wrote.")
        return
    if os.path.isfile(path):
        raise ValueError(f"{path!r} is a file; pass the directory that pipe.save_pretrained wrote.")
    parent, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    siblings = os.listdir(parent) if os.path.isdir(parent) else []
    if hint := difflib.get_close_matches(name, siblings, 1):
        raise ValueError(
            f"No such directory: {path!r}; did you mean {os.path.join(os.path.dirname(path), hint[0])!r}?"
        )
    if not looks_like_hub_id(path) or siblings:
        raise ValueError(f"No such directory: {path!r} (and a Hub id looks like 'organisation/name').")
