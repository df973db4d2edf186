"""What the GRPO tests share: four prompts, a reward, and a trainer of a tiny pipeline."""

import gc
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).parent))

from sft_setup import SIZE  # noqa: E402
from tiny_pipelines import wan  # noqa: E402

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer  # noqa: E402


gc.freeze()  # as in sft_setup

PROMPTS = ["a red circle moves left", "a blue square moves right", "a green dog", "a cat moves up slowly"]


def brightness(videos, **kwargs):
    """Of the order of one, and exact: a tiny model's videos hardly differ, and float32 would round that away."""
    return [100 * (v.double().mean().item() - 0.46) for v in videos]


def dataset(num_prompts=4) -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:num_prompts]])


def make_args(output_dir, **config) -> VideoGRPOConfig:
    defaults = dict(
        SIZE,
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        num_inference_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        check_model=False,
        ema_decay=0.0,
    )
    return VideoGRPOConfig(str(output_dir), **{**defaults, **config})


def make_trainer(
    output_dir, *, pipe=None, lora=True, rewards=brightness, rows=None, cls=VideoGRPOTrainer, trainer=None, **config
) -> VideoGRPOTrainer:
    """`config` are fields of the configuration, `trainer` further arguments of the trainer."""
    return cls(
        model=wan()[0] if pipe is None else pipe,
        reward_funcs=rewards,
        args=make_args(output_dir, **config),
        train_dataset=dataset() if rows is None else rows,
        peft_config=LoraConfig(r=4, lora_alpha=8) if lora is True else lora or None,
        **(trainer or {}),
    )


def history(trainer, name) -> list[float]:
    """The logged values of a metric."""
    return [entry[name] for entry in trainer.state.log_history if name in entry and "train_runtime" not in entry]


class Watching(VideoGRPOTrainer):
    """Keeps what each generation did: plans, rewards (P, G, R), advantages, decisions or videos, and items."""

    def __init__(self, *args, **kwargs):
        self.generations = []
        super().__init__(*args, **kwargs)

    def _advantages(self, plans, rewards):
        advantages = super()._advantages(plans, rewards)
        self.generations.append({"plans": plans, "rewards": rewards, "advantages": advantages})
        return advantages

    def _slices(self, items):
        scales = [item.weight.clone() for item in items]  # before they are divided by the number of children
        slices = super()._slices(items)
        self.generations[-1] |= {"items": items, "scales": scales, "slices": slices}
        return slices
