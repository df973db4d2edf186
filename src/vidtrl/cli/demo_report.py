"""What `vidtrl demo` shows: the tables, a few sentences, and `report.html`."""

import json
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .demo_settings import MODELS, STAGES
from .env import hardware


MAX_SHOWN = 72  # clips on the page
# of the recipe in DemoSettings
WHY_RECIPE = (
    "Why this one: it learns from finished videos that are sampled as they are measured here, without noise and guidance, and "
    "it reached the goal in the minutes that the demo has. At equal evaluations of the denoiser, flash-grpo with shared noise "
    "gained as much on this toy"
)

METRICS = {  # name -> (label, digits after the point of its percentage, higher is better, how it is measured)
    "all": ("All three right", 0, True, "colour, shape and direction as the caption asks"),
    "color": ("Colour", 0, True, "palette colour nearest to the shape's pixels"),
    "shape": ("Shape", 0, True, "filled share of the bounding box"),
    "direction": ("Direction", 0, True, "slope of the centroid"),
    "present": ("Shape visible", 0, True, "in at least 60 % of the frames; no stage is trained on it"),
    "flicker": (
        "Flicker",
        1,
        False,
        "standard deviation of the shape's brightness over time, relative to its mean",
    ),
    "smoothness": ("Smoothness", 1, True, "100 % is uniform motion"),
    "users_all": (
        "All three right, users' prompts",
        0,
        True,
        "from words that no training contains: as written, enhanced, and enhanced for the distilled student",
    ),
    "users_color": ("Colour, users' prompts", 0, True, "as above"),
    "users_shape": ("Shape, users' prompts", 0, True, "as above"),
    "users_direction": ("Direction, users' prompts", 0, True, "as above"),
}


def results_table(results: dict) -> Group:
    """
    The results as tables for the terminal, with 95 % intervals; under each model its change against the one before.

    Three models fit a terminal of 80 columns; a second table goes on from the last of the first.
    """
    models = results["models"]
    title = (
        f"{results['num_clips']} held-out clips a model, measured from their mp4 files: % [95 % interval]\n"
        "second lines: change against the model on the left"
    )
    captions = [name for name in models if name in results["metrics"]["all"]]
    metrics = [name for name in results["metrics"] if not name.startswith("users_")]
    starts = range(0, max(1, len(captions) - 1), 2)
    tables = [_table(results, metrics, captions[start : start + 3], title) for start in starts]
    if "users_all" in results["metrics"]:
        title = (
            f"{results['num_user_clips']} users' prompts, in words that no training contains: % [95 % interval]\n"
            "as written; enhanced; enhanced, for the distilled student"
        )
        users = [name for name in models if name in results["metrics"]["users_all"]]
        metrics = [name for name in results["metrics"] if name.startswith("users_")]
        starts = range(0, max(1, len(users) - 1), 2)
        tables += [_table(results, metrics, users[start : start + 3], title) for start in starts]
    return Group(*tables)


