"""Where in a model the first value appears that is not finite, forward or backward.

    with FirstBad(model) as watch:
        loss = model(batch)          # watch.found: the first in the forward pass, or None
        watch.look_at_loss(loss)
        loss.backward()              # or in the backward pass

Every module is hooked, so blocks take the path that calls each of their modules: equal to the usual
one but for rounding. A module that gets finite inputs and gives something else is the place; one
that gets other inputs than those before it gave points at what lies between them. A gradient goes
bad in the module whose output's gradient is finite and whose input's, or weight's, is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """A tensor with values that are not finite. `what` is of the module: "output", "input",
    "parameter weight", "gradient of its input"; `module` is "" for the model, "loss" for none."""

    backward: bool
    module: str
    kind: str  # the module's class
    what: str
    shape: tuple[int, ...]
    num_nan: int
    num_inf: int

    def __str__(self) -> str:
        whose = f"of {self.module or 'the model'} ({self.kind})" if self.kind else ""
        size = "x".join(map(str, self.shape)) or "one number"
        when = "backward" if self.backward else "forward"
        return (
            f"first in the {when} pass: the {self.what} {whose}, {size}, has {self.num_nan} NaN "
            f"and {self.num_inf} infinite values"
        )


class FirstBad:
    """Hooks on all modules and parameters of `model` while the context lasts."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._handles = model, []
        self._names = {module: name for name, module in model.named_modules()}
        # Of a tensor that modules give and take: what it is to each, in the order of the calls.
        self._roles: dict[int, list[tuple[nn.Module, str]]] = {}
        self._alive: list[Tensor] = []
        self.found: Finding | None = None
        self._backward = False

    def __enter__(self) -> "FirstBad":
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))
            for name, parameter in module.named_parameters(recurse=False):
                self._note(parameter, module, f"parameter {name}")
                if parameter.requires_grad:
                    self._hook(parameter, [(module, f"gradient of its parameter {name}")])
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._roles, self._alive = {}, []

    def look_at_loss(self, loss: Tensor) -> None:
        """Of the micro-batch whose forward pass is over."""
        self._note(loss, None, "loss, of finite outputs,")
        self._backward = True

    def next_batch(self) -> None:
        """The backward pass of this one is over."""
        self._backward, self._roles, self._alive = False, {}, []

    def look_at_gradients(self) -> None:
        """Of all micro-batches, added up."""
        self._backward = True
        for module in self._names:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.grad is not None:
                    self._note(parameter.grad, module, f"gradient of its parameter {name}, summed")

    def _before(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        for place, tensor in _tensors((args, kwargs)):
            self._seen(tensor, module, f"input {place}".rstrip(), "input")

    def _after(self, module: nn.Module, _args: tuple, output: Any) -> None:
        for place, tensor in _tensors(output):
            self._seen(tensor, module, f"output {place}".rstrip(), "output")

    def _seen(self, tensor: Tensor, module: nn.Module, what: str, role: str) -> None:
        if self._backward:  # computed again, of a block whose activations were not kept
            return
        self._note(tensor, module, what)
        if not tensor.requires_grad:
            return
        roles = self._roles.setdefault(id(tensor), [])
        if not roles:
            self._alive.append(tensor)  # so that no other gets its id
            self._hook(tensor, roles)
        roles.append((module, f"gradient of its {role}"))

    def _hook(self, tensor: Tensor, roles: list[tuple[nn.Module, str]]) -> None:
        def look(gradient: Tensor) -> None:
            # Whoever takes it is where its gradient was made; the innermost was called last.
            taken = [role for role in roles if role[1] != "gradient of its output"]
            module, what = (taken or roles)[-1]
            self._note(gradient, module, what)

        self._handles.append(tensor.register_hook(look))

    @torch.no_grad()
    def _note(self, tensor: Tensor, module: nn.Module | None, what: str) -> None:
        if self.found is not None or bool(torch.isfinite(tensor).all()):
            return
        kind = "" if module is None else type(module).__name__
        name = "loss" if module is None else self._names[module]
        counts = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
        self.found = Finding(self._backward, name, kind, what, tuple(tensor.shape), *counts)


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in whatever a module takes or gives, with where they are in it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield place, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _tensors(inner, f"{place} {name}".strip())
    elif isinstance(value, tuple | list):
        for number, inner in enumerate(value):
            yield from _tensors(inner, f"{place} {number}".strip())
