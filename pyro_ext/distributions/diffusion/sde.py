r"""Stochastic differential equations that turn data into noise, and their time scale.

All have a drift that is linear in x, so that what data become is a Gaussian,

.. math:: dx = f(t) \, x \, dt + g(t) \, dw, \qquad
    p_{0t}(x_t \mid x) = \mathcal N(a(t) \, x, \sigma(t)^2 I) .
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["SDE", "VESDE", "VPSDE", "SubVPSDE", "make_sde"]


class SDE(ABC):
    r"""
    A diffusion with linear drift on :math:`[\epsilon, T]`, and its natural time.

    Likelihoods weigh the denoising error of time t by :math:`g(t)^2 / \sigma(t)^2` (table 1 of
    the reference, for errors in units of the noise). Times are therefore drawn from the density
    proportional to it (eq. 12), here called the natural scale :math:`u \in [0, 1]`:

    .. math:: \frac{du}{dt} = \frac{1}{Z} \frac{g(t)^2}{\sigma(t)^2}, \qquad
        Z = \int_\epsilon^T \frac{g(t)^2}{\sigma(t)^2} \, dt .

    For the three diffusions here it goes with the logarithm of the signal-to-noise ratio or
    close to it, and ordinary differential equations are smooth on it.

    A diffusion of your own gives the six abstract methods and ``prior_std``.

    :param float start: :math:`\epsilon`, where scores are still bounded.
    :param float end: T.
    :raises ValueError: if not ``0 < start < end``.

    Reference: Song, Durkan, Murray and Ermon 2021, "Maximum likelihood training of score-based
    diffusion models", section 2, table 1 and appendix B.
    """

    prior_std: float = 1.0
    """Standard deviation of the noise that data have become at time T."""

    def __init__(self, start: float, end: float = 1.0) -> None:
        if not 0.0 < start < end < math.inf:
            raise ValueError(
                f"start must be a time after 0 and before end={end}, got {start}: scores are not "
                "bounded at time 0"
            )
        self.start, self.end = float(start), float(end)

    @abstractmethod
    def drift_rate(self, t: Tensor) -> Tensor:
        r"""The drift at x over x, :math:`f(t) = d \log a / dt`."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """The diffusion coefficient g."""

    @abstractmethod
    def log_mean_factor(self, t: Tensor) -> Tensor:
        r"""Logarithm of what remains of the data, :math:`\log a(t)`."""

    @abstractmethod
    def std(self, t: Tensor) -> Tensor:
        r"""Standard deviation of the noise that has come, :math:`\sigma(t)`."""

    @abstractmethod
    def natural(self, t: Tensor) -> Tensor:
        r"""An antiderivative of :math:`g^2 / \sigma^2`."""

    @abstractmethod
    def inverse_natural(self, value: Tensor) -> Tensor:
        """The time at which :meth:`natural` has a value."""

    def mean_factor(self, t: Tensor) -> Tensor:
        r"""What remains of the data, :math:`a(t)`."""
        return self.log_mean_factor(t).exp()

    def likelihood_weight(self, t: Tensor) -> Tensor:
        r"""Weight :math:`g^2` of squared errors of the score that bounds the likelihood."""
        return self.diffusion(t).square()

    def original_weight(self, t: Tensor) -> Tensor:
        r"""Weight :math:`\alpha^2 = \sigma^2` of Song et al. 2021, for the looks of samples."""
        return self.std(t).square()

    @property
    def natural_length(self) -> float:
        r"""Z, the integral of :math:`g^2 / \sigma^2` from ``start`` to ``end``."""
        low, high = self._ends(torch.tensor(0.0, dtype=torch.float64))
        return float(high - low)

    def time(self, u: Tensor) -> Tensor:
        """
        The time at a fraction of the natural scale: the inverse distribution function of eq. 12.

        :param Tensor u: numbers from 0 to 1.
        :returns: times from ``start`` to ``end``, of the same shape.
        """
        low, high = self._ends(u)
        return self.inverse_natural(low + u * (high - low)).clamp(self.start, self.end)

    def fraction(self, t: Tensor) -> Tensor:
        """
        The fraction of the natural scale that is over at a time, the inverse of :meth:`time`.

        :param Tensor t: times from ``start`` to ``end``.
        :returns: numbers from 0 to 1, of the same shape.
        """
        low, high = self._ends(t)
        return (self.natural(t) - low) / (high - low)

    def importance_density(self, t: Tensor) -> Tensor:
        """
        The density over times from which eq. 12 draws.

        :param Tensor t: times from ``start`` to ``end``.
        :returns: densities, of the same shape.
        """
        return (self.diffusion(t) / self.std(t)).square() / self.natural_length

    def check_times(self, t: Tensor) -> None:
        """
        Check that times are between start and end.

        :param Tensor t: times.
        :raises ValueError: if one is not.
        """
        # an end that was rounded to single precision is inside
        slack = 4 * torch.finfo(t.dtype).eps
        inside = (t >= self.start * (1 - slack)) & (t <= self.end * (1 + slack))
        if not bool(inside.all()):
            raise ValueError(
                f"times must be between start={self.start} and end={self.end}, got "
                f"{float(t[~inside].flatten()[0])}"
            )

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        ends = like.new_tensor([self.start, self.end], dtype=torch.float64)
        low, high = self.natural(ends).to(like.dtype).unbind()
        return low, high

    def __repr__(self) -> str:
        return f"{type(self).__name__}(start={self.start:g}, end={self.end:g})"


class VESDE(SDE):
    r"""
    Variance exploding: the data stay, and noise grows without bound.

    .. math:: a = 1, \quad \sigma(t) = \sigma_{min} (\sigma_{max} / \sigma_{min})^t, \quad
        g^2 = 2 \sigma^2 \log(\sigma_{max} / \sigma_{min})

    The noise of :math:`\sigma_{min}` is there from the beginning, as if the process had begun at
    :math:`t = -\infty`. Both weightings are the same up to a factor, and uniform times the
    natural ones.

    :param float sigma_min: noise at time 0.
    :param float sigma_max: noise at time 1, more than the distances between data.
    :param float start: first time.
    :raises ValueError: if not ``0 < sigma_min < sigma_max``.

    >>> from pyro_ext.distributions.diffusion import VESDE
    >>> VESDE(0.01, 100.0).std(torch.tensor([0.0, 0.5, 1.0]))
    tensor([1.0000e-02, 1.0000e+00, 1.0000e+02])
    """

    def __init__(
        self, sigma_min: float = 0.01, sigma_max: float = 50.0, *, start: float = 1e-5
    ) -> None:
        if not 0.0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"0 < sigma_min < sigma_max is needed, got sigma_min={sigma_min} and "
                f"sigma_max={sigma_max}"
            )
        super().__init__(start)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.prior_std = float(sigma_max)
        self._rate = math.log(sigma_max / sigma_min)

    def drift_rate(self, t: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        r""":math:`\sigma(t) \sqrt{2 \log(\sigma_{max} / \sigma_{min})}`."""
        return self.std(t) * math.sqrt(2 * self._rate)

    def log_mean_factor(self, t: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(t)

    def std(self, t: Tensor) -> Tensor:
        """See :meth:`SDE.std`."""
        return self.sigma_min * (self._rate * t).exp()

    def natural(self, t: Tensor) -> Tensor:
        """See :meth:`SDE.natural`."""
        return 2 * self._rate * t

    def inverse_natural(self, value: Tensor) -> Tensor:
        """See :meth:`SDE.inverse_natural`."""
        return value / (2 * self._rate)


class _LinearSchedule(SDE):
    r"""
    What the two bounded diffusions share: :math:`\beta(t)` grows linearly from 0 to 1.

    :math:`B(t) = \int_0^t \beta = \beta_0 t + (\beta_1 - \beta_0) t^2 / 2`, :math:`a = e^{-B/2}`.
    """

    def __init__(self, beta_min: float, beta_max: float, start: float) -> None:
        if not 0.0 < beta_min <= beta_max < math.inf:
            raise ValueError(
                f"0 < beta_min <= beta_max is needed, got beta_min={beta_min} and "
                f"beta_max={beta_max}"
            )
        super().__init__(start)
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def beta(self, t: Tensor) -> Tensor:
        r"""The rate :math:`\beta(t)`."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integrated_beta(self, t: Tensor) -> Tensor:
        """B(t)."""
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def drift_rate(self, t: Tensor) -> Tensor:
        r""":math:`-\beta(t) / 2`."""
        return -0.5 * self.beta(t)

    def log_mean_factor(self, t: Tensor) -> Tensor:
        r""":math:`-B(t) / 2`."""
        return -0.5 * self.integrated_beta(t)

    def _time_of(self, integrated: Tensor) -> Tensor:
        """The root of a quadratic in the form that cancels nothing."""
        growth = 2 * (self.beta_max - self.beta_min)
        return 2 * integrated / (self.beta_min + (self.beta_min**2 + growth * integrated).sqrt())


