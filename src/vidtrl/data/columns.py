"""Dataset columns: aliases to `prompt` and `video`, undecoded video columns, sidecar captions, and clear errors."""

import csv
import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, List, Value, Video

from .video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, source_name


# in order of preference; `txt` and `mp4` are what WebDataset shards call them
ALIASES = {
    "prompt": ("prompt", "caption", "text", "txt"),
    "video": ("video", "file_name", "video_path", "path", "mp4"),
}
PROTOCOLS = {"hf", "zip", "tar", "gzip"}  # others could be made to reach hosts of the user's own network


def standardize_columns(dataset, *, root: str | os.PathLike | None = None, prompts_only: bool = False):
    """
    Give a dataset the columns `prompt` and `video`, with the videos undecoded.

    `caption`, `text` and `txt` become `prompt`; `file_name`, `video_path`, `path` and `mp4` become `video`; a dataset with
    an `image` column and no video becomes one of one-frame videos. Without a prompt column, the caption of `clip.mp4` is
    read from `clip.txt` beside it. `datasets.Video` columns are cast to `decode=False`, so that torchcodec is not needed, and
    so is the `image` column of image-to-video data, so that a broken image does no harm before it is used.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or list of `dict`): One split.
        root (`str` or `PathLike`, *optional*): Directory of relative paths in the data, also of videos and images of which it has
            no bytes; they must stay inside it.
        prompts_only (`bool`, *optional*, defaults to `False`): For data without videos (GRPO, distillation).

    Returns:
        The same kind of dataset, with the other columns unchanged.

    Raises:
        `ValueError`: If a column is missing (the message suggests the nearest), a caption is empty, or a path leaves
            `root`.

    Example:

    ```python
    >>> dataset = standardize_columns(load_dataset("videofolder", data_dir="clips", split="train"))
    ```
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict, dict)):
        raise ValueError(f'pass one split, for example dataset["{next(iter(dataset), "train")}"], not the whole dict')
    columns = _column_names(dataset)
    if isinstance(dataset, IterableDataset) and any(
        isinstance(f, (Video, Image)) for f in (dataset.features or {}).values()
    ):
        # what streams from the Hub is decoded by threads as a first step (datasets 5.2), which no cast undoes
        dataset = dataset.decode(False).cast(dataset.features)
    if not prompts_only:
        video = _find(columns, "video")
        if video is None and "image" in columns and _nearest("video", columns) is None:
            video = "image"
        if video is None:
            raise ValueError(_missing("video", columns))
        dataset = _undecoded(_rename(dataset, columns, video, "video"), "video", root)
        columns = ["video" if column == video else column for column in columns]
    if "image" in columns:
        dataset = _undecoded(dataset, "image", root)
    prompt = _find(columns, "prompt")
    if prompt is not None:
        dataset = _rename(dataset, columns, prompt, "prompt")
    elif prompts_only:
        raise ValueError(_missing("prompt", columns))
    else:
        dataset = _add_sidecar_prompts(dataset, columns)
    if not isinstance(dataset, IterableDataset):
        _check_prompts(dataset["prompt"] if isinstance(dataset, Dataset) else [row["prompt"] for row in dataset])
    return dataset


def load_video_folder(directory: str | os.PathLike) -> Dataset:
    """
    Load a directory of clips and captions: `metadata.jsonl`, `.csv` or `.parquet`, or a `.txt` beside each clip.

    Args:
        directory (`str` or `PathLike`): Sub-directories are searched too; images are loaded as one-frame videos.

    Returns:
        `datasets.Dataset`: Columns `video` (undecoded), `prompt`, and the further columns of the metadata.

    Raises:
        `ValueError`: If the directory holds no clips, the metadata names a missing file or one outside the directory, or
            a caption is missing.

    Example:

    ```python
    >>> dataset = load_video_folder("clips")
    >>> dataset[0]["prompt"]
    'a red circle moving right'
    ```
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        if (directory / name).is_file():
            rows = _read_metadata(directory / name)
            break
    else:
        endings = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
        files = sorted(p for p in directory.rglob("*") if p.suffix.lower() in endings and p.is_file())
        rows = [{"video": str(p.relative_to(directory))} for p in files]
    if not rows:
        raise ValueError(
            f"{directory} holds no clips: expected metadata.jsonl, or files such as clip.mp4 with clip.txt"
        )
    rows = standardize_columns(rows, root=directory)
    for row in rows:
        if not os.path.isfile(row["video"]):
            raise ValueError(f"{row['video']} is named in the metadata of {directory} but does not exist")
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    dataset = Dataset.from_dict(columns)
    return dataset.cast_column("video", Video(decode=False))


def check_prompt(prompt, row: int | str) -> str:
    """Return the prompt, or raise a `ValueError` that names the row when it is empty or not text."""
    if not isinstance(prompt, str) or not prompt.strip():
        what = "is empty" if prompt is None or isinstance(prompt, str) else f"is a {type(prompt).__name__}"
        raise ValueError(
            f"the prompt of row {row} {what}; write a caption, or leave such rows out with "
            'dataset.filter(lambda row: row["prompt"])'
        )
    return prompt


def inside(root: str | os.PathLike, path: str) -> str:
    """
    Join `path` to `root`, refusing to leave it.

    The check is on the names: links below `root` (the Hub's cache is made of them) are the user's own.
    """
    root = os.path.abspath(root)
    joined = os.path.normpath(os.path.join(root, path))
    if os.path.commonpath([root, joined]) != root:
        raise ValueError(f"the path {path!r} leaves the dataset's directory {root}; only files inside it are read")
    return joined


