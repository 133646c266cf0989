"""The MCMC kernel: constrained HMC as Pyro users type it."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor
from torch.func import vmap

from ...errors import PrecisionWarning, SamplingWarning
from ..vectorized import VectorizedKernel
from .adaptation import (
    DualAveraging,
    RunningVariance,
    dual_averaging_final,
    dual_averaging_init,
    dual_averaging_update,
    find_reasonable_step_size,
    input_scale,
    running_variance_init,
    running_variance_update,
    window_ends,
)
from .assembly import build_system, default_tolerances
from .compilation import CompiledSystem
from .integrator import IntegratorSettings
from .model import ConstrainedModel
from .projection import Projector, Tolerances, hybrid, newton, quasi_newton
from .records import RunRecord
from .start import initial_positions, values_per_chain
from .status import Status
from .system import Point, System
from .transitions import TransitionInfo, hmc_transition

__all__ = ["ConstrainedHMC"]

_PROJECTORS: dict[str, Projector] = {"quasi-newton": quasi_newton, "newton": newton}
_JACOBIAN_MODES = ("auto", "forward", "reverse")
_STUCK_AFTER = 20  # rejections in a row
_RESCUE_AFTER = 5  # rejections in a row: one in a few thousand at the usual acceptance


class _Chains(NamedTuple):
    """State of a run, between two draws."""

    point: Point
    residual: Tensor  # (chains,)
    scale: Tensor  # (dim,) of the inputs
    step_size: float
    averaging: DualAveraging
    variance: RunningVariance
    rejections: Tensor  # (chains,) proposals rejected lately
    iteration: int


class ConstrainedHMC(VectorizedKernel):
    r"""
    Constrained Hamiltonian Monte Carlo: condition on *outputs* of a differentiable generator.

    A model whose :func:`pyro.deterministic` sites are conditioned defines a manifold, the set
    of inputs :math:`u` that reproduce the given outputs exactly, :math:`c(u) = g(u) - y = 0`. The
    kernel samples

    .. math::

        \pi(u) \propto p(u)\,\bigl|J(u)J(u)^\top\bigr|^{-1/2},
        \qquad J = \partial c/\partial u

    on that manifold, which is the exact posterior given :math:`g(u) = y`, without a tolerance
    and without a likelihood (Graham and Storkey 2017, eq. 4 and algorithm 1). Observed sample
    sites stay what they are, a factor of :math:`p`. Samples come back in the model's own
    coordinates; inside, every latent site is standardised, so that step sizes are in units of
    prior standard deviations.

    Use float64 (``torch.set_default_dtype(torch.float64)``): outputs are matched to 1e-9 then.
    A float32 model runs with a warning and tolerances to match.

    :param model: a Pyro model with at least one conditioned deterministic site, or one
        conditioned ``pyro.sample(name, Delta(value))`` site.
    :param float step_size: integrator step; where adaptation starts when it is adapted.
    :param num_steps: integrator steps of a trajectory; by default as many as cover
        ``trajectory_length``.
    :param trajectory_length: integration time of a trajectory, default :math:`\pi/2`, a quarter
        turn of a standard normal, after which draws are nearly uncorrelated. Ignored when
        ``num_steps`` is given.
    :param float jitter: every trajectory's length is multiplied by a uniform draw from
        ``[1 - jitter, 1 + jitter]``, shared by the chains, against resonances. The step used is
        shortened to divide the length evenly, never lengthened.
    :param int max_num_steps: most steps of a trajectory whose length is given as time.
    :param int num_inner_steps: geodesic steps per integrator step (:math:`N_i` in algorithm 1).
    :param bool adapt_step_size: adapt the step size during warm-up, by dual averaging of the
        acceptance probability over all chains.
    :param bool adapt_mass_matrix: scale inputs by their posterior standard deviations, measured
        during warm-up (a diagonal mass matrix).
    :param float target_accept_prob: acceptance probability that adaptation aims at.
    :param str projection: ``"quasi-newton"`` (one constraint evaluation per iteration) or
        ``"newton"`` (a new Jacobian per iteration).
    :param bool use_fallback: try MINPACK's hybrid method on chains whose projection failed,
        after warm-up.
    :param constraint_tol: largest residual of an output, in its own units. The default follows
        the precision, 1e-9 in float64.
    :param int max_projection_iters: most iterations of one projection.
    :param init_strategy: a per-site initialisation function from
        :mod:`pyro.infer.autoguide.initialization`; chains start at the nearest inputs
        that reproduce the outputs. The default draws from the prior.
    :param str jacobian_mode: differentiate outputs in ``"forward"`` or ``"reverse"`` mode;
        ``"auto"`` takes the one that computes less.
    :param bool compile: record the model once and compile it to native code with
        :func:`torch.compile`; pays off in long runs.
    :raises ValueError: for arguments out of range, and when a run starts, if the model cannot be
        sampled exactly; the message names the site and the cure.

    **References**

    Matthew M. Graham and Amos J. Storkey (2017), *Asymptotically exact inference in
    differentiable generative models*, AISTATS, arXiv:1605.07826.

    Example::

        >>> from pyro_ext import MCMC
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        ...     pyro.deterministic("radius", x.norm())
        >>> conditioned = pyro.condition(model, {"radius": torch.tensor(2.0)})
        >>> mcmc = MCMC(ConstrainedHMC(conditioned), num_samples=50, warmup_steps=50,
        ...             num_chains=4, disable_progbar=True)
        >>> mcmc.run()
        >>> bool((mcmc.get_samples()["x"].norm(dim=-1) - 2.0).abs().max() < 1e-8)
        True
    """

    # state of a run, set by setup()
    _model: ConstrainedModel
    _system: System
    _tolerances: Tolerances
    _chains: _Chains
    _record: RunRecord
    _preset: dict[str, Tensor]
    _params: dict[str, Tensor]
    _warmup_steps: int
    _num_shown: int
    _mean_accept_prob: float
    _mean_failures: float
    _is_finished: bool

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float = 0.5,
        num_steps: int | None = None,
        trajectory_length: float | None = None,
        jitter: float = 0.5,
        max_num_steps: int = 100,
        num_inner_steps: int = 1,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = False,
        target_accept_prob: float = 0.8,
        projection: str = "quasi-newton",
        use_fallback: bool = True,
        constraint_tol: float | None = None,
        max_projection_iters: int = 50,
        init_strategy: Callable[..., Any] = init_to_sample,
        jacobian_mode: str = "auto",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(
                f"model must be a function with pyro.sample sites, got {type(model).__name__}."
            )
        _check_positive(
            step_size=step_size,
            trajectory_length=trajectory_length,
            num_steps=num_steps,
            max_num_steps=max_num_steps,
            num_inner_steps=num_inner_steps,
            constraint_tol=constraint_tol,
            max_projection_iters=max_projection_iters,
        )
        _check_choice("projection", projection, tuple(_PROJECTORS))
        _check_choice("jacobian_mode", jacobian_mode, _JACOBIAN_MODES)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter}.")
        if not 0 < target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must lie in (0, 1), got {target_accept_prob}.")
        self.model = model
        self.step_size = step_size
        self.num_steps = num_steps
        self.trajectory_length = math.pi / 2 if trajectory_length is None else trajectory_length
        self.jitter = jitter
        self.max_num_steps = max_num_steps
        self.num_inner_steps = num_inner_steps
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix
        self.target_accept_prob = target_accept_prob
        self.projection = projection
        self.use_fallback = use_fallback
        self.constraint_tol = constraint_tol
        self.max_projection_iters = max_projection_iters
        self.init_strategy = init_strategy
        self.jacobian_mode = jacobian_mode
        self.compile = compile
        self._clear()

    # -- the protocol of pyro.infer.mcmc ------------------------------------------------------

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """
        Read the model, build its constrained system and put every chain on the manifold.

        :param int warmup_steps: draws to adapt in.
        """
        preset = self._preset
        self._clear()
        self._preset = preset
        self._warmup_steps = warmup_steps
        with torch.no_grad():
            self._start(ConstrainedModel(self.model, args, kwargs))

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """
        Where the chains are, in the model's own coordinates.

        Set before a run, these values (of all or some latent sites) replace draws from
        ``init_strategy``; inputs that do not reproduce the outputs are moved to the nearest that
        do.
        """
        return dict(self._params)

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor]) -> None:
        self._preset = dict(params)

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Draw once from every chain.

        :param params: ignored; the chains' state is kept by the kernel.
        :returns: values of the latent sites, in the model's own coordinates.
        """
        chains = self._chains
        is_warmup = chains.iteration < self._warmup_steps
        shortening = self._shortening(chains) if is_warmup else 1.0
        step_size, num_steps = self._trajectory(chains.step_size)
        step_size *= shortening
        settings = self._settings(with_fallback=self.use_fallback and not is_warmup)
        with torch.no_grad():
            point, info = hmc_transition(
                self._system, chains.scale, settings, chains.point, chains.residual,
                step_size, num_steps,
            )  # fmt: skip
            chains = chains._replace(
                point=point,
                residual=info.constraint_residual,
                # an acceptance after many rejections does not yet end a chain's troubles
                rejections=torch.where(
                    info.is_accepted, chains.rejections // 2, chains.rejections + 1
                ),
                iteration=chains.iteration + 1,
            )
            is_adapting = is_warmup and shortening == 1.0
            self._chains = self._adapt(chains, info) if is_adapting else chains
            self._params = self._to_params(self._chains)
        self._show(info)
        if not is_warmup:
            self._record.append(info, step_size)
        return dict(self._params)

    def logging(self) -> OrderedDict[str, str]:
        """Step size, mean acceptance probability and share of failures so far."""
        return OrderedDict(
            [
                ("step size", f"{self._chains.step_size:.2e}"),
                ("acc. prob", f"{self._mean_accept_prob:.3f}"),
                ("failed", f"{self._mean_failures:.1%}"),
            ]
        )

    def diagnostics(self) -> dict[str, Any]:
        """Per-draw statistics of a single chain; see :meth:`chain_diagnostics`."""
        records = self.chain_diagnostics()
        return records[0] if records else {"divergences": [], "acceptance rate": float("nan")}

    def chain_diagnostics(self) -> list[dict[str, Any]]:
        """
        Statistics of every chain.

        One dictionary per chain: ``acceptance rate``, indices of ``divergences``, ``failed
        projections`` and ``non-reversible`` draws, and per draw ``accept_prob``,
        ``is_accepted``, ``num_steps``, ``projection_iterations``, ``constraint_residual``,
        ``status`` (:class:`~pyro_ext.infer.constrained_hmc.Status`), ``energy``, ``step_size``.
        """
        return self._record.per_chain()

    def summary(self) -> str:
        """One line about the run so far."""
        return self._record.summary()

    def cleanup(self) -> None:
        """Warn of what went wrong in the run; later calls do nothing."""
        self._preset = {}
        if not self._is_finished:
            self._is_finished = True
            for message in self._record.complaints():
                warnings.warn(message, SamplingWarning, stacklevel=2)

    def required_bytes(self, num_samples: int) -> int:
        """Least memory that a run needs once it is set up: draws, Jacobians and their factors."""
        structure = self._model.structure
        num_chains = len(self._chains.residual)
        matrix = structure.dim * structure.num_constraints
        gram = structure.num_constraints**2
        values = num_chains * (num_samples * structure.dim + 6 * matrix + 2 * gram)
        return values * torch.finfo(structure.dtype).bits // 8

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings and the model, not the state of a run."""
        clean = type(self).__new__(type(self))
        clean.__dict__.update(self.__dict__)
        clean._clear()
        clean._preset = self._preset
        return clean.__dict__

    # -- one run ------------------------------------------------------------------------------

    def _clear(self) -> None:
        """Forget everything about earlier runs."""
        self._preset, self._params = {}, {}
        self._record = RunRecord()
        self._warmup_steps = self._num_shown = 0
        self._mean_accept_prob = self._mean_failures = 0.0
        self._is_finished = False
        for name in ("_model", "_system", "_chains"):
            self.__dict__.pop(name, None)

    def _start(self, model: ConstrainedModel) -> None:
        structure = model.structure
        if structure.dtype != torch.float64:
            warnings.warn(
                f"The model runs in {structure.dtype}, so that outputs are matched only to about "
                f"{torch.finfo(structure.dtype).eps ** 0.575:.0e} and ill-conditioned models "
                "fail. Use float64: torch.set_default_dtype(torch.float64) before the model runs.",
                PrecisionWarning,
                stacklevel=4,
            )
        system = build_system(model, self.num_chains or 1, self.jacobian_mode)
        self._model = model
        self._tolerances = default_tolerances(
            model, self.constraint_tol, self.max_projection_iters
        )
        values = values_per_chain(self._preset, self.num_chains)
        one = torch.ones(structure.dim, dtype=structure.dtype, device=structure.device)
        position = initial_positions(model, system, self._tolerances, self.init_strategy, values)
        self._system = CompiledSystem(system, len(position)) if self.compile else system
        residual = system.constraint(position, one).abs().amax(-1)
        self._chains = _Chains(
            point=self._system.point(position, one),
            residual=residual,
            scale=one,
            step_size=self.step_size,
            averaging=dual_averaging_init(self.step_size, shrinkage=1.0),
            variance=running_variance_init(structure.dim, position),
            rejections=torch.zeros(len(position), dtype=torch.long, device=position.device),
            iteration=0,
        )
        if self.adapt_step_size and self._warmup_steps > 0:
            self._chains = self._restart_step_size(self._chains)
        self._params = self._to_params(self._chains)

    def _trajectory(self, step_size: float) -> tuple[float, int]:
        """Step size and number of steps of the next trajectory, with jitter."""
        length = self.trajectory_length if self.num_steps is None else self.num_steps * step_size
        most = self.max_num_steps if self.num_steps is None else 2 * self.num_steps
        length *= 1 + self.jitter * (2 * float(torch.rand(())) - 1)
        # one step less where the last would be shorter than rounding
        num_steps = min(max(1, math.ceil(length / step_size - 1e-9)), most)
        return min(length / num_steps, step_size), num_steps

    def _shortening(self, chains: _Chains) -> float:
        """
        Factor on the step size of every other trajectory of warm-up while some chain is stuck.

        A chain that starts far out, where the constraint curves more than elsewhere, may reject
        every step that suits the others; shorter and shorter ones lead it back.
        """
        worst = int(chains.rejections.max())
        is_last = chains.iteration == self._warmup_steps - 1
        if worst < _RESCUE_AFTER or chains.iteration % 2 == 0 or is_last:
            return 1.0
        return 0.5 ** min(worst - _RESCUE_AFTER + 1, 10)

    def _settings(self, *, with_fallback: bool) -> IntegratorSettings:
        return IntegratorSettings(
            projector=_PROJECTORS[self.projection],
            fallback=hybrid if with_fallback else None,
            tolerances=self._tolerances,
            num_inner_steps=self.num_inner_steps,
        )

    def _restart_step_size(self, chains: _Chains) -> _Chains:
        settings = self._settings(with_fallback=False)

        def accept_prob(step_size: float) -> float:
            _, info = hmc_transition(
                self._system, chains.scale, settings, chains.point, chains.residual, step_size, 1
            )
            return _adaptation_statistic(info, chains.rejections)

        step_size = find_reasonable_step_size(
            accept_prob, chains.step_size, self.target_accept_prob
        )
        return chains._replace(
            step_size=step_size, averaging=dual_averaging_init(step_size, shrinkage=1.0)
        )

    def _adapt(self, chains: _Chains, info: TransitionInfo) -> _Chains:
        is_last = chains.iteration == self._warmup_steps
        if self.adapt_step_size:
            averaging = dual_averaging_update(
                chains.averaging,
                _adaptation_statistic(info, chains.rejections),
                self.target_accept_prob,
                # the mean over many chains is less noisy than one chain's probability, for which
                # 0.05 is right, and would make the step size swing by factors of ten
                gamma=0.05 * math.sqrt(min(len(chains.rejections), 16)),
            )
            final = dual_averaging_final(averaging)
            step_size = final if is_last else math.exp(averaging.log_step_size)
            chains = chains._replace(averaging=averaging, step_size=step_size)
        return self._adapt_scale(chains) if self.adapt_mass_matrix else chains

    def _adapt_scale(self, chains: _Chains) -> _Chains:
        ends = window_ends(self._warmup_steps)
        if not ends or not ends[0] <= chains.iteration <= ends[-1]:
            return chains
        inputs = chains.point.position * chains.scale
        variance = running_variance_update(chains.variance, inputs)
        chains = chains._replace(variance=variance)
        if chains.iteration not in ends[1:]:
            return chains
        scale = input_scale(variance)
        chains = chains._replace(
            point=self._system.point(inputs / scale, scale),
            scale=scale,
            variance=running_variance_init(len(scale), scale),
        )
        return self._restart_step_size(chains) if self.adapt_step_size else chains

    def _to_params(self, chains: _Chains) -> dict[str, Tensor]:
        inputs = chains.point.position * chains.scale
        if self.num_chains is None:
            return self._model.values(inputs[0])
        if not self._system.is_vectorized:
            rows = [self._model.values(row) for row in inputs]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        values: dict[str, Tensor] = vmap(self._model.values)(inputs)
        return values

    def _show(self, info: TransitionInfo) -> None:
        """Running means for the progress bar, started anew after warm-up."""
        if self._chains.iteration in (1, self._warmup_steps + 1):
            self._num_shown = 0
        self._num_shown += 1
        weight = 1 / self._num_shown
        accept_prob = float(info.accept_prob.mean())
        failures = float((info.status != Status.CONVERGED).double().mean())
        self._mean_accept_prob += weight * (accept_prob - self._mean_accept_prob)
        self._mean_failures += weight * (failures - self._mean_failures)


def _adaptation_statistic(info: TransitionInfo, rejections: Tensor) -> float:
    """
    Mean acceptance probability, in which a failed trajectory counts as four rejections.

    On a target whose energy hardly changes (the uniform one on a sphere) the step size would
    otherwise grow until failed projections alone bring the acceptance down to its target.
    Never below zero: one step that is too long must not shrink the next by orders of magnitude.
    Chains that do not move are left out while others do: the others should not pay for them.
    """
    is_stuck = rejections >= _STUCK_AFTER
    counts = ~is_stuck if bool((~is_stuck).any()) else is_stuck
    failed = (info.status != Status.CONVERGED).to(info.accept_prob)
    return max(0.0, float((info.accept_prob - 3 * failed)[counts].mean()))


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
