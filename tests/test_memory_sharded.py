"""The memory planner on several devices: what each of two processes really allocates with DDP and FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from processes import errors, ranks
from test_memory import SIZE
from test_sharded import FSDP

from vidtrl import toy
from vidtrl.trainer.memory import estimate


RUNS = {
    "lora": (4, dict(per_device_train_batch_size=2)),
    "wide lora": (64, dict(gradient_checkpointing=False)),
    "full": (None, dict(per_device_train_batch_size=2)),
    # gathered in float32 whatever autocast computes in; gradients that are added up are shards
    "accumulated, bfloat16": (None, dict(gradient_accumulation_steps=2, bf16=True)),
}
WITHIN = 0.1


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Strategy and name of a run -> peak of one of two processes in bytes."""
    root = tmp_path_factory.mktemp("measured")
    toy.write_dataset(root / "clips", num_clips=8)
    runs = {name: (rank, {"per_device_train_batch_size": 1, **config}) for name, (rank, config) in RUNS.items()}
    found = {}
    for strategy, settings in (("ddp", {}), ("fsdp2", FSDP)):
        out = root / strategy
        out.mkdir()
        job = json.dumps({"out": str(out), "clips": str(root / "clips"), "runs": runs})
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), *sys.path])
        started = [
            subprocess.Popen(
                [sys.executable, str(here / "memory_worker.py"), job],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
                stderr=subprocess.PIPE,
                text=True,
            )
            for environment in ranks(2, **settings)
        ]
        logs = [process.communicate(timeout=400)[1] for process in started]
        assert not any(process.returncode for process in started), "\n".join(map(errors, logs))
        for name in RUNS:
            result = json.loads((out / f"{name}.json").read_text())
            assert result["num_processes"] == 2
            found[strategy, name] = result["peak"]
    return found


def estimated(strategy: str, name: str) -> int:
    rank, config = RUNS[name]
    config = {**SIZE, "per_device_train_batch_size": 1, "use_cpu": True, **config}
    lora = None if rank is None else LoraConfig(r=rank)
    found = estimate("sft", config, toy.pipeline_path(), peft_config=lora, strategy=strategy, num_processes=2)
    return sum(found.phases["training step"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_each_of_two_processes_allocates_what_was_estimated(measured, strategy, name):
    found, peak = estimated(strategy, name), measured[strategy, name]
    print(  # noqa: T201 - docs/memory.md quotes it
        f"{strategy}, {name}: estimated {found / 1e6:.2f} MB, measured {peak / 1e6:.2f} MB, {found / peak - 1:+.1%}"
    )
    assert abs(found / peak - 1) < WITHIN
    if name != "lora":  # control; of a small adapter nothing is saved
        other = {"ddp": "fsdp2", "fsdp2": "ddp"}[strategy]
        assert abs(estimated(other, name) / peak - 1) > 2 * WITHIN
