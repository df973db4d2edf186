"""What a distillation needs around its algorithm: roles, conditions of student and teacher, sampling, files, evaluation."""

import contextlib
import copy
import dataclasses
import hashlib
import os
from pathlib import Path

import torch
from accelerate.utils import AutocastKwargs, gather_object
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from PIL import Image
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from ..data import CachedDataset, VideoDataset
from ..inference.causal_pipeline import CausalVideoPipeline
from ..inference.distill_config import StudentConfig, write_distill_config
from ..inference.export import save_scheduler, student_scheduler
from ..models import Condition, VideoModel
from ..models.causal import CausalAttention
from .callbacks import StepCallback
from .checkpoint import weights_fingerprint
from .clip_data import ClipTrainer
from .distill_card import student_usage
from .distill_config import VideoDistillConfig
from .distill_logging import RunningMeans
from .distill_streams import Streams
from .distill_teacher import (
    Joined,
    Trajectories,
    answer_fingerprint,
    check_guidance,
    check_student,
    condition_digest,
    load_teacher,
    weights_elsewhere,
)
from .lora import load_adapter, save_adapter
from .sharding import norm


class DistillBase(ClipTrainer):
    """
    Base of [`VideoDistillTrainer`]. Not used by itself; arguments as in [`VideoTrainer`], with a [`VideoDistillConfig`].

    Args:
        teacher_model (`str`, `PathLike` or `DiffusionPipeline`, *optional*): Another teacher than the model itself.
    """

    args: VideoDistillConfig

    def __init__(self, model, args: VideoDistillConfig, *, teacher_model=None, peft_config=None, **kwargs):
        self._teacher_model = teacher_model
        self.teacher: VideoModel | None = None  # the student's own model, unless it is another
        self.causal: CausalAttention | None = None
        self.teacher_causal: CausalAttention | None = None  # of a teacher that sees clips as a causal student does
        self.trajectories: Trajectories | None = None
        self.streams: Streams | None = None
        self.latent_shape: tuple[int, int, int, int] | None = None  # of all videos, unless clips fall into buckets
        self._negatives: dict[tuple, Condition] = {}  # the other branch of the teacher's guidance, by latent shape
        self._copies: dict[str, nn.Module] = {}  # the models of the roles, where they are no adapters
        self._below: dict[str, Tensor] | None = None  # adapters under the roles, before they are sharded
        self.means = RunningMeans()
        self._local_gradients = contextlib.ExitStack()  # DeepSpeed, until it is given the gradients of a step
        super().__init__(model, args, peft_config=peft_config, **kwargs)
        if self.is_sharded:
            check_sharded(args, peft_config, "FSDP" if self.is_fsdp_enabled else "DeepSpeed")
        self._add_roles(peft_config)
        if self.is_deepspeed_enabled:
            # it clips all roles together; here they are before it has the gradients, each for itself
            self.accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = 0.0
            self.add_callback(StepCallback(self._deepspeed_step))
        if args.stream_num_frames is not None:
            # what the block behind a window sees of it
            seen = args.stream_num_frames if args.window is None else args.window - args.sink - args.frames_per_block
            self.streams = Streams(
                num_frames=args.stream_num_frames,
                new_frames=self.latent_shape[1] - args.stream_overlap,
                keep=max(seen, args.stream_overlap),
                sink=args.sink,
                prompt_switch=args.prompt_switch,
            )

    # ---- Roles ----

    def _add_roles(self, peft_config: PeftConfig | None) -> None:
        """Fake score and teacher beside the student: adapters on its base, or copies of its module."""
        args, student = self.args, self.model
        if self.is_sharded and peft_config is not None:
            below = self.policies.adapters("base")
            carried = {n: p for n, p in student.named_parameters() if any(f".{a}." in f"{n}." for a in below)}
            self._below = {name: parameter.detach().cpu().clone() for name, parameter in carried.items()}
        if peft_config is not None:
            if args.init_adapter is not None:
                load_adapter(student, args.init_adapter)  # before the average begins
                if self.average is not None:
                    self.average.reset()
            below = self.policies.adapters("base")
            if "fake" in below:
                raise ValueError(
                    "'fake' is the name of the fake score's adapter: load yours with another adapter_name"
                )
            if args.matches_distributions:
                student.add_adapter("fake", copy.deepcopy(student.peft_config["default"]))
                self.policies.add("fake", student, (*below, "fake"), trained=True)
            self.policies.add("teacher", student, below)
            self.policies.add("student", student, (*below, "default"), trained=True)  # knows the new layers, too
        else:
            copied = copy.deepcopy if self.causal is None else self.causal.copied
            self._copies["student"] = student
            if args.matches_distributions:
                self._copies["fake"] = copied(student)
                self.policies.add("fake", self._copies["fake"], trained=True)
            if self.teacher is self.video_model:
                self._copies["teacher"] = copied(student).requires_grad_(False).eval()
                self.policies.add("teacher", self._copies["teacher"])
        if self.teacher is not self.video_model:
            self.policies.add("teacher", next(iter(self.teacher.denoisers.values())))

    def models_apart(self) -> dict[str, nn.Module]:
        return self._copies if self.is_fsdp_enabled and len(self._copies) > 1 else {}

    def forward_states(self) -> list:
        return super().forward_states() + ([self.causal] if self.causal is not None else [])

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = {"student": self.args.learning_rate, "fake": self.args.fake_learning_rate}
            groups = [
                {"params": list(self.policies.parameters(role).values()), "lr": rate}
                for role, rate in rates.items()
                if role in self.policies
            ]
            # a role whose turn it is not has no gradients, and the optimizer passes over it, state and decay included
            self.optimizer = kind(groups, **{**kwargs, "weight_decay": self.args.weight_decay})
        if self.is_deepspeed_enabled:
            self._name_groups(self.optimizer.param_groups)
        return self.optimizer

    # ---- DeepSpeed ----
    # It gets gradients that are exchanged and clipped, as DDP's, and updates its shards of the weights. Of a role whose turn
    # it is not, it would take the missing gradients for zeros: weights would decay, and Adam's momentum move them.

    def _name_groups(self, groups: list[dict]) -> None:
        """Note with each group of weights in the optimizer whose they are."""
        for group in groups:
            mine = {id(weight) for weight in group["params"]}
            owners = [
                role
                for role in ("student", "fake")
                if role in self.policies and any(id(p) in mine for p in self.policies.parameters(role).values())
            ]
            if len(owners) != 1:
                raise ValueError(
                    "with DeepSpeed the groups of an optimizer belong to one role each: give it a group of the student's "
                    "weights and one of the fake score's, or leave optimizers out"
                )
            group["role"] = owners[0]

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:
            optimizer = self.deepspeed.optimizer.optimizer  # torch's, which steps one shard after the other
            if any("role" not in group for group in optimizer.param_groups):
                raise ValueError(
                    f"optim={self.args.optim!r} is replaced by DeepSpeed, and with it the roles' learning rates: set "
                    "optim='adamw_torch'"
                )
            left_out: list[list[dict]] = []

            def leave_out(optimizer, *_) -> None:
                left_out.append(optimizer.param_groups)
                optimizer.param_groups = [g for g in optimizer.param_groups if g["role"] in self.turn()]

            def put_back(optimizer, *_) -> None:
                optimizer.param_groups = left_out.pop()

            optimizer.register_step_pre_hook(leave_out)
            optimizer.register_step_post_hook(put_back)
        return prepared

    def _deepspeed_step(self) -> None:
        with self.policies.training(*self.turn()):
            self._local_gradients.close()  # it takes them over
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.deepspeed.step()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # torch fills the states of sharded weights that require gradients, and wants one for each of them: those of the
        # active role do, and its turn may not have come yet
        saved = torch.load(Path(checkpoint, "optimizer.bin"), weights_only=True, mmap=True)["state"]
        weights = {
            f"{role}.{n}" if self._apart is not None else n: p
            for role in ("student", "fake")
            if role in self.policies
            for n, p in self.policies.parameters(role).items()
        }
        before = {name: parameter.requires_grad for name, parameter in weights.items()}
        for name, parameter in weights.items():
            parameter.requires_grad_(name in saved)
        super()._load_optimizer_and_scheduler(checkpoint)
        for name, parameter in weights.items():
            parameter.requires_grad_(before[name])

    def role_weights(self) -> dict[str, Tensor]:
        # a model of its own that FSDP shards is saved with the student, and DeepSpeed's files have all that is trained
        elsewhere = self.is_deepspeed_enabled or self.models_apart() or "fake" not in self.policies
        fake = {} if elsewhere else self.policies.parameters("fake")
        return super().role_weights() | {f"fake.{name}": parameter.data for name, parameter in fake.items()}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [list(self.policies.parameters(role).values()) for role in ("student", "fake") if role in self.policies]

    # ---- Dataset: prompts (or clips) -> conditions (and latents) ----

    def prepare_datasets(self, train_dataset, eval_dataset):
        args, model = self.args, self.video_model
        check_student(model)
        if args.resolution is None and args.buckets is None:
            self.fill_shape()
            self.latent_shape = model.latent_shape(args.num_frames, args.height, args.width)
        elif self.prompts_only:
            raise ValueError("resolution and buckets are for clips: set height, width and num_frames")
        if args.is_causal:
            self.causal = CausalAttention(model)
            if self.latent_shape is not None:
                self.causal.check_frames(self.latent_shape[1], args.frames_per_block)
        if args.stream_num_frames is not None:
            self._check_stream()
        self.teacher, self.teacher_causal = model, self.causal
        if self._teacher_model is not None:
            self.teacher = load_teacher(self._teacher_model, model, model.denoisers[self.denoiser_name].dtype)
            if not isinstance(self._teacher_model, DiffusionPipeline):
                self.teacher.pipe.to(args.device)
            if args.causal is not None and args.loss_type == "consistency":
                self.teacher_causal = CausalAttention(self.teacher)
        check_guidance(args, self.teacher)
        continuous = args.loss_type == "consistency" and args.consistency == "continuous"
        if continuous and model.family.prediction != "flow":
            raise ValueError(
                f"continuous consistency needs exact noise levels, and {model.family.name} knows the timesteps of a table: set "
                "consistency='discrete'"
            )
        if continuous and args.tangent == "finite_difference":
            if args.bf16 or model.denoisers[self.denoiser_name].dtype != torch.float32:
                raise ValueError(
                    "a finite difference needs float32: set bf16=False and model_init_kwargs={'dtype': 'float32'}, or "
                    "tangent='jvp'"
                )
        if self.latent_shape is None and args.shift == "auto" and model.family.mu == "sequence":
            raise ValueError(
                f"the shift of {model.family.name} depends on the size, and a student has one list of noise levels: set shift "
                "to a number such as 5, or height, width and num_frames instead of buckets"
            )
        # a student is called at exact noise levels, of which a pipeline's solver may only know the rounded timesteps
        for each in {id(m): m for m in (model, self.teacher)}.values():
            each.schedule.integer_timesteps = each.schedule.is_vp and each.schedule.integer_timesteps
        student_scheduler(self.student_config(), model.family, model.pipe.scheduler)  # refused now, not after training
        prepared = super().prepare_datasets(train_dataset, eval_dataset)
        self.sigmas = self.noise_levels(torch.tensor(args.denoising_steps) / 1000).tolist()
        if args.loss_type == "ode_regression":
            self.trajectories = Trajectories(Path(args.output_dir, "_trajectories"), self._trajectory_settings())
        if self.teacher is not model:
            self.teacher.offload_encoders()
        self._set_scheduler()
        return prepared

    def _check_stream(self) -> None:
        args, window = self.args, self.latent_shape[1]
        what = f"num_frames={args.num_frames} are {window} latent frames"
        if window <= args.stream_overlap:
            raise ValueError(
                f"{what}, no more than stream_overlap={args.stream_overlap}: a window must bring new frames"
            )
        if args.stream_num_frames < 2 * window - args.stream_overlap:
            raise ValueError(
                f"stream_num_frames={args.stream_num_frames} holds no second window ({what}): set at least "
                f"{2 * window - args.stream_overlap}, or leave it unset"
            )
        positions = self.video_model.denoisers[self.denoiser_name].config.get("rope_max_seq_len")
        if positions is not None and args.stream_num_frames > positions:
            raise ValueError(
                f"stream_num_frames={args.stream_num_frames} is more than the {positions} positions that the model knows"
            )

    def frame_rule(self) -> tuple[int, int]:
        multiple, offset = super().frame_rule()
        if self.causal is None:
            return multiple, offset
        blocks = self.args.frames_per_block
        return multiple * blocks, offset + multiple * (blocks - 1)

    @property
    def prompts_only(self) -> bool:
        return self.args.rollout != "data"

    @property
    def cached_negative_prompt(self) -> str | None:
        guided = self.args.teacher_guidance_scale != 1.0 and self.teacher.family.image
        return self.args.negative_prompt if guided else None

    @property
    def kept_encoders(self) -> tuple[str, ...]:
        return ("vae",) if self.args.stream_num_frames is not None else ()  # windows begin with an encoded image

    def prepare_dataset(self, dataset, split: str):
        """Conditions (and latents) as in every trainer, with those of the teacher and of its guidance beside them."""
        if isinstance(dataset, (CachedDataset, VideoDataset)):
            raise TypeError(f"pass the rows as a datasets.Dataset, not a {type(dataset).__name__}")
        args, offloaded = self.args, [m for m in (self.video_model, self.teacher) if m.offloaded]
        for model in offloaded:  # a dataset that comes later, such as one passed to `evaluate`
            model.restore_encoders()
        prepared = super().prepare_dataset(dataset, split)
        rows, plan = self._clips[split]
        if split == "train":
            self._prompts_digest = prompts_digest(rows)
        own = self.teacher is not self.video_model and not self._share_conditions(*plan.buckets[0])
        extra, told, negative = {}, prepared, {"text_only": True, "negative_prompt": self.cached_negative_prompt}
        if own:
            told = extra["teacher_condition"] = self.build_cache(rows, plan, model=self.teacher, **negative)
        if args.teacher_guidance_scale != 1.0:
            if self.teacher.family.image:  # every prompt's other branch has its image
                told = self.build_cache(rows, plan, **negative) if isinstance(told, VideoDataset) else told
                extra["negative_condition"] = told.negatives()
            else:
                row = {"prompt": args.negative_prompt, "fps": args.fps}
                for num_frames, height, width in plan.buckets:
                    if self.teacher.latent_shape(num_frames, height, width) not in self._negatives:
                        condition = self.condition(row, height, width, num_frames, model=self.teacher, negative=True)
                        self._negatives[condition.latent_shape] = condition.to(args.device)
        if own and not args.cache and not self.prompts_only:
            raise ValueError("a teacher with a text encoder of its own needs cache=True")
        for model in offloaded:
            model.offload_encoders(self.kept_encoders)
        return Joined(prepared, **extra) if extra else prepared

    def _share_conditions(self, num_frames: int, height: int, width: int) -> bool:
        """Whether teacher and student are told the same thing by their pipelines: encoders, rotary embeddings and all."""
        row = {"prompt": "a red circle", "fps": self.args.fps, "image": Image.new("RGB", (width, height))}
        models = (self.video_model, self.teacher)
        digests = {condition_digest(self.condition(row, height, width, num_frames, model=m)) for m in models}
        return all(gather_object([len(digests) == 1]))  # all processes must agree

    def data_summary(self) -> dict:
        return {**super().data_summary(), "sha256 of prompts": self._prompts_digest}

    def _identity(self) -> dict:
        args = self.args
        method = {name: getattr(args, name) for name in ("recipe", "loss_type", "rollout", "denoising_steps")}
        return {**super()._identity(), "method": method}

    def prepare_batch(self, inputs: dict) -> dict:
        """A collated batch on the device, with latents and conditions of clips that were not cached."""
        inputs = self._prepare_inputs(inputs)
        if "videos" in inputs:
            inputs["mean"], inputs["std"], inputs["condition"] = self.clean_latents(inputs)
        device = self.args.device
        return {name: v.to(device) if isinstance(v, Condition) else v for name, v in inputs.items()}

    def noise_levels(self, u: Tensor) -> Tensor:
        """Unshifted times in [0, 1] (any shape) as noise levels of this run's `shift`."""
        return self.video_model.training_sigma(u, self.latent_shape, self.args.shift)

    def _trajectory_settings(self) -> dict:
        args = self.args
        names = ("denoising_steps", "shift", "teacher_steps", "teacher_guidance_scale", "negative_prompt", "seed")
        settings = {name: getattr(args, name) for name in names}
        teacher = self.model_identity
        if self.teacher is not self.video_model and not weights_elsewhere(self.teacher):
            teacher = weights_fingerprint(next(iter(self.teacher.denoisers.values())))
        elif self.teacher is not self.video_model:
            row = {"prompt": "a red circle", "fps": args.fps, "image": Image.new("RGB", (args.width, args.height))}
            size = args.height, args.width, args.num_frames
            teacher = answer_fingerprint(self.teacher, self.condition(row, *size, model=self.teacher), args.device)
        return settings | {"teacher": teacher}

    # ---- Sampling and files: what users of the student will get ----

    def student_config(self, base_adapters: list[str] | None = None) -> StudentConfig:
        """How the student is sampled, as `distill_config.json` says it."""
        args, shift = self.args, self.args.shift
        if shift == "auto" and self.video_model.schedule.is_vp:
            shift = 1.0  # its timesteps are those of its table
        elif shift == "auto":  # what it stands for
            middle = float(self.noise_levels(torch.tensor([0.5])))
            shift = round(middle / (1 - middle), 4)
        base = self.model_identity["name_or_path"]
        return StudentConfig(
            base_model=os.path.abspath(base) if os.path.isdir(base) else base,
            denoising_steps=[float(step) for step in args.denoising_steps],
            shift=shift,
            sampler=args.sampler,
            frames_per_block=args.frames_per_block,
            window=args.window,
            sink=args.sink,
            context_noise=args.context_noise,
            base_adapters=base_adapters or [],
        )

    def _set_scheduler(self) -> None:
        """The pipeline visits the student's noise levels."""
        model = self.video_model
        model.pipe.scheduler = student_scheduler(self.student_config(), model.family, model.pipe.scheduler)
        model.schedule.probe_steps = len(self.args.denoising_steps)  # the only number it knows

    def generate_videos(
        self,
        prompts: list[str],
        seeds: list[int],
        images: list | None = None,
        batch_size: int = 1,
        **overrides,
    ) -> list[Tensor]:
        """
        Sample the student: in its few steps, without guidance, and block by block if it is causal.

        Args:
            prompts (`list[str]`): What to generate.
            seeds (`list[int]`): One seed per prompt.
            images (`list`, *optional*): One image per prompt, for image-to-video models.
            batch_size (`int`, *optional*, defaults to `1`): Videos at a time.
            **overrides: Arguments of the pipeline, where the stock pipeline samples the student.

        Returns:
            `list[torch.Tensor]`: float32 tensors (F, C, H, W) in [0, 1] on the CPU.
        """
        if self.causal is None:
            with self.video_model.guidance(1.0) as off:
                overrides = {"num_inference_steps": len(self.sigmas), **off, **overrides}
                return super().generate_videos(prompts, seeds, images, batch_size, **overrides)
        if overrides:
            raise ValueError(
                f"{', '.join(overrides)} cannot be set: this student is not sampled by its stock pipeline"
            )
        videos, images = [], images or [None] * len(prompts)
        with self.sampling() as pipe, self.accelerator.autocast():
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                sources = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
                videos += [video.cpu() for video in self._sample_causally(pipe, prompts[part], images[part], sources)]
        return videos

    def _sample_causally(self, pipe, prompts: list[str], images: list, sources: list) -> list[Tensor]:
        """As users will."""
        args, (height, width, num_frames) = self.args, self.validation_shape()
        options = {**(args.pipeline_kwargs or {}), "max_sequence_length": args.max_sequence_length, "fps": args.fps}
        options = {name: value for name, value in options.items() if value is not None}
        names = ("denoising_steps", "shift", "frames_per_block", "sampler", "window", "sink", "context_noise")
        config = self.student_config()
        student = CausalVideoPipeline(pipe, **{name: getattr(config, name) for name in names})
        return student(prompts, height=height, width=width, num_frames=num_frames, generator=sources, **options)

    def card_usage(self) -> str:
        args, model, (height, width, num_frames) = self.args, self.video_model, self.validation_shape()
        size = {"height": height, "width": width, model.family.frames_argument: num_frames}
        if args.max_sequence_length is not None:
            size["max_sequence_length"] = args.max_sequence_length
        return student_usage(
            repo_id=self.hub_model_id or args.hub_model_id or os.path.abspath(args.output_dir),
            config=self.student_config(args.base_adapters),
            image=model.family.image,
            size=size,
            fps=round(self.validation_fps()),
        )

    def save_extras(self, directory: Path) -> None:
        """The student is complete: how it is sampled, its scheduler, and the adapters under it."""
        given, below = {f"base_{i}": adapter for i, adapter in enumerate(self.args.base_adapters or [])}, []
        for name in self.policies.adapters("base") if "base" in self.policies else ():
            source = given.get(name)
            if source is None or os.path.exists(os.path.expanduser(source)):
                source = f"base_adapters/{len(below)}"  # relative to the file that says it
                (directory / source).mkdir(parents=True, exist_ok=True)
                save_adapter(self._unwrapped(), directory / source, self._below, name)
            below.append(source)
        config = self.student_config(below)
        write_distill_config(directory, **dataclasses.asdict(config))
        save_scheduler(self.video_model.pipe.scheduler, directory / "scheduler")

    def save_rank_state(self, directory: Path) -> None:
        if self.streams is not None:
            self.streams.save(directory / f"streams-{self.args.process_index}.safetensors")

    def load_rank_state(self, directory: Path) -> None:
        if self.streams is not None:
            number = len(list(directory.glob("streams-*.safetensors")))
            if number != self.args.world_size:
                raise ValueError(
                    f"cannot resume from {directory}: it holds the videos of {number} processes, and there are "
                    f"{self.args.world_size} now. Resume with as many as before"
                )
            self.streams.load(directory / f"streams-{self.args.process_index}.safetensors", self.args.device)

    # ---- Logging and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.means.collect(self.accelerator)
            logs["student_norm"] = norm(self.policies.parameters("student").values()).item()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        The losses of all roles on held-out rows, always with the same draws and the last step as exit.

        `eval_loss` is the student's. That of distribution matching is half the squared score difference: its size, not a
        quality. Look at the validation videos.
        """
        training, kept = self.model.training, (self.means, self.streams)
        self.model.eval()
        self.means, self.streams, number = RunningMeans(), None, 0
        roles = ("student", "fake") if self.args.matches_distributions else ("student",)
        with self.averaged_weights(), self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            for inputs in dataloader:
                inputs = self.prepare_batch(inputs)
                surplus, everything = inputs["draws"][0] < 0, self.means
                inputs["draws"] = [max(draw, 0) for draw in inputs["draws"]]
                self.means = RunningMeans()
                for role in roles:
                    with self.policies.active(role):
                        loss, _ = self.student_loss(inputs) if role == "student" else self.fake_loss(inputs)
                    self.means.add(f"loss/{role}", loss.expand(len(inputs["draws"])))
                everything.merge(self.means, 0 if surplus else 1)
                self.means, number = everything, number + (0 if surplus else len(inputs["draws"]))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        found = self.means.collect(self.accelerator)
        self.model.train(training)
        self.means, self.streams = kept
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_loss"] = found["loss/student"]
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=number)


def check_sharded(args: VideoDistillConfig, peft_config: PeftConfig | None, kind: str) -> None:
    """
    Refuse what does not work with sharded weights.

    Args:
        args ([`VideoDistillConfig`]): The run's.
        peft_config (`LoraConfig`, *optional*): The roles' adapters.
        kind (`str`): `"FSDP"` or `"DeepSpeed"`.

    Raises:
        `ValueError`: Says what to set.
    """
    if peft_config is None and kind == "DeepSpeed":
        raise ValueError(
            "without peft_config each role is a model of its own, and DeepSpeed shards one: pass a LoraConfig, or use "
            "--accelerate_config fsdp2 or multi_gpu"
        )
    if args.loss_type == "consistency" and args.consistency == "continuous" and args.tangent == "jvp":
        raise ValueError("tangent='jvp' cannot pass through sharded weights: set tangent='finite_difference'")


def prompts_digest(rows: Dataset | IterableDataset) -> str:
    """A hash of all prompts, in their order."""
    digest = hashlib.sha256()
    for prompt in rows["prompt"] if isinstance(rows, Dataset) else (row["prompt"] for row in rows):
        digest.update(prompt.encode() + b"\0")
    return digest.hexdigest()[:16]
