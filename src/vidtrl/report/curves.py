"""Learning curves of a run, from what its trainer logged."""

import math
from collections.abc import Mapping, Sequence

from .html import Chart


MAX_SERIES = 4  # of a chart


def training_charts(log: Sequence[Mapping], prefix: str = "") -> list[Chart]:
    """
    Everything that tells whether a training is healthy: losses, every reward, divergences, then [`optimization_charts`].

    Args:
        log (`Sequence[Mapping]`): `log_history` of a trainer's `trainer_state.json`; entries have `step`.
        prefix (`str`, *optional*, defaults to `""`): Before each title, such as `"GRPO: "`.

    Returns:
        `list[Chart]`: Without those whose values are missing.
    """
    keys = dict.fromkeys(key for entry in log for key in entry)
    rewards, watched = (
        [
            key.removeprefix(start).removesuffix("/mean")
            for key in keys
            if key.startswith(start) and key.endswith("/mean")
        ]
        for start in ("rewards/", "eval_rewards/")
    )
    networks = {k.removeprefix("loss/"): k for k in keys if k.startswith("loss/")}
    step, reward = "optimizer step", "mean reward"
    specs = [
        ("Loss", {"training": "loss", "held out": "eval_loss"}, "loss", ""),
        ("Loss of each network", networks, "loss", ""),
        ("Reward", {"training": "reward", "fixed prompts": "eval_reward"}, "weighted sum", "What is trained on."),
        *(
            (
                f"Reward {name}",
                {"training": f"rewards/{name}/mean", "fixed prompts": f"eval_rewards/{name}/mean"},
                reward,
                "" if name in rewards else "Measured, never trained on: it falls where another reward is gamed.",
            )
            for name in dict.fromkeys(rewards + watched)
        ),
        (
            "Spread of rewards in a group",
            {"training": "reward_std"},
            "standard deviation",
            "Where it is 0, no group says which sample is better.",
        ),
        ("Divergence from the reference", {"KL": "kl"}, "KL", ""),
        ("Score difference", {"of the student's samples": "dmd_gradient"}, "root mean square", ""),
        (
            "The student's samples",
            {"standard deviation": "generated/std", "change between frames": "generated/temporal_difference"},
            "of clean latents",
            "A falling change between frames would be a collapse of motion.",
        ),
    ]
    charts = [chart for spec in specs for chart in _charts(log, prefix, step, *spec)]
    return charts + _by_noise_level(log, prefix) + optimization_charts(log, prefix)


def optimization_charts(log: Sequence[Mapping], prefix: str = "") -> list[Chart]:
    """
    Learning rate, gradient norm, and where the time goes.

    Args:
        log (`Sequence[Mapping]`): As for [`training_charts`].
        prefix (`str`, *optional*, defaults to `""`): Before each title.

    Returns:
        `list[Chart]`: Without those whose values are missing.
    """
    specs = [
        ("Learning rate", {"learning rate": "learning_rate"}, "learning rate", ""),
        ("Gradient norm", {"before clipping": "grad_norm"}, "L2 norm", ""),
        (
            "Step time",
            {"rollout": "rollout_time", "rewards": "reward_time", "update": "update_time", "step": "step_time"},
            "seconds",
            "",
        ),
        ("Speed", {"training": "clips_per_second"}, "clips a second", ""),
    ]
    return [chart for spec in specs for chart in _charts(log, prefix, "optimizer step", *spec)]


def _charts(
    log: Sequence[Mapping], prefix: str, x_label: str, title: str, names: Mapping[str, str], y_label: str, note: str
) -> list[Chart]:
    """One chart, more where it would have too many series, none without points."""
    series = {name: points for name, key in names.items() if (points := curve(log, key))}
    items = list(series.items())
    return [
        Chart(prefix + title, dict(items[i : i + MAX_SERIES]), x_label, y_label, note)
        for i in range(0, len(items), MAX_SERIES)
    ]


def curve(log: Sequence[Mapping], key: str) -> list[tuple[float, float]]:
    """(step, value) of each entry that has a finite value under the key. The trainer's summary at the end is left out."""
    points = []
    for entry in log:
        step, value = entry.get("step"), entry.get(key)
        if "train_runtime" not in entry and _number(step) and _number(value):
            points.append((float(step), float(value)))
    return points


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_noise_level(log: Sequence[Mapping], prefix: str) -> list[Chart]:
    """The held-out loss by sigma, at the first and at the last evaluation."""
    evals = [entry for entry in log if any(key.startswith("eval_loss_sigma_") for key in entry)]
    series = {}
    for entry in [*evals[-1:], *(evals[:1] if evals[1:] else [])]:
        points = [
            (float(key.rsplit("_", 1)[1]), float(value))
            for key, value in entry.items()
            if key.startswith("eval_loss_sigma_")
            and key.rsplit("_", 1)[1].replace(".", "", 1).isdigit()
            and _number(value)
        ]
        if points:
            series[f"step {entry.get('step')}"] = sorted(points)
    if not series:
        return []
    note = "Fine detail on the left, layout and motion on the right."
    return [Chart(f"{prefix}Held-out loss by noise level", series, "noise level (sigma)", "loss", note)]
