"""Videos with what is known about them, as datasets on the Hub: rollouts, preferences, clips for fine-tuning.

A dataset is a folder of mp4 files with a `metadata.jsonl` (the layout VideoFolder of `datasets`), which the Hub's viewer plays
and `load_dataset` reads back. VideoFolder knows no other files than videos: images, such as those that image-to-video
models start from, are embedded in the rows, which are a `metadata.parquet` then.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, IterableDataset, Video
from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi
from PIL import ImageOps

from ..data.video import load_image, probe_video, source_name
from .upload import create_repository, place, push_folder


# the container formats that both VideoFolder and browsers know
PLAYABLE = (".mp4", ".mov")
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
ROWS = 100  # in a row group of metadata.parquet: so many images are in memory at once
KINDS = {
    "rollouts": (
        ("video",),
        "videos that a model generated while it was trained, with the rewards and advantages they got",
    ),
    "preferences": (("chosen", "rejected"), "pairs of videos of one prompt, of which one is preferred"),
    "sft": (("video",), "captioned clips for supervised fine-tuning"),
}


def push_rollouts(
    source: str | os.PathLike | Dataset | IterableDataset | Iterable[Mapping[str, Any]],
    repo_id: str,
    *,
    steps: Iterable[int] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Upload what a run generated: prompt, video, every reward, advantage, step and seed.

    Args:
        source: A run's `output_dir` with `log_completions=True`, its `completions` folder, or rows with `prompt` and
            `video` (file, or `{"path", "bytes"}`) and any further columns, of which `image`, and those of PIL images or of
            the feature `Image`, hold images (a path, bytes, `{"path", "bytes"}` or PIL), or `None`.
        repo_id (`str`): `"name"` or `"organisation/name"`; created if missing.
        steps (`Iterable[int]`, *optional*): Only these steps.
        private (`bool`, *optional*): Of a repository that is created; one that exists has to be private then. Default: as the
            account says.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the one `hf auth login` stored.
        revision (`str`, *optional*): Branch; created if missing. Default: `main`.
        commit_message (`str`, *optional*): Title of the commit.

    Returns:
        `CommitInfo`: The commit; as a `str` its address.

    Raises:
        `ValueError`: No rows, a row without prompt, a video that the viewer cannot play, or an image that cannot be read; the
            message names the row.
        [`HubError`]: The Hub refused, or could not be reached.

    Example:

    ```python
    >>> from vidtrl.hub import push_rollouts

    >>> push_rollouts("wan-grpo", "me/wan-grpo-rollouts", steps=[100, 200])
    ```
    """
    if isinstance(source, (str, os.PathLike)) and Path(source, "completions").is_dir():
        source = Path(source, "completions")
    wanted = None if steps is None else set(steps)

    def chosen(row: Mapping[str, Any]) -> bool:
        return wanted is None or row.get("step") in wanted

    return _push("rollouts", source, repo_id, chosen, private, token, revision, commit_message)


