"""FSDP2: two processes with half of the weights each train what one process trains; what cannot work is refused."""

import json
import socket
from pathlib import Path

import grpo_worker
import pytest
import sft_worker
from safetensors.torch import load_file
from tiny_pipelines import wan


# what `accelerate launch` makes of accelerate_configs/fsdp2.yaml
FSDP = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="false", FSDP_OFFLOAD_PARAMS="false",
    FSDP_ACTIVATION_CHECKPOINTING="false",
)  # fmt: skip


def ranks(number, **environment):
    """The environment of each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(number), **environment)
    return [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(number)] if number > 1 else [{}]


def finish(started) -> list[str]:
    """The logs of processes that have all ended without an error."""
    for process, _ in started:
        process.join(timeout=300)
    for process, log in started:
        assert process.exitcode == 0, log.read_text()[-3000:]
    return [log.read_text() for _, log in started]


# ---- SFT ----

SFT = {
    "lora": dict(lora="no dropout", learning_rate=1e-2),
    "full": dict(lora=False, learning_rate=1e-3, gradient_checkpointing=True, gradient_accumulation_steps=2),
}


@pytest.fixture(scope="module")
def sft(clips, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    clips.save_to_disk(root / "clips")

    def run(name, number, *, lora, resume=None, **config):
        config = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="sgd", max_grad_norm=1.0) | config
        config["per_device_train_batch_size"] = 4 // number // config.get("gradient_accumulation_steps", 1)
        job = dict(out=str(root / name), clips=str(root / "clips"), cache=str(cache_dir), lora=lora, resume=resume)
        job["config"] = config
        finish([sft_worker.start(job, **environment) for environment in ranks(number, **FSDP)])
        return json.loads(Path(root / name, "result.json").read_text())

    run.root = root
    return run


@pytest.mark.parametrize("name", SFT)
def test_sft_in_two_halves_equals_one(sft, name):
    one = sft(f"{name} 1", 1, **SFT[name])
    prompts = dict(
        validation_steps=4, validation_prompts=["a circle", "a square", "a dog"], validation_num_inference_steps=1
    )
    two = sft(f"{name} 2", 2, **SFT[name], **prompts)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["held"] == 1.0 and 0.4 < two["held"] < 0.6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and len(set(one["losses"])) == 4
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert len(list((sft.root / f"{name} 2" / "validation" / "step_000004").glob("*.mp4"))) == 3
    files = "pytorch_lora_weights.safetensors" if name == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    weights = [load_file(sft.root / f"{name} {n}" / "checkpoint-4" / files) for n in (1, 2)]
    first = load_file(sft.root / f"{name} 2" / "checkpoint-2" / files)
    assert weights[0].keys() == weights[1].keys() == first.keys()
    largest = max((weights[0][n] - weights[1][n]).abs().max().item() for n in first)
    moved = max((first[n] - weights[1][n]).abs().max().item() for n in first)
    assert largest < 1e-3 * moved
    if name == "lora":
        pipe = wan()[0]
        pipe.load_lora_weights(str(sft.root / "lora 2" / "checkpoint-4"))


@pytest.mark.parametrize("name", SFT)
def test_sft_in_two_halves_resumes_bit_exactly(sft, name):
    config = {**SFT[name], "optim": "adamw_torch", "lr_scheduler_type": "cosine"}
    whole = sft(f"{name} whole", 2, **config)
    resumed = sft(f"{name} resumed", 2, **config, resume=str(sft.root / f"{name} whole" / "checkpoint-2"))
    assert resumed["digest"] == whole["digest"] and resumed["losses"] == whole["losses"]


# ---- GRPO ----

# as in test_grpo_distributed: the batch of one process, each of two has half of it
GRPO = {
    "flash-grpo": dict(evaluate=True, per_device_train_batch_size=12, eval_num_inference_steps=2),
    # the base under the adapter is the reference
    "reference": dict(recipe="longcat", per_device_train_batch_size=12, beta=0.1),
    "full": dict(lora=False, per_device_train_batch_size=12, learning_rate=1e-2),
    # the processes need a different number of calls in a rollout
    "branch-grpo": dict(recipe="branch-grpo", tree_splits=[0, 2], per_device_train_batch_size=12),
    # groups without advantages: one process has nothing to learn in the first generation, the other in the second
    "idle": dict(rewards="only_some", shuffle_dataset=False),
}


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    folders = {}
    for number in (1, 2):
        out = folders[number] = tmp_path_factory.mktemp(f"grpo {number}")
        cases = {
            name: config | {"per_device_train_batch_size": config.get("per_device_train_batch_size", 8) // number}
            for name, config in GRPO.items()
        }
        job = {"out": str(out), "cases": cases}
        finish([grpo_worker.start(job, **environment) for environment in ranks(number, **FSDP)])
    return folders


@pytest.mark.parametrize("name", GRPO)
def test_grpo_in_two_halves_equals_one(grpo, name):
    one, two = (json.loads((grpo[n] / f"{name}.json").read_text()) for n in (1, 2))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["held"] == 1.0 and 0.4 < two["held"] < 0.6
    weights = [load_file(grpo[n] / f"{name}.safetensors") for n in (1, 2)]
    difference = max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0])
    assert difference < 1e-4 * one["moved"] and one["moved"] > 1e-5
    for first, second in zip(one["logs"], two["logs"], strict=True):
        for metric in ("reward", "reward_std", "frac_reward_zero_std", "grad_norm"):
            assert second[metric] == pytest.approx(first[metric], rel=1e-3), metric
    assert two["eval_reward"] == (one["eval_reward"] and pytest.approx(one["eval_reward"], rel=1e-5))
    if name == "idle":
        first, second = two["taught"]
        assert first[0] > 0 == second[0] and first[1] == 0 < second[1]
