"""DeepSpeed for SFT and GRPO: two processes train what one trains, and resume."""

import pytest
from safetensors.torch import load_file
from tiny_pipelines import wan
from zero_setup import SAVED, check_close, check_equal, check_resumed, differences, needs_deepspeed


pytestmark = [pytest.mark.slow, needs_deepspeed]

SFT = dict(trainer="sft", per_device_train_batch_size=4)
# of Adam's first steps, rounding decides where gradients are nearly zero
GRPO = dict(trainer="grpo", per_device_train_batch_size=4, optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
VIDEOS = dict(
    validation_steps=3, validation_prompts=["a circle", "a square", "a dog"], validation_num_inference_steps=1
)
BEST = dict(
    save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.5
)  # fmt: skip
CASES = {
    "sft": dict(SFT, **SAVED, **VIDEOS, ema_decay=0.9),
    "all weights": dict(SFT, max_steps=3, lora=False, learning_rate=1e-3, ema_decay=0.9, gradient_checkpointing=True),
    "best": dict(SFT, **BEST, max_steps=3, ema_decay=0.9),
    # one micro-step of two micro-batches, two micro-steps an update
    "grpo": dict(GRPO, **SAVED, gradient_accumulation_steps=2, beta=0.05, ema_decay=0.9, ema_update_steps=1),
    # the old policy samples, or is a part of the loss; the reference is a copy of the weights, at rest or moved
    "nft": dict(GRPO, **SAVED, recipe="diffusion-nft", gradient_accumulation_steps=3, old_policy_decay=[0.001, 0.5]),
    "nft, all weights": dict(
        GRPO, recipe="diffusion-nft", gradient_accumulation_steps=3, lora=False, learning_rate=1e-2, beta=0.1,
        old_policy_decay=[0.001, 0.5], max_steps=3,
    ),
    "awm": dict(GRPO, recipe="awm", num_train_sigmas=2, gradient_accumulation_steps=3, ema_decay=0.9, ema_update_steps=1, max_steps=3),
    "moved": dict(
        GRPO, **SAVED, recipe="longcat", gradient_accumulation_steps=3, beta=0.1, sync_ref_model=True,
        ref_model_sync_steps=1, ref_model_mixup_alpha=0.5,
    ),
}  # fmt: skip
BF16 = {
    "sft bf16": dict(SFT, max_steps=4, bf16=True, ema_decay=0.9),
    # the negative prompt is encoded before DeepSpeed rounds the denoiser, the others after it
    "grpo bf16": dict(GRPO, max_steps=3, bf16=True, beta=0.05),
}
HALF = ("sft", "grpo")


@pytest.fixture(scope="module")
def one(zero):
    return zero(
        "one", CASES | BF16 | {f"half of {name}": dict(CASES[name], per_device_train_batch_size=2) for name in HALF}
    )


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def two(zero, request):
    return zero(request.param, CASES | BF16, request.param)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    check_equal(one, two, name)


@pytest.mark.parametrize("name", BF16)
def test_bfloat16_is_near(one, two, name):
    check_close(one, two, name)


def test_half_of_the_batch_teaches_something_else(one):
    assert min(min(differences(one, f"half of {name}", one, name).values()) for name in HALF) > 1e-2


def test_what_is_saved_is_the_average(one, two):
    """And diffusers loads it."""

    def saved(folder, file) -> dict:
        return load_file(folder / "sft" / "checkpoint-4" / f"{file}.safetensors")

    first, second = (saved(folder, "pytorch_lora_weights") for folder in (one, two))
    largest = max((first[n] - w).abs().max().item() for n, w in second.items())
    average = saved(two, "roles")  # under ZeRO-3 flat, and padded
    raw = {f"average.{n}": w.flatten() for n, w in saved(one, "training_weights").items() if n != "num_updates"}
    assert raw.keys() == average.keys() and list(saved(two, "training_weights")) == ["num_updates"]
    apart = max((average[n].flatten()[: len(w)] - w).abs().max().item() for n, w in raw.items())
    assert largest < 1e-2 * apart
    assert len(list((two / "sft" / "validation" / "step_000003").glob("*.mp4"))) == 3
    wan()[0].load_lora_weights(str(two / "sft" / "checkpoint-4"))


def test_resumes_bit_exactly(zero, two):
    resumed = ("sft", "grpo", "nft", "moved")
    again = {name: dict(CASES[name], resume=str(two / name / "checkpoint-2")) for name in resumed}
    folder = zero(f"{two.name} resumed", again, two.name)
    for name in resumed:
        check_resumed(two, name, folder, name)
