"""A run of a trainer on fake tensors, up to the point where its steps can be traced."""

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from PIL import Image
from torch import Tensor, nn
from transformers import Trainer

from ..models import CausalAttention, Condition, VideoModel
from ..models.roles import Roles, checkpoint_under
from .base_config import VideoTrainingConfig
from .clip_config import ClipConfig
from .distill_config import VideoDistillConfig
from .distill_teacher import check_guidance, check_student
from .ema import WeightAverage
from .experts import EXPERTS
from .grpo_checks import check_denoisers
from .grpo_config import VideoGRPOConfig
from .loading import condition_kwargs, fill_shape, weights_dtype
from .lora import ADAPTER_FILE, add_lora
from .memory_trace import KnownValues, MemoryTrace, on_meta, pipeline_skeleton, stubbed_encoders


Phase = dict[str, int]
SIGMA = 0.5  # memory does not depend on it


class Run:
    """
    A run of a trainer, up to the point where its steps can be traced: model, adapter, roles, optimizer, conditions.

    Args:
        args ([`VideoTrainingConfig`]): Filled with the pipeline's own size where none is set.
        model, peft_config, teacher_model: As the trainer takes them.
        role (`str`): What the trainer calls the policy that it trains.
        sharded (`bool`): It will run under FSDP or DeepSpeed.
    """

    def __init__(
        self,
        args: VideoTrainingConfig,
        model: str | os.PathLike | DiffusionPipeline,
        peft_config: PeftConfig | None,
        teacher_model: str | os.PathLike | DiffusionPipeline | None = None,
        role: str = "policy",
        sharded: bool = False,
    ):
        self.sharded = sharded
        self.args, self.peft_config, self.role = args, peft_config, role
        self.fake, self.trace = KnownValues(), MemoryTrace()
        self.name = type(model).__name__ if isinstance(model, DiffusionPipeline) else os.fspath(model)
        self.model = self._load(model)
        pipe, denoisers = self.model.pipe, self.model.denoisers
        if args.experts is not None and len(denoisers) == 1:
            raise ValueError(
                f"experts={args.experts!r} needs a model with two denoisers; {type(pipe).__name__} has one"
            )
        self.num_denoisers = len(denoisers)
        name = EXPERTS.get(args.experts, next(iter(denoisers)))
        self.denoiser = denoisers[name]
        self.both_trained = len(denoisers) > 1 and args.experts not in EXPERTS
        # full fine-tuning moves no expert whose weights are trained
        swapped = args.offload_experts and not (self.both_trained and peft_config is None)
        others = sum(nbytes(module.parameters()) for n, module in denoisers.items() if n != name)
        self.other_expert_bytes = 0 if swapped else others
        self.encoder_bytes = sum(
            nbytes(module.parameters())
            for part, module in pipe.components.items()
            if isinstance(module, nn.Module) and part not in denoisers and part != "vae"
        )
        self.vae_bytes = nbytes(pipe.vae.parameters())
        self.size = self._size()
        self.latent_shape = self.model.latent_shape(*self.size)
        self.base_adapter_bytes = self._base_adapters(model, name)
        self.condition, self.negative = self._condition(self.model), self._condition(self.model, negative=True)
        self.teacher, self.teacher_conditions = self.model, (self.condition, self.negative)
        if teacher_model is not None:
            self.teacher = self._load(teacher_model)
            self.teacher_conditions = tuple(self._condition(self.teacher, negative=n) for n in (False, True))
        self._refuse(list(denoisers) if self.both_trained else [name], swapped)
        # one expert is trained, and only it is called here
        self.model.denoisers, self.model.boundary = {name: self.denoiser}, None
        self.own_teacher = teacher_model is not None
        self.further_roles = further_roles(args, own_teacher=teacher_model is not None)
        causal = getattr(args, "is_causal", getattr(args, "causal", None) is not None)
        self.causal = CausalAttention(self.model) if causal else None
        self._add_policy()

    def _refuse(self, trained: list[str], swapped: bool) -> None:
        """What the trainer refuses of these models."""
        if isinstance(self.args, VideoGRPOConfig):
            check_denoisers(self.args, self.model, trained, swapped)
        elif isinstance(self.args, VideoDistillConfig):
            check_student(self.model)
            check_guidance(self.args, self.teacher)

    def _load(self, model) -> VideoModel:
        kwargs = dict(self.args.model_init_kwargs or {})
        hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        loaded = isinstance(model, DiffusionPipeline)
        dtype = None if loaded else weights_dtype(self.args, adapter=self.peft_config is not None)
        return VideoModel(pipeline_skeleton(model, dtype, self.fake, **hub))

    def _size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the largest batch."""
        args, model = self.args, self.model
        rules = args.shape_rules() if isinstance(args, ClipConfig) else {}
        if rules.get("buckets"):
            return max(rules["buckets"], key=lambda b: b[0] * b[1] * b[2])
        if rules.get("resolution"):
            if args.num_frames is None:
                raise ValueError(
                    "an estimate over resolution buckets needs num_frames: set the largest number of frames"
                )
            return args.num_frames, *model.nearest_size(*[max(rules["resolution"])] * 2)
        fill_shape(args, model)
        return args.num_frames, args.height, args.width

    def _condition(self, model: VideoModel, negative: bool = False) -> Condition:
        args, (frames, height, width) = self.args, self.size
        image = Image.new("RGB", (width, height)) if model.family.image else None
        fps = args.fps if model.family.fps_argument else None
        with stubbed_encoders(model):
            return model.condition(
                "a", height, width, frames, image=image, fps=fps, negative=negative, **condition_kwargs(args)
            )

    def _base_adapters(self, model, name: str) -> int:
        """Adapters of earlier stages: those that the pipeline carries, and files on disk (those of the Hub are not fetched)."""
        size = 0
        if isinstance(model, DiffusionPipeline):
            size += nbytes(p for n, p in getattr(model, name).named_parameters() if ".lora_" in n)
        for adapter in self.args.base_adapters or ():
            path = Path(adapter).expanduser()
            path = path / ADAPTER_FILE if path.is_dir() else path
            if adapter.startswith((".", "/", "~")) and not path.is_file():
                raise ValueError(f"base_adapters: there is no adapter at {adapter!r}")
            size += path.stat().st_size if path.is_file() else 0
        return size

    # ---- Roles and optimizer ----

    def _add_policy(self) -> None:
        args, self.policies = self.args, Roles()
        self.trained = self.denoiser.requires_grad_(self.peft_config is None)
        self.copies: dict[str, nn.Module] = {}
        if args.gradient_checkpointing:
            states = [self.policies] + ([self.causal] if self.causal is not None else [])
            # the generator's state would be a real tensor
            function = functools.partial(checkpoint_under(*states), preserve_rng_state=False)
            self.denoiser.enable_gradient_checkpointing(function)
        with on_meta(self.denoiser, self.fake):
            if self.peft_config is not None:
                self.trained = add_lora(self.denoiser, self.peft_config)
                if "fake" in self.further_roles:
                    self.trained.add_adapter("fake", copy.deepcopy(self.trained.peft_config["default"]))
            else:
                copied = copy.deepcopy if self.causal is None else self.causal.copied
                self.copies = {role: copied(self.denoiser) for role in self.further_roles}
        for module in self.copies.values():
            with on_meta(module, self.fake):
                pass  # its own fake weights
        self.trained.train()
        adapters = None if self.peft_config is None else ("default",)
        self.policies.add(self.role, self.trained, adapters, trained=True)
        if adapters is not None:
            self.policies.add("base", self.trained, ())
        with self.tracing():
            self.trace.own(condition_tensors(self.condition), "latents")
            for name, p in self.trained.named_parameters():
                self.trace.own([p], "adapters" if ".lora_" in name else "denoiser")
            if args.ema_decay is not None:
                self.average = WeightAverage(self.trained, args.ema_decay)
                self.trace.own(self.average.average.values(), "ema")

    def trained_parameters(self, *roles: str) -> list[nn.Parameter]:
        """The weights of some roles, or of the policy."""
        return [p for role in roles or (self.role,) for p in self.policies.parameters(role).values()]

    def add_optimizer(self, *roles: str) -> None:
        """The optimizer of the configuration with its states over the weights of these roles."""
        with self.tracing():
            parameters = self.trained_parameters(*roles)
            kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(parameters, **kwargs)
            for p in parameters:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
            state = [v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
            self.trace.own(state, "optimizer")
            for p in parameters:
                p.grad = None
        for role in roles or (self.role,):
            with self.policies.active(role):  # a hook needs requires_grad
                for p in self.trained_parameters(role):
                    p.register_post_accumulate_grad_hook(lambda p: self.trace.own([p.grad], "gradients"))

    # ---- Tracing ----

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Operations are on fake tensors and counted inside this context."""
        with self.fake, self.trace:
            yield

    def autocast(self, cache: bool = True) -> torch.autocast:
        """As the accelerator's."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        enabled = bool(self.args.bf16 or self.args.fp16)
        return torch.autocast("cpu", dtype=dtype, enabled=enabled, cache_enabled=cache)

    def peak_of(self, function: Callable[[], Any], **resident: int) -> Phase:
        """The parts at the largest moment of a function; `resident` is what else is there all the time."""
        with self.tracing():
            self.trace.restart()
            function()
            peak = dict(self.trace.peak)
        for part, size in {**resident, "adapters": self.base_adapter_bytes}.items():
            peak[part] = peak.get(part, 0) + size
        if self.both_trained:  # the other expert's share of what is kept; a micro-batch is one expert's
            for part in ("adapters", "optimizer", "ema", "roles"):
                peak[part] = 2 * peak.get(part, 0)
            if self.args.gradient_accumulation_steps > 1:
                peak["gradients"] = 2 * peak.get("gradients", 0)
            peak["denoiser"] += self.other_expert_bytes
        return peak

    def latents(self, number: int, *, copies: int = 1) -> list[Tensor]:
        """Float32 tensors of the run's latent shape, counted as latents."""
        tensors = [torch.empty(number, *self.latent_shape) for _ in range(copies)]
        self.trace.own(tensors, "latents")
        return tensors

    def update(self, loss: Callable[[], Tensor], role: str, repeats: int, cache: bool = True) -> None:
        """Forward, backward (`repeats` micro-batches that accumulate), clipping and the optimizer's step."""
        parameters = self.trained_parameters(role)
        for _ in range(repeats):
            with self.policies.active(role):
                with self.autocast(cache):
                    value = loss()
                value.float().backward()
            del value
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.optimizer.step()
        for p in parameters:
            p.grad = None

    def velocity(
        self, x: Tensor, condition: Condition, sigma=SIGMA, denoiser: nn.Module | None = None, model=None
    ) -> Tensor:
        """[`VideoModel.velocity`] of the trained module, or of another role's."""
        batch = condition[[0] * len(x)]
        return (model or self.model).velocity(x, sigma, batch, denoiser=denoiser or self.trained)

    def encode(self, number: int) -> tuple[Tensor, Tensor]:
        """Clips (`number`, F, 3, H, W) through the VAE."""
        frames, height, width = self.size
        videos = torch.empty(number, frames, 3, height, width)
        self.trace.own([videos], "latents")
        return self.model.encode(videos)

    def setting(self) -> dict[str, Any]:
        """What the figures depend on, in words."""
        args, (frames, height, width) = self.args, self.size
        trained, every = (sum(p.numel() for p in ps) for ps in (self.trained_parameters(), self.trained.parameters()))
        return {
            "frames x height x width": f"{frames}x{height}x{width}",
            "batch": args.per_device_train_batch_size,
            "weights": str(self.denoiser.dtype).removeprefix("torch."),
            "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else "off",
            "gradient_checkpointing": "on" if args.gradient_checkpointing else "off",
            "trained parameters": f"{trained / 1e6:.1f} of {every / 1e6:.1f} million",
        }

    def preparation(self, clips: bool) -> Phase:
        """Everything on the device at once; the VAE encodes clip by clip."""
        resident = {"text_encoder": self.encoder_bytes, "vae": self.vae_bytes}
        peak = self.peak_of((lambda: self.encode(1)) if clips else (lambda: None), **resident)
        return {part: size for part, size in peak.items() if part not in ("adapters", "ema")}  # they come later


def further_roles(args: VideoTrainingConfig, own_teacher: bool) -> list[str]:
    """Roles of a distillation that are copies of the student, or adapters beside its own (a teacher needs none then)."""
    if not isinstance(args, VideoDistillConfig):
        return []
    return ["fake"] * args.matches_distributions + ["teacher"] * (not own_teacher)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({id(t): t.nbytes for t in tensors}.values())


def condition_tensors(condition: Condition) -> list[Tensor]:
    """All tensors that belong to its clips."""
    return [t for sample in condition.samples for t in sample.values()]
