"""Distillation of video diffusion models into few-step and streaming students.

Stage 4 of https://huggingface.co/papers/2604.25427 and the methods it builds on. Three roles on one frozen base: the
student G, the fake score F (a model of what the student generates) and the teacher R. Distribution matching (DMD2,
https://huggingface.co/papers/2405.14867; Self Forcing, https://huggingface.co/papers/2506.08009) needs prompts only:

    x    = the student's sample: few steps, or block by block with a KV cache; only its exit step has a gradient
    x_s  = (1 - s) x + s e
    student step:      d loss / d x  ~  F.x0(x_s) - [R.x0(x_s, no text) + w (R.x0(x_s, text) - R.x0(x_s, no text))]
    fake score step:   || F.v(x_s) - (e - x) ||^2

Consistency distillation (LCM, rCM) and regression on the teacher's trajectories (CausVid) train the student alone.
An optimizer step is one role's turn, told by the global step, so accumulation and resuming cannot mix them up.
Left out: the GAN terms of DMD2 and Self Forcing, and rewards inside distillation.
"""

import contextlib
import itertools
import os
import random

import torch
from accelerate.utils import AutocastKwargs, gather_object
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from ..diffusion import consistency as cm
from ..diffusion import distribution_matching as dm
from ..diffusion import flow
from ..models import Condition
from ..models.causal import KVCache
from ..rollout.causal import causal_rollout
from ..rollout.few_step import few_step_rollout
from .clip_data import collate
from .distill_base import DistillBase
from .distill_config import VideoDistillConfig
from .distill_streams import Stream
from .distill_teacher import trajectory_grid, trajectory_names
from .draws import draw_seed, generators, randn
from .sharding import whole


DECODED_FRAMES = 8  # latent frames of a stream that are decoded for the image of the last one


