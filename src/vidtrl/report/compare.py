"""Good/Same/Bad comparison of two folders of videos: which clips belong together, where the votes are, what they say.

A rater says of each pair whether clip A is better than clip B (good), as good (same) or worse (bad), on three axes, and
GSB = (G - B) / (G + S + B) lies between -1 (B always wins) and 1 (A always wins). The measure is that of the human
evaluations in https://huggingface.co/papers/2604.25427.
"""

import hashlib
import json
import os
import random
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .intervals import RESAMPLES, Estimate


AXES = ("visual_quality", "motion_quality", "text_alignment")
SCORES = {"good": 1, "same": 0, "bad": -1}  # of A, against B
VOTES_FILE = "votes.parquet"
_COLUMNS = ("prompt", "number", "video_a", "video_b", "sha256_a", "sha256_b")
_SCHEMA = pa.schema(
    [(name, pa.int64() if name == "number" else pa.string()) for name in _COLUMNS]
    + [("a_first", pa.bool_()), *((axis, pa.string()) for axis in AXES)]
)


@dataclass
class Pair:
    """
    Two videos of one prompt and what the rater said about them.

    Args:
        prompt (`str`): The prompt of both.
        number (`int`): 0 for the first clip of this prompt in both folders, 1 for the second, and so on.
        video_a (`str`): File, relative to folder A.
        video_b (`str`): File, relative to folder B.
        sha256_a (`str`): Of the file's content, so that a vote never passes to another video of the same name.
        sha256_b (`str`): The same of B.
        a_first (`bool`): Whether the page shows A as the first video.
        votes (`dict[str, str]`): Axis to `"good"`, `"same"` or `"bad"`; an axis that is not judged is missing.
    """

    prompt: str
    number: int
    video_a: str
    video_b: str
    sha256_a: str
    sha256_b: str
    a_first: bool
    votes: dict[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether every axis is judged."""
        return len(self.votes) == len(AXES)

    def preference(self, axis: str) -> int:
        """1 where A is preferred, -1 where B is, 0 for neither; `"overall"` is the majority of the axes, once all are
        judged."""
        if axis == "overall":
            return int(np.sign(sum(SCORES[v] for v in self.votes.values()))) if self.done else 0
        return SCORES[self.votes[axis]] if axis in self.votes else 0


class Gsb(NamedTuple):
    """The votes on one axis; `gsb` is `None` while there are none."""

    good: int
    same: int
    bad: int
    gsb: Estimate | None


def find_clips(folder: str | os.PathLike) -> list[tuple[str, str]]:
    """
    The mp4 files of a folder with their prompts, in the order in which the folder lists them.

    Args:
        folder (`str` or `PathLike`): Whose prompts are in one of: `metadata.jsonl` with `file_name` and `prompt` (as
            `completions/` of a trainer has it), `completions_*.parquet` with `video` and `prompt`, `prompts.json` of
            `validation/step_N`, or `jobs.json` of `vidtrl demo`, one or two folders up. A `completions/step_N` takes
            its rows from the folder above.

    Returns:
        `list[tuple[str, str]]`: (prompt, file relative to the folder), without the files that do not exist.

    Raises:
        `NotADirectoryError`: If there is no such folder.
        `ValueError`: If no prompts are found, an entry is malformed, or a file is no mp4 or lies outside the folder.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: give a folder of mp4 files")
    clips = []
    for prompt, name in _listing(folder):
        if not isinstance(prompt, str) or not isinstance(name, str):
            raise ValueError(f"{folder}: prompts and file names must be text, got {prompt!r} and {name!r}")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix.lower() != ".mp4":
            raise ValueError(f"{folder}: {name!r} must be an mp4 file inside the folder, written with forward slashes")
        if (folder / path).is_file():
            clips.append((prompt, str(path)))
    return clips


def _listing(folder: Path) -> list[tuple[object, object]]:
    """(prompt, file) as the folder's own list says, the nearest list first."""
    if (path := folder / "prompts.json").is_file():
        return [(prompt, name) for name, prompt in _read_json(path, dict).items()]
    for parent, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        rows = None
        if (path := parent / "metadata.jsonl").is_file():
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): a prompt may hold U+2028
            rows = [_entry(path, line, "file_name") for line in lines if line.strip()]
        elif tables := sorted(parent.glob("completions_*.parquet")):
            rows = []
            for path in tables:
                columns = pq.read_table(path, columns=["prompt", "video"])
                rows += zip(columns["prompt"].to_pylist(), columns["video"].to_pylist(), strict=True)
        if rows is not None:
            inside = [row for row in rows if str(row[1]).startswith(prefix)]
            if inside or not prefix:
                return [(prompt, name if not prefix else name[len(prefix) :]) for prompt, name in inside]
    for parent in (folder.parent, folder.parent.parent):
        if (path := parent / "jobs.json").is_file():
            return [_entry(path, job, "file") for job in _read_json(path, list)]
    raise ValueError(
        f"{folder} says nowhere which prompt a video belongs to: write a metadata.jsonl with a line "
        '{"file_name": "clip.mp4", "prompt": "..."} for each, or give videos/NAME of vidtrl demo, completions/ or '
        "validation/step_N of a trainer"
    )


