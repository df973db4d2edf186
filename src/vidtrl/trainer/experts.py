"""Models with two denoisers, one for high and one for low noise (Wan 2.2 A14B): trained together, one of them on the device.

A two-expert model is one model whose weights depend on the noise level: its loss is the plain one, and each sample trains
the expert that its sigma falls to. What an optimizer step does to each expert:

- A micro-batch goes to one expert. The gradient of a step is that of the mean over all its micro-batches, as ever.
- An expert to which nothing went in a step, on any process, has no gradient (`None`, not zero): AdamW leaves its weights and
  its moments alone, instead of decaying them and moving on by momentum. Each expert so counts its own steps.
"""

from collections.abc import Callable, Iterable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


_HOOKS: WeakKeyDictionary = WeakKeyDictionary()  # denoiser -> handle of its hook
EXPERTS = {"high": "transformer", "low": "transformer_2"}  # by the noise they are used at


class Experts(nn.Module):
    """
    Both denoisers of a model as one module, for what takes one: `Trainer`, DDP, a weight average.

    Its weights are named `transformer.*` and `transformer_2.*`.

    Args:
        denoisers (`dict[str, nn.Module]`): By their names in the pipeline; bare or wrapped by PEFT.
        placed (`bool`, *optional*, defaults to `False`): Something else ([`ExpertSwap`]) decides what is on the device: `to`
            does nothing.
    """

    def __init__(self, denoisers: dict[str, nn.Module], placed: bool = False):
        super().__init__()
        for name, module in denoisers.items():
            self.add_module(name, module)
        self.placed = placed
        self.last = next(iter(denoisers))  # the one that was called last

    @property
    def config(self):
        """That of the first; both have the same shape."""
        return getattr(self, next(iter(self._modules))).config

    def to(self, *args, **kwargs) -> "Experts":
        return self if self.placed else super().to(*args, **kwargs)

    def forward(self, expert: str, **kwargs):
        """Call one of the denoisers with its own arguments."""
        self.last = expert
        return getattr(self, expert)(**kwargs)


def by_expert(model: nn.Module, names: Iterable[str]) -> dict[str, Callable]:
    """
    The denoisers in training as [`VideoModel.velocity`] takes them, so that each noise level calls its own.

    Args:
        model (`nn.Module`): What the `Trainer` holds: one denoiser, or [`Experts`]; bare or wrapped by DDP.
        names (`Iterable[str]`): Of the denoisers in training.
    """
    names = list(names)
    return {names[0]: model} if len(names) == 1 else {name: partial(model, name) for name in names}


class ExpertSwap:
    """
    Keeps the expert that was called last on the device, and the frozen weights of the other one on the CPU.

    A hook on each denoiser swaps them when the other one is called, by whomever. Weights in training stay on the device: of
    adapters, that is little; two experts whose weights are all trained both stay, and so do quantised ones, which not every
    backend can move. A graph that is still to be used must not span a call of the other expert.

    Args:
        denoisers (`dict[str, nn.Module]`): By name.
        device (`torch.device`): Where they compute.
        enabled (`bool`): `False` keeps both on the device.
    """

    def __init__(self, denoisers: dict[str, nn.Module], device: torch.device | str, enabled: bool = True):
        self.denoisers, self.device = denoisers, torch.device(device)
        self.enabled = enabled and len(denoisers) > 1
        self.current: str | None = None
        self.trained: set[int] = set()
        for name, module in denoisers.items():
            if module in _HOOKS:  # of an earlier trainer on the same pipeline
                _HOOKS.pop(module).remove()
            if self.enabled:
                _HOOKS[module] = module.register_forward_pre_hook(lambda *_, name=name: self.use(name))

    def use(self, name: str) -> None:
        """Bring an expert to the device. Does nothing if it is there."""
        if not self.enabled or name == self.current:
            return
        self.current = name
        for other, module in self.denoisers.items():
            if other != name:
                self._move(module, torch.device("cpu"))
        self._move(self.denoisers[name], self.device)

    def use_all(self) -> None:
        """Bring all of them to the device, until one is called."""
        self.current = None
        for module in self.denoisers.values():
            self._move(module, self.device)

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put weights that are trained on the device, for good."""
        for parameter in parameters:
            parameter.data = parameter.data.to(self.device)
            self.trained.add(id(parameter))

    def movable(self, module: nn.Module) -> list[Tensor]:
        """What a swap moves: the weights that are not trained, of plain tensors (quantised ones are not)."""
        return [
            tensor
            for tensor in [*module.parameters(), *module.buffers()]
            if id(tensor) not in self.trained
            and type(tensor) in (nn.Parameter, Tensor)
            and type(tensor.data) is Tensor
        ]

    def _move(self, module: nn.Module, device: torch.device) -> None:
        with torch.no_grad():
            for tensor in self.movable(module):
                tensor.data = tensor.data.to(device)
