"""Files of the cache: safetensors shards that describe themselves, a Parquet index over them, and file hashes.

Everything is written under a temporary name and renamed, so a reader never sees half a file, and a killed writer leaves
what was complete. Names are unique per writer, so several processes may write into one directory without a lock.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .video import load_image, read_video


logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
INDEX = "index.parquet"
SHARED = "shared."  # tensors so named are alike for many entries (rotary tables): each is a file of its own
SHARD_BYTES = 64 * 2**20
SHARD_ENTRIES = 64
SHARD_SECONDS = 60.0  # a killed run loses a minute of work at most, plus the clip at hand
RACY_NS = 2 * 10**9  # a file changed so recently may change again within the clock's resolution

_SCHEMA = pa.schema(
    [("key", pa.string()), ("kind", pa.string()), ("shard", pa.string()), ("shard_size", pa.int64())]
    + [("sample_id", pa.string()), ("start", pa.int64()), ("fps", pa.float64()), ("num_frames", pa.int64())]
    + [("height", pa.int64()), ("width", pa.int64()), ("prompt", pa.string()), ("shared", pa.list_(pa.string()))]
)
_FILES = pa.schema(
    [("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("ctime_ns", pa.int64())]
    + [("sha256", pa.string())]
)


class Store:
    """Entries of one model in one directory: `add` and `flush` write, `has` and `shard` look up."""

    def __init__(self, directory: Path, rank: int):
        self.directory, self.rank, self.writer = directory, rank, uuid.uuid4().hex[:8]
        self.pending, self.count, self.since = {}, 0, time.monotonic()
        self.bytes, self.damaged = 0, set()
        self.load()

    def load(self) -> None:
        """Learn what is on disk: the index, and the headers of the shards that it does not list."""
        paths = [p for p in self.directory.glob("*.safetensors") if not p.name.startswith(TEMPORARY)]
        sizes = {p.name: p.stat().st_size for p in paths}
        self.shared = {name for name in sizes if name.startswith(SHARED) and self._readable(name)}
        sizes = {name: size for name, size in sizes.items() if not name.startswith(SHARED)}
        table = _read_table(self.directory / INDEX, _SCHEMA)
        intact = [sizes.get(s) == n for s, n in zip(table["shard"], table["shard_size"], strict=True)]
        table = table.filter(pa.array(intact, pa.bool_()))
        listed, rows = set(table["shard"].unique().to_pylist()), []
        for name in sorted(sizes.keys() - listed - self.damaged):
            rows += self._header(name, sizes[name])
        table = pa.concat_tables([table, pa.Table.from_pylist(rows, schema=_SCHEMA)])
        whole = [self.shared.issuperset(names or ()) for names in table["shared"].to_pylist()]
        self.table = table.filter(pa.array(whole, pa.bool_()))
        self.where = dict(zip(self.table["key"].to_pylist(), self.table["shard"].to_pylist(), strict=True))

    def _header(self, name, size) -> list[dict]:
        try:
            with safe_open(self.directory / name, framework="pt") as file:
                rows = json.loads(file.metadata()["entries"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning("the cache shard %s is damaged and will not be used: %s", self.directory / name, error)
            self.damaged.add(name)
            return []
        return [{**row, "shard": name, "shard_size": size} for row in rows]

    def _readable(self, name) -> bool:
        try:
            with safe_open(self.directory / name, framework="pt"):
                return True
        except SafetensorError as error:
            logger.warning("%s is damaged and will be made again: %s", self.directory / name, error)
            return False

    def has(self, key: str) -> bool:
        """Whether the entry is on disk or about to be written."""
        return key in self.where or any(key in entries for entries in self.pending.values())

    def shard(self, key: str) -> str:
        """The file that holds an entry."""
        return self.where[key]

    def add(self, kind: str, key: str, tensors: dict, meta: dict, info: dict) -> None:
        """Keep an entry for the next shard of its kind; write it when the shard is large or old enough."""
        own = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items() if not n.startswith(SHARED)}
        shared = {n: self._add_shared(t.detach().cpu().contiguous()) for n, t in tensors.items() if n not in own}
        entries = self.pending.setdefault(kind, {})
        record = json.dumps({"meta": meta, "shared": shared})
        entries[key] = (own, record, {"key": key, "kind": kind, "shared": sorted(set(shared.values())), **info})
        self.bytes += sum(t.numel() * t.element_size() for t in own.values())
        late = time.monotonic() - self.since >= SHARD_SECONDS
        if self.bytes >= SHARD_BYTES or len(entries) >= SHARD_ENTRIES or late:
            self.flush()

    def _add_shared(self, tensor) -> str:
        """Write a tensor unless it is there; its name is its content, so that it cannot be stale."""
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
        name = f"{SHARED}{digest.hexdigest()[:32]}.safetensors"
        if name not in self.shared:
            write_atomic(self.directory / name, lambda path: save_file({"tensor": tensor}, path))
            self.shared.add(name)
        return name

    def flush(self) -> None:
        """Write what is pending."""
        for kind in list(self.pending):
            entries = self.pending.pop(kind)
            name = f"{kind}-r{self.rank}-{self.count:05d}-{self.writer}.safetensors"
            tensors = {f"{key}/{n}": t for key, (part, *_) in entries.items() for n, t in part.items()}
            metadata = {key: record for key, (_, record, _) in entries.items()}
            metadata["entries"] = json.dumps([info for *_, info in entries.values()])
            write_atomic(self.directory / name, lambda path, t=tensors, m=metadata: save_file(t, path, m))
            self.where.update(dict.fromkeys(entries, name))
            self.count += 1
        self.since, self.bytes = time.monotonic(), 0

    def write_index(self) -> None:
        """Write the index of everything on disk."""
        write_atomic(self.directory / INDEX, lambda path: pq.write_table(self.table, path))


class FileHashes:
    """SHA-256 of file contents, remembered by path, size and times so that an unchanged file is read only once."""

    def __init__(self, directory: Path):
        self.directory, self.new = directory, {}
        self.load()

    def load(self) -> None:
        """Read what this and other processes have hashed."""
        self.known = {}
        for path in sorted(self.directory.glob("files*.parquet")):
            for row in _read_table(path, _FILES).to_pylist():
                self.known[row["path"]] = row
        self.known.update(self.new)

    def content(self, source) -> str:
        """The hash of what a source holds."""
        if isinstance(source, dict):
            source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if isinstance(source, (str, os.PathLike)):
            return self._file(os.path.abspath(source))
        digest = hashlib.sha256()
        if isinstance(source, (bytes, bytearray, memoryview)):
            digest.update(source)
        elif isinstance(source, Image.Image):
            image = load_image(source)  # what is used of it: the palette is looked up, the orientation applied
            digest.update(f"{image.mode}{image.size}".encode())
            digest.update(image.tobytes())
        else:
            array = source if isinstance(source, (np.ndarray, torch.Tensor)) else read_video(source)
            array = np.ascontiguousarray(array.numpy(force=True) if isinstance(array, torch.Tensor) else array)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array)
        return digest.hexdigest()

    def _file(self, path: str) -> str:
        stat = os.stat(path)
        seen = {"path": path, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
        known = self.known.get(path)
        if known is not None and all(known[name] == value for name, value in seen.items()):
            return known["sha256"]
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        sha256 = digest.hexdigest()
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > RACY_NS:
            self.known[path] = self.new[path] = {**seen, "sha256": sha256}
        return sha256

    def save(self) -> None:
        """Publish what this process has hashed."""
        if self.new:
            table = pa.Table.from_pylist(list(self.new.values()), schema=_FILES)
            name = f"files-{uuid.uuid4().hex[:8]}.parquet"
            write_atomic(self.directory / name, lambda path: pq.write_table(table, path))

    def merge(self) -> None:
        """Put all parts into one file. A part that another run still wants costs it a second look at its files."""
        parts = list(self.directory.glob("files-*.parquet"))
        if parts:
            self.load()
            table = pa.Table.from_pylist(list(self.known.values()), schema=_FILES)
            write_atomic(self.directory / "files.parquet", lambda path: pq.write_table(table, path))
            for part in parts:
                part.unlink(missing_ok=True)


def read_entry(path: str, key: str) -> tuple[dict[str, torch.Tensor], dict]:
    """
    Read one entry of a shard. The file is opened for this read only: an open shard would keep its pages mapped.

    Args:
        path (`str`): The shard.
        key (`str`): The entry.

    Returns:
        `tuple`: `(tensors, meta)`.
    """
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[key])
        names = [name for name in file.keys() if name.startswith(key)]
        tensors = {name[len(key) + 1 :]: file.get_tensor(name).clone() for name in names}
    for name, shared in record["shared"].items():
        tensors[name] = load_file(os.path.join(os.path.dirname(path), shared))["tensor"].clone()
    return tensors, record["meta"]


def write_atomic(path: Path, content) -> None:
    """
    Write a file under a temporary name, flush it to the disk, and rename it.

    Args:
        path (`Path`): The final name.
        content (`str` or `Callable`): Text, or a function that writes to the path it is given.

    Raises:
        `OSError`: If writing fails, as on a full disk; nothing is left behind.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write {path}: {error}. What was cached before is intact; free some space and rerun"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_content(value) -> bool:
    """Whether a column's value is hashed by its content: pictures, arrays and `{"path", "bytes"}`."""
    file = isinstance(value, dict) and value.keys() == {"path", "bytes"}
    return file or isinstance(value, (bytes, Image.Image, np.ndarray, torch.Tensor))


def sha256_json(value) -> str:
    """The SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path)
        if table.schema.names == schema.names:
            return table.cast(schema)
    except FileNotFoundError:  # not written yet, or merged away by another run
        pass
    except pa.ArrowInvalid as error:
        logger.warning("%s is damaged and will be rebuilt: %s", path, error)
    return schema.empty_table()
