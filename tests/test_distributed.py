"""Two processes train what one process trains on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import errors, finish, ranks
from sft_worker import start


CONFIG = dict(max_steps=4, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def run(clips, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    clips.save_to_disk(root / "clips")

    def run(name, num_processes=1, config=None, **job):
        """Start `num_processes` processes with the environment that torchrun gives them; returns the result."""
        job = {
            "out": str(root / name),
            "clips": str(root / "clips"),
            "cache": str(cache_dir),
            "lora": "no dropout",
            **job,
        }
        job["config"] = {**CONFIG, **(config or {})}
        finish([start(job, **environment) for environment in ranks(num_processes)])
        return json.loads(Path(root / name, "result.json").read_text())

    run.root = root
    return run


@pytest.fixture(scope="module")
def one(run):
    return run("one", config=dict(per_device_train_batch_size=4))


def test_two_processes_equal_one(run, one):
    prompts = ["a red circle", "a blue square", "a green square"]
    validation = dict(validation_steps=4, validation_prompts=prompts, validation_num_inference_steps=1)
    two = run("two", 2, config=dict(per_device_train_batch_size=2, **validation))
    assert len(list((run.root / "two" / "validation" / "step_000004").glob("*.mp4"))) == 3
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)


def test_two_processes_resume_bit_exactly(run):
    # 3 steps an epoch: the checkpoint lies inside the second epoch, whose order a sharded loader must not lose
    config = dict(per_device_train_batch_size=1, max_steps=7, save_steps=5, ema_decay=0.9)
    whole = run("whole", 2, config=config)
    resumed = run("resumed", 2, config=config, resume=str(run.root / "whole" / "checkpoint-5"))
    assert resumed["digest"] == whole["digest"]
    assert resumed["losses"] == whole["losses"]


@pytest.mark.slow
def test_torchrun(run, one):
    worker = Path(__file__).with_name("sft_worker.py")
    job = {"out": str(run.root / "torchrun"), "clips": str(run.root / "clips"), "cache": str(run.root / "fresh cache")}
    job |= {"lora": "no dropout", "config": {**CONFIG, "per_device_train_batch_size": 2}}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(worker.parent))
    done = subprocess.run(
        [*command, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", worker, json.dumps(job)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, errors(done.stderr)
    result = json.loads((run.root / "torchrun" / "result.json").read_text())
    assert result["num_processes"] == 2
    assert result["norm"] == pytest.approx(one["norm"], rel=1e-5)
