"""Questions to a trained autoencoder, and other ways to answer them.

A question is an image (or any row of elements) and a mask that says what was seen of it. The
functions return latent vectors in agreement with what was seen; :func:`score` says how well they
tell the rest.

* :func:`grid_posterior` sums over a grid, which is exact for two latents.
* :func:`rejection` draws from the prior and keeps what agrees.
* :func:`alternation` guesses the rest, encodes, decodes, and so on (Rezende, Mohamed and Wierstra
  2014, appendix F).

The ``vae`` of this module is any object with the methods of ``autoencoder.VAE``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ext.infer.conditional_prior.metrics import (
    average_ssim,
    average_standard_deviation,
    log_mean_exp,
)

__all__ = [
    "Grid",
    "Questions",
    "Rejection",
    "Score",
    "alternation",
    "complete",
    "grid_posterior",
    "random_questions",
    "rejection",
    "score",
    "score_completed",
]

_AT_ONCE = 2_000_000  # numbers that are evaluated together


class Questions(NamedTuple):
    """Images, and what was seen of them."""

    x: Tensor
    """Whole images, shape ``(rows, elements)``."""
    mask: Tensor
    """True where an element was seen, of the same shape."""

    def first(self, num: int) -> Questions:
        """Only the first ones."""
        return Questions(self.x[:num], self.mask[:num])


def random_questions(
    images: Tensor, num: int, fractions: tuple[float, float], seed: int = 0
) -> Questions:
    """
    Random images, of each of which a random part of the pixels was seen.

    :param Tensor images: shape ``(n, elements)``.
    :param int num: number of questions, at most n.
    :param fractions: the smallest and the largest part that is seen; uniform between them.
    :param int seed: the same questions for the same seed, whatever the dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(images), generator=generator)[:num]
    low, high = fractions
    part = low + (high - low) * torch.rand(num, 1, generator=generator)
    ranks = torch.rand(num, images.shape[-1], generator=generator).argsort(-1).argsort(-1)
    num_seen = (part * images.shape[-1]).round().clamp(1, images.shape[-1] - 1)
    return Questions(images[rows], ranks < num_seen)


# ------------------------------------------------------------------------------ exact, 2 latents


