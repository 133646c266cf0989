r"""Scores of conditional distributions from those of others, by Bayes' rule.

.. math:: \nabla \log p_t(x_t \mid y) = \nabla \log p_t(x_t) + \nabla \log p_t(y \mid x_t)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .sampling import denoised
from .score import Score
from .sde import SDE

__all__ = ["Likelihood", "classifier_free", "with_likelihood"]

Likelihood = Callable[[Tensor, Tensor], Tensor]
"""Log-likelihoods ``(n,)`` from data ``(n,) + event_shape`` and times ``(n,)``."""


def with_likelihood(
    score: Score, sde: SDE, likelihood: Likelihood, weight: float, of_denoised: bool
) -> Score:
    r"""
    Add the gradient of a log-likelihood to a score.

    With ``of_denoised`` the likelihood is one of data, and is given
    :math:`\hat x_0 = \mathbb E(x_0 \mid x_t)` in place of them, through which its gradient goes:
    :math:`p_t(y \mid x_t) \approx p(y \mid \hat x_0)`, exact at :math:`\epsilon` (Chung et al.
    2023). Otherwise it is that of the noisy :math:`x_t`, from a classifier of noisy data, say
    (Dhariwal and Nichol 2021), and the result is exact if it is.

    :param Score score: the score of the prior.
    :param SDE sde: the diffusion.
    :param likelihood: a function of data and times.
    :param float weight: what its gradient is multiplied by.
    :param bool of_denoised: whether it is a likelihood of data or of noisy data.
    :returns: the score of the posterior.
    """

    def guided(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        keeps_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            found = score(x, t, rows)
            data = denoised(sde, x, t, found) if of_denoised else x
            value = likelihood(data, t)
            if value.shape != t.shape:
                raise ValueError(
                    f"the likelihood of {len(t)} rows must have shape ({len(t)},), got "
                    f"{tuple(value.shape)}"
                )
            gradient = torch.autograd.grad(value.sum(), x, create_graph=keeps_graph)[0]
            total = found + weight * gradient
        return total if keeps_graph else total.detach()

    return guided


def classifier_free(conditional: Score, unconditional: Score, weight: float) -> Score:
    r"""
    Scores that point away from the unconditional ones.

    .. math:: (1 + w) \, s(x, t, c) - w \, s(x, t)

    (Ho and Salimans 2021, eq. 6). For w = 0 the conditional score.

    :param Score conditional: the score with context.
    :param Score unconditional: the score without.
    :param float weight: w.
    :returns: the combined score.
    """

    def guided(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        with_context = conditional(x, t, rows)
        return with_context + weight * (with_context - unconditional(x, t, rows))

    return guided
