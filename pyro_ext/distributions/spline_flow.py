"""Neural spline flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..nn import ResidualNetwork, ResMADE
from .context import ContextScale
from .flow import FlowDistribution
from .transforms import (
    Additive,
    Affine,
    Autoregressive,
    Bijection,
    Composite,
    Coupling,
    ElementwiseMap,
    Inverse,
    LULinear,
    Permutation,
    QuadraticSpline,
    RationalQuadraticSpline,
    Standardize,
    random_cycle,
)
from .unit_box import UnitBox

__all__ = ["NeuralSplineFlow"]

Base = dist.TorchDistribution | Callable[..., dist.TorchDistribution]


class NeuralSplineFlow(nn.Module):
    r"""
    A normalizing flow of coupling or autoregressive layers with splines.

    A step from data to noise is an invertible linear map followed by a layer that transforms
    each feature by a monotonic spline, whose parameters a residual network predicts from other
    features and from the context. The call of the module returns a distribution:
    ``flow()``, or ``flow(context)`` if there is a context.

    The settings make the models that are known by these names:

    ===================  =========================================
    RQ-NSF (C)           the defaults
    RQ-NSF (AR)          ``coupling=False``
    Q-NSF (C), (AR)      ``spline="quadratic"``
    Glow on vectors      ``spline="affine"``
    MAF                  ``coupling=False, spline="affine"``
    IAF                  ``coupling=False, spline="affine", inverse=True``
    NICE                 ``spline="additive"``
    ===================  =========================================

    With ``coupling=True`` density and draws both take one pass. With ``coupling=False`` the model
    is more flexible for its size; its density takes one pass, and its draws go feature by feature,
    each unit of the networks computed once: the arithmetic of about one pass in many small steps.
    With ``inverse=True`` it is the other way round, as a guide wants it.

    The splines act on [-bound, bound]: data should have about unit scale.
    :meth:`initialize` takes mean and scale from the data, and those of contexts, and
    :func:`~pyro_ext.training.fit_density` calls it.

    :param int features: number of features D.
    :param int context_features: size of a context, 0 for none.
    :param int transforms: number of steps.
    :param bool coupling: coupling layers if true, autoregressive ones otherwise.
    :param int bins: pieces of a spline.
    :param float bound: the splines act on ``[-bound, bound]``.
    :param spline: "rational_quadratic", "quadratic", "affine", "additive", or an
        :class:`~pyro_ext.distributions.transforms.ElementwiseMap`.
    :param int hidden_features: size of the hidden layers of the networks.
    :param int residual_blocks: blocks of a network, two layers each.
    :param float dropout: probability of dropping a hidden unit in training.
    :param bool batch_norm: normalise inside the networks.
    :param bool inverse: turn the layers round, so that draws take one pass.
    :param box: ``(low, high)``, numbers or tensors of shape ``(features,)``: the data lie in this
        box, the noise is uniform, and permutations take the place of the linear maps.
    :param base: distribution of the noise, with ``event_shape == (features,)``, or a function of
        the context that returns one, for example a module; standard normal by default. A
        distribution does not follow ``flow.to(...)``.
    :param bool compile: run coupling and autoregressive layers as native code, made by
        :func:`torch.compile` at the first call, which then takes some ten seconds, and needs a
        C++ compiler on the machine. Pays off in training runs of minutes and longer.
    :raises ValueError: if a setting is out of its range.

    Reference: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural Spline Flows".

    >>> flow = NeuralSplineFlow(2, transforms=2)
    >>> x = flow().sample((5,))
    >>> flow().log_prob(x).shape
    torch.Size([5])
    >>> conditional = NeuralSplineFlow(2, context_features=3, transforms=2)
    >>> conditional(torch.randn(7, 3)).batch_shape
    torch.Size([7])
    """

    _loc: Tensor

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        transforms: int = 10,
        coupling: bool = True,
        bins: int = 8,
        bound: float = 3.0,
        spline: str | ElementwiseMap = "rational_quadratic",
        hidden_features: int = 64,
        residual_blocks: int = 2,
        dropout: float = 0.0,
        batch_norm: bool = False,
        inverse: bool = False,
        box: tuple[float | Tensor, float | Tensor] | None = None,
        base: Base | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_at_least_one(features=features, transforms=transforms)
        self.features = features
        self.context_features = context_features
        elementwise_map = _elementwise_map(spline, bins, bound, tails=box is None)
        networks = {
            "context_features": context_features,
            "residual_blocks": residual_blocks,
            "dropout": dropout,
            "batch_norm": batch_norm,
        }
        layers: list[Bijection] = []
        for _ in range(transforms):
            layers.append(_mix(features, in_box=box is not None))
            layer = (_coupling if coupling else _autoregressive)(
                features, elementwise_map, hidden_features, networks
            )
            layers.append(Inverse(layer) if inverse else layer)
        layers.append(_mix(features, in_box=box is not None))
        self._box = None if box is None else _check_box(box, features)
        self.bijection = Composite([_first(self._box, features), *layers], compile=compile)
        self.register_buffer("_loc", torch.zeros(features), persistent=False)
        self.context_scale = ContextScale(context_features, self._loc)
        self.base = base

    def extra_repr(self) -> str:
        """Show the sizes when the module is printed."""
        return f"features={self.features}, context_features={self.context_features}"

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """
        Return the distribution of the data, given a context if the flow has one.

        :param Tensor context: shape ``batch_shape + (context_features,)``.
        :returns: a distribution over vectors of shape ``(features,)``.
        :raises ValueError: if the context is missing, not expected or of the wrong size.
        :raises TypeError: if the context is of higher precision than the parameters.
        """
        self.context_scale.check(context)
        noise = self._noise(context)
        if context is not None:
            context = self.context_scale(context)
        return FlowDistribution(self.bijection, noise, context, support=self._support())

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """
        Take mean and scale of the data into the first layer, except in a box; and of contexts.

        :param Tensor x: data, shape ``(n, features)``.
        :param Tensor context: their contexts, shape ``(n, context_features)``.
        """
        self.context_scale.initialize(context)
        if self._box is None:
            self._first.initialize(x)

    @property
    def is_initialized(self) -> bool:
        """Whether :meth:`initialize` has run, here or before the weights were saved."""
        return self._first.is_initialized and self.context_scale.is_initialized

    @property
    def _first(self) -> Standardize:
        """The layer next to the data."""
        return cast(Standardize, self.bijection.bijections[0])

    def _noise(self, context: Tensor | None) -> dist.TorchDistribution:
        base = self.base
        if base is None:
            if self._box is not None:
                return UnitBox(self._loc)
            scale = torch.ones_like(self._loc)
            return dist.Normal(self._loc, scale, validate_args=False).to_event(1)
        if not isinstance(base, torch.distributions.Distribution):
            base = base() if context is None else base(context)
        if base.event_shape != (self.features,):
            raise ValueError(
                f"The base distribution has event_shape {tuple(base.event_shape)}, but the flow "
                f"needs ({self.features},); independent numbers become one event by "
                "`.to_event(1)`."
            )
        return base

    def _support(self) -> constraints.Constraint:
        if self._box is None:
            return constraints.real_vector
        first = self._first
        # The ends as given may be a rounding error outside of those computed here.
        slack = torch.finfo(first.loc.dtype).eps * (first.loc.abs() + first.scale)
        low, high = first.loc - slack, first.loc + first.scale + slack
        return constraints.independent(constraints.interval(low, high), 1)


def _elementwise_map(
    spline: str | ElementwiseMap, bins: int, bound: float, *, tails: bool
) -> ElementwiseMap:
    if isinstance(spline, ElementwiseMap):
        if getattr(spline, "tails", tails) != tails:
            raise ValueError(
                f"spline={spline!r}: one with tails=False maps [0, 1] to itself and needs a box, "
                "and in a box every spline needs tails=False."
            )
        return spline
    if spline == "rational_quadratic":
        return RationalQuadraticSpline(bins, bound, tails=tails)
    if spline == "quadratic":
        return QuadraticSpline(bins, bound, tails=tails)
    if spline in ("affine", "additive"):
        if not tails:
            raise ValueError(f"spline={spline!r} would leave the box: choose a spline.")
        return Affine() if spline == "affine" else Additive()
    raise ValueError(
        f"spline={spline!r} is unknown; choose 'rational_quadratic', 'quadratic', 'affine', "
        "'additive' or an ElementwiseMap."
    )


def _mix(features: int, *, in_box: bool) -> Bijection:
    return Permutation(random_cycle(features)) if in_box else LULinear(features)


def _first(box: tuple[Tensor, Tensor] | None, features: int) -> Standardize:
    if box is None:
        return Standardize(torch.zeros(features), torch.ones(features))
    low, high = box
    return Standardize(low, high - low)


def _coupling(
    features: int, elementwise_map: ElementwiseMap, hidden_features: int, networks: dict[str, Any]
) -> Coupling:
    conditioning = features // 2
    transformed = features - conditioning
    if not conditioning and not networks["context_features"]:
        return Coupling(elementwise_map, None, 0, features)
    size = transformed * elementwise_map.num_parameters
    network = ResidualNetwork(conditioning, size, hidden_features, **networks)
    return Coupling(elementwise_map, _near_zero(network), conditioning, transformed)


def _autoregressive(
    features: int, elementwise_map: ElementwiseMap, hidden_features: int, networks: dict[str, Any]
) -> Autoregressive:
    size = elementwise_map.num_parameters
    network = ResMADE(features, size, hidden_features, **networks)
    return Autoregressive(elementwise_map, _near_zero(network))


def _near_zero(network: Any) -> Any:
    """Make the outputs of a network small, so that the layer starts near the identity."""
    with torch.no_grad():
        network.output.weight.mul_(0.1)
        network.output.bias.zero_()
    return network


def _check_at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number of at least 1.")


def _check_box(box: tuple[float | Tensor, float | Tensor], features: int) -> tuple[Tensor, Tensor]:
    sides = [torch.as_tensor(side, dtype=torch.get_default_dtype()) for side in box]
    for side in sides:
        if side.shape not in ((), (1,), (features,)):
            raise ValueError(
                f"box has an end of shape {tuple(side.shape)}: give numbers or tensors of shape "
                f"({features},)."
            )
    low, high = (side.expand(features) for side in sides)
    if not bool((low < high).all() and (high - low).isfinite().all()):
        raise ValueError(f"box={box!r}: every lower end has to be below its upper end.")
    return low, high
