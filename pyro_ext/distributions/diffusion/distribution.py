"""The distribution that a call of a score flow returns."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ...errors import DiscreteDataWarning
from ..flow import check_precision
from .bound import Elbo, elbo
from .flow_ode import Flowed, flow
from .guidance import Likelihood, classifier_free, with_likelihood
from .sampling import SDE_METHODS, reverse_sde
from .score import Score, column, row_numbers
from .sde import SDE
from .settings import OdeSettings, check_settings, check_whole

__all__ = ["Diffusion", "OdeDensity", "ScoreFlowDistribution", "check_data"]

_ROWS_AT_ONCE = 4096


class Diffusion(Protocol):
    """What a distribution needs of its module."""

    sde: SDE
    ode: OdeSettings
    event_shape: torch.Size
    loc: Tensor
    scale: Tensor

    def score_of(self, context: Tensor | None) -> Score:
        """The score of standardised data, given rows of context."""

    def parameters(self) -> Any:
        """The parameters of the network."""


class OdeDensity(NamedTuple):
    """What solving the probability-flow equation gives."""

    log_prob: Tensor
    """Log-densities, shape ``sample_shape + batch_shape``."""

    noise: Tensor
    """What the data become, standard normal if the model is right, shape of the data."""

    num_evaluations: Tensor
    """How often the score was evaluated for each value, shape ``sample_shape + batch_shape``."""


class ScoreFlowDistribution(TorchDistribution):
    r"""
    The distribution that a learned score gives, given a context if it has one.

    Two in fact: that of the probability-flow equation, whose ``log_prob`` is computed by solving
    it, and that of the reverse diffusion, of whose density there is the lower bound
    :meth:`elbo`. They are the same where the score is exact (theorem 2). ``sample`` draws from
    either.

    A light object made by the call of the module, which keeps the trainable parameters.

    :param Diffusion module: the module, a :class:`ScoreFlow`.
    :param Tensor context: shape ``batch_shape + (context_features,)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        module: Diffusion,
        context: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.module, self.context = module, context
        self._guidance: tuple[tuple[str, Any], ...] = ()
        batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, module.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(
        self,
        batch_shape: torch.Size | list[int] | tuple[int, ...],
        _instance: ScoreFlowDistribution | None = None,
    ) -> ScoreFlowDistribution:
        """Expand to a larger batch; draws of all its elements are independent."""
        new = self._get_checked_instance(ScoreFlowDistribution, _instance)
        new.module, new.context, new._guidance = self.module, self.context, self._guidance
        super(ScoreFlowDistribution, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    # -- density ------------------------------------------------------------------------------

    def log_prob(self, value: Tensor, **changes: Any) -> Tensor:  # type: ignore[override]
        """
        Log-density under the probability-flow equation, by solving it (eq. 7).

        It is that of the data as they are at the start of the diffusion, of which they differ by
        noise of its standard deviation there. With Hutchinson's estimate of the trace it is
        unbiased and random; without, it is exact to the tolerance of the solver.

        :param Tensor value: shape broadcastable to ``batch_shape + event_shape``.
        :param changes: fields of :class:`~.OdeSettings` to be changed for this call, such as
            ``rtol=1e-7`` or ``trace="exact"``.
        :returns: shape ``sample_shape + batch_shape``.
        :raises TypeError: if the values are no floating-point numbers, or of higher precision than
            the parameters, or there is no such setting.
        :raises ValueError: if a setting is out of range, or validation is on and the value not
            in the support.
        :raises PyroExtError: if a solution needs too many evaluations, or scores are not finite.
        """
        return self.density(value, **changes).log_prob

    def density(self, value: Tensor, **changes: Any) -> OdeDensity:
        """
        Log-density, with the noise that the data become and the work it took.

        :param Tensor value: see :meth:`log_prob`.
        :param changes: see :meth:`log_prob`.
        :returns: log-densities, noise, numbers of evaluations.
        """
        settings = check_settings(self.module.ode._replace(**changes))
        shape, rows, context = self._rows(value)
        follows = torch.is_grad_enabled() and not settings.score_gradient
        size = max(1, len(rows)) if follows else _ROWS_AT_ONCE
        parts = []
        with torch.set_grad_enabled(follows):
            for start in range(0, max(1, len(rows)), size):
                part = slice(start, start + size)
                some = None if context is None else context[part]
                found = self._flow(rows[part], some, settings, to_noise=True, with_log_det=True)
                parts.append(found)
            noise = torch.cat([part.value for part in parts]) / self.module.sde.prior_std
            log_det = torch.cat([part.log_det for part in parts if part.log_det is not None])
            evaluations = torch.cat([part.num_evaluations for part in parts])
            log_prob = self._log_prior(noise) + log_det - self._log_scale()
        if settings.score_gradient and rows.requires_grad:
            t = rows.new_full((len(rows),), self.module.sde.start)
            with torch.no_grad():
                z = self._standardized(rows)
                score = self._score(context)(z, t, row_numbers(rows)) / self.module.scale
            # zero, with the score as its gradient
            log_prob = log_prob + (score * (rows - rows.detach())).flatten(1).sum(-1)
        return OdeDensity(
            log_prob.reshape(shape),
            noise.reshape(shape + self.event_shape),
            evaluations.reshape(shape),
        )

    def elbo(self, value: Tensor, num_samples: int = 100, *, correction: bool = True) -> Elbo:
        """
        Lower bound on the log-density of the reverse diffusion, estimated.

        Theorem 6 with the correction of eq. 39, from denoising errors at random times. The
        standard error is that of the draws; differences between data are not in it.

        :param Tensor value: shape broadcastable to ``batch_shape + event_shape``.
        :param int num_samples: times for each value, an even number.
        :param bool correction: for the data; without, for what they are at the start of the
            diffusion, in expectation over its noise there.
        :returns: bounds and their standard errors, each of shape ``sample_shape + batch_shape``.
        :raises ValueError: if ``num_samples`` is not an even number of at least 2.
        """
        if check_whole("num_samples", num_samples, 2) % 2:
            raise ValueError(f"num_samples must be even, got {num_samples}")
        shape, rows, context = self._rows(value)
        found = elbo(
            self._score(context),
            self.module.sde,
            self._standardized(rows),
            num_samples,
            correction=correction,
            rows_at_once=_ROWS_AT_ONCE,
        )
        return Elbo(
            (found.value - self._log_scale()).reshape(shape),
            found.standard_error.reshape(shape),
        )

    def score(self, value: Tensor, t: float | Tensor | None = None) -> Tensor:
        r"""
        Learned gradient of the log-density, :math:`\nabla_x \log p_t(x)`.

        :param Tensor value: noisy data :math:`a(t) x + s \sigma(t) z` in the units of the data,
            with s the scale that the module has taken from them; shape broadcastable to
            ``batch_shape + event_shape``.
        :param t: time, one number or the shape ``sample_shape + batch_shape``; by default the
            start, where the score is that of the data.
        :returns: shape ``sample_shape + batch_shape + event_shape``.
        :raises ValueError: if the time is not one of the diffusion.
        """
        shape, rows, context = self._rows(value)
        sde, loc = self.module.sde, self.module.loc
        is_start = t is None
        t = torch.as_tensor(sde.start if t is None else t, dtype=rows.dtype, device=rows.device)
        sde.check_times(t)
        t = t.expand(shape).reshape(-1)
        x = rows if is_start else rows + loc * (1 - column(sde.mean_factor(t), rows))
        found = self._score(context)(self._standardized(x), t, row_numbers(rows))
        return (found / self.module.scale).reshape(shape + self.event_shape)

    # -- draws --------------------------------------------------------------------------------

    def sample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        *,
        method: str = "ode",
        num_steps: int = 500,
        num_corrections: int = 1,
        correction_size: float = 0.2,
        denoise: bool = False,
        **changes: Any,
    ) -> Tensor:
        """
        Draw without gradients.

        :param sample_shape: shape of the draws.
        :param str method: ``"ode"``, the probability-flow equation; ``"euler_maruyama"``, the
            reverse diffusion; ``"predictor_corrector"``, with Langevin steps in between.
        :param int num_steps: steps of the reverse diffusion.
        :param int num_corrections: Langevin steps after each.
        :param float correction_size: the ratio of step to noise level of these, r in
            :func:`~pyro_ext.distributions.diffusion.sampling.reverse_sde`.
        :param bool denoise: whether to take the noise of the first time away at the end.
        :param changes: fields of :class:`~.OdeSettings`, for the method ``"ode"``.
        :returns: shape ``sample_shape + batch_shape + event_shape``.
        :raises ValueError: if an argument is out of range, or a score not finite.
        :raises PyroExtError: see :meth:`log_prob`.
        """
        with torch.no_grad():
            noise = torch.randn(
                self._extended_shape(torch.Size(sample_shape)),
                dtype=self.module.loc.dtype,
                device=self.module.loc.device,
            )
            if method == "ode":
                return self.to_data(noise, **changes)
            if method not in SDE_METHODS:
                names = ", ".join(("ode", *SDE_METHODS))
                raise ValueError(f"method must be one of {names}, got {method!r}")
            if changes:
                raise TypeError(
                    f"{', '.join(changes)}: settings of the probability-flow equation, which "
                    f"method={method!r} does not solve"
                )
            if not 0 < correction_size < 1:
                raise ValueError(
                    f"correction_size must be a number between 0 and 1, got {correction_size}"
                )
            check_whole("num_corrections", num_corrections, 0)
            shape, rows, context = self._rows(noise)
            x = reverse_sde(
                self._score(context),
                self.module.sde,
                rows * self.module.sde.prior_std,
                num_steps=check_whole("num_steps", num_steps, 1),
                num_corrections=num_corrections if method == "predictor_corrector" else 0,
                correction_size=correction_size,
                denoise=denoise,
            )
            x = x * self.module.scale + self.module.loc
            return x.reshape(shape + self.event_shape)

    def rsample(
        self, sample_shape: torch.Size | list[int] | tuple[int, ...] = (), **changes: Any
    ) -> Tensor:
        """
        Draw with gradients, through the probability-flow equation.

        :param sample_shape: shape of the draws.
        :param changes: fields of :class:`~.OdeSettings`; with ``adjoint=True`` and a solver of
            ``torchdiffeq`` the memory does not grow with the number of steps.
        :returns: shape ``sample_shape + batch_shape + event_shape``.
        """
        loc = self.module.loc
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.to_data(torch.randn(shape, dtype=loc.dtype, device=loc.device), **changes)

    def to_data(self, noise: Tensor, **changes: Any) -> Tensor:
        """
        Turn standard normal noise into data by the probability-flow equation.

        A deterministic map with a smooth inverse, see :meth:`density`: a model can sample the
        noise and make the data of it.

        :param Tensor noise: shape broadcastable to ``batch_shape + event_shape``.
        :param changes: fields of :class:`~.OdeSettings` to be changed for this call.
        :returns: shape ``sample_shape + batch_shape + event_shape``.
        """
        settings = check_settings(self.module.ode._replace(**changes))
        shape, rows, context = self._rows(noise)
        found = self._flow(rows, context, settings, to_noise=False, with_log_det=False)
        return found.value.reshape(shape + self.event_shape)

    # -- guidance -----------------------------------------------------------------------------

    def guided(
        self, likelihood: Likelihood, weight: float = 1.0, *, of_denoised: bool = True
    ) -> ScoreFlowDistribution:
        r"""
        Condition on something of which there is a likelihood, approximately.

        A narrow likelihood of data pulls too strongly where there is much noise, up to draws that
        diverge: add the variance of data given noisy ones to its own, about
        :math:`\sigma^2 / (a^2 + \sigma^2)` times that of the data at the time t.

        :param likelihood: log-likelihoods of shape ``(n,)`` from data ``(n,) + event_shape`` in
            their own units and times ``(n,)``, differentiable.
        :param float weight: what its gradient is multiplied by.
        :param bool of_denoised: whether it is a likelihood of data, which is then evaluated at
            their expectation given the noisy ones; otherwise it has to be one of noisy data.
        :returns: a distribution to draw from, with a score that is the sum of both. Its density
            is that of these draws, and the better an approximation of the posterior the better
            that of the likelihood given noisy data.
        """
        new = self.expand(self.batch_shape)
        new._guidance = (*self._guidance, ("likelihood", (likelihood, weight, of_denoised)))
        return new

    def away_from_unconditional(self, weight: float) -> ScoreFlowDistribution:
        """
        Classifier-free guidance: let the context count for more than it does.

        For a module that was trained with ``context_dropout``.

        :param float weight: w in ``(1 + w) s(x, t, c) - w s(x, t)``; 0 changes nothing.
        :returns: a distribution to draw from.
        :raises ValueError: if there is no context, or the module has learned nothing without.
        """
        if self.context is None or not getattr(self.module, "context_dropout", 0.0):
            raise ValueError(
                "there are no unconditional scores: guidance without a classifier needs a "
                "context, and a flow made and trained with context_dropout=0.1, say"
            )
        new = self.expand(self.batch_shape)
        new._guidance = (*self._guidance, ("unconditional", weight))
        return new

    def _score(self, context: Tensor | None) -> Score:
        score = self.module.score_of(context)
        for kind, argument in self._guidance:
            if kind == "unconditional":
                score = classifier_free(score, self.module.score_of(None), argument)
            else:
                score = self._with_likelihood(score, *argument)
        return score

    def _with_likelihood(
        self, score: Score, likelihood: Likelihood, weight: float, of_denoised: bool
    ) -> Score:
        loc, scale, sde = self.module.loc, self.module.scale, self.module.sde

        def of_standardized(x: Tensor, t: Tensor) -> Tensor:
            # noisy data are those of the diffusion in units of the data
            shift = loc if of_denoised else loc * column(sde.mean_factor(t), x)
            return likelihood(x * scale + shift, t)

        return with_likelihood(score, sde, of_standardized, weight, of_denoised)

    # -- rows ---------------------------------------------------------------------------------

    def _rows(self, value: Tensor) -> tuple[torch.Size, Tensor, Tensor | None]:
        """The shape of the result, and the values and contexts as rows."""
        check_data("value", value, self.event_shape)
        check_precision("value", value, cast(nn.Module, self.module))
        if self._validate_args and value.numel():
            self._validate_sample(value)
        event_dim = len(self.event_shape)
        batch_shape = torch.broadcast_shapes(
            value.shape[: value.dim() - event_dim], self.batch_shape
        )
        rows = value.expand(batch_shape + self.event_shape).reshape(-1, *self.event_shape)
        context = self.context
        if context is not None:
            context = context.expand(*batch_shape, -1).reshape(len(rows), context.shape[-1])
        return batch_shape, rows, context

    def _standardized(self, rows: Tensor) -> Tensor:
        return (rows - self.module.loc) / self.module.scale

    def _log_scale(self) -> Tensor:
        return self.module.scale.expand(self.event_shape).log().sum()

    def _log_prior(self, noise: Tensor) -> Tensor:
        num_dimensions = self.event_shape.numel()
        normal = torch.distributions.Normal(noise.new_zeros(()), 1.0, validate_args=False)
        log_scale = num_dimensions * math.log(self.module.sde.prior_std)
        return normal.log_prob(noise).flatten(1).sum(-1) - log_scale

    def _flow(
        self,
        rows: Tensor,
        context: Tensor | None,
        settings: OdeSettings,
        *,
        to_noise: bool,
        with_log_det: bool,
    ) -> Flowed:
        """From data to noise of the scale of the prior, or from standard noise to data."""
        parameters: tuple[Tensor, ...] = ()
        if settings.adjoint:
            parameters = tuple(p for p in self.module.parameters() if p.requires_grad)
            if context is not None and context.requires_grad:
                parameters = (*parameters, context)
        start = self._standardized(rows) if to_noise else rows * self.module.sde.prior_std
        found = flow(
            self._score(context),
            self.module.sde,
            start,
            settings,
            to_noise=to_noise,
            with_log_det=with_log_det,
            parameters=parameters,
        )
        if to_noise:
            return found
        return found._replace(value=found.value * self.module.scale + self.module.loc)


