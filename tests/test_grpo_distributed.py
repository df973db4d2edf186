"""Two processes learn what one process learns from the same generations."""

import json

import pytest
from grpo_worker import start
from processes import finish, ranks
from safetensors.torch import load_file


# the batch of one process; each of two has half of it. Of three prompts with four videos, the second is split
CASES = {
    "flash-grpo": dict(evaluate=True, per_device_train_batch_size=12, eval_num_inference_steps=2),
    "longcat": dict(recipe="longcat", per_device_train_batch_size=12),
    "flow-grpo": dict(recipe="flow-grpo", per_device_train_batch_size=12, num_inference_steps=3),
    "dance-grpo": dict(recipe="dance-grpo", per_device_train_batch_size=12),
    "branch-grpo": dict(recipe="branch-grpo", tree_splits=[0, 2], per_device_train_batch_size=12),
    # three branches with two tails each: the second branch is finished on both processes and must count once
    "g2rpo": dict(recipe="g2rpo", granularities=[1, 2], num_generations=6, per_device_train_batch_size=6),
    "tempflow-grpo": dict(
        recipe="tempflow-grpo", num_latents=2, per_device_train_batch_size=12, gradient_accumulation_steps=2
    ),
    "diffusion-nft": dict(recipe="diffusion-nft", per_device_train_batch_size=12),
    "awm": dict(recipe="awm", num_train_sigmas=2, per_device_train_batch_size=12),
    "reused": dict(recipe="longcat", per_device_train_batch_size=12, reuse_rollout=True),
    # one prompt for each process: the second has nothing to learn in the first generation, the first in the second
    "idle": dict(rewards="only_some", shuffle_dataset=False),
    # the same in four slices for two decisions: the first and the last, with which gradients are exchanged, are empty
    "idle slices": dict(
        rewards="only_some", shuffle_dataset=False, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        recipe="tempflow-grpo", num_latents=2,
    ),
}  # fmt: skip
SPLIT = ("longcat", "dance-grpo", "branch-grpo", "g2rpo", "reused")  # decisions whose videos are on both processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of both runs; each process trains all cases."""
    folders = {}
    for num_processes in (1, 2):
        out = folders[num_processes] = tmp_path_factory.mktemp(f"{num_processes}")
        cases = {}
        for name, config in CASES.items():
            batch = config.get("per_device_train_batch_size", 8)
            cases[name] = config | {"per_device_train_batch_size": batch // num_processes}
        job = {"out": str(out), "cases": cases}
        finish([start(job, **environment) for environment in ranks(num_processes)])
    return folders


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(runs, name):
    one, two = (json.loads((runs[n] / f"{name}.json").read_text()) for n in (1, 2))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert len(set(two["digests"])) == 1  # both hold the same weights
    weights = [load_file(runs[n] / f"{name}.safetensors") for n in (1, 2)]
    difference = max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0])
    assert difference < 2e-5 * one["moved"] and one["moved"] > 1e-4
    for first, second in zip(one["logs"], two["logs"], strict=True):
        for metric in ("reward", "reward_std", "frac_reward_zero_std", "grad_norm"):
            assert second[metric] == pytest.approx(first[metric], rel=1e-4), metric
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
        by_step = [{n: v for n, v in logs.items() if n.startswith("grad_norm/step_")} for logs in (first, second)]
        if name not in SPLIT:
            assert by_step[1] == pytest.approx(by_step[0], rel=1e-4)
    assert two["eval_reward"] == (one["eval_reward"] and pytest.approx(one["eval_reward"], rel=1e-5))


def test_the_cases_are_what_they_say(runs):
    def result(name):
        return json.loads((runs[2] / f"{name}.json").read_text())

    for name in ("idle", "idle slices"):
        first, second = result(name)["taught"]
        assert first[0] > 0 == second[0] and first[1] == 0 < second[1]
    assert result("flash-grpo")["eval_reward"] is not None
    # four videos of one group and two of the next, on both
    assert result("flash-grpo")["items"] == [[6, 6], [6, 6]]
    # the first process has a share in the branches 0 and 1, the second in 1 and 2, and trains on 2 alone
    assert result("g2rpo")["items"] == [[1, 1], [1, 1]]
