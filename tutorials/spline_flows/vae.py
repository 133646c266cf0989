"""A variational autoencoder of binarised digits, whose prior and posterior may be flows.

The model draws a latent vector from the prior and decodes it to the probabilities of 64 binary
pixels. The guide encodes an image to a vector of features h, and these make the posterior: a
normal distribution with diagonal covariance, and on top of it a flow whose networks h gates.

The set-up is that of section 5.2 and appendix B.2 of Durkan, Bekasov, Murray and Papamakarios,
"Neural spline flows", 2019, on smaller images.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_ext.datasets import Split, digits
from pyro_ext.distributions import FlowDistribution, NeuralSplineFlow
from pyro_ext.nn import ResidualNetwork

__all__ = [
    "MODELS",
    "VAE",
    "DiagonalNormal",
    "StandardNormal",
    "Training",
    "binarize",
    "build",
    "elbo",
    "importance_weighted",
    "pixel_probabilities",
    "train",
]

PIXELS = 64
LATENT_SIZE = 8
CONTEXT_FEATURES = 64
Draw = Callable[[Tensor], Tensor]


class VAE(nn.Module):
    """
    A Pyro model and guide of rows of binary pixels.

    :param nn.Module prior: ``prior()`` is a distribution over latent vectors.
    :param nn.Module posterior: ``posterior(h)`` is one for each row of features h.
    :param int latent_size: size of a latent vector.
    :param int hidden_features: size of the hidden layers of encoder and decoder.
    """

    def __init__(
        self,
        prior: nn.Module,
        posterior: nn.Module,
        *,
        latent_size: int = LATENT_SIZE,
        hidden_features: int = 128,
    ) -> None:
        super().__init__()
        self.prior, self.posterior = prior, posterior
        self.encoder = ResidualNetwork(PIXELS, CONTEXT_FEATURES, hidden_features)
        self.decoder = ResidualNetwork(latent_size, PIXELS, hidden_features)

    def model(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """Draw latent vectors and score the pixels, shape ``(n, 64)``."""
        with pyro.plate("images", len(x)):
            with poutine.scale(scale=kl_weight):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.pixels(z), obs=x)

    def guide(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """Draw latent vectors given the pixels."""
        posterior = self.posterior(self.encoder(x))
        if isinstance(posterior, FlowDistribution):  # score the draws in the pass that makes them
            z, log_density = posterior.rsample_and_log_prob()
            posterior = dist.Delta(z, log_density=log_density, event_dim=1)
        with pyro.plate("images", len(x)), poutine.scale(scale=kl_weight):
            pyro.sample("z", posterior)

    def pixels(self, z: Tensor) -> dist.TorchDistribution:
        """The distribution of binary pixels given latent vectors."""
        return dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1)

    def log_weights(self, x: Tensor, num_samples: int) -> Tensor:
        r"""
        Log importance weights :math:`\log p(x, z) / q(z \mid x)` of draws from the guide.

        :param Tensor x: binary pixels, shape ``(n, 64)``.
        :param int num_samples: draws for each row.
        :returns: shape ``(num_samples, n)``.
        """
        posterior = self.posterior(self.encoder(x))
        shape = torch.Size([num_samples])
        if isinstance(posterior, FlowDistribution):
            z, log_q = posterior.rsample_and_log_prob(shape)
        else:
            z = posterior.rsample(shape)
            log_q = posterior.log_prob(z)
        return self.prior().log_prob(z) + self.pixels(z).log_prob(x) - log_q


class StandardNormal(nn.Module):
    """
    A normal distribution without parameters.

    :param int features: size of a vector.
    """

    loc: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(features), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """Return the distribution."""
        return dist.Normal(self.loc, torch.ones_like(self.loc), validate_args=False).to_event(1)


class DiagonalNormal(nn.Module):
    """
    A normal distribution with diagonal covariance, given a context.

    :param int features: size of a vector.
    :param int context_features: size of a context.
    """

    def __init__(self, features: int, context_features: int = CONTEXT_FEATURES) -> None:
        super().__init__()
        self.linear = nn.Linear(context_features, 2 * features)

    def forward(self, context: Tensor) -> dist.TorchDistribution:
        """Return the distribution for contexts of shape ``(..., context_features)``."""
        loc, scale = self.linear(context).chunk(2, -1)
        return dist.Normal(loc, softplus(scale) + 1e-3, validate_args=False).to_event(1)


# ---------------------------------------------------------------------- the models of the paper


class Recipe(NamedTuple):
    """Settings of :class:`NeuralSplineFlow` for the prior and for the posterior."""

    prior: dict[str, bool | str] | None
    posterior: dict[str, bool | str] | None


MODELS: dict[str, Recipe] = {
    "normal prior and posterior": Recipe(None, None),
    "Glow (C), affine": Recipe({"spline": "affine"}, {"spline": "affine"}),
    "RQ-NSF (C)": Recipe({}, {}),
    "MAF prior, IAF posterior": Recipe(
        {"coupling": False, "spline": "affine"},
        {"coupling": False, "spline": "affine", "inverse": True},
    ),
    "RQ-NSF (AR)": Recipe({"coupling": False}, {"coupling": False, "inverse": True}),
}


def build(
    recipe: Recipe,
    *,
    latent_size: int = LATENT_SIZE,
    transforms: int = 5,
    hidden_features: int = 64,
) -> VAE:
    """
    Make an autoencoder.

    :param Recipe recipe: what prior and posterior are; None for a normal distribution.
    :param int latent_size: size of a latent vector.
    :param int transforms: steps of each flow.
    :param int hidden_features: size of the hidden layers of the flows.
    """
    sizes = {"transforms": transforms, "hidden_features": hidden_features}
    prior: nn.Module = StandardNormal(latent_size)
    posterior: nn.Module = DiagonalNormal(latent_size)
    if recipe.prior is not None:
        prior = NeuralSplineFlow(latent_size, **sizes, **recipe.prior)
    if recipe.posterior is not None:
        posterior = NeuralSplineFlow(
            latent_size, CONTEXT_FEATURES, base=posterior, **sizes, **recipe.posterior
        )
    return VAE(prior, posterior, latent_size=latent_size)


# ---------------------------------------------------------------------------------------- data


def pixel_probabilities() -> Split:
    """The digits of scikit-learn in rows of 64 grey levels between 0 and 1."""
    split = digits(flat=True)
    dtype = torch.get_default_dtype()
    parts = (part.to(dtype) / 16 for part in (split.train, split.validation, split.test))
    return Split(*parts, "digits, grey levels as probabilities", split.labels)


def binarize(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw every pixel, black or white, from its grey level."""
    return torch.bernoulli(probabilities, generator=generator)


