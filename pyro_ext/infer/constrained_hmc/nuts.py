"""The MCMC kernel whose trajectories end where they turn back: NUTS on a manifold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide.initialization import init_to_sample

from .dynamics.integrator import IntegratorSettings
from .dynamics.no_u_turn import no_u_turn_transition
from .kernel import ConstrainedKernel, Draw, check_count
from .records import RunRecord
from .warmup.chains import Chains, adaptation_statistic

__all__ = ["ConstrainedNUTS"]

_RESCUE_DEPTH = 3
_TRUNCATED_SHARE = 0.1


class ConstrainedNUTS(ConstrainedKernel):
    r"""
    The no-U-turn sampler on the manifold of inputs that reproduce observed outputs.

    As :class:`~pyro_ext.infer.ConstrainedHMC`, which explains what is sampled and how, but every
    trajectory doubles until it turns back, so that every chain finds the length that suits where
    it is. The draw is chosen among all points of the trajectory by their densities (Hoffman and
    Gelman 2014; Betancourt 2017, appendix A, with the checks across sub-trees of Stan). A
    trajectory turns back when the sum of its momenta, projected onto the cotangent space at
    either end, points against the momentum there.

    Trajectories of very different lengths suit posteriors whose scale varies from place to place.
    Elsewhere ``ConstrainedHMC`` needs fewer steps for as many effective draws: a trajectory that
    turns back is about twice as long as one that decorrelates, and half of it is a way back in
    time. Vectorised chains wait for the one with the longest trajectory.

    :param model: a Pyro model with at least one conditioned deterministic site, or one
        conditioned ``pyro.sample(name, Delta(value))`` site.
    :param float step_size: integrator step; where adaptation starts when it is adapted.
    :param int max_tree_depth: most doublings; a trajectory takes at most
        ``2**max_tree_depth - 1`` steps.
    :param int num_inner_steps: geodesic steps per integrator step.
    :param bool adapt_step_size: adapt the step size during warm-up, by dual averaging over all
        chains of the acceptance probability, averaged over the steps of a trajectory.
    :param bool adapt_mass_matrix: scale inputs so that they vary as much as their momenta do, as
        measured during warm-up (a diagonal mass matrix).
    :param float target_accept_prob: acceptance probability that adaptation aims at.
    :param str projection: ``"quasi-newton"`` or ``"newton"``.
    :param bool use_fallback: try MINPACK's hybrid method on chains whose projection failed,
        after warm-up.
    :param constraint_tol: largest residual of an output, in its own units.
    :param int max_projection_iters: most iterations of one projection.
    :param init_strategy: a per-site initialisation function from
        :mod:`pyro.infer.autoguide.initialization`.
    :param str jacobian_mode: ``"forward"``, ``"reverse"`` or ``"auto"``.
    :param str structure: ``"elementwise"``, ``"autoregressive"``, ``"dense"``, or ``"auto"`` for
        what is found in the Jacobian if it is clearly cheaper.
    :param int structure_check_interval: steps between two checks that the structure holds.
    :param bool compile: compile the model to native code with :func:`torch.compile`.
    :raises ValueError: for arguments out of range, and when a run starts, if the model cannot be
        sampled exactly; the message names the site and the cure.

    **References**

    Matthew D. Hoffman and Andrew Gelman (2014), *The No-U-Turn Sampler*, JMLR 15.

    Michael Betancourt (2017), *A conceptual introduction to Hamiltonian Monte Carlo*,
    arXiv:1701.02434.

    Example::

        >>> from pyro_ext import MCMC, ConstrainedNUTS
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        ...     pyro.deterministic("radius", x.norm())
        >>> conditioned = pyro.condition(model, {"radius": torch.tensor(2.0)})
        >>> mcmc = MCMC(ConstrainedNUTS(conditioned, max_tree_depth=7), num_samples=20,
        ...             warmup_steps=20, num_chains=4, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.diagnostics()["tree_depth"]["chain 0"].shape
        torch.Size([20])
    """

    _points_at_once = 8

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float = 0.5,
        max_tree_depth: int = 10,
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
        check_count(max_tree_depth=max_tree_depth)
        self.max_tree_depth = max_tree_depth

    def _new_record(self) -> RunRecord:
        return RunRecord("ConstrainedNUTS", failure="cut short")

    def _complaints(self) -> list[str]:
        stats = self._record.stacked()
        if not stats:
            return []
        share = float((stats["tree_depth"] == self.max_tree_depth).double().mean())
        if share <= _TRUNCATED_SHARE:
            return []
        return [
            f"{share:.0%} of the trajectories reached max_tree_depth={self.max_tree_depth} before "
            "they turned back, and draws are more correlated than they need be. Bring the inputs "
            "to one scale by adapt_mass_matrix=True or in the model, or raise max_tree_depth."
        ]

    def _draw(
        self, chains: Chains, settings: IntegratorSettings, rescue: float, *, is_adapting: bool
    ) -> Draw:
        step_size = chains.step_size * rescue
        depth = self.max_tree_depth if rescue == 1.0 else min(_RESCUE_DEPTH, self.max_tree_depth)
        point, info, tree_depth = no_u_turn_transition(
            self._system, chains.scale, settings, chains.point, chains.residual, step_size, depth
        )
        return Draw(
            chains=chains._replace(point=point),
            info=info,
            # of the steps, the last alone can have failed
            accept_statistic=adaptation_statistic(info, chains.rejections, 3 / info.num_steps),
            statistics={
                "step_size": step_size,
                "tree_depth": tree_depth,
                "trajectory_length": step_size * (2**tree_depth - 1),
            },
        )
