"""What a function makes of evidence that was replaced under its hands."""

from __future__ import annotations

import torch

from pyro_ext.infer.conditional_prior.other_evidence import OtherEvidence


def test_arguments_closures_and_views_are_disturbed() -> None:
    evidence, other = torch.rand(3, 4), torch.rand(3, 4)
    before = evidence.clone()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.exp(), torch.cat([evidence, other]), evidence[1] + 0.0, other + 0.0

    plain = function(evidence)
    with OtherEvidence([evidence]):
        by_argument, by_closure, by_view, untouched = function(evidence)
    assert (by_argument != plain[0]).all()
    assert (by_closure[:3] != plain[1][:3]).all()
    assert (by_closure[3:] == other).all()
    assert (by_view != plain[2]).all()
    assert (untouched == other).all()
    assert (evidence == before).all()


def test_a_view_that_was_taken_before_shares_the_memory() -> None:
    evidence = torch.rand(3, 4)
    row = evidence[1]
    with OtherEvidence([evidence]):
        seen = row + 0.0
    assert (seen != row).all()


def test_other_evidence_is_in_the_unit_interval_and_integers_pass() -> None:
    evidence, counts = torch.rand(1000), torch.arange(5)
    with OtherEvidence([evidence, counts]):
        seen, same = evidence + 0.0, counts + 0
    assert ((seen >= 0) & (seen <= 1)).all()
    assert (same == torch.arange(5)).all()


def test_shapes_are_left_as_they_are() -> None:
    """A Laplace draws by ``loc.new(shape)``, which takes a tuple for numbers."""
    evidence, shape = torch.rand(3), torch.Size([2, 5])
    with OtherEvidence([evidence]):
        assert evidence.new(shape).shape == shape