# ------------------------------------------------------------------------------------ training


class Training(NamedTuple):
    """How to train, and by default how long: as in the benchmark."""

    num_steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 1e-3
    evaluate_every: int = 250
    validation_samples: int = 20


class History(NamedTuple):
    """What happened in the training."""

    validation_steps: list[int]
    validation_elbos: list[float]
    best_step: int
    cpu_seconds: float


def train(
    vae: VAE, probabilities: Tensor, validation: Tensor, training: Training | None = None
) -> History:
    """
    Maximise the ELBO in place, and keep the weights that are best on the validation part.

    Pixels are drawn anew in every step. The weight of the Kullback-Leibler term grows from 0.5 to
    1 over the first tenth of the steps, and the step size of Adam falls to zero along half a
    cosine (Durkan et al. 2019, appendix B.2).

    :param VAE vae: what to train.
    :param Tensor probabilities: grey levels between 0 and 1, shape ``(n, 64)``.
    :param Tensor validation: binary pixels to choose the weights by, shape ``(m, 64)``.
    :param Training training: how long, and so on.
    """
    training = training or Training()
    optimizer = torch.optim.Adam(vae.parameters(), lr=training.learning_rate)
    loss_function = Trace_ELBO().differentiable_loss
    steps: list[int] = []
    elbos: list[float] = []
    best_weights, best_step = copy.deepcopy(vae.state_dict()), 0
    start = time.process_time()
    for step in range(training.num_steps):
        done = step / training.num_steps
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        rows = torch.randint(len(probabilities), (training.batch_size,))
        x = binarize(probabilities[rows])
        optimizer.zero_grad()
        loss = loss_function(vae.model, vae.guide, x, min(1.0, 0.5 + 5 * done))
        (loss / len(x)).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 5.0)
        optimizer.step()
        if (step + 1) % training.evaluate_every == 0 or step + 1 == training.num_steps:
            steps.append(step + 1)
            elbos.append(float(elbo(vae, validation, training.validation_samples).mean()))
            if elbos[-1] == max(elbos):
                best_weights, best_step = copy.deepcopy(vae.state_dict()), step + 1
    vae.load_state_dict(best_weights)
    return History(steps, elbos, best_step, time.process_time() - start)


# ---------------------------------------------------------------------------------- evaluation


def elbo(vae: VAE, x: Tensor, num_samples: int) -> Tensor:
    """
    Lower bound of each row, the mean of log importance weights.

    :param Tensor x: binary pixels, shape ``(n, 64)``.
    :param int num_samples: draws for each row.
    :returns: shape ``(n,)``, in nats.
    """
    return _log_weights(vae, x, num_samples).mean(0)


def importance_weighted(vae: VAE, x: Tensor, num_samples: int) -> Tensor:
    r"""
    Estimate :math:`\log p(x)` of each row by :math:`\log \frac1K \sum_k w_k`.

    A lower bound in expectation, and tighter than the ELBO (Burda, Grosse and Salakhutdinov 2016,
    "Importance weighted autoencoders").

    :param Tensor x: binary pixels, shape ``(n, 64)``.
    :param int num_samples: the number K of draws for each row.
    :returns: shape ``(n,)``, in nats.
    """
    return _log_weights(vae, x, num_samples).logsumexp(0) - math.log(num_samples)


def _log_weights(vae: VAE, x: Tensor, num_samples: int, at_once: int = 20) -> Tensor:
    sizes = [at_once] * (num_samples // at_once) + [num_samples % at_once]
    with torch.no_grad():
        return torch.cat([vae.log_weights(x, size) for size in sizes if size])
