"""FSDP2: two processes with half of the weights each train what one process trains; what cannot work is refused."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import grpo_worker
import pytest
import sft_worker
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from processes import finish, ranks
from safetensors.torch import load_file
from sft_setup import digest
from tiny_pipelines import wan
from torch.distributed.fsdp import fully_shard

from vidtrl.trainer.sharding import EqualCalls, check_sharded, prepare_fsdp, shard_on_cpu


# what `accelerate launch` makes of accelerate_configs/fsdp2.yaml
FSDP = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="false", FSDP_OFFLOAD_PARAMS="false",
    FSDP_ACTIVATION_CHECKPOINTING="false",
)  # fmt: skip


# ---- SFT ----

SFT = {
    "lora": dict(lora="no dropout", learning_rate=1e-2),
    # weights outside the blocks, too, which stay gathered after a forward
    "full": dict(
        lora=False, learning_rate=1e-3, gradient_checkpointing=True, gradient_accumulation_steps=2, ema_decay=0.9
    ),
}


@pytest.fixture(scope="module")
def sft(clips, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    clips.save_to_disk(root / "clips")

    def run(name, number, *, lora, resume=None, sharded=True, broken=None, **config):
        config = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="sgd", max_grad_norm=1.0) | config
        config["per_device_train_batch_size"] = 4 // number // config.get("gradient_accumulation_steps", 1)
        job = dict(out=str(root / name), clips=str(root / "clips"), cache=str(cache_dir), lora=lora, resume=resume)
        job |= {"config": config, "broken": broken}
        environments = ranks(number, **(FSDP if sharded else {}))
        finish([sft_worker.start(job, **environment) for environment in environments])
        return json.loads(Path(root / name, "result.json").read_text())

    run.root = root
    return run


@pytest.mark.parametrize("name", SFT)
def test_sft_in_two_halves_equals_one(sft, name):
    one = sft(f"{name} 1", 1, **SFT[name])
    prompts = dict(
        validation_steps=3, validation_prompts=["a circle", "a square", "a dog"], validation_num_inference_steps=1
    )
    two = sft(f"{name} 2", 2, **SFT[name], **prompts)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["held"] == 1.0 and 0.4 < two["held"] < 0.6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and len(set(one["losses"])) == 4
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert len(list((sft.root / f"{name} 2" / "validation" / "step_000003").glob("*.mp4"))) == 3
    files = "pytorch_lora_weights.safetensors" if name == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    weights = [load_file(sft.root / f"{name} {n}" / "checkpoint-4" / files) for n in (1, 2)]
    first = load_file(sft.root / f"{name} 2" / "checkpoint-2" / files)
    assert weights[0].keys() == weights[1].keys() == first.keys()
    largest = max((weights[0][n] - weights[1][n]).abs().max().item() for n in first)
    moved = max((first[n] - weights[1][n]).abs().max().item() for n in first)
    assert largest < 1e-3 * moved
    if name == "full":  # what is compared is the average, and not what was trained
        raw = load_file(sft.root / "full 1" / "checkpoint-4" / "training_weights.safetensors")
        assert max((raw[n] - weights[0][n]).abs().max().item() for n in first) > 0.1 * moved
    if name == "lora":
        pipe = wan()[0]
        pipe.load_lora_weights(str(sft.root / "lora 2" / "checkpoint-4"))


def test_bfloat16_rounds_as_without_shards(sft):
    """Bit for bit: the noise level stays what it is, and gradients are added up in float32."""
    whole = sft("bf16 whole", 2, **SFT["lora"], sharded=False, bf16=True)
    halves = sft("bf16 halves", 2, **SFT["lora"], bf16=True)
    assert (whole["held"], halves["held"]) == (1.0, pytest.approx(0.5, abs=0.02))
    assert halves["digest"] == whole["digest"] and halves["losses"] == whole["losses"]


def test_two_halves_leave_a_micro_batch_out_together(sft):
    """Of the clips of one process, the other one's are left out with a broken one, as one process leaves out both."""
    config = dict(SFT["full"], on_nan="skip", broken=2, max_steps=5, optim="adamw_torch", ema_decay=None)
    one, two = (sft(f"nan {n}", n, **config) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    counted = [[n for n in run["num_skipped_batches"] if n] for run in (one, two)]
    assert counted[1] == [2 * n for n in counted[0]] and counted[0][-1] >= 2
    assert sft("whole", 2, **{**config, "broken": None})["norm"] != pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.parametrize("name", SFT)
def test_sft_in_two_halves_resumes_bit_exactly(sft, name):
    config = {**SFT[name], "optim": "adamw_torch", "lr_scheduler_type": "cosine"}
    whole = sft(f"{name} whole", 2, **config)
    resumed = sft(f"{name} resumed", 2, **config, resume=str(sft.root / f"{name} whole" / "checkpoint-2"))
    assert resumed["digest"] == whole["digest"] and resumed["losses"] == whole["losses"]


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_best_of_two_halves_is_loaded_at_the_end(sft, ema_decay):
    # the loss falls from the start, so calling the largest one best makes the last checkpoint a wrong answer
    best = dict(load_best_model_at_end=True, greater_is_better=True, eval_strategy="steps", eval_steps=1, save_steps=1)
    config = {**SFT["full"], **best, "ema_decay": ema_decay, "max_steps": 3}
    found = sft(f"best {ema_decay}", 2, **config)
    file = "transformer/diffusion_pytorch_model.safetensors"
    saved = [digest(load_file(sft.root / f"best {ema_decay}" / f"checkpoint-{n}" / file)) for n in (1, 3)]
    assert found["digest"] == saved[0] != saved[1]


# ---- GRPO ----

# as in test_grpo_distributed: the batch of one process, each of two has half of it
NFT = dict(recipe="diffusion-nft", per_device_train_batch_size=12, max_steps=3)
GRPO = {
    "flash-grpo": dict(
        evaluate=True, per_device_train_batch_size=12, eval_num_inference_steps=2, ema_decay=0.9, ema_update_steps=1
    ),
    # the base under the adapter is the reference
    "reference": dict(recipe="longcat", per_device_train_batch_size=12, beta=0.1),
    "full": dict(lora=False, per_device_train_batch_size=12, learning_rate=1e-2),
    # the processes need a different number of calls in a rollout
    "branch-grpo": dict(recipe="branch-grpo", tree_splits=[0, 2], per_device_train_batch_size=12),
    # groups without advantages: one process has nothing to learn in the first generation, the other in the second
    "idle": dict(rewards="only_some", shuffle_dataset=False),
    # an old policy; the processes meet prompts that are new to them at different times
    "nft": NFT,
    "nft full": dict(NFT, lora=False, per_device_train_batch_size=4, gradient_accumulation_steps=3, beta=0.1),
    "awm": dict(recipe="awm", num_train_sigmas=2, per_device_train_batch_size=12, ema_decay=0.9, ema_update_steps=1),
    # a reference that moves, and one of all weights
    "moved": dict(
        recipe="longcat", per_device_train_batch_size=12, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, max_steps=3
    ),
    "full reference": dict(
        recipe="flow-grpo", num_inference_steps=3, lora=False, per_device_train_batch_size=4, steps_per_generation=3,
        gradient_accumulation_steps=3, beta=0.1,
    ),
    # the decisions of a process are at other noise levels than those of the other one, and a call takes one level
    "one level": dict(recipe="tempflow-grpo", num_latents=2, per_device_train_batch_size=12, one_level=True),
    # the loss of one process is not finite in the second step
    "nan": dict(per_device_train_batch_size=12, max_steps=3, on_nan="skip"),
}  # fmt: skip
# what one process must not equal
OTHERS = {"two thirds": dict(NFT, per_device_train_batch_size=8), "stuck": dict(NFT, old_policy_decay=[1.0, 1.0])}


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    def run(cases, number):
        out = tmp_path_factory.mktemp(f"grpo {number}")
        cases = {
            name: config | {"per_device_train_batch_size": config.get("per_device_train_batch_size", 8) // number}
            for name, config in cases.items()
        }
        job = {"out": str(out), "cases": cases}
        finish([grpo_worker.start(job, **environment) for environment in ranks(number, **FSDP)])
        return out

    return run


@pytest.fixture(scope="module")
def both(grpo):
    return {1: grpo(GRPO | OTHERS, 1), 2: grpo(GRPO, 2)}


def difference(folders, one, two) -> float:
    """How far apart weights are, in units of how far training has moved them."""
    weights = load_file(folders[1] / f"{one}.safetensors"), load_file(folders[2] / f"{two}.safetensors")
    moved = json.loads((folders[1] / f"{one}.json").read_text())["moved"]
    assert moved > 1e-5
    return max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0]) / moved


