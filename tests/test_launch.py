"""`accelerate launch` with the shipped configurations, in two processes on a CPU: a rank that dies, and the run after it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import errors, free_port

from vidtrl.cli.launch import CONFIGS


HERE = Path(__file__).parent
SAVED = dict(
    max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2, lr_scheduler_type="cosine"
)
CASES = {
    "sft": ("multi_gpu", SAVED),
    "grpo": ("multi_gpu", SAVED | dict(per_device_train_batch_size=4)),
    "distill": ("multi_gpu", SAVED),
    "sft in shards": ("fsdp2", SAVED),
    "grpo in shards": ("fsdp2", SAVED | dict(per_device_train_batch_size=4)),
    "distill in shards": ("fsdp2", SAVED),
}


@pytest.fixture(scope="module")
def launch(clips, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("launch")
    clips.save_to_disk(root / "clips")

    def launch(name, accelerate_config, **job) -> tuple[int, str, float]:
        """Exit code, standard error, and when it ended; `accelerate_config=None` runs one process without the launcher."""
        job = {"trainer": name.split()[0], "clips": str(root / "clips"), "cache": str(cache_dir), **job}
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            f"--config_file={CONFIGS / str(accelerate_config)}.yaml",
        ]
        command += [
            "--num_processes=2",
            f"--main_process_port={free_port()}",
            str(HERE / "rank_worker.py"),
            json.dumps(job),
        ]
        if accelerate_config is None:
            command = [sys.executable, command[-2], command[-1]]
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stderr, time.time()

    launch.root = root
    return launch


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_when_a_rank_dies_the_others_end_and_the_run_goes_on_bit_for_bit(launch, name):
    accelerate_config, config = CASES[name]
    out = launch.root / name
    code, log, ended = launch(name, accelerate_config, out=str(out), config=config, kill=3)
    died = Path(f"{out}.killed").stat().st_mtime
    assert code != 0 and ended - died < 30
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-2"], errors(log)
    code, log, _ = launch(name, accelerate_config, out=str(out), config=config, resume=True)
    assert code == 0, errors(log)
    whole = launch.root / f"{name} whole"
    code, log, _ = launch(name, accelerate_config, out=str(whole), config=config)
    assert code == 0, errors(log)
    resumed, whole = (json.loads(Path(f"{path}.json").read_text()) for path in (out, whole))
    assert resumed == whole and whole["num_processes"] == 2 and len(set(whole["losses"])) > 1
