"""The cache of latents and text conditions: what the frozen VAE and text encoder say, computed once per clip.

A cache directory holds safetensors shards and a Parquet index:

```
cache_dir/
  files.parquet                                   content hashes of the video files, so that they are not read again
  wan2.1-t2v-1.3b-3f9c0a6e51d2/                   one model and revision (`fingerprint.json` says which)
    latents-r0-00000-9d41c2aa.safetensors         <key>/mean, <key>/std: the posterior, normalised, float16
    conditions-r0-00000-9d41c2aa.safetensors      <key>/...: what the denoiser gets besides latents and timestep
    shared.5c1e....safetensors                    a tensor that many conditions share (rotary tables), by its hash
    index.parquet                                 key, kind, shard, clip, window, shape, prompt
```

A key is the SHA-256 of everything the entry depends on: the fingerprint of the model, the content of the file, window,
frame rate and shape, or the prompt and shape. A changed input has another key, so a stale entry is never read. A shard is
complete or absent (written under a temporary name, then renamed) and says itself what it holds: the index only saves
opening every shard. So an interrupted run resumes where it was killed, and processes that share the directory need no
lock.
"""

import copy
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch.utils.data import Dataset

from .dataset import load_clip
from .store import TEMPORARY, FileHashes, Store, is_content, read_entry, sha256_json, write_atomic
from .video import as_image, condition_image


logger = logging.getLogger(__name__)

FORMAT = 2  # part of every key: a change in what is stored must change it
WAIT_SECONDS = 10.0  # a network file system shows the files of other nodes with a delay
TEMPORARY_SECONDS = 24 * 3600  # older temporary files were left by killed processes
_LATENTS, _CONDITION, _OTHER = range(3)  # the three keys of an item; the last one's prompt is empty or negative


class CachedDataset(Dataset):
    """
    Clips as cached latents and conditions, read from disk on access; memory does not grow with the data.

    Items are dicts: `mean` and `std`, float16 `(C, f, h, w)`, the normalised posterior (absent with `text_only`);
    `condition`, a `(tensors, meta)` pair for `Condition.from_state`; `prompt`; `sample_id`; `bucket`; `index`.

    Made by [`build_cache`]. `shapes` lists the buckets' `(num_frames, height, width)`.

    Example:

    ```python
    >>> item = cached[0]
    >>> latents = item["mean"].float() + item["std"].float() * torch.randn(item["mean"].shape)
    ```
    """

    def __init__(self, directory, shapes, samples: list[tuple], shard_of: Callable[[str], str], text_only: bool):
        # samples: (sample_id, prompt, bucket, (latents key, condition key, key of the other prompt's condition))
        self.directory, self.shapes, self.text_only = directory, shapes, text_only
        self._shards = sorted({shard_of(key) for *_, keys in samples for key in keys if key})
        number = {name: i for i, name in enumerate(self._shards)}
        # columns, not objects: some 300 bytes a clip, and nothing that a forked DataLoader worker would copy
        self._sample_id = pa.array([sample[0] for sample in samples], pa.string())
        self._prompt = pa.array([sample[1] for sample in samples], pa.string())
        self._bucket = np.array([sample[2] for sample in samples], dtype=np.int32)
        self._key = np.array([[key or "" for key in keys] for *_, keys in samples], dtype="S64").reshape(-1, 3)
        places = [[number[shard_of(key)] if key else -1 for key in keys] for *_, keys in samples]
        self._shard = np.array(places, dtype=np.int32).reshape(-1, 3)

    @property
    def buckets(self) -> list[int]:
        """The bucket of each item, for [`BucketSampler`]."""
        return self._bucket.tolist()

    @property
    def sample_ids(self) -> list[str]:
        """The name of each item."""
        return self._sample_id.to_pylist()

    def __len__(self) -> int:
        return len(self._bucket)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        item = {
            "condition": self._read(index, _CONDITION),
            "prompt": self._prompt[index].as_py(),
            "sample_id": self._sample_id[index].as_py(),
            "bucket": int(self._bucket[index]),
            "index": index,
        }
        if not self.text_only:
            tensors, _ = self._read(index, _LATENTS)
            item.update(mean=tensors["mean"], std=tensors["std"])
        return item

    def empty_condition(self, index: int) -> tuple[dict, dict]:
        """
        The condition of item `index` with an empty prompt, for caption dropout.

        Args:
            index (`int`): The item's `index`.

        Returns:
            `tuple`: `(tensors, meta)`.

        Raises:
            `ValueError`: If the cache was built with `empty_prompt=False`.
        """
        if self._shard[index, _OTHER] < 0:
            raise ValueError("the cache was built without the empty prompt: use build_cache(empty_prompt=True)")
        return self._read(index, _OTHER)

    def negatives(self) -> "CachedDataset":
        """The same items with the conditions of `build_cache(negative_prompt=...)` in place of their own, without latents."""
        assert (self._shard[:, _OTHER] >= 0).all(), "the cache was built without a negative prompt"
        other = copy.copy(self)
        other.text_only, order = True, [_LATENTS, _OTHER, _OTHER]
        other._key, other._shard = self._key[:, order], self._shard[:, order]
        return other

    def _read(self, index, which):
        path = os.path.join(self.directory, self._shards[self._shard[index, which]])
        return read_entry(path, self._key[index, which].decode())


