"""What the trainer tests share: six tiny clips, a tiny pipeline, and a trainer over them."""

import gc
import hashlib
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


sys.path.insert(0, str(Path(__file__).parent))

from tiny_pipelines import wan  # noqa: E402

from vidtrl import VideoSFTConfig, VideoSFTTrainer  # noqa: E402
from vidtrl.data.video import write_video  # noqa: E402
from vidtrl.toy.world import captions, render  # noqa: E402


# accelerate collects garbage at the start of each training; what the imports left alive is no garbage (1 s a training)
gc.freeze()

SIZE = dict(height=16, width=16, num_frames=9, max_sequence_length=16)


def write_clips(directory, num_clips=6) -> Dataset:
    """Clips of 9 frames, 16x16 pixels, as mp4 files."""
    rows = []
    for i in range(num_clips):
        caption = captions()[i * 11 % 72]
        path = Path(directory) / f"{i}.mp4"
        write_video(path, render(caption, seed=i)[:9, :, ::4, ::4], fps=8)
        rows.append({"video": str(path), "prompt": caption})
    return Dataset.from_list(rows)


def make_args(output_dir, cache_dir, **config) -> VideoSFTConfig:
    defaults = dict(
        SIZE,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        check_model=False,
        cache_dir=str(cache_dir),
    )
    return VideoSFTConfig(str(output_dir), **{**defaults, **config})


def make_trainer(output_dir, clips, cache_dir, *, pipe=None, lora=True, eval_clips=None, **config) -> VideoSFTTrainer:
    peft_config = LoraConfig(r=4, lora_alpha=8) if lora is True else lora or None
    return VideoSFTTrainer(
        model=wan()[0] if pipe is None else pipe,
        args=make_args(output_dir, cache_dir, **config),
        train_dataset=clips,
        eval_dataset=eval_clips,
        peft_config=peft_config,
    )


def trained_weights(trainer) -> dict:
    """Whole weights, also of a sharded model: all processes must call it."""
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: p.detach().clone() for name, p in trained.items()}
    weights = {name: p.detach().clone() for name, p in trained.items()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def held(trainer, model=None) -> float:
    """The share of the model's weights that this process holds."""
    model = trainer.model if model is None else model
    if isinstance(model, FSDPModule):
        model.reshard()  # what is outside the blocks stays whole after a forward
    parameters = list(model.parameters())
    if hasattr(parameters[0], "ds_numel"):  # ZeRO-3
        return sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)
    mine = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return sum(p.numel() for p in mine) / sum(p.numel() for p in parameters)


def digest(weights: dict) -> str:
    """Equal digests mean equal bits."""
    result = hashlib.sha256()
    for name in sorted(weights):
        result.update(name.encode())
        result.update(weights[name].float().contiguous().numpy().tobytes())
    return result.hexdigest()


def moved(before: dict, after: dict) -> dict[str, float]:
    """How far training has moved the weights of each role, which their names begin with."""
    return {
        role: max((w - before[n]).abs().max().item() for n, w in after.items() if n.startswith(role))
        for role in {n.split(".")[0] for n in after}
    }