def check_data(name: str, x: Tensor, event_shape: torch.Size) -> None:
    """
    Check that data are real numbers of the right shape, and warn of integers.

    :param str name: what they are, for the message.
    :param Tensor x: the data.
    :param event_shape: the shape of one datum.
    :raises TypeError: if they are no floating-point tensor.
    :raises ValueError: if their shape is wrong.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"The {name} is of {x.dtype}: a score flow is a density of real numbers. Dequantise "
            "integers, by DequantizedFlow(flow, UniformDequantization(levels)), say."
        )
    if x.shape[x.dim() - len(event_shape) :] != event_shape or x.dim() < len(event_shape):
        raise ValueError(
            f"The {name} has shape {tuple(x.shape)}; its last dimensions have to be "
            f"{tuple(event_shape)}."
        )
    if x.numel() > 1 and len(event_shape) and _are_integers(x):
        warnings.warn(
            f"All numbers of the {name} are integers: a density of them has no bound. Dequantise "
            "them, by DequantizedFlow(flow, UniformDequantization(levels)), say.",
            DiscreteDataWarning,
            stacklevel=4,
        )


def _are_integers(x: Tensor) -> bool:
    with torch.no_grad():
        # zeros alone, or a single one-hot vector, are nothing to warn of
        return bool((x == x.round()).all()) and bool(x.abs().max() > 1)
