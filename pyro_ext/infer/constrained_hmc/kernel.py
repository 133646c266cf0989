"""What the MCMC kernels on manifolds share: the protocol of Pyro's kernels, and one run."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from ...errors import PrecisionWarning, SamplingWarning
from ..vectorized import VectorizedKernel
from .assembly import (
    STRUCTURES,
    Preferences,
    assemble,
    default_tolerances,
    guarded_system,
    recorded_values,
    settle,
)
from .dynamics.integrator import IntegratorSettings
from .dynamics.projection import Projector, Tolerances, hybrid, newton, quasi_newton
from .dynamics.status import Status
from .dynamics.transitions import TransitionInfo
from .guard import GuardedSystem
from .model.constrained_model import ConstrainedModel
from .records import RunRecord
from .start import initial_positions, values_per_chain
from .warmup.adaptation import dual_averaging_init, running_variance_init
from .warmup.chains import Chains, WarmupSettings, adapt, rescue_factor, restart_step_size

__all__ = ["ConstrainedKernel", "Draw", "check_count", "check_positive"]

_PROJECTORS: dict[str, Projector] = {"quasi-newton": quasi_newton, "newton": newton}
_SMALL_STEP = 1e-5  # prior standard deviations
_JACOBIAN_MODES = ("auto", "forward", "reverse")


class Draw(NamedTuple):
    """One draw of every chain."""

    chains: Chains  # with the new points
    info: TransitionInfo
    accept_statistic: float  # what the step size adapts to
    statistics: dict[str, float | Tensor]  # to be recorded beside ``info``


class ConstrainedKernel(VectorizedKernel):
    """
    An MCMC kernel on the manifold of inputs that reproduce the observed outputs.

    Subclasses say what a trajectory is, in :meth:`_draw`. The arguments mean what they do in
    :class:`~pyro_ext.infer.ConstrainedHMC`.
    """

    _points_at_once: int
    """How many points per chain, with their Jacobians, a subclass holds in memory."""

    # state of a run, set by setup()
    _model: ConstrainedModel
    _values: Callable[[Tensor], dict[str, Tensor]]  # of latent sites, at one input
    _system: GuardedSystem
    _tolerances: Tolerances
    _chains: Chains
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
        step_size: float,
        num_inner_steps: int,
        adapt_step_size: bool,
        adapt_mass_matrix: bool,
        target_accept_prob: float,
        projection: str,
        use_fallback: bool,
        constraint_tol: float | None,
        max_projection_iters: int,
        init_strategy: Callable[..., Any],
        jacobian_mode: str,
        structure: str,
        structure_check_interval: int,
        compile: bool,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(
                f"model must be a function with pyro.sample sites, got {type(model).__name__}."
            )
        check_positive(step_size=step_size, constraint_tol=constraint_tol)
        check_count(
            num_inner_steps=num_inner_steps,
            max_projection_iters=max_projection_iters,
            structure_check_interval=structure_check_interval,
        )
        if not callable(init_strategy):
            raise TypeError(
                "init_strategy must be a function such as init_to_sample or "
                f"init_to_value(values={{...}}), got {type(init_strategy).__name__}."
            )
        _check_choice("projection", projection, tuple(_PROJECTORS))
        _check_choice("jacobian_mode", jacobian_mode, _JACOBIAN_MODES)
        _check_choice("structure", structure, STRUCTURES)
        if not 0 < target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must lie in (0, 1), got {target_accept_prob}.")
        self.model = model
        self.step_size = step_size
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
        self.structure = structure
        self.structure_check_interval = structure_check_interval
        self.compile = compile
        self._clear()

    @abstractmethod
    def _draw(
        self, chains: Chains, settings: IntegratorSettings, rescue: float, *, is_adapting: bool
    ) -> Draw:
        """
        Draw once from every chain.

        :param chains: where they are.
        :param settings: how to integrate.
        :param float rescue: factor on the step size, less than one while a chain is stuck.
        :param bool is_adapting: whether to learn from the draw what is special to the subclass.
        """

    @abstractmethod
    def _new_record(self) -> RunRecord:
        """An empty record of a run."""

    @abstractmethod
    def _complaints(self) -> list[str]:
        """What deserves a warning after a run, special to the subclass."""

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
        rescue = rescue_factor(chains, self._warmup_steps) if is_warmup else 1.0
        is_adapting = is_warmup and rescue == 1.0
        settings = self._settings(with_fallback=self.use_fallback and not is_warmup)
        with torch.no_grad():
            draw = self._draw(chains, settings, rescue, is_adapting=is_adapting)
            info, rejections = draw.info, chains.rejections
            chains = draw.chains._replace(
                residual=info.constraint_residual,
                # an acceptance after many rejections does not yet end a chain's troubles
                rejections=torch.where(info.is_accepted, rejections // 2, rejections + 1),
                iteration=chains.iteration + 1,
            )
            if is_adapting:
                warmup = self._warmup_settings()
                chains = adapt(self._system, settings, warmup, chains, draw.accept_statistic)
            point = self._system.review(chains.point, chains.scale)
            self._chains = chains = chains._replace(point=point)
            self._params = self._to_params(chains)
        self._show(info)
        if not is_warmup:
            self._record.append(info, draw.statistics)
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
        ``status`` (:class:`~pyro_ext.infer.constrained_hmc.Status`), ``energy``, ``step_size``,
        ``trajectory_length``, and ``tree_depth`` where trajectories double; ``structure`` says
        how Jacobians were computed.
        """
        report = self._system.report if hasattr(self, "_system") else ""
        return [{**chain, "structure": report} for chain in self._record.per_chain()]

    def summary(self) -> str:
        """One line about the run so far."""
        report = f" Jacobian: {self._system.report}." if hasattr(self, "_system") else ""
        return self._record.summary() + report

    def cleanup(self) -> None:
        """Warn of what went wrong in the run; later calls do nothing."""
        self._preset = {}
        if not self._is_finished:
            self._is_finished = True
            messages = self._record.complaints() + self._step_size_complaints()
            for message in messages + self._complaints():
                warnings.warn(message, SamplingWarning, stacklevel=2)

    def required_bytes(self, num_samples: int) -> int:
        """Least memory that a run needs once it is set up: draws, Jacobians and their factors."""
        structure = self._model.structure
        draws = len(self._chains.residual) * num_samples * structure.dim
        parts = tree_leaves(self._chains.point.jacobian)
        point = sum(part.numel() for part in parts if isinstance(part, Tensor))
        values = draws + self._points_at_once * point
        return values * torch.finfo(structure.dtype).bits // 8

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings and the model, not the state of a run."""
        clean = type(self).__new__(type(self))
        clean.__dict__.update(self.__dict__)
        clean._clear()
        clean._preset = self._preset
        return clean.__dict__

    def _step_size_complaints(self) -> list[str]:
        is_adapted = self.adapt_step_size and self._warmup_steps > 0 and len(self._record) > 0
        if not is_adapted or self._chains.step_size > _SMALL_STEP:
            return []
        return [
            f"The step size was adapted to {self._chains.step_size:.1e} prior standard "
            "deviations, with which chains hardly move. Usual causes: a chain has started at a "
            "kink of an output (sort, median, max, abs, clamp), where no step is short enough, or "
            "inputs are known far better than their priors say. Start elsewhere (another seed, "
            "init_strategy), write outputs smoothly, or try adapt_mass_matrix=True."
        ]

    # -- one run ------------------------------------------------------------------------------

    def _clear(self) -> None:
        """Forget everything about earlier runs."""
        self._preset, self._params = {}, {}
        self._record = self._new_record()
        self._warmup_steps = self._num_shown = 0
        self._mean_accept_prob = self._mean_failures = 0.0
        self._is_finished = False
        for name in ("_model", "_values", "_system", "_chains"):
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
        preferences = Preferences(self.num_chains or 1, self.jacobian_mode, self.structure)
        assembly = assemble(model, preferences)
        self._model = model
        self._tolerances = default_tolerances(
            model, self.constraint_tol, self.max_projection_iters
        )
        values = values_per_chain(self._preset, self.num_chains)
        one = torch.ones(structure.dim, dtype=structure.dtype, device=structure.device)
        position = initial_positions(
            model, assembly.system, self._tolerances, self.init_strategy, values
        )
        assembly = settle(assembly, position, preferences)
        self._system = guarded_system(
            assembly,
            model,
            position,
            preferences,
            check_interval=self.structure_check_interval,
            compile=self.compile,
        )
        self._values = recorded_values(model, assembly.system, position[0])
        residual = assembly.system.constraint(position, one).abs().amax(-1)
        self._chains = Chains(
            point=self._system.point(position, one),
            residual=residual,
            scale=one,
            step_size=self.step_size,
            averaging=dual_averaging_init(self.step_size, shrinkage=1.0),
            variances=(running_variance_init(structure.dim, position),) * 2,
            rejections=torch.zeros(len(position), dtype=torch.long, device=position.device),
            length=None,
            iteration=0,
        )
        if self.adapt_step_size and self._warmup_steps > 0:
            self._chains = restart_step_size(
                self._system,
                self._settings(with_fallback=False),
                self.target_accept_prob,
                self._chains,
            )
        self._params = self._to_params(self._chains)

    def _settings(self, *, with_fallback: bool) -> IntegratorSettings:
        return IntegratorSettings(
            projector=_PROJECTORS[self.projection],
            fallback=hybrid if with_fallback else None,
            tolerances=self._tolerances,
            num_inner_steps=self.num_inner_steps,
        )

    def _warmup_settings(self) -> WarmupSettings:
        return WarmupSettings(
            num_steps=self._warmup_steps,
            adapt_step_size=self.adapt_step_size,
            adapt_mass_matrix=self.adapt_mass_matrix,
            target_accept_prob=self.target_accept_prob,
        )

    def _to_params(self, chains: Chains) -> dict[str, Tensor]:
        inputs = chains.point.position * chains.scale
        if chains.iteration & (chains.iteration - 1) == 0:  # 0, 1, 2, 4, 8, ...
            # a recording would not notice that the model has other sites by now; the model does
            self._model.values(inputs[0])
        if self.num_chains is None:
            return self._values(inputs[0])
        if not self._system.is_vectorized:
            rows = [self._values(row) for row in inputs]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        values: dict[str, Tensor] = vmap(self._values)(inputs)
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


def check_positive(**values: float | None) -> None:
    """Refuse arguments that are given and not positive numbers."""
    for name, value in values.items():
        is_number = isinstance(value, Real | Tensor)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def check_count(**values: Any) -> None:
    """Refuse arguments that are given and not whole numbers above zero."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, Integral) and int(value) > 0):
            raise ValueError(f"{name} must be a positive whole number, got {value!r}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
