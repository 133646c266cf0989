"""Statistics of a run, by chain and by draw, and what they say about it."""

import math

import pytest
import torch

from pyro_ext.infer.constrained_hmc.dynamics.status import Status
from pyro_ext.infer.constrained_hmc.dynamics.transitions import TransitionInfo
from pyro_ext.infer.constrained_hmc.records import RunRecord


def record(status: torch.Tensor, accepted: torch.Tensor | None = None) -> RunRecord:
    """A run with given ``(chains, draws)`` statuses."""
    accepted = status == Status.CONVERGED if accepted is None else accepted
    run = RunRecord("ConstrainedHMC")
    for i in range(status.shape[1]):
        number = torch.full_like(status[:, i], i)
        run.append(
            TransitionInfo(
                accept_prob=accepted[:, i].double(),
                is_accepted=accepted[:, i],
                status=status[:, i],
                num_steps=number + 1,
                projection_iterations=10 * (number + 1),
                constraint_residual=1e-12 * (number + 1.0),
                energy=number + torch.arange(len(status)) * 100.0,
            ),
            {
                "step_size": 0.1 * (i + 1),
                "trajectory_length": 1.5,
                "tree_depth": number + torch.arange(len(status)),
            },
        )
    return run


def test_statistics_are_stacked_by_chain() -> None:
    status = torch.tensor([[0, 1, 0, 3], [2, 0, 0, 3]])
    run = record(status)
    assert len(run) == 4
    stats = run.stacked()
    assert torch.equal(stats["status"], status)
    torch.testing.assert_close(stats["energy"][1], torch.tensor([100.0, 101.0, 102.0, 103.0]))
    torch.testing.assert_close(stats["step_size"], torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2))
    assert stats["tree_depth"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    first, second = run.per_chain()
    assert first["failed projections"] == [1]
    assert first["divergences"] == [3]
    assert first["non-reversible"] == []
    assert second["non-reversible"] == [0]
    assert second["divergences"] == [3]
    assert first["acceptance rate"] == 0.5
    assert torch.equal(second["num_steps"], torch.tensor([1, 2, 3, 4]))
    # one chain's numbers can be changed without the other's
    first["step_size"][0] = -1.0
    assert second["step_size"][0] == 0.1


def test_an_empty_run() -> None:
    run = RunRecord("ConstrainedNUTS")
    assert len(run) == 0
    assert run.stacked() == {}
    assert run.per_chain() == []
    assert run.complaints() == []
    assert run.summary() == "ConstrainedNUTS: no draws."


def test_the_summary_is_one_line_with_the_numbers() -> None:
    summary = record(torch.tensor([[0, 1, 0, 3], [2, 0, 0, 3]])).summary()
    assert "\n" not in summary
    for text in [
        "ConstrainedHMC: 2 chains x 4 draws", "acceptance 0.50",
        "trajectory length 1.5", "2.5 steps per draw",
        "10.0 constraint evaluations per step", "largest residual 4.0e-12",
        "12.5% not converged", "12.5% non-reversible", "25.0% divergent",
    ]:  # fmt: skip
        assert text in summary, summary
    assert "1 chain x" in record(torch.zeros(1, 2, dtype=torch.long)).summary()


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (Status.NOT_CONVERGED, r"did not converge.*projection='newton'"),
        (Status.NON_REVERSIBLE, r"not reversible.*float64"),
        (Status.DIVERGENT, r"diverged.*log coordinates"),
    ],
    ids=lambda v: v.name if isinstance(v, Status) else "",
)
def test_many_failures_are_complained_about_with_the_cure(code: Status, cure: str) -> None:
    import re

    status = torch.zeros(2, 50, dtype=torch.long)
    status[:, :6] = int(code)
    (message,) = record(status).complaints()
    assert message.startswith("12% of the trajectories failed")
    assert re.search(cure, message), message
    status[:, 5:] = 0  # 10% is the most that passes in silence
    assert record(status).complaints() == []


def test_the_most_frequent_failure_decides_the_cure() -> None:
    status = torch.full((1, 50), int(Status.DIVERGENT))
    status[:, :20] = int(Status.NOT_CONVERGED)
    accepted = torch.zeros(1, 50, dtype=torch.bool)
    accepted[:, 0] = True
    (message,) = record(status, accepted).complaints()
    assert "most diverged" in message


def test_chains_that_never_move_are_named() -> None:
    status = torch.zeros(4, 20, dtype=torch.long)
    accepted = torch.ones(4, 20, dtype=torch.bool)
    accepted[[1, 3]] = False
    (message,) = record(status, accepted).complaints()
    assert message.startswith("Chains [1, 3] did not move once")
    # a few draws prove nothing
    assert record(status[:, :5], accepted[:, :5]).complaints() == []


def test_numbers_are_finite_where_nothing_failed() -> None:
    run = record(torch.zeros(3, 4, dtype=torch.long))
    assert all(math.isfinite(chain["acceptance rate"]) for chain in run.per_chain())
    assert run.complaints() == []