@pytest.mark.parametrize("name", GRPO)
def test_grpo_in_two_halves_equals_one(both, name):
    one, two = (json.loads((both[n] / f"{name}.json").read_text()) for n in (1, 2))
    assert (one["num_processes"], two["num_processes"]) == (1, 2) and len(set(two["digests"])) == 1
    assert one["held"] == 1.0 and 0.4 < two["held"] < 0.6
    assert difference(both, name, name) < 1e-4
    assert len(one["logs"]) == len(two["logs"]) == (2 if name == "nan" else GRPO[name].get("max_steps", 2))
    for first, second in zip(one["logs"], two["logs"], strict=True):
        for metric in ("reward", "reward_std", "frac_reward_zero_std", "grad_norm"):
            assert second[metric] == pytest.approx(first[metric], rel=1e-3), metric
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4, abs=1e-5)
        if GRPO[name].get("beta"):
            assert second["kl"] == pytest.approx(first["kl"], rel=1e-3, abs=1e-8)
    assert two["eval_reward"] == (one["eval_reward"] and pytest.approx(one["eval_reward"], rel=1e-5))
    if name == "idle":
        first, second = two["taught"]
        assert first[0] > 0 == second[0] and first[1] == 0 < second[1]
    if name == "nan":  # a micro-batch of each process
        assert (one["logs"][-1]["num_skipped_batches"], two["logs"][-1]["num_skipped_batches"]) == (1, 2)