def push_preferences(
    source: str | os.PathLike | Dataset | IterableDataset | Iterable[Mapping[str, Any]],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Upload preferences: rows of `prompt` and the videos `chosen` and `rejected`.

    Args:
        source: What `vidtrl compare --export` wrote, or rows as for [`push_rollouts`].
        repo_id, private, token, revision, commit_message: As for [`push_rollouts`].

    Returns:
        `CommitInfo`: The commit; as a `str` its address.

    Raises:
        `ValueError`, [`HubError`]: As [`push_rollouts`].
    """
    return _push("preferences", source, repo_id, lambda row: True, private, token, revision, commit_message)


def push_sft(
    source: str | os.PathLike | Dataset | IterableDataset | Iterable[Mapping[str, Any]],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Upload captioned clips: rows of `prompt` and `video`, for image-to-video models also `image`.

    Args:
        source: A folder with `metadata.jsonl`, whose column `image` holds paths inside it, or rows as for [`push_rollouts`].
        repo_id, private, token, revision, commit_message: As for [`push_rollouts`].

    Returns:
        `CommitInfo`: The commit; as a `str` its address.

    Raises:
        `ValueError`, [`HubError`]: As [`push_rollouts`].
    """
    return _push("sft", source, repo_id, lambda row: True, private, token, revision, commit_message)


def _push(kind, source, repo_id, chosen, private, token, revision, commit_message) -> CommitInfo:
    with tempfile.TemporaryDirectory() as staging:
        rows = write_video_folder(kind, source, Path(staging), chosen)
        api = HfApi(token=token)
        repo_id = create_repository(api, repo_id, "dataset", private, revision)
        dataset_card(kind, repo_id, rows).save(Path(staging, "README.md"))
        message = commit_message or f"Upload {len(rows)} rows"
        return push_folder(api, staging, repo_id, "dataset", revision, message)


def write_video_folder(kind: str, source: Any, folder: Path, chosen=lambda row: True) -> list[dict[str, Any]]:
    """
    Write rows with videos as VideoFolder reads them.

    Args:
        kind (`str`): `"rollouts"`, `"preferences"` or `"sft"`.
        source: As for [`push_rollouts`].
        folder (`Path`): An empty one.
        chosen (`Callable`, *optional*): Which rows.

    Returns:
        `list[dict]`: The rows as written to `metadata.jsonl`. If there are images, the rows are in `metadata.parquet`, and an
            image is the `Path` that its file had.

    Raises:
        `ValueError`: As [`push_rollouts`].
    """
    columns, rows = KINDS[kind][0], []
    for row in filter(chosen, _rows(source)):
        number, written = len(rows), {}
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"row {number} has no prompt: its columns are {', '.join(row)}")
        if missing := [column for column in columns if row.get(column) is None]:
            raise ValueError(
                f"row {number} has no {missing[0]!r}: {kind} are rows of prompt, {' and '.join(columns)}; its columns are "
                f"{', '.join(row)}"
            )
        for column in columns:
            # the Hub takes no more than 10 000 files in a folder
            name = f"videos/{number // 1000:03d}/{number:06d}{'' if column == 'video' else f'-{column}'}"
            written["file_name" if column == "video" else f"{column}_file_name"] = _place(
                row[column], folder, name, number
            )
        for name, value in row.items():
            if name not in columns:
                place = folder / "images" / name / f"{number:06d}"
                written[name] = _place_image(value, place, number) if _is_image(name, value) else _plain(value)
        rows.append(written)
    if not rows:
        raise ValueError("there is nothing to upload: no rows, or none of the steps that were asked for")
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]  # VideoFolder takes the columns of the first
    if images := _images(rows):
        _write_parquet(rows, images, folder / "metadata.parquet")
        shutil.rmtree(folder / "images")
    else:
        with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
    return rows


def _images(rows: list[dict[str, Any]]) -> list[str]:
    """The columns of images."""
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, Path)))


def _write_parquet(rows: list[dict[str, Any]], images: list[str], path: Path) -> None:
    """Rows with the images embedded, as the feature `Image` of `datasets` has them."""
    plain = pa.Table.from_pylist([{name: v for name, v in row.items() if name not in images} for row in rows])
    schema = Features(Features.from_arrow_schema(plain.schema) | dict.fromkeys(images, Image())).arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), ROWS):
            part = plain.slice(start, ROWS)
            for name in images:
                files = [row[name] for row in rows[start : start + ROWS]]
                embedded = [f and {"bytes": f.read_bytes(), "path": f.name} for f in files]
                part = part.append_column(name, pa.array(embedded, schema.field(name).type))
            writer.write_table(part.cast(schema))


def _rows(source: Any) -> Iterable[Mapping[str, Any]]:
    """Rows in which videos are files or `{"path", "bytes"}`."""
    if isinstance(source, (str, os.PathLike)):
        return _rows_of_folder(Path(source).expanduser())
    if isinstance(source, (Dataset, IterableDataset)):
        for name, feature in (source.features or {}).items():
            if isinstance(feature, (Video, Image)):
                source = source.cast_column(name, type(feature)(decode=False))
    return source


def _rows_of_folder(folder: Path) -> Iterable[dict[str, Any]]:
    path = metadata_file(folder)
    if path is None:
        raise ValueError(f"there is no metadata.jsonl in {os.fspath(folder)!r}: give a folder of videos that has one")

    def inside(name: str) -> Path:
        file = PurePosixPath(name)
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"{path} names {name!r}, which lies outside its folder")
        return folder / file

    for row in _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path):
        for name in [n for n in row if (n == "file_name" or n.endswith("_file_name")) and row[n] is not None]:
            row["video" if name == "file_name" else name.removesuffix("_file_name")] = inside(row.pop(name))
        for name, value in row.items():
            if isinstance(value, Mapping) and value.keys() == {"path", "bytes"} and value["bytes"] is None:
                row[name] = value["path"] and inside(value["path"])
            elif name == "image" and isinstance(value, str):
                row[name] = inside(value)
        yield row


