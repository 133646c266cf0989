"""The MCMC kernel whose trajectories end where they turn back: NUTS on a manifold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide.initialization import init_to_sample

from .integrator import IntegratorSettings
from .kernel import ConstrainedKernel, Draw, check_positive
from .no_u_turn import no_u_turn_transition
from .records import RunRecord
from .warmup import Chains, adaptation_statistic

__all__ = ["ConstrainedNUTS"]

_RESCUE_DEPTH = 3


class ConstrainedNUTS(ConstrainedKernel):
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
            compile=compile,
        )
        check_positive(max_tree_depth=max_tree_depth)
        self.max_tree_depth = max_tree_depth

    @classmethod
    def _new_record(cls) -> RunRecord:
        return RunRecord("ConstrainedNUTS")

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