class Grid(NamedTuple):
    """Posteriors of two latents on a grid."""

    axis: Tensor
    """Coordinates along either side, shape ``(n,)``."""
    log_posterior: Tensor
    """Log-probability of the cells, shape ``(n * n, rows)``; the second latent runs faster."""
    log_evidence: Tensor
    """log p(x) of what was seen, shape ``(rows,)``."""
    query_log_prob: Tensor
    """log p(y | x) of the rest, shape ``(rows,)``."""
    log_query: Tensor
    """log p(y | z) of the rest at the cells' centres, shape ``(n * n, rows)``."""

    def row(self, index: int) -> Grid:
        """One question only."""
        one = slice(index, index + 1)
        return Grid(
            self.axis,
            self.log_posterior[:, one],
            self.log_evidence[one],
            self.query_log_prob[one],
            self.log_query[:, one],
        )

    def integrate_query(self, log_density: Callable[[Tensor], Tensor]) -> Tensor:
        """
        The log of the integral of q(z) p(y | z), the query's log-probability under a guide.

        A mean over draws of q underestimates it, the more the sharper p(y | z) is. Cells where
        p(y | z) is below e^-30 of its maximum are left out.

        :param log_density: log q at points of shape ``(num, rows, 2)``, of shape ``(num, rows)``.
        :returns: shape ``(rows,)``.
        """
        is_near = self.log_query > self.log_query.amax(0) - 30.0
        log_query, cells = self.log_query.topk(int(is_near.sum(0).max()), dim=0)
        points = torch.cartesian_prod(self.axis, self.axis)[cells]
        log_q = torch.cat([log_density(z) for z in points.split(10_000)])
        return (log_q + log_query).logsumexp(0) + 2 * float((self.axis[1] - self.axis[0]).log())

    def sample(self, num: int) -> Tensor:
        """Draw latents, uniform within cells: shape ``(num, rows, 2)``."""
        cells = torch.multinomial(self.log_posterior.T.exp(), num, replacement=True).T
        index = torch.stack([cells // len(self.axis), cells % len(self.axis)], -1)
        jitter = torch.rand(index.shape, dtype=self.axis.dtype) - 0.5
        return self.axis[index] + jitter * (self.axis[1] - self.axis[0])


@torch.no_grad()
def grid_posterior(vae: Any, questions: Questions, *, half: float = 5.0, num: int = 501) -> Grid:
    """
    Sum over a grid of two latents.

    :param vae: an autoencoder with two latents.
    :param Questions questions: what was seen.
    :param float half: the grid goes from minus this to this.
    :param int num: points along a side.
    :raises ValueError: if there are more latents.
    """
    if vae.latent_size != 2:
        raise ValueError(f"A grid is for two latents, but the model has {vae.latent_size}.")
    x, mask = questions
    axis = torch.linspace(-half, half, num, dtype=x.dtype)
    points = torch.cartesian_prod(axis, axis).unsqueeze(1)
    parts = points.split(max(1, _AT_ONCE // x.numel()))
    log_x = torch.cat([vae.log_likelihood(z, x, mask) for z in parts])
    log_y = torch.cat([vae.log_likelihood(z, x, ~mask) for z in parts])
    log_prior = -0.5 * points.square().sum(-1) - math.log(2 * math.pi)
    log_joint = log_x + log_prior + 2 * float((axis[1] - axis[0]).log())
    log_evidence = log_joint.logsumexp(0)
    log_posterior = log_joint - log_evidence
    return Grid(axis, log_posterior, log_evidence, (log_posterior + log_y).logsumexp(0), log_y)


# -------------------------------------------------------------------------------------- sampling


class Rejection(NamedTuple):
    """Draws that were accepted."""

    z: Tensor
    """Shape ``(num, rows, latent_size)``; a row with too few repeats them, one without is NaN."""
    num_accepted: Tensor
    """How many there were, at most ``num``, shape ``(rows,)``."""
    num_proposals: int
    """Draws from the prior, the same for all rows."""


@torch.no_grad()
def rejection(
    vae: Any,
    questions: Questions,
    num: int,
    log_bound: Tensor,
    *,
    max_proposals: int = 2_000_000,
) -> Rejection:
    """
    Draw from the prior, and keep each with probability p(x | z) over a bound of it.

    :param vae: the autoencoder.
    :param Questions questions: what was seen.
    :param int num: draws wanted of each row.
    :param Tensor log_bound: of log p(x | z) of each row, shape ``(rows,)``.
    :param int max_proposals: rows that want more are left with fewer.
    """
    x, mask = questions
    accepted: list[list[Tensor]] = [[] for _ in x]
    counts = torch.zeros(len(x), dtype=torch.long)
    done, at_once = 0, max(1, _AT_ONCE // x.shape[-1])
    while done < max_proposals and bool((counts < num).any()):
        open_rows = (counts < num).nonzero().squeeze(-1)
        size = min(max(1, at_once // len(open_rows)), max_proposals - done)
        z = torch.randn(size, vae.latent_size, dtype=x.dtype)
        log_likelihood = vae.log_likelihood(z.unsqueeze(1), x[open_rows], mask[open_rows])
        uniform = torch.rand(log_likelihood.shape, dtype=x.dtype)
        keep = uniform.log() < log_likelihood - log_bound[open_rows]
        for column, row in enumerate(open_rows.tolist()):
            accepted[row].append(z[keep[:, column]])
            counts[row] += len(accepted[row][-1])
        done += size
    nothing = x.new_full((num, vae.latent_size), math.nan)
    draws = [torch.cat(parts)[:num] for parts in accepted]
    filled = [d[torch.arange(num) % len(d)] if len(d) else nothing for d in draws]
    return Rejection(torch.stack(filled, 1), counts.clamp(max=num), done)


@torch.no_grad()
def alternation(
    vae: Any,
    questions: Questions,
    num: int,
    num_rounds: int = 50,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """
    Fill the gaps with noise, then encode and decode in turns, for many chains at once.

    The encoder has only seen whole images, so that its draws are not those of the posterior.

    :param vae: the autoencoder.
    :param Questions questions: what was seen.
    :param int num: chains of each row, each of which gives its last latent vector.
    :param int num_rounds: turns of each chain.
    :param limits: the smallest and the largest value of an element. Guesses are kept between them:
        elsewhere the encoder has learned nothing, and chains may run away.
    :returns: shape ``(num, rows, latent_size)``.
    """
    x, mask = questions
    guess = torch.rand(num, *x.shape, dtype=x.dtype)
    if vae.likelihood == "bernoulli":
        guess = guess.round()
    z = x.new_zeros(num, len(x), vae.latent_size)
    for _ in range(num_rounds):
        z = vae.encode(torch.where(mask, x, guess)).sample()
        guess = vae.elements(z).sample()
        if limits is not None:
            guess = guess.clamp(*limits)
    return z


# --------------------------------------------------------------------------------------- scores


class Score(NamedTuple):
    """How well draws tell what was not seen; all of shape ``(rows,)``."""

    query_log_prob: Tensor
    ssim: Tensor
    standard_deviation: Tensor
    squared_error: Tensor


@torch.no_grad()
def complete(vae: Any, z: Tensor, questions: Questions) -> Tensor:
    """Draw what was not seen, given latents: shape ``(num, rows, elements)``."""
    return torch.where(questions.mask, questions.x, vae.elements(z).sample())


@torch.no_grad()
def score(vae: Any, z: Tensor, questions: Questions) -> Score:
    """
    Score latents.

    :param vae: the autoencoder.
    :param Tensor z: shape ``(num, rows, latent_size)``.
    :param Questions questions: what was seen, and what was not.
    """
    x, mask = questions
    query_log_prob = log_mean_exp(vae.log_likelihood(z, x, ~mask))
    return score_completed(complete(vae, z, questions), query_log_prob, questions)


def score_completed(completed: Tensor, query_log_prob: Tensor, questions: Questions) -> Score:
    """
    Score images that are complete already.

    :param Tensor completed: shape ``(num, rows, pixels)``.
    :param Tensor query_log_prob: shape ``(rows,)``.
    :param Questions questions: what was seen, and what was not.
    """
    x, mask = questions
    side = math.isqrt(x.shape[-1])
    images, original = (v.unflatten(-1, (side, side)) for v in (completed, x))
    squared = (completed - x).square().mean(0) * ~mask
    return Score(
        query_log_prob=query_log_prob,
        ssim=average_ssim(images, original),
        standard_deviation=average_standard_deviation(completed),
        squared_error=squared.sum(-1) / (~mask).sum(-1),
    )