def metadata_file(folder: Path) -> Path | None:
    """What says which rows a folder of videos has, if there is one."""
    return next((p for name in ("jsonl", "parquet") if (p := folder / f"metadata.{name}").is_file()), None)


def _read_lines(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): a prompt may hold U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {os.fspath(path)!r} is no JSON ({error}): write it again") from None


def _read_parquet(path: Path) -> Iterable[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(ROWS):
        yield from batch.to_pylist()


def _place(video: Any, folder: Path, name: str, number: int) -> str:
    """Put a video under a name of its own; its path in the folder."""
    shown = source_name(video)
    probe_video(video)  # raises, and names the file, where there is no video
    data, path = (video.get("bytes"), video.get("path")) if isinstance(video, Mapping) else (None, video)
    if isinstance(video, (bytes, bytearray)):
        data, path = bytes(video), None
    if not isinstance(path, (str, os.PathLike, type(None))) or (data is None and path is None):
        raise ValueError(
            f"row {number}: {shown} is no file: write it with vidtrl.data.write_video, whose mp4 files the viewer plays"
        )
    end = ".mp4" if path is None else Path(path).suffix.lower()
    if end not in PLAYABLE:
        raise ValueError(
            f"row {number}: {shown} is a {end or 'file without ending'}, which browsers do not play: convert it to mp4 (h264), as "
            "vidtrl.data.write_video writes it"
        )
    target = folder / f"{name}{end}"
    if data is None:
        place(Path(path), target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return f"{name}{end}"


def _is_image(name: str, value: Any) -> bool:
    embedded = isinstance(value, Mapping) and value.keys() == {"path", "bytes"}
    return isinstance(value, PIL.Image.Image) or embedded or (name == "image" and value is not None)


def _place_image(image: Any, path: Path, number: int) -> Path:
    """Put an image, as the file it is, beside the others of its column; where."""
    try:
        load_image(image)  # raises, and names the file, where there is no image
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    data, source = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (None, image)
    if isinstance(image, PIL.Image.Image):
        upright = ImageOps.exif_transpose(image)
        upright = upright if upright.mode in PNG_MODES else upright.convert("RGB")
        upright.save(path := path.with_suffix(".png"), "PNG")
    elif data is not None or isinstance(source, bytes):
        path.write_bytes(source if data is None else data)
    else:
        place(Path(source), path := path.with_suffix(Path(source).suffix.lower()))
    return path


def _plain(value: Any) -> Any:
    """As JSON has it; NaN and infinity, which it does not have, are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return _plain(value.tolist())
    return str(value)


def dataset_card(kind: str, repo_id: str, rows: list[dict[str, Any]]) -> DatasetCard:
    """
    The card of a dataset.

    Args:
        kind (`str`): `"rollouts"`, `"preferences"` or `"sft"`.
        repo_id (`str`): Where it will be.
        rows (`list[dict]`): From [`write_video_folder`].

    Returns:
        `DatasetCard`
    """
    number = len(rows)
    sizes = (("n<1K", 1e3), ("1K<n<10K", 1e4), ("10K<n<100K", 1e5), ("100K<n<1M", 1e6))
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        tags=["vidtrl", "video", kind],
        task_categories=["text-to-video"],
        size_categories=next((name for name, limit in sizes if number < limit), "1M<n<10M"),
        configs=[
            {
                "config_name": "default",
                "data_files": [f"metadata.{'parquet' if _images(rows) else 'jsonl'}", "videos/*/*"],
            }
        ],
    )
    columns = ["prompt", *KINDS[kind][0]]
    columns += [
        n for n in dict.fromkeys(n for row in rows for n in row) if n != "prompt" and not n.endswith("file_name")
    ]
    template = (files("vidtrl.hub") / "templates" / "dataset_card.md").read_text(encoding="utf-8")
    return DatasetCard.from_template(
        data, template_str=template, repo_id=repo_id, number=number, what=KINDS[kind][1], columns=columns
    )
