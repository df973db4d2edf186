"""Arguments of [`VideoDistillTrainer`]."""

import difflib
import os
from dataclasses import dataclass, field

from ..diffusion.distribution_matching import few_step_sigmas
from .clip_config import ClipConfig
from .distill_recipes import DEFAULTS, RECIPES


CHOICES = {
    "loss_type": ("dmd", "sid", "consistency", "ode_regression"),
    "rollout": ("backward_simulation", "self_forcing", "data"),
    "sampler": ("renoise", "ode"),
    "critic_schedule": ("exclusive", "every_step"),
    "causal": (None, "teacher_forcing", "diffusion_forcing"),
    "consistency": ("discrete", "continuous"),
    "consistency_target": ("student", "ema"),
    "consistency_weighting": ("mse", "huber", "sum"),
    "tangent": ("finite_difference", "jvp"),
}


def _option(text: str, name: str | None = None):
    """A field that the recipe fills unless it is set."""
    metadata = {"help": f"{text} Default: the recipe's."}
    choices = [c for c in CHOICES.get(name, ()) if c is not None]
    return field(default=None, metadata=metadata | ({"choices": choices} if choices else {}))


@dataclass
class VideoDistillConfig(ClipConfig):
    r"""
    Configuration of [`VideoDistillTrainer`]: [`ClipConfig`] plus the arguments below.

    `recipe` names a published method; it fills every field marked "by recipe" that is not set explicitly. Prompts are all that
    is needed unless `rollout="data"`, which learns from clips.

    Args:
        > Parameters that control the method

        recipe (`str`, *optional*, defaults to `"dmd2"`):
            `"dmd2"`, `"causvid"`, `"self-forcing"`, `"causal-forcing"`, `"longlive"`, `"rcm"` or `"lcm"`.
        loss_type (`str`, by recipe):
            `"dmd"` or `"sid"` (match distributions), `"consistency"`, or `"ode_regression"` on the teacher's trajectories,
            which are made once and kept in `output_dir/_trajectories`.
        rollout (`str`, by recipe):
            What the student sees: its own few-step samples (`"backward_simulation"`), its own causal samples, block by block
            with a KV cache (`"self_forcing"`), or noised clips (`"data"`).
        denoising_steps (`list[float]`, by recipe):
            Timesteps of the student, decreasing, before the shift and without the final 0.
        shift (`str` or `float`, by recipe):
            Shift of those steps and of all noise levels of training: the model's own (`"auto"`), or a number (1 is none).
        sampler (`str`, by recipe):
            Between two steps the student's estimate is noised anew (`"renoise"`) or with the noise it predicts (`"ode"`).
        teacher_guidance_scale (`float`, by recipe):
            Classifier-free guidance of the teacher, in the standard form: the value of a Self-Forcing or CausVid
            configuration plus one. 1 is none.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Of the teacher's guidance.
        init_adapter (`str`, *optional*):
            Directory of an adapter from which the student starts, such as the one of a causal fine-tuning; it must have the
            shape of `peft_config`. Unlike `base_adapters` it is no part of the teacher, and it is one adapter, which is
            trained on.

        > Parameters that control distribution matching

        score_range (`list[float]`, by recipe):
            Smallest and largest noise level at which the scores are compared.
        fake_updates_per_student (`int`, by recipe):
            Updates of the fake score for each of the student.
        critic_schedule (`str`, by recipe):
            `"exclusive"`: an optimizer step trains one of the two, the student in every `fake_updates_per_student + 1`-th.
            `"every_step"`: every step trains the fake score, each `fake_updates_per_student`-th the student as well.
        fake_learning_rate (`float`, by recipe):
            Learning rate of the fake score; `learning_rate` is the student's.

        > Parameters that control causal students

        causal (`str`, by recipe):
            How clips are shown to a causal student with `rollout="data"` or `loss_type="ode_regression"`: after clean
            earlier blocks (`"teacher_forcing"`) or noisy ones (`"diffusion_forcing"`). `None` is a bidirectional student.
        frames_per_block (`int`, by recipe):
            Latent frames that are sampled at once.
        window (`int`, by recipe):
            Latent frames that a block attends to, the sink and itself included; `None` is all.
        sink (`int`, by recipe):
            First latent frames that stay visible.
        context_noise (`float`, by recipe):
            Noise level of finished blocks in the cache.
        stream_num_frames (`int`, by recipe):
            Latent frames of one video in streaming long tuning: every step continues it by a window. `None` starts a new
            video each step.
        stream_overlap (`int`, by recipe):
            Latent frames that two such windows share.
        prompt_switch (`bool`, by recipe):
            Continue each streamed video under another prompt from a random window on.

        > Parameters that control consistency and regression

        teacher_steps (`int`, by recipe):
            Steps of the teacher's trajectory: neighbouring points for `"discrete"` consistency, or to its end for
            `"ode_regression"`.
        consistency (`str`, by recipe):
            `"discrete"`, or `"continuous"` (sCM).
        consistency_target (`str`, by recipe):
            Weights of the discrete target: the `"student"`'s own or their moving average (`"ema"`, needs `ema_decay`).
        consistency_weighting (`str`, by recipe):
            `"mse"`, `"huber"` or `"sum"`.
        time_distribution (`list[float]`, by recipe):
            Mean and standard deviation of log tan t of continuous consistency.
        tangent (`str`, by recipe):
            Derivative along the trajectory: `"finite_difference"`, or `"jvp"` (attention runs in its slowest kernel).
        tangent_warmup_steps (`int`, by recipe):
            Steps over which the derivative's share grows to 1.
        dmd_weight (`float`, by recipe):
            Weight of a DMD term on the student's own samples beside the consistency loss; it brings a fake score. Beside
            `"continuous"` consistency, term and fake score begin after `tangent_warmup_steps`.

    > [!NOTE]
    > `learning_rate` and `fake_learning_rate` by recipe depend on whether an adapter or all weights are trained;
    > `lr_scheduler_type` is `"constant"`.

    Example:

    ```python
    >>> from vidtrl import VideoDistillConfig

    >>> args = VideoDistillConfig("wan-4-steps", recipe="self-forcing", height=480, width=832, num_frames=81)
    >>> args.teacher_guidance_scale
    4.0
    ```
    """

    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate's schedule."})

    # Parameters that control the method
    recipe: str = field(
        default="dmd2", metadata={"help": "The published method to start from.", "choices": list(RECIPES)}
    )
    learning_rate: float | None = _option("The student's learning rate.")
    adam_beta1: float | None = _option("Beta 1 of AdamW.")
    adam_beta2: float | None = _option("Beta 2 of AdamW.")
    weight_decay: float | None = _option("Weight decay of AdamW.")
    max_grad_norm: float | None = _option("Largest gradient norm, for each role.")
    ema_decay: float | None = _option("Decay of the moving average of the student; 0 for none.")
    loss_type: str | None = _option("What the student is trained with.", "loss_type")
    rollout: str | None = _option("What the student sees.", "rollout")
    denoising_steps: list[float] | None = _option("Timesteps of the student, decreasing, before the shift.")
    shift: str | None = _option("Shift of all noise levels: the model's own (auto) or a number.")
    sampler: str | None = _option("How the student's estimate is noised again.", "sampler")
    teacher_guidance_scale: float | None = _option("Guidance of the teacher in the standard form; 1 is none.")
    negative_prompt: str = field(default="", metadata={"help": "Negative prompt of the teacher's guidance."})
    init_adapter: str | None = field(
        default=None, metadata={"help": "Directory of an adapter from which the student starts."}
    )

    # Parameters that control distribution matching
    score_range: list[float] | None = _option("Smallest and largest noise level at which the scores are compared.")
    fake_updates_per_student: int | None = _option("Updates of the fake score for each of the student.")
    critic_schedule: str | None = _option("Which steps train the fake score.", "critic_schedule")
    fake_learning_rate: float | None = _option("Learning rate of the fake score.")

    # Parameters that control causal students
    causal: str | None = _option("Context of a causal student's clips.", "causal")
    frames_per_block: int | None = _option("Latent frames that are sampled at once.")
    window: int | None = _option("Latent frames that a block attends to, sink and itself included.")
    sink: int | None = _option("First latent frames that stay visible.")
    context_noise: float | None = _option("Noise level of finished blocks in the cache.")
    stream_num_frames: int | None = _option("Latent frames of one video in streaming long tuning.")
    stream_overlap: int | None = _option("Latent frames that two windows of a stream share.")
    prompt_switch: bool | None = _option("Continue each streamed video under another prompt.")

    # Parameters that control consistency and regression
    teacher_steps: int | None = _option("Steps of the teacher's trajectory.")
    consistency: str | None = _option("Form of the consistency loss.", "consistency")
    consistency_target: str | None = _option("Weights of the discrete target.", "consistency_target")
    consistency_weighting: str | None = _option("Distance of the discrete loss.", "consistency_weighting")
    time_distribution: list[float] | None = _option("Mean and standard deviation of log tan t.")
    tangent: str | None = _option("Derivative along the trajectory.", "tangent")
    tangent_warmup_steps: int | None = _option("Steps over which the derivative's share grows to 1.")
    dmd_weight: float | None = _option("Weight of a DMD term beside the consistency loss.")

    def __post_init__(self):
        if self.recipe not in RECIPES:
            close = difflib.get_close_matches(str(self.recipe), RECIPES, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"there is no recipe {self.recipe!r}{hint} Valid names: {', '.join(RECIPES)}")
        # (LoRA, all weights) of the rates that the user left to the recipe: the trainer knows which of the two it is
        self.recipe_rates: dict[str, tuple[float, float]] = {}
        for name, value in {**DEFAULTS, **RECIPES[self.recipe]}.items():
            if getattr(self, name) is None:
                if isinstance(value, tuple):
                    self.recipe_rates[name], value = value, value[0]
                setattr(self, name, list(value) if isinstance(value, list) else value)
        if self.ema_decay == 0:
            self.ema_decay = None
        super().__post_init__()
        self._validate()

    def _validate(self):
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                names = ", ".join(repr(v) for v in valid if v is not None)
                raise ValueError(f"{name} must be one of {names}, not {getattr(self, name)!r}")
        if self.init_adapter is not None and not isinstance(self.init_adapter, (str, os.PathLike)):
            raise ValueError(
                f"init_adapter is the one adapter that the student's own starts as, not {self.init_adapter!r}. Adapters of "
                "earlier stages that stay under the student belong into base_adapters=[...] (the teacher has them, too); to "
                "start from the sum of several, make them one first, with PEFT's add_weighted_adapter(names, weights, "
                "new_name, combination_type='cat'), and save it"
            )
        few_step_sigmas(self.denoising_steps)  # raises for a list that does not decrease
        if self.shift != "auto":
            try:
                self.shift = float(self.shift)
            except ValueError as error:
                raise ValueError(f"shift must be 'auto' or a positive number, not {self.shift!r}") from error
            if self.shift <= 0:
                raise ValueError(f"shift must be 'auto' or a positive number, not {self.shift}")
        if self.fp16:
            raise ValueError("fp16 overflows in the fake score's training: use bf16=True, or neither")
        for name in ("fake_updates_per_student", "teacher_steps", "tangent_warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        low, high = self.score_range if len(self.score_range) == 2 else (1, 0)
        if not 0 < low < high < 1:
            raise ValueError(
                f"score_range must be two increasing noise levels, such as 0.02 0.98, not {self.score_range}"
            )
        if len(self.time_distribution) != 2 or self.time_distribution[1] <= 0:
            raise ValueError(
                f"time_distribution is a mean and a positive standard deviation, such as 0.7 1.6, not {self.time_distribution}"
            )
        if self.dmd_weight < 0:
            raise ValueError(f"dmd_weight must not be negative, not {self.dmd_weight}")
        if self.loss_type == "sid" and self.rollout == "data":
            raise ValueError("loss_type='sid' needs the student's own samples: set rollout='backward_simulation'")
        if self.loss_type == "consistency" and self.rollout != "data":
            raise ValueError("loss_type='consistency' learns from clips: set rollout='data'")
        if self.loss_type == "ode_regression" and self.rollout != "backward_simulation":
            raise ValueError(
                "loss_type='ode_regression' learns from the teacher's own trajectories: set rollout='backward_simulation' "
                "(and causal='diffusion_forcing' for a causal student)"
            )
        if self.loss_type != "consistency" and self.dmd_weight:
            raise ValueError("dmd_weight is the weight of a term beside loss_type='consistency'; leave it at 0")
        if self.consistency == "continuous" and self.causal is not None:
            raise ValueError("consistency='continuous' trains bidirectional students: set consistency='discrete'")
        uses_ema = self.loss_type == "consistency" and self.consistency == "discrete"
        if uses_ema and self.consistency_target == "ema" and self.ema_decay is None:
            raise ValueError("consistency_target='ema' needs ema_decay, such as 0.99")
        self._validate_causal()

    def _validate_causal(self):
        forced = self.rollout == "self_forcing"
        if forced and self.causal is not None:
            raise ValueError("rollout='self_forcing' brings its own context: leave causal unset")
        if self.causal is not None and self.rollout != "data" and self.loss_type != "ode_regression":
            raise ValueError(
                "causal says how a causal student sees clips or trajectories: for one that learns from its own samples set "
                "rollout='self_forcing' and leave causal unset"
            )
        if self.is_causal and self.frames_per_block is None:
            raise ValueError("a causal student needs frames_per_block, such as 3 latent frames")
        if not self.is_causal and (self.frames_per_block is not None or self.window is not None or self.sink):
            raise ValueError(
                "frames_per_block, window and sink are for causal students: set rollout='self_forcing', or causal"
            )
        if self.stream_num_frames is not None and not forced:
            raise ValueError("stream_num_frames continues the student's own videos: set rollout='self_forcing'")
        if self.prompt_switch and self.stream_num_frames is None:
            raise ValueError(
                "prompt_switch needs stream_num_frames: a prompt is switched between two windows of a stream"
            )
        if not self.is_causal:
            return
        if self.frames_per_block < 1:
            raise ValueError(f"frames_per_block must be at least 1, not {self.frames_per_block}")
        names = ("window", "sink", "stream_overlap") if self.stream_num_frames else ("window", "sink")
        for name in names:
            if (getattr(self, name) or 0) % self.frames_per_block:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of frames_per_block={self.frames_per_block}"
                )
        if self.window is not None and self.window < self.sink + 2 * self.frames_per_block:
            raise ValueError(
                f"window={self.window} must hold the sink, one earlier block and the block itself: at least "
                f"{self.sink + 2 * self.frames_per_block}"
            )
        if self.window is not None and not forced:
            raise ValueError("window and sink are for rollout='self_forcing'; clips are seen whole")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise is a noise level in [0, 1), not {self.context_noise}")
        if self.stream_num_frames is not None and self.stream_overlap < self.frames_per_block:
            raise ValueError(
                f"stream_overlap={self.stream_overlap} must be at least one block: {self.frames_per_block}"
            )

    @property
    def is_causal(self) -> bool:
        """Whether the student samples block by block."""
        return self.rollout == "self_forcing" or self.causal is not None

    @property
    def matches_distributions(self) -> bool:
        """Whether there is a fake score."""
        return self.loss_type in ("dmd", "sid") or self.dmd_weight > 0
