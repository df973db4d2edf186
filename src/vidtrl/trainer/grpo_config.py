"""Arguments of [`VideoGRPOTrainer`]."""

import difflib
from dataclasses import dataclass, field

from .base_config import VideoTrainingConfig
from .grpo_recipes import DEFAULTS, RECIPES


LOSSES = ("clipped", "dppo", "nft", "awm")
SCHEDULES = ("single", "all", "random", "window", "merged", "tree", "branch", "granular", "none")
TRANSITIONS = ("flow-sde", "flow-sde-truncated", "wan-linear", "dance", "cps", "ma-sde", "ddim")
WEIGHTINGS = ("none", "tgr", "longcat", "guard", "tempflow")


def _option(text: str, choices: tuple | None = None):
    """A field that the recipe fills unless it is set."""
    metadata = {"help": f"{text} Default: the recipe's."}
    return field(default=None, metadata=metadata | ({"choices": list(choices)} if choices else {}))


@dataclass
class VideoGRPOConfig(VideoTrainingConfig):
    r"""
    Configuration of [`VideoGRPOTrainer`]: [`VideoTrainingConfig`] plus the arguments below.

    `recipe` names a published method; it fills every field marked "by recipe" that is not set explicitly. A batch counts
    videos: one generation samples `per_device_train_batch_size x steps_per_generation` videos on each process
    (`generation_batch_size` in all), and an optimizer step uses `per_device_train_batch_size x
    gradient_accumulation_steps` of them.

    Args:
        > Parameters that control the method

        recipe (`str`, *optional*, defaults to `"flash-grpo"`):
            `"flash-grpo"` (https://huggingface.co/papers/2604.25427), `"flow-grpo"`, `"flow-grpo-fast"`, `"dance-grpo"`,
            `"mix-grpo"`, `"mix-grpo-flash"`, `"longcat"`, `"cps"`, `"tempflow-grpo"`, `"g2rpo"`, `"e-grpo"`,
            `"branch-grpo"`, `"grpo-guard"`, `"diffusion-nft"`, `"awm"` or `"flow-dppo"`.
        loss_type (`str`, by recipe):
            `"clipped"` ratio, `"dppo"` (divergence bound), `"nft"` (DiffusionNFT) or `"awm"`; the last two train on noised
            final latents and need no stochastic step.
        transition (`str`, by recipe):
            Kernel of a stochastic step: `"wan-linear"`, `"flow-sde"`, `"flow-sde-truncated"`, `"dance"`, `"cps"`,
            `"ma-sde"` or `"ddim"`.
        noise_level (`float`, by recipe):
            The kernel's noise: a of Flow-SDE and CPS, eta of the others. `"wan-linear"` has none.
        sde_schedule (`str`, by recipe):
            Which steps are stochastic: `"single"` (one per prompt, drawn), `"all"`, `"random"` (`sde_steps` drawn),
            `"window"`, `"merged"` (E-GRPO), `"tree"` (BranchGRPO), `"branch"` (TempFlow-GRPO), `"granular"` (G2RPO) or
            `"none"`.
        sde_range (`list[float]`, by recipe):
            Two shares of the schedule between which stochastic steps lie: `[0.0, 0.5]` is the first half.
        sde_steps (`int`, by recipe):
            Number of stochastic steps of `"random"` and `"branch"`, width of the window.
        window_mode (`str`, by recipe):
            `"sliding"`, `"random"` or `"decay"`.
        window_interval (`int`, *optional*, defaults to `25`):
            Generations after which the window moves on.
        merge_threshold (`float`, by recipe):
            Entropy that a merged step must reach.
        tree_splits (`list[int]`, by recipe):
            Steps at which every path splits in two; `num_generations` is two to their number.
        granularities (`list[int]`, by recipe):
            Strides of the tails of `"granular"`; each branch is finished once on each.
        train_fraction (`float`, by recipe):
            Share of each video's stochastic steps that is trained on, drawn at random.
        shared_noise (`bool`, by recipe):
            All videos of a prompt start from one latent; whatever they share is computed once.
        num_latents (`int`, by recipe):
            Seed groups: distinct initial latents per prompt, between one (`shared_noise`) and `num_generations`.
        antithetic (`bool`, *optional*, defaults to `False`):
            Neighbouring branches of one latent draw opposite noise.
        tail_ratio (`float`, by recipe):
            Share of the deterministic steps after the last stochastic one that is kept.
        tail_solver (`str`, by recipe):
            `"euler"` or `"dpm-solver++"` for those steps.

        > Parameters that control generation

        num_generations (`int`, by recipe):
            Videos per prompt, G.
        num_generations_eval (`int`, *optional*, defaults to `1`):
            Videos per prompt in evaluation.
        generation_batch_size (`int`, *optional*):
            Videos of one generation on all processes together, in place of `steps_per_generation`; a multiple of
            `per_device_train_batch_size` x processes.
        steps_per_generation (`int`, *optional*):
            Micro-batches that one generation is cut into; `None` is `gradient_accumulation_steps` (one update each).
        num_iterations (`int`, *optional*, defaults to `1`):
            Passes over each generation.
        num_inference_steps (`int`, by recipe):
            Steps of a rollout.
        eval_num_inference_steps (`int`, *optional*, defaults to `50`):
            Steps of the pipeline's own solver in evaluation.
        guidance_scale (`float`, by recipe):
            Classifier-free guidance, in rollout and update alike; 1 is none.
        embedded_guidance (`float`, *optional*):
            Of models that take guidance as an input (HunyuanVideo), which want `guidance_scale=1`: its value in rollout, update
            and evaluation. `None` is the pipeline's default, so that what is trained is what is sampled.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Of guidance.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Draw prompts in random order.
        rollout_batch_size (`int`, *optional*):
            Latents per denoiser call in rollouts; default `per_device_train_batch_size`.
        batch_guidance (`bool`, *optional*):
            Both branches of guidance in one denoiser call: fewer calls, more memory. `None` chooses before the first rollout:
            on an accelerator one call if a tried update fits into the free memory, on a CPU one call.
        vae_batch_size (`int`, *optional*, defaults to `1`):
            Videos per VAE call when rollouts are decoded.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Compute what videos share once, in rollout and update. Off only for comparison.
        reuse_rollout (`bool`, *optional*):
            Keep the graph of the stochastic steps for the update, which then needs no forward. Needs one update per
            generation (`steps_per_generation=num_iterations=1`) and the memory of one forward per decision. `None` does so
            where it is exact, each video draws noise at one step, and on an accelerator the graphs fit beside decoding.

        > Parameters that control rewards and advantages

        reward_weights (`list[float]`, *optional*):
            One per reward function; default all 1.
        multi_objective_aggregation (`str`, *optional*, defaults to `"normalize_then_sum"`):
            `"normalize_then_sum"` normalises each reward before weighting; `"sum_then_normalize"` after.
        scale_rewards (`str`, by recipe):
            Standard deviation that advantages are divided by: of the `"group"`, the `"batch"`, the largest of all groups
            (`"max_group"`), or `"none"`.
        baseline (`str`, by recipe):
            Videos that are compared: all of the `"prompt"`, or those branched from the same `"latent"`.
        advantage_clip (`float`, by recipe):
            Advantages are clipped to this magnitude.
        reward_timeout (`float`, *optional*):
            Seconds after which a reward call counts as hanging.
        reward_error (`str`, *optional*, defaults to `"raise"`):
            `"raise"`, or `"skip"`: leave the sample out and count it.

        > Parameters that control the objective

        epsilon (`float`, by recipe):
            Clipping range of the ratio; the divergence threshold of `"dppo"`.
        epsilon_high (`float`, *optional*):
            Upper range, if it differs.
        beta (`float`, by recipe):
            Weight of the divergence from the reference (the model without adapter).
        timestep_weighting (`str`, by recipe):
            Weight of each step's loss: `"tgr"` (the paper's rectification), `"longcat"`, `"guard"`, `"tempflow"`, `"none"`.
        ratio_normalization (`bool`, by recipe):
            GRPO-Guard's centred ratio.
        num_train_sigmas (`int`, by recipe):
            Noise levels per video, stratified, for `"nft"` and `"awm"`.
        nft_beta (`float`, by recipe):
            Guidance strength b of DiffusionNFT.
        old_policy_decay (`list[float]`, by recipe):
            `[rate, maximum]`: after generation n the old policy keeps `min(rate n, maximum)` of itself.
        old_policy_beta (`float`, by recipe):
            Weight of the divergence from the old policy (`"awm"`).
        awm_weighting (`str`, by recipe):
            `"uniform"`, `"t"`, `"t2"`, `"huber"` or `"ghuber"`.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Move the reference towards the policy every `ref_model_sync_steps` steps.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy in the new reference.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Steps between two moves.

        > Parameters that control logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Write videos, thumbnails and a Parquet file to `output_dir/completions`, print a table, and log to the trackers,
            every `logging_steps`.
        num_completions_to_print (`int`, *optional*):
            Rows of the table; default all.
        log_unique_prompts (`bool`, *optional*, defaults to `False`):
            One video per prompt.
        log_completions_hub_repo (`str`, *optional*):
            Dataset repository to which completions are pushed.

    > [!NOTE]
    > `learning_rate`, `weight_decay`, `ema_decay` and `ema_update_steps` are filled by the recipe, too.

    Example:

    ```python
    >>> from vidtrl import VideoGRPOConfig

    >>> args = VideoGRPOConfig("wan-grpo", recipe="mix-grpo", sde_steps=2, height=480, width=832, num_frames=81)
    >>> args.sde_steps, args.num_inference_steps
    (2, 25)
    ```
    """

    learning_rate: float | None = _option("The initial learning rate for AdamW.")
    weight_decay: float | None = _option("Weight decay of AdamW.")
    ema_decay: float | None = _option("Decay of the moving average of the trainable weights; 0 keeps none.")
    ema_update_steps: int | None = _option("Optimizer steps between two updates of that average.")

    # Parameters that control the method
    recipe: str = field(
        default="flash-grpo", metadata={"help": "Published method that fills what is unset.", "choices": list(RECIPES)}
    )
    loss_type: str | None = _option("Objective.", LOSSES)
    transition: str | None = _option("Kernel of a stochastic step.", TRANSITIONS)
    noise_level: float | None = _option("Noise of the kernel: a of Flow-SDE and CPS, eta of the others.")
    sde_schedule: str | None = _option("Which steps are stochastic.", SCHEDULES)
    sde_range: list[float] | None = _option("Two shares of the schedule between which stochastic steps lie.")
    sde_steps: int | None = _option("Number of stochastic steps, or width of the window.")
    window_mode: str | None = _option("How the window moves.", ("sliding", "random", "decay"))
    window_interval: int = field(default=25, metadata={"help": "Generations after which the window moves on."})
    merge_threshold: float | None = _option("Entropy that a merged step must reach.")
    tree_splits: list[int] | None = _option("Steps at which every path splits in two.")
    granularities: list[int] | None = _option("Strides of the deterministic tails of `granular`.")
    train_fraction: float | None = _option("Share of each video's stochastic steps to train on.")
    shared_noise: bool | None = _option("All videos of a prompt start from one latent.")
    num_latents: int | None = _option("Distinct initial latents per prompt.")
    antithetic: bool = field(
        default=False, metadata={"help": "Neighbouring branches of one latent draw opposite noise."}
    )
    tail_ratio: float | None = _option("Share of the deterministic steps after the last stochastic one to keep.")
    tail_solver: str | None = _option("Solver of those steps.", ("euler", "dpm-solver++"))

    # Parameters that control generation
    num_generations: int | None = _option("Videos per prompt.")
    num_generations_eval: int = field(default=1, metadata={"help": "Videos per prompt in evaluation."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Videos per generation, on all processes; instead of steps_per_generation."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches per generation. Default: gradient_accumulation_steps."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation."})
    num_inference_steps: int | None = _option("Steps of a rollout.")
    eval_num_inference_steps: int = field(
        default=50, metadata={"help": "Steps of the pipeline's own solver in evaluation."}
    )
    guidance_scale: float | None = _option("Classifier-free guidance in rollout and update; 1 is none.")
    embedded_guidance: float | None = field(
        default=None, metadata={"help": "Guidance of models that take it as an input. Default: the pipeline's own."}
    )
    negative_prompt: str = field(default="", metadata={"help": "Negative prompt of guidance."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Draw prompts in random order."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Latents per denoiser call in rollouts. Default: the training batch size."}
    )
    batch_guidance: bool | None = field(
        default=None,
        metadata={"help": "Both branches of guidance in one denoiser call. Default: where memory allows."},
    )
    vae_batch_size: int = field(default=1, metadata={"help": "Videos per VAE call when rollouts are decoded."})
    share_prefix: bool = field(default=True, metadata={"help": "Compute once what videos of a prompt share."})
    reuse_rollout: bool | None = field(
        default=None,
        metadata={
            "help": "Keep the graph of stochastic steps: the update then needs no forward. Default: where that is exact."
        },
    )

    # Parameters that control rewards and advantages
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight per reward. Default: 1."})
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={
            "help": "Normalise each reward before or after weighting.",
            "choices": ["normalize_then_sum", "sum_then_normalize"],
        },
    )
    scale_rewards: str | None = _option(
        "Standard deviation that scales advantages.", ("group", "batch", "max_group", "none")
    )
    baseline: str | None = _option("Videos that are compared with each other.", ("prompt", "latent"))
    advantage_clip: float | None = _option("Advantages are clipped to this magnitude.")
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a reward call counts as hanging. Default: never."}
    )
    reward_error: str = field(
        default="raise",
        metadata={"help": "A failing reward stops the run or drops the sample.", "choices": ["raise", "skip"]},
    )

    # Parameters that control the objective
    epsilon: float | None = _option("Clipping range of the ratio, or the divergence threshold of `dppo`.")
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper range. Default: epsilon."})
    beta: float | None = _option("Weight of the divergence from the reference.")
    timestep_weighting: str | None = _option("Weight of each step's loss.", WEIGHTINGS)
    ratio_normalization: bool | None = _option("GRPO-Guard's centred ratio.")
    num_train_sigmas: int | None = _option("Noise levels per video for `nft` and `awm`.")
    nft_beta: float | None = _option("Guidance strength of DiffusionNFT.")
    old_policy_decay: list[float] | None = _option("[rate, maximum] of the old policy's decay.")
    old_policy_beta: float | None = _option("Weight of the divergence from the old policy (`awm`).")
    awm_weighting: str | None = _option("Weight over noise levels.", ("uniform", "t", "t2", "huber", "ghuber"))
    sync_ref_model: bool = field(default=False, metadata={"help": "Move the reference towards the policy."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "Share of the policy in a new reference."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two moves of the reference."})

    # Parameters that control logging
    log_completions: bool = field(default=False, metadata={"help": "Write and show generated videos."})
    num_completions_to_print: int | None = field(default=None, metadata={"help": "Rows of the table. Default: all."})
    log_unique_prompts: bool = field(default=False, metadata={"help": "Log one video per prompt."})
    log_completions_hub_repo: str | None = field(
        default=None, metadata={"help": "Dataset repository to which completions are pushed."}
    )

    def __post_init__(self):
        if self.recipe not in RECIPES:
            close = difflib.get_close_matches(str(self.recipe), RECIPES, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"there is no recipe {self.recipe!r}{hint} Valid names: {', '.join(RECIPES)}")
        row = {**DEFAULTS, **RECIPES[self.recipe]}
        if self.num_latents is not None and self.shared_noise is None:
            self.shared_noise = False  # seed groups take the place of one shared latent
        for name, value in row.items():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, list) else value)
        if self.ema_decay == 0:
            self.ema_decay = None
        super().__post_init__()
        if self.generation_batch_size is not None:
            self._use_generation_batch_size()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        self._validate()

    def _use_generation_batch_size(self):
        micro_step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size < 1 or self.generation_batch_size % micro_step:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} must be a multiple of {micro_step} videos "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} x {self.world_size} processes)"
            )
        steps = self.generation_batch_size // micro_step
        if self.steps_per_generation not in (None, steps):
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} is {steps} micro-steps, and steps_per_generation="
                f"{self.steps_per_generation} says otherwise: set one of them"
            )
        self.steps_per_generation = steps

    def _validate(self):
        choices = {
            "loss_type": LOSSES, "transition": TRANSITIONS, "sde_schedule": SCHEDULES, "timestep_weighting": WEIGHTINGS,
            "scale_rewards": ("group", "batch", "max_group", "none"), "baseline": ("prompt", "latent"),
            "tail_solver": ("euler", "dpm-solver++"), "reward_error": ("raise", "skip"),
            "window_mode": (None, "sliding", "random", "decay"),
            "multi_objective_aggregation": ("normalize_then_sum", "sum_then_normalize"),
            "awm_weighting": ("uniform", "t", "t2", "huber", "ghuber"),
        }  # fmt: skip
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                names = ", ".join(repr(v) for v in valid if v is not None)
                raise ValueError(f"{name} must be one of {names}, not {getattr(self, name)!r}")
        for name in (
            "num_inference_steps", "num_generations_eval", "steps_per_generation", "num_iterations", "sde_steps",
            "eval_num_inference_steps", "vae_batch_size", "num_train_sigmas", "window_interval", "ema_update_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.guidance_scale == 1 and self.guidance_scale_2 not in (None, 1):
            raise ValueError(
                f"guidance_scale=1 turns guidance off in the pipeline, guidance_scale_2={self.guidance_scale_2} included: set "
                "guidance_scale above 1, or leave guidance_scale_2 out"
            )
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, not {self.num_generations}: a video is judged against the others of "
                "its prompt"
            )
        forward = self.loss_type in ("nft", "awm")
        needs = {
            "window": "window_mode",
            "merged": "merge_threshold",
            "tree": "tree_splits",
            "granular": "granularities",
        }
        missing = needs.get(self.sde_schedule)
        if missing and getattr(self, missing) is None:
            raise ValueError(f"sde_schedule={self.sde_schedule!r} needs {missing}; set it, or take a recipe that does")
        if not forward and self.sde_schedule == "none":
            raise ValueError(
                f"loss_type={self.loss_type!r} needs stochastic steps: set sde_schedule, such as 'single'"
            )
        if forward and self.sde_schedule != "none":
            raise ValueError(f"loss_type={self.loss_type!r} samples deterministically: leave sde_schedule at 'none'")
        if self.sde_schedule == "tree" and self.num_generations != 2 ** len(self.tree_splits):
            raise ValueError(
                f"a tree with {len(self.tree_splits)} splits has {2 ** len(self.tree_splits)} leaves; set num_generations "
                f"to that (it is {self.num_generations}) or change tree_splits"
            )
        if self.sde_schedule == "granular" and self.num_generations % len(self.granularities):
            raise ValueError(
                f"num_generations={self.num_generations} must be a multiple of the {len(self.granularities)} granularities"
            )
        if self.num_latents is not None and self.shared_noise and self.num_latents != 1:
            raise ValueError("num_latents and shared_noise=True contradict each other; set one of them")
        if self.num_latents is not None and self.num_generations % self.num_latents:
            raise ValueError(f"num_latents={self.num_latents} must divide num_generations={self.num_generations}")
        if self.sde_schedule == "branch" and self.num_generations % (self.sde_steps * self.latents_per_prompt):
            raise ValueError(
                f"num_generations={self.num_generations} must be a multiple of sde_steps x num_latents = "
                f"{self.sde_steps} x {self.latents_per_prompt}"
            )
        if self.antithetic and (forward or self.latents_per_prompt * 2 > self.num_generations):
            raise ValueError("antithetic pairs share a latent: set shared_noise=True or a smaller num_latents")
        if self.baseline == "latent" and self.latents_per_prompt == self.num_generations:
            raise ValueError("baseline='latent' compares videos of one latent: set shared_noise=True or num_latents")
        if len(self.sde_range) != 2 or not 0 <= self.sde_range[0] < self.sde_range[1] <= 1:
            raise ValueError(
                f"sde_range must be two increasing shares of the schedule, such as 0.0 0.5, not {self.sde_range}"
            )
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction must lie in (0, 1], not {self.train_fraction}")
        if self.sync_ref_model and self.beta == 0:
            raise ValueError("sync_ref_model moves a reference that beta=0 never uses: set beta > 0 or leave it out")
        if not 0 < self.ref_model_mixup_alpha <= 1 or self.ref_model_sync_steps < 1:
            raise ValueError(
                f"ref_model_mixup_alpha must lie in (0, 1] and ref_model_sync_steps must be at least 1, not "
                f"{self.ref_model_mixup_alpha} and {self.ref_model_sync_steps}"
            )
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: an optimizer step ends within its generation"
            )
        total = self.per_device_train_batch_size * self.steps_per_generation * self.world_size
        if total % self.num_generations:
            raise ValueError(
                f"a generation of {total} videos (per_device_train_batch_size={self.per_device_train_batch_size} x "
                f"steps_per_generation={self.steps_per_generation} x {self.world_size} processes) is not a multiple of "
                f"num_generations={self.num_generations}"
            )
        if self.reuse_rollout and (forward or self.steps_per_generation != 1 or self.num_iterations != 1):
            raise ValueError(
                "reuse_rollout needs a method with stochastic steps and one update per generation: set "
                "steps_per_generation=1 and num_iterations=1 (raise per_device_train_batch_size instead)"
            )

    @property
    def latents_per_prompt(self) -> int:
        """Distinct initial latents of a group."""
        if self.num_latents is not None:
            return self.num_latents
        return 1 if self.shared_noise else self.num_generations

    @property
    def num_prompts(self) -> int:
        """Prompts per generation, over all processes."""
        videos = self.per_device_train_batch_size * self.steps_per_generation * self.world_size
        return videos // self.num_generations
