"""DeepSpeed for distillation: each role learns what it learns in one process, and rests when it is not its turn."""

import pytest
from distill_setup import make_trainer
from safetensors.torch import load_file
from zero_setup import check_close, check_equal, check_resumed, differences, needs_deepspeed, result


SGD = dict(
    trainer="distill", optim="sgd", learning_rate=0.5, fake_learning_rate=0.5, max_steps=4, per_device_train_batch_size=4
)  # fmt: skip
# the roles' gradients differ in size: clipped together, the student's would be another
BOTH = dict(SGD, critic_schedule="every_step", fake_updates_per_student=2, max_grad_norm=0.01, learning_rate=5.0)
OUTSIDE = dict(r=4, lora_alpha=8, target_modules=["to_q", "proj_out", "time_embedder.linear_1"])
LONG = dict(SGD, recipe="longlive", frames_per_block=1, window=3, sink=1, stream_num_frames=7, stream_overlap=1)
CASES = {
    "dmd2": dict(SGD, evaluate=True, ema_decay=0.9, max_grad_norm=0.0),
    # momentum and weight decay would move the role whose turn it is not
    "adam": dict(
        SGD, optim="adamw_torch", learning_rate=1e-2, fake_learning_rate=1e-2, weight_decay=0.5, fake_updates_per_student=2,
        max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, lora=OUTSIDE,
    ),
    "sid": dict(BOTH, loss_type="sid", gradient_checkpointing=True),
    "accumulated": dict(BOTH, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "self-forcing": dict(SGD, recipe="self-forcing", frames_per_block=1, gradient_checkpointing=True),
    "lcm": dict(SGD, recipe="lcm", clips=True, ema_decay=0.9),
    "continuous": dict(SGD, recipe="lcm", clips=True, consistency="continuous", learning_rate=1e-3),
    "another teacher": dict(SGD, teacher=True, max_steps=2),
    # in the second step a process has trajectories to compute that the other one has already
    "regression": dict(SGD, loss_type="ode_regression", clips=True, seed=14, teacher_steps=4),
}  # fmt: skip
BF16 = dict(SGD, bf16=True, ema_decay=0.9, evaluate=True)
# saved after each step: also before the student had a turn
WHOLE = dict(
    LONG, optim="adamw_torch", learning_rate=1e-2, fake_learning_rate=1e-2, weight_decay=0.5, ema_decay=0.9, max_steps=5,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1,
    lr_scheduler_type="cosine", fake_updates_per_student=2, validation_steps=2, validation_prompts=["a circle", "a square"],
)  # fmt: skip


@pytest.fixture(scope="module")
def one(zero):
    return zero("one", CASES | {"bf16": BF16, "half": dict(CASES["dmd2"], per_device_train_batch_size=2)})


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def two(zero, request):
    return zero(request.param, CASES | {"bf16": BF16, "whole": WHOLE}, request.param)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    check_equal(one, two, name)


@pytest.mark.slow
@needs_deepspeed
def test_bfloat16_is_near(one, two):
    check_close(one, two, "bf16")


@pytest.mark.slow
@needs_deepspeed
def test_half_of_the_batch_teaches_something_else(one):
    assert min(differences(one, "half", one, "dmd2").values()) > 1e-2


@pytest.mark.slow
@needs_deepspeed
def test_resumes_bit_exactly(zero, two):
    """Student, fake score, average, optimizer and videos under way; also where the student had no turn yet."""
    again = {f"from {n}": dict(WHOLE, resume=str(two / "whole" / f"checkpoint-{n}")) for n in (2, 3)}
    below = dict(WHOLE, max_steps=1, base_adapters=[str(two / "whole" / "checkpoint-5")])
    folder = zero(f"{two.name} resumed", again | {"below": below}, two.name)
    for name in again:
        check_resumed(two, "whole", folder, name)
    # one step of the fake score leaves the student where it was, although weights decay
    assert result(folder, "below")["moved"]["student"] == 0.0 < result(folder, "below")["moved"]["fake"]
    files = [two / "whole" / "checkpoint-5", folder / "below" / "checkpoint-1" / "base_adapters" / "0"]
    given, kept = (load_file(directory / "pytorch_lora_weights.safetensors") for directory in files)
    assert given.keys() == kept.keys() and all(given[n].equal(kept[n]) for n in given)
    assert len(list((two / "whole" / "validation" / "step_000002").glob("*.mp4"))) == 2


def test_what_does_not_work_with_deepspeed_says_what_to_set(tmp_path, cache_dir):
    trainer = make_trainer(tmp_path, cache_dir)
    student, fake = (list(trainer.policies.parameters(role).values()) for role in ("student", "fake"))
    groups = [{"params": fake[:1]}, {"params": fake[1:]}, {"params": student}]
    trainer._name_groups(groups)
    assert [group["role"] for group in groups] == ["fake", "fake", "student"]
    with pytest.raises(ValueError, match="belong to one role each: .* leave optimizers out"):
        trainer._name_groups([{"params": fake + student}])
