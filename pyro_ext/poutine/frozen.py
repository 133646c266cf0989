"""Run a model whose networks are trained already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["FrozenMessenger", "frozen"]


def frozen(model: Callable[..., Any]) -> Callable[..., Any]:
    """
    Keep everything that a model has learned as it is.

    While the model runs, its parameters are constants and its modules are in evaluation mode, so
    that no gradient is computed for them, batch normalisation uses the statistics of training
    and leaves them alone, and dropout is off. ``pyro.param``, ``pyro.module`` and the parameters
    of a ``PyroModule`` are hidden from what is around the model: ``SVI`` does not hand them to
    its optimizer. When the run is over the modules are again as they were.

    Covered are all modules that the model calls, wherever it has them from, and those it is a
    method of. A bare tensor with ``requires_grad`` that is used outside of a module is not; it
    is not trained either, unless somebody gives it to an optimizer.

    :param model: a Pyro model with trained parts.
    :returns: a model with the same arguments.

    >>> from pyro_ext.poutine import frozen
    >>> decoder = torch.nn.Linear(2, 3)
    >>> def model(x):
    ...     pyro.module("decoder", decoder)
    ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)
    >>> trace = pyro.poutine.trace(frozen(model)).get_trace(torch.zeros(3))
    >>> trace.param_nodes, trace.log_prob_sum().requires_grad
    ([], False)
    """
    return FrozenMessenger(_module_behind(model))(model)


class FrozenMessenger(Messenger):
    """
    Handler behind :func:`frozen`.

    :param module: a module to freeze from the start, in addition to those that are called.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module
        self.switched_modules: list[nn.Module] = []
        """Modules that the latest run found in training mode."""
        self.hidden_params: set[str] = set()
        """Names of the parameters that the latest run has hidden."""
        self._thawed: list[Tensor] = []
        self._thread = 0
        self._hook: Any = None

    def __enter__(self) -> FrozenMessenger:
        super().__enter__()
        self.switched_modules, self._thawed, self.hidden_params = [], [], set()
        self._thread = threading.get_ident()
        self._hook = register_module_forward_pre_hook(self._before_module)
        if self.module is not None:
            self._freeze_module(self.module)
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        self._hook.remove()
        for tensor in self._thawed:
            tensor.requires_grad = True
        for module in self.switched_modules:
            module.training = True
        super().__exit__(exc_type, exc_value, traceback)

    def _before_module(self, module: nn.Module, inputs: Any) -> None:
        # other threads go on with what they do, and the innermost handler does the work
        if threading.get_ident() == self._thread and self._is_innermost():
            self._freeze_module(module)

    def _is_innermost(self) -> bool:
        inside = next((f for f in reversed(_PYRO_STACK) if isinstance(f, FrozenMessenger)), None)
        return inside is self

    def _freeze_module(self, module: nn.Module) -> None:
        for part in module.modules():
            if part.training:
                part.training = False
                self.switched_modules.append(part)
        for parameter in module.parameters():
            self._freeze_tensor(parameter)

    def _freeze_tensor(self, tensor: Tensor) -> None:
        if tensor.requires_grad and tensor.is_leaf:
            tensor.requires_grad = False  # the method is refused under torch.func
            self._thawed.append(tensor)

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True  # nothing outside sees it
        self.hidden_params.add(msg["name"])
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        stored = dict(pyro.get_param_store().named_parameters()).get(msg["name"])
        if stored is not None:
            self._freeze_tensor(stored)
        if isinstance(given, nn.Parameter):
            self._freeze_tensor(given)
            if stored is None:  # a parameter of a module needs no place in the store
                msg["value"] = given

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.requires_grad:
            msg["value"] = value.detach()


def _module_behind(model: Any) -> nn.Module | None:
    """The module that a model is, or is a method of."""
    inner = unwrap(model)
    inner = getattr(inner, "__self__", inner)
    return inner if isinstance(inner, nn.Module) else None
