"""What only a GPU can show. Skipped without one: everything else is tested on the CPU."""

import copy
import io

import pytest
import torch
from datasets import Dataset
from diffusers import WanPipeline
from peft import LoraConfig
from PIL import Image

from vidtrl import (
    VideoDistillConfig,
    VideoDistillTrainer,
    VideoGRPOConfig,
    VideoGRPOTrainer,
    VideoModel,
    VideoSFTConfig,
    VideoSFTTrainer,
)
from vidtrl.models import CausalAttention, KVCache, check_model
from vidtrl.toy import captions, pipeline_path, render
from vidtrl.trainer import grpo_choices


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZE = {"height": 64, "width": 64, "num_frames": 17}
PROMPTS = captions()[:8]


def common(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path / "run"),
        **SIZE,
        "max_sequence_length": 16,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }


def lora():
    return LoraConfig(r=8, lora_alpha=8)


def pipeline():
    return WanPipeline.from_pretrained(pipeline_path(), dtype=torch.float32)


def moved(trainer, before):
    after = {n: p.detach().float().cpu() for n, p in trainer.policies.parameters(trainer._role).items()}
    return max(float((after[n] - before[n]).abs().max()) for n in after)


def train(trainer):
    """Train, and return how far the weights moved; everything stays finite and on the GPU."""
    before = {n: p.detach().float().cpu().clone() for n, p in trainer.policies.parameters(trainer._role).items()}
    trainer.train()
    assert all(p.is_cuda for p in trainer.model.parameters())
    assert all(abs(entry["loss"]) < 1e6 for entry in trainer.state.log_history if "loss" in entry)
    return moved(trainer, before)


def latents_and_condition(model, batch=2):
    condition = model.condition(PROMPTS[:batch], **SIZE, max_sequence_length=16)
    noise = torch.randn(batch, *condition.latent_shape, generator=torch.Generator().manual_seed(0))
    return noise, condition


def test_the_model_is_the_same_on_both_devices():
    pipe = pipeline()
    model = VideoModel(pipe)
    noise, condition = latents_and_condition(model)
    expected = model.velocity(noise, 0.7, condition)
    pipe.to("cuda")
    found = model.velocity(noise.cuda(), 0.7, condition.to("cuda"))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    check_model(model, max_sequence_length=16).raise_if_failed()


def test_causal_modes_agree():
    pipe = pipeline().to("cuda")
    model = VideoModel(pipe)
    causal = CausalAttention(model)
    noise, condition = latents_and_condition(model)
    noise, condition = noise.cuda(), condition.to("cuda")
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
        autocast = torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), autocast:
            sigma = torch.full((2, noise.shape[2]), 0.5, device="cuda")
            with causal.block_causal(1):
                whole = model.velocity(noise, sigma, condition)
            cache, parts = KVCache(), []
            for block in noise.split(1, 2):
                with causal.cached(cache, store=True):
                    parts.append(model.velocity(block, 0.5, condition))
        error = (torch.cat(parts, 2) - whole).abs().max() / whole.abs().max()
        assert error < limit, (dtype, float(error))


def test_sft_in_bfloat16_with_checkpointing(tmp_path):
    rows = []  # pictures, one-frame videos: they need no decoder
    for i, prompt in enumerate(PROMPTS):
        buffer = io.BytesIO()
        Image.fromarray(render(prompt, "clean", i)[0].permute(1, 2, 0).numpy()).save(buffer, format="png")
        rows.append({"prompt": prompt, "image": {"bytes": buffer.getvalue(), "path": None}})
    pipe = pipeline()
    base = copy.deepcopy(pipe.transformer.state_dict())
    args = VideoSFTConfig(
        **common(tmp_path, bf16=True, gradient_checkpointing=True, cache=False, ema_decay=0.9, num_frames=1)
    )
    trainer = VideoSFTTrainer(pipe, args, train_dataset=Dataset.from_list(rows), peft_config=lora())
    assert train(trainer) > 0
    frozen = {n: p for n, p in trainer._unwrapped().named_parameters() if "lora_" not in n}
    assert all(
        torch.equal(base[n.removeprefix("base_model.model.").replace(".base_layer", "")], p.cpu())
        for n, p in frozen.items()
    )


@pytest.mark.parametrize("recipe", ["flash-grpo", "diffusion-nft"])
def test_grpo_in_bfloat16(tmp_path, recipe):
    options = {"num_generations": 4, "num_inference_steps": 4, "learning_rate": 1e-3}
    args = VideoGRPOConfig(**common(tmp_path, bf16=True, recipe=recipe, per_device_train_batch_size=8, **options))
    rewards = ["toy-smoothness", lambda videos, **kw: [float(v.mean()) for v in videos]]
    trainer = VideoGRPOTrainer(
        pipeline(), rewards, args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}), peft_config=lora()
    )
    assert train(trainer) > 0
    assert (trainer.batch_guidance, trainer.reuse_rollout) == (
        (True, True) if recipe == "flash-grpo" else (False, False)
    )


