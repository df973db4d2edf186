"""Callbacks of the video trainers: progress, weight average, validation videos, TensorBoard."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from ..data.video import read_video, write_video
from .ema import WeightAverage


if TYPE_CHECKING:
    from .base_trainer import VideoTrainer


class VideoProgressCallback(TrainerCallback):
    """
    Progress bar with loss, clips per second and time left. Added by default; `disable_tqdm=True` leaves it out.

    Example:

    ```python
    >>> trainer.remove_callback(VideoProgressCallback)
    ```
    """

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_local_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None:
            return
        shown = {name: f"{logs[name]:.4f}" for name in ("loss", "eval_loss") if name in logs}
        if "clips_per_second" in logs:
            shown["clips/s"] = f"{logs['clips_per_second']:.2f}"
        if shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EMACallback(TrainerCallback):
    """
    Update a [`~vidtrl.trainer.ema.WeightAverage`] after each optimizer step. Added by `ema_decay`.

    Args:
        average (`WeightAverage`): What to update.
        updates (`Callable[[int], int]`, *optional*): How many of a run's first so many steps change the averaged weights; the
            others do not count. Default: all.
    """

    def __init__(self, average: WeightAverage, updates: Callable[[int], int] = int):
        self.average, self.updates = average, updates

    def on_step_end(self, args, state, control, **kwargs):
        number = self.updates(state.global_step)
        if number > self.updates(state.global_step - 1) and number % args.ema_update_steps == 0:
            self.average.update()

    def on_train_end(self, args, state, control, **kwargs):
        if self.updates(state.global_step) % args.ema_update_steps:  # what was learned since then counts too
            self.average.update()


class StepCallback(TrainerCallback):
    """
    Take an optimizer step where the Trainer leaves it to others, after gradients were clipped.

    Args:
        step (`Callable`): Takes it.
    """

    def __init__(self, step: Callable[[], None]):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.step()


class SyncReferenceCallback(TrainerCallback):
    """
    Move the reference policy `ref_model_mixup_alpha` of the way to the trained one every `ref_model_sync_steps` optimizer
    steps (https://huggingface.co/papers/2404.09656). Added by `sync_ref_model`.

    Args:
        reference (`WeightAverage`): What to move.
    """

    def __init__(self, reference: WeightAverage):
        self.reference = reference

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.move(args.ref_model_mixup_alpha)


class ValidationVideoCallback(TrainerCallback):
    """
    Generate videos before training and every `validation_steps`, always from the same seeds, with the stock pipeline.

    They are written to `output_dir/validation/step_000100/00-a-red-circle.mp4` (with a `prompts.json`) and logged to
    whichever of trackio, wandb and TensorBoard `report_to` names. Added by `validation_steps`.

    Args:
        trainer ([`VideoTrainer`]): Whose weights to sample.
        prompts (`list[str]`): One video each.
    """

    def __init__(self, trainer: "VideoTrainer", prompts: list[str]):
        self.trainer = trainer
        self.prompts = prompts

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.run(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.validation_steps == 0:
            self.run(args, state)

    def run(self, args, state) -> Path:
        """Generate, write and log the videos of the present step; returns their directory."""
        trainer = self.trainer
        everything = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # sharded: all ranks in every forward
        rank, world = (0, 1) if everything else (args.process_index, args.world_size)
        mine = range(rank, len(self.prompts), world)
        images = [trainer.validation_image(i) for i in mine]
        videos = trainer.generate_videos(
            [self.prompts[i] for i in mine],
            seeds=[args.validation_seed + i for i in mine],
            images=images if images and images[0] is not None else None,
        )
        folder = Path(args.output_dir, "validation", f"step_{state.global_step:06d}")
        names = [f"{i:02d}-{slug(prompt)}.mp4" for i, prompt in enumerate(self.prompts)]
        if not everything or args.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for i, video in zip(mine, videos, strict=True):
                write_video(folder / names[i], video, fps=trainer.validation_fps())
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (folder / "prompts.json").write_text(json.dumps(dict(zip(names, self.prompts, strict=True)), indent=2))
            log_videos(
                "validation",
                [folder / name for name in names],
                self.prompts,
                step=state.global_step,
                report_to=args.report_to,
                callbacks=trainer.callback_handler.callbacks,
            )
        return folder


class VideoTensorBoardCallback(TensorBoardCallback):
    """The Trainer's TensorBoard callback without its call of `model.config.to_json_string`, which diffusers lacks."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is not None:
            self.tb_writer.add_text("model_config", json.dumps(dict(model.config), default=str, indent=2))


def use_video_callbacks(trainer: "VideoTrainer") -> None:
    """Put callbacks that know videos in the place of the Trainer's own, and add the one for validation videos if asked for."""
    args = trainer.args
    # the Trainer's TensorBoard callback needs a transformers configuration
    tensorboard = trainer.pop_callback(TensorBoardCallback)
    if tensorboard is not None:
        trainer.add_callback(VideoTensorBoardCallback(tensorboard.tb_writer))
    trainer.pop_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(VideoProgressCallback())
    if args.validation_steps is not None:
        trainer.add_callback(ValidationVideoCallback(trainer, trainer.validation_prompts()))


def exported_states(callbacks: Sequence[Any]) -> dict[str, dict | list[dict]]:
    """What callbacks want to find again when a run resumes, as the Trainer keeps it: a list where several share a class."""
    states: dict[str, list[dict]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: s[0] if len(s) == 1 else s for name, s in states.items()}


def log_videos(
    name: str,
    paths: Sequence[Path],
    captions: Sequence[str],
    *,
    step: int,
    report_to: Sequence[str],
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """
    Hand written videos to the active trackers. Call on the main process only.

    Args:
        name (`str`): Group under which the trackers show them, such as `"validation"`.
        paths (`Sequence[Path]`): mp4 files.
        captions (`Sequence[str]`): One a file.
        step (`int`): Optimizer steps done.
        report_to (`Sequence[str]`): As in the training arguments; trackio and wandb get the files.
        callbacks (`Sequence[TrainerCallback]`, *optional*): The trainer's. TensorBoard, which shows no mp4, gets frame
            strips through the writer of its callback.
    """
    if "trackio" in report_to:
        import trackio

        videos = [trackio.Video(str(p), caption=caption) for p, caption in zip(paths, captions, strict=True)]
        trackio.log({f"{name}/{i}": video for i, video in enumerate(videos)}, step=step)
    if "wandb" in report_to:
        import wandb

        videos = [wandb.Video(str(p), caption=c, format="mp4") for p, c in zip(paths, captions, strict=True)]
        wandb.log({f"{name}/videos": videos, "train/global_step": step})
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for i, (path, caption) in enumerate(zip(paths, captions, strict=True)):
                # numbered tags stay few where captions change from step to step
                callback.tb_writer.add_image(f"{name}/{i}", frame_strip(read_video(path).float() / 255), step)
                callback.tb_writer.add_text(f"{name}/{i}", caption, step)


def slug(prompt: str) -> str:
    """The first words of a prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "video"


def frame_strip(video: Tensor, num_frames: int = 8) -> Tensor:
    """Evenly spaced frames of a video (F, C, H, W) side by side, (C, H, n W): TensorBoard shows no mp4."""
    index = torch.linspace(0, len(video) - 1, min(num_frames, len(video))).round().long()
    return torch.cat(list(video[index]), dim=-1)
