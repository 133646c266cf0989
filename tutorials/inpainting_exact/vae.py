r"""A small Gaussian variational autoencoder of digits: networks, weights, and the Pyro model.

.. math:: z \sim N(0, I), \qquad x \sim N(m(z), s^2 I),

with a decoder :math:`m` and one noise scale :math:`s`, which is learned. The decoder's weights
come with the tutorial (``weights.npz``); ``train.py`` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ext.datasets import Split, digits

__all__ = [
    "LATENT_SIZE",
    "SIDE",
    "WEIGHTS",
    "Decoder",
    "Encoder",
    "images",
    "load_decoder",
    "model",
    "save_decoder",
]

SIDE = 8
PIXELS = SIDE * SIDE
LATENT_SIZE = 10
HIDDEN_FEATURES = 64
WEIGHTS = Path(__file__).resolve().parent / "weights.npz"


class Encoder(nn.Module):
    """From images to the mean and standard deviation of a normal posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN_FEATURES),
            nn.Tanh(),
            nn.Linear(HIDDEN_FEATURES, HIDDEN_FEATURES),
            nn.Tanh(),
            nn.Linear(HIDDEN_FEATURES, 2 * LATENT_SIZE),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.layers(x).chunk(2, -1)
        return mean, log_scale.exp()


class Decoder(nn.Module):
    """From latent vectors to the mean of the pixels; ``log_scale`` is that of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT_SIZE, HIDDEN_FEATURES),
            nn.Tanh(),
            nn.Linear(HIDDEN_FEATURES, HIDDEN_FEATURES),
            nn.Tanh(),
            nn.Linear(HIDDEN_FEATURES, PIXELS),
        )
        self.log_scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def model(
    decoder: Decoder, is_observed: Tensor, pixels: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """
    Draw an image of which some pixels may be observed.

    Given the latent vector pixels are independent, so that those that are not observed need no
    site: draw them afterwards, from ``Normal(mean, scale)``.

    :param Decoder decoder: trained, and not changed.
    :param Tensor is_observed: mask of the pixels, shape ``(64,)``.
    :param Tensor pixels: the observed ones, shape ``(is_observed.sum(),)``.
    :param float scale: noise to use in place of the learned one.
    :returns: mean of all pixels.
    """
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT_SIZE]).to_event(1))
    mean = pyro.deterministic("mean", decoder(z))
    noise = decoder.log_scale.exp().detach() if scale is None else torch.as_tensor(scale)
    pyro.sample("pixels", dist.Normal(mean[..., is_observed], noise).to_event(1), obs=pixels)
    return mean


def images() -> Split:
    """Digits as rows of 64 grey levels between 0 and 1, in the default precision."""
    split = digits(flat=True)
    dtype = torch.get_default_dtype()
    rows = (split.train, split.validation, split.test)
    train, validation, test = (part.to(dtype) / 16 for part in rows)
    return split._replace(train=train, validation=validation, test=test)


def load_decoder(path: Path = WEIGHTS) -> Decoder:
    """
    Read a decoder, in the default precision and without gradients.

    :param Path path: a file of :func:`save_decoder`, by default the one shipped.
    """
    decoder = Decoder().requires_grad_(False)
    with np.load(path) as arrays:
        state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    decoder.load_state_dict(state)
    return decoder


def save_decoder(decoder: Decoder, path: Path = WEIGHTS) -> None:
    """Write a decoder in single precision."""
    state: Mapping[str, Tensor] = decoder.state_dict()
    arrays: Any = {name: value.float().numpy() for name, value in state.items()}
    np.savez_compressed(path, **arrays)