def test_fewer_videos_and_an_old_policy_that_stays_teach_something_else(both):
    assert difference(both, "two thirds", "nft") > 1e-2 and difference(both, "stuck", "nft") > 1e-3


def test_grpo_in_two_halves_resumes_bit_exactly(grpo):
    """Policy, old policy, reference, average and optimizer."""
    config = dict(NFT, lora=False, beta=0.1, max_steps=4, ema_decay=0.9, ema_update_steps=1, optim="adamw_torch", learning_rate=1e-3,
                  save_strategy="steps", save_steps=2)  # fmt: skip
    whole = grpo({"run": config}, 2)
    resumed = grpo({"run": config | {"resume": str(whole / "run" / "checkpoint-2")}}, 2)
    first, second = (json.loads((out / "run.json").read_text()) for out in (whole, resumed))
    assert second["digests"] == first["digests"]
    assert [entry["loss"] for entry in second["logs"]] == [entry["loss"] for entry in first["logs"]]
    saved = load_file(whole / "run" / "checkpoint-2" / "roles.safetensors")
    assert {name.split(".")[0] for name in saved} == {"old", "reference", "average"}


# ---- Different numbers of calls ----


def call_often(out, environment, equal):
    """One process: as many calls of a sharded model as its rank is high, thrice."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(90, exit=True)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for layer in model:
        fully_shard(layer)  # is gathered again in each call, which the root of all is not
    fully_shard(model)
    calls, counted = EqualCalls(model, accelerator), []
    model.register_forward_hook(lambda *_: counted.append(1))
    x, rank = torch.ones(1, 4), accelerator.process_index
    model(x)
    Path(out, f"{rank}.begun").touch()
    for _ in range(3):
        with calls if equal else contextlib.nullcontext(), torch.no_grad():
            for _ in range(rank + 1):
                y = model(x * rank)
        # another collective operation: it must not meet a gather of weights
        total = accelerator.reduce(y.sum())
    Path(out, f"{rank}.json").write_text(json.dumps([len(counted), y.sum().item(), total.item()]))
    os._exit(0)


@pytest.mark.parametrize("equal", [True, False])
def test_processes_may_call_a_sharded_model_a_different_number_of_times(tmp_path, monkeypatch, equal):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sft_worker"])
    started = [context.Process(target=call_often, args=(str(tmp_path), env, equal)) for env in ranks(2)]
    for process in started:
        process.start()
    deadline = time.monotonic() + 80
    while len(list(tmp_path.glob("*.begun"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in started:
        process.join(timeout=30 if equal else 10)
    assert len(list(tmp_path.glob("*.begun"))) == 2
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    correct = len(found) == 2 and found[0][2] == pytest.approx(found[0][1] + found[1][1])
    for process in started:
        process.kill()
    assert correct == equal  # without the context they wait for each other, fail, or add up the wrong things
    if equal:
        assert [number for number, *_ in found] == [7, 7]  # one before, and thrice two


# ---- What is refused ----


@pytest.fixture
def one_of_one(monkeypatch):
    """A process that the launcher has started alone, with FSDP."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "fsdp_state_dict_type: FULL_STATE_DICT"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing=True"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_settings_that_do_not_work_say_what_to_set(one_of_one, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=message):
        prepare_fsdp(accelerator, wan()[0].transformer)


def test_what_is_sharded_together_and_in_which_numbers(one_of_one):
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.cast_forward_inputs  # would round the noise level
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    prepare_fsdp(accelerator, wan()[0].transformer)
    assert plugin.transformer_cls_names_to_wrap == ["WanTransformerBlock"] and plugin.mixed_precision_policy is None
    assert not accelerator.autocast_handler.cache_enabled


def test_fsdp_takes_an_average_and_leaves_micro_batches_out():
    for kind, on_nan in (("FSDP", "skip"), ("DeepSpeed", "raise")):
        check_sharded(SimpleNamespace(on_nan=on_nan, ema_decay=0.9), 1, kind)
    with pytest.raises(ValueError, match="on_nan='skip' does not work with DeepSpeed.*--accelerate_config fsdp2"):
        check_sharded(SimpleNamespace(on_nan="skip"), 1, "DeepSpeed")


def test_deepspeed_on_a_cpu_is_refused_and_never_left_out_in_silence(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed does not run with use_cpu"):
        shard_on_cpu(None)
