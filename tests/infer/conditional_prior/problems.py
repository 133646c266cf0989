"""Conditioned models whose posteriors are known."""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ext.poutine import condition_on

__all__ = ["Grid", "LinearGaussian", "grid", "linear_gaussian", "small_decoder"]


class LinearGaussian(NamedTuple):
    """A linear decoder with Gaussian noise, for which everything has a closed form."""

    model: Callable[[], None]
    unconditioned: Callable[[], None]
    data: Tensor
    mask: Tensor
    weight: Tensor
    bias: Tensor
    noise: float
    prior_mean: Tensor
    prior_factor: Tensor

    def posterior(self) -> dist.MultivariateNormal:
        """Of the latents of every row."""
        masked = self.weight * self.mask[..., None] / self.noise
        prior_precision = torch.cholesky_inverse(self.prior_factor)
        precision = prior_precision + masked.mT @ masked
        residual = (self.data - self.bias) * self.mask / self.noise
        linear = (masked.mT @ residual[..., None]).squeeze(-1) + prior_precision @ self.prior_mean
        covariance = torch.linalg.inv(precision)
        mean = (covariance @ linear[..., None]).squeeze(-1)
        return dist.MultivariateNormal(mean, covariance)

    def log_evidence(self) -> Tensor:
        """Of every row."""
        marginal = self._marginal()
        return torch.stack(
            [self._of_elements(marginal, row, m) for row, m in enumerate(self.mask)]
        )

    def query_log_prob(self) -> Tensor:
        """Log-density of the data that are not observed, given those that are."""
        marginal = self._marginal()
        everything = torch.ones_like(self.mask[0])
        rows = range(len(self.data))
        whole = torch.stack([self._of_elements(marginal, row, everything) for row in rows])
        return whole - self.log_evidence()

    def _marginal(self) -> tuple[Tensor, Tensor]:
        factor = self.weight @ self.prior_factor
        covariance = factor @ factor.T + self.noise**2 * torch.eye(len(self.bias))
        return self.weight @ self.prior_mean + self.bias, covariance

    def _of_elements(self, marginal: tuple[Tensor, Tensor], row: int, m: Tensor) -> Tensor:
        if not m.any():
            return torch.zeros(())
        mean, covariance = marginal
        part = dist.MultivariateNormal(mean[m], covariance[m][:, m])
        return part.log_prob(self.data[row, m])


def linear_gaussian(
    rows: int, latents: int, size: int, *, noise: float = 0.5, standard: bool = True
) -> LinearGaussian:
    """Data of the model itself, with a random mask for each row, some empty and some full."""
    weight, bias = torch.randn(size, latents), torch.randn(size)
    prior_mean, prior_factor = torch.zeros(latents), torch.eye(latents)
    if not standard:
        prior_mean = 3 * torch.randn(latents)
        prior_factor = (5 * torch.randn(latents, latents)).tril() + 2 * torch.eye(latents)
        prior_factor = torch.linalg.cholesky(prior_factor @ prior_factor.T)

    def model() -> None:
        with pyro.plate("rows", rows):
            if standard:
                z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            else:
                prior = dist.MultivariateNormal(prior_mean, scale_tril=prior_factor)
                z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ weight.T + bias, noise).to_event(1))

    z = prior_mean + torch.randn(rows, latents) @ prior_factor.T
    data = z @ weight.T + bias + noise * torch.randn(rows, size)
    mask = torch.rand(rows, size) < torch.rand(rows, 1)
    mask[0], mask[-1] = False, True
    return LinearGaussian(
        model=condition_on(model, {"x": data}, {"x": mask}),
        unconditioned=model,
        data=data,
        mask=mask,
        weight=weight,
        bias=bias,
        noise=noise,
        prior_mean=prior_mean,
        prior_factor=prior_factor,
    )


class Grid(NamedTuple):
    """A model with two latents, summed on a fine grid."""

    points: Tensor
    cell: float
    log_posterior: Tensor
    log_evidence: Tensor

    def divergence(self, log_q: Tensor) -> Tensor:
        """KL(q || p(z | x)) of every row, q given on the grid."""
        return (log_q.exp() * (log_q - self.log_posterior)).sum(0) * self.cell


def grid(log_joint: Callable[[Tensor], Tensor], width: float = 6.0, num: int = 400) -> Grid:
    """
    Normalise a joint density of two latents and evidence.

    :param log_joint: from points, ``(n, 1, 2)``, to values, ``(n, rows)``.
    """
    axis = torch.linspace(-width, width, num)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    cell = float((axis[1] - axis[0]) ** 2)
    with torch.no_grad():
        values = log_joint(points)
    log_evidence = values.logsumexp(0) + torch.tensor(cell).log()
    return Grid(points, cell, values - log_evidence, log_evidence)


def small_decoder(latents: int, size: int, gain: float = 4.0) -> nn.Sequential:
    """A random decoder, curved enough for posteriors that are not Gaussian."""
    decoder = nn.Sequential(nn.Linear(latents, 32), nn.Tanh(), nn.Linear(32, size))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(gain)
    return decoder.eval()
