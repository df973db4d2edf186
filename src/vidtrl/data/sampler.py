"""A sampler whose batches hold clips of one shape."""

import torch
from torch.utils.data import Sampler


class BucketSampler(Sampler[int]):
    """
    Yield indices so that every consecutive `batch_size * num_processes` of them belong to one bucket.

    So all processes work on one shape in one step, and none waits for another's longer clip. A bucket whose size is not a
    multiple is filled up with its own clips, drawn anew in each epoch. Every clip is seen at least once per epoch. The
    order depends on `seed` and the epoch only, so a resumed run sees what it would have seen.

    Args:
        buckets (`list[int]`): The bucket of each item, such as [`CachedDataset`]`.buckets`.
        batch_size (`int`): Per process.
        num_processes (`int`, *optional*, defaults to `1`): Processes that share each step.
        seed (`int`, *optional*, defaults to `0`): Seed of the order.
        shuffle (`bool`, *optional*, defaults to `True`): `False` keeps the dataset's order within a bucket.

    Example:

    ```python
    >>> sampler = BucketSampler([0, 0, 1, 0], batch_size=2)
    >>> list(sampler)  # two batches of bucket 0, one of bucket 1
    ```
    """

    def __init__(self, buckets, batch_size: int, num_processes: int = 1, seed: int = 0, shuffle: bool = True):
        self.buckets = torch.as_tensor(list(buckets), dtype=torch.long)
        self.group = batch_size * num_processes
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        if self.group < 1:
            raise ValueError(f"batch_size and num_processes must be positive, got {batch_size} and {num_processes}")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; `accelerate` calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        counts = torch.bincount(self.buckets) if len(self.buckets) else torch.zeros(0)
        return sum(-(-int(n) // self.group) * self.group for n in counts)

    def __iter__(self):
        # a large odd multiplier keeps (seed, epoch) pairs apart
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        groups = []
        for bucket in self.buckets.unique().tolist():
            members = (self.buckets == bucket).nonzero().flatten()
            if self.shuffle:
                members = members[torch.randperm(len(members), generator=generator)]
            missing = -len(members) % self.group
            if missing:
                rounds = -(-missing // len(members))
                extra = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
                members = torch.cat([members, members[torch.cat(extra)[:missing]]])
            groups += members.split(self.group)
        order = torch.randperm(len(groups), generator=generator) if self.shuffle else range(len(groups))
        for i in order:
            yield from groups[i].tolist()
