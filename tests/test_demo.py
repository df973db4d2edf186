"""The demo's stages on a tiny random model: resumable, measured from files, generated without vidtrl."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from vidtrl.cli import generate
from vidtrl.cli.demo import StageWatch, run_demo
from vidtrl.cli.demo_clips import Generation, measure_clips, run_side_by_side
from vidtrl.cli.demo_report import enhancer_note, results_table, verdict
from vidtrl.cli.demo_settings import ADAPTERS, MODELS, STAGES, DemoSettings, full_settings
from vidtrl.cli.demo_stages import distil, fine_tune, reinforce, train_enhancer
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
    num_user_prompts=3,
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
    prompt={
        "num_pairs": 4,
        "num_prompts": 8,
        "sft": {"max_steps": 2, "per_device_train_batch_size": 4},
        "grpo": {
            "max_steps": 3,
            "save_steps": 1,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "logging_steps": 1,
        },
        "video": {"num_inference_steps": 2, "seeds": (0,)},
    },
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
    adapters = [f"{stage}/{ADAPTER}" for stage in ADAPTERS]
    for name in (
        "data/train/metadata.jsonl",
        *adapters,
        "distill/scheduler",
        "prompt/prompt_enhancer.json",
        "report.html",
    ):
        assert (folder / name).exists(), name
    captioned = ["base", "sft", "grpo", "teacher", "control", "distill"]
    assert results["models"] == [name for name in MODELS if name != "enhancer_sft"]
    assert [len(list(folder.glob(f"videos/{n}/*.mp4"))) for n in captioned] == [4] * 6
    assert {p.name: len(list(p.iterdir())) for p in folder.glob("users/videos/*")} == {
        "grpo": 3,
        "enhancer": 3,
        "distill": 3,
    }
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["num_clips"] == 4 and set(results["metrics"]["all"]) == {*captioned, "differences"}
    assert set(results["metrics"]["all"]["differences"]) == set(captioned) - {"base"}
    assert set(results["metrics"]["users_all"]) == {"grpo", "enhancer", "distill", "differences"}
    assert set(results["goals"]) == set(STAGES)
    speed = results["speed"]
    assert (speed["teacher"]["evaluations"], speed["distill"]["evaluations"]) == (4, 4)  # two steps, guided; four
    assert 0.3 < speed["denoise_ratio"] < 4 and speed["distill"]["total_seconds"] > speed["distill"]["denoise_seconds"]
    assert {clip["prompt"] for clip in results["clips"]} <= set(captions())
    # all start from the same noise and differ by the adapters alone
    sides = [[(folder / "videos" / n / c["file"]).read_bytes() for c in results["clips"]] for n in captioned]
    assert all(len(set(clips)) == 6 for clips in zip(*sides, strict=True))
    html = (folder / "report.html").read_text()
    assert "Distillation: Score difference" in html and "The student keeps" in html
    assert html.count("data:video/mp4;base64,") == 24 + 9 and "SFT: Held-out loss by noise level" in html
    for title in ("GRPO: Reward colorfulness", "GRPO: Reward toy-presence", "Enhancer: Reward video_reward"):
        assert f'aria-label="{title}: mean reward over optimizer step"' in html
    assert "the recipe diffusion-nft for 4 updates" in html and "never trained on: toy-presence went from" in html
    assert "Why this one: it learns from finished videos" in html
    assert not list(folder.rglob("*.partial"))
    stages = results["stages"]
    assert list(stages) == ["clips", *STAGES, "generate", "speed", "report"] and all(
        s["finished"] for s in stages.values()
    )
    assert all(one["seconds"] > 0 and 1e8 < one["peak_memory"] < 1e11 for one in stages.values())
    assert results["seconds"] == pytest.approx(sum(one["seconds"] for one in stages.values()), abs=0.1)


def test_pictures_of_the_readme_are_of_the_clips(finished, tmp_path):
    folder, results = finished
    script = Path(__file__).parent.parent / "scripts" / "demo_pictures.py"
    command = [sys.executable, str(script), str(folder), str(tmp_path), "--rows", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, columns in (("demo_stages", 4), ("demo_users", 3)):
        picture = Image.open(tmp_path / f"{name}.webp")
        assert picture.n_frames == DemoSettings().num_frames
        assert picture.size == (170 + 118 * columns, 44 + 118 * 3)
    clip = read_video(folder / "videos" / "base" / results["clips"][2]["file"]).float()  # the second row: 2 of 0 to 3
    picture = Image.open(tmp_path / "demo_stages.webp")
    picture.seek(5)
    shown = picture.convert("RGB").crop((170, 44 + 118, 170 + 112, 44 + 118 + 112)).resize((64, 64))
    shown = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1).float()
    error = [(frame - shown).abs().mean().item() for frame in clip]
    assert min(error) == error[5] < 12


def test_users_prompts_are_enhanced_for_the_model_and_judged_by_their_own_words(finished, base, tmp_path):
    folder, results = finished
    written, enhanced = (json.loads((folder / "users" / f"{n}.json").read_text()) for n in ("jobs", "enhanced"))
    for user, job, clip in zip(written, enhanced, results["user_clips"], strict=True):
        assert (user["seed"], user["file"], user["prompt"]) == (job["seed"], job["file"], clip["prompt"])
        assert clip["enhancer"]["prompt"] == clip["distill"]["prompt"] == job["prompt"]
    changed = [clip for clip in results["user_clips"] if clip["enhancer"]["prompt"] != clip["prompt"]]
    assert changed and any(clip["enhancer"]["enhanced"] for clip in changed)
    # an enhanced prompt gives another video of the same noise
    for clip in changed:
        files = [folder / "users" / "videos" / name / clip["file"] for name in ("grpo", "enhancer")]
        assert files[0].read_bytes() != files[1].read_bytes()

    # a shape that the user asked for in other words counts as right, whatever the enhancer wrote; the right clip of another
    # user's prompt does not
    users = ["a crimson orb drifting eastward", "verdant crate heading up", "a saffron cone gliding floorward"]
    shown = ["a red circle moving right", "a green square moving up", "a red circle moving right"]
    jobs = [{"prompt": prompt, "seed": i, "file": f"{i:03d}.mp4"} for i, prompt in enumerate(users)]
    (tmp_path / "users").mkdir()
    (tmp_path / "jobs.json").write_text("[]")
    (tmp_path / "users" / "jobs.json").write_text(json.dumps(jobs))
    enhanced = [job | {"prompt": "a white square moving left", "enhanced": i != 2} for i, job in enumerate(jobs)]
    (tmp_path / "users" / "enhanced.json").write_text(json.dumps(enhanced))
    for name, clips in (("grpo", ["a red circle moving left", *shown[1:]]), ("enhancer", shown)):
        (tmp_path / "users" / "videos" / name).mkdir(parents=True)
        for job, text in zip(jobs, clips, strict=True):
            write_video(tmp_path / "users" / "videos" / name / job["file"], render(text, "clean", 1), fps=8, crf=10)
    (tmp_path / "jobs.json").write_text(json.dumps([{"prompt": shown[0], "seed": 0, "file": "000.mp4"}]))
    for name in ("base", "sft", "grpo"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "users" / "videos" / "enhancer" / "000.mp4", tmp_path / "videos" / name / "000.mp4")
    found = measure_clips(tmp_path, ("sft", "grpo", "prompt"), SMALL)
    assert found["metrics"]["users_all"]["grpo"]["value"] == pytest.approx(1 / 3)  # the green square alone
    assert found["metrics"]["users_all"]["enhancer"]["value"] == pytest.approx(2 / 3)
    assert found["goals"]["prompt"] == {
        "of users' prompts as they are, 35 % at most come out all right": True,
        "enhanced, at least 70 %": False,
    }
    assert enhancer_note(found).endswith('became "a white square moving left"; 1 prompts were left as they are.')


def test_finished_stages_are_not_repeated(finished, base):
    folder, results = finished
    kept = [*folder.glob(f"*/{ADAPTER}"), *folder.glob("prompt/*.safetensors"), *folder.glob("**/videos/*/*.mp4")]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert len(times) == 3 + 1 + 24 + 9
    missing = folder / "videos" / "grpo" / results["clips"][2]["file"]
    before = read_video(missing).int()
    missing.unlink()
    console = Console(file=open(os.devnull, "w"), record=True, width=200)
    again = run_demo(folder, seed=3, base=base, settings=SMALL, console=console)
    text = console.export_text()
    assert text.count("done before") == 4 and "1 of 1 clips, SFT + GRPO," in text and "\r" not in text
    # the same noise in a batch of one as in a batch of four; another clip is far away
    other = read_video(folder / "videos" / "grpo" / results["clips"][1]["file"]).int()
    distance = lambda video: (video - before).abs().float().mean()  # noqa: E731
    assert 5 * distance(read_video(missing).int()) < distance(other)
    assert {path for path in kept if path.stat().st_mtime_ns != times[path]} == {missing}
    assert again["metrics"]["all"] == results["metrics"]["all"]
    # what the trainings took is what they took then
    assert all(again["stages"][stage] == results["stages"][stage] for stage in STAGES)

    first = run_demo(folder, seed=3, base=base, settings=SMALL, console=QUIET, stages=["sft"])
    assert first["models"] == ["base", "sft"] and first["metrics"]["all"]["sft"] == results["metrics"]["all"]["sft"]
    html = (folder / "report.html").read_text()
    assert html.count("data:video/mp4;base64,") == 8 and "GRPO" not in html and "diffusion-nft" not in html
    assert set(json.loads((folder / "stages.json").read_text())) == set(results["stages"])
    for stages in (["grpo"], ["grpo", "sft"], ["sft", "grpo", "distill"], []):
        with pytest.raises(UserError, match="take the first so many of sft grpo prompt distill"):
            run_demo(folder, seed=3, base=base, settings=SMALL, console=QUIET, stages=stages)


def test_time_left_follows_the_pace_of_what_is_done(tmp_path):
    console = Console(file=open(os.devnull, "w"), record=True, width=200)
    watch = StageWatch(
        tmp_path / "stages.json", ["clips", *STAGES, "generate", "speed", "report"], DemoSettings(), console
    )
    usual = watch.seconds_left()
    assert usual == pytest.approx(sum(watch.expected.values())) and usual < 12 * 60
    watch.record["sft"] |= {"seconds": 3 * watch.expected["sft"], "finished": True}
    assert watch.seconds_left() == pytest.approx(3 * (usual - watch.expected["sft"]))
    with pytest.raises(KeyboardInterrupt), watch.stage("grpo", "GRPO [all]"):
        raise KeyboardInterrupt
    assert "[3/8] GRPO [all]; about" in console.export_text()
    known = json.loads((tmp_path / "stages.json").read_text())
    assert known["sft"]["finished"] and not known["grpo"]["finished"] and known["grpo"]["peak_memory"] > 1e8
    full = StageWatch(tmp_path / "none.json", watch.names, full_settings(), console).seconds_left()
    assert usual < full < 25 * 60


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


def test_interrupted_enhancer_goes_on(finished, base, tmp_path):
    folder, _ = finished
    for stage in ("sft", "grpo"):
        shutil.copytree(folder / stage, tmp_path / stage)
    with pytest.raises(Interrupted, match="goes on from the last checkpoint"):
        train_enhancer(tmp_path, 3, base, SMALL, StopAt("step 2/3"))
    assert (tmp_path / "prompt" / "checkpoint-1").is_dir() and not (
        tmp_path / "prompt" / "trainer_state.json"
    ).exists()
    trainer = train_enhancer(tmp_path, 3, base, SMALL, QUIET)
    assert [entry["step"] for entry in trainer.state.log_history if "reward" in entry] == [1, 2, 3]
    names = sorted(path.name for path in (folder / "prompt").glob("*.*"))
    assert "adapter_model.safetensors" in names and names == sorted(p.name for p in (tmp_path / "prompt").glob("*.*"))
    assert train_enhancer(tmp_path, 3, base, SMALL, QUIET) is None


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
    adapters = [str(tmp_path / stage) for stage in ADAPTERS]
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
    codes = {"base": "print('000.mp4')", "SFT": "raise SystemExit('no such adapter')"}
    generations = [
        Generation(label, [sys.executable, "-c", code], 1, 1, tmp_path / f"{label}.log")
        for label, code in codes.items()
    ]
    with pytest.raises(RuntimeError, match="generating with SFT failed: no such adapter .all of it in .*SFT.log"):
        run_side_by_side(generations, QUIET)


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
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    two, results = (measure_clips(tmp_path, ("sft", "grpo")[:n], SMALL) for n in (1, 2))
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