class VideoDistillTrainer(DistillBase):
    """
    Few-step and streaming students of any supported diffusers video pipeline.

    Args:
        model (`str`, `PathLike` or `DiffusionPipeline`):
            Hub id, local path, or a loaded pipeline. Adapters that it carries (or `base_adapters`) stay under all roles: the
            teacher is then the model after SFT and GRPO, and nothing is merged. Its scheduler becomes the student's.
        teacher_model (`str`, `PathLike` or `DiffusionPipeline`, *optional*):
            Another teacher with the same latent space; `None` is the model itself. A loaded pipeline stays where it is and may
            be quantised or offloaded.
        args ([`VideoDistillConfig`], *optional*):
            Configuration. Default: `recipe="dmd2"` at the pipeline's own size.
        train_dataset (`Dataset` or `IterableDataset`):
            A column `prompt`; with `rollout="data"` also `video`. `image` for image-to-video models.
        eval_dataset (`Dataset`, `IterableDataset` or a dict of them, *optional*):
            Held-out rows for the losses of `evaluate`.
        callbacks (`list[TrainerCallback]`, *optional*):
            Added to the default ones.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler; default: one AdamW with a group for the student and one for the fake score.
        quantization_config (*optional*):
            A diffusers quantisation configuration, used while loading `model` (an id or path).
        peft_config (`LoraConfig`, *optional*):
            Student and fake score are adapters of this shape on one frozen base. `None` trains all weights of two copies
            beside a frozen one.

    Raises:
        `TypeError`, `ValueError`: For arguments that do not fit, with the fix in the message.

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from vidtrl import VideoDistillConfig, VideoDistillTrainer

    trainer = VideoDistillTrainer(
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        args=VideoDistillConfig("wan-4-steps", height=480, width=832, num_frames=81, max_steps=3000),
        train_dataset=Dataset.from_dict({"prompt": ["a red circle moving right", "a cat surfing a wave"]}),
        peft_config=LoraConfig(r=64, lora_alpha=64),
    )
    trainer.train()
    trainer.save_model()  # the adapter, its scheduler, and distill_config.json, for vidtrl.inference.load_student
    video = trainer.pipe("a red circle moving right", num_inference_steps=4, guidance_scale=1.0).frames[0]
    ```

    A causal student (`recipe="self-forcing"`) is sampled block by block, by [`~vidtrl.inference.CausalVideoPipeline`].
    """

    _name = "Distillation"
    _tag_names = ["vidtrl", "distillation"]
    _role = "student"

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        teacher_model: str | os.PathLike | DiffusionPipeline | None = None,
        args: VideoDistillConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = type(model).__name__ if isinstance(model, DiffusionPipeline) else os.fspath(model)
            args = VideoDistillConfig(f"{name.rstrip('/').split('/')[-1]}-Distilled")
        if not isinstance(args, VideoDistillConfig):
            raise TypeError(f"args must be a VideoDistillConfig, not {type(args).__name__}")
        if train_dataset is None:
            columns = "columns prompt and video" if args.rollout == "data" else "column prompt"
            raise ValueError(f"train_dataset is required: a datasets.Dataset with the {columns}")
        if isinstance(peft_config, LoraConfig):
            if peft_config.lora_dropout:
                raise ValueError("lora_dropout must be 0: rollouts and scores have to see the same roles")
            if peft_config.modules_to_save or peft_config.bias != "none":
                raise ValueError("modules_to_save and bias train weights that the roles share: leave them out")
            if str(peft_config.init_lora_weights).split("_")[0] in ("pissa", "olora", "corda", "loftq", "lora"):
                raise ValueError(
                    f"init_lora_weights={peft_config.init_lora_weights!r} changes the base, which is the teacher: use True or "
                    "'gaussian'"
                )
        if args.init_adapter is not None and peft_config is None:
            raise ValueError("init_adapter is the start of an adapter: pass peft_config as well")
        for name, rates in args.recipe_rates.items():
            if getattr(args, name) in rates:  # not set since
                setattr(args, name, rates[peft_config is None])
        self._micro_step = 0  # of the present optimizer step
        super().__init__(
            model,
            args,
            teacher_model=teacher_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            data_collator=collate,
        )

    def train(self, *args, **kwargs):
        self._micro_step = 0  # a run before this one may have been interrupted within a step
        return super().train(*args, **kwargs)

    # ---- Whose turn it is ----

    def turn(self) -> tuple[str, ...]:
        """The roles that the present optimizer step trains: the fake score first, the student after so many updates."""
        args, step = self.args, self.state.global_step
        if not args.matches_distributions or step < self.steps_alone:
            return ("student",)
        if self.updates(step + 1) == self.updates(step):
            return ("fake",)
        return ("student",) if args.critic_schedule == "exclusive" else ("student", "fake")

    def updates(self, step: int) -> int:
        args, alone = self.args, min(step, self.steps_alone)
        if not args.matches_distributions:
            return step
        return alone + (step - alone) // (args.fake_updates_per_student + (args.critic_schedule == "exclusive"))

    @property
    def steps_alone(self) -> int:
        """First steps of the student without a DMD term: in rCM it begins where the derivative's share has grown to 1."""
        args = self.args
        return args.tangent_warmup_steps if args.dmd_weight and args.consistency == "continuous" else 0

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        """A micro-batch of the present turn. Gradients stay local until the last one of the step."""
        (model if self._apart is None else self.model).train()  # what FSDP shards beside it may be a frozen teacher
        if self._micro_step == 0:  # the Trainer clears the gradients of its model only, and copies are not inside it
            for parameter in itertools.chain(*self.clip_groups()):
                parameter.grad = None
            if self.is_deepspeed_enabled:
                self._local_gradients.enter_context(self.deepspeed.coalesce_grad_reduction())
        inputs, skipped = self.prepare_batch(inputs), self.num_skipped_batches
        roles, share, total, x = self.turn(), 1 / self.current_gradient_accumulation_steps, 0.0, None
        for role in roles:
            with self.policies.active(role):
                # a weight that was cast in a rollout without gradient must be cast again where there is one
                with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
                    loss, x = self.student_loss(inputs) if role == "student" else self.fake_loss(inputs, x)
                kept = self.finite_or_skip(loss, inputs["sample_ids"], 1 / len(roles))
                self.means.add(f"loss/{role}", loss if kept is loss else loss * torch.nan)
                loss = kept * share
                self.policies.require(role)
                self.backward(loss.float(), last=False)
            total += loss.detach()
        if self.num_skipped_batches > skipped and self.streams is not None:
            self.streams.drop(self._micro_step)  # a video that is broken stays so
        self._micro_step += 1
        if self.accelerator.sync_gradients:
            self._micro_step = 0
            self.exchange_gradients(roles, check=self.num_skipped_batches == skipped)
        return total

    def exchange_gradients(self, roles: tuple[str, ...], check: bool = True) -> None:
        """
        Average the gradients of a step's roles over all processes, in one message a role. FSDP has done so already.

        By hand: a step has any number of forwards without a backward, and weights without gradients, both of which
        DistributedDataParallel's own exchange does not take. It never starts, as its forward is not called.

        Raises:
            `RuntimeError`: If a trained role has no gradient, or exactly none, or another role has one.
        """
        self.policies.check_gradients(*roles)
        for role in roles:
            parameters = list(self.policies.parameters(role).values())
            parameters = [p for p in parameters if p.grad is not None or not self.is_deepspeed_enabled]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            if self.args.world_size > 1 and not self.is_fsdp_enabled:
                flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
                for parameter, gradient, part in zip(
                    parameters, gradients, flat.split([g.numel() for g in gradients]), strict=True
                ):
                    gradient.copy_(part.view_as(gradient))
                    if parameter.grad is None:
                        parameter.grad = gradient
            if check and not any(bool(whole((g != 0).sum())) for g in gradients):
                raise RuntimeError(
                    f"the gradient of the role {role!r} is exactly zero at step {self.state.global_step + 1}: its forward does "
                    "not depend on its weights"
                )

    # ---- Loss ----

    def student_loss(self, inputs: dict) -> tuple[Tensor, Tensor | None]:
        """The student's loss, and the sample it was computed on, where there is one."""
        args, sources = self.args, generators(inputs["draws"], self.args.device)
        if args.loss_type == "ode_regression":
            return self._regression_loss(inputs, sources), None
        if args.loss_type == "consistency":
            of_clips = self._discrete_loss if args.consistency == "discrete" else self._continuous_loss
            loss = of_clips(inputs, sources)
            if not args.dmd_weight or self.state.global_step < self.steps_alone:
                return loss, None
            matching, x = self._matching_loss(inputs, sources)
            return loss + args.dmd_weight * matching, x
        return self._matching_loss(inputs, sources)

    def _matching_loss(self, inputs: dict, sources: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """DMD (https://huggingface.co/papers/2311.18828, eq. 7) or SiD (https://huggingface.co/papers/2404.04057)."""
        args = self.args
        x, mask = self.rollout(inputs, sources, grad=torch.is_grad_enabled())
        free, sigma = inputs["condition"].free(x.device), self.score_sigma(sources)
        noise = randn(x.shape[1:], sources)
        if args.loss_type == "sid":  # its gradient flows through both scores, and into neither's weights
            x_s = flow.add_noise(x, noise, sigma)
            fake, real = self._fake_x0(x_s, sigma, inputs), self._teacher_x0(x_s, sigma, inputs)
            loss = dm.sid_loss(x, fake, real, mask=mask, free=free)
        else:
            with torch.no_grad():
                x_s = flow.add_noise(x, noise, sigma)
                fake, real = self._fake_x0(x_s, sigma, inputs), self._teacher_x0(x_s, sigma, inputs)
            loss = dm.dmd_loss(x, fake, real, mask=mask, free=free)
            counted = torch.ones_like(x) * (1 if mask is None else mask) * (1 if free is None else free)
            squares = counted * dm.dmd_gradient(x, fake, real, free).square()
            self.means.add("dmd_gradient", torch.sqrt(squares.flatten(1).sum(1) / counted.flatten(1).sum(1)))
        self.means.generated(x)
        return loss, x.detach()

    def fake_loss(self, inputs: dict, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Flow matching of the fake score on samples of the student."""
        if x is None:
            sources = generators(inputs["draws"], self.args.device)
            with torch.no_grad(), self.policies.active("student"):
                x, _ = self.rollout(inputs, sources, grad=False)
            self.means.generated(x)
        else:  # other noise than what x was made of
            sources = generators([draw_seed(draw) for draw in inputs["draws"]], self.args.device)
        sigma, noise = self.score_sigma(sources), randn(x.shape[1:], sources)
        condition = self.rollout_condition(inputs)
        velocity = self._velocity("fake", flow.add_noise(x, noise, sigma), sigma, condition)
        error = dm.critic_loss(velocity, x, noise, self.video_model.native_weight(sigma), condition.free(x.device))
        self.means.add_by_sigma("critic_loss", sigma, error)
        return error.mean(), x

    def _discrete_loss(self, inputs: dict, sources: list[torch.Generator]) -> Tensor:
        """f(x_n) = f(x_{n+1}) along one step of the teacher (https://huggingface.co/papers/2303.01469, eq. 7; LCM; dCM)."""
        args = self.args
        clean, condition = self._clean(inputs, sources), inputs["condition"]
        noise = randn(clean.shape[1:], sources)
        index = self._draw_index(clean, sources, args.teacher_steps)  # (B,), or (B, f) with one for each block
        grid = self.noise_levels(torch.linspace(1, 0, args.teacher_steps + 1)[:-1]).to(clean.device)
        grid = torch.cat([grid, grid.new_zeros(1)])
        sigma, sigma_next = grid[index], grid[index + 1]
        x = condition.with_fixed(_mix(clean, noise, sigma))
        with torch.no_grad():
            velocity = self._teacher_velocity(x, sigma, inputs, clean)
            x_next = x + _frames(sigma_next - sigma) * velocity
            with self._target_weights():
                target = self._student_x0(x_next, sigma_next, condition, clean)
            # at the end f is the identity, whatever the model says (what an image gives has no velocity there)
            target = torch.where(_frames(sigma_next) > 0, target, x_next)
        prediction = self._student_x0(x, sigma, condition, clean)
        return cm.consistency_loss(prediction, target, args.consistency_weighting, condition.free(x.device))

    def _continuous_loss(self, inputs: dict, sources: list[torch.Generator]) -> Tensor:
        """sCM in rCM's form (https://huggingface.co/papers/2510.08431): the derivative along the teacher's trajectory."""
        args, model = self.args, self.video_model
        clean, condition = self._clean(inputs, sources), inputs["condition"]
        noise = randn(clean.shape[1:], sources)
        mean, std = args.time_distribution
        t = torch.atan(torch.exp(mean + std * randn((1,), sources)[:, 0])).clamp(1e-3, torch.pi / 2 - 1e-3)
        t = t if model.per_sample_sigma else t[:1].expand(len(t))
        sigma = cm.trig_sigma(t)
        x_t = cm.trig_latents(flow.add_noise(clean, noise, sigma), sigma)
        with torch.no_grad():
            velocity = self._teacher_velocity(cm.flow_latents(x_t, t), sigma, inputs, clean)
            teacher_F = cm.trig_velocity_from_flow(x_t, velocity, t)
        function = cm.trig_function(lambda x, s: self._velocity("student", x, s, condition))
        tangent = cm.jvp_tangent if args.tangent == "jvp" else cm.finite_difference_tangent
        tangent = tangent(function, x_t, t, teacher_F)
        r = min(1.0, (self.state.global_step + 1) / args.tangent_warmup_steps)
        return cm.scm_loss(function(x_t, t), teacher_F, tangent, x_t, t, r=r, free=condition.free(x_t.device))

    def _regression_loss(self, inputs: dict, sources: list[torch.Generator]) -> Tensor:
        """From a point of the teacher's trajectory to its end (CausVid, https://huggingface.co/papers/2412.07772, eq. 6)."""
        names = trajectory_names(inputs["index"], inputs["condition"])
        together = self.is_sharded and any(gather_object([bool(self.trajectories.missing(names))]))
        states = self.trajectories.get(names, lambda which: self._teacher_trajectories(inputs, which), together)
        states = states.to(self.args.device)
        clean = states[:, -1]
        index = self._draw_index(clean, sources, len(self.sigmas))
        sigma = torch.tensor(self.sigmas, device=clean.device)[index]
        if index.ndim == 1:
            x = states[torch.arange(len(states)), index]
        else:  # every frame from its own state
            x = states.gather(1, index[:, None, None, :, None, None].expand(-1, 1, *clean.shape[1:]))[:, 0]
        condition = inputs["condition"]
        prediction = self._student_x0(condition.with_fixed(x), sigma, condition, clean)
        return cm.ode_regression_loss(prediction, clean, sigma, condition.free(x.device))

    # ---- What the student generates ----

    def rollout(self, inputs: dict, sources: list[torch.Generator], grad: bool) -> tuple[Tensor, Tensor | None]:
        """
        A sample of the student, with gradient through its exit step.

        Returns:
            `tuple`: Clean latents (B, C, f, h, w), and a mask (1, 1, f, 1, 1) of the frames that are judged (`None`: all).
        """
        args, condition = self.args, inputs["condition"]
        if args.rollout == "data" and args.loss_type != "consistency":  # whose DMD term is on samples from noise
            clean = self._clean(inputs, sources)
            noise = randn(clean.shape[1:], sources)
            index = self._draw_index(clean, sources, len(self.sigmas))
            sigma = torch.tensor(self.sigmas, device=clean.device)[index]
            with torch.set_grad_enabled(grad):
                x = condition.with_fixed(_mix(clean, noise, sigma))
                return self._student_x0(x, sigma, condition, clean), None
        # one exit for the micro-batches of a step and for all processes
        exit_step = random.Random(draw_seed(args.seed, self.state.global_step)).randrange(len(self.sigmas))
        exit_step = exit_step if self.model.training else len(self.sigmas) - 1
        if self.causal is None:
            return self._few_steps(condition, sources, exit_step, grad), None
        return self._stream_window(inputs, sources, exit_step, grad)

    def _few_steps(self, condition: Condition, sources, exit_step: int | None = None, grad: bool = False) -> Tensor:
        """All frames at once."""
        shape = condition.latent_shape
        with self.policies.active("student", frozen=not grad) as denoiser:
            return few_step_rollout(
                self.video_model, condition, randn(shape, sources), self.sigmas, draw=lambda step: randn(shape, sources),
                sampler=self.args.sampler, exit_step=exit_step, grad=grad, denoiser=denoiser,
            )  # fmt: skip

    def _blocks(self, condition, num_frames: int, cache: KVCache, sources, exit_step=None, grad=False) -> Tensor:
        """`num_frames` latent frames after those in `cache`."""
        args, (c, _, h, w) = self.args, condition.latent_shape
        block = (c, args.frames_per_block, h, w)
        with self.policies.active("student", frozen=not grad) as denoiser, torch.set_grad_enabled(grad):
            blocks = causal_rollout(
                self.video_model, self.causal, condition, randn((c, num_frames, h, w), sources), self.sigmas,
                frames_per_block=args.frames_per_block, draw=lambda number, step: randn(block, sources),
                context_noise=args.context_noise, cache=cache, exit_step=exit_step, grad_frames=num_frames if grad else 0,
                sampler=args.sampler, denoiser=denoiser,
            )  # fmt: skip
            return torch.cat(list(blocks), 2)

    def _stream_window(self, inputs, sources, exit_step: int, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Self Forcing (https://huggingface.co/papers/2506.08009, algorithm 1), upon a video of earlier steps LongLive's."""
        args, streams, micro_step = self.args, self.streams, self._micro_step
        cache = KVCache(args.window, args.sink)
        stream = streams.next(micro_step, inputs["index"]) if streams is not None else None
        if stream is None:
            x = self._blocks(inputs["condition"], inputs["condition"].latent_shape[1], cache, sources, exit_step, grad)
            if streams is not None:
                streams.begin(micro_step, inputs["index"], x, draw_seed(args.seed, self.state.global_step, micro_step))
            return x, None
        condition = self.rollout_condition(inputs)
        self._remember(stream, cache, condition, sources)
        new = self._blocks(condition, streams.new_frames, cache, sources, exit_step, grad)
        before = self._as_first_frame(stream.tail)[:, :, -args.stream_overlap :]
        streams.extend(micro_step, new)
        mask = torch.ones(1, 1, args.stream_overlap + streams.new_frames, 1, 1, device=new.device)
        mask[:, :, : args.stream_overlap] = 0  # frames of an earlier step are context
        return torch.cat([before, new], 2), mask

    def rollout_condition(self, inputs: dict, name: str = "condition") -> Condition:
        """The condition of what was rolled out: the batch's, unless a video of earlier batches is continued."""
        stream = self.streams.streams.get(self._micro_step) if self.streams is not None else None
        if stream is None or name not in inputs or stream.rows == inputs["index"]:
            return inputs.get(name)
        dataset = self.train_dataset.dataset
        stored = [Condition.from_state(*dataset[row][name]) for row in stream.rows]
        return Condition.cat(stored).to(self.args.device)

    @torch.no_grad()
    def _remember(self, stream: Stream, cache: KVCache, condition: Condition, sources) -> None:
        """Keys and values of what a stream's next block sees, with the present weights and under the present prompt."""
        args, start = self.args, stream.position - stream.tail.shape[2]
        with self.policies.active("student", frozen=True) as denoiser:
            for first, latents in ((0, stream.sink[:, :, :start]), (start, stream.tail)):
                cache.num_frames = first
                for block in latents.split(args.frames_per_block, 2) if latents.shape[2] else ():
                    if args.context_noise:
                        block = flow.add_noise(block, randn(block.shape[1:], sources), args.context_noise)
                    with self.causal.cached(cache, store=True):
                        self.video_model.velocity(block, args.context_noise, condition, denoiser=denoiser)

    @torch.no_grad()
    def _as_first_frame(self, tail: Tensor) -> Tensor:
        """Teachers know windows that begin with the latent of one image: make the overlap's first latent such a one."""
        if not self.video_model.family.frame_offset:
            return tail
        overlap, tail = self.args.stream_overlap, tail.clone()
        seen = tail[:, :, : tail.shape[2] - overlap + 1][:, :, -DECODED_FRAMES:]
        videos = self.video_model.decode(seen)
        first, _ = self.video_model.encode([video[-1:] for video in videos])
        tail[:, :, -overlap] = first[:, :, 0]
        return tail

    # ---- Roles as functions ----

    def _velocity(
        self, role: str, x: Tensor, sigma: Tensor, condition: Condition, clean: Tensor | None = None
    ) -> Tensor:
        """A role's velocity; of clips (`clean`), a causal model sees the context that `causal` says."""
        args, frozen = self.args, role != self.policies.current or self.policies.frozen
        model, causal = self.video_model, self.causal
        if role == "teacher":
            model, causal = self.teacher, self.teacher_causal
        with self.policies.active(role, frozen=frozen) as denoiser:
            if clean is None or args.causal is None:
                return model.velocity(x, sigma, condition, denoiser=denoiser)
            if args.causal == "diffusion_forcing":
                with causal.block_causal(args.frames_per_block):
                    return model.velocity(x, sigma, condition, denoiser=denoiser)
            both, levels = torch.cat([clean, x], 2), torch.cat([torch.zeros_like(sigma), sigma], 1)
            with causal.teacher_forcing(args.frames_per_block):
                return model.velocity(both, levels, condition, denoiser=denoiser)[:, :, clean.shape[2] :]

    def _student_x0(self, x: Tensor, sigma: Tensor, condition: Condition, clean: Tensor) -> Tensor:
        return x - _frames(sigma) * self._velocity("student", x, sigma, condition, clean)

    def _fake_x0(self, x: Tensor, sigma: Tensor, inputs: dict) -> Tensor:
        return x - _frames(sigma) * self._velocity("fake", x, sigma, self.rollout_condition(inputs))

    def _teacher_x0(self, x: Tensor, sigma: Tensor, inputs: dict) -> Tensor:
        return x - _frames(sigma) * self._teacher_velocity(x, sigma, inputs)

    def _teacher_velocity(self, x: Tensor, sigma: Tensor, inputs: dict, clean: Tensor | None = None) -> Tensor:
        """Guided, in the standard form; upon `clean` a causal teacher's, else that of whole clips."""
        scale = self.args.teacher_guidance_scale
        name = "teacher_condition" if "teacher_condition" in inputs else "condition"
        condition = self.rollout_condition(inputs, name)
        conditional = self._velocity("teacher", x, sigma, condition, clean)
        if scale == 1.0:
            return conditional
        negative = self.rollout_condition(inputs, "negative_condition") or self._negatives[condition.latent_shape]
        return dm.guided(conditional, self._velocity("teacher", x, sigma, negative, clean), scale)

    # ---- Noise levels and data ----

    def score_sigma(self, sources: list[torch.Generator]) -> Tensor:
        """One noise level a sample, (B,), at which the scores are compared and the fake score is trained."""
        u = torch.cat([torch.rand(1, generator=source, device=source.device) for source in sources])
        sigma = self.noise_levels(u).clamp(*self.args.score_range)
        return sigma if self.video_model.per_sample_sigma else sigma[:1].expand(len(sigma))

    def _draw_index(self, clean: Tensor, sources: list[torch.Generator], number: int) -> Tensor:
        """Indices below `number`: one a sample, (B,), or for causal students one a block, spread over its frames, (B, f)."""
        blocks = 1 if self.args.causal is None else clean.shape[2] // self.args.frames_per_block
        index = torch.stack([torch.randint(number, (blocks,), generator=s, device=s.device) for s in sources])
        if self.args.causal is not None:
            return index.repeat_interleave(self.args.frames_per_block, 1)
        return index[:, 0] if self.video_model.per_sample_sigma else index[:1, 0].expand(len(index))

    def _clean(self, inputs: dict, sources: list[torch.Generator]) -> Tensor:
        """Latents of the batch's clips, drawn from their posterior."""
        return inputs["mean"] + inputs["std"] * randn(inputs["mean"].shape[1:], sources)

    def _target_weights(self):
        return self.average.swapped_in() if self.args.consistency_target == "ema" else contextlib.nullcontext()

    def _teacher_trajectories(self, inputs: dict, which: list[int]) -> Tensor:
        """The teacher's Euler trajectories of some samples, at the student's noise levels and 0: (n, S + 1, C, f, h, w)."""
        args, shape, rows = self.args, inputs["condition"].latent_shape, [inputs["index"][i] for i in which]
        inputs = {name: value[which] for name, value in inputs.items() if isinstance(value, Condition)}
        grid, where = trajectory_grid(args.denoising_steps, args.teacher_steps)
        sigmas = [*self.noise_levels(grid[:-1]).tolist(), 0.0]
        x = randn(shape, generators([draw_seed(args.seed, row) for row in rows], args.device))
        x, states = inputs["condition"].with_fixed(x * self.video_model.noise_scale(sigmas[0])), []
        with torch.no_grad():
            for i, sigma in enumerate(sigmas):
                if i in where:
                    states.append(x)
                if sigma > 0:
                    level = torch.full((len(x),), sigma, device=x.device)
                    x = x + (sigmas[i + 1] - sigma) * self._teacher_velocity(x, level, inputs)
        return torch.stack(states, 1)


def _frames(sigma: Tensor) -> Tensor:
    """(B,) or (B, f) to a shape that broadcasts over latents (B, C, f, h, w)."""
    return sigma.reshape(len(sigma), 1, -1, 1, 1)


def _mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma with one noise level a sample (B,) or a frame (B, f)."""
    return torch.lerp(clean, noise, _frames(sigma).expand_as(clean))
