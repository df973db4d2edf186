"""Exponential moving average of the trainable weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class WeightAverage:
    """
    Exponential moving average of a module's trainable weights, kept in float32 next to them.

    With `n` updates behind it, an update uses `min(decay, (1 + n) / (10 + n))`, so that a short run does not
    average in its start. Of weights that FSDP shards, each process averages its own share.

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
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    def refresh(self) -> None:
        """Start again if others (FSDP's shards) were put in the place of the weights."""
        present = dict(self.module.named_parameters())
        if any(present[name] is not parameter for name, parameter in self.parameters.items()):
            assert self.num_updates == 0
            self.parameters = {name: present[name] for name in self.parameters}
            self.reset()

    @torch.no_grad()
    def update(self) -> None:
        """Average in the module's present weights."""
        self.move(1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)))
        self.num_updates += 1

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Move the average by `share` of the way to the module's present weights; 1 makes them equal."""
        torch._foreach_lerp_(_local(self.average), _local(self.parameters), share)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights with the average."""
        self._fill(self.average)

    def _fill(self, weights: dict[str, Tensor]) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a forward has gathered and kept would not change with its shards
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The module holds the average inside this context, and its own weights again after it."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                self._fill(own)


def _local(weights: dict[str, Tensor]) -> list[Tensor]:
    """What this process holds of them."""
    return [w.to_local() if isinstance(w, DTensor) else w for w in weights.values()]
