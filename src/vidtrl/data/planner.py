"""The shape planner: says for every clip whether it is kept, cropped, retimed or dropped, and why."""

import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from datasets import IterableDataset
from huggingface_hub.utils import tqdm

from .columns import check_prompt
from .video import VideoInfo, cover_size, probe_video, source_name


logger = logging.getLogger(__name__)

ACTIONS = ("kept", "cropped", "retimed", "dropped")
ASPECT_RATIOS = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)  # width / height
WINDOWS = ("first", "center", "all")


class Bucket(NamedTuple):
    """One training shape, in frames and pixels."""

    num_frames: int
    height: int
    width: int

    def __str__(self):
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(slots=True)
class PlanRow:
    """
    What happens to one clip (or, with `windows="all"`, to one window of it).

    Args:
        index (`int`): Row of the dataset.
        sample_id (`str`): The file's name, or `row-N`.
        action (`str`): `"kept"`, `"cropped"` (pixels or frames left out), `"retimed"` (frame rate changed) or `"dropped"`.
        reason (`str`): Why, in words.
        bucket (`int` or `None`): Index into [`Plan`]`.buckets`; `None` when dropped.
        start (`int`): First frame of the window, on the grid of `target_fps`.
        target_fps (`float` or `None`): What the clip is resampled to; `None` leaves its own frames.
        fps (`float` or `None`): The frame rate of the result; `None` for images and for frames without a stated rate.
        unreadable (`bool`): Dropped because the file is damaged.
    """

    index: int
    sample_id: str
    action: str
    reason: str = ""
    bucket: int | None = None
    start: int = 0
    target_fps: float | None = None
    fps: float | None = None
    unreadable: bool = False


