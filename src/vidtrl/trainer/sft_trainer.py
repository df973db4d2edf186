"""Supervised fine-tuning of video diffusion models by flow matching.

Flow matching (https://huggingface.co/papers/2210.02747, eq. 23; https://huggingface.co/papers/2209.03003, eq. 1): with
clean latents x0, noise e and noise level sigma in [0, 1], the denoiser v(x_sigma, sigma, text) learns the velocity of the
straight path x_sigma = (1 - sigma) x0 + sigma e:

    loss = E  w(sigma) || v(x_sigma, sigma, text) - (e - x0) ||^2.

Where sigma falls decides what is learned; sampling and weighting follow https://huggingface.co/papers/2403.03206 (SD3),
section 3.1. Models trained by DDPM (CogVideoX, Allegro) are trained in the same coordinates with the weight that makes
this their native loss. Left out: second-moment reparametrisations, stochastic interpolants other than the straight path.
"""

import os

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..diffusion import flow
from .clip_data import ClipTrainer, collate
from .draws import DrawDataset, draw_seed, generators, randn
from .sft_config import VideoSFTConfig


STRATA = tuple(i / 10 for i in range(1, 10))  # noise levels of the held-out loss
NUM_BINS = 5  # of the training loss, by sigma


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
        self._bins = torch.zeros(2, NUM_BINS, device=args.device)  # sum of errors and number of samples, by sigma

    @property
    def caption_dropout(self) -> float:
        return self.args.caption_dropout

    # ---- Loss ----

    def sample_sigma(self, draws: list[int], latent_shape: tuple[int, int, int, int]) -> Tensor:
        """One noise level per sample, (B,) float32, within the range of the expert in training."""
        sigmas = []
        for source in generators(draws):
            sigma = None
            while sigma is None:  # rejection: an expert of two is trained where it is used
                u = flow.sample_u(self.args.sigma_sampling, 1, source)
                candidate = self.video_model.training_sigma(u, latent_shape, self.args.shift).clamp(min=1e-4)
                if self.video_model.expert(candidate.item()) == self.denoiser_name:
                    sigma = candidate
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

        x_sigma = flow.add_noise(x0, noise, sigma)
        velocity = self.video_model.velocity(x_sigma, sigma, condition, denoiser=model)
        error = (velocity.float() - flow.velocity_target(x0, noise)).square().flatten(1).mean(1)  # (B,)
        weight = self.video_model.native_weight(sigma) * flow.loss_weight(self.args.loss_weighting, sigma)
        loss = (weight * error).mean()

        self._count_in_bins(sigma, error.detach())
        loss = self.finite_or_skip(loss, inputs["sample_ids"])
        return (loss, {"error": error, "sigma": sigma}) if return_outputs else loss

    def _count_in_bins(self, sigma: Tensor, error: Tensor) -> None:
        index = (sigma * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        good = error.isfinite()
        self._bins[0].index_add_(0, index, torch.where(good, error, 0))
        self._bins[1].index_add_(0, index, good.float())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            total, count = self.accelerator.reduce(self._bins.clone(), reduction="sum").tolist()
            for i in range(NUM_BINS):
                if count[i]:
                    low, high = i / NUM_BINS, (i + 1) / NUM_BINS
                    logs[f"loss_sigma_{low:.1f}-{high:.1f}"] = total[i] / count[i]
            self._bins.zero_()
        super().log(logs, start_time)

    # ---- Held-out loss by noise level: the same noise for the same clip, every time ----

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, DrawDataset):
            dataset = DrawDataset(self.prepare_dataset(dataset, "eval"))
        args, batches = self.args, []
        for bucket in sorted(set(dataset.buckets)):
            members = [i for i, b in enumerate(dataset.buckets) if b == bucket]
            keys = [(i, draw_seed(args.seed, i)) for i in members]
            size = args.per_device_eval_batch_size
            batches += [keys[start : start + size] for start in range(0, len(keys), size)]
        # every process runs equally many batches (sharded weights need that); surplus ones do not count
        surplus = [[(i, -1) for i, _ in batches[0]]] * (-len(batches) % args.world_size)
        mine = (batches + surplus)[args.process_index :: args.world_size]
        return DataLoader(
            dataset,
            batch_sampler=mine,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # else each evaluation would advance the generator of training
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        Mean velocity error at each of nine noise levels, with posterior mean and fixed noise for each clip.

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
                    x_sigma = flow.add_noise(x0, noise, sigma)
                    velocity = self.video_model.velocity(x_sigma, sigma, condition, denoiser=model)
                    error = (velocity.float() - flow.velocity_target(x0, noise)).square().flatten(1).mean(1)
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