def test_grpo_without_room(tmp_path, monkeypatch):
    """What is left open is decided by the memory that is free."""
    monkeypatch.setattr(grpo_choices, "HEADROOM", 0.0)
    args = VideoGRPOConfig(**common(tmp_path, bf16=True, per_device_train_batch_size=8, num_inference_steps=4))
    rows = Dataset.from_dict({"prompt": PROMPTS})
    reward = lambda videos, **kw: [float(v.mean()) for v in videos]  # noqa: E731
    trainer = VideoGRPOTrainer(pipeline(), reward, args, train_dataset=rows, peft_config=lora())
    assert trainer.reuse_rollout
    assert train(trainer) > 0
    assert (trainer.batch_guidance, trainer.reuse_rollout) == (False, False)


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "copies"])
@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "dmd2"},
        {"recipe": "dmd2", "loss_type": "sid"},
        {"recipe": "self-forcing", "frames_per_block": 1, "shift": 3.0},
        {"recipe": "longlive", "frames_per_block": 1, "window": 4, "sink": 1, "stream_num_frames": 9},
    ],
    ids=lambda o: o["recipe"] + o.get("loss_type", ""),
)
def test_distillation_in_bfloat16_with_checkpointing(tmp_path, options, adapters):
    changes = {"bf16": True, "gradient_checkpointing": True, "fake_updates_per_student": 1, "learning_rate": 1e-3}
    args = VideoDistillConfig(**common(tmp_path, cache_dir=str(tmp_path / "cache"), **changes, **options))
    trainer = VideoDistillTrainer(
        pipeline(),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=lora() if adapters else None,
    )
    assert train(trainer) > 0
    (video,) = trainer.generate_videos(PROMPTS[:1], seeds=[0])
    assert video.shape == (17, 3, 64, 64) and video.isfinite().all()


def test_the_teacher_and_its_gradient_are_those_of_the_cpu(tmp_path):
    found = {}
    for device in ("cpu", "cuda"):
        options = {"use_cpu": device == "cpu", "bf16": False, "cache_dir": str(tmp_path / "cache")}
        args = VideoDistillConfig(**common(tmp_path / device, gradient_checkpointing=False, **options))
        data = Dataset.from_dict({"prompt": PROMPTS})
        trainer = VideoDistillTrainer(pipeline(), args=args, train_dataset=data, peft_config=lora())
        batch = trainer.data_collator([{**trainer.train_dataset.dataset[i], "draw": i} for i in range(2)])
        batch["condition"] = batch["condition"].to(args.device)
        noise = torch.randn(2, *batch["condition"].latent_shape, generator=torch.Generator().manual_seed(0))
        x = noise.to(args.device).requires_grad_()
        velocity = trainer._teacher_velocity(x, torch.tensor([0.3, 0.8], device=args.device), batch)
        velocity.square().mean().backward()
        found[device] = (velocity.detach().cpu(), x.grad.cpu())
    for gpu, cpu in zip(found["cuda"], found["cpu"], strict=True):
        assert (gpu - cpu).abs().max() < 5e-3 * cpu.abs().max()


def test_compiled_blocks(tmp_path):
    args = VideoDistillConfig(
        **common(
            tmp_path, bf16=True, compile_repeated_blocks=True, gradient_checkpointing=False, max_steps=2,
            fake_updates_per_student=1, cache_dir=str(tmp_path / "cache"),
        )
    )  # fmt: skip
    trainer = VideoDistillTrainer(
        pipeline(), args=args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}), peft_config=lora()
    )
    assert train(trainer) > 0


def test_one_of_two_experts_is_on_the_gpu(tmp_path):
    """Swapped or not, two experts learn the same; swapped, the frozen weights of one are on the CPU."""
    weights = []
    for offload in (True, False):
        pipe = pipeline()
        pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
        pipe.register_to_config(boundary_ratio=0.6)
        rows = [{"prompt": prompt, "video": render(prompt, seed=i)} for i, prompt in enumerate(PROMPTS)]
        clips = Dataset.from_list([{**row, "video": row["video"].numpy()} for row in rows])
        config = common(
            tmp_path / str(offload), per_device_train_batch_size=1, gradient_accumulation_steps=4, bf16=False,
            fps=8, cache_dir=str(tmp_path / "cache"), offload_experts=offload,
        )  # fmt: skip
        trainer = VideoSFTTrainer(pipe, VideoSFTConfig(**config), clips, peft_config=lora())
        trainer.train()
        devices = {
            name: {(p.requires_grad, p.device.type) for p in getattr(trainer.model, name).parameters()}
            for name in ("transformer", "transformer_2")
        }
        frozen = sorted(device for each in devices.values() for grad, device in each if not grad)
        assert frozen == (["cpu", "cuda"] if offload else ["cuda", "cuda"])
        assert all((True, "cuda") in each for each in devices.values())
        trainer.pipe(PROMPTS[0], **SIZE, num_inference_steps=4, max_sequence_length=16)  # both are called
        weights.append({n: p.detach().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)
