"""The latents given one observation: draws, densities, a guide, starts, importance weights."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints

from ...ops.resampling import effective_sample_size, log_mean_exp, systematic
from ...poutine.sites import delta, is_subsample
from .simulator import Simulator
from .sites import check_latents, constrain, is_inside, log_abs_det, unconstrain

__all__ = ["LogRatio", "Posterior", "WeightedDraws"]

LogRatio = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From unconstrained latents, their log prior and features to f, up to a constant."""

_ROWS_AT_ONCE = 10_000


class WeightedDraws(NamedTuple):
    """Draws with importance weights."""

    samples: dict[str, Tensor]
    """Values by site, shape ``(draws, ...)``."""
    log_weights: Tensor
    """Logarithms of unnormalised weights, shape ``(draws,)``."""

    @property
    def weights(self) -> Tensor:
        """Normalised weights, shape ``(draws,)``."""
        return torch.softmax(self.log_weights, 0)

    @property
    def ess(self) -> float:
        """Effective number of draws."""
        return float(effective_sample_size(self.log_weights))

    @property
    def log_evidence(self) -> Tensor:
        """Logarithm of the mean weight: the evidence, if the draws' density is normalised."""
        return log_mean_exp(self.log_weights)

    def resample(self, num_samples: int) -> dict[str, Tensor]:
        """
        Draws of equal weight, in random order.

        :param int num_samples: how many.
        """
        index = systematic(self.log_weights, num_samples)
        index = index[torch.randperm(num_samples, device=index.device)]
        return {name: value[index] for name, value in self.samples.items()}


