"""Supervised fine-tuning of video diffusion models by flow matching.

Flow matching (https://huggingface.co/papers/2210.02747, eq. 23; https://huggingface.co/papers/2209.03003, eq. 1): with
clean latents x0, noise e and noise level sigma in [0, 1], the denoiser v(x_sigma, sigma, text) learns the velocity of the
straight path x_sigma = (1 - sigma) x0 + sigma e:

    loss = E  w(sigma) || v(x_sigma, sigma, text) - (e - x0) ||^2.

Where sigma falls decides what is learned; sampling and weighting follow https://huggingface.co/papers/2403.03206 (SD3),
section 3.1. Models trained by DDPM (CogVideoX, Allegro) are trained in the same coordinates with the weight that makes
this their native loss. Left out: second-moment reparametrisations, stochastic interpolants other than the straight path.

With `causal`, the model learns to generate block after block of frames. Every block draws its own sigma, and attends to
what lies before it: clean (teacher forcing, as in Causal Forcing, https://huggingface.co/papers/2602.02214: one pass over
[clean | noisy]) or noisy itself (diffusion forcing, https://huggingface.co/papers/2407.01392: one block-causal pass). The
loss is the same, averaged over blocks. Left out: noise on the clean half.
"""

import inspect
import os
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..diffusion import flow
from ..diffusion.distribution_matching import training_weight
from ..models import CausalAttention, Condition, VideoModel
from ..rollout.causal import causal_rollout
from ..rollout.sampling import draw_noise
from .clip_data import ClipTrainer, collate
from .draws import generators, randn
from .sft_config import VideoSFTConfig


STRATA = tuple(i / 10 for i in range(1, 10))  # noise levels of the held-out loss
NUM_BINS = 5  # of the training loss, by sigma
CAUSAL_CARD = """## A causal model

It generates {frames_per_block} latent frames at a time, each block upon those before it ({causal} training). The
pipeline's own call lets all frames attend to each other, which is not what was trained; sample block by block instead:

```python
import torch
from vidtrl.models import CausalAttention, VideoModel
from vidtrl.rollout import causal_rollout

model = VideoModel(pipe)  # the pipeline with these weights, as above
condition = model.condition("a red circle moving right", height={height}, width={width}, num_frames={num_frames})
noise = torch.randn(1, *condition.latent_shape)
sigmas = model.sigmas(50, condition.latent_shape)[:-1].tolist()
blocks = causal_rollout(
    model, CausalAttention(model), condition, noise, sigmas, frames_per_block={frames_per_block}, sampler="ode"
)
video = model.decode(torch.cat(list(blocks), dim=2))[0]
```

"""


