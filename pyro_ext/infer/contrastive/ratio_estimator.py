"""Ratio estimation: a classifier that tells which parameters an observation came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu

from ...nn.block import ResidualBlock
from .estimator import CAUTIOUS_LEARNING_RATE, ContrastiveEstimator
from .losses import Batch, contrast_with, contrastive_loss

__all__ = ["NeuralRatioEstimator", "RatioNetwork", "check_num_atoms"]

_USUAL_ATOMS = 10

NetworkFactory = Callable[[int, int], nn.Module]


class NeuralRatioEstimator(ContrastiveEstimator):
    r"""
    Learn a likelihood ratio, by asking which of K parameters made an observation.

    What is learned is :math:`\log p(x \mid \theta) / p(x)`, up to a function of x.
    The posterior has no normalised density: draws of it are made by sequential Monte Carlo, by
    Pyro's NUTS, or by weighting draws of the prior, see
    :class:`~pyro_ext.infer.contrastive.posterior.Posterior`.

    :param model: see :class:`~pyro_ext.infer.contrastive.estimator.ContrastiveEstimator`, as are
        ``observed``, ``latents``, ``nuisance``, ``embedding``, ``vectorize`` and ``max_failed``.
    :param int num_atoms: number K of parameters, one right and K - 1 contrasting; at most the
        size of a minibatch. With fewer than ten, training has larger minibatches and more steps
        by default.
    :param int hidden_features: size of the hidden layers of the network.
    :param int residual_blocks: blocks of the network, two layers each.
    :param network: a function of the numbers of latents and of features of an observation, that
        returns another network; its call gets latents ``(n, K, d)`` and features ``(n, 1, e)``,
        and returns ``(n, K, 1)``.

    Reference: Durkan, Murray and Papamakarios 2020, "On contrastive learning for likelihood-free
    inference" (SRE with K classes); Hermans, Begy and Louppe 2020 for K = 2.

    >>> from pyro_ext import NeuralRatioEstimator
    >>> def model():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 0.5))
    >>> estimator = NeuralRatioEstimator(model, observed=["x"], num_atoms=5)
    >>> _ = estimator.simulate(400)
    >>> result = estimator.fit(num_epochs=5, batch_size=50)
    >>> posterior = estimator.posterior({"x": torch.tensor(0.3)})
    >>> posterior.sample(10)["theta"].shape
    torch.Size([10])
    """

    num_minibatches = 20
    patience = 20  # what a classifier says of held-out simulations goes up and down

    def __init__(
        self,
        model: Callable[[], Any],
        *,
        observed: Sequence[str],
        latents: Collection[str] | None = None,
        nuisance: Collection[str] = (),
        embedding: nn.Module | Mapping[str, nn.Module] | None = None,
        num_atoms: int = 10,
        hidden_features: int = 64,
        residual_blocks: int = 2,
        network: NetworkFactory | None = None,
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
        )
        self.num_atoms = check_num_atoms(num_atoms)
        if embedding is None and network is None:
            # which a network this small can take, and needs for posteriors with fine structure
            self.learning_rate = 2e-2
        else:
            self.learning_rate = CAUTIOUS_LEARNING_RATE
        sizes = (self.structure.features, self.encoder.out_features)
        if network is None:
            self.network: nn.Module = RatioNetwork(*sizes, hidden_features, residual_blocks)
        else:
            self.network = network(*sizes)
        self.network.to(self.structure.device, self.structure.dtype)

    def log_ratio(self, latents: Tensor, log_prior: Tensor, features: Tensor) -> Tensor:
        """See :meth:`ContrastiveEstimator.log_ratio`."""
        f: Tensor = self.network((latents - self.loc) / self.scale, features)
        return f.squeeze(-1)

    def loss(self, batch: Batch, flat: Tensor) -> Tensor:
        """
        The contrastive loss.

        Held-out observations are tried with ten parameters or more, as two would say too little
        to choose weights by; f is the same for any K.
        """
        num_atoms = self.num_atoms if self.training else max(self.num_atoms, _USUAL_ATOMS)
        index = contrast_with(len(flat), num_atoms, at_random=self.training)
        return contrastive_loss(self.log_ratio, batch, self.encoder(flat), index)[0]

    def _num_contrasted(self) -> int:
        return self.num_atoms

    def _effort(self) -> float:
        # with few contrasting parameters, a minibatch costs less and says less
        return math.sqrt(max(1.0, _USUAL_ATOMS / self.num_atoms))


class RatioNetwork(nn.Module):
    """
    A residual network on latents and an observation together.

    The layer that the observation goes through runs once for all the latents it is tried with.

    :param int features: number of latents.
    :param int context_features: number of features of an observation.
    :param int hidden_features: size of the hidden layers.
    :param int residual_blocks: blocks of two layers each.
    """

    def __init__(
        self, features: int, context_features: int, hidden_features: int, residual_blocks: int
    ) -> None:
        super().__init__()
        self.latents = nn.Linear(features, hidden_features)
        self.observation = nn.Linear(context_features, hidden_features, bias=False)
        self.blocks = nn.ModuleList(
            ResidualBlock(
                (
                    nn.Linear(hidden_features, hidden_features),
                    nn.Linear(hidden_features, hidden_features),
                ),
                None,
                # smooth, as are logarithms of densities
                activation=silu,
            )
            for _ in range(residual_blocks)
        )
        self.output = nn.Linear(hidden_features, 1)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """
        The ratio, up to a function of the observation.

        :param Tensor latents: shape ``(..., features)``.
        :param Tensor context: shape ``(..., context_features)``, whose leading dimensions
            broadcast against those of the latents.
        :returns: shape ``(..., 1)``.
        """
        hidden = self.latents(latents) + self.observation(context)
        for block in self.blocks:
            hidden = block(hidden)
        ratio: Tensor = self.output(silu(hidden))
        return ratio


def check_num_atoms(num_atoms: int) -> int:
    """
    Check the number of parameters to choose from.

    :raises ValueError: if it is not a whole number of at least 2.
    """
    if isinstance(num_atoms, bool) or not isinstance(num_atoms, int) or num_atoms < 2:
        raise ValueError(
            f"num_atoms={num_atoms!r}: give a whole number of at least 2, the right parameters "
            "and those to tell them from."
        )
    return num_atoms
