"""Bad input to score flows: what is refused, with which words, and what is only warned of."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_ext.distributions import DequantizedFlow, NeuralSplineFlow, ScoreFlow
from pyro_ext.distributions import UniformDequantization as Uniform
from pyro_ext.distributions.diffusion import VPSDE, OdeSettings, dequantized_training_loss
from pyro_ext.errors import DiscreteDataWarning, PyroExtError
from tests.distributions.diffusion.problems import MIXTURE, known_flow


class Function(nn.Module):
    """A score network that is a function of noisy data and time."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return self.weight * self.function(x, t)


def small(**settings: Any) -> ScoreFlow:
    return ScoreFlow(2, hidden_features=8, residual_blocks=1, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"event_shape": 0}, "event_shape"),
        ({"event_shape": (3, 4)}, "event_shape must be a number of features or"),
        ({"event_shape": 2.5}, "event_shape"),
        ({"sde": "vpp"}, "'vp', 'subvp', 've'"),
        ({"parametrization": "x0"}, "velocity, noise, score"),
        ({"context_features": -1}, "context_features"),
        ({"context_dropout": 0.1}, "context_dropout .* 0 without a context"),
        ({"context_features": 1, "context_dropout": 1.0}, "context_dropout"),
        ({"hidden_features": 0}, "hidden_features"),
        ({"frequencies": -1}, "frequencies"),
        ({"dropout": 1.0}, "dropout"),
        ({"event_shape": (1, 4, 4), "hidden_features": 12}, "multiple of 8"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ScoreFlow(**{"event_shape": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rk5"}, "solver must be one of rowwise, dopri5"),
        ({"trace": "skilling"}, "trace must be one of"),
        ({"probe": "uniform"}, "probe must be one of"),
        ({"rtol": 0.0}, "rtol must be a positive number"),
        ({"atol": math.nan}, "atol must be a positive number"),
        ({"num_steps": 0}, "num_steps"),
        ({"max_evaluations": 2.5}, "max_evaluations"),
        ({"num_probes": True}, "num_probes"),
        ({"adjoint": True}, "solver='dopri5'"),
        ({"adjoint": True, "score_gradient": True, "solver": "rk4"}, "choose one of the two"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_of_the_equation(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(ode=OdeSettings(**settings))
    with pytest.raises(ValueError, match=message):
        small()().log_prob(torch.randn(3, 2), **settings)


def test_a_setting_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        small()().log_prob(torch.randn(3, 2), tolerance=1e-3)
    with pytest.raises(TypeError, match="rtol: settings of the probability-flow equation"):
        small()().sample(method="euler_maruyama", rtol=1e-3)


@pytest.mark.parametrize("t", [0.0, 1e-6, 1.1, math.nan])
def test_times_outside_of_the_diffusion(t: float) -> None:
    with pytest.raises(ValueError, match=r"times must be between start=1e-05 and end=1\.0, got"):
        small()().score(torch.randn(3, 2), t)


def test_a_network_of_another_output_shape() -> None:
    flow = ScoreFlow(2, Function(lambda x, t: x[:, :1]), parametrization="score")
    with pytest.raises(ValueError, match=r"x of shape \(10, 2\) and returned shape \(10, 1\)"):
        flow.training_loss(torch.randn(5, 2))
    with pytest.raises(ValueError, match="must return the shape of x"):
        flow().log_prob(torch.randn(5, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_the_time(value: float) -> None:
    network = Function(lambda x, t: torch.where(t[:, None] > 0.5, value, -x))
    flow = ScoreFlow(2, network, parametrization="score")
    x = torch.randn(5, 2)
    for settings in ({}, {"solver": "rk4"}):
        with pytest.raises(PyroExtError, match=r"NaN or infinite for 5 of 5 rows.* at t=0\.[45]"):
            flow().log_prob(x, **settings)
    with pytest.raises(PyroExtError, match=r"NaN or infinite for 7 of 7 rows.* at t=1:"):
        flow().sample((7,))
    with pytest.raises(ValueError, match=r"7 of 7 rows.* time t=1:"):
        flow().sample((7,), method="euler_maruyama")


@pytest.mark.parametrize("solver", ["rowwise", "dopri5"])
def test_too_many_evaluations_are_an_error_with_the_cure(solver: str) -> None:
    flow = known_flow(MIXTURE, VPSDE())
    cure = r"(?s)max_evaluations=50 evaluations for 3 of 3 rows.*loosen rtol=1e-05.*rk4"
    with pytest.raises(PyroExtError, match=cure):
        flow().log_prob(torch.randn(3, 2), max_evaluations=50, solver=solver)


def test_integers_are_refused_or_warned_of() -> None:
    flow = small()
    with pytest.raises(TypeError, match=r"torch\.int64.*DequantizedFlow"):
        flow().log_prob(torch.ones(3, 2).long())
    images = torch.randint(0, 256, (10, 2)).double()
    with pytest.warns(DiscreteDataWarning, match="Dequantise"):
        flow.training_loss(images)
    with pytest.warns(DiscreteDataWarning, match="Dequantise"):
        flow().log_prob(images, solver="euler", num_steps=2)
    with pytest.warns(DiscreteDataWarning, match="Dequantise"):
        flow.initialize(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow().log_prob(torch.zeros(3, 2), solver="euler", num_steps=2)
        flow().log_prob(images / 256, solver="euler", num_steps=2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(5, 3), r"shape \(5, 3\); its last dimensions have to be \(2,\)"),
        (torch.randn(2), r"\(n, 2\) is needed|shape \(2,\)"),
        (torch.randn(3, 5, 2), "is needed"),
    ],
    ids=["features", "no rows", "too many dimensions"],
)
def test_data_of_another_shape(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().training_loss(x)


def test_data_that_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match="2 of the numbers in the data are not finite"):
        small().initialize(torch.tensor([[1.0, math.nan], [math.inf, 2.5]]))
    with pytest.raises(ValueError, match="without rows"):
        small().initialize(torch.randn(0, 2))
    flow = small()
    flow.initialize(torch.tensor([[1.0, 0.5], [1.0, 2.0]]))
    assert float(flow.scale[0]) == 1.0


def test_data_of_higher_precision_than_the_network() -> None:
    flow = small().float()
    with pytest.raises(TypeError, match=r"data is of torch\.float64"):
        flow.training_loss(torch.randn(5, 2))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "context_features=3, but the context is None"),
        (torch.randn(5, 2), "last dimension has to be context_features=3"),
        (torch.randn(4, 3), "but there are 5 data"),
    ],
    ids=["missing", "features", "rows"],
)
def test_contexts_that_do_not_fit(context: Tensor | None, message: str) -> None:
    flow = small(context_features=3)
    with pytest.raises(ValueError, match=message):
        flow.training_loss(torch.randn(5, 2), context)
    with pytest.raises(ValueError, match=r"context is .*5, 3"):
        small()(torch.randn(5, 3))


def test_arguments_of_training_and_sampling() -> None:
    flow = small()
    with pytest.raises(ValueError, match="weighting must be 'likelihood' or 'original'"):
        flow.training_loss(torch.randn(5, 2), weighting="uniform")
    with pytest.raises(ValueError, match="num_samples must be even"):
        flow().elbo(torch.randn(5, 2), 3)
    with pytest.raises(ValueError, match="num_samples"):
        flow().elbo(torch.randn(5, 2), 0)
    with pytest.raises(ValueError, match="ode, euler_maruyama, predictor_corrector"):
        flow().sample(method="ddim")
    with pytest.raises(ValueError, match="num_steps"):
        flow().sample(method="euler_maruyama", num_steps=0)
    with pytest.raises(ValueError, match="num_corrections"):
        flow().sample(method="predictor_corrector", num_corrections=-1)
    with pytest.raises(ValueError, match="correction_size"):
        flow().sample(method="predictor_corrector", correction_size=0.0)
    with pytest.raises(ValueError, match="no unconditional scores"):
        flow().away_from_unconditional(1.0)
    with pytest.raises(ValueError, match=r"rows must have shape \(4,\), got \(\)"):
        flow().guided(lambda x, t: -x.square().sum()).sample((4,))
    with pytest.raises(TypeError, match=r"score_net must be an nn\.Module, got a function"):
        ScoreFlow(2, lambda x, t, c: x)  # type: ignore[arg-type]
    other = DequantizedFlow(NeuralSplineFlow(2, transforms=1, hidden_features=4), Uniform(4))
    with pytest.raises(TypeError, match="must be a ScoreFlow, got a NeuralSplineFlow"):
        dequantized_training_loss(other, torch.ones(3, 2).long())


def test_values_that_are_not_numbers() -> None:
    x = torch.tensor([[0.0, 1.5], [math.nan, 0.5]])
    with pytest.raises(ValueError, match="support"):
        small()().log_prob(x)
