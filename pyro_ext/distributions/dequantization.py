r"""Discrete distributions made of continuous ones: images are integers, flows are densities.

A density :math:`p` on :math:`[0, 1)^D` gives an image :math:`x \in \{0, \dots, L - 1\}^D` the
probability of its cell,

.. math:: P(x) = \int_{[0,1)^D} p\big((x + u) / L\big) \, L^{-D} \, du
    \ge \exp \mathbb{E}_{q(u \mid x)} \log \frac{p((x + u) / L) \, L^{-D}}{q(u \mid x)},

by Jensen's inequality, for any density :math:`q` of the noise that is added. A uniform
:math:`q` is uniform dequantisation (Theis, van den Oord and Bethge 2016), one that is learned is
variational dequantisation (Ho et al. 2019).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from .flow import FlowDistribution

__all__ = [
    "Dequantization",
    "Dequantized",
    "DequantizedFlow",
    "UniformDequantization",
    "VariationalDequantization",
    "bits_per_dimension",
]


class Dequantization(nn.Module):
    """
    A conditional density of the noise in (0, 1) that is added to integers.

    :param int levels: number L of values that an element of the data may have, 256 for bytes.
    :raises ValueError: if there are fewer than two levels.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.levels = int(levels)

    def noise(self, x: Tensor, event_dim: int, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """
        Draw noise for data, with gradients with respect to parameters.

        :param Tensor x: real numbers with the values of integers, shape
            ``batch_shape + event_shape``.
        :param int event_dim: number of dimensions of ``event_shape``.
        :param sample_shape: shape of the draws for each element of the batch.
        :returns: noise of shape ``sample_shape + x.shape``, and its log density of shape
            ``sample_shape + batch_shape``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no noise.")


class UniformDequantization(Dequantization):
    """
    Uniform noise: the density within the cell of an image is drawn towards a constant.

    :param int levels: number L of values that an element of the data may have, 256 for bytes.
    :raises ValueError: if there are fewer than two levels.

    Reference: Theis, van den Oord and Bethge 2016, "A note on the evaluation of generative
    models", section 3.1.
    """

    def noise(self, x: Tensor, event_dim: int, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """See :meth:`Dequantization.noise`."""
        noise = _inside(torch.rand(sample_shape + x.shape, dtype=x.dtype, device=x.device))
        return noise, x.new_zeros(sample_shape + x.shape[: x.dim() - event_dim])


class VariationalDequantization(Dequantization):
    r"""
    Noise from a conditional density that is trained together with the density of the data.

    :math:`u = 1 / (1 + e^{-v})` with :math:`v \sim` ``flow(context)``; the context is the image
    mapped to :math:`[-1, 1]`.

    :param flow: a module that, called with a context, returns a distribution over real noise
        :math:`v` of the size of an image, with ``rsample``.
    :param int levels: number L of values that an element of the data may have, 256 for bytes.
    :param bool flatten: whether context and noise are vectors, as for
        :class:`~pyro_ext.distributions.NeuralSplineFlow`; otherwise they have the shape of the
        data, as for ``ImageSplineFlow(shape, context_shape=shape, low=-0.5, high=0.5)``, which
        leaves the scale of real numbers alone.
    :raises ValueError: if there are fewer than two levels.

    Reference: Ho, Chen, Srinivas, Duan and Abbeel 2019, "Flow++", section 3.1.
    """

    def __init__(self, flow: nn.Module, levels: int, *, flatten: bool = True) -> None:
        super().__init__(levels)
        self.flow = flow
        self.flatten = flatten

    def noise(self, x: Tensor, event_dim: int, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """
        See :meth:`Dequantization.noise`.

        :raises ValueError: if the distribution of the noise has another shape than the data.
        :raises TypeError: if the distribution of the noise has no ``rsample``.
        """
        split = x.dim() - event_dim
        batch_shape, event_shape = x.shape[:split], x.shape[split:]
        context = (2.0 * x - (self.levels - 1)) / (self.levels - 1)
        if self.flatten:
            context = context.reshape(*batch_shape, -1)
        noise = self.flow(context)
        if noise.batch_shape + noise.event_shape != context.shape:
            raise ValueError(
                f"the dequantising flow, called with a context of shape {tuple(context.shape)}, "
                f"must return a distribution of that shape, got batch_shape "
                f"{tuple(noise.batch_shape)} and event_shape {tuple(noise.event_shape)}"
            )
        if not noise.has_rsample:
            raise TypeError(
                "the dequantising flow is trained through its draws, but "
                f"{type(noise).__name__} has no rsample"
            )
        if isinstance(noise, FlowDistribution):
            value, log_density = noise.rsample_and_log_prob(sample_shape)
        else:
            value = noise.rsample(sample_shape)
            log_density = noise.log_prob(value)
        value = value.reshape(sample_shape + batch_shape + event_shape)
        log_slope = logsigmoid(value) + logsigmoid(-value)
        if event_dim:
            log_slope = log_slope.flatten(-event_dim).sum(-1)
        return _inside(value.sigmoid()), log_density - log_slope


class Dequantized(TorchDistribution):
    r"""
    The discrete distribution that a continuous one gives to cells of the unit cube.

    ``log_prob`` is an estimate of a lower bound on the logarithm of the probability

    .. math:: P(x) = \int_{[0,1)^D} p\big((x + u) / L\big) \, L^{-D} \, du .

    With K samples it is :math:`\log \frac1K \sum_k w_k`, where :math:`w_k` is the density at the
    k-th draw of the noise over the density of the noise. :math:`\mathbb{E} w_k = P(x)`, the
    logarithm is concave, and so the expectation is at most :math:`\log P(x)`: for K = 1 the
    evidence lower bound of Ho et al. 2019, for more the importance-weighted bound, which grows
    with K and converges to :math:`\log P(x)` (Burda, Grosse and Salakhutdinov 2016). A single
    estimate may lie above. With uniform noise :math:`w_k` is the scaled density itself.

    ``sample`` draws :math:`\lfloor L v \rfloor` with :math:`v \sim p`. A density that reaches out
    of the unit cube gives probability to no image there; such draws are moved to the nearest
    level, so that samples then differ a little from ``log_prob``, the less the better it fits.

    :param base_distribution: continuous distribution over :math:`[0, 1)^D`.
    :param Dequantization dequantization: the noise, and the number of levels L.
    :param int num_samples: draws of the noise for ``log_prob``, K.
    :raises ValueError: if ``num_samples`` is less than 1.

    Reference: Theis, van den Oord and Bethge 2016; Ho et al. 2019, section 3.1.

    >>> from pyro_ext.distributions.dequantization import Dequantized, UniformDequantization
    >>> pixels = dist.Uniform(torch.zeros(3), 1.0).to_event(1)
    >>> image = Dequantized(pixels, UniformDequantization(256))
    >>> image.sample().dtype, image.log_prob(torch.tensor([0, 7, 255])) / torch.tensor(2.0).log()
    (torch.int64, tensor(-24.))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        base_distribution: TorchDistribution,
        dequantization: Dequantization,
        *,
        num_samples: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        self.base_dist = base_distribution
        self.dequantization = dequantization
        self.num_samples = _check_num_samples(num_samples)
        super().__init__(
            base_distribution.batch_shape,
            base_distribution.event_shape,
            validate_args=validate_args,
        )

    @property
    def support(self) -> constraints.Constraint:
        """Integers from 0 to the number of levels less one."""
        cell = constraints.integer_interval(0, self.dequantization.levels - 1)
        return constraints.independent(cell, self.event_dim)

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: Dequantized | None = None,
    ) -> Dequantized:
        """The distribution with another batch shape."""
        batch_shape = torch.Size(batch_shape)
        new = self._get_checked_instance(Dequantized, _instance)
        new.base_dist = self.base_dist.expand(batch_shape)
        new.dequantization = self.dequantization
        new.num_samples = self.num_samples
        super(Dequantized, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """
        Draw integers.

        :param sample_shape: shape of the draws.
        :returns: shape ``sample_shape + batch_shape + event_shape``, ``torch.int64``.
        """
        with torch.no_grad():
            value = self.base_dist.sample(torch.Size(sample_shape))
            levels = self.dequantization.levels
            return (value * levels).floor().clamp(0, levels - 1).long()

    def log_prob(self, value: Tensor, num_samples: int | None = None) -> Tensor:
        """
        Estimate a lower bound on the log probability of integers.

        :param Tensor value: shape ``batch_shape + event_shape`` or with more dimensions on the
            left; integers, or real numbers with the values of integers.
        :param int num_samples: draws of the noise, instead of the distribution's own number.
        :returns: the estimate, one number for each element of the batch.
        :raises ValueError: if a value is not one of the levels.
        """
        values, log_density = self.dequantize(value, num_samples)
        log_weights = self.base_dist.log_prob(values) - log_density
        num_elements = math.prod(self.event_shape)
        log_mean = log_weights.logsumexp(0) - math.log(len(log_weights))
        return log_mean - num_elements * math.log(self.dequantization.levels)

    def dequantize(self, value: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
        """
        Add noise to integers, and map them to the unit cube.

        :param Tensor value: see :meth:`log_prob`.
        :param int num_samples: see :meth:`log_prob`.
        :returns: real numbers in (0, 1) of shape ``(num_samples,) + value.shape``, and the log
            density of the noise.
        :raises ValueError: if a value is not one of the levels, or the shape is wrong.
        """
        count = self.num_samples if num_samples is None else _check_num_samples(num_samples)
        levels = self.dequantization.levels
        x = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        self._check(x)
        x = x.expand(torch.broadcast_shapes(x.shape, self.batch_shape + self.event_shape))
        noise, log_density = self.dequantization.noise(x, self.event_dim, torch.Size([count]))
        # in single precision 255 + u is often 256
        largest = 1 - torch.finfo(x.dtype).eps / 2
        return ((x + noise) / levels).clamp(max=largest), log_density

    def _check(self, value: Tensor) -> None:
        split = max(value.dim() - self.event_dim, 0)
        if value.shape[split:] != self.event_shape:
            raise ValueError(
                f"values must have the event shape {tuple(self.event_shape)} on the right, got "
                f"shape {tuple(value.shape)}"
            )
        if not self._validate_args:
            return
        highest = self.dequantization.levels - 1
        wrong = ~constraints.integer_interval(0, highest).check(value)
        if wrong.any():
            raise ValueError(
                f"values must be integers from 0 to {highest}, got {value[wrong][0].item()}; "
                "scale the data, or give the dequantization another number of levels"
            )


class DequantizedFlow(nn.Module):
    """
    A flow and its dequantisation, which together are a trainable distribution over integers.

    :param flow: a module whose call returns a continuous distribution over the unit cube.
    :param Dequantization dequantization: the noise, and the number of levels.
    :param int num_samples: draws of the noise for ``log_prob``.
    :raises ValueError: if ``num_samples`` is less than 1.

    >>> from pyro_ext.distributions.dequantization import DequantizedFlow, UniformDequantization
    >>> from pyro_ext.distributions.image_flow import ImageSplineFlow
    >>> flow = ImageSplineFlow((1, 4, 4), levels=1, steps_per_level=1, hidden_channels=8)
    >>> model = DequantizedFlow(flow, UniformDequantization(256))
    >>> images = torch.randint(0, 256, (10, 1, 4, 4))
    >>> model.initialize(images)
    >>> model().log_prob(images).shape
    torch.Size([10])
    """

    def __init__(
        self, flow: nn.Module, dequantization: Dequantization, *, num_samples: int = 1
    ) -> None:
        super().__init__()
        self.flow = flow
        self.dequantization = dequantization
        self.num_samples = _check_num_samples(num_samples)

    def forward(self, *args: Any, **kwargs: Any) -> Dequantized:
        """The distribution, with the arguments of the flow."""
        return Dequantized(
            self.flow(*args, **kwargs), self.dequantization, num_samples=self.num_samples
        )

    def initialize(self, x: Tensor, *context: Tensor) -> None:
        """
        Initialise the flow, where it has a method for it, from integers that get noise.

        :param Tensor x: integers, shape ``(n,) + event_shape``.
        :param Tensor context: their context, for a flow that takes one.
        :raises ValueError: if a value is not one of the levels.
        """
        initialize = getattr(self.flow, "initialize", None)
        if initialize is not None:
            with torch.no_grad():
                values, _ = self(*context).dequantize(x, num_samples=1)
            initialize(values[0], *context)

    @property
    def is_initialized(self) -> bool:
        """Whether :meth:`initialize` has run, here or before the weights were saved."""
        return bool(getattr(self.flow, "is_initialized", False))


def bits_per_dimension(log_prob: Tensor, num_dimensions: int) -> Tensor:
    r"""
    Log probabilities of discrete data in bits per dimension, :math:`-\log P(x) / (D \log 2)`.

    A log *density* of continuous data depends on their unit. For data :math:`y = a x + b` of
    integers :math:`x` the same number is :math:`-(\log p(y) + D \log a) / (D \log 2)`: with
    pixels divided by 256, :math:`a = 1/256`, 8 bits more than the density alone would give.

    :param Tensor log_prob: log probabilities in nats.
    :param int num_dimensions: number of elements D of one value, pixels times channels.
    :returns: bits per dimension, of the shape of ``log_prob``.
    :raises ValueError: if there are no dimensions.

    >>> from pyro_ext.distributions.dequantization import bits_per_dimension
    >>> bits_per_dimension(-12.0 * torch.tensor(2.0).log(), 3)
    tensor(4.)
    """
    if num_dimensions < 1:
        raise ValueError(f"num_dimensions must be at least 1, got {num_dimensions}")
    return -log_prob / (num_dimensions * math.log(2.0))


def _check_num_samples(num_samples: int) -> int:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    return int(num_samples)


def _inside(value: Tensor) -> Tensor:
    """Keep numbers that rounding brought to 0 or 1 inside the open unit interval."""
    half_step = torch.finfo(value.dtype).eps / 2
    return value.clamp(half_step, 1 - half_step)
