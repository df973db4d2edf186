"""What a run's history says, for its card: rewards and their curves, evaluation, method and paper."""

import os
import re
from pathlib import Path
from typing import Any

from . import papers
from .curves import draw_curves


REWARD = re.compile(r"rewards/(.+)/mean")
TIMES = re.compile(r"eval_(runtime|.*_per_second|.*_time|epoch)$")


def metric(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, in order; a step that was logged twice (after resuming) counts once, as it was last."""
    return sorted(
        {e["step"]: e[name] for e in history if isinstance(e.get(name), (int, float)) and "step" in e}.items()
    )


def rewards(history: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """
    The mean of each reward over training.

    Args:
        history (`list[dict]`): `trainer.state.log_history`.

    Returns:
        `dict[str, list[tuple[int, float]]]`: Reward's name -> (step, mean).
    """
    names = dict.fromkeys(match[1] for entry in history for key in entry if (match := REWARD.fullmatch(key)))
    return {name: metric(history, f"rewards/{name}/mean") for name in names}


def first_and_last(curves: dict[str, list[tuple[int, float]]]) -> list[dict[str, str]]:
    """Table rows: name, first and last value with their steps."""
    return [
        {"name": name, "first": f"{points[0][1]:.4g}", "last": f"{points[-1][1]:.4g}", "step": str(points[-1][0])}
        for name, points in curves.items()
        if points
    ]


def evaluation(history: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The metrics of evaluations, without those that only say how long one took."""
    names = dict.fromkeys(
        key for entry in history for key in entry if key.startswith("eval_") and not TIMES.match(key)
    )
    return {name.removeprefix("eval_"): metric(history, name) for name in names}


def write_curves(output_dir: str | os.PathLike, history: list[dict[str, Any]]) -> list[dict[str, str]]:
    """
    Draw the curves of a run into `output_dir/curves`.

    Args:
        output_dir (`str` or `PathLike`): The run's directory.
        history (`list[dict]`): `trainer.state.log_history`.

    Returns:
        `list[dict[str, str]]`: `path` below `output_dir`, and `title`, of each picture.
    """
    loss = {name: metric(history, key) for name, key in (("loss", "loss"), ("evaluation loss", "eval_loss"))}
    pictures = []
    for name, curves in (("rewards", rewards(history)), ("loss", loss)):
        if any(len(points) > 1 for points in curves.values()):
            draw_curves(Path(output_dir, "curves", f"{name}.png"), curves)
            pictures.append({"path": f"curves/{name}.png", "title": f"{name} over training"})
    return pictures


def method_and_paper(method: str, recipe: str | None) -> tuple[str, str | None]:
    """
    How a run was trained, in Markdown, and the paper's id.

    Args:
        method (`str`): `"SFT"`, `"GRPO"`, `"Distillation"`, ...
        recipe (`str`, *optional*): Of the trainer's configuration.
    """
    known = papers.GRPO | papers.DISTILL
    name, paper = papers.FLOW_MATCHING if method == "SFT" else known.get(recipe, (None, None))
    if paper is None:
        return method if recipe is None else f"{method}, recipe `{recipe}`", None
    link = f"[{name}](https://huggingface.co/papers/{paper})"
    return f"{method} ({link})" if method == "SFT" else f"{method}, recipe `{recipe}` ({link})", paper
