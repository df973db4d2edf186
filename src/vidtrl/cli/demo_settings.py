"""What `vidtrl demo` trains and measures, in one place."""

from dataclasses import dataclass, field, replace


STAGES = ("sft", "grpo", "prompt", "distill")  # in the order in which they build on each other
ADAPTERS = ("sft", "grpo", "distill")  # those that leave an adapter of the video model
# what is generated and compared, each with the one before it. The teacher is the model after GRPO, under guidance; the
# control is that model in the student's few steps, without the student's training. Prompts are captions, as the base learned
# them, but for the enhancer: what users write goes to the model after GRPO as it is, then enhanced, then to the student
MODELS = {
    "base": "base",
    "sft": "SFT",
    "grpo": "SFT + GRPO",
    "enhancer_sft": "enhancer, SFT only",
    "enhancer": "+ enhancer",
    "teacher": "guided",
    "control": "few steps",
    "distill": "distilled",
}
STAGE_MODELS = {"sft": ("sft",), "grpo": ("grpo",), "distill": ("teacher", "control", "distill")}  # on captions
USER_MODELS = {"prompt": ("grpo", "enhancer"), "distill": ("distill",)}  # on users' prompts
ATTRIBUTES = ("color", "shape", "direction")
# seconds a unit on two quiet CPU cores: what the first guess of the time left is made of
PACE = {
    "clips": 0.007,
    "sft": 0.15,
    "grpo": 4.3,
    "prompt": 0.85,
    "distill": 0.21,
    "generate": 0.0034,
    "speed": 20,
    "report": 0.0073,
}


@dataclass(frozen=True)
class DemoSettings:
    """
    Everything that decides what the demo trains and measures.

    Args:
        num_clips (`int`): Training clips of the SFT stage, all `clean`.
        num_eval_clips (`int`): Further clips for the held-out loss.
        num_generated (`int`): Generated clips a model, spread evenly over the captions.
        num_user_prompts (`int`): What users write: paraphrases in words that no training of the enhancer contains, one clip each.
        compare_enhancers (`bool`): Generate with the enhancer after its SFT, before its GRPO, as well.
        lora_r (`int`): Rank of each stage's adapter; `lora_alpha` is equal to it.
        sft (`dict`): Arguments of [`VideoSFTConfig`].
        grpo (`dict`): Arguments of [`VideoGRPOConfig`]. Prompts are all captions.
        prompt (`dict`): Arguments of [`~toy.enhancement.EnhancementSettings`]; what `sft`, `grpo` and `video` do not name keeps its value.
        distill (`dict`): Arguments of [`VideoDistillConfig`]. Prompts are all captions.
        rewards (`tuple[str, ...]`): What the GRPO stage is trained on; `grpo` has their weights.
        watched_rewards (`tuple[str, ...]`): Measured in its evaluation and never trained on.
        num_eval_prompts (`int`): Prompts of its evaluation.
        height (`int`), width (`int`), num_frames (`int`), fps (`int`), max_sequence_length (`int`): The toy's shape.
        num_inference_steps (`int`): Sampling steps of the generated clips.
        guidance_scale (`float`): Classifier-free guidance of the generated clips.
    """

    num_clips: int = 432
    num_eval_clips: int = 36
    num_generated: int = 144  # two a caption: 72 cannot tell a rise of ten points from none
    num_user_prompts: int = 72
    compare_enhancers: bool = False
    lora_r: int = 32
    sft: dict = field(
        default_factory=lambda: {
            "max_steps": 300,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 30,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "caption_dropout": 0.1,
            "ema_decay": 0.99,
            "sigma_sampling": "uniform",
            "gradient_checkpointing": False,
            "eval_steps": 100,
            "save_steps": 100,
            "logging_steps": 10,
        }
    )
    grpo: dict = field(
        default_factory=lambda: {
            "recipe": "diffusion-nft",
            "max_steps": 36,
            "num_generations": 8,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 4,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "beta": 0.1,
            "reward_weights": [1.0, 0.2],
            "multi_objective_aggregation": "sum_then_normalize",
            # most groups are right altogether: their small differences must not count as much as a wrong shape
            "scale_rewards": "batch",
            "nft_beta": 0.3,
            "num_train_sigmas": 2,
            "num_inference_steps": 10,
            "guidance_scale": 1.0,
            "ema_decay": 0.9,
            "ema_update_steps": 1,
            "rollout_batch_size": 32,
            "vae_batch_size": 8,
            "gradient_checkpointing": False,
            "eval_steps": 12,
            "eval_num_inference_steps": 10,
            "per_device_eval_batch_size": 24,
            "save_steps": 12,
            "logging_steps": 1,
        }
    )
    prompt: dict = field(
        default_factory=lambda: {
            "num_pairs": 8,
            "num_prompts": 512,
            "sft": {"max_steps": 60},
            "grpo": {"max_steps": 40, "save_steps": 10},
        }
    )
    distill: dict = field(
        default_factory=lambda: {
            "recipe": "dmd2",
            "max_steps": 120,
            "per_device_train_batch_size": 16,
            # at 1e-3 shapes come back faster and hues drift: docs/distill_trainer.md
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "fake_learning_rate": 5e-4,
            "fake_updates_per_student": 3,
            "adam_beta1": 0.0,
            "denoising_steps": [1000, 750, 500, 250],
            "teacher_guidance_scale": 1.5,
            "ema_decay": 0.9,
            "gradient_checkpointing": False,
            "eval_strategy": "no",
            "save_steps": 30,
            "logging_steps": 4,
        }
    )
    rewards: tuple[str, ...] = ("toy-accuracy", "toy-smoothness")
    watched_rewards: tuple[str, ...] = ("toy-presence",)
    num_eval_prompts: int = 24
    height: int = 64
    width: int = 64
    num_frames: int = 17
    fps: int = 8
    max_sequence_length: int = 16
    num_inference_steps: int = 20
    guidance_scale: float = 1.0

    def units(self) -> dict[str, int]:
        """How much there is to do in each stage, in the units of `PACE`."""
        few, many = len(self.distill["denoising_steps"]), self.num_inference_steps
        # decoding and writing a clip cost about as much as nine evaluations of this small model
        captions = self.num_generated * (5 * many + 2 * few + 6 * 9)
        users = self.num_user_prompts * ((2 + self.compare_enhancers) * many + few + (3 + self.compare_enhancers) * 9)
        return {
            "clips": self.num_clips + self.num_eval_clips,
            "sft": self.sft["max_steps"],
            "grpo": self.grpo["max_steps"],
            "prompt": self.prompt["grpo"]["max_steps"],
            "distill": self.distill["max_steps"],
            "generate": captions + users,
            "speed": 1,
            "report": 6 * self.num_generated + 3 * self.num_user_prompts,
        }


def full_settings() -> DemoSettings:
    """What `vidtrl demo --full` runs: more clips, longer trainings, and the enhancer's two steps apart."""
    small = DemoSettings()
    return replace(
        small,
        num_generated=288,
        num_user_prompts=144,
        compare_enhancers=True,
        sft=small.sft | {"max_steps": 400},
        grpo=small.grpo | {"max_steps": 48},
        distill=small.distill | {"max_steps": 240, "save_steps": 60},
    )
