"""Permutations: where features go, and cycles that leave none where it is."""

import pytest
import torch

from pyro_ext.distributions.transforms import Permutation, random_cycle


def test_features_go_where_the_indices_say() -> None:
    layer = Permutation(torch.tensor([2, 0, 1]))
    z, log_det = layer.to_noise(torch.tensor([[10.0, 11.0, 12.0]]))
    assert z.tolist() == [[12.0, 10.0, 11.0]]
    assert log_det.tolist() == [0.0]
    assert layer.to_data(z)[0].tolist() == [[10.0, 11.0, 12.0]]


def test_the_caller_may_change_the_indices_afterwards() -> None:
    indices = torch.tensor([1, 0])
    layer = Permutation(indices)
    indices.zero_()
    assert layer.permutation.tolist() == [1, 0]


@pytest.mark.parametrize("features", [1, 2, 3, 8, 101])
def test_cycles_go_through_all_features(features: int) -> None:
    for _ in range(10):
        cycle = random_cycle(features)
        at, seen = 0, []
        for _ in range(features):
            seen.append(at)
            at = int(cycle[at])
        assert at == 0
        assert sorted(seen) == list(range(features))


def test_all_cycles_are_equally_likely() -> None:
    """Of four features there are six."""
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        cycle = tuple(random_cycle(4).tolist())
        counts[cycle] = counts.get(cycle, 0) + 1
    assert len(counts) == 6
    # five standard deviations
    assert all(abs(count - 500) < 5 * (3000 * 5 / 36) ** 0.5 for count in counts.values())


def test_the_seed_decides() -> None:
    torch.manual_seed(7)
    first = random_cycle(20)
    torch.manual_seed(7)
    assert torch.equal(random_cycle(20), first)
    assert not torch.equal(random_cycle(20), first)


@pytest.mark.parametrize(
    ("permutation", "message"),
    [
        ([0, 0, 1], r"\[0, 0, 1\] is not a permutation: every index from 0 to 2"),
        ([1, 2, 3], "is not a permutation"),
        ([-1, 0, 1], "is not a permutation"),
        ([0.0, 1.0], "vector of integers"),
        ([[0, 1]], "vector of integers"),
        (0, "vector of integers"),
    ],
    ids=str,
)
def test_what_is_none_is_refused(permutation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Permutation(torch.tensor(permutation))
