"""Model cards for what vidtrl trains."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {"build_model_card": ".model_card"}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from .model_card import build_model_card
