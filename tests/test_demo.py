"""The demo's stages on a tiny random model: resumable, measured from files, generated without vidtrl."""

import ast
import dataclasses
import json
import os
import shutil
import sys

import pytest
import tiny_pipelines
import torch
from rich.console import Console
from safetensors.torch import load_file

from vidtrl.cli import generate
from vidtrl.cli.demo import run_demo
from vidtrl.cli.demo_report import results_table, verdict
from vidtrl.cli.demo_settings import MODELS, STAGES, DemoSettings
from vidtrl.cli.demo_stages import distil, fine_tune, measure_clips, reinforce, run_side_by_side
from vidtrl.cli.errors import Interrupted, UserError
from vidtrl.cli.main import main
from vidtrl.data.video import read_video, write_video
from vidtrl.inference import load_student
from vidtrl.toy import captions, render


SMALL = dataclasses.replace(
    DemoSettings(),
    num_clips=16,
    num_eval_clips=4,
    num_generated=4,
    num_inference_steps=2,
    sft=DemoSettings().sft | {"max_steps": 6, "eval_steps": 3, "save_steps": 2, "logging_steps": 1},
    grpo=DemoSettings().grpo
    | {"max_steps": 4, "num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    | {
        "num_inference_steps": 2,
        "eval_num_inference_steps": 2,
        "eval_steps": 2,
        "save_steps": 1,
        "learning_rate": 2e-2,
        "reward_weights": [1.0, 1.0],
    },
    distill=DemoSettings().distill
    | {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "save_steps": 1, "logging_steps": 1}
    | {"fake_updates_per_student": 1, "lr_scheduler_type": "constant"},
    rewards=("colorfulness", "temporal-smoothness"),  # noise of a random model shows no shape that could be right
    num_eval_prompts=2,
)
QUIET = Console(quiet=True)
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipelines.wan()[0].save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """A whole demo: its folder and its results."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run_demo(folder, seed=3, base=base, settings=SMALL, console=QUIET)


def test_demo_leaves_everything_it_promises(finished):
    folder, results = finished
    adapters = [f"{stage}/{ADAPTER}" for stage in STAGES]
    for name in ("data/train/metadata.jsonl", *adapters, "distill/scheduler", "report.html", "generate.py"):
        assert (folder / name).exists(), name
    assert results["models"] == list(MODELS) == ["base", "sft", "grpo", "teacher", "control", "distill"]
    assert [len(list(folder.glob(f"videos/{n}/*.mp4"))) for n in results["models"]] == [4] * 6
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["num_clips"] == 4 and set(results["metrics"]["all"]) == {*MODELS, "differences"}
    assert set(results["metrics"]["all"]["differences"]) == set(MODELS) - {"base"}
    assert set(results["goals"]) == set(STAGES)
    speed = results["speed"]
    assert (speed["teacher"]["evaluations"], speed["distill"]["evaluations"]) == (4, 4)  # two steps, guided; four
    assert 0.3 < speed["denoise_ratio"] < 4 and speed["distill"]["total_seconds"] > speed["distill"]["denoise_seconds"]
    assert {clip["prompt"] for clip in results["clips"]} <= set(captions())
    # all start from the same noise and differ by the adapters alone
    sides = [[(folder / "videos" / n / c["file"]).read_bytes() for c in results["clips"]] for n in results["models"]]
    assert all(len(set(clips)) == 6 for clips in zip(*sides, strict=True))
    html = (folder / "report.html").read_text()
    assert "Distillation: score difference" in html and "The student keeps" in html
    assert html.count("data:video/mp4;base64,") == 24 and "SFT: held-out loss by noise level" in html
    for title in ("GRPO: reward", "GRPO: each reward in training", "GRPO: never trained on"):
        assert f'aria-label="{title}: mean reward over update"' in html
    assert "the recipe diffusion-nft for 4 updates" in html and "never trained on: toy-presence went from" in html
    assert not list(folder.rglob("*.partial"))


def test_finished_stages_are_not_repeated(finished, base):
    folder, results = finished
    kept = [*folder.glob(f"*/{ADAPTER}"), *folder.glob("videos/*/*.mp4")]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert len(times) == 3 + 24
    missing = folder / "videos" / "grpo" / results["clips"][2]["file"]
    before = read_video(missing).int()
    missing.unlink()
    console = Console(file=open(os.devnull, "w"), record=True, width=200)
    again = run_demo(folder, seed=3, base=base, settings=SMALL, console=console)
    text = console.export_text()
    assert text.count("done before") == 3 and "SFT + GRPO: 4 of 4 clips" in text and "\r" not in text
    # the same noise in a batch of one as in a batch of four; another clip is far away
    other = read_video(folder / "videos" / "grpo" / results["clips"][1]["file"]).int()
    distance = lambda video: (video - before).abs().float().mean()  # noqa: E731
    assert 5 * distance(read_video(missing).int()) < distance(other)
    assert {path for path in kept if path.stat().st_mtime_ns != times[path]} == {missing}
    assert again["metrics"]["all"] == results["metrics"]["all"]

    first = run_demo(folder, seed=3, base=base, settings=SMALL, console=QUIET, stages=["sft"])
    assert first["models"] == ["base", "sft"] and first["metrics"]["all"]["sft"] == results["metrics"]["all"]["sft"]
    html = (folder / "report.html").read_text()
    assert html.count("data:video/mp4;base64,") == 8 and "GRPO" not in html and "diffusion-nft" not in html
    for stages in (["grpo"], ["grpo", "sft"], ["sft", "distill"], []):
        with pytest.raises(UserError, match="take sft, or sft grpo"):
            run_demo(folder, seed=3, base=base, settings=SMALL, console=QUIET, stages=stages)


def same_adapter(one, other):
    one, other = load_file(one / ADAPTER), load_file(other / ADAPTER)
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


class StopAt(Console):
    """Ctrl-C as soon as this has been printed."""

    def __init__(self, text):
        super().__init__(file=open(os.devnull, "w"))
        self.text = text

    def print(self, *objects, **kwargs):
        if self.text in str(objects[0]):
            raise KeyboardInterrupt


def test_interrupted_fine_tuning_goes_on_bit_exactly(finished, base, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "data", tmp_path / "data")
    with pytest.raises(Interrupted, match="goes on from the last checkpoint"):
        fine_tune(tmp_path, 3, base, SMALL, StopAt("step 3/6"))
    assert (tmp_path / "sft" / "checkpoint-2").is_dir() and not (tmp_path / "sft" / "trainer_state.json").exists()
    assert fine_tune(tmp_path, 3, base, SMALL, QUIET) is not None
    assert same_adapter(tmp_path / "sft", folder / "sft")
    state = json.loads((tmp_path / "sft" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert fine_tune(tmp_path, 3, base, SMALL, QUIET) is None  # complete


def test_interrupted_grpo_goes_on_bit_exactly_and_stacks(finished, base, tmp_path):
    """And what the trainer holds then is what stock diffusers makes of the two adapter files."""
    folder, _ = finished
    shutil.copytree(folder / "sft", tmp_path / "sft")
    with pytest.raises(Interrupted, match="goes on from the last checkpoint"):
        reinforce(tmp_path, 3, base, SMALL, StopAt("step 2/4"))
    assert (tmp_path / "grpo" / "checkpoint-1").is_dir() and not (tmp_path / "grpo" / "trainer_state.json").exists()
    trainer = reinforce(tmp_path, 3, base, SMALL, QUIET)
    assert same_adapter(tmp_path / "grpo", folder / "grpo")
    state = json.loads((tmp_path / "grpo" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2, 3, 4]

    shape = dict(height=SMALL.height, width=SMALL.width, num_frames=SMALL.num_frames, max_sequence_length=16)
    call = dict(num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    prompts, seeds = captions()[:2], [7, 8]
    want = torch.stack(trainer.generate_videos(prompts, seeds, batch_size=2, **call))

    def distance(*stages):
        pipe = generate.load(base, [str(folder / stage) for stage in stages])
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = pipe(prompt=prompts, generator=generators, **shape, **call).frames
        return float((latents - want).abs().max() / want.abs().max())

    assert distance("sft", "grpo") < 1e-5
    # neither of them alone does it
    assert distance("sft") > 1e-3 and distance("grpo") > 1e-3


def test_the_distilled_student_is_what_its_files_say(finished, base, tmp_path):
    """Interrupted and gone on with; `load_student`, the demo's plain script and the trainer sample the same."""
    folder, _ = finished
    for stage in ("sft", "grpo"):
        shutil.copytree(folder / stage, tmp_path / stage)
    with pytest.raises(Interrupted, match="goes on from the last checkpoint"):
        distil(tmp_path, 3, base, SMALL, StopAt("step 2/3"))
    assert not (tmp_path / "distill" / "trainer_state.json").exists()
    trainer = distil(tmp_path, 3, base, SMALL, QUIET)
    assert same_adapter(tmp_path / "distill", folder / "distill")
    assert distil(tmp_path, 3, base, SMALL, QUIET) is None

    prompts, seeds = captions()[:2], [7, 8]
    want = torch.stack(trainer.generate_videos(prompts, seeds, batch_size=2, output_type="latent"))
    shape = dict(height=SMALL.height, width=SMALL.width, num_frames=SMALL.num_frames, max_sequence_length=16)
    adapters = [str(tmp_path / stage) for stage in STAGES]
    plain = generate.load(base, adapters, str(tmp_path / "distill" / "scheduler"))
    without = generate.load(base, adapters[:2], str(tmp_path / "distill" / "scheduler"))
    distances = []
    for pipe in (plain, load_student(tmp_path / "distill", torch_dtype=torch.float32), without):
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = dict(num_inference_steps=4, guidance_scale=1.0, output_type="latent")
        latents = pipe(prompt=prompts, generator=generators, **shape, **call).frames
        distances.append(float((latents - want).abs().max() / want.abs().max()))
    assert max(distances[:2]) < 1e-5 < 1e-3 < distances[2]


