"""Several policies on one frozen base: adapters (or modules) as roles.

A role is what a training algorithm calls by name: policy, reference, student, fake score, teacher. With adapters, all of them
share one base and switching is a matter of flags. Two mistakes are silent without care, and are why this file exists:

- PEFT's switches also flip `requires_grad`. A backward pass while another role is active leaves the weights that were to be
  trained without a gradient, and raises nothing. [`Roles.require`] and [`Roles.check_gradients`] do.
- Gradient checkpointing runs the forward again in the backward pass, under whatever role is active then: wrong gradients.
  [`checkpoint_under`] remembers what was active and puts it back.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint


@dataclass
class Role:
    """
    One policy.

    Args:
        module (`nn.Module`): What is called.
        adapters (`tuple[str, ...]` or `None`): Those that are on while it is called, one upon the other; `None` for a module
            that carries none.
        parameters (`dict[str, nn.Parameter]`): What of it is trained, by name; empty for a frozen role.
        owners (`list[tuple[nn.Module, str]]`, *optional*): Where those stand that FSDP shards: a module and an attribute.
    """

    module: nn.Module
    adapters: tuple[str, ...] | None
    parameters: dict[str, nn.Parameter]
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)


class HasSnapshot(Protocol):
    """State that a forward pass depends on and that a recomputation must find again."""

    def snapshot(self) -> Callable[[], contextlib.AbstractContextManager]: ...


class Roles:
    """
    Policies by name. Exactly one is active; outside every `active` block it is the first that was added.

    Inside `active(role)`, the role's own weights require gradients and those of all other roles do not.

    Example:

    ```python
    >>> roles = Roles()
    >>> roles.add("student", model, adapters=("default",), trained=True)
    >>> roles.add("fake", model, adapters=("fake",), trained=True)
    >>> roles.add("teacher", model, adapters=())
    >>> with roles.active("student") as denoiser:
    ...     loss = compute_loss(denoiser)
    ...     loss.backward()
    ```
    """

    def __init__(self):
        self._roles: dict[str, Role] = {}
        self._layers: dict[int, list[BaseTunerLayer]] = {}  # of each module that carries adapters
        self._current: tuple[str, bool] = ("", False)  # name, frozen

    def add(
        self, name: str, module: nn.Module, adapters: tuple[str, ...] | None = None, *, trained: bool = False
    ) -> None:
        """
        Add a role; call it again for a module after further adapters were injected.

        Args:
            name (`str`): Its name.
            module (`nn.Module`): What to call.
            adapters (`tuple[str, ...]`, *optional*): Adapters of `module` that make the role, `()` for its bare base.
            trained (`bool`, *optional*, defaults to `False`): Train the last of the adapters, or without adapters the module.
        """
        parameters = {}
        if trained and adapters is not None:
            parameters = {n: p for n, p in module.named_parameters() if f".{adapters[-1]}." in f"{n}."}
            assert parameters, f"{type(module).__name__} has no adapter {adapters[-1]!r}"
        elif trained:
            parameters = dict(module.named_parameters())
        self._roles[name] = Role(module, adapters, parameters)
        self._layers[id(module)] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        self._switch(*(self._current if self._current[0] else (name, False)))

    def __contains__(self, name: str) -> bool:
        return name in self._roles

    def adapters(self, name: str) -> tuple[str, ...]:
        """The adapters that are on in a role, one upon the other."""
        return self._roles[name].adapters or ()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trained weights of a role, by their names in its module."""
        return self._roles[name].parameters

    def refresh(self) -> None:
        """Find all trained weights again by their names, after others (FSDP's shards) were put in their place."""
        for role in self._roles.values():
            present = dict(role.module.named_parameters())
            role.parameters = {name: present[name] for name in role.parameters}
            paths = [name.rpartition(".") for name, p in role.parameters.items() if isinstance(p, DTensor)]
            role.owners = [(role.module.get_submodule(path), name) for path, _, name in paths]

    @property
    def current(self) -> str:
        """The active role."""
        return self._current[0]

    @property
    def frozen(self) -> bool:
        """Whether the active role's weights get no gradient."""
        return self._current[1]

    @contextlib.contextmanager
    def active(self, name: str, *, frozen: bool = False) -> Iterator[nn.Module]:
        """
        Make a role active, and yield the module to call.

        Args:
            name (`str`): The role.
            frozen (`bool`, *optional*, defaults to `False`): Its own weights get no gradient either; gradients still flow
                through it to its inputs.
        """
        before = self._current
        if before == (name, frozen):  # PEFT's switches take time, and may not run inside torch.func
            yield self._roles[name].module
            return
        self._switch(name, frozen)
        try:
            yield self._roles[name].module
        finally:
            self._switch(*before)

    def _switch(self, name: str, frozen: bool) -> None:
        role = self._roles[name]
        if role.adapters is not None:
            for layer in self._layers[id(role.module)]:
                layer.enable_adapters(bool(role.adapters))
                if role.adapters:
                    layer.set_adapter(list(role.adapters))
                for adapter_layers in layer.adapter_layer_names:
                    getattr(layer, adapter_layers).requires_grad_(False)
        for other in self._roles.values():
            trained = other is role and not frozen
            for parameter in other.parameters.values():
                parameter.requires_grad_(trained)
            # what stands in the module may be gathered at present, and is another tensor then
            for owner, attribute in other.owners:
                getattr(owner, attribute).requires_grad_(trained)
        self._current = name, frozen

    @contextlib.contextmanager
    def training(self, *names: str) -> Iterator[None]:
        """
        Weights require gradients inside if they are trained ones of certain roles. No forward may run inside.

        Args:
            *names (`str`): The roles; none means all.
        """
        for name, role in self._roles.items():
            for parameter in role.parameters.values():
                parameter.requires_grad_(not names or name in names)
        try:
            yield
        finally:
            self._switch(*self._current)

    def snapshot(self) -> Callable[[], contextlib.AbstractContextManager]:
        """The active role, as a context that makes it active again."""
        name, frozen = self._current
        return lambda: self.active(name, frozen=frozen)

    def require(self, name: str) -> None:
        """
        Call it before a backward pass that is to train a role.

        Raises:
            `RuntimeError`: If another role is active, or the role is frozen: its weights would get no gradient, silently.
        """
        if self._current != (name, False):
            state = f"{self.current!r}{' (frozen)' if self._current[1] else ''}"
            raise RuntimeError(
                f"backward for the role {name!r} while {state} is active: its weights would get no gradient. Run "
                f"forward and backward inside roles.active({name!r})"
            )

    def check_gradients(self, *names: str) -> None:
        """
        Call it after the backward passes of a step.

        Raises:
            `RuntimeError`: If none of a role's weights has a gradient, or one of another role has.
        """
        for name, role in self._roles.items():
            got = any(p.grad is not None for p in role.parameters.values())
            if role.parameters and got != (name in names):
                raise RuntimeError(
                    f"the role {name!r} {'has gradients in a step that trains' if got else 'got no gradient in a step for'} "
                    f"{', '.join(names)}: forward and backward did not run under the same role"
                )


def checkpoint_under(*states: HasSnapshot) -> Callable:
    """
    A function for `denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=...)` that recomputes a block under the
    state of its forward pass, whatever is active at the time of the backward pass.

    Args:
        *states: [`Roles`], [`CausalAttention`] and whatever else a forward pass depends on.

    Returns:
        `Callable`: Takes a function and its arguments, as `torch.utils.checkpoint.checkpoint` does.
    """

    def run(function, *args, **kwargs):
        snapshots = [state.snapshot() for state in states]

        @contextlib.contextmanager
        def recompute():
            with contextlib.ExitStack() as stack:
                for again in snapshots:
                    stack.enter_context(again())
                yield

        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), recompute()),
            **kwargs,
        )

    return run
