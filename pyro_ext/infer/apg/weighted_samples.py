"""What the sampler returns: weighted samples, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.resampling import (
    RESAMPLERS,
    effective_sample_size,
    log_mean_exp,
    take_particles,
)
from .sweep import Particles, Update

__all__ = ["History", "WeightedSamples", "record_history"]


class History(NamedTuple):
    """
    Figures of every sweep, to be plotted against its number.

    Sweep 0 is the draw from the encoder; blocks are updated from sweep 1 on. ESS are fractions of
    the number of particles.
    """

    log_joint: Tensor
    """Weighted average of the log joint density after a sweep, ``(sweeps, *data_sets)``."""
    log_evidence: Tensor
    """Estimated logarithm of the marginal likelihood, ``(sweeps, *data_sets)``."""
    ess: dict[str, Tensor]
    """ESS of the encoder, ``(1, *data_sets)``, and of every update of a block by its incremental
    weights, ``(sweeps - 1, *data_sets)``."""
    local_ess: dict[str, Tensor]
    """The same per element, averaged over them, for the blocks of a local plate; elements that
    are masked count as 1."""
    block_log_joint: dict[str, Tensor]
    """Weighted average of the log joint density after every update of a block, ``(sweeps - 1,
    *data_sets)``, and after the encoder, ``(1, *data_sets)``."""


class WeightedSamples(NamedTuple):
    r"""
    Samples of the posterior with their weights, separately for every data set.

    Expectations under the posterior are :math:`\sum_l w_l f(z_l) / \sum_l w_l` (Wu et al. 2020,
    eq. 14).
    """

    samples: dict[str, Tensor]
    """Values by site, ``(particles, *data_sets, ...)``."""
    log_weights: Tensor
    """Logarithms of unnormalised weights, ``(particles, *data_sets)``; the mean of the weights
    is an unbiased estimate of the marginal likelihood."""
    history: History
    """Log joint density, evidence and ESS of every sweep."""

    @property
    def log_evidence(self) -> Tensor:
        """Estimate of the log marginal likelihood, ``(*data_sets,)``."""
        return log_mean_exp(self.log_weights)

    @property
    def weights(self) -> Tensor:
        """Normalised weights, ``(particles, *data_sets)``."""
        return torch.softmax(self.log_weights, 0)

    @property
    def ess(self) -> Tensor:
        """Effective number of particles after the last update, ``(*data_sets,)``."""
        return effective_sample_size(self.log_weights)

    def expectation(self, fn: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """
        Average a function of the latents over the posterior.

        :param fn: from values by site to a tensor ``(particles, *data_sets, ...)``.
        :returns: shape ``(*data_sets, ...)``.
        :raises ValueError: if the function returns another shape.
        """
        value = fn(self.samples)
        leading = self.log_weights.shape
        if value.shape[: len(leading)] != leading:
            raise ValueError(
                f"The function returned shape {tuple(value.shape)}, which does not begin with "
                f"particles and data sets, {tuple(leading)}. Keep the leading dimensions."
            )
        weights = self.weights.reshape(leading + (1,) * (value.dim() - len(leading)))
        return (weights * value).sum(0)

    def resample(self, num_samples: int, method: str = "systematic") -> dict[str, Tensor]:
        """
        Draw samples of equal weight.

        :param int num_samples: how many; more than there are particles repeats some.
        :param str method: "systematic" or "multinomial".
        :returns: values by site, ``(num_samples, *data_sets, ...)``.
        :raises ValueError: if an argument is out of its range.
        """
        if method not in RESAMPLERS:
            raise ValueError(f"method={method!r}: choose one of {sorted(RESAMPLERS)}.")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be positive.")
        ancestors = RESAMPLERS[method](self.log_weights, num_samples)
        values = take_particles(ancestors, *self.samples.values())
        return dict(zip(self.samples, values, strict=True))

    def to_arviz(self, num_samples: int | None = None) -> Any:
        """
        Resample, and convert to ArviZ's container.

        :param num_samples: number of draws, by default as many as there are particles.
        :returns: ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x; one
            chain, whose draws are not in any order of time.
        :raises ImportError: if ArviZ is not installed.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError("to_arviz needs ArviZ: pip install arviz.") from error
        draws = self.resample(len(self.log_weights) if num_samples is None else num_samples)
        posterior = {k: v.detach().cpu().numpy()[None] for k, v in draws.items()}
        if int(arviz.__version__.split(".")[0]) >= 1:
            return arviz.from_dict({"posterior": posterior})
        return arviz.from_dict(posterior=posterior)


def record_history(updates: Iterable[Update], num_blocks: int) -> tuple[Particles, History]:
    """
    Consume the updates of a run, and keep the figures.

    :param updates: the updates, from the encoder on.
    :param int num_blocks: number of blocks of a sweep.
    :returns: the last population, and the history.
    """
    log_joint: list[Tensor] = []
    log_evidence: list[Tensor] = []
    ess: dict[str, list[Tensor]] = {}
    local_ess: dict[str, list[Tensor]] = {}
    block_log_joint: dict[str, list[Tensor]] = {}
    particles: Particles | None = None
    for number, update in enumerate(updates):
        particles = update.particles
        log_weights = particles.log_weights
        is_first = number == 0
        ess.setdefault(update.block, []).append(_fraction(update.weighed.log_increments))
        if update.weighed.local_weights is not None:
            local = update.weighed.local_weights.square().sum(0).reciprocal() / len(log_weights)
            local_ess.setdefault(update.block, []).append(local.mean(-1))
        # particles of weight zero may have a density of zero: 0 * -inf counts for nothing
        weights = torch.softmax(log_weights, 0)
        average = torch.where(weights > 0, weights * particles.log_joint, 0.0).sum(0)
        block_log_joint.setdefault(update.block, []).append(average)
        if is_first or number % max(num_blocks, 1) == 0:  # the last of its sweep
            log_joint.append(average)
            log_evidence.append(log_mean_exp(log_weights))
    if particles is None:
        raise ValueError("There were no updates.")
    return particles, History(
        torch.stack(log_joint),
        torch.stack(log_evidence),
        _stack(ess),
        _stack(local_ess),
        _stack(block_log_joint),
    )


def _fraction(log_weights: Tensor) -> Tensor:
    return effective_sample_size(log_weights) / len(log_weights)


def _stack(values: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack(parts) for name, parts in values.items()}