def _table(results: dict, metrics: list[str], models: list[str], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("Measured", *(MODELS[name] for name in models)):
        table.add_column(name, justify="left" if name == "Measured" else "right")
    for metric in metrics:
        label, digits, higher, _ = METRICS[metric]
        label, row = label.removesuffix(", users' prompts"), results["metrics"][metric]

        def show(e, sign="", digits=digits):
            value, low, high = (f"{100 * e[k]:{sign}.{digits}f}" for k in ("value", "low", "high"))
            return f"{value} [{low}, {high}]"

        cells = []
        for name in models:
            cell = Text(show(row[name]))
            if name in row["differences"] and name != models[0]:
                difference = row["differences"][name]
                clear = not difference["low"] <= 0 <= difference["high"]
                style = "dim" if not clear else "green" if (difference["value"] > 0) == higher else "red"
                cell.append("\n" + show(difference, "+"), style=style)
            cells.append(cell)
        table.add_row(label, *cells)
    return table


def verdict(results: dict) -> str:
    """The result in two sentences."""
    row, flicker = results["metrics"]["all"], results["metrics"]["flicker"]
    text = f"Clips that show the asked colour, shape and direction: {100 * row['base']['value']:.0f} % of the base's"
    words = {"sft": "after SFT", "grpo": "after GRPO", "teacher": "with guidance"}
    words |= {"control": "in few steps without it", "distill": "in as few after distillation"}
    for name, difference in row["differences"].items():
        points, low, high = (f"{100 * difference[k]:+.0f}" for k in ("value", "low", "high"))
        text += f", {100 * row[name]['value']:.0f} % {words[name]} ({points} points; 95 % interval {low} to {high})"
    steps = [f"{100 * flicker[name]['value']:.1f} %" for name in results["models"] if name in flicker]
    return f"{text}. Flicker: {', then '.join(steps)}."


def enhancer_note(results: dict) -> str:
    """What users' own words give, and what the enhancer makes of them."""
    row, users = results["metrics"]["users_all"], results["user_clips"]
    share = lambda name: f"{100 * row[name]['value']:.0f} %"  # noqa: E731
    text = f"Of {len(users)} prompts in users' own words, {share('grpo')} come out all right as they are written"
    if "enhancer_sft" in row:
        text += f", {share('enhancer_sft')} with the enhancer after its SFT"
    text += f", {share('enhancer')} with the enhancer"
    if "distill" in row:
        text += f", and {share('distill')} with the enhancer and the distilled student"
    kept, first = sum(not clip["enhancer"]["enhanced"] for clip in users), users[0]
    text += f'. "{first["prompt"]}", for one, became "{first["enhancer"]["prompt"]}"'
    return text + (f"; {kept} prompts were left as they are." if kept else ".")


def recipe_note(results: dict, output: Path) -> str:
    """Which method the GRPO stage used and why, on which rewards, and what the untrained ones did."""
    settings = results["settings"]
    log = json.loads((output / "grpo" / "trainer_state.json").read_text())["log_history"]
    evals = [entry for entry in log if "eval_reward" in entry]
    watched = []
    for name in settings["watched_rewards"]:
        values = [entry[f"eval_rewards/{name}/mean"] for entry in evals]
        watched.append(f"{name} went from {values[0]:.2f} to {values[-1]:.2f}")
    weights = settings["grpo"].get("reward_weights") or [1.0] * len(settings["rewards"])
    rewards = " + ".join(f"{weight:.2g} {name}" for weight, name in zip(weights, settings["rewards"], strict=True))
    return (
        f"The GRPO stage ran the recipe {settings['grpo']['recipe']} for {settings['grpo']['max_steps']} updates on "
        f"{rewards}. Measured and never trained on: {', '.join(watched) or 'nothing'}. "
        f"{WHY_RECIPE} (docs/grpo_trainer.md)."
    )


def speed_note(results: dict) -> str:
    """What the distilled student keeps of its teacher, and how much faster it is."""
    speed, row = results["speed"], results["metrics"]["all"]
    teacher, student = speed["teacher"], speed["distill"]
    kept, control = (100 * row[name]["value"] / max(row["teacher"]["value"], 1e-9) for name in ("distill", "control"))
    return (
        f"The student keeps {kept:.0f} % of its teacher's clips with all three right, with {student['evaluations']} evaluations "
        f"of the denoiser a clip instead of {teacher['evaluations']}; as few without distillation keep {control:.0f} %. A clip takes {1000 * student['denoise_seconds']:.0f} ms of "
        f"denoising instead of {1000 * teacher['denoise_seconds']:.0f} ({speed['denoise_ratio']:.1f} times as fast), and "
        f"{1000 * student['total_seconds']:.0f} ms in all instead of {1000 * teacher['total_seconds']:.0f} "
        f"({speed['total_ratio']:.1f} times as fast; decoding is not distilled). Decoding in bfloat16 with channels last, the student takes "
        f"{1000 * speed['distill_fast']['total_seconds']:.0f} ms: {speed['total_ratio_student']:.1f} times as fast as the teacher as it was, "
        f"{speed['total_ratio_fast']:.1f} times as fast as the teacher with the same decoder."
    )


def write_demo_report(output: Path, results: dict) -> Path:
    """Write `report.html` from the results, the videos and the training logs."""
    from ..report import Estimate, Gallery, Metric, write_report
    from ..report.curves import training_charts

    models = {name: MODELS[name] for name in results["models"]}
    metrics = [
        Metric(
            label,
            {text: Estimate(**row[name]) for name, text in models.items() if name in row},
            {models[n]: Estimate(**difference) for n, difference in row["differences"].items()},
            higher_is_better=higher,
            percent=True,
            digits=digits,
            help=f"{help_text} ({results['num_user_clips']} clips)" if key == "users_all" else help_text,
        )
        for key, row in results["metrics"].items()
        if not (key.startswith("users_") and key != "users_all")  # as many as a page is wide
        for label, digits, higher, help_text in (METRICS[key],)
    ]
    galleries = [
        Gallery(
            "Videos from captions",
            _shown(output / "videos", results["clips"], models, MAX_SHOWN),
            "Same prompt and same initial noise for all models. The first twelve are an even walk through all captions, not a "
            "choice by result. Under each video: what was measured in it. All clips lie in videos/.",
        ),
        Gallery(
            "Videos from users' prompts",
            _shown(output / "users" / "videos", results["user_clips"], models, MAX_SHOWN // 2),
            "Words and sentences that no training contains, and the same initial noise for each column; what the enhancer made of "
            "them stands above its videos. All clips lie in users/videos/.",
        ),
    ]
    stages = [stage for stage in STAGES if stage in results["stages"]]
    titles = {"sft": "SFT", "grpo": "GRPO", "prompt": "Enhancer", "distill": "Distillation"}
    charts = {}
    for stage in stages:
        log = json.loads((output / stage / "trainer_state.json").read_text())["log_history"]
        charts["enhancer" if stage == "prompt" else stage] = training_charts(log, f"{titles[stage]}: ")
    notes, names = [], ["supervised fine-tuning"]
    if "grpo" in stages:
        notes += [recipe_note(results, output)]
        names += ["GRPO"]
    if "prompt" in stages:
        notes += [enhancer_note(results)]
        names += ["prompt enhancement"]
    if "distill" in stages:
        notes += [speed_note(results)]
        names += ["distillation"]
    flat: dict = {}
    for name, value in results["settings"].items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": one for key, one in value.items() if name in stages}
        else:
            flat[name] = ", ".join(value) if isinstance(value, (list, tuple)) else value
    return write_report(
        output / "report.html",
        title=f"vidtrl demo: {', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]} of the toy model",
        summary=verdict(results),
        notes=notes,
        stages=[_stage_row(name, results, charts.get(name, ())) for name in models],
        metrics=metrics,
        galleries=galleries,
        settings={"base": results["base"], "seed": results["seed"], **flat},
        versions=results["versions"] | hardware(),
    )


def _stage_row(name: str, results: dict, curves: list):
    """A model, with what it costs: evaluations of the denoiser a clip, and what its training took."""
    from ..report import Stage

    settings, stages, speed = results["settings"], results["stages"], results.get("speed", {})
    few, many = len(settings["distill"]["denoising_steps"]), settings["num_inference_steps"]
    guided = settings["guidance_scale"] != 1 or name == "teacher"
    training = stages.get({"enhancer": "prompt"}.get(name, name), {})
    return Stage(
        MODELS[name],
        num_clips=results["num_clips" if name in results["metrics"]["all"] else "num_user_clips"],
        evaluations=few if name in ("control", "distill") else many * (2 if guided else 1),
        clip_seconds=speed[name]["total_seconds"] if name in speed else None,
        train_seconds=training.get("seconds"),
        peak_memory=training.get("peak_memory"),
        curves=curves,
    )


def _shown(folder: Path, clips: list[dict], models: dict[str, str], most: int) -> list:
    """Clips for the page, which stays small enough to send; first twelve of an even walk through all."""
    from ..report import Clip

    def describe(m: dict) -> str:
        return f"{m['color']} {m['shape']} {m['direction']}" if m["present"] else "no shape seen"

    found = []
    for clip in clips[:: max(1, len(clips) // most)]:
        seen = {label: clip[name] for name, label in models.items() if name in clip}
        found.append(
            Clip(
                clip["prompt"],
                {label: folder / name / clip["file"] for name, label in models.items() if name in clip},
                notes={label: describe(m) for label, m in seen.items()},
                right={label: m["all"] for label, m in seen.items()},
                enhanced={label: m["prompt"] for label, m in seen.items() if m.get("enhanced")},
                scores={
                    label: {**m["right"], "smoothness": m["smoothness"], "flicker": m["flicker"]}
                    for label, m in seen.items()
                },
            )
        )
    first = found[:: max(1, len(found) // 12)][:12]
    return first + [clip for clip in found if clip not in first]
