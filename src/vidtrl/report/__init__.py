"""Self-contained HTML reports: before/after videos, metrics with intervals, learning curves."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "Chart": ".html",
    "Clip": ".html",
    "Gallery": ".html",
    "Metric": ".html",
    "Stage": ".html",
    "write_report": ".html",
    "Estimate": ".intervals",
    "mean_interval": ".intervals",
    "paired_difference": ".intervals",
    "share_interval": ".intervals",
}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:
    from .html import Chart, Clip, Gallery, Metric, Stage, write_report
    from .intervals import Estimate, mean_interval, paired_difference, share_interval
