"""Calibration of the mixture: quantities without names, draws from one population or many."""

from __future__ import annotations

import pytest
import torch

from benchmarks import _apg_calibration as apg_calibration
from tests.tutorials.conftest import load_siblings

MODEL, TRAIN = load_siblings("apg_mixture", "model", "train")


def test_quantities_do_not_know_names_of_clusters() -> None:
    x, latents = MODEL.simulate(6, 20)
    names = torch.tensor([2, 0, 1])
    renamed = {
        "cluster": latents["cluster"][:, names],
        "assignment": names.argsort()[latents["assignment"]],
    }
    before, after = (apg_calibration.quantities(MODEL, x, z) for z in (latents, renamed))
    torch.testing.assert_close(after, before)
    assert all(value.shape == (6,) for value in before.values())
    assert before["largest cluster"].max() <= 20


@pytest.mark.parametrize("is_one_population", [True, False])
def test_draws_belong_to_their_data(is_one_population: bool) -> None:
    """Exact updates follow the points, which are far away in all data sets but the first."""
    x, _ = MODEL.simulate(4, 12)
    x = x + 100 * torch.arange(4)[:, None, None]
    sampler = TRAIN.make_sampler(MODEL.ExactProposals())
    *_, drawn = apg_calibration.draws(sampler, x, is_one_population, 4)
    assert drawn["assignment"].shape == (apg_calibration.NUM_DRAWS, 4, 12)
    assert drawn["cluster"].shape == (apg_calibration.NUM_DRAWS, 4, 3, 2, 2)
    weights = MODEL.one_hot(drawn["assignment"]).to(x).sum(-2, keepdim=True).mT
    mean = (weights * drawn["cluster"][..., 0]).sum(-2) / 12
    assert ((mean - x.mean(-2)).abs() < 30).all()


def test_table_has_a_row_for_every_choice() -> None:
    samplers = {"exact": TRAIN.make_sampler(MODEL.ExactProposals())}
    rows = apg_calibration.calibration(MODEL, samplers, 20, (1, 2))
    assert [row["sweeps K"] for row in rows] == ["1", "2", "1", "2"]
    assert all(0 <= float(row["p-value"]) <= 1 for row in rows)