def _read_json(path: Path, kind: type):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, not a {type(value).__name__}")
    return value


def _entry(path: Path, entry: object, key: str) -> tuple[object, object]:
    try:
        entry = json.loads(entry) if isinstance(entry, str) else entry
        return entry["prompt"], entry[key]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}: each entry needs "{key}" and "prompt", got {str(entry)[:200]!r}') from None


def pair_clips(
    folder_a: str | os.PathLike, folder_b: str | os.PathLike, seed: int | None = None
) -> tuple[list[Pair], list[str], list[str]]:
    """
    Pair the clips of two folders by prompt, and by order among the clips of one prompt.

    Args:
        folder_a (`str` or `PathLike`): As for [`find_clips`].
        folder_b (`str` or `PathLike`): Another one.
        seed (`int`, *optional*): Of the order of the pairs and of which video comes first; drawn by default.

    Returns:
        `tuple[list[Pair], list[str], list[str]]`: The pairs in the order to be shown, and the files of A and of B that
        have no partner.

    Raises:
        `ValueError`: If the folders are the same, or have no prompt in common.
    """
    if os.path.realpath(folder_a) == os.path.realpath(folder_b):
        raise ValueError(f"{folder_a} and {folder_b} are the same folder: give two that share prompts")
    sides = []
    for folder in (folder_a, folder_b):
        count, clips = Counter(), {}
        for prompt, name in find_clips(folder):
            clips[prompt, count[prompt]] = name
            count[prompt] += 1
        sides.append(clips)
    a, b = sides
    common = [key for key in a if key in b]
    if not common:
        raise ValueError(
            f"{folder_a} ({len(a)} clips) and {folder_b} ({len(b)} clips) have no prompt in common: generate both with "
            "the same prompts; texts are compared exactly"
        )
    rng = random.Random(seed)
    rng.shuffle(common)
    pairs = [
        Pair(*key, a[key], b[key], _sha256(folder_a, a[key]), _sha256(folder_b, b[key]), rng.random() < 0.5)
        for key in common
    ]
    return pairs, [a[k] for k in a if k not in b], [b[k] for k in b if k not in a]


def _sha256(folder: str | os.PathLike, name: str) -> str:
    return hashlib.sha256(Path(folder, name).read_bytes()).hexdigest()


def gsb(pairs: Sequence[Pair], axis: str, seed: int = 0) -> Gsb:
    """
    GSB = (G - B) / (G + S + B) of one axis with its 95 % interval, a percentile bootstrap of 4000 resamples.

    Whole prompts are resampled, with all their pairs: clips of one prompt succeed and fail together.

    Args:
        pairs (`Sequence[Pair]`): Those that are not judged are left out.
        axis (`str`): One of `AXES`.
        seed (`int`, *optional*, defaults to `0`): Equal seeds give equal intervals.

    Returns:
        [`Gsb`]: Positive where A is preferred.
    """
    scores = defaultdict(list)
    for pair in pairs:
        if axis in pair.votes:
            scores[pair.prompt].append(SCORES[pair.votes[axis]])
    flat = [score for group in scores.values() for score in group]
    if not flat:
        return Gsb(0, 0, 0, None)
    sums = np.array([sum(group) for group in scores.values()], dtype=np.float64)
    sizes = np.array([len(group) for group in scores.values()], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[picks].sum(1) / sizes[picks].sum(1), [2.5, 97.5])
    value = Estimate(sum(flat) / len(flat), float(low), float(high))
    return Gsb(flat.count(1), flat.count(0), flat.count(-1), value)