def build_cache(
    dataset,
    plan,
    encode: Callable | None,
    condition: Callable,
    *,
    cache_dir: str | os.PathLike,
    fingerprint: dict,
    text_only: bool = False,
    condition_columns: tuple[str, ...] = ("prompt",),
    empty_prompt: bool = True,
    negative_prompt: str | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] | None = None,
) -> CachedDataset:
    """
    Encode what is not in the cache yet, and return the dataset that reads it.

    Each clip is encoded alone, so an entry does not depend on its neighbours: a resumed run stores the same bits as an
    uninterrupted one. Every distinct prompt is encoded once per shape.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or list of `dict`): With the columns of
            [`standardize_columns`].
        plan ([`Plan`]): From [`plan_dataset`] on the same dataset. A streaming dataset is planned here, in the same pass.
        encode (`Callable`): `encode(videos) -> (mean, std)`: a list of one float32 `(F, C, H, W)` clip in [0, 1] to
            normalised `(1, C, f, h, w)` posterior statistics, such as `VideoModel.encode`. `None` with `text_only`.
        condition (`Callable`): `condition(row, height, width, num_frames) -> (tensors, meta)`; `row` holds the
            `condition_columns` only, and `meta` must be JSON-able. Tensors whose names begin with `shared.` are
            stored once for all conditions that have them alike.
        cache_dir (`str` or `PathLike`): May be shared by models, runs and processes.
        fingerprint (`dict`): JSON-able; everything about the model that changes what the two functions return: name,
            revision, dtype, maximum sequence length. `fingerprint["model"]` names the directory.
        text_only (`bool`, *optional*, defaults to `False`): Conditions without latents.
        condition_columns (`tuple[str, ...]`, *optional*, defaults to `("prompt",)`): What `condition` depends on. `"fps"` is
            the clip's frame rate after resampling; `"image"` is the row's image, resized and cropped as its clip is, or the
            clip's first frame where the row has none.
        empty_prompt (`bool`, *optional*, defaults to `True`): Also cache the condition of the empty prompt.
        negative_prompt (`str`, *optional*): Also cache the condition of this prompt, as the other branch of guidance:
            `condition` gets rows with it as `prompt` and `"negative": True`. Not with `empty_prompt`.
        process_index (`int`, *optional*, defaults to `0`): This process.
        num_processes (`int`, *optional*, defaults to `1`): Processes that share the work.
        wait (`Callable`, *optional*): Barrier over all processes; required if there are several.

    Returns:
        [`CachedDataset`].

    Raises:
        `ValueError`: If too many clips are unreadable, or an encoder returns NaN or Inf; the message names the clip.
        `OSError`: If the disk is full; what was written stays valid.

    Example:

    ```python
    >>> cached = build_cache(dataset, plan, model.encode, condition, cache_dir="cache", fingerprint={"model": "wan"})
    ```
    """
    if num_processes > 1 and wait is None:
        raise ValueError("several processes share the cache: pass wait, for example accelerator.wait_for_everyone")
    builder = _Builder(dataset, plan, encode, condition, Path(cache_dir), fingerprint)
    if empty_prompt and negative_prompt is not None:
        raise ValueError("a cache holds the empty prompt or a negative one beside each prompt: set empty_prompt=False")
    builder.text_only, builder.columns, builder.negative_prompt = text_only, tuple(condition_columns), negative_prompt
    builder.other_prompt = "" if empty_prompt else negative_prompt
    builder.rank, builder.world, builder.wait = process_index, num_processes, wait or (lambda: None)
    return builder.run()


