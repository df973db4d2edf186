"""Prompts in the order in which generations use them, and encoded."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator

import datasets
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from transformers.utils import logging

from ..data import BucketSampler
from ..data.video import condition_image, load_image
from ..models import Condition, VideoModel
from .grpo_config import VideoGRPOConfig
from .loading import condition_kwargs


logger = logging.get_logger(__name__)

MAX_KEPT = 1024  # prompts whose encoded text is kept on the CPU


class GenerationSampler(Sampler):
    """
    Batches of (epoch, generation, micro-step, group, row) for one process.

    Args:
        num_rows (`int`): Size of the dataset. Every row is used at least once per epoch.
        num_groups (`int`): Prompts per generation, over all processes.
        repeats (`int`): Micro-steps of a generation.
        groups (`range`): Those that this process has a part in.
        seed (`int`): Of the order.
        shuffle (`bool`): Else the dataset's order.
    """

    def __init__(self, num_rows: int, num_groups: int, repeats: int, groups: range, seed: int, shuffle: bool):
        self.order = BucketSampler([0] * num_rows, batch_size=num_groups, seed=seed, shuffle=shuffle)
        self.num_groups, self.repeats, self.groups = num_groups, repeats, groups

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self.order.set_epoch(epoch)

    @property
    def generations_per_epoch(self) -> int:
        """Number of rollouts of an epoch."""
        return len(self.order) // self.num_groups

    def __len__(self) -> int:
        return self.generations_per_epoch * self.repeats

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int, int]]]:
        rows = list(self.order)
        for generation in range(self.generations_per_epoch):
            chosen = rows[generation * self.num_groups : (generation + 1) * self.num_groups]
            for micro_step in range(self.repeats):
                yield [(self.order.epoch, generation, micro_step, g, chosen[g]) for g in self.groups]


def members_here(args: VideoGRPOConfig) -> list[range]:
    """Of each group of a generation, the members that this process samples: equally many videos everywhere."""
    here = args.num_prompts * args.num_generations // args.world_size
    first = args.process_index * here
    bounds = [
        (max(0, first - g * args.num_generations), min(args.num_generations, first + here - g * args.num_generations))
        for g in range(args.num_prompts)
    ]
    return [range(low, max(low, high)) for low, high in bounds]


def generation_sampler(args: VideoGRPOConfig, num_rows: int) -> GenerationSampler:
    """The order in which a run's generations use the rows of its dataset, as this process sees it."""
    mine = [g for g, members in enumerate(members_here(args)) if members]
    return GenerationSampler(
        num_rows,
        args.num_prompts,
        repeats=args.steps_per_generation * args.num_iterations,
        groups=range(mine[0], mine[-1] + 1),
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.shuffle_dataset,
    )


class PromptRows(torch.utils.data.Dataset):
    """Rows of the dataset, together with the sampler's key."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[tuple[int, ...], dict]:
        return key, self.dataset[key[-1]]


def missing_images(model: VideoModel, dataset: Dataset) -> str:
    """What to tell a user whose prompts have no images."""
    return (
        f"{type(model.pipe).__name__} starts from an image: give the dataset a column image (PIL images, paths or an "
        f"Image feature); its columns are {', '.join(dataset.column_names)}"
    )


def prompts_with_images(dataset: Dataset, model: VideoModel) -> Dataset:
    """
    The rows that the model can start from: for image-to-video those whose image can be read, for others all.

    Args:
        dataset (`Dataset`): With standard columns. An unreadable image costs one warning and its row.
        model ([`VideoModel`]): What is trained.

    Raises:
        `ValueError`: If an image-to-video model gets no images; says which column is missing.
    """
    if not model.family.image:  # a column for the rewards, like any other
        if isinstance(dataset.features.get("image"), datasets.Image):
            dataset = dataset.cast_column("image", datasets.Image())
        return dataset
    if "image" not in dataset.column_names:
        raise ValueError(missing_images(model, dataset))
    readable = []
    for i, image in enumerate(dataset["image"]):
        try:
            load_image(image)
        except ValueError as error:
            logger.warning(f"prompt skipped: row {i}: {error}")
        else:
            readable.append(i)
    if not readable:
        raise ValueError("no image of the dataset can be read; the warnings above say why")
    return dataset if len(readable) == len(dataset) else dataset.select(readable)


def prompt_loader(dataset: Dataset, sampler: GenerationSampler, num_workers: int) -> DataLoader:
    """Rows in a sampler's order; the global generator is left alone."""
    return DataLoader(
        PromptRows(dataset),
        batch_sampler=sampler,
        collate_fn=as_given,
        num_workers=num_workers,
        generator=torch.Generator(),
    )


class EncodedPrompts:
    """
    What the denoiser gets for rows of a dataset, encoded once per prompt (and image) and kept on the CPU.

    Args:
        args ([`VideoGRPOConfig`]): Size, negative prompt, and what the pipeline is told besides.
        model ([`VideoModel`]): Encodes.
    """

    def __init__(self, args: VideoGRPOConfig, model: VideoModel):
        self.args, self.model = args, model
        self.kept: OrderedDict[tuple, Condition] = OrderedDict()

    def image(self, row: dict) -> Image.Image | None:
        """The image that the videos of a row start from, at their size; `None` for text-to-video models."""
        args = self.args
        return condition_image(row["image"], args.height, args.width) if self.model.family.image else None

    def encode(self, prompt: str, image: Image.Image | None = None, negative: bool = False) -> Condition:
        """Encode a prompt at the run's size."""
        args, kwargs = self.args, condition_kwargs(self.args)
        size = args.height, args.width, args.num_frames
        return self.model.condition(prompt, *size, image=image, negative=negative, **kwargs)

    def condition(self, key: int, row: dict, negative: bool = False) -> Condition:
        """Of a row of the dataset and its number there; `negative` for the other branch of guidance."""
        prompt = self.args.negative_prompt if negative else row["prompt"]
        name = (prompt, negative, key if self.model.family.image else None)
        if name not in self.kept:
            self.kept[name] = self.encode(prompt, self.image(row), negative).to("cpu")
            if len(self.kept) > MAX_KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(name)
        return self.kept[name]


def row_of_prompt(dataset: Dataset, prompt: str, index: int) -> dict:
    """The first row with a prompt; where there is none, that of the index, around the end of the dataset."""
    prompts = list(dataset["prompt"])
    return dataset[prompts.index(prompt) if prompt in prompts else index % len(prompts)]


def summary_of_prompts(prompts: list[str]) -> dict[str, int | str]:
    """What two datasets must share for a run to go on with the other one's."""
    digest = hashlib.sha256(json.dumps(prompts).encode())
    return {"num_prompts": len(prompts), "sha256 of prompts": digest.hexdigest()[:16]}


def as_given(rows: list) -> list:
    """Collate nothing: the trainer takes rows as they are. A function, so that spawned workers can be given it."""
    return rows
