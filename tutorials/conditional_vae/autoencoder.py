"""Variational autoencoders of small images and of tables, and the trained ones that ship here.

The model draws a latent vector from a standard normal prior and decodes it to independent
elements: Bernoulli ones for black and white pixels, normal ones for grey levels and measurements
(Wu, Domke and Sanner 2022, eq. 1). The guide, an encoder, is for training only. ``train.py`` in
this folder trains the models of :data:`MODELS` and writes their weights.
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_ext.datasets import Split, digits

__all__ = [
    "MODELS",
    "VAE",
    "Setting",
    "Training",
    "elbo",
    "images_for",
    "load",
    "mnist",
    "mnist_path",
    "train",
    "weights_path",
]

WEIGHTS = Path(__file__).resolve().parent / "weights"


class Setting(NamedTuple):
    """What a model is."""

    likelihood: str
    latent_size: int


MODELS = {
    f"{likelihood}_{latent_size}": Setting(likelihood, latent_size)
    for likelihood in ("bernoulli", "gaussian")
    for latent_size in (2, 16)
}


def _network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, outputs),
    )


class VAE(nn.Module):
    """
    A Pyro model of rows of elements, and the guide that trains it.

    :param str likelihood: "bernoulli" or "gaussian".
    :param int latent_size: size of a latent vector.
    :param int num_elements: pixels of an image, or columns of a table.
    :param int hidden_features: size of the two hidden layers of encoder and decoder.
    :param bool shared_scale: one standard deviation for all elements of a Gaussian model, as for
        pixels, or one for each, as for columns.
    :raises ValueError: if the likelihood is unknown.
    """

    def __init__(
        self,
        likelihood: str,
        latent_size: int,
        *,
        num_elements: int = 64,
        hidden_features: int = 64,
        shared_scale: bool = True,
    ) -> None:
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood={likelihood!r}: give 'bernoulli' or 'gaussian'.")
        self.likelihood, self.latent_size = likelihood, latent_size
        self.encoder = _network(num_elements, 2 * latent_size, hidden_features)
        self.decoder = _network(latent_size, num_elements, hidden_features)
        if likelihood == "gaussian":
            shape = () if shared_scale else (num_elements,)
            self.log_scale = nn.Parameter(torch.full(shape, -1.0))

    def model(self, num_rows: int = 1, x: Tensor | None = None) -> None:
        """Draw latent vectors and elements; in training ``x``, shape ``(rows, elements)``."""
        like = next(self.decoder.parameters())
        with pyro.plate("rows", num_rows):
            prior = dist.Normal(like.new_zeros(self.latent_size), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", self.elements(z).to_event(1), obs=x)

    def guide(self, num_rows: int, x: Tensor) -> None:
        """Draw latent vectors from what the encoder makes of whole rows."""
        with pyro.plate("rows", num_rows):
            pyro.sample("z", self.encode(x).to_event(1))

    def elements(self, z: Tensor) -> dist.TorchDistribution:
        """The distribution of all elements given latent vectors."""
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=self.decoder(z), validate_args=False)
        return dist.Normal(self.decoder(z), self.log_scale.exp(), validate_args=False)

    def encode(self, x: Tensor) -> dist.Normal:
        """The encoder's distribution of the elements of the latent vectors."""
        loc, scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(scale) + 1e-3, validate_args=False)

    def log_likelihood(self, z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """
        Log-density of some elements given latent vectors.

        :param Tensor z: shape ``(..., rows, latent_size)``.
        :param Tensor x: shape ``(rows, elements)``.
        :param Tensor mask: which elements, of the shape of x.
        :returns: shape ``(..., rows)``.
        """
        return (self.elements(z).log_prob(x) * mask).sum(-1)


# ------------------------------------------------------------------------------------- training


class Training(NamedTuple):
    """How to train, and by default how long: as for the weights that ship here."""

    num_steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5
    evaluate_every: int = 200


def train(vae: VAE, x: Tensor, validation: Tensor, training: Training | None = None) -> float:
    """
    Maximise the ELBO in place, and keep the weights that are best on the validation part.

    :param VAE vae: what to train.
    :param Tensor x: shape ``(n, elements)``.
    :param Tensor validation: shape ``(m, elements)``.
    :param Training training: how long, and so on.
    :returns: the best mean ELBO of the validation part.
    """
    training = training or Training()
    optimizer = torch.optim.Adam(
        vae.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    loss_function = TraceMeanField_ELBO().differentiable_loss
    best, best_weights = -math.inf, copy.deepcopy(vae.state_dict())
    for step in range(training.num_steps):
        for group in optimizer.param_groups:
            done = step / training.num_steps
            group["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        batch = x[torch.randint(len(x), (training.batch_size,))]
        optimizer.zero_grad()
        loss = loss_function(vae.model, vae.guide, len(batch), batch) / len(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 20.0)
        optimizer.step()
        if (step + 1) % training.evaluate_every == 0 or step + 1 == training.num_steps:
            value = float(elbo(vae, validation, 20).mean())
            if value > best:
                best, best_weights = value, copy.deepcopy(vae.state_dict())
    vae.load_state_dict(best_weights)
    return best


@torch.no_grad()
def elbo(vae: VAE, x: Tensor, num_samples: int) -> Tensor:
    """
    Lower bound of the log-density of each row, by draws from the encoder.

    :param Tensor x: shape ``(n, elements)``.
    :param int num_samples: draws for each row.
    :returns: shape ``(n,)``, in nats.
    """
    posterior = vae.encode(x)
    z = posterior.sample(torch.Size([num_samples]))
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    everything = torch.ones_like(x)
    terms = prior + vae.log_likelihood(z, x, everything) - posterior.log_prob(z).sum(-1)
    return terms.mean(0)


# ------------------------------------------------------------------------------- data and weights


def images_for(likelihood: str) -> Split:
    """
    scikit-learn's digits as rows of 64 pixels in the default dtype.

    :param str likelihood: for "bernoulli" the pixels are black or white, cut at the middle of the
        scale, for "gaussian" grey levels from 0 to 1.
    """
    grey = digits(flat=True)
    train, validation, test = (
        _pixels(part / 16, likelihood) for part in (grey.train, grey.validation, grey.test)
    )
    return Split(train, validation, test, "digits", grey.labels)


def mnist(path: str | os.PathLike[str], likelihood: str, num_validation: int = 5000) -> Split:
    """
    MNIST as rows of 784 pixels, like :func:`images_for`.

    :param path: an ``.npz`` file with the arrays ``x_train``, ``y_train``, ``x_test`` and
        ``y_test`` of images with grey levels from 0 to 255, the form that Keras distributes.
    :param str likelihood: as for :func:`images_for`.
    :param int num_validation: of the training images, the last ones, to choose the weights by.
    :raises ValueError: if an array is missing.
    """
    keys = ("x_train", "y_train", "x_test", "y_test")
    with np.load(path) as file:
        missing = [key for key in keys if key not in file]
        if missing:
            raise ValueError(f"{os.fspath(path)} has no arrays {missing}; it has {file.files}.")
        x, y, x_test, y_test = (torch.from_numpy(file[key]) for key in keys)
    x, x_test = (_pixels(each.flatten(1) / 255, likelihood) for each in (x, x_test))
    cut = len(x) - num_validation
    labels = Split(y[:cut].long(), y[cut:].long(), y_test.long(), "MNIST: labels")
    return Split(x[:cut], x[cut:], x_test, "MNIST", labels)


def mnist_path() -> Path:
    """
    Where ``PYRO_EXT_DATA`` says that MNIST is: the file itself, or a folder with ``mnist.npz``.

    :raises FileNotFoundError: if it is not there.
    """
    place = os.environ.get("PYRO_EXT_DATA")
    if place is None:
        raise FileNotFoundError(
            "Set PYRO_EXT_DATA to mnist.npz or to the folder that holds it: MNIST is not "
            "downloaded."
        )
    path = Path(place) / "mnist.npz" if Path(place).is_dir() else Path(place)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}, where PYRO_EXT_DATA={place!r} points.")
    return path


def _pixels(grey: Tensor, likelihood: str) -> Tensor:
    grey = grey.to(torch.get_default_dtype())
    return (grey >= 0.5).to(grey) if likelihood == "bernoulli" else grey


def weights_path(name: str) -> Path:
    """The file with the weights of a model of :data:`MODELS`."""
    return WEIGHTS / f"{name}.pt"


def load(name: str) -> VAE:
    """
    A trained model of digits, in the default dtype and without gradients.

    :param str name: one of :data:`MODELS`.
    :raises ValueError: if there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"There is no model {name!r}: give one of {', '.join(MODELS)}.")
    vae = VAE(*MODELS[name])
    vae.load_state_dict(torch.load(weights_path(name), weights_only=True))
    return vae.to(torch.get_default_dtype()).eval().requires_grad_(False)
