"""Densities in the plane that are hard for flows and known exactly."""

from __future__ import annotations

import math

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Checkerboard", "Rings", "RotatedGrid", "TwoSpirals"]

_LOG_2_PI = math.log(2 * math.pi)
_RING_RADII = (0.75, 1.5, 2.25, 3.0)


class _PlaneDensity(TorchDistribution):
    """
    A density in the plane, whose one number sets the dtype and the device of everything.

    The support is the whole plane: where a density vanishes, its logarithm is minus infinity, so
    that any grid of points can be scored.
    """

    support = constraints.real_vector

    def __init__(self, validate_args: bool | None) -> None:
        super().__init__(torch.Size(), torch.Size([2]), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """
        Logarithm of the density.

        :param Tensor value: points, shape ``(..., 2)``.
        :returns: shape ``(...)``.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self._log_density(value)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """
        Draw independent points.

        :param sample_shape: shape of the draws.
        :returns: shape ``sample_shape + (2,)``.
        """
        with torch.no_grad():
            return self._draw(torch.Size(sample_shape))

    def _log_density(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _draw(self, shape: torch.Size) -> Tensor:
        raise NotImplementedError


class RotatedGrid(_PlaneDensity):
    r"""
    Equal Gaussians on a square grid that is turned by 45 degrees: 225 narrow modes by default.

    With the centres :math:`c_1, \dots, c_n` equally spaced on :math:`[-2.5, 2.5]` and the
    coordinates :math:`u = ((x_1 + x_2), (x_2 - x_1)) / \sqrt 2`, the density is a product,

    .. math:: p(x) = \prod_{j=1}^2 \frac{1}{n} \sum_{i=1}^n \mathcal N(u_j; c_i, \sigma^2).

    Reference: Nash and Durkan 2019, "Autoregressive energy machines" (the diamond of figure 1).

    :param int rows: modes along each side of the grid, at least 2.
    :param std: standard deviation of each mode, a number or a scalar tensor.
    :param validate_args: whether to check arguments and scored points.
    :raises ValueError: for fewer than two rows, or ``std`` that is no positive number.

    Example::

        >>> from pyro_ext.datasets import RotatedGrid
        >>> RotatedGrid(rows=3).sample((100,)).shape
        torch.Size([100, 2])
    """

    arg_constraints = {"std": constraints.positive}  # noqa: RUF012

    def __init__(
        self, rows: int = 15, std: Tensor | float = 0.06, *, validate_args: bool | None = None
    ) -> None:
        self.rows = _integer("rows", rows, at_least=2)
        self.std = _scalar("std", std)
        self._centres = torch.linspace(-2.5, 2.5, rows).to(self.std)
        super().__init__(validate_args)

    def _log_density(self, value: Tensor) -> Tensor:
        x, y = value.unbind(-1)
        rotated = torch.stack([x + y, y - x], -1) * math.sqrt(0.5)
        standardized = (rotated.unsqueeze(-1) - self._centres) / self.std
        log_modes = -0.5 * (standardized.square() + _LOG_2_PI) - self.std.log()
        return (log_modes.logsumexp(-1) - math.log(self.rows)).sum(-1)

    def _draw(self, shape: torch.Size) -> Tensor:
        modes = torch.randint(self.rows, (*shape, 2), device=self.std.device)
        noise = self.std * _normal((*shape, 2), self.std)
        u, v = (self._centres[modes] + noise).unbind(-1)
        return torch.stack([u - v, u + v], -1) * math.sqrt(0.5)


class Checkerboard(_PlaneDensity):
    r"""
    Uniform on the squares of one colour of a checkerboard around the origin.

    With :math:`n` rows of squares of side :math:`s`,

    .. math:: p(x) = \frac{2}{n^2 s^2} \quad\text{where}\quad
        \lfloor x_1 / s \rfloor + \lfloor x_2 / s \rfloor \text{ is even and }
        -\tfrac{n}{2} \le x_j / s < \tfrac{n}{2},

    and zero elsewhere. The discontinuities cannot be met by a smooth density.

    Reference: Grathwohl et al. 2019, "FFJORD" (figure 2).

    :param int rows: squares along each side of the board, an even number.
    :param side: length of the side of a square, a number or a scalar tensor.
    :param validate_args: whether to check arguments and scored points.
    :raises ValueError: for an odd number of rows, or ``side`` that is no positive number.

    Example::

        >>> from pyro_ext.datasets import Checkerboard
        >>> Checkerboard().log_prob(torch.tensor([[0.5, 0.5], [0.5, 1.5]])).exp()
        tensor([0.0312, 0.0000])
    """

    arg_constraints = {"side": constraints.positive}  # noqa: RUF012

    def __init__(
        self, rows: int = 8, side: Tensor | float = 1.0, *, validate_args: bool | None = None
    ) -> None:
        self.rows = _integer("rows", rows, at_least=2)
        if rows % 2 != 0:
            raise ValueError(
                f"rows must be even, for as many squares of either colour, got {rows}."
            )
        self.side = _scalar("side", side)
        super().__init__(validate_args)

    def _log_density(self, value: Tensor) -> Tensor:
        square = (value / self.side).floor()
        inside = ((square >= -self.rows // 2) & (square < self.rows // 2)).all(-1)
        of_the_colour = square.sum(-1).remainder(2) == 0
        height = math.log(2 / self.rows**2) - 2 * self.side.log()
        return torch.where(inside & of_the_colour, height, -math.inf)

    def _draw(self, shape: torch.Size) -> Tensor:
        row = torch.randint(self.rows, shape, device=self.side.device)
        in_row = torch.randint(self.rows // 2, shape, device=self.side.device)
        corner = torch.stack([row, 2 * in_row + row % 2], -1) - self.rows // 2
        # rounding must not carry a point over the edge of its square
        margin = 2 * self.rows * torch.finfo(self.side.dtype).eps
        within = _uniform(corner.shape, self.side).clamp(margin, 1 - margin)
        return self.side * (corner + within)


class TwoSpirals(_PlaneDensity):
    r"""
    Two interleaved spiral arms.

    A point is drawn along an arm, moved within a square of side :math:`a / 2` with
    :math:`a = 0.7`, put on one of the two arms and blurred,

    .. math::
        x = \pm \tfrac13 \bigl( (-a m \cos m,\; a m \sin m) + b \bigr) + \sigma \varepsilon,
        \qquad m = 5 \pi \sqrt u,

    with :math:`u` and :math:`2 b_j / a` uniform on the unit interval and :math:`\varepsilon`
    standard normal. Given the place on the arm, the coordinates are independent sums of a uniform
    and a normal variable, whose density is a difference of normal distribution functions. The
    density is the integral of their product over the arm,

    .. math::
        p(x) = \frac12 \sum_\pm \int_0^{5\pi} \frac{2 m}{25 \pi^2} \prod_{j=1}^2
        \frac{\Phi((\pm x_j - l_j(m)) / \sigma) - \Phi((\pm x_j - l_j(m) - a/6) / \sigma)}{a / 6}
        \,\mathrm dm,

    where :math:`l(m)` is the lower corner of the square. Gauss-Legendre quadrature on panels of
    equal length along the arm computes it: the error of the log density is about
    :math:`10^{-12}` along the arms and :math:`10^{-5}` at the rims of the noise, for the default
    noise and panels. Smaller noise needs more panels.

    Reference: Nash and Durkan 2019, "Autoregressive energy machines" (figure 1).

    :param std: standard deviation of the noise, a number or a scalar tensor.
    :param int panels: panels of the quadrature, with ten nodes each.
    :param validate_args: whether to check arguments and scored points.
    :raises ValueError: for ``panels`` below one, or ``std`` that is no positive number.

    Example::

        >>> from pyro_ext.datasets import TwoSpirals
        >>> spirals = TwoSpirals()
        >>> spirals.log_prob(spirals.sample((5,))).isfinite().all()
        tensor(True)
    """

    arg_constraints = {"std": constraints.positive}  # noqa: RUF012

    _SIZE = 0.7
    _LENGTH = 5 * math.pi
    _BOX = _SIZE / 6  # side of the square after the division by three
    _POINTS_AT_ONCE = 512

    def __init__(
        self,
        std: Tensor | float = 0.09,
        *,
        panels: int = 100,
        validate_args: bool | None = None,
    ) -> None:
        self.std = _scalar("std", std)
        nodes, weights = _arm_quadrature(_integer("panels", panels, at_least=1), self._LENGTH)
        self._corners = self._arm(nodes).to(self.std)  # (nodes, 2)
        self._log_weights = weights.log().to(self.std)  # (nodes,)
        super().__init__(validate_args)

    def _arm(self, m: Tensor) -> Tensor:
        return torch.stack([-m.cos(), m.sin()], -1) * (self._SIZE / 3) * m.unsqueeze(-1)

    def _log_density(self, value: Tensor) -> Tensor:
        # the quadrature holds all nodes of a point at once, which is much memory for many points
        chunks = value.reshape(-1, 2).split(self._POINTS_AT_ONCE)
        return torch.cat([self._log_integral(x) for x in chunks]).reshape(value.shape[:-1])

    def _log_integral(self, x: Tensor) -> Tensor:
        both_arms = torch.stack([x, -x], 1).unsqueeze(-2)  # (points, 2 signs, 1, 2)
        distance = (both_arms - self._corners) / self.std
        log_square = _log_normal_interval(distance - self._BOX / self.std, distance)
        log_integrand = self._log_weights + (log_square - math.log(self._BOX)).sum(-1)
        return log_integrand.flatten(1).logsumexp(1) - math.log(2)

    def _draw(self, shape: torch.Size) -> Tensor:
        arm = self._arm(self._LENGTH * _uniform(shape, self.std).sqrt())
        square = self._BOX * _uniform((*shape, 2), self.std)
        sign = 1 - 2 * torch.randint(2, (*shape, 1), device=self.std.device)
        return sign * (arm + square) + self.std * _normal((*shape, 2), self.std)


class Rings(_PlaneDensity):
    r"""
    Concentric circles blurred by Gaussian noise.

    For a point at distance :math:`\rho` from the origin and radii :math:`r_1, \dots, r_n`,

    .. math::
        p(x) = \frac1n \sum_{i=1}^n \frac{1}{2 \pi \sigma^2}
        \exp\Bigl(-\frac{\rho^2 + r_i^2}{2 \sigma^2}\Bigr) I_0\Bigl(\frac{\rho r_i}{\sigma^2}
        \Bigr),

    with the modified Bessel function :math:`I_0`.

    Reference: Grathwohl et al. 2019, "FFJORD" (figure 2).

    :param radii: radii of the circles, positive numbers or a tensor of shape ``(n,)``.
    :param std: standard deviation of the noise, a number or a scalar tensor.
    :param validate_args: whether to check arguments and scored points.
    :raises ValueError: for radii or ``std`` that are not positive numbers.

    Example::

        >>> from pyro_ext.datasets import Rings
        >>> Rings().sample((100,)).shape
        torch.Size([100, 2])
    """

    arg_constraints = {  # noqa: RUF012
        "radii": constraints.independent(constraints.positive, 1),
        "std": constraints.positive,
    }

    def __init__(
        self,
        radii: Tensor | tuple[float, ...] = _RING_RADII,
        std: Tensor | float = 0.08,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.std = _scalar("std", std)
        self.radii = torch.as_tensor(radii).to(self.std)
        if self.radii.dim() != 1 or len(self.radii) == 0:
            raise ValueError(
                f"radii must be a vector of at least one radius, got shape "
                f"{tuple(self.radii.shape)}."
            )
        super().__init__(validate_args)

    def _log_density(self, value: Tensor) -> Tensor:
        distance = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        variance = self.std.square()
        # exp(-(d^2 + r^2) / 2v) I0(d r / v), with the growth of I0 taken into the exponent
        log_bessel = torch.special.i0e(distance * self.radii / variance).log()
        log_rings = log_bessel - 0.5 * (distance - self.radii).square() / variance
        normalizer = _LOG_2_PI + variance.log() + math.log(len(self.radii))
        return log_rings.logsumexp(-1) - normalizer

    def _draw(self, shape: torch.Size) -> Tensor:
        radius = self.radii[torch.randint(len(self.radii), shape, device=self.std.device)]
        angle = 2 * math.pi * _uniform(shape, self.std)
        circle = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
        return circle + self.std * _normal((*shape, 2), self.std)


def _integer(name: str, value: int, *, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")
    return value


def _scalar(name: str, value: Tensor | float) -> Tensor:
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if tensor.dim() != 0:
        raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}.")
    return tensor


def _normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def _uniform(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.rand(shape, dtype=like.dtype, device=like.device)


def _arm_quadrature(panels: int, length: float) -> tuple[Tensor, Tensor]:
    """Nodes ``m`` along an arm and weights that integrate against its density ``2 m / L^2``."""
    # distances along the arm grow with the square of m
    edges = length * np.sqrt(np.linspace(0.0, 1.0, panels + 1))
    nodes, weights = np.polynomial.legendre.leggauss(10)
    half_widths = 0.5 * np.diff(edges)[:, None]
    m = (edges[:-1, None] + half_widths * (1 + nodes)).reshape(-1)
    mass = (half_widths * weights).reshape(-1) * 2 * m / length**2
    return torch.from_numpy(m), torch.from_numpy(mass)


def _log_normal_interval(low: Tensor, high: Tensor) -> Tensor:
    """Logarithm of the mass that a standard normal variable has between two numbers."""
    # in the upper tail both distribution functions are one to all digits: reflect to the lower
    is_upper = low + high > 0
    low, high = torch.where(is_upper, -high, low), torch.where(is_upper, -low, high)
    log_high = torch.special.log_ndtr(high)
    return log_high + torch.log1p(-(torch.special.log_ndtr(low) - log_high).exp())
