"""What the benchmark of energy machines takes for granted: its picture, its tables, its errors."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks._energy import difference, with_error
from benchmarks._energy_plane import Picture, errors_of_normalizers, machine
from benchmarks._runs import kept, standard_error

SIDE = 16


@pytest.fixture(scope="module")
def picture() -> Picture:
    pytest.importorskip("skimage")
    return Picture(SIDE)


@pytest.mark.usefixtures("float32")
def test_a_picture_is_a_density_on_the_square(picture: Picture) -> None:
    middles = (torch.arange(SIDE) + 0.5) / SIDE
    density = picture.log_prob(torch.cartesian_prod(middles, middles)).exp()
    assert float(density.mean()) == pytest.approx(1.0, abs=1e-5)
    assert picture.log_prob(torch.tensor([1.1, 0.5])) == -math.inf


@pytest.mark.usefixtures("float32")
def test_draws_of_a_picture_fall_on_its_pixels_by_their_mass(picture: Picture) -> None:
    draws = picture.sample((20_000,))
    assert ((draws >= 0) & (draws <= 1)).all()
    i, j = (draws * SIDE).long().clamp_max(SIDE - 1).unbind(-1)
    observed = torch.bincount(i * SIDE + j, minlength=SIDE**2)
    expected = len(draws) * picture.mass.flatten()
    enough = expected > 8
    statistic = ((observed - expected).square() / expected)[enough].sum()
    number = int(enough.sum())
    assert float(statistic) < number + 5 * math.sqrt(2 * number)


@pytest.mark.usefixtures("float32")
def test_errors_of_normalizers_fall_with_the_samples() -> None:
    aem = machine("diamond").eval()
    with torch.no_grad():
        for parameter in aem.energy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    errors = errors_of_normalizers(aem, torch.randn(50, 2))
    middles = errors.median(1).values
    assert (middles[1:] < middles[:-1]).all()
    assert middles[-1] < 1e-2 * middles[0] + 1e-3


def test_the_standard_error_is_that_of_the_mean() -> None:
    values = torch.tensor([1.0, 3.0])
    assert standard_error(values) == pytest.approx(1.0)


def test_differences_are_of_pairs_with_the_error_of_their_mean() -> None:
    a = torch.tensor([5.0, -2.0, 12.0])
    assert difference(a, a - 1.0) == pytest.approx((1.0, 0.0))
    assert difference(a, a - torch.tensor([0.0, 1.0, 2.0])) == pytest.approx((1.0, 3**-0.5))
    assert with_error(1.0, 0.126) == "1.00 ± 0.13"


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks._runs.OUTPUT", str(tmp_path / "output"))
    values = iter([{"gap": 0.5}, {"gap": 0.7}])
    assert kept("run", lambda: next(values)) == {"gap": 0.5}
    assert kept("run", lambda: next(values)) == {"gap": 0.5}
    assert kept("other", lambda: next(values)) == {"gap": 0.7}
