"""What a distillation run logs besides the loss."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor


NUM_BINS = 5  # of the critic's loss, by sigma


class RunningMeans:
    """
    Sums and counts by name since the last log. Values stay on their device until then.

    Example:

    ```python
    >>> from vidtrl.trainer.distill_logging import RunningMeans

    >>> means = RunningMeans()
    >>> means.add("generated/mean", torch.tensor([0.0, 1.0]))
    ```
    """

    def __init__(self):
        self.sums: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        """Count every finite element of `values` once."""
        values = values.detach().double().flatten()
        good = values.isfinite()
        self.sums[name].append(torch.stack([torch.where(good, values, 0).sum(), good.double().sum()]))

    def add_by_sigma(self, name: str, sigma: Tensor, values: Tensor) -> None:
        """Count each finite one of `values` (B,) in the bin of its `sigma` (B,): `name_sigma_0.0-0.2` and so on."""
        index = (sigma * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        for i in range(NUM_BINS):
            name_of_bin = f"{name}_sigma_{i / NUM_BINS:.1f}-{(i + 1) / NUM_BINS:.1f}"
            self.add(name_of_bin, torch.where(index == i, values, torch.nan))

    def generated(self, x: Tensor) -> None:
        """Of clean latents (B, C, f, h, w): mean, standard deviation (saturation), and how much changes between frames."""
        x = x.detach().float()
        self.add("generated/mean", x.flatten(1).mean(1))
        self.add("generated/std", x.flatten(1).std(1))
        if x.shape[2] > 1:  # falls when motion collapses
            self.add("generated/temporal_difference", x.diff(dim=2).square().flatten(1).mean(1))

    def merge(self, other: "RunningMeans", weight: float = 1.0) -> None:
        """Add what another counted; with weight 0 only its names, which all processes must share."""
        for name, parts in other.sums.items():
            self.sums[name] += [part * weight for part in parts]

    def collect(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, and start again. Every process must call it, with the same names."""
        totals = {name: torch.stack(parts).sum(0) for name, parts in sorted(self.sums.items())}
        self.sums.clear()
        if not totals:
            return {}
        sums = accelerator.reduce(torch.stack(list(totals.values())), reduction="sum").tolist()
        return {name: total / count for name, (total, count) in zip(totals, sums, strict=True) if count}
