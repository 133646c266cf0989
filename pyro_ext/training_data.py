"""Rows of data for fitting densities, and checks of them."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Data", "checked_data"]


class Data(NamedTuple):
    """Data, and what each row of them is conditioned on."""

    x: Tensor
    context: Tensor | None

    def rows(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some rows, with the dtype and on the device of a parameter."""
        x = self.x[index.to(self.x.device)].to(like)
        if self.context is None:
            return x, None
        # a class, say, stays an integer
        dtype = like.dtype if self.context.is_floating_point() else self.context.dtype
        return x, self.context[index.to(self.context.device)].to(like.device, dtype)

    def checksum(self) -> int:
        """A number that other data do not have."""
        total = 0
        for values in self:
            if values is not None:
                as_bytes = values.detach().cpu().contiguous().flatten().view(torch.uint8)
                total = zlib.crc32(as_bytes.numpy().data, total)
        return total


def checked_data(
    train: Tensor, context: Tensor | None, validation: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Data, Data | None]:
    """
    Check data for training, and those for validation if there are any.

    :param Tensor train: shape ``(n,) + event_shape``.
    :param Tensor context: shape ``(n, context_features)``.
    :param validation: further data, ``(x, context)`` with a context.
    :returns: both.
    :raises ValueError: for NaN or infinite values, no rows, or rows that do not match.
    :raises TypeError: for data that are not floating-point tensors.
    """
    data = _checked_rows("train", train, "context", context)
    if validation is None:
        return data, None
    is_pair = isinstance(validation, tuple)
    if is_pair != (context is not None) or (is_pair and len(validation) != 2):
        wanted = "one tensor" if context is None else "the pair (x, context)"
        raise ValueError(
            f"validation must be {wanted}, as context is {'' if context is None else 'not '}None."
        )
    x, its_context = validation if isinstance(validation, tuple) else (validation, None)
    held_out = _checked_rows("validation", x, "context of validation", its_context)
    for name, ours, theirs in zip(("", "context of "), data, held_out, strict=True):
        if ours is not None and theirs is not None and ours.shape[1:] != theirs.shape[1:]:
            raise ValueError(
                f"Rows of {name}validation have shape {tuple(theirs.shape[1:])}, those of "
                f"{name}train {tuple(ours.shape[1:])}."
            )
    return data, held_out


def _checked_rows(name: str, x: Tensor, context_name: str, context: Tensor | None) -> Data:
    _check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {x.dtype}. A density of continuous variables "
            "can grow without bound on integers: dequantise them, for example by (x + "
            "torch.rand(x.shape)) / number_of_levels; for a flow that dequantises, give x.float()."
        )
    if context is not None:
        _check_tensor(context_name, context)
        if len(context) != len(x):
            raise ValueError(f"{context_name} has {len(context)} rows, {name} has {len(x)}.")
    return Data(x, context)


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(x.shape)}.")
    is_bad = ~x.isfinite().flatten(1).all(1) if x.dim() > 1 else ~x.isfinite()
    if is_bad.any():
        raise ValueError(
            f"{name} has NaN or infinite values in {int(is_bad.sum())} of {len(x)} rows, the "
            f"first of them row {int(is_bad.nonzero()[0])}: leave those rows out or fill them in."
        )
