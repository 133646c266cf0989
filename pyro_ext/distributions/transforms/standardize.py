"""Shift and scale of the data before anything else sees them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bijection import Bijection

__all__ = ["ShiftAndScale", "Standardize", "mean_and_scale"]


class Standardize(Bijection):
    r"""
    :math:`z = (x - m) / s`, with :math:`m` and :math:`s` that are saved but not trained.

    :param Tensor loc: m, shape ``(features,)``.
    :param Tensor scale: s, shape ``(features,)``, positive.

    >>> layer = Standardize(torch.zeros(2), torch.ones(2))
    >>> layer.initialize(torch.tensor([[1.0, 10.0], [3.0, 50.0]]))
    >>> layer.to_noise(torch.tensor([3.0, 30.0]))[0]
    tensor([1., 0.])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        if not bool((scale > 0).all() and scale.isfinite().all() and loc.isfinite().all()):
            raise ValueError(f"scale={scale} has to be positive, and it and loc={loc} finite.")
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())

    def initialize(self, x: Tensor) -> None:
        """
        Take mean and standard deviation from data; a constant feature keeps the scale 1.

        :param Tensor x: data, shape ``(n, features)``.
        :raises ValueError: if the data have another shape, or are not all finite.
        """
        if x.dim() != 2 or x.shape[0] < 1 or x.shape[1:] != self.loc.shape:
            raise ValueError(
                f"Data of shape {tuple(x.shape)} cannot tell mean and scale: give shape "
                f"(n, {self.loc.numel()}) with at least one row."
            )
        loc, scale = mean_and_scale(x)
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    @property
    def is_initialized(self) -> bool:
        """Whether the layer is not the identity."""
        return bool((self.loc != 0).any() or (self.scale != 1).any())

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        return (x - self.loc) / self.scale, -self.scale.log().sum().expand(x.shape[:-1])

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        return z * self.scale + self.loc, self.scale.log().sum().expand(z.shape[:-1])


def mean_and_scale(x: Tensor, name: str = "data") -> tuple[Tensor, Tensor]:
    """
    Mean and standard deviation of each feature; 1 for the latter where a feature is constant.

    :param Tensor x: shape ``(n, features)``.
    :param str name: what they are, for the message.
    :returns: both, of shape ``(features,)``.
    :raises ValueError: if numbers are not finite.
    """
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{int((~x.isfinite()).sum())} of the numbers in the {name} are not finite: remove or "
            "replace them."
        )
    scale = x.std(0, correction=0)
    # rounding may leave a constant a deviation that is not quite zero, or make a small one zero
    has_scale = (scale > 0) & (x != x[:1]).any(0)
    return x.mean(0), torch.where(has_scale, scale, 1.0)


class ShiftAndScale(Bijection):
    r"""
    :math:`z = (x - m) / s`, with :math:`m` and :math:`\log s` that are trained.

    :param Tensor loc: m at the start, shape ``(features,)``.
    :param Tensor scale: s at the start, shape ``(features,)``, positive.

    >>> ShiftAndScale(torch.zeros(2), torch.ones(2)).to_noise(torch.tensor([3.0, 30.0]))[0]
    tensor([ 3., 30.], grad_fn=<MulBackward0>)
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(scale.log())

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        z = (x - self.loc) * (-self.log_scale).exp()
        return z, -self.log_scale.sum().expand(x.shape[:-1])

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        return z * self.log_scale.exp() + self.loc, self.log_scale.sum().expand(z.shape[:-1])
