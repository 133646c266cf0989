"""Per-draw statistics of a run and what they say about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dynamics.status import Status
from .dynamics.transitions import TransitionInfo

__all__ = ["RunRecord"]

_FAILURE_SHARE = 0.1


class RunRecord:
    """
    Collects the statistics of every draw after warm-up.

    :param str kernel: name of the kernel, for the summary.
    :param str failure: what a failed step does to a trajectory, for the summary.
    """

    def __init__(self, kernel: str, failure: str = "rejected") -> None:
        self._kernel = kernel
        self._failure = failure
        self._infos: list[TransitionInfo] = []
        self._statistics: list[dict[str, float | Tensor]] = []

    def append(self, info: TransitionInfo, statistics: dict[str, float | Tensor]) -> None:
        """Add one draw of every chain; more statistics are numbers or of shape ``(chains,)``."""
        self._infos.append(info)
        self._statistics.append(statistics)

    def __len__(self) -> int:
        return len(self._infos)

    def stacked(self) -> dict[str, Tensor]:
        """All statistics as ``(chains, draws)`` tensors."""
        if not self._infos:
            return {}
        stats = {
            name: torch.stack([getattr(info, name) for info in self._infos], dim=1).cpu()
            for name in TransitionInfo._fields
        }
        like = stats["energy"]
        for name in self._statistics[0]:
            values = [torch.as_tensor(s[name]).cpu() for s in self._statistics]
            stacked = torch.stack([value.expand(len(like)) for value in values], dim=1)
            stats[name] = stacked.to(like.dtype) if stacked.is_floating_point() else stacked
        return stats

    def per_chain(self) -> list[dict[str, Any]]:
        """What ``MCMC.diagnostics()`` shows of each chain, in Pyro's names where it has them."""
        stats = self.stacked()
        num_chains = len(stats["status"]) if stats else 0
        return [
            {
                "acceptance rate": float(stats["is_accepted"][i].double().mean()),
                "divergences": _indices(stats["status"][i] == Status.DIVERGENT),
                "failed projections": _indices(stats["status"][i] == Status.NOT_CONVERGED),
                "non-reversible": _indices(stats["status"][i] == Status.NON_REVERSIBLE),
                **{name: value[i] for name, value in stats.items()},
            }
            for i in range(num_chains)
        ]

    def summary(self) -> str:
        """One line about the run."""
        stats = self.stacked()
        if not stats:
            return f"{self._kernel}: no draws."
        chains, draws = stats["status"].shape
        steps = int(stats["num_steps"].sum())
        per_step = float(stats["projection_iterations"].sum()) / max(steps, 1)
        shares = [_percent(stats["status"] == status) for status in Status if status != 0]
        return (
            f"{self._kernel}: {chains} chain{'s' * (chains != 1)} x {draws} draws, "
            f"acceptance {float(stats['accept_prob'].mean()):.2f}, "
            f"step size {float(stats['step_size'].max()):.3g}, "
            f"trajectory length {float(stats['trajectory_length'].mean()):.3g}, "
            f"{steps / (chains * draws):.1f} steps per draw, "
            f"{per_step:.1f} constraint evaluations per step, "
            f"largest residual {float(stats['constraint_residual'].max()):.1e}; "
            f"{self._failure}: {shares[0]} not converged, {shares[1]} non-reversible, "
            f"{shares[2]} divergent."
        )

    def complaints(self) -> list[str]:
        """What deserves a warning, each with its likely cause and cure."""
        stats = self.stacked()
        if not stats:
            return []
        messages = []
        failed = stats["status"] != Status.CONVERGED
        share = float(failed.double().mean())
        if share > _FAILURE_SHARE:
            messages.append(f"{share:.0%} of the trajectories failed: {_cure(stats['status'])}")
        stuck = (~stats["is_accepted"]).all(1).nonzero().squeeze(-1).tolist()
        if stuck and stats["status"].shape[1] >= 10:
            messages.append(
                f"Chains {stuck} did not move once. Leave them out of the results, and start them "
                "elsewhere: another seed, init_strategy, or more warm-up steps."
            )
        return messages


def _cure(status: Tensor) -> str:
    counts = {code: int((status == code).sum()) for code in Status if code != 0}
    worst = max(counts, key=lambda code: counts[code])
    return {
        Status.NOT_CONVERGED: (
            "most projections did not converge. The constraint curves strongly within one step: "
            "raise target_accept_prob (lower step_size if it is not adapted) or num_inner_steps, "
            "or use projection='newton'."
        ),
        Status.NON_REVERSIBLE: (
            "most were not reversible. Steps jump to another sheet of the manifold, or "
            "rounding limits the projection: raise target_accept_prob or num_inner_steps, or use "
            "float64."
        ),
        Status.DIVERGENT: (
            "most diverged. The energy changes too fast within one step, or outputs become "
            "dependent: raise target_accept_prob, or write scales of the model in log "
            "coordinates."
        ),
    }[worst]


def _indices(mask: Tensor) -> list[int]:
    indices: list[int] = mask.nonzero().squeeze(-1).tolist()
    return indices


def _percent(mask: Tensor) -> str:
    return f"{float(mask.double().mean()):.1%}"