class VPSDE(_LinearSchedule):
    r"""
    Variance preserving: the data fade while noise comes.

    .. math:: a = e^{-B/2}, \quad \sigma^2 = 1 - e^{-B}, \quad g^2 = \beta

    with :math:`B(t) = \int_0^t \beta`, and :math:`\beta` growing linearly.

    :param float beta_min: :math:`\beta(0)`.
    :param float beta_max: :math:`\beta(1)`.
    :param float start: first time.
    :raises ValueError: if not ``0 < beta_min <= beta_max``.

    >>> from pyro_ext.distributions.diffusion import VPSDE
    >>> VPSDE().natural_length
    23.86...
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, start: float = 1e-5
    ) -> None:
        super().__init__(beta_min, beta_max, start)

    def diffusion(self, t: Tensor) -> Tensor:
        r""":math:`\sqrt{\beta(t)}`."""
        return self.beta(t).sqrt()

    def std(self, t: Tensor) -> Tensor:
        """See :meth:`SDE.std`."""
        return (-torch.expm1(-self.integrated_beta(t))).sqrt()

    def natural(self, t: Tensor) -> Tensor:
        r""":math:`\log(e^B - 1)`, minus the logarithm of the signal-to-noise ratio."""
        integrated = self.integrated_beta(t)
        return integrated + (-torch.expm1(-integrated)).log()

    def inverse_natural(self, value: Tensor) -> Tensor:
        """See :meth:`SDE.inverse_natural`."""
        return self._time_of(softplus(value, threshold=50.0))


class SubVPSDE(_LinearSchedule):
    r"""
    Sub-variance preserving: less noise than with VP at every time.

    .. math:: a = e^{-B/2}, \quad \sigma = 1 - e^{-B}, \quad g^2 = \beta (1 - e^{-2B})

    :param float beta_min: :math:`\beta(0)`.
    :param float beta_max: :math:`\beta(1)`.
    :param float start: first time; later than for VP, since scores grow faster near 0.
    :raises ValueError: if not ``0 < beta_min <= beta_max``.

    >>> from pyro_ext.distributions.diffusion import SubVPSDE
    >>> SubVPSDE().natural_length
    22.48...
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, start: float = 1e-2
    ) -> None:
        super().__init__(beta_min, beta_max, start)

    def diffusion(self, t: Tensor) -> Tensor:
        r""":math:`\sqrt{\beta(t) (1 - e^{-2 B(t)})}`."""
        return (self.beta(t) * -torch.expm1(-2 * self.integrated_beta(t))).sqrt()

    def std(self, t: Tensor) -> Tensor:
        """See :meth:`SDE.std`."""
        return -torch.expm1(-self.integrated_beta(t))

    def natural(self, t: Tensor) -> Tensor:
        r""":math:`2 \log \sinh(B/2)`."""
        integrated = self.integrated_beta(t)
        return integrated + 2 * ((-torch.expm1(-integrated)).log() - math.log(2))

    def inverse_natural(self, value: Tensor) -> Tensor:
        """See :meth:`SDE.inverse_natural`."""
        half = 0.5 * value
        # asinh(e^h), without overflow where e^h is large
        large = half + torch.log1p((1 + (-2 * half.clamp_min(0)).exp()).sqrt())
        return self._time_of(2 * torch.where(half > 0, large, half.clamp_max(0).exp().asinh()))


_BY_NAME: dict[str, Callable[[], SDE]] = {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}


def make_sde(sde: str | SDE) -> SDE:
    """
    A diffusion by its name, with the settings of the paper.

    :param sde: "vp", "subvp", "ve", or a diffusion, which is returned.
    :returns: the diffusion.
    :raises ValueError: if the name is unknown.
    :raises TypeError: if it is something else.
    """
    if isinstance(sde, SDE):
        return sde
    if not isinstance(sde, str):
        raise TypeError(f"sde must be a name or an SDE, got a {type(sde).__name__}")
    if sde not in _BY_NAME:
        names = ", ".join(map(repr, _BY_NAME))
        raise ValueError(f"sde must be one of {names} or an SDE of your own, got {sde!r}")
    return _BY_NAME[sde]()