class _Other(str):
    """A prompt that every row has beside its own."""


class _Builder:
    """One call of [`build_cache`]: what is missing, who encodes it, and the dataset that reads all of it."""

    def __init__(self, dataset, plan, encode, condition, cache_dir, fingerprint):
        self.dataset, self.plan, self.encode, self.condition = dataset, plan, encode, condition
        self.fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True))
        self.base = sha256_json({"format": FORMAT, "fingerprint": self.fingerprint})
        name = os.path.basename(str(fingerprint.get("model", "model")).rstrip("/\\"))
        name = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60] or "model"
        self.cache_dir, self.directory = cache_dir, cache_dir / f"{name}-{self.base[:12]}"
        self.unreadable = {}  # key of an entry that cannot be made -> reason
        self.contents = {}  # dataset row -> hash of its video

    def run(self) -> CachedDataset:
        columns = _column_names(self.dataset)
        if not self.text_only and "video" not in columns:
            raise ValueError("the dataset has no videos: use text_only=True")
        missing = [c for c in self.columns if c not in columns and c not in ("fps", "image")]
        if missing:
            raise ValueError(f"condition_columns names {', '.join(missing)}; the dataset has {', '.join(columns)}")
        self.images, self.has_videos = "image" in self.columns, "video" in columns
        if self.images and "image" not in columns and not self.has_videos:
            raise ValueError(f"every row needs an image: the dataset has the columns {', '.join(columns)}")
        self.light = self.dataset  # rows without the videos, which may be megabytes of embedded bytes
        if isinstance(self.dataset, datasets.Dataset):
            wanted = {"prompt", "fps", *self.columns}
            self.light = self.dataset.select_columns([c for c in columns if c in wanted])

        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self.directory / "fingerprint.json", json.dumps(self.fingerprint, indent=1, sort_keys=True))
        remove_old_temporaries(self.cache_dir, self.directory)
        self.files = FileHashes(self.cache_dir)
        self.store = Store(self.directory, self.rank)
        keyed = None
        if self.plan.complete:
            self._encode_conditions()
            self._encode_latents()
        else:
            keyed = self._stream()
        self.store.flush()
        self.files.save()
        write_atomic(self._report(self.rank), json.dumps(self.unreadable))
        self.wait()
        self._read_reports()
        self.store.load()
        self.files.load()
        dataset = self._dataset(keyed)
        self.wait()  # before files that the others still read are merged
        if self.rank == 0:
            self.store.write_index()
            self.files.merge()
        return dataset

    def _report(self, rank) -> Path:
        return self.directory / f"unreadable-r{rank}of{self.world}.json"

    def _read_reports(self):
        for rank in range(self.world):
            if not _appears(self._report(rank).exists):
                raise RuntimeError(
                    f"process {rank} wrote nothing to {self.directory}: cache_dir must be on a file system that all "
                    "processes share"
                )
            self.unreadable.update(json.loads(self._report(rank).read_text()))

    def _encode_conditions(self):
        todo = {}
        for position, sample in enumerate(self.plan.samples):
            if self.images and position % self.world != self.rank:
                continue  # a clip's conditions share its image; their keys need the file's content
            row = self.light[sample.index]
            for prompt in self._prompts(row):
                key = self._condition_key(row, sample, prompt)
                if not self.store.has(key) and (self.images or int(key[:8], 16) % self.world == self.rank):
                    todo.setdefault(key, (sample, prompt))
        rows = self.dataset if self.images else self.light
        for key, (sample, prompt) in _progress(todo.items(), "Caching conditions", self.rank):
            self._add_condition(key, rows[sample.index], sample, prompt)
        self.store.flush()

    def _encode_latents(self):
        if self.text_only:
            return
        todo = {}
        for sample in self.plan.samples[self.rank :: self.world]:
            key = self._latents_key(self.light[sample.index], sample)
            if not self.store.has(key):
                todo.setdefault(key, sample)
        for key, sample in _progress(todo.items(), "Caching latents", self.rank):
            self._add_latents(key, self.dataset[sample.index], sample)

    def _stream(self):
        """Plan and encode a stream in one pass; every process reads all of it and encodes its share."""
        keyed = []
        for index, row in enumerate(self.dataset):
            for sample in self.plan.add(index, row):
                if sample.action == "dropped":
                    continue
                position, keys = len(keyed), self._keys(row, sample)
                keyed.append((sample, row["prompt"], keys))
                if position % self.world == self.rank and keys[_LATENTS] and not self.store.has(keys[_LATENTS]):
                    self._add_latents(keys[_LATENTS], row, sample)
                for prompt, key in zip(self._prompts(row), keys[_CONDITION:], strict=False):
                    owner = position if self.images else int(key[:8], 16)
                    if not self.store.has(key) and owner % self.world == self.rank:
                        self._add_condition(key, row, sample, prompt)
        return keyed

    def _dataset(self, keyed) -> CachedDataset:
        if keyed is None:
            rows = ((sample, self.light[sample.index]) for sample in self.plan.samples)
            keyed = [(sample, row["prompt"], self._keys(row, sample)) for sample, row in rows]
        items = []
        for sample, prompt, keys in keyed:
            reason = next((self.unreadable[key] for key in keys if key in self.unreadable), None)
            if reason is None:
                items.append((sample.sample_id, prompt, sample.bucket, keys))
            else:
                sample.action, sample.reason, sample.unreadable = "dropped", f"unreadable: {reason}", True
                sample.bucket = None
        self.plan.finish()
        wanted = {key for *_, keys in items for key in keys if key}
        if not _appears(lambda: self._all_on_disk(wanted)):
            missing = sum(not self.store.has(key) for key in wanted)
            raise RuntimeError(f"{missing} entries are missing from {self.directory}: another process stopped early")
        return CachedDataset(str(self.directory), self.plan.buckets, items, self.store.shard, self.text_only)

    def _all_on_disk(self, keys) -> bool:
        if not all(self.store.has(key) for key in keys):
            self.store.load()
        return all(self.store.has(key) for key in keys)

    def _prompts(self, row) -> list[str]:
        return [row["prompt"]] if self.other_prompt is None else [row["prompt"], _Other(self.other_prompt)]

    def _is_negative(self, prompt) -> bool:
        return isinstance(prompt, _Other) and self.negative_prompt is not None

    def _keys(self, row, sample) -> tuple[str | None, str, str | None]:
        latents = None if self.text_only else self._latents_key(row, sample)
        conditions = [self._condition_key(row, sample, prompt) for prompt in self._prompts(row)]
        return (latents, *conditions, None)[:3]

    def _latents_key(self, row, sample) -> str:
        content = self.contents.get(sample.index)
        if content is None:
            video = row["video"] if "video" in row else self.dataset[sample.index]["video"]
            content = self.contents[sample.index] = self.files.content(video)
        parts = {"base": self.base, "content": content, "source_fps": row.get("fps")}
        parts.update(start=sample.start, fps=sample.target_fps, shape=list(self.plan.buckets[sample.bucket]))
        return sha256_json(parts)

    def _condition_key(self, row, sample, prompt) -> str:
        inputs = {"negative": True} if self._is_negative(prompt) else {}
        for column in self.columns:
            if column == "prompt":
                inputs[column] = prompt
            elif column == "fps":
                inputs[column] = sample.fps
            elif column == "image":
                inputs[column] = self._image_key(row, sample)
            elif is_content(row[column]):
                inputs[column] = {"content": self.files.content(row[column])}
            else:
                inputs[column] = row[column]
        return sha256_json({"base": self.base, "inputs": inputs, "shape": list(self.plan.buckets[sample.bucket])})

    def _image_key(self, row, sample):
        if row.get("image") is None:  # it is the first frame of the clip, where there is one
            return self._latents_key(row, sample) if self.has_videos else None
        try:
            return {"content": self.files.content(row["image"]), "fit": "cover"}
        except OSError as error:  # such a row is left out when its condition is made
            return {"missing": str(error)}

    def _add_condition(self, key, row, sample, prompt):
        bucket = self.plan.buckets[sample.bucket]
        try:
            inputs = {"negative": True} if self._is_negative(prompt) else {}
            inputs |= {column: row.get(column) for column in self.columns}
            inputs.update({c: v for c, v in (("prompt", prompt), ("fps", sample.fps)) if c in inputs})
            if "image" in inputs:
                inputs["image"] = self._image(row, sample, bucket)
        except ValueError as error:
            self._skip(key, error)
            return
        tensors, meta = self.condition(inputs, bucket.height, bucket.width, bucket.num_frames)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"the text encoder returned NaN or Inf in {name} for the prompt {prompt!r}")
        self.store.add("conditions", key, tensors, meta, self._info(sample, bucket, prompt))

    def _add_latents(self, key, row, sample):
        bucket = self.plan.buckets[sample.bucket]
        try:
            video = load_clip(row, sample, bucket)
        except ValueError as error:
            self._skip(key, error)
            return
        mean, std = (x[0].detach().to("cpu", torch.float16) for x in self.encode([video]))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError(
                f"the VAE returned NaN, Inf or values beyond float16 for {sample.sample_id}; load it in float32 or bfloat16"
            )
        self.store.add("latents", key, {"mean": mean, "std": std}, {}, self._info(sample, bucket, row["prompt"]))

    def _skip(self, key, error):
        if str(error) not in self.unreadable.values():  # one warning, however many entries depend on the file
            logger.warning("clip skipped: %s", error)
        self.unreadable[key] = str(error)

    def _image(self, row, sample, bucket) -> Image.Image:
        if row.get("image") is not None:
            return condition_image(row["image"], bucket.height, bucket.width)
        if not self.has_videos:
            raise ValueError(f"{sample.sample_id} has no image")
        return as_image(load_clip(row, sample, bucket, num_frames=1)[0])

    def _info(self, sample, bucket, prompt) -> dict:
        info = {"sample_id": sample.sample_id, "start": sample.start, "fps": sample.fps, "prompt": prompt}
        return {**info, **bucket._asdict()}


def _appears(check: Callable[[], bool]) -> bool:
    """Whether something holds, now or soon."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not check():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


def _progress(todo, description, rank):
    return tqdm(todo, desc=description, disable=rank != 0 or len(todo) == 0)


def _column_names(dataset) -> list[str]:
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) and dataset.column_names:
        return dataset.column_names
    return list(next(iter(dataset)))


def remove_old_temporaries(*directories: Path) -> None:
    """Remove what killed processes left half-written; others may be writing."""
    for directory in directories:
        for path in directory.glob(TEMPORARY + "*"):
            try:
                age = time.time() - path.stat().st_mtime
            except FileNotFoundError:  # another process has just renamed it
                continue
            if age > TEMPORARY_SECONDS:
                path.unlink(missing_ok=True)