class Posterior(ABC):
    """
    A distribution over the latent sites of a model, given one observation.

    Draws are dictionaries of values by site, in the model's own coordinates. A posterior is also
    a guide, without parameters: ``Predictive(model, guide=posterior, num_samples=100)``.

    :param Simulator simulator: the model.
    :param log_ratio: f of an estimator.
    :param Tensor features: of the observation, shape ``(1, features)``.
    :param Tensor flat: the observation, shape ``(in_features,)``.
    """

    is_normalized: ClassVar[bool]
    """Whether :meth:`log_prob` is that of a normalised density."""

    def __init__(
        self, simulator: Simulator, log_ratio: LogRatio, features: Tensor, flat: Tensor
    ) -> None:
        self.simulator = simulator
        self.structure = simulator.structure
        self.features = features
        self.flat = flat
        self._log_ratio = log_ratio

    def sample(self, num_samples: int = 1000, **options: Any) -> dict[str, Tensor]:
        """
        Draw from the posterior.

        :param int num_samples: number of draws.
        :param options: of the way of sampling, for posteriors that have several.
        :returns: values by site, shape ``(num_samples, ...)``.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        return constrain(self.draw_unconstrained(num_samples, **options), self.structure)

    @abstractmethod
    def draw_unconstrained(self, num_samples: int, **options: Any) -> Tensor:
        """
        Draw unconstrained latents.

        :param int num_samples: number of draws.
        :returns: shape ``(num_samples, features)``.
        """

    def log_prob(self, latents: Mapping[str, Tensor]) -> Tensor:
        """
        Log-density of latents in the model's own coordinates.

        :param latents: values by site, shape ``(n, ...)``, or with other leading dimensions.
            Values of other sites are not used.
        :returns: shape ``(n,)``, ``-inf`` outside of the prior's support; up to a constant unless
            :attr:`is_normalized`.
        :raises ValueError: if a site is missing or has a wrong shape.
        """
        structure = self.structure
        values = check_latents(latents, structure)
        inside = is_inside(values, structure)
        rows = unconstrain(values, structure)
        rows = torch.where(inside[..., None], rows, torch.zeros_like(rows))
        log_prob = self.log_prob_unconstrained(rows.reshape(-1, structure.features))
        log_prob = log_prob.reshape(inside.shape) - log_abs_det(rows, structure)
        return log_prob.masked_fill(~inside, -torch.inf)

    @abstractmethod
    def log_prob_unconstrained(self, unconstrained: Tensor) -> Tensor:
        """
        Log-density of unconstrained latents.

        :param Tensor unconstrained: shape ``(n, features)``.
        :returns: shape ``(n,)``.
        """

    def log_ratio(self, unconstrained: Tensor) -> Tensor:
        r"""
        The estimate of :math:`\log p(x \mid \theta)` up to a constant.

        :param Tensor unconstrained: shape ``(n, features)``.
        :returns: shape ``(n,)``.
        """
        log_prior = self.simulator.log_prior(unconstrained)
        return self._log_ratio(unconstrained, log_prior, self.features)

    def importance_sample(self, num_draws: int = 20_000) -> WeightedDraws:
        """
        Weight draws from the prior.

        :param int num_draws: number of draws from the prior.
        """
        with torch.no_grad():
            draws = self.simulator.draw_prior(num_draws)
            log_weights = torch.cat([self.log_ratio(u) for u in draws.split(_ROWS_AT_ONCE)])
        log_weights = torch.nan_to_num(log_weights, nan=-torch.inf)
        return WeightedDraws(constrain(draws, self.structure), log_weights)

    def refine(self, num_draws: int = 1000, **options: Any) -> WeightedDraws:
        r"""
        Weight draws by :math:`p(\theta, x) / q(\theta \mid x)`, which makes them exact.

        For models whose likelihood can be computed, to check an estimate or to use it as a
        proposal. A small effective sample size says that it is a poor one.

        :param int num_draws: number of draws from the posterior.
        :param options: of :meth:`sample`.
        :raises ValueError: if the model has no tractable likelihood.
        """
        structure = self.structure
        computed = [site.name for site in structure.observed if not site.has_density]
        if computed or structure.nuisance:
            raise ValueError(
                "The likelihood of this model is not tractable: "
                + (f"{computed} are computed, not drawn from a distribution. " if computed else "")
                + (
                    f"{list(structure.nuisance)} would have to be integrated out. "
                    if structure.nuisance
                    else ""
                )
                + "Without it there are no weights."
            )
        with torch.no_grad():
            draws = self.draw_unconstrained(num_draws, **options)
            joint = self.simulator.log_joint(draws, self._observations())
            log_weights = joint - self.log_prob_unconstrained(draws)
        log_weights = torch.nan_to_num(log_weights, nan=-torch.inf)
        return WeightedDraws(constrain(draws, structure), log_weights)

    def initial_params(self, num_chains: int = 1) -> dict[str, Tensor]:
        """
        Draws as starting points of Pyro's HMC and NUTS, in their unconstrained coordinates.

        Latent sites that were not inferred are drawn by a run of the model.

        :param int num_chains: number of chains, the first dimension if it is more than one.
        """
        draws = self.sample(num_chains)
        starts = [
            self._unconstrained_sites({n: value[i] for n, value in draws.items()})
            for i in range(num_chains)
        ]
        if num_chains == 1:
            return starts[0]
        return {name: torch.stack([start[name] for start in starts]) for name in starts[0]}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Sample all inferred sites, as a guide.

        :param args: not used; a guide has the arguments of its model.
        """
        name = "_posterior_" + "_".join(self.structure.latent_names)
        joint = _Unconstrained(self, torch.Size())
        unconstrained = pyro.sample(name, joint, infer={"is_auxiliary": True})
        leading = unconstrained.shape[:-1]
        result: dict[str, Tensor] = {}
        for site in self.structure.latents:
            part = unconstrained[..., site.start : site.stop]
            event_dim = len(site.shape) - site.batch_dim
            # plates around the guide are left of those of the site
            own = leading[: len(leading) - site.batch_dim] if leading else leading
            full = part.reshape(own + site.unconstrained_shape)
            value = site.transform(full)
            log_det = site.transform.log_abs_det_jacobian(full, value)
            while log_det.dim() > value.dim() - event_dim:
                log_det = log_det.sum(-1)
            with contextlib.ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                point = dist.Delta(value, log_density=-log_det, event_dim=event_dim)
                result[site.name] = pyro.sample(site.name, point)
        return result

    def _observations(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        start = 0
        for site in self.structure.observed:
            stop = start + site.shape.numel()
            values[site.name] = self.flat[start:stop].reshape(site.shape)
            start = stop
        return values

    def _unconstrained_sites(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = poutine.condition(self.simulator.model, dict(values))
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(model).get_trace()
        observed = set(self.structure.observed_names)
        result: dict[str, Tensor] = {}
        nodes: dict[str, Any] = dict(trace.nodes)
        for name, node in nodes.items():
            if node["type"] != "sample" or is_subsample(node) or name in observed:
                continue
            if name in values or (not node["is_observed"] and delta(node["fn"]) is None):
                result[name] = biject_to(node["fn"].support).inv(node["value"])
        return result


class _Unconstrained(TorchDistribution):
    """A posterior as Pyro sees it inside a guide."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, posterior: Posterior, batch_shape: torch.Size) -> None:
        self.posterior = posterior
        features = posterior.structure.features
        super().__init__(batch_shape, torch.Size((features,)), validate_args=False)

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> _Unconstrained:
        return _Unconstrained(self.posterior, torch.Size(batch_shape))

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        draws = self.posterior.draw_unconstrained(shape.numel())
        return draws.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        flat = value.reshape(-1, value.shape[-1])
        return self.posterior.log_prob_unconstrained(flat).reshape(value.shape[:-1])
