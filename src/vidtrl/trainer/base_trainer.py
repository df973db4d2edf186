"""What every vidtrl trainer shares: a diffusers pipeline under `transformers.Trainer`.

All overrides of private `Trainer` hooks live in this file, each with the reason for it. An algorithm is a subclass
that overrides [`VideoTrainer.prepare_datasets`] and `compute_loss`.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from ..hub.pushing import Pusher, push_checkpoint
from ..hub.trainer_card import write_card
from ..hub.upload import check_private
from ..models import VideoModel, check_model
from .base_config import VideoTrainingConfig
from .callbacks import EMACallback, exported_states, use_video_callbacks
from .checkpoint import (
    check_output_dir,
    claim_output_dir,
    load_average,
    load_roles,
    model_identity,
    publish,
    save_average,
    save_denoiser,
    save_roles,
    verify_checkpoint,
    write_manifest,
)
from .ema import WeightAverage
from .experts import Experts, ExpertSwap, by_expert
from .loading import condition_kwargs, fill_shape, load_model
from .lora import (
    ADAPTER_FILE,
    EXPERT_FILES,
    adapter_summary,
    load_adapter,
    load_base_adapters,
    save_adapter,
)
from .policies import adapters_below, check_arguments, make_policies, place, set_up_forward, trained_denoisers
from .sampling import pipeline_call, sample_videos
from .sharding import (
    EqualCalls,
    Models,
    check_optimizer,
    check_sharded,
    exchange_each_micro_batch,
    gathered,
    load_whole_weights,
    local,
    prepare_fsdp,
    release,
    set_up_ddp,
    shard_apart,
    shard_on_cpu,
    whole,
    whole_weights,
)


logger = logging.get_logger(__name__)


class VideoTrainer(Trainer):
    """
    Base of all vidtrl trainers. Not used by itself.

    The pipeline is `self.video_model.pipe`; `self.model` is its denoiser, wrapped by PEFT when an adapter is trained (of a
    two-expert model [`Experts`], which holds both).
    PEFT injects in place, so the pipeline always samples with the present training weights and nothing is copied.

    Args:
        model (`str`, `PathLike` or `DiffusionPipeline`): Hub id, local path, or a loaded pipeline.
        args ([`VideoTrainingConfig`], *optional*): Default: `output_dir` is named after model and method.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`, *optional*): `eval_dataset` may be a dict of them.
        callbacks (`list[TrainerCallback]`, *optional*): Added to the default ones.
        optimizers (`tuple`, *optional*): Optimizer and scheduler.
        quantization_config (*optional*): A diffusers quantisation configuration, used while loading `model`.
        peft_config (`LoraConfig`, *optional*): Train an adapter; `None` trains all weights of the denoiser.

    Raises:
        `TypeError`, `ValueError`: For arguments that do not fit, with the fix in the message.
    """

    _name = "Video"
    _tag_names = ["vidtrl"]
    _role = "policy"  # what is trained, in `self.policies`
    kept_encoders: tuple[str, ...] = ()  # components that training needs although everything is cached
    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean over its batch

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        args: VideoTrainingConfig,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
        data_collator=None,
    ):
        check_arguments(args, model, train_dataset, eval_dataset, peft_config)
        self.args = args
        set_seed(args.seed)  # before PEFT, which draws the initial adapter
        self.video_model = self._load_model(model, quantization_config, peft_config)
        pipe, denoisers = self.video_model.pipe, self.video_model.denoisers
        self.denoiser_names, self.sigma_range = trained_denoisers(args, self.video_model)
        self.denoiser_name = self.denoiser_names[0]
        each = {name: denoisers[name] for name in self.denoiser_names}
        self.swap = ExpertSwap(denoisers, args.device, args.offload_experts)
        self.base_adapters = load_base_adapters(pipe, self.denoiser_names, args.base_adapters or [])
        below = adapters_below(list(each.values()), adapter=peft_config is not None)
        self.model_identity = model_identity(type(pipe).__name__, str(pipe.name_or_path or ""), each)
        check_output_dir(args.output_dir, self.model_identity)
        self._place()
        if args.check_model:
            check_model(self.video_model, **condition_kwargs(args)).raise_if_failed()

        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False)
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset)
        self.swap.use(self.denoiser_name)  # an expert that is not trained is only needed for sampling
        set_seed(args.seed)  # whatever the preparation drew, the adapter starts the same
        # DDP wants all that it wraps on the device, until the first step
        alone = self.swap.enabled and args.world_size == 1
        trained, self.policies = make_policies(each, peft_config, self._role, below, placed=alone)
        self.swap.keep(self.policies.parameters(self._role).values())
        if not alone and len(each) > 1:
            self.swap.use_all()
        set_up_forward(list(each.values()), args, self.forward_states())
        set_up_ddp(args, len(each))
        self._equal_calls: EqualCalls | None = None  # of a sharded model
        self._apart: Models | None = None  # what is sharded, where that is several models
        super().__init__(
            trained,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_sharded:
            check_sharded(args, len(each), "FSDP" if self.is_fsdp_enabled else "DeepSpeed")
        self.num_skipped_batches = 0
        self._skipped_since_log = 0.0  # in optimizer steps
        self._last_log: tuple[float, int] | None = None
        self.roles: dict[str, WeightAverage] = {}  # further policies on the same base, saved with every checkpoint
        self.average = WeightAverage(self.model, args.ema_decay) if args.ema_decay is not None else None
        if self.average is not None:
            self.add_callback(EMACallback(self.average, self.updates))
        use_video_callbacks(self)

    # ---- Sharded weights ----

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients or optimizer states are sharded: by FSDP or by DeepSpeed."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_accelerator_and_postprocess(self) -> None:
        exchange_each_micro_batch(self.args)
        super().create_accelerator_and_postprocess()
        if self.args.use_cpu:
            shard_on_cpu(self.accelerator)
            self.is_fsdp_enabled = self.accelerator.distributed_type == DistributedType.FSDP
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, self.video_model.denoisers[self.denoiser_name])

    def _prepare_for_training(self, *args, **kwargs):
        if self._apart is None and self.models_apart():
            shard_apart(self.accelerator, self.models_apart())
            self._apart = Models(self.models_apart())
        with self._as_prepared(), self._as_model(self._apart):  # accelerate shards one module
            prepared = super()._prepare_for_training(*args, **kwargs)
        self._find_shards()
        if self.is_sharded and self._equal_calls is None:
            self._equal_calls = EqualCalls(self.model, self.accelerator)
        return prepared

    def _as_prepared(self) -> contextlib.AbstractContextManager:
        # DeepSpeed takes what requires gradients now for what is trained, and for what a checkpoint holds
        return self.policies.training() if self.is_deepspeed_enabled else contextlib.nullcontext()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_prepared(), self._as_model(self._trained_apart()):
            super()._save_optimizer_and_scheduler(output_dir)

    def models_apart(self) -> dict[str, nn.Module]:
        """With FSDP, the model and those beside it that are sharded like it; empty if there are none beside it."""
        return {}

    def _trained_apart(self) -> Models | None:
        trained = {name: m for name, m in self.models_apart().items() if self.policies.parameters(name)}
        return Models(trained) if trained else None

    @contextlib.contextmanager
    def _as_model(self, models: Models | None) -> Iterator[None]:
        """Inside, the Trainer's model is all of these."""
        if models is None:
            yield
            return
        own, self.model, self.model_wrapped = self.model, models, models
        try:
            yield
        finally:
            self.model = self.model_wrapped = own

    def _find_shards(self) -> None:
        # FSDP puts shards in the place of the weights; roles and averages would go on with those that are gone
        self.policies.refresh()
        for average in [*self.roles.values(), *([] if self.average is None else [self.average])]:
            average.refresh(self.deepspeed)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """
        One of several backward passes of a micro-batch.

        With DeepSpeed, `accelerator.backward` alone would take an optimizer step after each of them, and divide the loss by
        the number of micro-batches, which [`~VideoTrainer.training_step`] has done.

        Args:
            loss (`torch.Tensor`): A scalar.
            last (`bool`, *optional*, defaults to `True`): Whether it is the last one of the micro-batch.
        """
        if not self.is_deepspeed_enabled:
            self.accelerator.backward(loss)
            return
        boundary = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = boundary and last
        self.accelerator.backward(loss, scale_wrt_gas=False)
        self.accelerator.sync_gradients = boundary

    def equal_calls(self) -> contextlib.AbstractContextManager:
        """Inside, processes may call a sharded model a different number of times; see [`EqualCalls`]."""
        return contextlib.nullcontext() if self._equal_calls is None else self._equal_calls

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """As [`~transformers.Trainer.compute_loss_context_manager`]; accelerate gives a sharded model no autocast itself."""
        stack = super().compute_loss_context_manager()
        if self.is_fsdp_enabled:
            stack.enter_context(self.accelerator.autocast())
        return stack

    # ---- The model and its data ----

    def _load_model(self, model, quantization_config, peft_config) -> VideoModel:
        return load_model(model, self.args, quantization_config, adapter=peft_config is not None)

    def fill_shape(self) -> None:
        """
        Take the pipeline's own size for what is not set of height, width and num_frames.

        Raises:
            `ValueError`: If it has none.
        """
        fill_shape(self.args, self.video_model)

    def prepare_datasets(self, train_dataset, eval_dataset) -> tuple[Any, Any]:
        """Turn the user's datasets into what `compute_loss` needs. Called once, before the adapter is injected."""
        return train_dataset, eval_dataset

    def forward_states(self) -> list:
        """What a forward pass depends on besides its arguments, for gradient checkpointing; see [`checkpoint_under`]."""
        return [self.policies]

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline with the weights in training. Text encoder and VAE are loaded again if they left memory."""
        self.video_model.restore_encoders()
        self._place(sharded=self.is_fsdp_enabled)
        return self.video_model.pipe

    def _place(self, sharded: bool = False) -> None:
        """All of the pipeline to the device, but for the expert that is not in use and for what is sharded."""
        place(self.video_model, self.args.device, self.swap, self.denoiser_name, sharded)

    def by_expert(self, model: nn.Module) -> dict[str, Any]:
        """What `VideoModel.velocity` takes as `denoiser`, for the model that the `Trainer` holds."""
        return by_expert(model, self.denoiser_names)

    def updates(self, step: int) -> int:
        """How many of a run's first `step` optimizer steps change the weights that `ema_decay` averages."""
        return step

    def averaged_weights(self) -> contextlib.AbstractContextManager:
        """The model holds the weight average inside this context, if there is one and training is under way."""
        if self.average is None or not self.is_in_train:
            return contextlib.nullcontext()
        return self.average.swapped_in()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[DiffusionPipeline]:
        """The stock pipeline, ready to sample the (averaged) training weights; leaves no trace in the training."""
        offloaded = self.video_model.offloaded
        training = self.model.training
        pipe, denoiser = self.pipe, self.video_model.denoisers[self.denoiser_name]
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), self.averaged_weights(), torch.random.fork_rng(devices):
            self.model.eval()
            if self.is_sharded:
                # the sharded root must be called itself; it forwards `.config`, `.dtype` and `.cache_context`
                setattr(pipe, self.denoiser_name, self.model)
            try:
                with self.equal_calls():
                    yield pipe
            finally:
                if self.is_sharded:
                    setattr(pipe, self.denoiser_name, denoiser)
                self.model.train(training)
                if offloaded:
                    self.video_model.offload_encoders(self.kept_encoders)

    # ---- Validation videos ----

    def validation_prompts(self) -> list[str]:
        """The prompts of the validation videos; a subclass may take them from its dataset."""
        if not self.args.validation_prompts:
            raise ValueError("validation_steps is set but there is nothing to generate: set validation_prompts")
        return self.args.validation_prompts

    def validation_shape(self) -> tuple[int, int, int]:
        """(height, width, num_frames) of the validation videos."""
        args = self.args
        if args.height is None or args.width is None or args.num_frames is None:
            raise ValueError("validation videos need a size: set height, width and num_frames")
        return args.height, args.width, args.num_frames

    def validation_image(self, index: int) -> Any:
        """The image condition of the i-th validation video; `None` for text-to-video models."""
        return None

    def validation_fps(self) -> float:
        """Frame rate at which validation videos are written."""
        return self.args.fps or 16

    def generate_videos(
        self,
        prompts: list[str],
        seeds: list[int],
        images: list | None = None,
        batch_size: int = 1,
        **overrides: Any,
    ) -> list[Tensor]:
        """
        Sample the weights in training with the stock pipeline, one video per prompt.

        Args:
            prompts (`list[str]`): What to generate.
            seeds (`list[int]`): One seed per prompt.
            images (`list`, *optional*): One image per prompt, for image-to-video models.
            batch_size (`int`, *optional*, defaults to `1`): Videos per pipeline call.
            **overrides: Arguments of the pipeline, in place of those that validation videos use.

        Returns:
            `list[torch.Tensor]`: float32 tensors (F, C, H, W) in [0, 1] on the CPU.
        """
        call = {**pipeline_call(self.args, self.video_model, self.validation_shape()), **overrides}
        with self.sampling() as pipe:
            return sample_videos(pipe, prompts, seeds, images, batch_size, **call)

    def end(self) -> None:
        super().end()
        if self.args.world_size > 1:
            # gloo's loop thread needs the interpreter's lock to drop its last work, and the process group's destructor
            # waits for that thread while it holds the lock (a deadlock at exit, torch 2.13): let the thread go first
            time.sleep(0.5)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train. See [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint directory, or `True` for the last complete one in `output_dir`. The run continues bit
                for bit; the checkpoint must be whole and belong to this model and adapter.

        Raises:
            `ValueError`: If the checkpoint is damaged or belongs to another run; says what differs.
        """
        args = self.args
        if args.should_save:
            claim_output_dir(args.output_dir, self.model_identity)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no checkpoint to resume from in {args.output_dir!r}")
        if resume_from_checkpoint:
            verify_checkpoint(resume_from_checkpoint, **self._identity())
            now = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None
            check_optimizer(resume_from_checkpoint, now)
        self._last_log = None
        # The Trainer would call a method that diffusers models do not have; `__init__` has switched it on already.
        checkpointing = args.gradient_checkpointing, args.activation_checkpointing
        args.gradient_checkpointing = args.activation_checkpointing = False
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            args.gradient_checkpointing, args.activation_checkpointing = checkpointing
        if self.average is not None:
            self.average.copy_to_module()  # what was validated is what the trainer now holds, samples and saves
        return output

    def train_sampler(self, dataset: Any) -> Sampler:
        """The order of the training samples; a subclass returns a sampler with `set_epoch`."""
        raise TypeError(f"{type(self).__name__} must override train_sampler")

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        # The Trainer's own draws the order from the global generator and knows no buckets
        self._train_sampler = self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)
        return self._train_sampler

    def _run_epoch(self, *args, epoch: int, **kwargs):
        # accelerate does not reach the sampler of a resumed and sharded loader, which would repeat the first epoch
        self._train_sampler.set_epoch(epoch)
        if self._last_log is None:
            self._last_log = time.monotonic(), self.state.global_step
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def finite_or_skip(self, loss: Tensor, sample_ids: list[str], share: float = 1.0) -> Tensor:
        """
        Return a finite loss unchanged. Of a NaN or infinite one: stop, or give the micro-batch no gradient.

        Args:
            loss (`torch.Tensor`): A scalar.
            sample_ids (`list[str]`): What it was computed on, for the message.
            share (`float`, *optional*, defaults to `1.0`): Of a call of `training_step`, that this loss stands for.

        Raises:
            `ValueError`: With `on_nan="raise"`; names step and samples.
        """
        finite = mine = bool(torch.isfinite(loss))
        if self.is_fsdp_enabled and self.args.on_nan == "skip":  # a backward pass waits for the others
            number = torch.tensor(int(mine), device=self.args.device)
            finite = int(self.accelerator.reduce(number, reduction="sum")) == self.args.world_size
        if finite:
            return loss
        loss_is = f"the loss is {loss.item()}" if not mine else "the loss of another process is not finite"
        what = f"{loss_is} at step {self.state.global_step + 1}, samples {', '.join(sample_ids)}"
        if self.args.on_nan == "raise":
            raise ValueError(
                f"{what}. Look at these samples, lower learning_rate, or set on_nan='skip' to leave such batches out"
            )
        logger.warning(f"{what}: skipped")
        self.num_skipped_batches += 1
        self._skipped_since_log += share / self.args.gradient_accumulation_steps
        # connected to every trainable weight, so that all processes still reduce the same gradients
        # (of the expert that was called: DDP has noted that the other one has no part in this)
        release(self.model)
        called = getattr(self._unwrapped(), self._unwrapped().last) if len(self.denoiser_names) > 1 else self.model
        trained = [p for p in called.parameters() if p.requires_grad]
        trained = trained or list(self.policies.parameters(self.policies.current).values())
        return sum((local(p) * 0).sum() for p in trained)

    def _clip_grad_norm(self, model: nn.Module):
        # A finite loss can have a NaN gradient, which would poison the weights and the next checkpoint. And the Trainer's own
        # knows one set of weights, all inside the model
        groups = self.clip_groups()
        if groups is None:
            norm = super()._clip_grad_norm(model)
        else:
            # the norm of weights without gradients would be a number on the CPU
            groups = [group for group in groups if any(p.grad is not None for p in group)]
            most = self.args.max_grad_norm or math.inf
            norms = [nn.utils.clip_grad_norm_(group, most) for group in groups]
            norm = torch.stack([whole(norm) for norm in norms]).norm()
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        if self.args.fp16 or norm is None or torch.isfinite(torch.as_tensor(norm)):
            return norm  # float16 overflows now and then: its gradient scaler skips such steps
        what = f"the gradient is {float(norm)} at step {self.state.global_step + 1}, though the loss is finite"
        if self.args.on_nan == "raise":
            raise ValueError(f"{what}. Lower learning_rate, or set on_nan='skip' to leave such steps out")
        logger.warning(f"{what}: skipped")
        self.num_skipped_batches += self.is_world_process_zero()  # the same step on every process
        self.optimizer.zero_grad()
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        # The Trainer's own knows one set of weights; of DeepSpeed it would be that of the step before
        if grad_norm is None and self.clip_groups() is not None:
            grad_norm = self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm)

    def clip_groups(self) -> list[list[nn.Parameter]] | None:
        """Sets of weights whose gradient norms are clipped each for itself; `None` for all weights of the model together."""
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            (then, step), self._last_log = self._last_log, (time.monotonic(), self.state.global_step)
            steps = self.state.global_step - step
            clips = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["clips_per_second"] = steps * clips / (self._last_log[0] - then)
            counts = torch.tensor([self._skipped_since_log, self.num_skipped_batches], device=self.args.device)
            skipped, total = self.accelerator.reduce(counts, reduction="sum").tolist()
            skipped, self._skipped_since_log = skipped / self.args.world_size, 0.0
            if total:
                logs["num_skipped_batches"] = round(total)
            if skipped > steps - 1e-3:
                del logs["loss"]  # there is none
            elif skipped:
                logs["loss"] *= steps / (steps - skipped)  # the mean of those that counted
        super().log(logs, start_time)

    # ---- Files in the layout of diffusers, complete or absent ----

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _trained_denoisers(self) -> dict[str, nn.Module]:
        model = self._unwrapped()
        return dict(model.named_children()) if isinstance(model, Experts) else {self.denoiser_name: model}

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, not all weights."""
        return isinstance(self._trained_denoisers()[self.denoiser_name], PeftModel)

    def _adapter_file(self, name: str) -> str:
        return EXPERT_FILES[name] if len(self.denoiser_names) > 1 else ADAPTER_FILE

    def _adapter_summary(self) -> dict | None:
        return adapter_summary(self._trained_denoisers()[self.denoiser_name]) if self.has_adapter else None

    def data_summary(self) -> dict | None:
        """What two runs' training data must share for one to resume the other, as JSON; `None` compares nothing."""
        return None

    def _identity(self) -> dict:
        return {"model": self.model_identity, "adapter": self._adapter_summary(), "data": self.data_summary()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]; after training, `output_dir` gets its model card as well."""
        if self.is_fsdp_enabled:
            # the Trainer's own gathers the frozen weights of an adapter's base as well
            with self.averaged_weights():
                weights = whole_weights(self.model, trained_only=self.has_adapter)
            self._save(output_dir, state_dict=weights)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            # DeepSpeed's weights are gathered before `_save`
            with self.averaged_weights() if self.is_deepspeed_enabled else contextlib.nullcontext():
                super().save_model(output_dir, _internal_call)
        here = output_dir is None or os.path.abspath(output_dir) == os.path.abspath(self.args.output_dir)
        if here and not _internal_call and self.state.global_step > 0:
            self.create_model_card()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer's own writes files under names that diffusers does not load, and pickles the arguments
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        two_experts = len(self.video_model.denoisers) > 1
        with self.averaged_weights() if state_dict is None else contextlib.nullcontext():
            for name, model in self._trained_denoisers().items():
                if isinstance(model, PeftModel):
                    owner = name if two_experts else None
                    save_adapter(model, directory, state_dict, file=self._adapter_file(name), denoiser=owner)
                else:
                    save_denoiser(model, directory / name, state_dict)
        (directory / "training_args.json").write_text(self.args.to_json_string())
        self.save_extras(directory)

    def save_extras(self, directory: Path) -> None:
        """Called on the process that saves, for what else belongs beside the weights."""

    def save_rank_state(self, directory: Path) -> None:
        """Called on every process while a checkpoint is written, for what each of them has to find again."""

    def load_rank_state(self, directory: Path) -> None:
        """Called on every process when a run resumes."""

    def role_weights(self) -> dict[str, Tensor]:
        """Weights of further policies, by name: saved with every checkpoint and filled in place when a run resumes."""
        averages = dict(self.roles)
        if self.is_sharded and self.average is not None:
            averages["average"] = self.average  # without shards it is read from the model's own files
        return {f"{role}.{name}": t for role, weights in averages.items() for name, t in weights.average.items()}

    def _load_weights(self, directory: str | os.PathLike) -> None:
        for name, model in self._trained_denoisers().items():
            if isinstance(model, PeftModel):
                load_adapter(model, directory, self._adapter_file(name))
            else:
                saved = type(model).from_pretrained(directory, subfolder=name, dtype=model.dtype)
                model.load_state_dict(saved.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer's own knows only the file names of transformers and PEFT, and waits for ever for an adapter in shards
        if self.is_fsdp_enabled:
            self._find_shards()
            load_whole_weights(self.model, resume_from_checkpoint)
        else:
            self._load_weights(resume_from_checkpoint)
        self._load_the_rest(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            # the Trainer lets DeepSpeed load weights and optimizer, and does not call `_load_from_checkpoint`
            self._find_shards()
            self._load_the_rest(checkpoint)

    def _load_the_rest(self, checkpoint: str | os.PathLike) -> None:
        if self.average is not None:
            load_average(self.average, checkpoint)
        load_roles(self.role_weights(), checkpoint)
        self.load_rank_state(Path(checkpoint))

    def _load_best_model(self) -> None:
        # The Trainer's own would not find the files, log that, and silently keep the last weights
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled and self.average is None:
            super()._load_best_model()
        elif self.is_fsdp_enabled and self.average is None:
            load_whole_weights(self._trained_apart() or self.model, best)
        elif self.is_sharded:
            load_roles({n: t for n, t in self.role_weights().items() if n.startswith("average.")}, best)
            self.average.copy_to_module()
        else:
            self._load_weights(best)
            if self.average is not None:
                self.average.reset()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The Trainer's own writes straight into the final directory, which a crash would leave half-written
        self.store_flos()
        name = f"checkpoint-{self.state.global_step}"
        run_dir = Path(self._get_output_dir(trial))
        staging, final = run_dir / f"_{name}.tmp", run_dir / name
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.save_model(str(staging), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
                self.save_rank_state(staging)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
            roles = gathered(self.role_weights()) if self.is_sharded else self.role_weights()
            if self.args.should_save:
                self._save_trainer_state(staging)
                save_roles(roles, staging)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(staging, step=self.state.global_step, **self._identity())
                publish(staging, final)
        except Exception:  # such as a full disk: give its space back; earlier checkpoints are untouched
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_trainer_state(self, directory: Path) -> None:
        self.state.stateful_callbacks = exported_states([*self.callback_handler.callbacks, self.control])
        self.state.save_to_json(str(directory / "trainer_state.json"))
        if self.average is not None:
            save_average(self.average, directory)

    # ---- Hub ----

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Write `README.md`, and the curves on it, into `output_dir`. Makes no network call.

        Args:
            model_name (`str`, *optional*): Default: the last part of `hub_model_id` or of `output_dir`.
            dataset_name (`str` or `list[str]`, *optional*): Hub ids of the training data.
            tags (`str` or `list[str]`, *optional*): Added to `vidtrl`, the method and the task.
        """
        if self.is_world_process_zero():
            write_card(self, model_name, dataset_name, tags)

    def card_usage(self) -> str | None:
        """The card's snippet, where the stock pipeline's call is not how to sample what was trained."""
        return None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As [`~transformers.Trainer.init_hf_repo`]; the branch `hub_revision` is created as well."""
        super().init_hf_repo(token=token, private=private)
        if self.is_world_process_zero():
            wanted = self.args.hub_private_repo if private is None else private
            self._check_private(token, wanted)
            self.pusher = self._pusher(token, self.args.hub_revision)
            self.pusher.clear()

    def _check_private(self, token: str | None, private: bool | None) -> None:
        api = HfApi(token=self.args.hub_token if token is None else token)
        check_private(api, self.hub_model_id, "model", private)

    def _pusher(self, token: str | None, revision: str | None) -> Pusher:
        args = self.args
        return Pusher(args.output_dir, self.hub_model_id, args.hub_token if token is None else token, revision)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Upload the model and its card: weights and configuration, of a student its scheduler, the last validation videos and
        curves; not checkpoints, completions or caches.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Wait for the end of the upload.
            token (`str`, *optional*): Default: `hub_token`, or the one `hf auth login` stored.
            revision (`str`, *optional*): Branch. Default: `hub_revision`, or `main`.
            private (`bool`, *optional*): Of a repository that is created; one that exists has to be private then. Default:
                `hub_private_repo`.
            **kwargs: For [`~VideoTrainer.create_model_card`], such as `dataset_name`.

        Returns:
            `CommitInfo` (as a `str` its address), or a `Future` of it. `None` on all processes but the first.

        Raises:
            `ValueError`: If `private` is asked for, and the repository is public.
            [`~vidtrl.hub.HubError`]: The Hub refused, or could not be reached; what was trained is in `output_dir`.
        """
        # The Trainer's own uploads whatever is in output_dir
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        elif self.is_world_process_zero():
            self._check_private(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        pusher = self.pusher
        if token is not None or revision is not None:
            pusher = self._pusher(token, revision or self.args.hub_revision)
        job = pusher.submit(Path(self.args.output_dir), commit_message or "End of training")
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer's own copies only file names that transformers knows, so that mid-run pushes would carry no weights;
        # it uploads a pickle of the arguments, Hub token included, and from directories that training goes on to change;
        # and it forgets uploads that fail
        if self.is_world_process_zero():
            push_checkpoint(self, Path(checkpoint_folder))
