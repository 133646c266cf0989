"""The distribution of noise that a bijection has turned into data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.nn.modules.batchnorm import _BatchNorm

from .transforms.bijection import Bijection, Composite, Inverse

__all__ = ["BijectionTransform", "FlowDistribution", "check_precision"]

_ROWS_AT_ONCE = 4096


class FlowDistribution(TorchDistribution):
    r"""
    Normalizing flow: :math:`\log p(x) = \log p(z) + \log|\det \partial z / \partial x|`.

    A light object made by the call of a flow module; the trainable parameters stay in the module.
    Nothing is kept from one call to the next, so that there is nothing stale to be returned after
    an optimizer step.

    :param Bijection bijection: maps data to noise and back.
    :param base: the distribution of the noise, a Pyro distribution.
    :param Tensor context: what the bijection depends on, shape
        ``batch_shape + (context_features,)``.
    :param torch.Size event_shape: shape of one datum, if it differs from that of the noise.
    :param support: where the data lie, all real numbers by default.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        bijection: Bijection,
        base: TorchDistribution,
        context: Tensor | None = None,
        *,
        event_shape: torch.Size | None = None,
        support: constraints.Constraint | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.bijection = bijection
        self.base = base
        self.context = context
        context_shape = torch.Size() if context is None else context.shape[: context.dim() - 1]
        batch_shape = torch.broadcast_shapes(base.batch_shape, context_shape)
        if base.batch_shape != batch_shape:
            self.base = base.expand(batch_shape)
        event_shape = base.event_shape if event_shape is None else torch.Size(event_shape)
        if support is None:
            support = constraints.independent(constraints.real, len(event_shape))
        self._support = support
        # Whether draws are differentiable is up to the base distribution.
        self.has_rsample = bool(base.has_rsample)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Where the data lie."""
        return self._support

    @property
    def transforms(self) -> list[Transform]:
        """The layers as transforms in Pyro's direction, from noise to data, context included."""
        layers: list[Bijection] = [self.bijection]
        if isinstance(self.bijection, Composite):
            layers = list(reversed(self.bijection.bijections))
        return [BijectionTransform(layer, self.context) for layer in layers]

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: FlowDistribution | None = None,
    ) -> FlowDistribution:
        """Expand to a larger batch; draws of all its elements are independent."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        new.bijection = self.bijection
        new.base = self.base.expand(batch_shape)
        new.context = self.context
        new._support = self._support
        new.has_rsample = self.has_rsample
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """
        Log-density of the data, in one pass of every layer.

        :param Tensor value: shape broadcastable to ``batch_shape + event_shape``.
        :returns: shape ``sample_shape + batch_shape``.
        :raises ValueError: if validation is on and the value is not in the support.
        :raises TypeError: if the value is of higher precision than the parameters.
        """
        # torch cannot check the support of nothing, and its check cannot be compiled
        if self._validate_args and value.numel() and not torch.compiler.is_compiling():
            self._validate_sample(value)
        check_precision("value", value, self.bijection)
        batch_shape = torch.broadcast_shapes(
            value.shape[: value.dim() - len(self.event_shape)], self.batch_shape
        )
        value = value.expand(batch_shape + self.event_shape)
        z, log_det = self._apply(self.bijection.to_noise, value, len(self.event_shape))
        return self._noise_log_prob(z) + log_det

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """
        Draw with gradients to the parameters.

        :param sample_shape: shape of the draws.
        :returns: shape ``sample_shape + batch_shape + event_shape``.
        """
        return self._to_data(self.base.rsample(torch.Size(sample_shape)))[0]

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """
        Draw without gradients.

        :param sample_shape: shape of the draws.
        :returns: shape ``sample_shape + batch_shape + event_shape``.
        """
        with torch.no_grad():
            return self._to_data(self.base.sample(torch.Size(sample_shape)))[0]

    def rsample_and_log_prob(
        self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """
        Draw, and score the draws in the same pass.

        :param sample_shape: shape of the draws.
        :returns: draws, shape ``sample_shape + batch_shape + event_shape``, and their
            log-densities, shape ``sample_shape + batch_shape``.
        """
        z = self.base.rsample(torch.Size(sample_shape))
        x, log_det = self._to_data(z)
        return x, self._noise_log_prob(z) - log_det

    def _noise_log_prob(self, z: Tensor) -> Tensor:
        if not z.numel():  # of which the distributions of torch cannot sum over the event
            return z.new_zeros(z.shape[: z.dim() - len(self.base.event_shape)])
        return self.base.log_prob(z)

    def _to_data(self, z: Tensor) -> tuple[Tensor, Tensor]:
        parameter = next(self.bijection.parameters(), z)
        if z.dtype != parameter.dtype:
            raise TypeError(
                f"The base distribution draws numbers of {z.dtype} and the flow's parameters are "
                f"of {parameter.dtype}: make it of tensors of that dtype. A distribution does not "
                "follow `flow.to(...)`; a module that makes it in its call does."
            )
        return self._apply(self.bijection.to_data, z, len(self.base.event_shape))

    def _apply(
        self, function: Callable[..., tuple[Tensor, Tensor]], value: Tensor, event_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Call a bijection, on parts of the rows where no gradient needs them together."""
        num_rows = math.prod(value.shape[: value.dim() - event_dim])
        if (
            num_rows <= _ROWS_AT_ONCE
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or _normalizes_batches(self.bijection)
        ):
            return function(value, self.context)
        # A part fits into the processor's cache, and what memory is needed does not grow.
        size = max(1, _ROWS_AT_ONCE * value.shape[0] // num_rows)
        values_in_parts = value.split(size)
        contexts: list[Tensor | None] = [self.context] * len(values_in_parts)
        batch_dim = value.dim() - event_dim
        context = self.context
        if context is not None and context.dim() == batch_dim + 1 and len(context) == len(value):
            contexts = list(context.split(size))
        parts = [function(*part) for part in zip(values_in_parts, contexts, strict=True)]
        values, log_dets = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(log_dets)


def check_precision(name: str, x: Tensor, module: nn.Module) -> None:
    """
    Check that a module can take a tensor without losing digits of it.

    :param str name: what the tensor is, for the message.
    :param Tensor x: the tensor.
    :param nn.Module module: the module.
    :raises TypeError: if the tensor is of higher precision than the parameters.
    """
    parameter = next(module.parameters(), None)
    if parameter is not None and torch.promote_types(x.dtype, parameter.dtype) != parameter.dtype:
        raise TypeError(
            f"The {name} is of {x.dtype} and the flow's parameters are of {parameter.dtype}: "
            f"convert one of them, by {name}.to({parameter.dtype}) or flow.to({x.dtype})."
        )


def _normalizes_batches(bijection: Bijection) -> bool:
    """Whether the rows of a batch depend on one another."""
    return any(
        module.training and isinstance(module, _BatchNorm) for module in bijection.modules()
    )


class BijectionTransform(Transform):
    """
    A bijection with its context as a transform of ``torch.distributions``, from noise to data.

    :param Bijection bijection: the layer.
    :param Tensor context: what it depends on.
    """

    bijective = True

    def __init__(self, bijection: Bijection, context: Tensor | None = None) -> None:
        super().__init__(cache_size=0)
        self.bijection = bijection
        self.context = context
        noise_event_dim = bijection.noise_event_dim or bijection.event_dim
        self.domain = constraints.independent(constraints.real, noise_event_dim)
        self.codomain = constraints.independent(constraints.real, bijection.event_dim)

    @property
    def inv(self) -> Transform:
        """From data to noise."""
        return BijectionTransform(Inverse(self.bijection), self.context)

    def with_cache(self, cache_size: int = 1) -> BijectionTransform:
        """Itself: what it was called on is not kept, since parameters may have changed since."""
        return self

    def __repr__(self) -> str:
        return f"BijectionTransform({type(self.bijection).__name__})"

    def _call(self, x: Tensor) -> Tensor:
        return self.bijection.to_data(x, self.context)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.bijection.to_noise(y, self.context)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant of the map from noise ``x`` to data ``y``."""
        return -self.bijection.to_noise(y, self.context)[1]