@dataclass
class ShapePlan:
    """
    The rules that turn clips of any size, length and frame rate into training shapes.

    Either a fixed shape (`height`, `width`, `num_frames`), or buckets: every combination of `resolutions`, `aspect_ratios`
    and `num_frames` that fits the `token_budget`, or the `buckets` given. A clip goes to the bucket of the nearest aspect
    ratio which uses most of it without enlarging it. Still images go to a one-frame bucket of the same size, if the model
    can hold one frame.

    Args:
        height (`int`, *optional*): Pixels of the fixed shape.
        width (`int`, *optional*): Pixels of the fixed shape.
        num_frames (`int` or list of `int`, *optional*): Frames. With buckets also a list; the default are the valid counts
            in steps of at most a quarter.
        resolution (`int` or list of `int`, *optional*): Square roots of the areas of the buckets: 480 means 480x480
            pixels, spent on another shape for another aspect ratio.
        aspect_ratios (list of `float`, *optional*): Width over height. Defaults to 9:16, 3:4, 1:1, 4:3 and 16:9.
        token_budget (`int`, *optional*): Largest number of latent positions (latent frames x height x width) of a clip.
        buckets (list of `(num_frames, height, width)`, *optional*): States the buckets.
        fps (`float`, *optional*): Frame rate to resample to. Defaults to each clip's own frames.
        windows (`str`, *optional*, defaults to `"first"`): What to use of a clip that is longer than its bucket: the
            `"first"` frames, those at the `"center"`, or `"all"` windows that fit, one after the other.
        frame_multiple (`int`, *optional*, defaults to `4`): Valid frame counts are `frame_offset + k * frame_multiple`.
        frame_offset (`int`, *optional*, defaults to `1`): See `frame_multiple`.
        pixel_multiple (`int`, *optional*, defaults to `16`): Height and width must be multiples of it.
        spatial_factor (`int`, *optional*, defaults to `8`): Pixels per latent pixel, for the token budget.
        temporal_factor (`int`, *optional*, defaults to `4`): Frames per latent frame, for the token budget.

    Raises:
        `ValueError`: If a size or a frame count does not fit the model; the message names the nearest that does.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | Sequence[int] | None = None
    resolution: int | Sequence[int] | None = None
    aspect_ratios: Sequence[float] = ASPECT_RATIOS
    token_budget: int | None = None
    buckets: Sequence[tuple[int, int, int]] | None = None
    fps: float | None = None
    windows: str = "first"
    frame_multiple: int = 4
    frame_offset: int = 1
    pixel_multiple: int = 16
    spatial_factor: int = 8
    temporal_factor: int = 4

    def __post_init__(self):
        if self.windows not in WINDOWS:
            raise ValueError(f"windows must be one of {', '.join(WINDOWS)}, not {self.windows!r}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be positive, not {self.fps}")
        self.fixed = self.height is not None or self.width is not None
        self.buckets = self._stated() if self.fixed or self.buckets is not None else self._generated()
        if self.nearest_frames(1) == 1:  # still images
            images = sorted({Bucket(1, b.height, b.width) for b in self.buckets} - set(self.buckets))
            self.image_only = set(images)
            self.buckets = [*self.buckets, *images]
        else:
            self.image_only = set()

    def nearest_frames(self, num_frames: int) -> int:
        """The valid frame count nearest to `num_frames`; of two equally near, the smaller."""
        low = self.floor_frames(num_frames)
        if low < 1:
            return low + self.frame_multiple
        return low if num_frames - low <= low + self.frame_multiple - num_frames else low + self.frame_multiple

    def floor_frames(self, num_frames: int) -> int:
        """The largest valid frame count up to `num_frames`; below 1 where there is none."""
        k = (num_frames - self.frame_offset) // self.frame_multiple
        return self.frame_offset + k * self.frame_multiple

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The valid size nearest to `height` x `width`."""
        m = self.pixel_multiple
        return max(m, round(height / m) * m), max(m, round(width / m) * m)

    def tokens(self, bucket: tuple[int, int, int]) -> int:
        """Latent positions of a bucket: latent frames x latent height x latent width."""
        frames, height, width = bucket
        return (
            math.ceil(frames / self.temporal_factor) * (height // self.spatial_factor) * (width // self.spatial_factor)
        )

    def _frame_rule(self) -> str:
        rule = f"{self.frame_multiple}k" if self.frame_multiple > 1 else "k"
        return f"{rule}+{self.frame_offset}" if self.frame_offset else rule

    def _check(self, bucket: Bucket) -> Bucket:
        if bucket.num_frames < 1 or self.floor_frames(bucket.num_frames) != bucket.num_frames:
            low, near = self.floor_frames(bucket.num_frames), self.nearest_frames(bucket.num_frames)
            both = f"{low} and {low + self.frame_multiple}" if low >= 1 else str(near)
            raise ValueError(
                f"num_frames={bucket.num_frames} does not fit the model, whose frame counts are {self._frame_rule()}; "
                f"the nearest are {both}"
            )
        if (bucket.height, bucket.width) != self.nearest_size(bucket.height, bucket.width):
            near = self.nearest_size(bucket.height, bucket.width)
            raise ValueError(
                f"height={bucket.height}, width={bucket.width} does not fit the model, which needs multiples of "
                f"{self.pixel_multiple}; the nearest size is height={near[0]}, width={near[1]}"
            )
        return bucket

    def _stated(self) -> list[Bucket]:
        if self.fixed:
            missing = [n for n in ("height", "width", "num_frames") if getattr(self, n) is None]
            if missing or not isinstance(self.num_frames, int):
                raise ValueError(
                    "a fixed shape needs height, width and one num_frames; or give resolution for buckets"
                )
            if self.resolution is not None or self.buckets is not None:
                raise ValueError("give either height and width, or resolution, or buckets")
            stated = [(self.num_frames, self.height, self.width)]
        else:
            stated = self.buckets
        buckets = sorted({self._check(Bucket(*b)) for b in stated})
        if not buckets:
            raise ValueError("buckets is empty; give (num_frames, height, width) triples")
        for bucket in buckets:
            if self.token_budget is not None and self.tokens(bucket) > self.token_budget:
                raise ValueError(
                    f"{bucket} is {self.tokens(bucket)} tokens, more than token_budget={self.token_budget}"
                )
        return buckets

    def _generated(self) -> list[Bucket]:
        if self.resolution is None or (self.num_frames is None and self.token_budget is None):
            raise ValueError(
                "state the training shape: height, width and num_frames for one shape; or resolution with num_frames "
                "or token_budget for buckets; or buckets"
            )
        sizes = set()
        for side, ratio in itertools.product(_as_list(self.resolution), self.aspect_ratios):
            sizes.add(self.nearest_size(side / math.sqrt(ratio), side * math.sqrt(ratio)))
        if self.num_frames is not None:
            counts = [self._check(Bucket(n, *next(iter(sizes)))).num_frames for n in _as_list(self.num_frames)]
        else:  # steps of at most a quarter: with every valid count, most buckets would hold a clip or two
            smallest = min(self.tokens((1, *size)) for size in sizes)
            longest = self.token_budget // smallest * self.temporal_factor + self.frame_offset
            steps = sorted({m * 2**e // 4 for m in (4, 5, 6, 7) for e in range(20) if m * 2**e % 4 == 0})
            counts = [self.frame_offset + k * self.frame_multiple for k in steps]
            counts = [n for n in counts if 1 < n <= longest]
        every = {Bucket(n, *size) for n in counts for size in sizes}
        buckets = sorted(b for b in every if self.token_budget is None or self.tokens(b) <= self.token_budget)
        if not buckets:
            least = min(every, key=self.tokens, default=Bucket(self.nearest_frames(1), *min(sizes)))
            raise ValueError(
                f"no bucket fits token_budget={self.token_budget}: the smallest, {least}, is {self.tokens(least)} tokens; "
                "lower the resolution or raise the budget"
            )
        return buckets

    def assign(self, info: VideoInfo) -> tuple[int | None, str]:
        """
        Choose the bucket of a clip.

        Args:
            info ([`VideoInfo`]): Of the clip.

        Returns:
            `tuple`: The bucket's index, or `None` with the reason why no bucket fits.
        """
        frames, image = info.frames_at(self.fps), info.num_frames == 1
        if image:
            fitting = [b for b in self.buckets if b.num_frames == 1]
            if not fitting:
                return None, f"is a still image, and the model's frame counts are {self._frame_rule()}"
        else:
            fitting = [b for b in self.buckets if b.num_frames <= frames and b not in self.image_only]
        if not fitting:
            least = min(b.num_frames for b in self.buckets if b not in self.image_only)
            at = f" at {self.fps:g} fps" if self.fps and info.fps else ""
            hint, usable = "", self.floor_frames(frames)
            if usable >= 1 and (usable > 1 or least == 1):
                hint = f"; num_frames={usable} would keep it"
            return None, f"too short: {frames} frames{at}, {least} are needed{hint}"

        def stretch(bucket):
            return abs(math.log(info.width / info.height * bucket.height / bucket.width))

        # sizes are rounded to pixel_multiple, so one ratio's buckets differ a little: 5 % counts as equal
        nearest = min(map(stretch, fitting))
        fitting = [b for b in fitting if stretch(b) <= nearest + 0.05]
        inside = [b for b in fitting if b.height <= info.height and b.width <= info.width]
        if inside:
            best = max(inside, key=lambda b: (self.tokens(b), b.num_frames, -stretch(b), b))
        else:  # all of them enlarge the clip: the smallest does so least
            best = min(fitting, key=lambda b: (b.height * b.width, -b.num_frames, stretch(b), b))
        return self.buckets.index(best), ""

    def plan_clip(self, index: int, sample_id: str, info: VideoInfo) -> list[PlanRow]:
        """
        Plan one clip.

        Args:
            index (`int`): Row of the dataset.
            sample_id (`str`): For the report.
            info ([`VideoInfo`]): Of the clip.

        Returns:
            list of [`PlanRow`]: One, or more with `windows="all"`.
        """
        number, why = self.assign(info)
        if number is None:
            return [PlanRow(index, sample_id, "dropped", why, fps=info.fps)]
        bucket, available = self.buckets[number], info.frames_at(self.fps)
        target = self.fps if info.fps is not None and self.fps is not None else None
        notes, action = [], "kept"
        scaled = cover_size(info.height, info.width, bucket.height, bucket.width)
        if scaled != (info.height, info.width):
            word = "enlarged" if scaled[0] > info.height or scaled[1] > info.width else "scaled"
            notes.append(f"{word} {info.height}x{info.width} to {scaled[0]}x{scaled[1]}")
        if scaled != (bucket.height, bucket.width):
            lost = 1 - bucket.height * bucket.width / (scaled[0] * scaled[1])
            notes.append(f"cropped to {bucket.height}x{bucket.width} ({lost:.1%} of the picture lost)")
            action = "cropped"
        if self.fps is not None and info.fps is None and info.num_frames > 1:
            notes.append("frame rate unknown, so not resampled (an `fps` column states it)")
        starts, left = [0], available - bucket.num_frames
        if left:
            if self.windows == "center":
                starts = [left // 2]
            elif self.windows == "all":
                starts = list(range(0, left + 1, bucket.num_frames))
            action = "cropped"
        if target is not None and abs(info.fps - target) > 1e-3 * target:
            repeated = " (frames are repeated)" if target > info.fps * 1.001 else ""
            notes.append(f"{info.fps:g} to {target:g} fps{repeated}")
            action = "retimed"
        rows = []
        for start in starts:
            used = [f"frames {start}-{start + bucket.num_frames - 1} of {available}"] if left else []
            name = f"{sample_id}#{start}" if len(starts) > 1 else sample_id
            reason = "; ".join(notes + used) or "fits as it is"
            rows.append(PlanRow(index, name, action, reason, number, start, target, target or info.fps))
        return rows


@dataclass
class Plan:
    """
    What [`plan_dataset`] decided. `str(plan)` is a readable report, `plan.to_json(path)` the full list.

    Args:
        spec ([`ShapePlan`]): The rules.
        max_bad_fraction (`float`): Unreadable clips beyond this share are an error.
        rows (list of [`PlanRow`]): One per clip and window, in the dataset's order.
        complete (`bool`): `False` for a streaming dataset that has not been read yet.
        quiet (`bool`): Do not warn of unreadable clips: another process does.
    """

    spec: ShapePlan
    max_bad_fraction: float = 0.1
    rows: list[PlanRow] = field(default_factory=list)
    complete: bool = False
    quiet: bool = False

    @property
    def buckets(self) -> list[Bucket]:
        """The training shapes."""
        return self.spec.buckets

    @property
    def samples(self) -> list[PlanRow]:
        """The rows that are trained on."""
        return [row for row in self.rows if row.action != "dropped"]

    def counts(self) -> dict[str, int]:
        """How many clips were kept, cropped, retimed and dropped."""
        counts = Counter(row.action for row in self.rows)
        return {action: counts[action] for action in ACTIONS}

    def add(self, index: int, row: dict) -> list[PlanRow]:
        """Plan one dataset row and append the result; an unreadable clip costs one warning."""
        prompt_id = _sample_id(index, row)
        check_prompt(row.get("prompt"), prompt_id)
        if "video" not in row:
            planned = [PlanRow(index, prompt_id, "kept", "a prompt without a video", 0, fps=self.spec.fps)]
        else:
            try:
                info = probe_video(row["video"], row.get("fps"))
                planned = self.spec.plan_clip(index, prompt_id, info)
            except ValueError as error:
                if not self.quiet:
                    logger.warning("clip skipped: %s", error)
                planned = [PlanRow(index, prompt_id, "dropped", f"unreadable: {error}", unreadable=True)]
        self.rows += planned
        return planned

    def finish(self) -> None:
        """Check the whole plan. Called when the last row was added."""
        self.complete = True
        bad = list({row.index: row for row in self.rows if row.unreadable}.values())
        total = len({row.index for row in self.rows})
        if total == 0:
            raise ValueError("the dataset is empty")
        if len(bad) > self.max_bad_fraction * total:
            raise ValueError(
                f"{len(bad)} of {total} clips cannot be read, more than max_bad_fraction={self.max_bad_fraction:g} allows; "
                f"the first: {bad[0].reason}"
            )
        if not self.samples:
            raise ValueError(f"every clip was dropped; the first: {self.rows[0].sample_id} {self.rows[0].reason}")

    def to_json(self, path: str | os.PathLike) -> None:
        """Write counts, buckets and every row as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.as_dict(), file, indent=1, ensure_ascii=False)

    def as_dict(self) -> dict:
        """Counts, buckets and every row, JSON-able."""
        used = Counter(row.bucket for row in self.samples)
        buckets = [
            {**b._asdict(), "tokens": self.spec.tokens(b), "clips": used[i]} for i, b in enumerate(self.buckets)
        ]
        return {"counts": self.counts(), "buckets": buckets, "clips": [asdict(row) for row in self.rows]}

    def __str__(self):
        return self.report()

    def report(self, max_rows: int = 20) -> str:
        """The readable report: a summary, the buckets in use, and up to `max_rows` clips, the dropped ones first."""
        counts, used = self.counts(), Counter(row.bucket for row in self.samples)
        if not self.complete and not self.rows:
            return "plan: the dataset streams; it is planned while it is cached"
        lines = [f"plan: {len(self.rows)} clips: " + ", ".join(f"{n} {a}" for a, n in counts.items())]
        for number, clips in sorted(used.items()):
            bucket = self.buckets[number]
            tokens, noun = self.spec.tokens(bucket), "clip" if clips == 1 else "clips"
            lines.append(f"  bucket {number}: {bucket} (frames x height x width), {tokens} tokens, {clips} {noun}")
        order = {"dropped": 0, "retimed": 1, "cropped": 2, "kept": 3}
        rows = sorted(self.rows, key=lambda row: order[row.action])
        if rows:
            wide = max(len(_short(row.sample_id)) for row in rows[:max_rows])
            for row in rows[:max_rows]:
                where = "-" if row.bucket is None else str(self.buckets[row.bucket])
                lines.append(f"  {_short(row.sample_id):<{wide}}  {row.action:<7}  {where:<12}  {row.reason}".rstrip())
        if len(rows) > max_rows:
            lines.append(f"  ... and {len(rows) - max_rows} more; plan.to_json(path) lists them all")
        return "\n".join(lines)


def plan_dataset(dataset, *, max_bad_fraction: float = 0.1, quiet: bool = False, **rules) -> Plan:
    """
    Decide for every clip whether it is kept, cropped, retimed or dropped.

    Reads headers only, not whole files. A streaming dataset is planned while [`build_cache`] reads it.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or list of `dict`): With the columns `prompt` and `video`, see
            [`standardize_columns`]; without `video`, every prompt gets the first bucket.
        max_bad_fraction (`float`, *optional*, defaults to `0.1`): Largest share of unreadable clips, 0 to 1.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar, no warnings: for all processes but the first.
        **rules: The arguments of [`ShapePlan`].

    Returns:
        [`Plan`].

    Raises:
        `ValueError`: If the shape does not fit the model, too many clips are unreadable, or none is left.

    Example:

    ```python
    >>> plan = plan_dataset(dataset, height=64, width=64, num_frames=17, fps=8)
    >>> print(plan)
    ```
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction must be between 0 and 1, not {max_bad_fraction}")
    plan = Plan(ShapePlan(**rules), max_bad_fraction, quiet=quiet)
    if isinstance(dataset, IterableDataset):
        return plan
    for index, row in enumerate(tqdm(dataset, desc="Planning", delay=2, disable=quiet)):
        plan.add(index, row)
    plan.finish()
    return plan


def _sample_id(index: int, row: dict) -> str:
    video = row.get("video")
    path = video.get("path") if isinstance(video, dict) else video
    return os.path.basename(source_name(path)) if isinstance(path, (str, os.PathLike)) else f"row-{index}"


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else "..." + text[3 - limit :]


def _as_list(value) -> list:
    return [value] if isinstance(value, int) else list(value)
