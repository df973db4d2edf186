"""The demo's stages on a tiny random model: resumable, measured from files, generated without vidtrl."""

import ast
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny_pipelines
from rich.console import Console
from safetensors.torch import load_file

from vidtrl.cli import generate
from vidtrl.cli.demo import DemoSettings, fine_tune, measure_clips, results_table, run_demo, run_side_by_side, verdict
from vidtrl.cli.errors import UserError
from vidtrl.cli.main import main
from vidtrl.data.video import read_video, write_video
from vidtrl.toy import captions, render


SMALL = dataclasses.replace(
    DemoSettings(),
    num_clips=16,
    num_eval_clips=4,
    num_generated=4,
    num_inference_steps=2,
    sft=DemoSettings().sft | {"max_steps": 6, "eval_steps": 3, "save_steps": 2, "logging_steps": 1},
)
QUIET = Console(quiet=True)


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
    for name in ("data/train/metadata.jsonl", "sft/pytorch_lora_weights.safetensors", "report.html", "generate.py"):
        assert (folder / name).is_file(), name
    assert len(list(folder.glob("videos/base/*.mp4"))) == len(list(folder.glob("videos/sft/*.mp4"))) == 4
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["num_clips"] == 4 and set(results["metrics"]["all"]) == {"base", "sft", "difference"}
    assert {clip["prompt"] for clip in results["clips"]} <= set(captions())
    # the two sides start from the same noise and differ by the adapter alone
    sides = [[(folder / "videos" / n / c["file"]).read_bytes() for c in results["clips"]] for n in ("base", "sft")]
    assert all(a != b for a, b in zip(*sides, strict=True))
    html = (folder / "report.html").read_text()
    assert html.count("data:video/mp4;base64,") == 8 and "Held-out loss by noise level" in html
    assert not list(folder.rglob("*.partial"))


def test_finished_stages_are_not_repeated(finished, base):
    folder, results = finished
    kept = [folder / "sft" / "pytorch_lora_weights.safetensors", *folder.glob("videos/*/*.mp4")]
    times = {path: path.stat().st_mtime_ns for path in kept}
    missing = folder / "videos" / "sft" / results["clips"][2]["file"]
    before = read_video(missing).int()
    missing.unlink()
    again = run_demo(folder, seed=3, base=base, settings=SMALL, console=QUIET)
    # the same noise in a batch of one as in a batch of four; another clip is far away
    other = read_video(folder / "videos" / "sft" / results["clips"][1]["file"]).int()
    distance = lambda video: (video - before).abs().float().mean()  # noqa: E731
    assert 5 * distance(read_video(missing).int()) < distance(other)
    assert {path for path in kept if path.stat().st_mtime_ns != times[path]} == {missing}
    assert again["metrics"]["all"] == results["metrics"]["all"]


def test_interrupted_training_goes_on_bit_exactly(finished, base, tmp_path):
    folder, _ = finished
    out = tmp_path / "out"
    shutil.copytree(folder / "data", out / "data")
    shutil.copy(folder / "demo.json", out)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_demo as t\n"
        "from vidtrl.cli.errors import guarded\n"
        "sys.exit(guarded(lambda a: t.run_demo(a[0], 3, a[1], t.SMALL) and 0, sys.argv[2:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, os.path.dirname(__file__), str(out), base],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "sft" / "checkpoint-2").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    if process.returncode == 130:  # six tiny steps may be over before the signal arrives
        assert "the same command" in err and "Traceback" not in err
        assert not (out / "sft" / "trainer_state.json").exists()
    fine_tune(out, 3, base, SMALL, QUIET)
    ours, theirs = (load_file(d / "sft" / "pytorch_lora_weights.safetensors") for d in (out, folder))
    assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
    state = json.loads((out / "sft" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_other_runs_and_other_folders_are_refused(finished, base, tmp_path, capsys):
    folder, _ = finished
    with pytest.raises(UserError, match="another seed, base or version"):
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
    with pytest.raises(
        RuntimeError, match="generating with base . LoRA failed: no such adapter .all of it in .*sft.log"
    ):
        run_side_by_side(commands, {"base": 1, "sft": 1}, 1, tmp_path, QUIET)


def test_generation_is_plain_diffusers():
    tree = ast.parse(open(generate.__file__).read())
    modules = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    modules |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"argparse", "json", "fractions", "pathlib", "av", "torch", "diffusers"}


def test_measurement_tells_right_from_wrong_files(tmp_path):
    """Ground truth on one side; on the other flickering clips of the next caption, which differ in the direction."""
    every = captions()
    jobs = [{"prompt": every[i], "seed": i, "file": f"{i:03d}.mp4"} for i in range(0, 72, 3)]
    for side in ("base", "sft"):
        (tmp_path / "videos" / side).mkdir(parents=True)
    for i, job in zip(range(0, 72, 3), jobs, strict=True):
        other = every[i + 1 if i % 4 < 3 else i - 1]
        write_video(tmp_path / "videos" / "sft" / job["file"], render(job["prompt"], "clean", i), fps=8, crf=10)
        write_video(tmp_path / "videos" / "base" / job["file"], render(other, "raw", i), fps=8, crf=10)
    results = measure_clips(tmp_path, jobs)
    metrics = results["metrics"]
    assert metrics["all"]["sft"]["value"] == 1.0 and metrics["all"]["base"]["value"] == 0.0
    assert metrics["color"]["base"]["value"] == 1.0 and metrics["direction"]["base"]["value"] == 0.0
    assert metrics["flicker"]["difference"]["high"] < -0.1 and all(results["goal"].values())
    text = verdict(results)
    assert "0 % before, 100 % after" in text and "+100 points" in text and "Flicker fell from" in text
    console = Console(width=80, record=True, quiet=False, file=open(os.devnull, "w"))
    console.print(results_table(results))
    table = console.export_text()
    assert "100 [86, 100]" in table and "-100 [" not in table and max(map(len, table.splitlines())) <= 80
