"""The completion log: what a run generated, what each reward gave it, and the advantage that followed."""

import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.nn.functional as F
from huggingface_hub import HfApi
from PIL import Image
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.video import write_video
from ..hub.upload import create_repository, retried
from .callbacks import frame_strip, log_videos, slug
from .checkpoint import publish


logger = logging.get_logger(__name__)

RESERVED = ("step", "prompt", "video", "file_name", "advantage", "seed")
THUMBNAIL_HEIGHT = 64  # pixels
CARD = """\
---
pretty_name: vidtrl completion log
tags: [vidtrl, completions]
configs:
- config_name: default
  data_files: ["metadata.jsonl", "step_*/*.mp4"]
---

Videos that a model generated while [vidtrl](https://pypi.org/project/vidtrl) trained it, with the rewards and
advantages they got.

```python
from datasets import load_dataset

dataset = load_dataset("THIS_FOLDER_OR_REPOSITORY", split="train")  # video, step, prompt, rewards, advantage, seed
```
"""


class CompletionLog:
    """
    Writes generated videos with their rewards. Used by [`VideoGRPOTrainer`] with `log_completions=True`, on the main
    process only.

    `output_dir/completions` is a dataset: `load_dataset` reads the videos back with all columns.

        step_000010/00-a-red-circle-moving-right.mp4   one video each
        step_000010/00-a-red-circle-moving-right.png   eight of its frames side by side, 64 pixels high
        completions_00010.parquet                      step, prompt, video, one column a reward, advantage, seed, extras
        metadata.jsonl                                 the same rows of all steps, as VideoFolder wants them

    A step appears whole or not at all, and a step that is written again (after resuming) replaces its former self.

    Args:
        output_dir (`str` or `PathLike`): The run's directory.
        num_print (`int`, *optional*): How many rows the printed table shows, drawn at random from the step, the same
            ones each time the step is written. `None` prints all, 0 none.
        unique_prompts (`bool`, *optional*, defaults to `False`): Show trackers the first video of each prompt only.
            Files and the printed table have all of them.
        hub_repo (`str`, *optional*): Dataset repository on the Hub, created if need be. Each step is uploaded in the
            background; what could not be uploaded is a warning, and tried again with the next step.
        fps (`float`, *optional*, defaults to `16`): Frame rate of the mp4 files.
        hub_token (`str`, *optional*): Default: the one `hf auth login` stored.
        hub_private_repo (`bool`, *optional*): Whether a created repository is private. Default: as the account says.

    Example:

    ```python
    >>> import torch
    >>> from vidtrl.trainer.completions import CompletionLog

    >>> log = CompletionLog("run", fps=8)
    >>> table = log.write(
    ...     step=10,
    ...     prompts=["a red circle"],
    ...     videos=[torch.zeros(17, 3, 64, 64)],
    ...     rewards={"smoothness": [0.5]},
    ...     advantages=[0.0],
    ...     seeds=[1],
    ... )
    >>> table.name
    'completions_00010.parquet'
    ```
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        num_print: int | None = None,
        unique_prompts: bool = False,
        hub_repo: str | None = None,
        fps: float = 16,
        hub_token: str | None = None,
        hub_private_repo: bool | None = None,
    ):
        self.folder = Path(output_dir, "completions")
        self.num_print = num_print
        self.unique_prompts = unique_prompts
        self.fps = fps
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "README.md").write_text(CARD, encoding="utf-8")
        self.api = self.hub_repo = None
        self.uploads: list[tuple[Future, list[str]]] = []
        if hub_repo is not None:
            # a missing token or permission shows here, before hours of training
            self.api = HfApi(token=hub_token)
            self.hub_repo = create_repository(self.api, hub_repo, "dataset", hub_private_repo, None)

    def write(
        self,
        step: int,
        prompts: Sequence[str],
        videos: Sequence[Tensor],
        rewards: dict[str, Sequence[float | None]],
        advantages: Sequence[float],
        seeds: Sequence[int],
        extra: dict[str, Sequence[Any]] | None = None,
        report_to: Sequence[str] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Path:
        """
        Write, print, log and upload the completions of one step.

        Args:
            step (`int`): Optimizer steps done.
            prompts (`Sequence[str]`): One a video.
            videos (`Sequence[Tensor]`): Float (F, 3, H, W) in [0, 1].
            rewards (`dict[str, Sequence[float | None]]`): By reward; `None` and NaN where it does not apply.
            advantages (`Sequence[float]`): One a video.
            seeds (`Sequence[int]`): The seed of each video's first noise.
            extra (`dict[str, Sequence]`, *optional*): Further columns, such as those of a reward's `log_extra`.
            report_to (`Sequence[str]`, *optional*): As in the training arguments.
            callbacks (`Sequence[TrainerCallback]`, *optional*): The trainer's; TensorBoard's is among them.

        Returns:
            `Path`: The Parquet file.

        Raises:
            `ValueError`: If a reward or an extra column has the name of another column.
        """
        extra = extra or {}
        assert all(len(c) == len(prompts) for c in (videos, advantages, seeds, *rewards.values(), *extra.values()))
        for kind, names in (("reward", rewards), ("log_extra column", extra)):
            for name in names:
                if name in RESERVED or (kind != "reward" and name in rewards):
                    raise ValueError(
                        f"a {kind} is named {name!r}, as another column of the completion log; give it another name"
                    )
        directory = self.folder / f"step_{step:06d}"
        names = [f"{i:02d}-{slug(prompt)}" for i, prompt in enumerate(prompts)]
        self._write_videos(directory, names, videos)
        table = pa.table(
            {
                "step": pa.array([step] * len(prompts), pa.int64()),
                "prompt": pa.array(prompts, pa.string()),
                "video": pa.array([f"{directory.name}/{name}.mp4" for name in names], pa.string()),
                **{name: _numbers(values) for name, values in rewards.items()},
                "advantage": _numbers(advantages),
                "seed": pa.array(seeds, pa.int64()),
                **{name: _column(values) for name, values in extra.items()},
            }
        )
        path = self.folder / f"completions_{step:05d}.parquet"
        staging = path.with_name(f"_{path.name}.tmp")
        pq.write_table(table, staging)
        os.replace(staging, path)
        rows = table.to_pylist()
        self._merge_metadata(step, rows)
        self._print(step, rows, list(rewards), list(extra))
        self._track(step, rows, report_to, callbacks)
        if self.api is not None:
            self._upload(step, ["README.md", "metadata.jsonl", path.name, f"{directory.name}/*"])
        return path

    def _write_videos(self, directory: Path, names: list[str], videos: Sequence[Tensor]) -> None:
        staging = directory.with_name(f"_{directory.name}.tmp")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name, video in zip(names, videos, strict=True):
            assert video.is_floating_point()
            video = video.detach().float().cpu()
            write_video(staging / f"{name}.mp4", video, fps=self.fps)
            height = min(THUMBNAIL_HEIGHT, video.shape[2])
            size = (height, max(1, round(video.shape[3] * height / video.shape[2])))
            strip = frame_strip(F.interpolate(video, size, mode="area"))
            pixels = (strip.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(staging / f"{name}.png")
        publish(staging, directory)

    def _merge_metadata(self, step: int, rows: list[dict]) -> None:
        """One file for all steps: with one a step, VideoFolder would take the column types from the first alone."""
        path = self.folder / "metadata.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        lines = [line for line in lines if json.loads(line)["step"] != step]
        for row in rows:
            row = {"file_name" if name == "video" else name: value for name, value in row.items()}
            lines.append(json.dumps(row, allow_nan=False))
        staging = path.with_name("_metadata.jsonl.tmp")
        staging.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(staging, path)

    def _print(self, step: int, rows: list[dict], rewards: list[str], extra: list[str]) -> None:
        shown = range(len(rows))
        if self.num_print is not None and self.num_print < len(rows):
            # a generator of its own: the global one belongs to the training, which must not change by being watched
            shown = sorted(random.Random(step).sample(shown, max(0, self.num_print)))
        if not shown:
            return
        table = Table(expand=True)
        for name, style in (("prompt", "yellow"), ("thumbnail", "green")):
            table.add_column(name, style=style, overflow="fold")
        for name in [*rewards, "advantage"]:
            table.add_column(Text(name), style="cyan" if name != "advantage" else "magenta", justify="right")
        for name in extra:
            table.add_column(Text(name))
        for i in shown:
            cells = [rows[i]["prompt"], str(Path(rows[i]["video"]).with_suffix(".png"))]
            cells += ["-" if rows[i][name] is None else f"{rows[i][name]:.3f}" for name in [*rewards, "advantage"]]
            cells += ["-" if rows[i][name] is None else str(rows[i][name]) for name in extra]
            table.add_row(*map(Text, cells), end_section=True)  # Text: a prompt's [brackets] are no markup
        Console().print(Panel(table, title=f"Step {step}", subtitle=Text(f"thumbnails: {self.folder}")))

    def _track(self, step: int, rows: list[dict], report_to: Sequence[str], callbacks: Sequence[TrainerCallback]):
        if self.unique_prompts:
            rows = list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]
        paths, captions = [self.folder / row["video"] for row in rows], [row["prompt"] for row in rows]
        log_videos("completions", paths, captions, step=step, report_to=report_to, callbacks=callbacks)
        columns, data = list(rows[0]) if rows else [], [list(row.values()) for row in rows]
        if "trackio" in report_to:
            import trackio

            trackio.log({"completions": trackio.Table(columns=columns, data=data)}, step=step)
        if "wandb" in report_to:
            import wandb

            wandb.log({"completions": wandb.Table(columns=columns, data=data), "train/global_step": step})

    def _upload(self, step: int, patterns: list[str]) -> None:
        finished = [upload for upload in self.uploads if upload[0].done()]
        self.uploads = [upload for upload in self.uploads if upload not in finished]
        for future, earlier in finished:
            if future.exception() is not None:
                patterns = [*earlier, *patterns]

        def upload():
            return self.api.upload_folder(
                repo_id=self.hub_repo,
                repo_type="dataset",
                folder_path=self.folder,
                allow_patterns=list(dict.fromkeys(patterns)),
                commit_message=f"Completions of step {step}",
            )

        def watched():
            try:
                return retried(upload, f"completions of step {step} not uploaded to {self.hub_repo}", self.api.token)
            except Exception as error:
                logger.warning(f"{error} With the next step it is tried again; the files are in {self.folder}.")
                raise

        future = self.api.run_as_future(watched)  # the interpreter waits at its end for what is still under way
        self.uploads.append((future, patterns))


def _numbers(values: Sequence[float | None]) -> pa.Array:
    """float64; not applicable is null, and so are NaN and infinity, which JSON does not know."""
    numbers = [None if value is None else float(value) for value in values]
    return pa.array([n if n is not None and math.isfinite(n) else None for n in numbers], pa.float64())


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers where all values are numbers, else text."""
    if all(value is None or type(value) is int for value in values):
        return pa.array(values, pa.int64())
    if all(value is None or isinstance(value, (int, float)) for value in values):
        return _numbers(values)
    return pa.array([None if value is None else str(value) for value in values], pa.string())
