"""What a distillation needs around its algorithm: roles, conditions of student and teacher, sampling, files, evaluation."""

import copy
import dataclasses
import hashlib
import os
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from ..data import BucketSampler
from ..inference.distill_config import StudentConfig, write_distill_config
from ..inference.export import save_scheduler, student_scheduler
from ..models import Condition, VideoModel
from ..models.causal import CausalAttention, KVCache
from .clip_data import ClipTrainer
from .distill_config import VideoDistillConfig
from .distill_logging import RunningMeans
from .distill_streams import Streams
from .distill_teacher import Joined, Trajectories, load_teacher
from .draws import DrawDataset, DrawSampler, generators
from .lora import load_adapter


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
        self.trajectories: Trajectories | None = None
        self.streams: Streams | None = None
        self.latent_shape: tuple[int, int, int, int] | None = None  # of all videos, unless clips fall into buckets
        self._negatives: dict[tuple, Condition] = {}  # the other branch of the teacher's guidance, by latent shape
        self.means = RunningMeans()
        super().__init__(model, args, peft_config=peft_config, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "distillation switches roles between and within steps, which does not work with sharded weights (FSDP, "
                "DeepSpeed): use --accelerate_config multi_gpu; with peft_config all roles share one copy of the base"
            )
        self._add_roles(peft_config)
        if args.stream_num_frames is not None:
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
        if peft_config is not None:
            if args.init_adapter is not None:
                load_adapter(student, args.init_adapter)
                if self.average is not None:
                    self.average.reset()
            below = self.policies.adapters("base")
            if args.matches_distributions:
                student.add_adapter("fake", copy.deepcopy(student.peft_config["default"]))
                self.policies.add("fake", student, (*below, "fake"), trained=True)
            self.policies.add("teacher", student, below)
            self.policies.add("student", student, (*below, "default"), trained=True)  # knows the new layers, too
        else:
            if args.matches_distributions:
                self.policies.add("fake", copy.deepcopy(student), trained=True)
            if self.teacher is self.video_model:
                self.policies.add("teacher", copy.deepcopy(student).requires_grad_(False))
        if self.teacher is not self.video_model:
            self.policies.add("teacher", next(iter(self.teacher.denoisers.values())))

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
        return self.optimizer

    def role_weights(self) -> dict[str, Tensor]:
        fake = self.policies.parameters("fake") if "fake" in self.policies else {}
        return super().role_weights() | {f"fake.{name}": parameter.data for name, parameter in fake.items()}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [list(self.policies.parameters(role).values()) for role in ("student", "fake") if role in self.policies]

    # ---- Dataset: prompts (or clips) -> conditions (and latents) ----

    def prepare_datasets(self, train_dataset, eval_dataset):
        args, model = self.args, self.video_model
        if len(model.denoisers) > 1:
            raise ValueError(
                f"{type(model.pipe).__name__} has two experts here, which one few-step student cannot follow: distil a model "
                "with one denoiser, such as Wan 2.1 or Wan 2.2 5B"
            )
        if args.resolution is None and args.buckets is None:
            self.fill_shape()
            self.latent_shape = model.latent_shape(args.num_frames, args.height, args.width)
        elif self.prompts_only:
            raise ValueError("resolution and buckets are for clips: set height, width and num_frames")
        if args.is_causal:
            self.causal = CausalAttention(model)
            if self.latent_shape is not None:
                self.causal.check_frames(self.latent_shape[1], args.frames_per_block)
        if args.stream_num_frames is not None and self.latent_shape[1] <= args.stream_overlap:
            raise ValueError(
                f"num_frames={args.num_frames} are {self.latent_shape[1]} latent frames, no more than stream_overlap="
                f"{args.stream_overlap}: a window must bring new frames"
            )
        self.teacher = model
        if self._teacher_model is not None:
            self.teacher = load_teacher(self._teacher_model, model, model.denoisers[self.denoiser_name].dtype)
            if not isinstance(self._teacher_model, DiffusionPipeline):
                self.teacher.pipe.to(args.device)
        config = next(iter(self.teacher.denoisers.values())).config
        if args.teacher_guidance_scale != 1.0 and config.get("guidance_embeds"):
            raise ValueError(
                f"guidance is distilled into this {type(self.teacher.pipe).__name__}: set teacher_guidance_scale=1.0"
            )
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
        # a student is called at exact noise levels, of which a pipeline's solver may only know the rounded timesteps
        for each in {id(m): m for m in (model, self.teacher)}.values():
            each.schedule.integer_timesteps = each.schedule.is_vp and each.schedule.integer_timesteps
        prepared = super().prepare_datasets(train_dataset, eval_dataset)
        self.sigmas = self.noise_levels(torch.tensor(args.denoising_steps) / 1000).tolist()
        if self.teacher is not model:
            self.teacher.offload_encoders()
        if args.loss_type == "ode_regression":
            self.trajectories = Trajectories(Path(args.output_dir, "trajectories"), self._trajectory_settings())
        self._set_scheduler()
        return prepared

    @property
    def prompts_only(self) -> bool:
        return self.args.rollout != "data"

    @property
    def kept_encoders(self) -> tuple[str, ...]:
        return ("vae",) if self.args.stream_num_frames is not None else ()  # windows begin with an encoded image

    def prepare_dataset(self, dataset, split: str):
        """Conditions (and latents) as in every trainer, with those of the teacher and of its guidance beside them."""
        args, offloaded = self.args, [m for m in (self.video_model, self.teacher) if m.offloaded]
        for model in offloaded:  # a dataset that comes later, such as one passed to `evaluate`
            model.restore_encoders()
        prepared = super().prepare_dataset(dataset, split)
        rows, plan = self._clips[split]
        own = self.teacher is not self.video_model and self._text(self.teacher) != self._text(self.video_model)
        extra = {}
        if own:
            extra["teacher_condition"] = self.build_cache(rows, plan, text_only=True, model=self.teacher)
        if args.teacher_guidance_scale != 1.0:
            if self.teacher.family.image:  # every prompt's other branch has its image
                negative = {"model": self.teacher, "negative_prompt": args.negative_prompt}
                extra["negative_condition"] = self.build_cache(rows, plan, text_only=True, **negative)
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

    def _text(self, model: VideoModel) -> dict:
        """What two models must share to take each other's conditions."""
        fingerprint = self.cache_fingerprint(model)
        encoders = {n: h for n, h in fingerprint["encoders"].items() if n != "vae"}
        return {"pipeline": fingerprint["pipeline"], "encoders": encoders}

    def data_summary(self) -> dict:
        return {**super().data_summary(), "sha256 of prompts": self._prompts_digest()}

    def _prompts_digest(self) -> str:
        rows, _ = self._clips["train"]
        digest = hashlib.sha256()
        for prompt in rows["prompt"] if isinstance(rows, Dataset) else [row["prompt"] for row in rows]:
            digest.update(prompt.encode() + b"\0")
        return digest.hexdigest()[:16]

    def _identity(self) -> dict:
        args = self.args
        method = {name: getattr(args, name) for name in ("recipe", "loss_type", "rollout", "denoising_steps")}
        return {**super()._identity(), "method": method}

    def train_sampler(self, dataset: DrawDataset) -> DrawSampler:
        args = self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        order = BucketSampler(dataset.buckets, batch_size=size, num_processes=args.world_size, seed=seed)
        return DrawSampler(order, args.seed)

    def noise_levels(self, u: Tensor) -> Tensor:
        """Unshifted times in [0, 1] (any shape) as noise levels of this run's `shift`."""
        return self.video_model.training_sigma(u, self.latent_shape, self.args.shift)

    def _trajectory_settings(self) -> dict:
        args = self.args
        names = ("denoising_steps", "shift", "teacher_steps", "teacher_guidance_scale", "negative_prompt", "seed")
        settings = {name: getattr(args, name) for name in names}
        teacher = self.teacher.pipe.name_or_path if self.teacher is not self.video_model else self.model_identity
        return settings | {"teacher": teacher, "data": self._prompts_digest(), "shape": self.latent_shape}

    # ---- Sampling and files: what users of the student will get ----

    def student_config(self) -> StudentConfig:
        """How the student is sampled, as `distill_config.json` says it."""
        args, middle = self.args, float(self.noise_levels(torch.tensor([0.5])))
        adapters = [os.path.abspath(a) if os.path.exists(a) else a for a in args.base_adapters or []]
        return StudentConfig(
            base_model=self.model_identity["name_or_path"],
            denoising_steps=[float(step) for step in args.denoising_steps],
            shift=round(middle / (1 - middle), 6),  # what "auto" stands for
            sampler=args.sampler,
            frames_per_block=args.frames_per_block,
            window=args.window,
            sink=args.sink,
            context_noise=args.context_noise,
            base_adapters=adapters,
        )

    def _set_scheduler(self) -> None:
        """The pipeline samples as the student does, where its class lets a scheduler decide."""
        family = self.video_model.family
        self.in_stock_pipeline = (
            self.causal is None and family.prediction == "flow" and family.grid != "linear_quadratic"
        )
        if self.in_stock_pipeline:
            self.video_model.pipe.scheduler = student_scheduler(self.student_config(), family)

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
        if self.in_stock_pipeline:
            with self.video_model.guidance(1.0) as off:
                overrides = {"num_inference_steps": len(self.sigmas), **off, **overrides}
                return super().generate_videos(prompts, seeds, images, batch_size, **overrides)
        height, width, num_frames = self.validation_shape()
        videos = []
        with self.sampling(), self.accelerator.autocast():
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                rows = [
                    {"prompt": prompt, "image": image, "fps": self.args.fps}
                    for prompt, image in zip(prompts[part], (images or [None] * len(prompts))[part], strict=True)
                ]
                condition = Condition.cat([self.condition(row, height, width, num_frames) for row in rows])
                sources, shape = generators(seeds[part], self.args.device), condition.latent_shape
                if self.causal is not None:
                    x = self._blocks(condition, shape[1], KVCache(self.args.window, self.args.sink), sources)
                else:
                    x = self._few_steps(condition, sources)
                videos += [video.cpu() for video in self.video_model.decode(x)]
        return videos

    def _card_generation(self) -> dict:
        return super()._card_generation() | {"num_inference_steps": len(self.sigmas), "guidance_scale": 1.0}

    def save_extras(self, directory: Path) -> None:
        config = self.student_config()
        write_distill_config(directory, **dataclasses.asdict(config))
        if self.in_stock_pipeline:
            save_scheduler(student_scheduler(config, self.video_model.family), directory / "scheduler")

    def save_rank_state(self, directory: Path) -> None:
        if self.streams is not None:
            self.streams.save(directory / f"streams-{self.args.process_index}.safetensors")

    def load_rank_state(self, directory: Path) -> None:
        if self.streams is not None:
            self.streams.load(directory / f"streams-{self.args.process_index}.safetensors", self.args.device)

    # ---- Logging and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.means.collect(self.accelerator)
            norms = [parameter.detach().norm() for parameter in self.policies.parameters("student").values()]
            logs["student_norm"] = torch.stack(norms).norm().item()
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
        with self.averaged_weights(), self.accelerator.autocast():
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
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
