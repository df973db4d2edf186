"""What the DeepSpeed tests share: `accelerate launch` with a shipped configuration in two processes on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import errors, free_port
from safetensors.torch import load_file

from vidtrl.cli.launch import CONFIGS


HERE = Path(__file__).parent
# beside the environment: accelerate and transformers import it wherever they find it, which takes seconds
DEEPSPEED = Path(sys.prefix, "deepspeed")
needs_deepspeed = pytest.mark.skipif(
    not (DEEPSPEED / "deepspeed").is_dir() and importlib.util.find_spec("deepspeed") is None,
    reason=f"deepspeed is not installed: `make deepspeed` installs it into {DEEPSPEED}",
)
SAVED = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="cosine")


def train(out, clips, cache, cases, accelerate_config=None) -> Path:
    """
    Train cases one after the other, see `zero_worker`.

    Args:
        out (`Path`): A new directory.
        clips (`Path`): A dataset on disk.
        cache (`Path`): Of latents.
        cases (`dict[str, dict]`): Arguments of the worker's `train`, with the batch of one process.
        accelerate_config (`str`, *optional*): A shipped one, for two processes with half of the batch each; `None` runs one
            process without the launcher.
    """
    out.mkdir()
    command = [sys.executable]
    if accelerate_config is not None:
        command += ["-m", "accelerate.commands.launch", f"--config_file={CONFIGS / accelerate_config}.yaml"]
        command += ["--num_processes=2", f"--main_process_port={free_port()}"]
        sizes = {name: case["per_device_train_batch_size"] // 2 for name, case in cases.items()}
        gloo = dict(use_cpu=False, ddp_backend="gloo")
        cases = {n: {**case, **gloo, "per_device_train_batch_size": sizes[n]} for n, case in cases.items()}
    job = {"out": str(out), "clips": str(clips), "cache": str(cache), "cases": cases}
    paths = os.pathsep.join([str(HERE), *sys.path, str(DEEPSPEED)])
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=paths, DS_ACCELERATOR="cpu")
    command += [str(HERE / "zero_worker.py"), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, errors(done.stderr)
    return out


def result(folder, name) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def differences(one, first, two, second) -> dict:
    """By role, how far apart weights are, in units of how far training has moved them."""
    weights = load_file(one / f"{first}.safetensors"), load_file(two / f"{second}.safetensors")
    moved = result(one, first)["moved"]
    assert weights[0].keys() == weights[1].keys() and min(moved.values()) > 1e-5
    return {
        role: max((weights[0][n] - w).abs().max().item() for n, w in weights[1].items() if n.startswith(role)) / size
        for role, size in moved.items()
    }


def check_equal(one, two, name) -> None:
    """Two processes of a run `zero2` or `zero3` have learned and logged what one has."""
    whole, halves = result(one, name), result(two, name)
    assert (whole["num_processes"], halves["num_processes"]) == (1, 2) and len(set(halves["digests"])) == 1
    assert whole["held"] == 1.0
    assert halves["held"] == (1.0 if two.name == "zero2" else pytest.approx(0.5, abs=0.02))
    assert max(differences(one, name, two, name).values()) < 1e-3
    assert len(whole["logs"]) == len(halves["logs"]) > 0
    for first, second in zip(whole["logs"], halves["logs"], strict=True):
        assert first.keys() == second.keys()
        # what a prompt's videos share is computed in each process that has some of them, which count apart
        others = {m for m in first if m.endswith(("_time", "_per_second")) or m.startswith(("grad_norm/", "nfe"))}
        for metric in first.keys() - others:
            assert second[metric] == pytest.approx(first[metric], rel=1e-3, abs=1e-5), metric
    assert halves["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


def check_close(one, two, name) -> None:
    """DeepSpeed's bfloat16 (weights, but for those of the optimizer) learns what autocast's (operations) does, nearly."""
    whole, halves = result(one, name), result(two, name)
    assert halves["num_processes"] == 2 and len(set(halves["digests"])) == 1
    assert len(whole["logs"]) == len(halves["logs"]) > 0
    for first, second in zip(whole["logs"], halves["logs"], strict=True):
        assert second["loss"] != first["loss"] and second["loss"] == pytest.approx(first["loss"], rel=0.03, abs=1e-3)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=0.15)


def check_resumed(whole, name, resumed, again) -> None:
    """A run that was resumed has learned and logged what one that was not has, bit for bit."""
    first, second = result(whole, name), result(resumed, again)
    assert second["digests"] == first["digests"], again
    assert [e["loss"] for e in second["logs"]] == [e["loss"] for e in first["logs"]]
    assert second["metrics"] == first["metrics"]