class VideoSFTTrainer(ClipTrainer):
    """
    Supervised fine-tuning: LoRA, DoRA or all weights of any supported diffusers video pipeline.

    Args:
        model (`str`, `PathLike` or `DiffusionPipeline`):
            Hub id, local path, or a loaded pipeline. Not copied: it carries the trained weights afterwards.
        args ([`VideoSFTConfig`], *optional*):
            Configuration. Default: `VideoSFTConfig` with an `output_dir` named after the model.
        train_dataset (`Dataset` or `IterableDataset`):
            Columns `prompt` and `video` (or their aliases), optionally `image` and `fps`; see the data guide.
        eval_dataset (`Dataset`, `IterableDataset` or a dict of them, *optional*):
            Held-out clips for the loss by noise level.
        callbacks (`list[TrainerCallback]`, *optional*):
            Added to the default ones.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler; default: AdamW and what `args` says.
        quantization_config (*optional*):
            A diffusers quantisation configuration, used while loading `model` (an id or path).
        peft_config (`LoraConfig`, *optional*):
            Train an adapter. Without `target_modules`: every Linear layer inside the repeated blocks. `None` trains all
            weights of the denoiser.

    Raises:
        `TypeError`, `ValueError`: For arguments that do not fit, with the fix in the message.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from vidtrl import VideoSFTConfig, VideoSFTTrainer

    trainer = VideoSFTTrainer(
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        args=VideoSFTConfig("wan-sft", height=480, width=832, num_frames=81, fps=16, max_steps=1000),
        train_dataset=load_dataset("videofolder", data_dir="clips", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=32),
    )
    trainer.train()
    trainer.save_model()
    video = trainer.pipe("a red circle moving right").frames[0]
    ```

    A causal model (`args.causal`) is sampled block by block: by [`~vidtrl.rollout.causal_rollout`], or by
    `trainer.generate_videos`, which makes the validation videos. `trainer.pipe(prompt)` is the stock pipeline, in which all
    frames attend to each other, and does not show what was learned.
    """

    _name = "SFT"
    _tag_names = ["vidtrl", "sft"]

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        args: VideoSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = type(model).__name__ if isinstance(model, DiffusionPipeline) else os.fspath(model)
            args = VideoSFTConfig(f"{name.rstrip('/').split('/')[-1]}-SFT")
        if not isinstance(args, VideoSFTConfig):
            raise TypeError(f"args must be a VideoSFTConfig, not {type(args).__name__}")
        if train_dataset is None:
            raise ValueError("train_dataset is required: a datasets.Dataset with the columns prompt and video")
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            data_collator=collate,
        )
        self.strata = [s for s in STRATA if self.sigma_range[0] <= s < self.sigma_range[1]] or [
            sum(self.sigma_range) / 2
        ]
        # sum of errors and number of samples: by sigma, then by expert
        self._bins = torch.zeros(2, NUM_BINS + len(self.denoiser_names), device=args.device)

    @property
    def caption_dropout(self) -> float:
        return self.args.caption_dropout

    # ---- Causal models ----

    def _load_model(self, *args) -> VideoModel:
        model = super()._load_model(*args)
        self.causal = None if self.args.causal is None else CausalAttention(model)
        if self.causal is not None and self.args.num_frames is not None:
            latent_frames = model.latent_shape(self.args.num_frames, model.pixel_multiple, model.pixel_multiple)[1]
            self.causal.check_frames(latent_frames, self.args.frames_per_block)
        return model

    def forward_states(self) -> list:
        return super().forward_states() + ([] if self.causal is None else [self.causal])

    def frame_rule(self) -> tuple[int, int]:
        multiple, offset = super().frame_rule()
        if self.causal is None:
            return multiple, offset
        blocks = self.args.frames_per_block
        return multiple * blocks, offset + multiple * (blocks - 1)

    def generate_videos(self, prompts, seeds, images=None, batch_size=1, **overrides) -> list[Tensor]:
        """
        Sample the weights in training, one video per prompt: with the stock pipeline; causal ones block by block.

        Args:
            prompts (`list[str]`): What to generate.
            seeds (`list[int]`): One seed per prompt.
            images (`list`, *optional*): One image per prompt, for image-to-video models.
            batch_size (`int`, *optional*, defaults to `1`): Videos per pipeline call or rollout.
            **overrides: Arguments of the pipeline, in place of those that validation videos use; of a causal model,
                `num_inference_steps` and `guidance_scale`.

        Returns:
            `list[torch.Tensor]`: float32 tensors (F, C, H, W) in [0, 1] on the CPU.
        """
        if self.causal is None:
            return super().generate_videos(prompts, seeds, images, batch_size, **overrides)
        args, model, videos = self.args, self.video_model, []
        height, width, num_frames = self.validation_shape()
        stock = inspect.signature(type(model.pipe).__call__).parameters
        given = {
            "num_inference_steps": args.validation_num_inference_steps,
            "guidance_scale": args.validation_guidance_scale,
        }
        given = {name: stock[name].default if value is None else value for name, value in given.items()} | overrides
        if unknown := sorted(overrides.keys() - {"num_inference_steps", "guidance_scale"}):
            raise ValueError(
                f"{', '.join(unknown)} cannot be set: a causal model is not sampled by its pipeline, and takes "
                "num_inference_steps and guidance_scale only"
            )
        guidance_scale = given["guidance_scale"]
        with self.sampling():
            size = dict(height=height, width=width, num_frames=num_frames)
            negative = None
            if guidance_scale != 1.0:
                negative = self.condition({"prompt": ""}, **size, negative=True)
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                condition = Condition.cat(
                    [self.condition({"prompt": p, "fps": args.fps}, **size) for p in prompts[part]]
                )
                shape = condition.latent_shape
                blocks = causal_rollout(
                    model,
                    self.causal,
                    condition,
                    draw_noise(len(condition), shape, [torch.Generator().manual_seed(s) for s in seeds[part]]),
                    model.sigmas(given["num_inference_steps"], shape)[:-1].tolist(),
                    frames_per_block=args.frames_per_block,
                    sampler="ode",
                    negative_condition=negative,
                    guidance_scale=guidance_scale,
                    denoiser=self.model_wrapped if self.is_fsdp_enabled else None,
                )
                videos += [video.cpu() for video in model.decode(torch.cat(list(blocks), 2))]
        return videos

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.causal is not None and self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            height, width, num_frames = self.validation_shape()
            section = CAUSAL_CARD.format(
                causal=self.args.causal.replace("_", " "),
                frames_per_block=self.args.frames_per_block,
                height=height,
                width=width,
                num_frames=num_frames,
            )
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("## Training\n", f"{section}## Training\n", 1), encoding="utf-8")

    # ---- Loss ----

    def sample_sigma(self, draws: list[int], latent_shape: tuple[int, int, int, int]) -> Tensor:
        """
        One noise level per sample, (B,) float32; causal: per block, (B, blocks).

        Those of a batch lie in the range of one expert: the one in training, or of two the one that the first falls to.
        """
        if self.causal is not None:
            blocks = latent_shape[1] // self.args.frames_per_block
            u = torch.stack([flow.sample_u(self.args.sigma_sampling, blocks, s) for s in generators(draws)])
            return self.video_model.training_sigma(u, latent_shape, self.args.shift).clamp(min=1e-4)
        sigmas, wanted = [], self.denoiser_names
        for source in generators(draws):
            sigma = None
            while sigma is None:  # rejection: an expert of two is trained where it is used
                u = flow.sample_u(self.args.sigma_sampling, 1, source)
                candidate = self.video_model.training_sigma(u, latent_shape, self.args.shift).clamp(min=1e-4)
                if (expert := self.video_model.expert(candidate.item())) in wanted:
                    sigma, wanted = candidate, [expert]
            sigmas.append(sigma)
        sigma = torch.cat(sigmas)
        # a family whose denoiser cannot mix noise levels gets one per micro-batch
        return sigma if self.video_model.per_sample_sigma else sigma[:1].expand(len(sigma))

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        mean, std, condition = self.clean_latents(inputs)
        sources = generators(inputs["draws"], mean.device)
        x0 = mean + std * randn(mean.shape[1:], sources)
        noise = randn(mean.shape[1:], sources)
        sigma = self.sample_sigma(inputs["draws"], condition.latent_shape).to(x0.device)

        error = self.velocity_error(model, x0, noise, sigma, condition)
        weight = self.video_model.native_weight(sigma) * self.loss_weight(sigma, condition.latent_shape)
        loss = (weight * error).mean()

        self._count_in_bins(sigma.flatten(), error.detach().flatten())
        loss = self.finite_or_skip(loss, inputs["sample_ids"])
        return (loss, {"error": error, "sigma": sigma}) if return_outputs else loss

    def loss_weight(self, sigma: Tensor, latent_shape: tuple[int, int, int, int]) -> Tensor:
        """What `loss_weighting` says of noise levels (any shape), of clips of a shape (C, f, h, w)."""
        if self.args.loss_weighting != "bell":
            return flow.loss_weight(self.args.loss_weighting, sigma)
        # its mean is 1 over the noise levels of this run's shift, which is where 1/2 goes
        middle = float(self.video_model.training_sigma(torch.tensor([0.5]), latent_shape, self.args.shift))
        return training_weight(sigma, shift=middle / (1 - middle))

    def velocity_error(
        self, model: nn.Module, x0: Tensor, noise: Tensor, sigma: float | Tensor, condition: Condition
    ) -> Tensor:
        """Mean squared error of the velocity per clip over what is not given, (B,); of a causal model per block, (B, blocks)."""
        target = flow.velocity_target(x0, noise)
        if self.causal is None:
            x_sigma = flow.add_noise(x0, noise, sigma)
            velocity = self.video_model.velocity(x_sigma, sigma, condition, denoiser=self.by_expert(model))
            return flow.sample_mean((velocity.float() - target).square(), condition.free(x0.device))
        frames, length = x0.shape[2], self.args.frames_per_block
        self.causal.check_frames(frames, length)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x0.device).expand(len(x0), frames // length)
        sigma = sigma.repeat_interleave(length, 1)  # (B, f)
        level = sigma[:, None, :, None, None]
        latents = (1 - level) * x0 + level * noise
        if self.args.causal == "teacher_forcing":
            latents, sigma = torch.cat([x0, latents], 2), torch.cat([torch.zeros_like(sigma), sigma], 1)
            mode = self.causal.teacher_forcing(length)
        else:
            mode = self.causal.block_causal(length)
        with mode:
            velocity = self.video_model.velocity(latents, sigma, condition, denoiser=model)
        error = (velocity[:, :, -frames:].float() - target).square()
        return error.unflatten(2, (-1, length)).mean((1, 3, 4, 5))

    def _count_in_bins(self, sigma: Tensor, error: Tensor) -> None:
        index = (sigma * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        good = error.isfinite()
        self._bins[0].index_add_(0, index, torch.where(good, error, 0))
        self._bins[1].index_add_(0, index, good.float())
        if len(self.denoiser_names) > 1:
            expert = NUM_BINS + self.denoiser_names.index(self.video_model.expert(sigma[0].item()))
            self._bins[0, expert] += torch.where(good, error, 0).sum()
            self._bins[1, expert] += good.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            total, count = self.accelerator.reduce(self._bins.clone(), reduction="sum").tolist()
            for i in range(NUM_BINS):
                if count[i]:
                    low, high = i / NUM_BINS, (i + 1) / NUM_BINS
                    logs[f"loss_sigma_{low:.1f}-{high:.1f}"] = total[i] / count[i]
            for i, name in enumerate(self.denoiser_names, NUM_BINS):
                if count[i]:  # of two experts
                    logs[f"{name}/loss"] = total[i] / count[i]
            self._bins.zero_()
        super().log(logs, start_time)

    # ---- Held-out loss by noise level: the same noise for the same clip, every time ----

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        Mean velocity error at each of nine noise levels, with posterior mean and fixed noise for each clip. A causal model is
        evaluated as it is trained, with the same level in every block.

        Logged as `eval_loss_sigma_0.1` to `0.9` (trackers show `eval/loss_sigma_0.1`); `eval_loss` is their mean.
        """
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        training = model.training
        model.eval()
        errors = torch.zeros(len(self.strata) + 1, dtype=torch.float64, device=self.args.device)  # last: clips
        with self.averaged_weights(), self.accelerator.autocast():
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
                x0, _, condition = self.clean_latents(inputs)
                draws = inputs["draws"]
                noise = randn(x0.shape[1:], generators([max(draw, 0) for draw in draws], x0.device))
                counts = torch.tensor([draw >= 0 for draw in draws], dtype=torch.float64, device=x0.device)
                for i, sigma in enumerate(self.strata):
                    error = self.velocity_error(model, x0, noise, sigma, condition).reshape(len(x0), -1).mean(1)
                    errors[i] += (error.double() * counts).sum()
                errors[-1] += counts.sum()
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(training)
        *errors, count = self.accelerator.reduce(errors, reduction="sum").tolist()
        by_sigma = [error / count for error in errors]
        metrics = {f"{metric_key_prefix}_loss": sum(by_sigma) / len(by_sigma)}
        for sigma, error in zip(self.strata, by_sigma, strict=True):
            metrics[f"{metric_key_prefix}_loss_sigma_{sigma:.2g}"] = error
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(count))
