"""Posteriors of the two kinds: with draws of a flow, and with a density up to a constant."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.mcmc import NUTS
from torch import Tensor, nn

from ...errors import SamplingWarning
from ...ops.slice_sampling import slice_sweep
from ...ops.tempering import temper
from ..mcmc import MCMC
from .posterior import LogRatio, Posterior
from .simulator import Simulator
from .sites import constrain, is_inside, unconstrain

__all__ = ["FlowPosterior", "RatioPosterior"]

_MIN_ESS = 100
_MIN_PARTICLES = 1000
_PROBES = 10_000
_MIN_ACCEPTANCE = 1e-3


class RatioPosterior(Posterior):
    """
    Posterior whose density is known up to a constant, the prior times a ratio.

    :meth:`sample` has ``method="smc"``, sequential Monte Carlo with slice sampling from the prior
    to the posterior, which keeps the weights of separate modes; ``"nuts"``, Pyro's own sampler,
    with ``warmup_steps`` and ``num_chains``; ``"slice"``, chains of slice sampling that advance
    together, with these two and ``thinning``; and ``"importance"``, which resamples ``num_draws``
    draws from the prior. Chains start from a small run of the first.
    """

    is_normalized = False

    def draw_unconstrained(
        self, num_samples: int, *, method: str = "smc", **options: Any
    ) -> Tensor:
        """See :meth:`Posterior.draw_unconstrained`."""
        methods: dict[str, Callable[..., Tensor]] = {
            "smc": self._smc,
            "nuts": self._nuts,
            "slice": self._slice,
            "importance": self._importance,
        }
        if method not in methods:
            raise ValueError(f"method={method!r}: give one of {list(methods)}.")
        return methods[method](num_samples, **options)

    def log_prob_unconstrained(self, unconstrained: Tensor) -> Tensor:
        """See :meth:`Posterior.log_prob_unconstrained`; up to a constant."""
        log_prior = self.simulator.log_prior(unconstrained)
        return log_prior + self._log_ratio(unconstrained, log_prior, self.features)

    def _smc(self, num_samples: int, *, num_particles: int | None = None) -> Tensor:
        num = max(_MIN_PARTICLES, num_samples) if num_particles is None else num_particles
        if num < num_samples:
            raise ValueError(f"num_particles={num} is less than num_samples={num_samples}.")
        with torch.no_grad():
            start = self.simulator.draw_prior(num)
            result = temper(start, self.simulator.log_prior, self.log_ratio)
        return result.particles[torch.randperm(num, device=start.device)[:num_samples]]

    @torch.enable_grad()
    def _nuts(
        self, num_samples: int, *, warmup_steps: int = 200, num_chains: int = 4, **options: Any
    ) -> Tensor:
        start = self.draw_unconstrained(max(num_chains, _MIN_ESS), method="smc")
        scale = start.std(0)

        def potential(params: dict[str, Tensor]) -> Tensor:
            return -self.log_prob_unconstrained((params["latents"] * scale)[None]).squeeze(0)

        kernel = NUTS(potential_fn=potential, **options)
        chains = (start / scale)[:num_chains]
        mcmc = MCMC(
            kernel,
            -(-num_samples // num_chains),
            warmup_steps,
            initial_params={"latents": chains if num_chains > 1 else chains[0]},
            num_chains=num_chains,
            chain_method="sequential",
            disable_progbar=True,
        )
        mcmc.run()
        draws = mcmc.get_samples()["latents"] * scale
        return draws[torch.randperm(len(draws), device=draws.device)[:num_samples]]

    @torch.no_grad()
    def _slice(
        self,
        num_samples: int,
        *,
        warmup_steps: int = 10,
        num_chains: int = 100,
        thinning: int = 5,
    ) -> Tensor:
        _check_chains(warmup_steps, num_chains, thinning)
        start = self.draw_unconstrained(max(num_chains, _MIN_ESS), method="smc")
        widths = 2.0 * start.std(0)
        state = start[:num_chains]
        log_prob = self.log_prob_unconstrained(state)
        draws: list[Tensor] = []
        for i in range(1, warmup_steps + thinning * -(-num_samples // num_chains) + 1):
            state, log_prob = slice_sweep(state, log_prob, self.log_prob_unconstrained, widths)
            if i > warmup_steps and (i - warmup_steps) % thinning == 0:
                draws.append(state)
        together = torch.cat(draws)
        return together[torch.randperm(len(together), device=start.device)[:num_samples]]

    def _importance(self, num_samples: int, *, num_draws: int = 20_000) -> Tensor:
        weighted = self.importance_sample(num_draws)
        if weighted.ess < min(num_samples, _MIN_ESS):
            warnings.warn(
                f"Of {num_draws} draws from the prior, only {weighted.ess:.1f} are effective: the "
                "posterior is much narrower. Use method='smc', or more num_draws.",
                SamplingWarning,
                stacklevel=4,
            )
        return unconstrain(weighted.resample(num_samples), self.structure)


class FlowPosterior(Posterior):
    """
    Posterior with a normalised density and independent draws.

    :param nn.Module flow: called on the features of the observation.
    """

    is_normalized = True

    def __init__(
        self,
        simulator: Simulator,
        log_ratio: LogRatio,
        features: Tensor,
        flat: Tensor,
        flow: nn.Module,
    ) -> None:
        super().__init__(simulator, log_ratio, features, flat)
        self.flow = flow

    def draw_unconstrained(self, num_samples: int, **options: Any) -> Tensor:
        """See :meth:`Posterior.draw_unconstrained`."""
        if options:
            raise TypeError(f"A flow is sampled in one way, without {sorted(options)}.")
        draws = self._draw_from_flow(num_samples)
        if not self.structure.may_leak:
            return draws
        inside = [draws[self._is_inside(draws)]]
        drawn = num_samples
        while (found := sum(map(len, inside))) < num_samples:
            if drawn >= _PROBES and found < _MIN_ACCEPTANCE * drawn:
                raise ValueError(
                    f"Of {drawn} draws of the flow, {found} are inside the support of the prior. "
                    "Use support='transform', where none is outside."
                )
            more = self._draw_from_flow(_PROBES)
            drawn += _PROBES
            inside.append(more[self._is_inside(more)])
        return torch.cat(inside)[:num_samples]

    @torch.no_grad()
    def acceptance_rate(self, num_draws: int = _PROBES) -> float:
        """
        Fraction of the draws of the flow that are inside the support of the prior.

        One by construction, unless the estimator was made with ``support="reject"``.

        :param int num_draws: number of draws to count.
        """
        if not self.structure.may_leak:
            return 1.0
        return float(self._is_inside(self._draw_from_flow(num_draws)).double().mean())

    def log_prob_unconstrained(self, unconstrained: Tensor) -> Tensor:
        """See :meth:`Posterior.log_prob_unconstrained`."""
        log_prob: Tensor = self._density().log_prob(unconstrained)
        if self.structure.may_leak:
            log_prob = log_prob - torch.tensor(self.acceptance_rate()).log().to(log_prob)
            log_prob = log_prob.masked_fill(~self._is_inside(unconstrained), -torch.inf)
        return log_prob

    def _density(self) -> Any:
        return self.flow(self.features.squeeze(0))

    @torch.no_grad()
    def _draw_from_flow(self, num: int) -> Tensor:
        was_training = self.flow.training
        self.flow.eval()
        draws: Tensor = self._density().sample((num,))
        self.flow.train(was_training)
        return draws

    def _is_inside(self, unconstrained: Tensor) -> Tensor:
        return is_inside(constrain(unconstrained, self.structure), self.structure)


def _check_chains(warmup_steps: int, num_chains: int, thinning: int) -> None:
    if warmup_steps < 0 or num_chains < 1 or thinning < 1:
        raise ValueError(
            f"warmup_steps={warmup_steps}, num_chains={num_chains}, thinning={thinning}: give at "
            "least 0, 1 and 1."
        )
