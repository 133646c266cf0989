"""The classifier test against the best possible classifier."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_ext.diagnostics import classifier_two_sample_test

NUM = 200


@pytest.mark.parametrize("shift", [0.0, 2.0], ids=str)
def test_accuracy_between_two_normals(shift: float) -> None:
    """The best classifier is right with probability Phi(shift / 2)."""
    result = classifier_two_sample_test(torch.randn(NUM, 2), torch.randn(NUM, 2) + shift / 2**0.5)
    best = float(torch.special.ndtr(torch.tensor(shift / 2)))
    error = (best * (1 - best) / (2 * NUM)) ** 0.5
    assert result.accuracy < best + 5 * error
    assert result.accuracy > best - 5 * error - 0.04, "the network learns too little"
    assert result.fold_accuracy.shape == (5,)
    assert abs(float(result.fold_accuracy.mean()) - result.accuracy) < 1e-12


def test_more_than_means_and_scales_are_seen() -> None:
    sign = 2.0 * torch.randint(2, (NUM,)) - 1
    bimodal = (sign * 0.95 + (1 - 0.95**2) ** 0.5 * torch.randn(NUM))[:, None]
    standard_error = 0.5 / (2 * NUM) ** 0.5
    result = classifier_two_sample_test(torch.randn(NUM, 1), bimodal)
    assert result.accuracy > 0.5 + 5 * standard_error


def test_units_do_not_matter_and_seeds_do() -> None:
    a, b = torch.randn(40, 2), torch.randn(40, 2) + 0.5
    units = torch.tensor([1e-3, 1e4])
    results = []
    for first, second, seed in ((a, b, 1), (a * units + 5, b * units + 5, 1), (a, b, 2)):
        torch.manual_seed(seed)
        results.append(classifier_two_sample_test(first, second, num_folds=2).fold_accuracy)
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_sites_are_joined() -> None:
    z, w = torch.randn(60, 2), torch.rand(60)
    one = {"z": z[:30], "w": w[:30]}
    two = {"w": w[30:], "z": z[30:] + 1}
    torch.manual_seed(0)
    by_site = classifier_two_sample_test(one, two, num_folds=2).accuracy
    torch.manual_seed(0)
    matrices = [torch.cat([each["w"][:, None], each["z"]], 1) for each in (one, two)]
    assert by_site == classifier_two_sample_test(*matrices, num_folds=2).accuracy


def test_a_constant_is_no_obstacle() -> None:
    a = torch.stack([torch.ones(40), torch.randn(40)], 1)
    assert classifier_two_sample_test(a, a + torch.tensor([1.0, 0.0])).accuracy > 0.95


def test_numpys_generator_is_left_alone() -> None:
    before = np.random.get_state()[1]  # type: ignore[index]
    classifier_two_sample_test(torch.randn(20, 1), torch.randn(20, 1))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("first", "second", "settings", "message"),
    [
        (torch.zeros(9, 2), torch.zeros(9, 3), {}, r"\(9, 2\).*\(9, 3\)"),
        (torch.zeros(9, 2), torch.zeros(8, 2), {}, "9 draws, second 8"),
        (torch.zeros(4, 2), torch.zeros(4, 2), {}, "num_folds=5"),
        (torch.zeros(4, 2), torch.zeros(4, 2), {"num_folds": 1}, "num_folds=1"),
        (torch.full((9, 2), torch.nan), torch.zeros(9, 2), {}, "first has values"),
        ({"a": torch.zeros(9)}, {"b": torch.zeros(9)}, {}, r"\['a'\].*\['b'\]"),
        ({}, {}, {}, "no site"),
        (
            {"a": torch.zeros(9), "b": torch.zeros(8)},
            {"a": torch.zeros(9), "b": torch.zeros(9)},
            {},
            "sites of first",
        ),
    ],
    ids=["shapes", "numbers", "few", "one fold", "nan", "sites", "no site", "lengths"],
)
def test_bad_input(first: Tensor, second: Tensor, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier_two_sample_test(first, second, **settings)


def test_tensors_and_dictionaries_do_not_mix() -> None:
    with pytest.raises(TypeError, match="both"):
        classifier_two_sample_test(torch.zeros(9, 1), {"a": torch.zeros(9)})


def test_without_scikit_learn_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        classifier_two_sample_test(torch.zeros(9, 1), torch.zeros(9, 1))