def _column_names(dataset) -> list[str]:
    if isinstance(dataset, Dataset) or (isinstance(dataset, IterableDataset) and dataset.column_names):
        return list(dataset.column_names)
    if isinstance(dataset, (IterableDataset, list, tuple)):
        first = next(iter(dataset), None)
        if isinstance(first, dict):
            return list(first)
        if first is None:
            raise ValueError("the dataset is empty")
    raise TypeError(f"expected a datasets.Dataset, IterableDataset or list of dicts, got {type(dataset).__name__}")


def _find(columns: Iterable[str], target: str) -> str | None:
    return next((name for name in ALIASES[target] if name in columns), None)


def _missing(target: str, columns: list[str]) -> str:
    message = f'the dataset has no "{target}" column; its columns are: {", ".join(columns)}.'
    near = _nearest(target, columns)
    if near is not None:
        return f'{message} Did you mean "{near}"? Use dataset.rename_column("{near}", "{target}").'
    others = ", ".join(ALIASES[target][1:])
    return f'{message} Rename one with dataset.rename_column("...", "{target}"); {others} are understood too.'


def _nearest(target: str, columns: list[str]) -> str | None:
    """A column that looks like a misspelt name of `target`."""
    for name in ALIASES[target]:
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.7)
        if near:
            return near[0]
    return None


def _rename(dataset, columns, old, new):
    if old == new:
        return dataset
    if isinstance(dataset, (Dataset, IterableDataset)):
        return dataset.rename_column(old, new)
    return [{new if k == old else k: v for k, v in row.items()} for row in dataset]


def _undecoded(dataset, column, root):
    """Videos and images as `{"path", "bytes"}`; paths of files that are to be read are checked against `root`."""
    as_is = column == "image" and root is None  # paths are read when, and if, a model needs them
    if isinstance(dataset, (list, tuple)):
        return dataset if as_is else [{**row, column: _resolve(row.get(column), root)} for row in dataset]
    feature = (dataset.features or {}).get(column)
    if isinstance(feature, (Video, Image)):
        dataset = dataset.cast_column(column, type(feature)(decode=False))
        if isinstance(dataset, IterableDataset):
            # what streams from the Hub or an archive has the path of a remote file: read it when its row is asked for
            dataset = dataset.map(_fetched, fn_kwargs={"column": column}, features=dataset.features)
        if root is None:
            return dataset
        return dataset.map(lambda row: {column: _resolve(row[column], root)}, features=dataset.features)
    if isinstance(feature, List) and isinstance(feature.feature, Image):  # frames: decoded when a clip is read
        return dataset.cast_column(column, List(Image(decode=False)))
    if as_is:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row: {column: _resolve(row[column], root)})
    if feature == Value("string"):
        paths = [_resolve(path, root) for path in dataset[column]]
        return dataset.remove_columns(column).add_column(column, paths)
    return dataset


def _fetched(row, column):
    path = (row[column] or {}).get("path")
    if path is None or row[column].get("bytes") is not None or "://" not in path:
        return row
    protocols = set(re.findall(r"(\w+)://", path))
    if not protocols <= PROTOCOLS:
        raise ValueError(f"{path!r} is not on the Hub; download the file first")
    with fsspec.open(path, "rb") as file:
        return {**row, column: {"path": path, "bytes": file.read()}}


def _resolve(value, root):
    if root is not None and isinstance(value, dict) and value.get("bytes") is None and value.get("path") is not None:
        return {**value, "path": _resolve(value["path"], root)}
    if not isinstance(value, (str, os.PathLike)):
        return value
    value = os.fspath(value)
    if "://" in value:
        raise ValueError(f"{value!r} is a URL; download the file, or load it as a Hub dataset with a Video column")
    return inside(root, value) if root is not None else value


def _sidecar(source) -> str | None:
    path = source.get("path") if isinstance(source, dict) else source
    if not isinstance(path, (str, os.PathLike)):
        return None
    text = Path(path).with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else None


def _add_sidecar_prompts(dataset, columns):
    hint = " A file clip.txt beside clip.mp4 works as well."
    if isinstance(dataset, IterableDataset):
        if _sidecar(next(iter(dataset))["video"]) is None:
            raise ValueError(_missing("prompt", columns) + hint)
        features = Features({**dataset.features, "prompt": Value("string")}) if dataset.features else None
        return dataset.map(lambda row: {"prompt": _sidecar(row["video"])}, features=features)
    sources = list(dataset["video"]) if isinstance(dataset, Dataset) else [row["video"] for row in dataset]
    prompts = [_sidecar(source) for source in sources]
    without = [source_name(source) for source, prompt in zip(sources, prompts, strict=True) if prompt is None]
    if len(without) == len(prompts):
        raise ValueError(_missing("prompt", columns) + hint)
    if without:
        raise ValueError(f"{len(without)} of {len(prompts)} clips have no caption file; the first: {without[0]}")
    if isinstance(dataset, Dataset):
        return dataset.add_column("prompt", prompts)
    return [{**row, "prompt": prompt} for row, prompt in zip(dataset, prompts, strict=True)]


def _check_prompts(prompts) -> None:
    empty = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str) or not prompt.strip()]
    if len(empty) == 1:
        check_prompt(prompts[empty[0]], empty[0])
    if empty:
        some = ", ".join(map(str, empty[:5])) + (" ..." if len(empty) > 5 else "")
        raise ValueError(
            f"{len(empty)} prompts are empty or not text (rows {some}); write captions, or leave such rows out with "
            'dataset.filter(lambda row: row["prompt"])'
        )


def _read_metadata(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        rows = []
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        return rows
