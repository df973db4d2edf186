"""Arguments that every vidtrl trainer shares: the model, the shape of its videos, validation, and safe defaults."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available


@dataclass
class VideoTrainingConfig(TrainingArguments):
    r"""
    Base of all vidtrl configurations: [`~transformers.TrainingArguments`] plus the arguments below.

    Args:
        > Parameters that control the model

        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for `DiffusionPipeline.from_pretrained` when `model` is an id or a path, such as
            `{"revision": "...", "dtype": "bfloat16"}`. Without `dtype`, a LoRA run with `bf16=True` loads
            the frozen weights in bfloat16 and everything else loads in float32.
        experts (`str`, *optional*):
            For models with two denoisers (Wan 2.2 A14B): which to train, `"both"` (the default), `"high"` (the noisy half)
            or `"low"`. With one, sigma is drawn from its range only. `None` for every other model.
        offload_experts (`bool`, *optional*, defaults to `True`):
            Of two experts, keep only the one in use on the device; the frozen weights of the other wait on the CPU. Set it to
            `False` where both fit: a swap moves an expert's weights out and the other's in.
        guidance_scale_2 (`float`, *optional*):
            Guidance scale of the low-noise expert of a two-expert model, in rollouts, evaluation and validation videos.
            `None`: that of the other one, as in the pipeline.
        base_adapters (`list[str]`, *optional*):
            LoRA adapters (directories or Hub ids) of earlier stages. They stay frozen under the adapter that is trained,
            in the policy and in its reference alike; nothing is merged. Needs `peft_config`.
        check_model (`bool`, *optional*, defaults to `True`):
            Prove at start-up that this checkpoint is read correctly (see [`check_model`]); a failure stops the run.
        compile_repeated_blocks (`bool`, *optional*, defaults to `False`):
            `torch.compile` each repeated block of the denoiser: compiled once, used for every block.
        pipeline_kwargs (`dict` or `str`, *optional*):
            Further arguments of the pipeline's `__call__`, used for conditioning and for validation videos.

        > Parameters that control the shape of the videos

        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        num_frames (`int`, *optional*):
            Number of frames, by the model's own rule (Wan: 4k + 1).
        fps (`float`, *optional*):
            Frames per second to which clips are resampled, and at which validation videos are written.
        max_sequence_length (`int`, *optional*):
            Number of text tokens; `None` is the pipeline's default.

        > Parameters that control training

        ema_decay (`float`, *optional*):
            Keep an exponential moving average of the trainable weights with this decay, such as `0.999`. The average
            is what evaluation and validation videos measure, what checkpoints hand to diffusers, and what the trainer
            holds after `train()`. `None` keeps no average.
        ema_update_steps (`int`, *optional*, defaults to `1`):
            Optimizer steps (of a distillation: the student's) between two updates of that average.
        on_nan (`str`, *optional*, defaults to `"raise"`):
            What a NaN or infinite loss does: `"raise"` stops the run and names step and samples, `"skip"` drops the
            micro-batch, leaves it out of the logged loss and counts it in the metric `num_skipped_batches`. With FSDP all
            processes drop theirs together.

        > Parameters that control validation videos

        validation_steps (`int`, *optional*):
            Generate validation videos every so many steps, and once before training; `None` generates none.
        validation_prompts (`list[str]`, *optional*):
            What to generate; `None` takes the first distinct prompts of the evaluation (or training) dataset.
        num_validation_videos (`int`, *optional*, defaults to `4`):
            How many prompts to take when `validation_prompts` is `None`.
        validation_num_inference_steps (`int`, *optional*):
            Denoising steps; `None` is the pipeline's default.
        validation_guidance_scale (`float`, *optional*):
            Guidance scale; `None` is the pipeline's default.
        validation_seed (`int`, *optional*, defaults to `0`):
            Seed of the first video; the i-th uses `validation_seed + i`, the same at every validation.

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]: `learning_rate=1e-4`, `logging_steps=10`,
    > `gradient_checkpointing=True`, `bf16=None` (on where the accelerator supports it), `remove_unused_columns=False`,
    > `logging_nan_inf_filter=False`, `dataloader_pin_memory=None` (on where there is an accelerator).

    Example:

    ```python
    >>> from vidtrl.trainer import VideoTrainingConfig

    >>> VideoTrainingConfig("run", pipeline_kwargs='{"max_sequence_length": 64}').pipeline_kwargs
    {'max_sequence_length': 64}
    ```
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs", "pipeline_kwargs"]

    # Defaults that differ from TrainingArguments
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every X update steps; below 1, a share of all steps."}
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute activations in the backward pass: less memory, about 20%% slower."},
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "The name transformers is moving `gradient_checkpointing` to; wins if set."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast. Default: on where the accelerator supports it, off on a CPU."},
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay off: columns feed the trainer, not the denoiser's forward."}
    )
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Page-locked batches. Default: on where there is an accelerator."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a NaN or infinite loss is handled by `on_nan`, never hidden."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `DiffusionPipeline.from_pretrained`, also as JSON."}
    )
    experts: str | None = field(
        default=None,
        metadata={
            "help": "Which denoisers of a two-expert model to train. Default: both.",
            "choices": ["both", "high", "low"],
        },
    )
    offload_experts: bool = field(
        default=True, metadata={"help": "Of two experts, keep only the one in use on the device."}
    )
    guidance_scale_2: float | None = field(
        default=None, metadata={"help": "Guidance scale of the low-noise expert. Default: that of the other one."}
    )
    base_adapters: list[str] | None = field(
        default=None, metadata={"help": "LoRA adapters of earlier stages, frozen under the one that is trained."}
    )
    check_model: bool = field(
        default=True, metadata={"help": "Prove at start-up that this checkpoint is read correctly."}
    )
    compile_repeated_blocks: bool = field(
        default=False, metadata={"help": "torch.compile the repeated blocks of the denoiser."}
    )
    pipeline_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's `__call__`, also as JSON."}
    )

    # Parameters that control the shape of the videos
    height: int | None = field(default=None, metadata={"help": "Height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels."})
    num_frames: int | None = field(
        default=None, metadata={"help": "Number of frames, by the model's own rule (Wan: 4k + 1)."}
    )
    fps: float | None = field(
        default=None, metadata={"help": "Frames per second to which clips are resampled and videos are written."}
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Number of text tokens. Default: the pipeline's own."}
    )

    # Parameters that control training
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of the moving average of the trainable weights, such as 0.999."}
    )
    ema_update_steps: int = field(default=1, metadata={"help": "Optimizer steps between two updates of that average."})
    on_nan: str = field(
        default="raise",
        metadata={"help": "A NaN or infinite loss stops the run or drops the batch.", "choices": ["raise", "skip"]},
    )

    # Parameters that control validation videos
    validation_steps: int | None = field(
        default=None, metadata={"help": "Generate validation videos every so many steps. Default: never."}
    )
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the validation videos. Default: the first of the dataset."}
    )
    num_validation_videos: int = field(
        default=4, metadata={"help": "How many prompts to take when `validation_prompts` is not given."}
    )
    validation_num_inference_steps: int | None = field(
        default=None, metadata={"help": "Denoising steps of a validation video. Default: the pipeline's own."}
    )
    validation_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of a validation video. Default: the pipeline's own."}
    )
    validation_seed: int = field(default=0, metadata={"help": "Seed of the first validation video."})

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, for files and trackers: a token is in none, that of `model_init_kwargs` included."""
        fields = super().to_dict()
        if isinstance(fields["model_init_kwargs"], dict) and "token" in fields["model_init_kwargs"]:
            fields["model_init_kwargs"] = {**fields["model_init_kwargs"], "token": "<TOKEN>"}
        return fields

    def __post_init__(self):
        for name in ("model_init_kwargs", "pipeline_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f'{name} is not JSON such as {{"key": 1}}: {value!r} ({error})') from error
                setattr(self, name, value)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f'{name} must be a dict, or JSON such as {{"key": 1}}, not {value!r}')
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and not self.fp16 and is_torch_bf16_gpu_available()
        if self.dataloader_pin_memory is None:  # without an accelerator the loader would warn
            self.dataloader_pin_memory = not self.use_cpu and torch.accelerator.is_available()
        # transformers 5.2x renames the first to the second and warns when only the first is set
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        self.gradient_checkpointing = self.activation_checkpointing

        if self.on_nan not in ("raise", "skip"):
            raise ValueError(f"on_nan must be 'raise' or 'skip', not {self.on_nan!r}")
        if self.experts not in (None, "both", "high", "low"):
            raise ValueError(f"experts must be 'both', 'high' or 'low' (or unset), not {self.experts!r}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, such as 0.999, not {self.ema_decay}")
        if self.ema_update_steps < 1:
            raise ValueError(f"ema_update_steps must be at least 1, not {self.ema_update_steps}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: no dataset column is an argument of the denoiser")
        if self.validation_steps is not None and self.validation_steps < 1:
            raise ValueError(f"validation_steps must be at least 1, not {self.validation_steps}")
        for name in ("height", "width", "num_frames", "fps", "max_sequence_length"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        unsupported = sorted(set(self.report_to) - {"trackio", "wandb", "tensorboard", "kubeflow"})
        if unsupported:
            raise ValueError(
                f"report_to={unsupported} cannot log a diffusers model; use trackio, wandb or tensorboard, "
                "or pass your own callback"
            )