def test_other_runs_and_other_folders_are_refused(finished, base, tmp_path, capsys):
    folder, _ = finished
    with pytest.raises(UserError, match="another seed, base, version or settings"):
        run_demo(folder, seed=4, base=base, settings=SMALL, console=QUIET)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no demo"):
        run_demo(tmp_path, base=base, settings=SMALL, console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert main(["demo", "--base", str(tmp_path)]) == 2 and main(["demo", "--seed", "-1"]) == 2
    assert "it has no model_index.json" in capsys.readouterr().err


def test_a_failing_process_names_its_log(tmp_path):
    commands = {
        "base": [sys.executable, "-c", "print('000.mp4')"],
        "sft": [sys.executable, "-c", "raise SystemExit('no such adapter')"],
    }
    with pytest.raises(RuntimeError, match="generating with SFT failed: no such adapter .all of it in .*sft.log"):
        run_side_by_side(commands, {"base": 1, "sft": 1}, 1, tmp_path, QUIET)


def test_generation_is_plain_diffusers():
    tree = ast.parse(open(generate.__file__).read())
    modules = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    modules |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {
        "argparse", "json", "sys", "fractions", "pathlib", "av", "torch", "diffusers", "few_step_flow_scheduler"
    }  # fmt: skip


def test_measurement_tells_right_from_wrong_files(tmp_path):
    """Ground truth on one side; on the other flickering clips of the next caption, which differ in the direction."""
    every = captions()
    jobs = [{"prompt": every[i], "seed": i, "file": f"{i:03d}.mp4"} for i in range(0, 72, 3)]
    for side in ("base", "sft", "grpo"):
        (tmp_path / "videos" / side).mkdir(parents=True)
    for i, job in zip(range(0, 72, 3), jobs, strict=True):
        other = every[i + 1 if i % 4 < 3 else i - 1]
        write_video(tmp_path / "videos" / "sft" / job["file"], render(job["prompt"], "clean", i), fps=8, crf=10)
        write_video(tmp_path / "videos" / "base" / job["file"], render(other, "raw", i), fps=8, crf=10)
        worse = render(job["prompt"], "raw", i) if i % 9 else torch.full((17, 3, 64, 64), 20, dtype=torch.uint8)
        write_video(tmp_path / "videos" / "grpo" / job["file"], worse, fps=8, crf=10)
    two, results = (measure_clips(tmp_path, jobs, ["base", "sft", "grpo"][:n]) for n in (2, 3))
    assert two["goals"]["sft"] == results["goals"]["sft"] and set(two["goals"]) == {"sft"}
    metrics = results["metrics"]
    assert metrics["all"]["sft"]["value"] == 1.0 and metrics["all"]["base"]["value"] == 0.0
    assert metrics["color"]["base"]["value"] == 1.0 and metrics["direction"]["base"]["value"] == 0.0
    assert metrics["flicker"]["differences"]["sft"]["high"] < -0.05 and all(results["goals"]["sft"].values())
    # the third is a step back from the second, and is told so
    assert metrics["flicker"]["differences"]["grpo"]["low"] > 0.05
    assert metrics["present"]["differences"]["grpo"]["value"] == -1 / 3
    assert not any(results["goals"]["grpo"].values())
    text = verdict(results)
    assert "0 % of the base's, 100 % after SFT (+100 points" in text and "67 % after GRPO (-33 points" in text
    console = Console(width=80, record=True, quiet=False, file=open(os.devnull, "w"))
    console.print(results_table(results))
    table = console.export_text()
    assert "100 [86, 100]" in table and "-100 [" not in table and max(map(len, table.splitlines())) <= 80
    assert "SFT + GRPO" in table and "SFT + GRPO" not in verdict(two) and "GRPO" not in verdict(two)
