"""Randomness that belongs to a sample, not to a process: the key to resuming and splitting a batch without a trace."""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


def draw_seed(*key: int) -> int:
    """A 63-bit seed from a key such as (run seed, epoch, position)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class DrawSampler(Sampler[tuple[int, int]]):
    """
    Pair each index of another sampler with a seed that depends on run seed, epoch and position only.

    Everything random about a training sample (posterior, noise, sigma, caption dropout) is drawn from that seed. So it
    does not matter into how many micro-batches or processes a batch is split, or whether the run was interrupted.

    Args:
        sampler (`Sampler[int]`): Gives the order; its `set_epoch` is called if this one's is.
        seed (`int`): The run's seed.

    Example:

    ```python
    >>> sampler = DrawSampler(BucketSampler([0, 0, 0], batch_size=1), seed=42)
    >>> index, seed = next(iter(sampler))
    ```
    """

    def __init__(self, sampler: Sampler[int], seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order and seeds."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            yield index, draw_seed(self.seed, self.epoch, position)


class DrawDataset(Dataset):
    """
    A dataset indexed by what [`DrawSampler`] yields; the seed becomes the item's `draw`.

    Args:
        dataset (`CachedDataset` or `VideoDataset`): The clips.
        caption_dropout (`float`, *optional*, defaults to `0.0`): Share of samples that get the empty prompt.
    """

    def __init__(self, dataset: Any, caption_dropout: float = 0.0):
        self.dataset, self.caption_dropout = dataset, caption_dropout

    @property
    def buckets(self) -> list[int]:
        """The bucket of each item."""
        return self.dataset.buckets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, draw = key
        item = {**self.dataset[index], "draw": draw}
        if random.Random(draw).random() < self.caption_dropout:
            item["prompt"] = ""
            if "condition" in item:
                item["condition"] = self.dataset.empty_condition(index)
        return item


def generators(draws: list[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per sample."""
    return [torch.Generator(device).manual_seed(draw) for draw in draws]


def randn(shape: tuple[int, ...], sources: list[torch.Generator]) -> torch.Tensor:
    """Standard normal float32 (B, *shape), row i from generator i, on its device."""
    return torch.stack([torch.randn(shape, generator=source, device=source.device) for source in sources])