def read_votes(output: str | os.PathLike) -> tuple[tuple[str, str], list[Pair]]:
    """
    What a comparison has so far.

    Args:
        output (`str` or `PathLike`): Its folder.

    Returns:
        `tuple[tuple[str, str], list[Pair]]`: The names of A and B, and the pairs in the order in which they are shown.

    Raises:
        `ValueError`: If there are no votes in the folder, or the file is something else.
    """
    path = Path(output, VOTES_FILE)
    if not path.is_file():
        raise ValueError(f"{output} holds no comparison: run vidtrl compare A B --output {output} first")
    # read in one go: pyarrow opens a path more than once, and a running server may replace the file in between
    table = pq.read_table(pa.BufferReader(path.read_bytes()))
    metadata = table.schema.metadata or {}
    if not table.schema.equals(_SCHEMA) or b"a" not in metadata or b"b" not in metadata:
        raise ValueError(f"{path} was not written by this version of vidtrl compare: choose another --output")
    pairs = []
    for row in table.to_pylist():
        votes = {axis: vote for axis in AXES if (vote := row.pop(axis)) is not None}
        pairs.append(Pair(**row, votes=votes))
    return (metadata[b"a"].decode(), metadata[b"b"].decode()), pairs


def export_preferences(
    comparison: "Comparison", folder: str | os.PathLike, axis: str = "overall"
) -> tuple[Path, int, int]:
    """
    Write the preferences as a dataset of `{"prompt", "chosen", "rejected"}` that holds copies of the videos:
    `load_dataset(folder)` gives two `Video` columns.

    Args:
        comparison ([`Comparison`]): With its votes.
        folder (`str` or `PathLike`): A new or an empty one.
        axis (`str`, *optional*, defaults to `"overall"`): Which axis decides, one of `AXES`, or the majority of all three.

    Returns:
        `tuple[Path, int, int]`: The folder, how many rows it has, and how many judged pairs were ties and left out.

    Raises:
        `ValueError`: If the folder is not empty, or no pair has a preference.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: export to a new folder")
    judged = [pair for pair in comparison.pairs if (pair.done if axis == "overall" else axis in pair.votes)]
    decided = [pair for pair in judged if pair.preference(axis)]
    if not decided:
        raise ValueError(
            f"no pair has a preference ({axis}, {len(judged)} judged): judge some first, or choose an axis"
        )
    (folder / "videos").mkdir(parents=True)
    rows = []
    for i, pair in enumerate(decided):
        row = {"prompt": pair.prompt}
        order = ("a", "b") if pair.preference(axis) > 0 else ("b", "a")
        for role, side in zip(("chosen", "rejected"), order, strict=True):
            row[f"{role}_file_name"] = f"videos/{i:05d}-{role}.mp4"
            shutil.copyfile(comparison.video(pair, side), folder / row[f"{role}_file_name"])
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder, len(decided), len(judged) - len(decided)


class Comparison:
    """
    Two folders and the votes on their pairs, which are on disk as soon as they are given.

    The order of the pairs and of the two videos in each is drawn once and kept in the file. Clips that were added to the
    folders since come last.

    Args:
        folder_a (`str` or `PathLike`): As for [`find_clips`]; the one that "good" speaks of.
        folder_b (`str` or `PathLike`): Another one.
        output (`str` or `PathLike`): Where `votes.parquet` is, or will be.
        seed (`int`, *optional*): Of what is shown in which order; drawn by default.

    Raises:
        `ValueError`: If nothing can be paired, or the output has votes on other videos.

    Example:

    ```python
    from vidtrl.report.compare import Comparison

    comparison = Comparison("demo/videos/grpo", "demo/videos/sft", "grpo-against-sft")
    comparison.vote(0, "motion_quality", "first")
    print(comparison.results()["motion_quality"])
    ```
    """

    def __init__(
        self,
        folder_a: str | os.PathLike,
        folder_b: str | os.PathLike,
        output: str | os.PathLike,
        seed: int | None = None,
    ):
        self.folders = {"a": Path(folder_a), "b": Path(folder_b)}
        self.names = _names(folder_a, folder_b)
        self.output = Path(output)
        self.lock = threading.Lock()
        self.pairs, self.unpaired_a, self.unpaired_b = pair_clips(folder_a, folder_b, seed)
        self._file = self.output / VOTES_FILE
        before = None
        if self._file.is_file():
            self._stamp = self._file.stat().st_mtime_ns
            before = read_votes(self.output)[1]
            self._resume(before)
        elif self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output} is a file: choose another --output")
        if self.pairs != before:
            self._write()

    def _resume(self, before: list[Pair]) -> None:
        """Former pairs keep their place and side; a vote on a video that is gone must not be lost or inherited."""
        now = {(p.prompt, p.number): p for p in self.pairs}
        kept = []
        for pair in before:
            match = now.get((pair.prompt, pair.number))
            if match is not None and (match.sha256_a, match.sha256_b) == (pair.sha256_a, pair.sha256_b):
                match.a_first, match.votes = pair.a_first, pair.votes
                kept.append(now.pop((pair.prompt, pair.number)))
            elif pair.votes:
                raise ValueError(
                    f"{self.output} holds votes on other videos (of {pair.prompt[:80]!r}): A and B were exchanged, or "
                    "files changed since; choose another --output"
                )
        self.pairs = kept + list(now.values())

    def video(self, pair: Pair, side: str) -> Path:
        """The file of side `"a"` or `"b"`."""
        return self.folders[side] / (pair.video_a if side == "a" else pair.video_b)

    def vote(self, index: int, axis: str, choice: str | None) -> None:
        """
        Take one vote and write it.

        Args:
            index (`int`): Of the pair, as shown.
            axis (`str`): One of `AXES`.
            choice (`str` or `None`): `"first"` or `"second"` for the better video as shown, `"same"`, or `None` to
                withdraw the vote.

        Raises:
            `ValueError`: If one of them does not exist, or another process has written votes to the same file.
        """
        if type(index) is not int or not 0 <= index < len(self.pairs):
            raise ValueError(f"there is no pair {index!r}: they are numbered from 0 to {len(self.pairs) - 1}")
        if axis not in AXES or choice not in ("first", "same", "second", None):
            raise ValueError(
                f"cannot vote {choice!r} on {axis!r}: first, same, second or null on one of {', '.join(AXES)}"
            )
        with self.lock:
            if self._file.is_file() and self._file.stat().st_mtime_ns != self._stamp:
                raise ValueError(
                    f"another vidtrl compare has written to {self._file}: end this one and start it again, and give each "
                    "rater an --output"
                )
            pair, before = self.pairs[index], dict(self.pairs[index].votes)
            pair.votes.pop(axis, None)
            if choice is not None:
                pair.votes[axis] = (
                    "same" if choice == "same" else "good" if (choice == "first") == pair.a_first else "bad"
                )
            try:
                self._write()
            except OSError:  # memory must not say more than the disk
                pair.votes = before
                raise

    def choice(self, pair: Pair, axis: str) -> str | None:
        """A vote in the words of the page, which does not know A from B."""
        if (vote := pair.votes.get(axis)) in (None, "same"):
            return vote
        return "first" if (vote == "good") == pair.a_first else "second"

    @property
    def num_done(self) -> int:
        """How many pairs are judged on every axis."""
        return sum(pair.done for pair in self.pairs)

    def results(self) -> dict[str, Gsb]:
        """[`Gsb`] by axis."""
        return {axis: gsb(self.pairs, axis) for axis in AXES}

    def _write(self) -> None:
        rows = []
        for pair in self.pairs:
            row = asdict(pair)
            votes = row.pop("votes")
            rows.append(row | {axis: votes.get(axis) for axis in AXES})
        table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(dict(zip("ab", self.names, strict=True))))
        self.output.mkdir(parents=True, exist_ok=True)
        partial = self.output / f"{VOTES_FILE}.partial"
        pq.write_table(table, partial)
        partial.replace(self._file)
        self._stamp = self._file.stat().st_mtime_ns


def _names(a: str | os.PathLike, b: str | os.PathLike) -> tuple[str, str]:
    """The ends of two paths, as long as it takes to tell them apart."""
    a, b = Path(a).resolve().parts, Path(b).resolve().parts
    n = next((n for n in range(1, min(len(a), len(b)) + 1) if a[-n] != b[-n]), 1)
    return Path(*a[-n:]).as_posix(), Path(*b[-n:]).as_posix()
