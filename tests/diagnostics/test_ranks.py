"""Ranks and their tests: exact under the null, and the right direction otherwise."""

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyro_ext.diagnostics import calibration_of_ranks, rank_statistics


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
    st.lists(st.integers(-3, 3), min_size=1, max_size=5),
)
def test_ranks_count_what_is_below_and_some_of_what_is_equal(
    draws: list[int], truth: list[int]
) -> None:
    column = torch.tensor(draws)[:, None].expand(-1, len(truth))
    ranks = rank_statistics(torch.tensor(truth), column)
    for value, rank in zip(truth, ranks.tolist(), strict=True):
        below = sum(draw < value for draw in draws)
        assert below <= rank <= below + draws.count(value)


@pytest.mark.parametrize("num_values", [1, 2, 1000], ids=["constant", "coin", "fine"])
def test_ranks_of_draws_of_one_distribution_are_uniform(num_values: int) -> None:
    """However many ties there are."""
    values = torch.randint(num_values, (20, 8000))
    counts = torch.bincount(rank_statistics(values[0], values[1:]), minlength=20)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("num_draws", [7, 50, 63], ids=str)
def test_p_values_are_uniform_under_the_null(num_draws: int) -> None:
    """Also where ranks do not divide evenly into bins."""
    ranks = torch.randint(num_draws + 1, (300, 400))
    result = calibration_of_ranks({"z": ranks}, num_draws)
    for p_values in (result.chi_square["z"], result.kolmogorov_smirnov["z"]):
        assert p_values.shape == (400,)
        assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 1e-3


def test_p_value_of_all_together_holds_its_level() -> None:
    values = [
        calibration_of_ranks({"z": torch.randint(64, (60, 3))}, 63).p_value for _ in range(200)
    ]
    rejected = sum(value <= 0.05 for value in values)
    assert scipy.stats.binom.sf(rejected - 1, 200, 0.05) > 1e-3, f"{rejected} of 200 at 5%"


def _ranks(kind: str) -> Tensor:
    u = torch.rand(400)
    moved = {
        "uniform": u,
        "at the ends": (u - 0.5).sign() * (2 * (u - 0.5)).abs().sqrt() / 2 + 0.5,
        "in the middle": (u - 0.5) / 2 + 0.5,
        "low": u**2,
        "high": u.sqrt(),
    }[kind]
    return (64 * moved).long().clamp(max=63)


@pytest.mark.parametrize(
    ("kind", "location", "spread"),
    [
        ("uniform", 0, 0),
        ("at the ends", 0, 1),
        ("in the middle", 0, -1),
        ("low", -1, None),
        ("high", 1, None),
    ],
    ids=str,
)
def test_location_and_spread_say_how_ranks_are_wrong(
    kind: str, location: int, spread: int | None
) -> None:
    result = calibration_of_ranks({"z": _ranks(kind)}, 63)
    assert (result.p_value < 1e-6) == (kind != "uniform")
    # standard errors of uniform ranks
    deviation = (float(result.location["z"]) - 0.5) / (1 / 12 / 400) ** 0.5
    assert location * 5 < deviation if location > 0 else deviation < 5
    assert deviation < location * 5 if location < 0 else deviation > -5
    if spread is not None:
        deviation = (float(result.spread["z"]) - 1) / (0.8 / 400) ** 0.5
        assert spread * deviation > 5 if spread else abs(deviation) < 5


def test_summary_has_a_line_for_every_element() -> None:
    ranks = {"one": torch.randint(64, (30,)), "many": torch.randint(64, (30, 2, 2))}
    text = calibration_of_ranks(ranks, 63, num_failed=3).summary()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        "one", "many[0,0]", "many[0,1]", "many[1,0]", "many[1,1]",
    ]  # fmt: skip
    assert "30 simulations, 63 draws each" in lines[-1]


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        ({}, {}, "at least one site"),
        ({"z": torch.zeros(19, dtype=torch.long)}, {}, r"19 simulations .*at least 20"),
        ({"z": torch.zeros(50)}, {}, r"'z' must be integers.*float32"),
        ({"z": torch.full((50,), 10)}, {}, r"from 10 to 10.*num_draws=9"),
        ({"z": torch.full((50,), -1)}, {}, r"from -1 to -1"),
        ({"z": torch.randint(10, (50,))}, {"num_bins": 1}, r"num_bins .*got 1"),
    ],
    ids=["none", "few", "fractions", "too large", "negative", "one bin"],
)
def test_bad_ranks(ranks: dict[str, Tensor], settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_of_ranks(ranks, 9, **settings)


@pytest.mark.parametrize(
    ("truth", "draws", "message"),
    [
        (torch.zeros(2), torch.zeros(5, 3), r"\(5, 3\).*\(2,\)"),
        (torch.zeros(2), torch.zeros(0, 2), r"\(0, 2\)"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(5, 2), "NaN"),
    ],
    ids=["shape", "no draws", "nan"],
)
def test_what_cannot_be_ranked(truth: Tensor, draws: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_statistics(truth, draws)
