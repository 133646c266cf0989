"""Let a model see other evidence than it was given, however the evidence reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ...poutine.sites import shares_storage

__all__ = ["OtherEvidence"]


class OtherEvidence(TorchFunctionMode):
    """
    Hand disturbed copies of tensors to every operation, in place of the tensors themselves.

    It does not matter whether a function has them as arguments or in its closure. The tensors are
    left as they are. Integers pass unchanged.

    :param given: tensors; whatever shares their memory is disturbed too.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = tuple(given)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # a torch.Size stays one: tensor.new, by which Laplace draws, takes a tuple for the values
        args, kwargs = tree_map(self._other, (args, kwargs or {}), is_leaf=_is_size)
        return func(*args, **kwargs)

    def _other(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not any(shares_storage(value, tensor) for tensor in self.given):
            return value
        # stays in the unit interval, where pixels live
        return 0.5 * value + 0.25 * torch.rand_like(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)
