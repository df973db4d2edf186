"""Distillation with FSDP2: two processes with half of the weights each teach both roles what one process teaches."""

import json

import pytest
import torch
from distill_setup import make_args
from distill_worker import start
from peft import LoraConfig
from safetensors.torch import load_file
from test_sharded import FSDP, finish, ranks

from vidtrl.trainer.distill_base import check_sharded


SGD = dict(optim="sgd", learning_rate=0.5, fake_learning_rate=0.5, max_steps=4, per_device_train_batch_size=4)
BOTH = dict(SGD, critic_schedule="every_step", fake_updates_per_student=2)
LONG = dict(recipe="longlive", frames_per_block=1, window=3, sink=1, stream_num_frames=7, stream_overlap=1)
RATES = dict(learning_rate=1e-2, fake_learning_rate=1e-2)  # of all weights
# of the last process: (step, micro-step), the last one of a step among them
BROKEN = dict(on_nan="skip", broken={"student": [[1, 1]], "fake": [[1, 0], [2, 0], [2, 1]]})
# the batch of one process; each of two has half of it
CASES = {
    "dmd2": dict(SGD, evaluate=True, ema_decay=0.9),
    "accumulated": dict(BOTH, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    # gradients flow through roles that are frozen
    "sid": dict(BOTH, loss_type="sid", gradient_checkpointing=True),
    # outside the blocks, where weights stay gathered while roles switch
    "outside": dict(BOTH, lora=LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "proj_out", "time_embedder.linear_1"])),
    "self-forcing": dict(SGD, recipe="self-forcing", frames_per_block=1, gradient_checkpointing=True),
    "longlive": dict(SGD, **LONG),
    "lcm": dict(SGD, recipe="lcm", clips=True, ema_decay=0.9),
    "continuous": dict(SGD, recipe="lcm", clips=True, consistency="continuous", learning_rate=1e-3),
    "another teacher": dict(SGD, teacher=True, max_steps=2),
    # in the second step a process has trajectories to compute that the other one has already
    "nan": dict(BOTH, **BROKEN, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    # each role is a model of its own
    "full": dict(SGD | RATES, lora=False, evaluate=True, ema_decay=0.9),
    "full sid": dict(
        BOTH | RATES, lora=False, loss_type="sid", gradient_checkpointing=True, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    ),
    "full self-forcing": dict(
        SGD | RATES, lora=False, recipe="self-forcing", frames_per_block=1, gradient_checkpointing=True
    ),
    "full lcm": dict(SGD | RATES, lora=False, recipe="lcm", clips=True, ema_decay=0.9),
    "full, another teacher": dict(SGD | RATES, lora=False, teacher=True, max_steps=2),
    "full nan": dict(BOTH | RATES, **BROKEN, lora=False, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "regression": dict(SGD, loss_type="ode_regression", clips=True, seed=14, teacher_steps=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(clips, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    clips.save_to_disk(root / "clips")

    def run(name, cases, number):
        out = root / name
        out.mkdir()
        cases = {
            n: {**c, "per_device_train_batch_size": c["per_device_train_batch_size"] // number}
            for n, c in cases.items()
        }
        job = {"out": str(out), "cache": str(cache_dir), "clips": str(root / "clips"), "cases": cases}
        finish([start(job, **environment) for environment in ranks(number, **FSDP)])
        return out

    return run


@pytest.fixture(scope="module")
def both(runs):
    half = {f"half of {name}": dict(CASES[name], per_device_train_batch_size=2) for name in ("dmd2", "full")}
    return {1: runs("one", CASES | half, 1), 2: runs("two", CASES, 2)}


def differences(folders, one, two) -> dict:
    """By role, how far apart weights are, in units of how far training has moved them."""
    weights = load_file(folders[1] / f"{one}.safetensors"), load_file(folders[2] / f"{two}.safetensors")
    moved = json.loads((folders[1] / f"{one}.json").read_text())["moved"]
    assert min(moved.values()) > 1e-5
    return {
        role: max((weights[0][n] - w).abs().max().item() for n, w in weights[1].items() if n.startswith(role)) / size
        for role, size in moved.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_two_halves_equal_one(both, name):
    one, two = (json.loads((both[n] / f"{name}.json").read_text()) for n in (1, 2))
    assert (one["num_processes"], two["num_processes"]) == (1, 2) and len(set(two["digests"])) == 1
    assert one["held"] == 1.0 and 0.4 < two["held"] < 0.6
    apart = set() if "full" not in name else {"student", "fake", "teacher"}
    if name in ("full lcm", "full, another teacher"):
        apart -= {"fake"} if name == "full lcm" else {"teacher"}
    assert two["held apart"].keys() == apart and all(0.4 < share < 0.6 for share in two["held apart"].values())
    assert max(differences(both, name, name).values()) < 1e-4
    assert len(one["logs"]) == len(two["logs"]) > 0
    for first, second in zip(one["logs"], two["logs"], strict=True):
        assert first.keys() == second.keys()
        assert second.pop("num_skipped_batches", 0) == 2 * first.pop("num_skipped_batches", 0)  # one of each process
        for metric in first.keys() - {"clips_per_second"}:
            assert second[metric] == pytest.approx(first[metric], rel=1e-3, abs=1e-5), metric
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["dmd2", "full"])
def test_half_of_the_batch_teaches_something_else(both, name):
    assert min(differences(both, f"half of {name}", name).values()) > 1e-2


@pytest.mark.parametrize("name", ["nan", "full nan"])
def test_broken_micro_batches_are_left_out(both, name):
    """Of both roles in the second step, and all of the third, which has no loss."""
    logs = json.loads((both[2] / f"{name}.json").read_text())["logs"]
    assert [entry["step"] for entry in logs] == [1, 2, 4] and logs[-1]["num_skipped_batches"] == 2 * 4
    assert ["loss/student" in entry for entry in logs] == [False, True, True]


@pytest.mark.parametrize("lora", [True, False])
def test_two_halves_resume_bit_exactly(runs, lora):
    """Student, fake score, average, optimizer and videos under way; also where the student had no turn yet."""
    config = dict(
        LONG, ema_decay=0.9, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=1, lr_scheduler_type="cosine", fake_updates_per_student=2, lora=lora,
    )  # fmt: skip
    videos = dict(validation_steps=2, validation_prompts=["a circle", "a square"])
    whole = runs(f"whole {lora}", {"run": {**config, **videos}}, 2)
    assert len(list((whole / "run" / "validation" / "step_000002").glob("*.mp4"))) == 2
    again = {f"from {n}": {**config, "resume": str(whole / "run" / f"checkpoint-{n}")} for n in (2, 3)}
    resumed = runs(f"resumed {lora}", again, 2)
    first = json.loads((whole / "run.json").read_text())
    for name in again:
        second = json.loads((resumed / f"{name}.json").read_text())
        assert second["digests"] == first["digests"], name
        assert [e["loss"] for e in second["logs"]] == [e["loss"] for e in first["logs"]]
    saved = torch.load(whole / "run" / "checkpoint-2" / "pytorch_model_fsdp.bin", weights_only=True)
    assert lora or {name.split(".")[0] for name in saved} == {
        "student",
        "fake",
    }  # the teacher is what the run began with
    if not lora:
        return
    below = {"base": {**config, "max_steps": 1, "base_adapters": [str(whole / "run" / "checkpoint-5")]}}
    out = runs("below", below, 2) / "base" / "checkpoint-1" / "base_adapters" / "0"
    given, kept = (load_file(d / "pytorch_lora_weights.safetensors") for d in (whole / "run" / "checkpoint-5", out))
    assert given.keys() == kept.keys() and all(given[n].equal(kept[n]) for n in given)


def test_what_cannot_be_sharded_says_what_to_set(tmp_path, cache_dir):
    check_sharded(make_args(tmp_path, cache_dir), None, "FSDP")
    with pytest.raises(ValueError, match="each role is a model of its own.*fsdp2 or multi_gpu"):
        check_sharded(make_args(tmp_path, cache_dir), None, "DeepSpeed")
    with pytest.raises(ValueError, match="set tangent='finite_difference'"):
        check_sharded(make_args(tmp_path, cache_dir, recipe="rcm", tangent="jvp"), LoraConfig(), "FSDP")
