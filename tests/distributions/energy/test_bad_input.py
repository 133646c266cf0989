"""Bad input to energy machines: what is refused, with which words, and what is not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, MultivariateNormal, Normal, StudentT, Uniform

from pyro_ext.distributions import AutoregressiveEnergyMachine
from pyro_ext.errors import NormalizerWarning
from pyro_ext.training import fit_density
from tests.distributions.energy.problems import FixedEnergy, machine, random_machine

LOSS = AutoregressiveEnergyMachine.training_loss


@pytest.mark.parametrize(
    "settings",
    [
        {"features": 0},
        {"context_features": -1},
        {"hidden_features": 0},
        {"residual_blocks": -1},
        {"energy_hidden_features": 0},
        {"energy_context": 0},
        {"frequencies": -1},
        {"mixture_components": 0},
        {"min_scale": 0.0},
        {"defensive_weight": 0.0},
        {"defensive_weight": 1.0},
        {"reference": "flat"},
        {"energy_bound": -1.0},
        {"num_importance_samples": 2},
        {"num_gradient_samples": 0},
        {"max_conditionals": 0},
        {"num_evaluation_samples": 0},
        {"warmup_steps": -1},
        {"monitor_every": 2.5},
        {"dropout": 1.0},
        {"proposal": "student"},
        {"proposal": Normal(torch.zeros(2), 1.0)},
        {"proposal": Uniform(torch.zeros(3), 1.0)},
        {"proposal": MultivariateNormal(torch.zeros(2), torch.eye(2))},
        {"proposal": StudentT(3.0)},
        {"proposal": Uniform(0.0, 1.0), "reference": "broad"},
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    name = next(iter(settings)).replace("energy_bound", "bound")
    with pytest.raises(ValueError, match=name.replace("energy_hidden", "hidden")):
        AutoregressiveEnergyMachine(**{"features": 2, **settings})


def test_a_proposal_of_another_type() -> None:
    with pytest.raises(TypeError, match="proposal is a int"):
        AutoregressiveEnergyMachine(2, proposal=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("context_features", "context"),
    [(0, torch.zeros(3)), (2, None), (2, torch.zeros(3)), (2, torch.zeros(()))],
    ids=["not expected", "missing", "of another size", "a number"],
)
def test_contexts_that_do_not_fit(context_features: int, context: Tensor | None) -> None:
    aem = machine(2, context_features)
    with pytest.raises(ValueError, match="context_features"):
        aem(context)
    with pytest.raises(ValueError, match="context_features"):
        aem.training_loss(torch.zeros(4, 2), context)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 3), r"shape \(4, 3\)"),
        (torch.zeros(2), r"shape \(2,\)"),
        (torch.zeros(0, 2), "at least one row"),
        (torch.tensor([[0.0, math.nan]]), "1 of the numbers in the data are not finite"),
        (torch.tensor([[0.0, math.inf]]), "not finite"),
    ],
    ids=["features", "a vector", "no rows", "NaN", "infinite"],
)
def test_data_that_cannot_be_trained_on(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine(2).training_loss(x)


def test_integers_are_refused_with_a_cure() -> None:
    x = torch.randint(5, (10, 2))
    for call in (
        lambda: machine(2).training_loss(x),
        lambda: machine(2)().log_prob(x),
        lambda: machine(2)().proposal_log_prob(x),
    ):
        with pytest.raises(TypeError, match="dequantise"):
            call()


@pytest.mark.usefixtures("float32")
def test_values_of_higher_precision_than_the_weights() -> None:
    aem, x = machine(2), torch.zeros(3, 2, dtype=torch.float64)
    for call in (lambda: aem.training_loss(x), lambda: aem().log_prob(x)):
        with pytest.raises(TypeError, match="float64"):
            call()


@pytest.mark.parametrize(
    ("proposal", "outside"),
    [(Uniform(-1.0, 2.0), 2.5), (Gamma(2.0, 1.0), -0.5)],
    ids=["box", "positive numbers"],
)
def test_data_outside_of_a_bounded_proposal(proposal: Any, outside: float) -> None:
    if isinstance(proposal, Gamma):
        with pytest.raises(ValueError, match="icdf"):
            machine(2, proposal=proposal)
        return
    aem, x = random_machine(2, proposal=proposal), torch.full((4, 2), 0.5)
    x[2, 1] = outside
    with pytest.raises(ValueError, match=r"example 2\.5 in row 2, feature 1"):
        aem.training_loss(x)
    with pytest.raises(ValueError, match="support"):
        aem().log_prob(x)
    distribution = aem()
    distribution._validate_args = False
    with torch.no_grad():
        for how in ({}, {"exact": True}):
            log_p = distribution.log_prob(x, **how)
            assert (log_p == -math.inf).tolist() == [False, False, True, False]


def test_both_ends_of_a_box_belong_to_it() -> None:
    aem = random_machine(1, proposal=Uniform(-1.0, 2.0))
    with torch.no_grad():
        assert aem().log_prob(torch.tensor([[-1.0], [2.0]])).isfinite().all()
    aem.training_loss(torch.tensor([[-1.0], [2.0]]))


def test_a_row_with_nan_is_refused_or_else_spoils_itself_alone() -> None:
    aem, x = random_machine(2), torch.zeros(3, 2)
    x[1, 0] = math.nan
    with pytest.raises(ValueError, match="support"):
        aem().log_prob(x)
    distribution = aem()
    distribution._validate_args = False
    with torch.no_grad():
        for how in ({}, {"exact": True}):
            assert distribution.log_prob(x, **how).isfinite().tolist() == [True, False, True]


def test_weights_that_all_vanish_give_minus_infinity() -> None:
    aem = machine(1, reference="broad").eval()
    aem.energy = FixedEnergy(lambda x: torch.full_like(x, -math.inf))
    with torch.no_grad():
        for how in ({}, {"exact": True}):
            assert (aem().log_prob(torch.zeros(3, 1), **how) == -math.inf).all()
        assert aem().sample((3,)).shape == (3, 1)


def test_quadrature_that_does_not_converge_says_so() -> None:
    aem = machine(1, reference="broad").eval()
    aem.energy = FixedEnergy(lambda x: -(x * 1e5).abs())
    with (
        torch.no_grad(),
        aem.evaluation(exact=True, tolerance=1e-12),
        pytest.warns(NormalizerWarning, match="did not reach its tolerance"),
    ):
        aem().log_prob(torch.zeros(3, 1))


def test_far_away_values_have_finite_densities() -> None:
    aem = machine(2).eval()
    x = torch.tensor([[1e3, -1e3], [1e6, 0.0], [0.0, -1e8]], requires_grad=True)
    log_p = aem().log_prob(x, exact=True)
    assert log_p.isfinite().all()
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    assert gradient.isfinite().all()


def test_one_feature_and_a_constant_one() -> None:
    data = torch.cat([torch.randn(200, 1), torch.full((200, 1), 7.0)], 1)
    aem = machine(2)
    result = fit_density(aem, data, loss=LOSS, num_steps=30, learning_rate=1e-2, progress=False)
    assert result.losses.isfinite().all()
    assert result.losses[-1] < result.losses[0]
    with torch.no_grad():
        assert aem.eval()().log_prob(data[:5], exact=True).isfinite().all()


@pytest.mark.parametrize(
    "how", [{"num_importance_samples": 2}, {"num_importance_samples": 0}], ids=str
)
def test_too_few_draws(how: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="num_importance_samples"):
        machine(2)().log_prob(torch.zeros(2), **how)
    with pytest.raises(ValueError, match="num_proposals"):
        machine(2)().sample(num_proposals=0)
