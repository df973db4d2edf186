"""What the distillation tests share: prompts and a trainer of a tiny pipeline."""

import gc
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).parent))

from sft_setup import SIZE  # noqa: E402
from tiny_pipelines import tiny_wan_transformer, wan  # noqa: E402

from vidtrl import VideoDistillConfig, VideoDistillTrainer  # noqa: E402
from vidtrl.trainer.sharding import whole  # noqa: E402


gc.freeze()  # as in sft_setup

PROMPTS = ["a red circle moves left", "a blue square moves right", "a green dog", "a cat moves up slowly"]


def dataset(num_prompts=4) -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:num_prompts]])


def make_args(output_dir, cache_dir, **config) -> VideoDistillConfig:
    defaults = dict(
        SIZE,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        fake_learning_rate=1e-2,
        fake_updates_per_student=1,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        check_model=False,
        cache_dir=str(cache_dir),
        ema_decay=0.0,
    )
    return VideoDistillConfig(str(output_dir), **{**defaults, **config})


def make_trainer(
    output_dir, cache_dir, *, pipe=None, lora=True, rows=None, cls=VideoDistillTrainer, trainer=None, **config
) -> VideoDistillTrainer:
    """`config` are fields of the configuration, `trainer` further arguments of the trainer."""
    return cls(
        model=wan()[0] if pipe is None else pipe,
        args=make_args(output_dir, cache_dir, **config),
        train_dataset=dataset() if rows is None else rows,
        peft_config=LoraConfig(r=4, lora_alpha=8) if lora is True else lora or None,
        **(trainer or {}),
    )


def history(trainer, name) -> list[float]:
    """The logged values of a metric."""
    return [entry[name] for entry in trainer.state.log_history if name in entry and "train_runtime" not in entry]


def weights(trainer, role="student") -> dict:
    """A copy of a role's trained weights, whole: all processes must call it."""
    return {name: whole(p.detach().clone()) for name, p in trainer.policies.parameters(role).items()}


def distance(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def other_size(**parts):
    """A pipeline with another transformer, larger than `wan`'s."""
    pipe = wan()[0]
    transformer = tiny_wan_transformer(seed=1)
    pipe.register_modules(transformer=type(transformer)(**{**transformer.config, "num_layers": 3}), **parts)
    return pipe
