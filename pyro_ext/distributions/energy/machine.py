"""Autoregressive energy machines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Uniform, constraints

from ...nn import EnergyNetwork, ResMADE
from ...nn.fourier import MaskedFourierLinear
from ..context import ContextScale
from ..flow import check_precision
from ..transforms import Standardize
from . import sampler
from .conditionals import Conditionals
from .distribution import EnergyMachineDistribution
from .monitor import NormalizerMonitor
from .normalizers import data_estimate, estimate, exact_log_normalizer
from .proposals import DefensiveMixture, FixedProposal, Proposal, UniformProposal
from .settings import Evaluation, box_of, check_at_least, check_proposal

__all__ = ["AutoregressiveEnergyMachine"]

_ROWS_AT_ONCE = 4096


class AutoregressiveEnergyMachine(nn.Module):
    r"""
    A density with a neural energy, normalised one feature at a time.

    .. math:: p(x) = \prod_{d=1}^D \frac{r_d(x_d) \, e^{u(x_d; \gamma_d)}}{Z_d}, \qquad
        Z_d = \int r_d(t) \, e^{u(t; \gamma_d)} dt

    where a masked network reads :math:`x_1, \dots, x_{d-1}` and gives the vector
    :math:`\gamma_d` and a mixture of Gaussians :math:`q_d`, the proposal. The energy -u can
    have edges, gaps and more modes than the mixture has components. The call of the module
    returns a distribution: ``aem()``, or ``aem(context)`` if there is a context. Train it by

    >>> from pyro_ext.training import fit_density
    >>> aem = AutoregressiveEnergyMachine(2, hidden_features=16, energy_hidden_features=16)
    >>> loss = AutoregressiveEnergyMachine.training_loss
    >>> result = fit_density(aem, torch.randn(500, 2), loss=loss, num_steps=5, progress=False)
    >>> aem().log_prob(torch.zeros(3, 2), exact=True).shape
    torch.Size([3])

    The normalisers are integrals over one number. ``log_prob`` estimates them from draws of the
    proposal, unless asked to be ``exact``, which is quadrature. So that the estimate can be
    trusted, and training cannot be rewarded for making it wrong, this differs from the paper:
    u is bounded between -B and 0; it is relative to a normalised reference r, the proposal or
    one broad component, so that p is proper; the proposal has that broad component in it with a
    fixed weight; its draws are stratified; the datum itself is one of them while training, which
    bounds the loss; and a monitor compares the estimates with quadrature every few hundred
    steps, see :meth:`diagnostics`. ``docs/autoregressive_energy.md`` gives the reasons.

    :param int features: number of features D.
    :param int context_features: size of a context, 0 for none.
    :param int hidden_features: size of the hidden layers of the masked network.
    :param int residual_blocks: blocks of each of the two networks.
    :param int energy_hidden_features: size of the hidden layers of the energy network.
    :param int energy_context: size of :math:`\gamma`.
    :param int frequencies: of sines and cosines that the networks read next to each number, so
        that they learn what varies fast; 0 for none, as in the paper.
    :param proposal: "gaussian_mixture"; or a distribution of one number that is not trained,
        with ``icdf``: the same for all features, or a ``Uniform`` whose ends have shape
        ``(features,)``, which is the box that the data are in.
    :param int mixture_components: Gaussians of a conditional of the proposal.
    :param float min_scale: smallest scale of a Gaussian, in standard deviations of the data.
    :param float defensive_weight: weight of the broad component in the proposal.
    :param str reference: "proposal", or "broad" for the broad component alone: the energy then
        has to make the whole shape, as in the paper.
    :param float energy_bound: B.
    :param int num_importance_samples: draws for a conditional in training.
    :param num_gradient_samples: how many of them, drawn by their weights, the gradient of the
        training loss is computed from; ``None`` for all, which is also done with dropout.
    :param max_conditionals: energies of at most so many conditionals of a minibatch are trained
        in one step, chosen at random, so that a step of many features takes no longer than one of
        few; ``None`` for all. The proposal is trained on all of them.
    :param int num_evaluation_samples: draws for a conditional in ``log_prob`` otherwise.
    :param int warmup_steps: training steps in which only the proposal is trained, if it is.
    :param int monitor_every: training steps between comparisons with quadrature, 0 for none.
    :param float dropout: probability of dropping a hidden unit in training.
    :raises ValueError: if a setting is out of its range.

    Reference: Nash and Durkan 2019, "Autoregressive energy machines".
    """

    training_steps: Tensor

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        hidden_features: int = 256,
        residual_blocks: int = 4,
        energy_hidden_features: int = 128,
        energy_context: int = 64,
        frequencies: int = 6,
        proposal: str | Distribution = "gaussian_mixture",
        mixture_components: int = 10,
        min_scale: float = 1e-3,
        defensive_weight: float = 0.05,
        reference: str = "proposal",
        energy_bound: float = 20.0,
        num_importance_samples: int = 20,
        num_gradient_samples: int | None = 4,
        max_conditionals: int | None = 4096,
        num_evaluation_samples: int = 1000,
        warmup_steps: int = 0,
        monitor_every: int = 250,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(
            features=(features, 1),
            energy_context=(energy_context, 1),
            frequencies=(frequencies, 0),
            mixture_components=(mixture_components, 1),
            num_importance_samples=(num_importance_samples, 3),
            num_evaluation_samples=(num_evaluation_samples, 1),
            warmup_steps=(warmup_steps, 0),
            monitor_every=(monitor_every, 0),
            num_gradient_samples=(1 if num_gradient_samples is None else num_gradient_samples, 1),
            max_conditionals=(1 if max_conditionals is None else max_conditionals, 1),
        )
        if not min_scale > 0.0:
            raise ValueError(f"min_scale={min_scale!r}: give a positive number.")
        if not 0.0 < defensive_weight < 1.0:
            raise ValueError(f"defensive_weight={defensive_weight!r}: give a number in (0, 1).")
        if reference not in ("proposal", "broad"):
            raise ValueError(f"reference={reference!r}: give 'proposal' or 'broad'.")
        self.features, self.context_features = features, context_features
        self.energy_context, self.reference = energy_context, reference
        self.min_scale, self.defensive_weight = min_scale, defensive_weight
        self.num_importance_samples, self.warmup_steps = num_importance_samples, warmup_steps
        # with dropout, a second evaluation would be of another function
        self._num_gradient_samples = None if dropout else num_gradient_samples
        self.max_conditionals = max_conditionals
        self._fixed = check_proposal(proposal, features)
        if self._fixed is not None and reference == "broad":
            raise ValueError("reference='broad' goes with proposal='gaussian_mixture' only.")
        loc, scale = box_of(self._fixed, features)
        self.standardize = Standardize(loc, scale)
        self.context_scale = ContextScale(context_features, loc)
        size = energy_context + (3 * mixture_components if self._fixed is None else 0)
        self.network = ResMADE(
            features,
            size,
            hidden_features,
            context_features=context_features,
            residual_blocks=residual_blocks,
            dropout=dropout,
        )
        if frequencies:
            reads = self.network.initial.mask
            self.network.initial = MaskedFourierLinear(reads, frequencies)
        if self._fixed is None:
            self._spread_components(mixture_components)
        self.energy = EnergyNetwork(
            energy_context,
            energy_hidden_features,
            residual_blocks=residual_blocks,
            frequencies=frequencies,
            bound=energy_bound,
            dropout=dropout,
        )
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.long))
        self.monitor = NormalizerMonitor(monitor_every)
        self._evaluation = Evaluation(num_evaluation_samples, False, 100, 1e-4)

    def extra_repr(self) -> str:
        """Show the sizes when the module is printed."""
        return f"features={self.features}, context_features={self.context_features}"

    def forward(self, context: Tensor | None = None) -> EnergyMachineDistribution:
        """
        Return the distribution of the data, given a context if there is one.

        :param Tensor context: shape ``batch_shape + (context_features,)``.
        :returns: a distribution over vectors of shape ``(features,)``.
        :raises ValueError: if the context is missing, not expected or of the wrong size.
        :raises TypeError: if the context is of higher precision than the parameters.
        """
        self.context_scale.check(context)
        return EnergyMachineDistribution(self, context)

    @property
    def support(self) -> constraints.Constraint:
        """Where the data lie: everywhere, or where a fixed proposal is."""
        if self._fixed is None:
            return constraints.real_vector
        if isinstance(self._fixed, Uniform):
            loc, scale = self.standardize.loc, self.standardize.scale
            slack = 4.0 * torch.finfo(loc.dtype).eps * (loc.abs() + scale)
            interval = constraints.interval(loc - scale - slack, loc + scale + slack)
            return constraints.independent(interval, 1)
        return constraints.independent(self._fixed.support, 1)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """
        Take mean and scale of the data, unless the proposal is fixed, and of contexts.

        :param Tensor x: data, shape ``(n, features)``.
        :param Tensor context: their contexts, shape ``(n, context_features)``.
        """
        self.context_scale.initialize(context)
        if self._fixed is None:
            self.standardize.initialize(x)

    @property
    def is_initialized(self) -> bool:
        """Whether :meth:`initialize` has run, here or before the weights were saved."""
        return self.standardize.is_initialized and self.context_scale.is_initialized

    @contextmanager
    def evaluation(
        self,
        *,
        num_importance_samples: int | None = None,
        exact: bool | None = None,
        num_proposals: int | None = None,
        tolerance: float | None = None,
    ) -> Iterator[None]:
        """
        Change how densities and draws are computed, inside of a ``with`` block.

        :param num_importance_samples: draws for the estimate of a conditional's normaliser.
        :param exact: densities by quadrature, draws by inversion.
        :param num_proposals: draws of the proposal to choose each number of a draw from.
        :param tolerance: relative error of a normaliser at which quadrature stops, 1e-4 at first.
        """
        before = self._evaluation
        settings = self._settings(num_importance_samples, exact, num_proposals)
        if tolerance is not None:
            settings = settings._replace(tolerance=tolerance)
        self._evaluation = settings
        try:
            yield
        finally:
            self._evaluation = before

    def training_loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""
        Minus the mean of :math:`\log p(x) + \log q(x)` (Nash and Durkan 2019, eq. 10), in nats.

        :math:`\log p` is the estimate in which the datum takes part, without gradients to the
        proposal. In training mode every call counts as a step: in the first ``warmup_steps``
        only :math:`\log q` is there, and the monitor looks in. In evaluation mode the loss is
        minus the mean of :math:`\log p` alone, which is what to choose weights by.

        :param Tensor x: data, shape ``(n, features)``.
        :param Tensor context: shape ``(n, context_features)``.
        :returns: a scalar.
        :raises ValueError: for data of another shape, not finite, or outside a fixed proposal.
        :raises TypeError: for data that are not floating-point numbers of the parameters' dtype.
        """
        self._check_data(x)
        self.context_scale.check(context)
        z, log_det = self.standardize.to_noise(x)
        conditionals = self._conditionals(z, context)
        z = z.reshape(-1)
        log_q = conditionals.proposal.log_prob(z.unsqueeze(-1)).squeeze(-1)
        self._check_inside(log_q, x)
        step = int(self.training_steps)
        if self.training:
            self.training_steps += 1
        loss, log_det = torch.zeros_like(log_q[0]), log_det.mean()
        if self._fixed is None and self.training:
            loss = -(self.features * log_q.mean() + log_det)
            if step < self.warmup_steps:
                return loss
        detached, log_r = conditionals.detach_proposal(), log_q.detach()
        if self.training and len(z) > (self.max_conditionals or math.inf):
            some = torch.randperm(len(z), device=z.device)[: self.max_conditionals]
            detached, z, log_r = detached.select(some), z[some], log_r[some]
        u, normalizer = data_estimate(
            detached, z, self.num_importance_samples, self._num_gradient_samples
        )
        if self.reference == "broad":
            log_r = detached.log_reference(z.unsqueeze(-1)).squeeze(-1)
        log_p = log_r + u - normalizer.log_normalizer
        if self.training and self.monitor.is_due(step):
            self.monitor.check(
                detached, z, self.num_importance_samples, features=self.features, step=step
            )
        return loss - (self.features * log_p.mean() + log_det)

    def diagnostics(self) -> dict[str, list[float] | list[str]]:
        """
        What the monitor found in training: estimates of ``log_prob`` beside quadrature.

        :returns: a list for each field of
            :class:`~pyro_ext.distributions.energy.NormalizerCheck`, one item per check.
        """
        return self.monitor.table()

    def log_density(
        self,
        rows: Tensor,
        context: Tensor | None,
        *,
        num_importance_samples: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """
        Log-densities of rows, see :meth:`EnergyMachineDistribution.log_prob`.

        :param Tensor rows: shape ``(n, features)``.
        :param Tensor context: shape ``(n, context_features)``.
        :returns: shape ``(n,)``.
        """
        check_precision("value", rows, self)
        settings = self._settings(num_importance_samples, exact, None)
        includes_data = self.training and torch.is_grad_enabled()
        if includes_data and num_importance_samples is None:
            settings = settings._replace(num_importance_samples=self.num_importance_samples)
        size = max(1, len(rows)) if torch.is_grad_enabled() else _ROWS_AT_ONCE
        parts = [(part, None) for part in rows.split(size)]
        if context is not None:
            parts = list(zip(rows.split(size), context.split(size), strict=True))
        return torch.cat([self._score(*part, settings, includes_data) for part in parts])

    def proposal_log_density(self, rows: Tensor, context: Tensor | None) -> Tensor:
        """
        Log-densities of the proposal.

        :param Tensor rows: shape ``(n, features)``.
        :param Tensor context: shape ``(n, context_features)``.
        :returns: shape ``(n,)``.
        """
        check_precision("value", rows, self)
        z, log_det = self.standardize.to_noise(rows)
        log_q = self._conditionals(z, context).proposal.log_prob(z.reshape(-1, 1))
        return log_q.reshape(rows.shape).sum(-1) + log_det

    def draw(
        self,
        num_rows: int,
        context: Tensor | None,
        *,
        num_proposals: int | None = None,
        exact: bool | None = None,
    ) -> Tensor:
        """
        Draw rows, see :meth:`EnergyMachineDistribution.sample`.

        :param int num_rows: number of rows.
        :param Tensor context: shape ``(num_rows, context_features)``.
        :returns: shape ``(num_rows, features)``.
        """
        settings = self._settings(None, exact, num_proposals)

        def draw_one(conditionals: Conditionals, feature: int, num_draws: int) -> Tensor:
            if settings.exact:
                return sampler.inverse_of_trapezoids(conditionals, num_draws)
            return sampler.resample(conditionals, num_draws, settings.num_proposals)

        if context is not None:
            context = self.context_scale(context)
        z = sampler.draw(self.network, self._from_parameters, num_rows, context, draw_one)
        return self.standardize.to_data(z)[0]

    def _score(
        self, rows: Tensor, context: Tensor | None, settings: Evaluation, includes_data: bool
    ) -> Tensor:
        z, log_det = self.standardize.to_noise(rows)
        conditionals = self._conditionals(z, context)
        before = z if context is None else torch.cat([context, z], -1)
        z = z.reshape(-1)
        log_r = conditionals.log_reference(z.unsqueeze(-1)).squeeze(-1)
        if includes_data and not settings.exact:
            u, found = data_estimate(conditionals, z, settings.num_importance_samples)
            log_p = log_r + u - found.log_normalizer
        else:
            log_z = (
                exact_log_normalizer(conditionals, before.detach(), settings.tolerance)
                if settings.exact
                else estimate(conditionals, settings.num_importance_samples).log_normalizer
            )
            u = conditionals.negative_energy(z.unsqueeze(-1)).squeeze(-1)
            log_p = log_r + u - log_z
            # a normaliser of zero, which only an infinite energy can have
            log_p = torch.where(log_z == -math.inf, -math.inf, log_p)
        return log_p.reshape(rows.shape).sum(-1) + log_det

    def _conditionals(self, z: Tensor, context: Tensor | None) -> Conditionals:
        if context is not None:
            context = self.context_scale(context)
        return self._from_parameters(self.network(z, context).flatten(0, 1))

    def _from_parameters(self, parameters: Tensor) -> Conditionals:
        """Read the outputs of the network, shape ``(n, size)``."""
        context = parameters[:, : self.energy_context]
        proposal: Proposal
        if self._fixed is None:
            proposal = DefensiveMixture.from_network(
                parameters[:, self.energy_context :],
                defensive_weight=self.defensive_weight,
                min_scale=self.min_scale,
            )
        elif isinstance(self._fixed, Uniform):
            proposal = UniformProposal(len(parameters), parameters.detach())
        else:
            loc, scale = self.standardize.loc[0], self.standardize.scale[0]
            proposal = FixedProposal(len(parameters), self._fixed, loc, scale)
        return Conditionals(self.energy, context, proposal, self.reference == "broad")

    def _spread_components(self, number: int) -> None:
        """Start with Gaussians next to one another, over the range of standardised data."""
        with torch.no_grad():
            bias = self.network.output.bias.view(self.features, -1)
            mixture = bias[:, self.energy_context :].unflatten(-1, (3, number))
            mixture[:, 0] = 0.0
            mixture[:, 1] = torch.linspace(-1.5, 1.5, number) if number > 1 else 0.0
            mixture[:, 2] = math.log(math.expm1(0.5 if number > 1 else 1.0))

    def _settings(
        self, num_importance_samples: int | None, exact: bool | None, num_proposals: int | None
    ) -> Evaluation:
        default = self._evaluation
        settings = Evaluation(
            default.num_importance_samples
            if num_importance_samples is None
            else num_importance_samples,
            default.exact if exact is None else exact,
            default.num_proposals if num_proposals is None else num_proposals,
            default.tolerance,
        )
        check_at_least(
            num_importance_samples=(settings.num_importance_samples, 3),
            num_proposals=(settings.num_proposals, 1),
        )
        return settings

    def _check_data(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"The data are of {x.dtype}: an energy machine is a density of real numbers; "
                "dequantise integers first, for example by `x + torch.rand(x.shape)`."
            )
        check_precision("data", x, self)
        if x.dim() != 2 or x.shape[1] != self.features or not len(x):
            raise ValueError(
                f"The data have shape {tuple(x.shape)}; (n, {self.features}) is needed, with at "
                "least one row."
            )
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{int((~x.isfinite()).sum())} of the numbers in the data are not finite: "
                "remove or replace them."
            )

    def _check_inside(self, log_q: Tensor, x: Tensor) -> None:
        if self._fixed is None or not bool((outside := log_q == -math.inf).any()):
            return
        row, feature = divmod(int(outside.nonzero()[0]), self.features)
        raise ValueError(
            f"{int(outside.sum())} of the numbers in the data are outside of the proposal "
            f"{self._fixed}, for example {float(x[row, feature]):.6g} in row {row}, feature "
            f"{feature}: give a wider one, or proposal='gaussian_mixture'."
        )
