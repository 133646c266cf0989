"""Posterior estimation: a conditional flow over the latents given observations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...distributions import NeuralSplineFlow
from ...distributions.flow import FlowDistribution
from .estimator import ContrastiveEstimator
from .losses import Batch, contrast_with, contrastive_loss
from .posterior import Posterior
from .posteriors import FlowPosterior
from .ratio_estimator import check_num_atoms

__all__ = ["FlowFactory", "NeuralPosteriorEstimator", "initialize_flow"]

FlowFactory = Callable[[int, int], nn.Module]
"""From the numbers of features and of context features to a module whose call on a context
returns a distribution, and which may have a method ``initialize(x)``."""


class NeuralPosteriorEstimator(ContrastiveEstimator):
    r"""
    Learn the posterior of a simulator, as a flow over its latents given the observation.

    The flow is over the unconstrained latents, so that no draw is outside the support of the
    prior. With simulations from the prior it is fitted by maximum likelihood, and the posterior
    of any observation is then one call. With those of further rounds it is fitted as the
    classifier :math:`f = \log q(\theta \mid x) - \log p(\theta)` among K parameters
    (SNPE-C), and by maximum likelihood on the simulations from the prior beside it, which tells
    it how much density there is where no proposal has been.

    :param model: see :class:`~pyro_ext.infer.contrastive.estimator.ContrastiveEstimator`, as are
        ``observed``, ``latents``, ``nuisance``, ``embedding``, ``vectorize`` and ``max_failed``.
    :param flow: a function of the numbers of latents and of features of an observation, that
        returns a conditional flow. By default a
        :class:`~pyro_ext.distributions.NeuralSplineFlow` of two affine and three spline layers.
    :param int num_atoms: number K of parameters in further rounds.
    :param bool combined: whether maximum likelihood goes on beside the classification.
    :param str support: ``"transform"``, or ``"reject"`` for a flow over the latents as they are,
        whose draws outside the support are rejected; the posterior then has an acceptance rate.

    Reference: Durkan, Murray and Papamakarios 2020, "On contrastive learning for likelihood-free
    inference"; Greenberg, Nonnenmacher and Macke 2019, "Automatic posterior transformation for
    likelihood-free inference".

    >>> from pyro_ext import NeuralPosteriorEstimator
    >>> def model():
    ...     theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
    ...     pyro.sample("x", dist.Poisson(theta))
    >>> estimator = NeuralPosteriorEstimator(model, observed=["x"])
    >>> _ = estimator.simulate(400)
    >>> result = estimator.fit(num_epochs=2, batch_size=100)
    >>> posterior = estimator.posterior({"x": torch.tensor(3.0)})
    >>> draws = posterior.sample(10)
    >>> (draws["theta"] > 0).all(), posterior.log_prob(draws).shape
    (tensor(True), torch.Size([10]))
    """

    num_steps = 700  # flows go on learning for longer than classifiers

    def __init__(
        self,
        model: Callable[[], Any],
        *,
        observed: Sequence[str],
        latents: Collection[str] | None = None,
        nuisance: Collection[str] = (),
        embedding: nn.Module | Mapping[str, nn.Module] | None = None,
        flow: FlowFactory | None = None,
        num_atoms: int = 10,
        combined: bool = True,
        support: str = "transform",
        vectorize: str | None = None,
        max_failed: float = 0.5,
    ) -> None:
        super().__init__(
            model,
            observed=observed,
            latents=latents,
            nuisance=nuisance,
            embedding=embedding,
            vectorize=vectorize,
            max_failed=max_failed,
            support=support,
        )
        self.num_atoms = check_num_atoms(num_atoms)
        self.combined = combined
        flow = flow or _default_flow
        self.flow = flow(self.structure.features, self.encoder.out_features)
        self.flow.to(self.structure.device, self.structure.dtype)

    def log_ratio(self, latents: Tensor, log_prior: Tensor, features: Tensor) -> Tensor:
        """See :meth:`ContrastiveEstimator.log_ratio`."""
        return self._log_prob(latents, features) - log_prior

    def loss(self, batch: Batch, flat: Tensor) -> Tensor:
        """Maximum likelihood in the first round, classification in the others."""
        features = self.encoder(flat)
        if not self._has_proposals():
            log_prob = self._log_prob(batch.latents, features)
            return -(log_prob * batch.is_valid).mean()
        index = contrast_with(len(flat), self.num_atoms, at_random=self.training)
        loss, f = contrastive_loss(self.log_ratio, batch, features, index)
        if self.combined:
            # the density of each row's own latents is in its ratio already
            log_prob = f + batch.log_prior[batch.is_valid]
            loss = loss - (log_prob * batch.is_prior[batch.is_valid]).sum() / len(flat)
        return loss

    def _log_prob(self, latents: Tensor, features: Tensor) -> Tensor:
        density: FlowDistribution = self.flow(features)
        log_prob: Tensor = density.log_prob(latents)
        return log_prob

    def _num_contrasted(self) -> int:
        return self.num_atoms if self._has_proposals() else 1

    def _make_posterior(self, features: Tensor, flat: Tensor) -> Posterior:
        return FlowPosterior(self.simulator, self.log_ratio, features, flat, self.flow)

    def _standardize(self, latents: Tensor, flat: Tensor) -> None:
        initialize_flow(self.flow, latents)


@torch.no_grad()
def initialize_flow(flow: nn.Module, data: Tensor) -> None:
    """
    Let a flow take location and scale of its data, if it has a method for it.

    :param nn.Module flow: the flow.
    :param Tensor data: what it is a density of, one row each.
    """
    initialize = getattr(flow, "initialize", None)
    if initialize is not None:
        initialize(data)


def _default_flow(features: int, context_features: int) -> nn.Module:
    """
    Two affine coupling layers next to the latents, and three of splines.

    The affine ones move and scale the density with the observation, which takes few simulations
    to learn; splines alone would have to bend for it, and learn more of it by heart. They give
    the shape that is left.
    """
    shape = NeuralSplineFlow(features, context_features, transforms=3, hidden_features=50)
    return NeuralSplineFlow(
        features,
        context_features,
        transforms=2,
        spline="affine",
        hidden_features=50,
        base=shape,
    )
