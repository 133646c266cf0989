"""The MCMC kernel with trajectories of one length: constrained HMC as Pyro users type it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide.initialization import init_to_sample

from .dynamics.integrator import IntegratorSettings
from .dynamics.transitions import hmc_transition
from .kernel import ConstrainedKernel, Draw, check_count, check_positive
from .records import RunRecord
from .warmup.adaptation import dual_averaging_final
from .warmup.chains import Chains, adaptation_statistic
from .warmup.trajectory_length import (
    LengthAdaptation,
    Trajectories,
    freeze_length,
    jitter_factor,
    length_adaptation_init,
    length_adaptation_update,
    plan_trajectory,
)

__all__ = ["ConstrainedHMC"]

_QUARTER_TURN = math.pi / 2
# where the adaptation of the length starts: most time, and steps, which may be twice too long
_LONGEST_START = 1.0
_FIRST_STEPS = 0.5


class ConstrainedHMC(ConstrainedKernel):
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
    :param trajectory_length: integration time of a trajectory. With ``"adapt"`` warm-up finds the
        one that changes inputs and their squares most for its cost, over all chains: the ChEES
        criterion of Hoffman, Radul and Sountsov (2021), per input and per step, with the
        expected squared jump. Without warm-up it is :math:`\pi/2`, a quarter turn of a
        standard normal. Ignored when ``num_steps`` is given.
    :param float jitter: every trajectory's length is multiplied by a factor in
        ``[1 - jitter, 1 + jitter]``, shared by the chains, against resonances; the factors are
        Halton's sequence, which fills the interval evenly. The step used is shortened to divide
        the length evenly, never lengthened.
    :param int max_num_steps: most steps of a trajectory whose length is given as time.
    :param int num_inner_steps: geodesic steps per integrator step (:math:`N_i` in algorithm 1).
    :param bool adapt_step_size: adapt the step size during warm-up, by dual averaging of the
        acceptance probability over all chains.
    :param bool adapt_mass_matrix: scale inputs so that they vary as much as their momenta do, as
        measured during warm-up (a diagonal mass matrix).
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
    :param str structure: what to make use of in the Jacobian of the outputs. ``"elementwise"``:
        local blocks, inputs that act on few outputs each, beside global inputs that act on all,
        at a cost per step linear in the number of outputs; ``"autoregressive"``: noise of a
        series that acts on what follows it; ``"dense"``: nothing; ``"auto"`` looks at the
        Jacobian, and takes what is found if it is clearly cheaper.
        ``diagnostics()["structure"]`` says what that is.
    :param int structure_check_interval: integrator steps between two checks that the structure
        holds where the chains go. Where it does not the kernel warns, and goes on with dense
        Jacobians.
    :param bool compile: record the model once and compile it to native code with
        :func:`torch.compile`; pays off in long runs.
    :raises ValueError: for arguments out of range, and when a run starts, if the model cannot be
        sampled exactly; the message names the site and the cure.

    **References**

    Matthew M. Graham and Amos J. Storkey (2017), *Asymptotically exact inference in
    differentiable generative models*, AISTATS, arXiv:1605.07826.

    Matthew D. Hoffman, Alexey Radul and Pavel Sountsov (2021), *An adaptive-MCMC scheme for
    setting trajectory lengths in Hamiltonian Monte Carlo*, AISTATS.

    Pavel Sountsov and Matthew D. Hoffman (2021), *Focusing on difficult directions for learning
    HMC trajectory lengths*.

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

    _points_at_once = 3

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float = 0.5,
        num_steps: int | None = None,
        trajectory_length: float | str = "adapt",
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
        structure: str = "auto",
        structure_check_interval: int = 10,
        compile: bool = False,
    ) -> None:
        super().__init__(
            model,
            step_size=step_size,
            num_inner_steps=num_inner_steps,
            adapt_step_size=adapt_step_size,
            adapt_mass_matrix=adapt_mass_matrix,
            target_accept_prob=target_accept_prob,
            projection=projection,
            use_fallback=use_fallback,
            constraint_tol=constraint_tol,
            max_projection_iters=max_projection_iters,
            init_strategy=init_strategy,
            jacobian_mode=jacobian_mode,
            structure=structure,
            structure_check_interval=structure_check_interval,
            compile=compile,
        )
        if isinstance(trajectory_length, str) and trajectory_length != "adapt":
            raise ValueError(
                f"trajectory_length must be a number or 'adapt', got {trajectory_length!r}."
            )
        length = _QUARTER_TURN if isinstance(trajectory_length, str) else trajectory_length
        check_positive(trajectory_length=length)
        check_count(num_steps=num_steps, max_num_steps=max_num_steps)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter}.")
        self.num_steps = num_steps
        self.trajectory_length = trajectory_length
        self.jitter = jitter
        self.max_num_steps = max_num_steps

    def _new_record(self) -> RunRecord:
        return RunRecord("ConstrainedHMC")

    def _complaints(self) -> list[str]:
        chains = getattr(self, "_chains", None)
        if chains is None or chains.length is None:
            return []
        length, longest = math.exp(chains.length.log_length), self._longest(chains)
        if length < 0.8 * longest:  # the average lags behind what it is of
            return []
        return [
            f"Trajectories as long as {longest:.3g}, which take max_num_steps="
            f"{self.max_num_steps} steps, would still gain from more. Raise max_num_steps, or "
            "bring the inputs to one scale by adapt_mass_matrix=True or in the model."
        ]

    def _draw(
        self, chains: Chains, settings: IntegratorSettings, rescue: float, *, is_adapting: bool
    ) -> Draw:
        is_adapted = self.trajectory_length == "adapt" and self.num_steps is None
        if is_adapted and chains.length is None and self._warmup_steps > 0:
            inputs = chains.point.position * chains.scale
            start = min(_LONGEST_START, _FIRST_STEPS * chains.step_size)
            chains = chains._replace(length=length_adaptation_init(start, inputs))
        step_size, num_steps = self._trajectory(chains)
        step_size *= rescue
        point, info, end = hmc_transition(
            self._system, chains.scale, settings, chains.point, chains.residual,
            step_size, num_steps,
        )  # fmt: skip
        if is_adapting and chains.length is not None:
            trajectories = Trajectories(
                start=chains.point.position,
                end=end.point.position,
                momentum=end.momentum,
                accept_prob=info.accept_prob,
                length=step_size * num_steps,
            )
            chains = chains._replace(
                length=self._adapt_length(chains, chains.length, trajectories)
            )
        return Draw(
            chains=chains._replace(point=point),
            info=info,
            accept_statistic=adaptation_statistic(info, chains.rejections),
            statistics={"step_size": step_size, "trajectory_length": step_size * num_steps},
        )

    def _adapt_length(
        self, chains: Chains, length: LengthAdaptation, trajectories: Trajectories
    ) -> LengthAdaptation:
        # steps are shortened to trajectories shorter than they are: without a bound all would be
        # accepted, and the step size grow for ever; averaged, because of the long ones it tries
        step_size = dual_averaging_final(chains.averaging)
        longest = max(_FIRST_STEPS * step_size, self._longest(chains))
        length = length_adaptation_update(length, trajectories, chains.scale, step_size, longest)
        is_last = chains.iteration == self._warmup_steps - 1
        return freeze_length(length) if is_last else length

    def _longest(self, chains: Chains) -> float:
        """Length whose longest jittered trajectory still takes no more than the most steps."""
        return chains.step_size * self.max_num_steps / (1 + self.jitter)

    def _trajectory(self, chains: Chains) -> tuple[float, int]:
        """Step size and number of steps of the next trajectory, with jitter."""
        length, most = _QUARTER_TURN, self.max_num_steps
        if self.num_steps is not None:
            length, most = self.num_steps * chains.step_size, 2 * self.num_steps
        elif chains.length is not None:
            length = math.exp(chains.length.log_length)
        elif isinstance(self.trajectory_length, int | float):
            length = self.trajectory_length
        factor = jitter_factor(self.jitter, chains.iteration)
        return plan_trajectory(length * factor, chains.step_size, most)
