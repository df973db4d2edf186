"""95 % intervals for what a report states: shares, means, and paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


Z = 1.959964  # two-sided 95 %
RESAMPLES = 4000


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def share_interval(hits: Sequence[bool]) -> Estimate:
    """
    Share of hits with its Wilson interval, which stays inside [0, 1] and is sound at 0 and 1, unlike the normal one.

    Args:
        hits (`Sequence[bool]`): One entry a sample.

    Returns:
        [`Estimate`]

    Raises:
        `ValueError`: If there is no sample.
    """
    n = len(hits)
    if n == 0:
        raise ValueError("share_interval() needs at least one sample")
    share = sum(bool(h) for h in hits) / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def mean_interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """
    Mean with its percentile-bootstrap interval (4000 resamples of the samples).

    Args:
        values (`Sequence[float]`): One entry a sample.
        seed (`int`, *optional*, defaults to `0`): Equal seeds give equal intervals.

    Returns:
        [`Estimate`]

    Raises:
        `ValueError`: If there is no sample or one is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(
            f"mean_interval() needs finite samples, got {x.size} of them, {np.sum(~np.isfinite(x))} not finite"
        )
    picks = np.random.default_rng(seed).integers(0, x.size, size=(RESAMPLES, x.size))
    low, high = np.percentile(x[picks].mean(1), [2.5, 97.5])
    return Estimate(float(x.mean()), float(low), float(high))


def paired_difference(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Estimate:
    """
    Mean of `after - before` over pairs (same prompt, same initial noise), bootstrapped over the pairs.

    Args:
        before (`Sequence[float]`): One entry a pair; booleans count as 0 and 1.
        after (`Sequence[float]`): As many entries, in the same order.
        seed (`int`, *optional*, defaults to `0`): Equal seeds give equal intervals.

    Returns:
        [`Estimate`]

    Raises:
        `ValueError`: If the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"paired_difference() needs pairs, got {len(before)} and {len(after)} samples")
    return mean_interval([float(a) - float(b) for b, a in zip(before, after, strict=True)], seed)
