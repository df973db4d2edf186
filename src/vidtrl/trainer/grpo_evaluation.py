"""Evaluation of a GRPO run: the stock pipeline's own solver, fixed seeds, and rewards that training never sees."""

from typing import TYPE_CHECKING

from datasets import Dataset
from torch import Tensor

from .grpo_logging import nanstd, total_rewards


if TYPE_CHECKING:
    from .grpo_trainer import VideoGRPOTrainer


def evaluate_prompts(trainer: "VideoGRPOTrainer", dataset: Dataset) -> dict[str, float]:
    """
    Generate `num_generations_eval` videos of each prompt and score them; all processes share the work and must call it.

    Args:
        trainer ([`VideoGRPOTrainer`]): Whose weights to sample.
        dataset (`Dataset`): With standard columns.

    Returns:
        `dict[str, float]`: `rewards/{name}/mean` and `/std` of all reward functions, `reward` of those that training sees.
    """
    args, model = trainer.args, trainer.video_model
    total = len(dataset) * args.num_generations_eval
    padded = -(-total // args.world_size) * args.world_size  # equally many everywhere; surplus ones do not count
    mine = [i % total for i in range(args.process_index, padded, args.world_size)]
    read = {i: dataset[i] for i in {i // args.num_generations_eval for i in mine}}  # each row once
    rows = [read[i // args.num_generations_eval] for i in mine]
    images = {i: trainer.image(row) for i, row in read.items()}
    with model.guidance(args.guidance_scale) as guidance:
        if args.guidance_scale != 1.0 and args.negative_prompt:
            guidance = {**guidance, "negative_prompt": args.negative_prompt}
        videos = trainer.generate_videos(
            [row["prompt"] for row in rows],
            seeds=[args.validation_seed + i for i in mine],
            images=[images[i // args.num_generations_eval] for i in mine] if model.family.image else None,
            # not every image-to-video pipeline takes lists of images
            batch_size=1 if model.family.image else args.per_device_eval_batch_size,
            num_inference_steps=args.eval_num_inference_steps,
            **guidance,
        )
    runner = trainer.eval_rewards
    handle = trainer._submit(runner, rows, [video.to(args.device) for video in videos])
    local = runner.collect(handle).to(args.device)
    gathered = trainer.accelerator.gather(local).view(args.world_size, len(mine), -1).transpose(0, 1)
    rewards: Tensor = gathered.flatten(0, 1)[:total].cpu()
    metrics = {}
    for i, name in enumerate(runner.names):
        metrics[f"rewards/{name}/mean"] = rewards[:, i].nanmean().item()
        metrics[f"rewards/{name}/std"] = nanstd(rewards[:, i]).item()
    trained = rewards[:, : len(trainer.rewards.names)]
    metrics["reward"] = total_rewards(trained, trainer.rewards.weights).nanmean().item()
    return metrics
