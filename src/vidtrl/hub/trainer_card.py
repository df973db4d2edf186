"""The card of a trainer's run."""

import dataclasses
import os
import shutil
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trainer.lora import ADAPTER_FILE, BaseAdapter, lora_loader
from ..trainer.sampling import sampling_arguments
from .model_card import build_model_card, is_hub_id, last_validation_videos, licence_of, training_settings
from .run_summary import evaluation, first_and_last, rewards, write_curves


if TYPE_CHECKING:
    from ..trainer.base_trainer import VideoTrainer


def write_card(
    trainer: "VideoTrainer",
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | Sequence[str] | None = None,
) -> None:
    """
    Write `README.md`, and the curves on it, into a trainer's `output_dir`. Makes no network call.

    Args:
        trainer ([`VideoTrainer`]): Whose run it is.
        model_name, dataset_name, tags: As in [`VideoTrainer.create_model_card`].
    """
    args, identity, history = trainer.args, trainer.model_identity, trainer.state.log_history
    repo_id = trainer.hub_model_id or args.hub_model_id or os.path.abspath(args.output_dir)
    base_model, usage = identity["name_or_path"], trainer.card_usage()
    settings = training_settings(args, trainer._name, trainer.state.global_step)
    card = build_model_card(
        repo_id=repo_id,
        model_name=model_name or os.path.basename(repo_id.rstrip("/")),
        base_model=base_model,
        pipeline_class=identity["pipeline"],
        denoiser_names=trainer.denoiser_names,
        denoiser_class=identity["denoiser_class"],
        adapter=trainer._adapter_summary(),
        method=trainer._name,
        lora_loader=lora_loader(trainer.video_model.pipe, trainer.video_model.denoisers[trainer.denoiser_name]),
        image=trainer.video_model.family.image,
        dataset_name=dataset_name,
        tags=[*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        settings=settings | _data(trainer) | _reward_weights(trainer),
        generation=_generation(trainer),
        fps=trainer.validation_fps(),
        sample_videos=last_validation_videos(args.output_dir),
        # a Hub id's licence is asked for when the card goes up
        license=None if not base_model or is_hub_id(base_model) else licence_of(base_model),
        base_adapters=[] if usage else bring_adapters(trainer.base_adapters, args.output_dir, repo_id),
        usage=usage,
        recipe=getattr(args, "recipe", None),
        rewards=first_and_last(rewards(history)),
        evaluation=first_and_last(evaluation(history)),
        curves=write_curves(args.output_dir, history),
    )
    card.save(os.path.join(args.output_dir, "README.md"))


def bring_adapters(adapters: Sequence[BaseAdapter], output_dir: str | os.PathLike, repo_id: str) -> list[BaseAdapter]:
    """
    Adapters of earlier stages that lie in local files are copied beside the one that was trained on them, so that the card's
    code runs wherever the directory goes. They get another name: of several `pytorch_lora_weights.safetensors` in a repository,
    in whatever folders, `load_lora_weights(id)` takes the first.

    Args:
        adapters (`Sequence[BaseAdapter]`): As they were loaded.
        output_dir (`str` or `PathLike`): The run's directory; they go into its `base_adapters/`.
        repo_id (`str`): Where the card's code loads from.

    Returns:
        `list[BaseAdapter]`: As the card's code loads them.
    """
    brought = []
    for i, one in enumerate(adapters):
        source = Path(one.source).expanduser()
        if source.exists():
            source = source if source.is_file() else source / (one.weight_name or ADAPTER_FILE)
            name = f"base_adapters/{i}/{one.denoiser}.safetensors"
            target = Path(output_dir, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or not target.samefile(source):
                partial = target.with_name(f"_{target.name}")
                shutil.copyfile(source, partial)
                partial.replace(target)
            one = dataclasses.replace(one, source=repo_id, weight_name=name)
        brought.append(one)
    return brought


def _generation(trainer: "VideoTrainer") -> dict[str, Any]:
    names = ("height", "width", trainer.video_model.family.frames_argument)
    return dict(zip(names, trainer.validation_shape(), strict=True)) | sampling_arguments(trainer.args)


def _data(trainer: "VideoTrainer") -> dict[str, Any]:
    dataset = trainer.train_dataset
    return {"training data": f"{len(dataset)} rows"} if isinstance(dataset, Sized) else {}


def _reward_weights(trainer: "VideoTrainer") -> dict[str, Any]:
    runner = getattr(trainer, "rewards", None)
    if runner is None:
        return {}
    weights = getattr(trainer.args, "reward_weights", None) or [1.0] * len(runner.names)
    return {"rewards": ", ".join(f"{w:g} x {name}" for name, w in zip(runner.names, weights, strict=True))}
