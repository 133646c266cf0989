"""Heads: the prior at zero, conjugate updates for statistics of data, valid for any others."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pyro_ext.distributions import NormalGamma
from pyro_ext.nn import (
    BernoulliHead,
    BetaHead,
    CategoricalHead,
    DirichletHead,
    GammaHead,
    NormalGammaHead,
    NormalHead,
)
from pyro_ext.nn.exponential_family import add_positive

FAMILIES: dict[str, tuple[Any, Any, Any, int]] = {
    # head, distribution from its outputs, the prior, number of statistics
    "Normal": (NormalHead, dist.Normal, (0.5, 2.0), 2),
    "Gamma": (GammaHead, dist.Gamma, (2.0, 3.0), 2),
    "Beta": (BetaHead, dist.Beta, (2.0, 0.5), 2),
    "Dirichlet": (DirichletHead, dist.Dirichlet, (torch.tensor([0.5, 1.0, 2.0]),), 3),
    "NormalGamma": (NormalGammaHead, NormalGamma, (0.3, 0.1, 2.0, 1.5), 3),
}
families = pytest.mark.parametrize("family", FAMILIES)


def _make(family: str) -> tuple[nn.Module, Any, Any, int]:
    head, distribution, prior, size = FAMILIES[family]
    prior = tuple(torch.as_tensor(p, dtype=torch.get_default_dtype()) for p in prior)
    return head(*prior), distribution, prior, size


def _outputs(head: nn.Module, statistics: Tensor) -> tuple[Tensor, ...]:
    outputs = head(statistics)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@families
def test_no_statistics_are_the_prior(family: str) -> None:
    head, _, prior, size = _make(family)
    for output, parameter in zip(_outputs(head, torch.zeros(4, size)), prior, strict=True):
        torch.testing.assert_close(output, parameter.expand(output.shape))


@families
@given(data=st.data())
def test_any_statistics_are_valid(family: str, data: Any) -> None:
    torch.set_default_dtype(torch.float64)
    head, distribution, _, size = _make(family)
    numbers = st.floats(-1e6, 1e6, allow_nan=False)
    for dtype in (torch.float64, torch.float32):
        row = data.draw(st.lists(numbers, min_size=size, max_size=size))
        outputs = _outputs(head.to(dtype), torch.tensor(row, dtype=dtype))
        distribution(*outputs, validate_args=True)  # raises for what is out of its range


@families
def test_statistics_add_up(family: str) -> None:
    """Two halves of the data are worth as much as the whole: the update is a sum."""
    head, _, _, size = _make(family)
    if family in ("Normal", "NormalGamma"):
        points = torch.randn(8)
        rows = [torch.ones(8), points, points.square()]
        rows = rows if size == 3 else [points, torch.ones(8)]
        statistics = torch.stack(rows, -1)
    else:
        statistics = torch.rand(8, size)
    once = _outputs(head, statistics[:5].sum(0))
    again = type(head)(*(p.detach() for p in once))
    twice = _outputs(again, statistics[5:].sum(0))
    for whole, parts in zip(_outputs(head, statistics.sum(0)), twice, strict=True):
        torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("num_points", [0, 1, 30])
def test_normal_gamma_is_the_conjugate_update(num_points: int) -> None:
    """Bayes' rule, at three values: prior times likelihood is proportional to the posterior."""
    prior = (0.3, 0.1, 2.0, 1.5)
    x = 2.0 + 0.5 * torch.randn(num_points)
    statistics = torch.stack([torch.tensor(float(num_points)), x.sum(), x.square().sum()])
    posterior = NormalGamma(*NormalGammaHead(*prior)(statistics))
    value = posterior.sample((3,))
    likelihood = dist.Normal(value[:, :1], value[:, 1:].rsqrt()).log_prob(x).sum(-1)
    log_ratio = NormalGamma(*prior).log_prob(value) + likelihood - posterior.log_prob(value)
    torch.testing.assert_close(log_ratio, log_ratio[:1].expand(3))


@pytest.mark.parametrize(
    ("head", "family", "likelihood", "statistics"),
    [
        (GammaHead(2.0, 3.0), dist.Gamma, dist.Poisson, lambda x: (x.sum(), len(x))),
        (BetaHead(2.0, 0.5), dist.Beta, dist.Bernoulli, lambda x: (x.sum(), (1 - x).sum())),
        (
            NormalHead(0.5, 2.0),
            dist.Normal,
            lambda z: dist.Normal(z, 0.5),
            lambda x: (x.sum() / 0.25, len(x) / 0.25),
        ),
    ],
    ids=["Gamma-Poisson", "Beta-Bernoulli", "Normal-Normal"],
)
def test_conjugate_updates(head: Any, family: Any, likelihood: Any, statistics: Any) -> None:
    x = torch.tensor([1.0, 0.0, 1.0, 1.0])
    prior = family(*head.double()(torch.zeros(2)))
    posterior = family(*head(torch.tensor([float(value) for value in statistics(x)])))
    z = posterior.sample((3,))
    log_ratio = likelihood(z.unsqueeze(-1)).log_prob(x).sum(-1) + prior.log_prob(z)
    log_ratio = log_ratio - posterior.log_prob(z)
    torch.testing.assert_close(log_ratio, log_ratio[:1].expand(3))


def test_logits_add_to_those_of_the_prior() -> None:
    probs = torch.tensor([0.2, 0.5, 0.3])
    head = CategoricalHead(probs)
    torch.testing.assert_close(head(torch.zeros(3)).exp(), probs)
    likelihood = torch.tensor([0.1, 0.7, 0.4])
    expected = probs * likelihood / (probs * likelihood).sum()
    torch.testing.assert_close(head(likelihood.log()).exp(), expected)
    bernoulli = BernoulliHead(0.3)
    torch.testing.assert_close(torch.sigmoid(bernoulli(torch.zeros(1))), torch.tensor(0.3))


@given(
    prior=st.floats(1e-3, 1e3),
    statistic=st.floats(-1e4, 1e4),
)
def test_positive_sums(prior: float, statistic: float) -> None:
    value = add_positive(
        torch.tensor(prior, dtype=torch.float64), torch.tensor(statistic, dtype=torch.float64)
    )
    assert value > 0
    if statistic >= 0:
        assert value == pytest.approx(prior + statistic, rel=1e-14)
    else:
        assert value <= prior


def test_positive_sums_have_no_step_in_the_slope() -> None:
    statistic = torch.tensor([-1e-9, 1e-9], requires_grad=True)
    add_positive(torch.tensor(0.7), statistic).sum().backward()
    assert statistic.grad is not None
    torch.testing.assert_close(statistic.grad, torch.ones(2), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NormalHead(0.0, 0.0), "scale=0.0 of the prior must be positive"),
        (lambda: GammaHead(-1.0, 1.0), "concentration=-1.0"),
        (lambda: NormalGammaHead(rate=0.0), "rate=0.0"),
        (lambda: BernoulliHead(1.0), "between 0 and 1"),
        (lambda: CategoricalHead(torch.tensor([0.5, 0.0])), "probs="),
        (lambda: NormalHead()(torch.zeros(3)), r"shape \(..., 2\), got \(3,\)"),
    ],
)
def test_bad_input_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@families
def test_priors_are_saved(family: str) -> None:
    head, _, _, size = _make(family)
    other = type(head)(*(1.5 + p for p in FAMILIES[family][2]))
    other.load_state_dict(head.state_dict())
    statistics = torch.rand(size)
    for first, second in zip(_outputs(head, statistics), _outputs(other, statistics), strict=True):
        torch.testing.assert_close(first, second)
