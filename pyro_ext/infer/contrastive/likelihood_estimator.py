"""Likelihood estimation: a conditional flow over the observations given latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import AffineTransform
from torch.nn.functional import logsigmoid, softplus

from ...distributions import NeuralSplineFlow
from ...nn import ResidualNetwork
from .estimator import ContrastiveEstimator
from .handlers import PriorIsDrawn, Recorder
from .losses import Batch
from .observations import flatten_one
from .posterior_estimator import FlowFactory, initialize_flow
from .sites import unconstrain

__all__ = ["NeuralLikelihoodEstimator"]


class NeuralLikelihoodEstimator(ContrastiveEstimator):
    r"""
    Learn the likelihood :math:`p(x \mid \theta)` of a simulator, as a flow over observations.

    It is fitted by maximum likelihood, whatever the latents are drawn from, and so its ratio
    :math:`f` has no unknown function of x. Runs that fail have no observation: how often they do
    is learned by a classifier beside the flow, as the probability of not failing is a part of the
    likelihood. Observations have to be continuous.

    :param model: see :class:`~pyro_ext.infer.contrastive.estimator.ContrastiveEstimator`, as are
        ``observed``, ``latents``, ``nuisance``, ``vectorize`` and ``max_failed``.
    :param flow: a function of the numbers of elements of an observation and of latents, that
        returns a conditional flow. :class:`~pyro_ext.distributions.NeuralSplineFlow` by default.

    Reference: Papamakarios, Sterratt and Murray 2019, "Sequential neural likelihood".

    >>> from pyro_ext import NeuralLikelihoodEstimator
    >>> def model():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 0.5))
    >>> estimator = NeuralLikelihoodEstimator(model, observed=["x"])
    >>> _ = estimator.simulate(400)
    >>> result = estimator.fit(num_epochs=2, batch_size=100)
    >>> kernel = pyro.infer.NUTS(estimator.surrogate({"x": torch.tensor(0.3)}))
    """

    may_fail: Tensor

    def __init__(
        self,
        model: Callable[[], Any],
        *,
        observed: Sequence[str],
        latents: Collection[str] | None = None,
        nuisance: Collection[str] = (),
        flow: FlowFactory | None = None,
        vectorize: str | None = None,
        max_failed: float = 0.5,
    ) -> None:
        super().__init__(
            model,
            observed=observed,
            latents=latents,
            nuisance=nuisance,
            vectorize=vectorize,
            max_failed=max_failed,
        )
        features = self.structure.features
        flow = flow or _default_flow
        self.flow = flow(self.encoder.in_features, features)
        self.validity = ResidualNetwork(features, 1, 32, residual_blocks=1)
        self.register_buffer("may_fail", torch.tensor(False))
        self.to(self.structure.device, self.structure.dtype)

    def likelihood(self, latents: Mapping[str, Tensor]) -> TorchDistribution:
        """
        The distribution of the observed elements in one row, given that the run does not fail.

        :param latents: values of the latent sites, shape ``(..., *shape)``.
        :returns: of ``batch_shape == (...)`` and ``event_shape == (elements,)``.
        """
        context = (unconstrain(latents, self.structure) - self.loc) / self.scale
        to_data = AffineTransform(self.encoder.loc, self.encoder.scale, event_dim=1)
        return dist.TransformedDistribution(self.flow(context), [to_data])

    def surrogate(self, observations: Tensor | Mapping[str, Tensor]) -> Callable[[], None]:
        """
        The model with its simulator replaced by the likelihood, for any sampler of Pyro.

        :param observations: values by site, or the value of the only site.
        """
        flat = flatten_one(observations, self.structure)
        self.encoder.warn_if_far(flat)
        self.eval()

        def surrogate() -> None:
            structure = self.structure
            recorder = Recorder(frozenset(structure.latent_names), structure.last_latent)
            with contextlib.suppress(PriorIsDrawn), recorder:
                self.simulator.model()
            likelihood = self.likelihood(recorder.values)
            pyro.sample("_and_".join(structure.observed_names), likelihood, obs=flat)
            if bool(self.may_fail):
                unconstrained = unconstrain(recorder.values, structure)
                pyro.factor("_did_not_fail", self._log_validity(unconstrained))

        return surrogate

    def log_ratio(self, latents: Tensor, log_prior: Tensor, features: Tensor) -> Tensor:
        """See :meth:`ContrastiveEstimator.log_ratio`."""
        log_prob = self._log_prob(latents, features)
        return log_prob + self._log_validity(latents) if bool(self.may_fail) else log_prob

    def loss(self, batch: Batch, flat: Tensor) -> Tensor:
        """Maximum likelihood of what the simulator did."""
        log_prob = self._log_prob(batch.latents, self._encode(flat))
        log_prob = torch.where(batch.is_valid, log_prob, torch.zeros_like(log_prob))
        if bool(self.may_fail):
            logits = self._logits(batch.latents)
            log_prob = log_prob - torch.where(batch.is_valid, softplus(-logits), softplus(logits))
        return -log_prob.mean()

    def _log_prob(self, latents: Tensor, features: Tensor) -> Tensor:
        density = self.flow((latents - self.loc) / self.scale)
        log_prob: Tensor = density.log_prob(features)
        return log_prob

    def _log_validity(self, latents: Tensor) -> Tensor:
        return logsigmoid(self._logits(latents))

    def _logits(self, latents: Tensor) -> Tensor:
        logits: Tensor = self.validity((latents - self.loc) / self.scale)
        return logits.squeeze(-1)

    def _encode(self, flat: Tensor) -> Tensor:
        # a density is one of the values themselves
        return self.encoder.standardized(flat)

    def _before_fit(self, is_valid: Tensor) -> None:
        if not bool(is_valid.all()):
            self.may_fail.fill_(True)

    def _standardize(self, latents: Tensor, flat: Tensor) -> None:
        initialize_flow(self.flow, self._encode(flat))


def _default_flow(features: int, context_features: int) -> nn.Module:
    # splines bound what an outlier among the observations does to the elements after it
    return NeuralSplineFlow(features, context_features, transforms=5, hidden_features=50)
