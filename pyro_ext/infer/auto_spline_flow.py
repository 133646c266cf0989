"""An automatic guide whose joint density of all latent sites is a neural spline flow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform

from ..distributions.flow import BijectionTransform, FlowDistribution
from ..distributions.spline_flow import NeuralSplineFlow
from ..distributions.transforms import Composite, ShiftAndScale

__all__ = ["AutoSplineFlow"]

_DECIDED_HERE = ("features", "context_features", "box")


class AutoSplineFlow(AutoContinuous):
    """
    Guide over all continuous latent sites jointly, with a neural spline flow as its density.

    As in Pyro's other automatic guides, constrained sites are mapped to real numbers by
    ``biject_to``, and these are one vector, here distributed as a
    :class:`~pyro_ext.distributions.NeuralSplineFlow` that does not depend on the model's
    arguments. It represents skew, heavy shoulders, several modes and curved dependence that
    ``AutoMultivariateNormal`` cannot.

    Draws take one pass, and are scored in the same one. With ``coupling=False`` the flow is
    turned round for that (``inverse=True``, as in ``AutoIAFNormal``); other values than its own
    draws are then scored feature by feature.

    The parameters are made at the first call, when the number of latents is known. To load a
    ``state_dict`` into a new guide, call ``guide(*args, **kwargs)`` once before. There are no
    closed-form medians or quantiles: take those of draws, for example from
    ``Predictive(model, guide=guide, num_samples=1000)``. The trained guide can straighten a model
    for HMC, through ``pyro.infer.reparam.NeuTraReparam``.

    :param model: a Pyro model whose latent sites are continuous and of fixed shape.
    :param int transforms: number of steps of the flow.
    :param init_loc_fn: per-site function for the centre of the guide at the start, one of those
        in :mod:`pyro.infer.autoguide.initialization`.
    :param float init_scale: standard deviation of every unconstrained latent at the start. Best
        is the order of the posterior's own: the splines act on about three of it.
    :param options: the other settings of :class:`~pyro_ext.distributions.NeuralSplineFlow`, as
        ``bins``, ``hidden_features`` or ``coupling``.
    :raises ValueError: if a setting is out of its range.
    :raises TypeError: if an option is unknown, or one that the guide decides itself.

    Reference: Rezende and Mohamed 2015, "Variational inference with normalizing flows"; Durkan,
    Bekasov, Murray and Papamakarios 2019, "Neural Spline Flows", section 5.2.

    >>> def model():
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     y = pyro.sample("y", dist.LogNormal(x, 1.0))
    ...     pyro.sample("data", dist.Normal(x * y, 1.0), obs=torch.tensor(2.0))
    >>> guide = AutoSplineFlow(model, transforms=2, hidden_features=16)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    >>> losses = [svi.step() for _ in range(3)]
    >>> sorted(guide())
    ['x', 'y']
    """

    flow: NeuralSplineFlow

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        transforms: int = 4,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        **options: Any,
    ) -> None:
        if not 0 < init_scale < float("inf"):
            raise ValueError(f"init_scale={init_scale!r}: give a positive standard deviation.")
        self._init_scale = init_scale
        self._options = _check_options(transforms=transforms, **options)
        super().__init__(model, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        flow = NeuralSplineFlow(self.latent_dim, **self._options)
        # Trained like the rest: the scale of a posterior is what is known least at the start.
        scale = torch.full_like(loc, self._init_scale)
        layers = list(flow.bijection.bijections)[1:]
        flow.bijection = Composite(
            [ShiftAndScale(loc, scale), *layers], compile=self._options.get("compile", False)
        )
        self.flow = flow.to(dtype=loc.dtype, device=loc.device)

    def get_base_dist(self) -> TorchDistribution:
        """Return the distribution of the noise."""
        return self.flow().base

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the transform from noise to unconstrained latents."""
        return BijectionTransform(self.flow.bijection)

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """Return the distribution of the unconstrained latents, one vector."""
        posterior = self.flow()
        return _ScoredDraws(posterior.bijection, posterior.base)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "A spline flow has no medians or quantiles in closed form: take those of draws, for "
            "example from Predictive(model, guide=guide, num_samples=1000)."
        )


class _ScoredDraws(FlowDistribution):
    """
    A flow that knows the log-density of its latest draw, by the pass that made it.

    Only the very tensor that was drawn is recognised, not one that is equal to it: an objective
    that scores a detached draw wants gradients that the pass of drawing does not give.
    """

    _latest: tuple[Tensor, Tensor, bool] | None = None

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        x, log_prob = self.rsample_and_log_prob(torch.Size(sample_shape))
        self._latest = (x, log_prob, torch.is_grad_enabled())
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if self._latest is None:
            return super().log_prob(value)
        x, log_prob, had_grad = self._latest
        if value is not x or had_grad != torch.is_grad_enabled():
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        return log_prob


def _check_options(**options: Any) -> dict[str, Any]:
    """Refuse now what would fail only at the first call of the guide."""
    for name in _DECIDED_HERE:
        if name in options:
            raise TypeError(
                f"AutoSplineFlow got {name}={options[name]!r}, but its flow is over the "
                "unconstrained latents of the model, without a context: leave it out."
            )
    inspect.signature(NeuralSplineFlow).bind(1, **options)
    # A guide has to draw in one pass.
    options.setdefault("inverse", not options.get("coupling", True))
    return options
