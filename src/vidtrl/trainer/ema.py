"""Exponential moving average of the trainable weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import copied, local, master, release


class WeightAverage:
    """
    Exponential moving average of a module's trainable weights, kept in float32 next to them.

    With `n` updates behind it, an update uses `min(decay, (1 + n) / (10 + n))`, so that a short run does not
    average in its start. Of weights that FSDP or ZeRO-3 shards, each process averages its own share.

    Args:
        module (`nn.Module`): Its parameters with `requires_grad` are averaged; they must be float32.
        decay (`float`): In (0, 1).

    Example:

    ```python
    >>> import torch
    >>> from vidtrl.trainer.ema import WeightAverage

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(layer, decay=0.9)
    >>> with torch.no_grad():
    ...     _ = layer.weight.fill_(1.0)
    >>> average.update()
    >>> with average.swapped_in():  # the layer holds the average here, and its own weights again afterwards
    ...     averaged = layer.weight.item()
    ```
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.module = module
        self.engine: Any = None  # DeepSpeed's, once it has the weights
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wrong = [name for name, p in self.parameters.items() if p.dtype != torch.float32]
        if wrong:
            raise ValueError(
                f"an average (ema_decay, or the old policy of a method) needs float32 trainable weights, but {wrong[0]} is {self.parameters[wrong[0]].dtype}; "
                "load the model in float32 (bf16=True still runs it under bfloat16 autocast)"
            )
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the module's present weights."""
        self.average = {name: copied(p) for name, p in self.parameters.items()}

    def refresh(self, engine: Any = None) -> None:
        """
        Start again if others (FSDP's shards, DeepSpeed's) were put in the place of the weights.

        Args:
            engine (`DeepSpeedEngine`, *optional*): That has them.
        """
        present = dict(self.module.named_parameters())
        if engine is not self.engine or any(present[name] is not p for name, p in self.parameters.items()):
            assert self.num_updates == 0
            self.engine, self.parameters = engine, {name: present[name] for name in self.parameters}
            self.reset()

    @torch.no_grad()
    def update(self) -> None:
        """Average in the module's present weights."""
        self.move(1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)))
        self.num_updates += 1

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Move the average by `share` of the way to the module's present weights; 1 makes them equal."""
        average, present = self.average.values(), self.parameters.values()
        torch._foreach_lerp_([local(a) for a in average], [master(p) for p in present], share)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights with the average."""
        self._fill(self.average)

    def _fill(self, weights: dict[str, Tensor]) -> None:
        release(self.module, self.engine)  # what a forward has gathered and kept would not change with its shards
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(weights[name]))

    @contextmanager
    def swapped_in(self) -> Iterator[dict[str, Tensor]]:
        """
        The module holds the average inside this context, and its own weights again after it.

        Yields this process's part of its own weights.
        """
        own = {name: local(p).detach().clone() for name, p in self.parameters.items()}
        self.copy_to_module()
        try:
            yield own
        finally:
            with torch.no_grad():
                self._fill(own)
