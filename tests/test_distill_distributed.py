"""Two processes learn what one process learns from the same batches, and a killed run goes on bit for bit."""

import json
import signal

import pytest
from distill_worker import start
from processes import finish, ranks
from safetensors.torch import load_file


SGD = dict(optim="sgd", learning_rate=0.5, fake_learning_rate=0.5, max_steps=4)
# the batch of one process; each of two has half of it
CASES = {
    "dmd2": dict(SGD, per_device_train_batch_size=4, evaluate=True, ema_decay=0.9),
    "every step": dict(SGD, per_device_train_batch_size=4, critic_schedule="every_step", fake_updates_per_student=2),
    "accumulated": dict(SGD, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "full": dict(SGD, per_device_train_batch_size=4, lora=False, learning_rate=1e-2, fake_learning_rate=1e-2),
    "self-forcing": dict(
        SGD, recipe="self-forcing", frames_per_block=1, per_device_train_batch_size=4, gradient_checkpointing=True
    ),
    "longlive": dict(
        SGD, recipe="longlive", frames_per_block=1, per_device_train_batch_size=4, window=3, sink=1, stream_num_frames=7,
        stream_overlap=1, max_steps=6,
    ),
    "lcm": dict(SGD, recipe="lcm", per_device_train_batch_size=4, clips=True, ema_decay=0.9),
    "another teacher": dict(SGD, per_device_train_batch_size=4, teacher=True, max_steps=2),
    "regression": dict(SGD, loss_type="ode_regression", per_device_train_batch_size=4, teacher_steps=4),
}  # fmt: skip


def launch(out, cache_dir, clips, cases, num_processes=1, code=0):
    job = {"out": str(out), "cache": str(cache_dir), "clips": str(clips), "cases": cases}
    return finish([start(job, **environment) for environment in ranks(num_processes)], code)


@pytest.fixture(scope="module")
def saved_clips(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "clips"
    clips.save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def runs(saved_clips, cache_dir, tmp_path_factory):
    """The folders of both runs; each process trains all cases."""
    folders = {}
    for number in (1, 2):
        out = folders[number] = tmp_path_factory.mktemp(f"{number}")
        cases = {
            name: config | {"per_device_train_batch_size": config["per_device_train_batch_size"] // number}
            for name, config in CASES.items()
        }
        launch(out, cache_dir, saved_clips, cases, number)
    return folders


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(runs, name):
    one, two = (json.loads((runs[n] / f"{name}.json").read_text()) for n in (1, 2))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert len(set(two["digests"])) == 1  # both hold the same weights
    weights = [load_file(runs[n] / f"{name}.safetensors") for n in (1, 2)]
    for role, moved in one["moved"].items():
        names = [n for n in weights[0] if n.startswith(role)]
        difference = max((weights[0][n] - weights[1][n]).abs().max().item() for n in names)
        assert difference < 1e-4 * moved and moved > 1e-5, role
    assert len(one["logs"]) == len(two["logs"]) > 0
    for first, second in zip(one["logs"], two["logs"], strict=True):
        assert first.keys() == second.keys()
        for metric in first.keys() - {"clips_per_second"}:
            assert second[metric] == pytest.approx(first[metric], rel=1e-3, abs=1e-5), metric
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)


KILLED = dict(
    recipe="longlive", frames_per_block=1, window=3, sink=1, stream_num_frames=7, stream_overlap=1, ema_decay=0.9, max_steps=7,
    per_device_train_batch_size=1, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2,
    lr_scheduler_type="cosine",
)  # fmt: skip


def test_killed_inside_a_step_resumes_bit_exactly(saved_clips, cache_dir, tmp_path):
    """Student, fake score, average, optimizer, videos under way: all of it goes on."""
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    launch(tmp_path / "whole", cache_dir, saved_clips, {"run": KILLED})
    launch(tmp_path / "killed", cache_dir, saved_clips, {"run": {**KILLED, "kill": 6}}, code=-signal.SIGKILL)
    kept = sorted(p.name for p in (tmp_path / "killed" / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    launch(tmp_path / "killed", cache_dir, saved_clips, {"run": {**KILLED, "resume": True}})
    whole, resumed = (json.loads((tmp_path / f / "run.json").read_text()) for f in ("whole", "killed"))
    assert resumed["digests"] == whole["digests"]
    losses = [[entry["loss"] for entry in run["logs"]] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 7


def test_two_processes_resume_bit_exactly(saved_clips, cache_dir, tmp_path):
    config = {**KILLED, "save_steps": 5}
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
    launch(tmp_path / "whole", cache_dir, saved_clips, {"run": config}, 2)
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-5"
    assert {p.name for p in checkpoint.glob("streams-*")} == {"streams-0.safetensors", "streams-1.safetensors"}
    assert {p.name for p in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    launch(tmp_path / "resumed", cache_dir, saved_clips, {"run": {**config, "resume": str(checkpoint)}}, 2)
    whole, resumed = (json.loads((tmp_path / f / "run.json").read_text()) for f in ("whole", "resumed"))
    assert resumed["digests"] == whole["digests"]
    (tmp_path / "one").mkdir()
    one = {"run": {**config, "resume": str(checkpoint)}}
    (log,) = launch(tmp_path / "one", cache_dir, saved_clips, one, code=1)
    assert "videos of 2 processes, and there are 1 now" in log
