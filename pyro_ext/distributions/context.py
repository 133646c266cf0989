"""What a density is conditioned on: checks of it, and its scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .transforms.standardize import mean_and_scale

__all__ = ["ContextScale"]


class ContextScale(nn.Module):
    r"""
    :math:`(c - m) / s` of a context c, with m and s that are saved but not trained.

    Networks want numbers of about unit scale; years, say, are none.

    :param int features: size of a context, 0 for none.
    :param Tensor like: gives the dtype that contexts are compared with.
    :raises ValueError: for a negative size.

    >>> from pyro_ext.distributions.context import ContextScale
    >>> scale = ContextScale(1, torch.zeros(()))
    >>> scale.initialize(torch.tensor([[1990.0], [2010.0]]))
    >>> scale(torch.tensor([2020.0]))
    tensor([2.])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, features: int, like: Tensor) -> None:
        super().__init__()
        if features < 0:
            raise ValueError(f"context_features={features!r}: give a whole number of at least 0.")
        self.features = features
        self.register_buffer("loc", like.new_zeros(features), persistent=features > 0)
        self.register_buffer("scale", like.new_ones(features), persistent=features > 0)

    def extra_repr(self) -> str:
        """Show the size when the module is printed."""
        return f"features={self.features}"

    def initialize(self, context: Tensor | None) -> None:
        """
        Take mean and standard deviation from contexts; a constant feature keeps the scale 1.

        :param Tensor context: shape ``(n, features)``; ``None`` changes nothing.
        :raises ValueError: if it is not expected, of the wrong size, or not finite.
        """
        if context is None:
            return
        self.check(context)
        loc, scale = mean_and_scale(context.reshape(-1, self.features).to(self.loc), "context")
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    @property
    def is_initialized(self) -> bool:
        """Whether the scale is that of contexts, or there are none."""
        return not self.features or bool((self.loc != 0).any() or (self.scale != 1).any())

    def check(self, context: Tensor | None) -> None:
        """
        Check that there is a context if and only if there should be, and what it is.

        :param Tensor context: shape ``(..., features)``.
        :raises ValueError: if it is missing, not expected or of the wrong size.
        :raises TypeError: if it is no tensor, or of higher precision than the parameters.
        """
        if context is None:
            if self.features:
                raise ValueError(
                    f"context_features={self.features}, but the context is None. This density is "
                    f"conditional: call it with a context of shape (..., {self.features})."
                )
            return
        if not isinstance(context, Tensor):
            raise TypeError(f"The context is a {type(context).__name__}: give a tensor.")
        if not self.features:
            raise ValueError(
                "This density has no context (context_features=0), but the context is of shape "
                f"{tuple(context.shape)}; make it with context_features > 0, or give none."
            )
        if context.shape[-1:] != (self.features,):
            raise ValueError(
                f"The context has shape {tuple(context.shape)}; its last dimension has to be "
                f"context_features={self.features}."
            )
        dtype = self.loc.dtype
        if torch.promote_types(context.dtype, dtype) != dtype:
            raise TypeError(
                f"The context is of {context.dtype} and the flow's parameters are of {dtype}: "
                f"convert one of them, by context.to({dtype}) or flow.to({context.dtype})."
            )

    def forward(self, context: Tensor) -> Tensor:
        """
        Standardise contexts.

        :param Tensor context: shape ``(..., features)``.
        """
        return (context - self.loc) / self.scale
