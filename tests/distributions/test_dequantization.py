"""Dequantisation against cell probabilities that are known, exactly or by scipy."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_ext.distributions.dequantization import (
    Dequantization,
    Dequantized,
    DequantizedFlow,
    UniformDequantization,
    VariationalDequantization,
    bits_per_dimension,
)
from pyro_ext.distributions.image_flow import ImageSplineFlow
from pyro_ext.distributions.spline_flow import NeuralSplineFlow

LEVELS = 5


class LogitNormal(nn.Module):
    """Noise whose location is linear in the context: the simplest one that can be trained."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.log_scale = nn.Parameter(torch.zeros(size))

    def forward(self, context: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.linear(context), self.log_scale.exp()).to_event(1)


class Cells(dist.TorchDistribution):
    """A density on the unit cube made of known probabilities of cells and noise inside them."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.unit_interval, 1)

    def __init__(self, probs: Tensor, noise: Callable[[Tensor], dist.TorchDistribution]) -> None:
        self.probs = probs  # (features, levels)
        self.noise = noise
        super().__init__(event_shape=probs.shape[:1])

    def log_prob(self, value: Tensor) -> Tensor:
        levels = self.probs.shape[-1]
        cells = (value * levels).floor()
        u = value * levels - cells
        probs = self.probs.expand(*value.shape, -1).gather(-1, cells.long()[..., None])[..., 0]
        context = (2 * cells - (levels - 1)) / (levels - 1)
        return (probs * levels).log().sum(-1) + self.noise(context).log_prob(u)


def _beta() -> dist.TorchDistribution:
    """A density over two pixels that is not flat within cells."""
    return dist.Beta(torch.tensor([2.0, 6.0]), torch.tensor([3.0, 1.5])).to_event(1)


def _log_prob_of_beta(x: Tensor) -> Tensor:
    probs = [
        stats.beta(a, b).cdf((x[..., i] + 1) / LEVELS) - stats.beta(a, b).cdf(x[..., i] / LEVELS)
        for i, (a, b) in enumerate([(2.0, 3.0), (6.0, 1.5)])
    ]
    return torch.as_tensor(probs[0] * probs[1]).log()


def _images() -> Tensor:
    """Every image of two pixels."""
    return torch.cartesian_prod(torch.arange(LEVELS), torch.arange(LEVELS))


def _variational(size: int = 2, levels: int = LEVELS) -> VariationalDequantization:
    """Noise that depends on the image."""
    flow = LogitNormal(size)
    with torch.no_grad():
        flow.linear.weight.copy_(0.5 * torch.randn(size, size))
        flow.log_scale.copy_(0.4 + 0.1 * torch.randn(size))
    return VariationalDequantization(flow, levels)


DEQUANTIZATIONS: dict[str, Callable[[], Dequantization]] = {
    "uniform": lambda: UniformDequantization(LEVELS),
    "variational": _variational,
}
dequantizations = pytest.mark.parametrize("make", DEQUANTIZATIONS.values(), ids=DEQUANTIZATIONS)


def _assert_close_to(draws: Tensor, expected: Tensor, what: str) -> None:
    """Means over the first dimension, within five Monte Carlo standard errors of the truth."""
    error = (draws.mean(0) - expected).abs()
    bound = 5 * draws.std(0) / math.sqrt(len(draws))
    assert (error <= bound).all(), f"{what}: off by {(error / bound * 5).max():.1f} errors"


# The bound


def test_the_bound_is_the_probability_where_the_density_is_constant() -> None:
    probs = torch.distributions.Dirichlet(torch.ones(3, LEVELS)).sample()
    flat = dist.Uniform(torch.zeros(3), 1.0, validate_args=False).to_event(1)
    model = Dequantized(Cells(probs, lambda _: flat), UniformDequantization(LEVELS))
    x = torch.randint(0, LEVELS, (100, 3))
    expected = probs.log().expand(100, -1, -1).gather(-1, x[..., None]).sum((-2, -1))
    torch.testing.assert_close(model.log_prob(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.log_prob(x, num_samples=7), expected, rtol=0, atol=1e-10)


def test_the_bound_is_the_probability_where_the_noise_is_the_density_within_a_cell() -> None:
    probs = torch.distributions.Dirichlet(torch.ones(2, LEVELS)).sample()
    dequantization = _variational()

    def noise(context: Tensor) -> dist.TorchDistribution:
        normal = dequantization.flow(context).base_dist
        return dist.TransformedDistribution(
            normal, [dist.transforms.SigmoidTransform()], validate_args=False
        ).to_event(1)

    model = Dequantized(Cells(probs, noise), dequantization)
    x = _images()
    expected = probs[0].log()[x[:, 0]] + probs[1].log()[x[:, 1]]
    torch.testing.assert_close(model.log_prob(x), expected, rtol=0, atol=1e-8)


@dequantizations
def test_weights_are_unbiased_estimates_of_the_probability(
    make: Callable[[], Dequantization],
) -> None:
    x = _images()
    model = Dequantized(_beta(), make())
    with torch.no_grad():
        draws = model.log_prob(x.expand(4000, -1, -1)).exp()
    _assert_close_to(draws, _log_prob_of_beta(x).exp(), "probabilities")


@dequantizations
def test_the_bound_is_below_and_closes_with_more_samples(
    make: Callable[[], Dequantization],
) -> None:
    x, model = _images(), Dequantized(_beta(), make())
    truth = _log_prob_of_beta(x)
    gaps = []
    for num_samples in (1, 4, 64, 512):
        repeats = max(64, 4096 // num_samples)
        with torch.no_grad():
            draws = model.log_prob(x.expand(repeats, -1, -1), num_samples=num_samples)
        error = draws.std(0) / math.sqrt(repeats)
        assert (draws.mean(0) < truth + 5 * error).all()
        gaps.append((truth - draws.mean(0)).mean().item())
    # the gap falls as 1 / num_samples in the end
    assert gaps[0] > 3 * gaps[1] / 2 > 0
    assert gaps[1] > 5 * gaps[2] > 0
    assert abs(gaps[3]) < 0.02


def test_uniform_noise_gives_the_mean_log_density_over_a_cell() -> None:
    x = torch.arange(LEVELS)[:, None]
    base = dist.Beta(torch.tensor([2.0]), torch.tensor([4.0])).to_event(1)
    u = (torch.arange(20_000) + 0.5) / 20_000
    expected = base.log_prob((x + u)[..., None] / LEVELS).mean(-1) - math.log(LEVELS)
    model = Dequantized(base, UniformDequantization(LEVELS))
    draws = model.log_prob(x.expand(20_000, -1, -1))
    _assert_close_to(draws, expected, "bounds")


@dequantizations
def test_bounds_sum_to_less_than_one(make: Callable[[], Dequantization]) -> None:
    with torch.no_grad():
        bounds = Dequantized(_beta(), make()).log_prob(_images().expand(2000, -1, -1)).mean(0)
    total = bounds.exp().sum()
    assert 0.5 < total < 1.0


def test_probabilities_sum_to_the_mass_in_the_unit_cube() -> None:
    base = dist.Normal(torch.tensor([0.7]), torch.tensor([0.4])).to_event(1)
    model = Dequantized(base, UniformDequantization(LEVELS))
    x = torch.arange(LEVELS)[:, None]
    draws = model.log_prob(x.expand(20_000, -1, -1)).exp().sum(-1)
    mass = stats.norm(0.7, 0.4).cdf(1.0) - stats.norm(0.7, 0.4).cdf(0.0)
    _assert_close_to(draws, torch.tensor(mass), "total probability")


# The noise


def test_the_density_of_variational_noise_is_that_of_a_logit_normal() -> None:
    dequantization = _variational()
    x = _images().to(torch.get_default_dtype())
    noise, log_density = dequantization.noise(x, 1, torch.Size([50]))
    assert noise.shape == (50, 25, 2)
    normal = dequantization.flow((2 * x - (LEVELS - 1)) / (LEVELS - 1)).base_dist
    logit_normal = dist.TransformedDistribution(normal, [dist.transforms.SigmoidTransform()])
    torch.testing.assert_close(log_density, logit_normal.log_prob(noise).sum(-1))


@dequantizations
@pytest.mark.usefixtures("float32")
def test_noise_stays_in_the_cell_in_single_precision(
    make: Callable[[], Dequantization],
) -> None:
    model = Dequantized(dist.Uniform(torch.zeros(2), 1.0).to_event(1), make())
    x = torch.full((1_000_000, 2), LEVELS - 1)
    values, log_density = model.dequantize(x)
    assert log_density.isfinite().all()
    assert values.min() >= 1 - 1 / LEVELS
    assert values.max() < 1
    # rand returns exactly zero about once in 16 million draws
    low, _ = model.dequantize(torch.zeros_like(x))
    assert low.min() > 0


@pytest.mark.usefixtures("float32")
def test_the_largest_byte_keeps_its_cell() -> None:
    """In single precision ``255 + u`` is 256 once in 131 thousand draws."""
    model = Dequantized(dist.Uniform(torch.zeros(2), 1.0).to_event(1), UniformDequantization(256))
    x = torch.full((1_000_000, 2), 255)
    values, _ = model.dequantize(x)
    assert values.max() < 1
    assert model.log_prob(x).isfinite().all()


@pytest.mark.parametrize("location", [-1e3, -40.0, 40.0, 1e3])
def test_noise_at_an_end_of_the_cell_stays_finite(location: float) -> None:
    dequantization = _variational()
    with torch.no_grad():
        dequantization.flow.linear.bias.fill_(location)
    model = Dequantized(_beta(), dequantization)
    value = model.log_prob(_images())
    value.sum().backward()
    assert value.isfinite().all()
    for parameter in dequantization.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_gradients_reach_the_dequantiser_and_the_density() -> None:
    flow = NeuralSplineFlow(2, transforms=1, hidden_features=8)
    noise = NeuralSplineFlow(2, 2, transforms=1, hidden_features=8)
    model = DequantizedFlow(flow, VariationalDequantization(noise, LEVELS), num_samples=2)
    model().log_prob(_images()).sum().backward()
    for part in (flow, noise):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert sum(gradient.abs().sum() for gradient in gradients) > 0
    assert model.dequantization.flow is noise


def test_training_makes_variational_noise_better_than_uniform_noise() -> None:
    # mass at the upper end of every cell but the last: uniform noise wastes most draws
    steep = dist.Beta(torch.full((2,), 30.0), torch.full((2,), 30.0)).to_event(1)
    x = torch.tensor([[1, 2], [2, 1], [3, 3], [1, 1]])
    dequantization = VariationalDequantization(LogitNormal(2), LEVELS)
    model = Dequantized(steep, dequantization)
    optimizer = torch.optim.Adam(dequantization.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-model.log_prob(x.expand(16, -1, -1)).mean()).backward()
        optimizer.step()
    cells = torch.as_tensor(
        [[stats.beta(30, 30).cdf(v + s) for s in (0.0, 1 / LEVELS)] for v in x.flatten() / LEVELS]
    )
    truth = (cells[:, 1] - cells[:, 0]).log().reshape(4, 2).sum(-1)
    with torch.no_grad():
        many = x.expand(2000, -1, -1)
        trained = model.log_prob(many, num_samples=1)
        uniform = Dequantized(steep, UniformDequantization(LEVELS)).log_prob(many)
    assert ((truth - trained.mean(0)) < 0.2 * (truth - uniform.mean(0))).all()
    error = trained.std(0) / math.sqrt(len(trained))
    assert (trained.mean(0) < truth + 5 * error).all()


def test_noise_of_images_by_a_flow_over_images() -> None:
    shape = (1, 4, 4)
    flow = ImageSplineFlow(shape, steps_per_level=1, hidden_channels=4)
    noise = ImageSplineFlow(
        shape, steps_per_level=1, hidden_channels=4, context_shape=shape, low=-0.5, high=0.5
    )
    dequantization = VariationalDequantization(noise, 256, flatten=False)
    model = DequantizedFlow(flow, dequantization)
    images = torch.randint(0, 256, (2, 3, *shape))
    assert model().log_prob(images).shape == (2, 3)
    values, log_density = model().dequantize(images, num_samples=5)
    assert values.shape == (5, 2, 3, *shape)
    assert log_density.shape == (5, 2, 3)
    # before training, independent logistic-normal pixels, and so far from uniform noise
    u = 256 * values - images
    standard = dist.TransformedDistribution(
        dist.Normal(torch.zeros(shape), 1.0), [dist.transforms.SigmoidTransform()]
    ).to_event(3)
    torch.testing.assert_close(log_density, standard.log_prob(u), rtol=0, atol=1e-6)


# A distribution of Pyro


def test_samples_have_the_probabilities_of_cells() -> None:
    model = Dequantized(_beta(), UniformDequantization(LEVELS))
    x = model.sample((20_000,))
    assert x.dtype == torch.int64
    counts = torch.bincount(LEVELS * x[:, 0] + x[:, 1], minlength=LEVELS**2)
    expected = _log_prob_of_beta(_images()).exp() * 20_000
    enough = expected > 5
    rest = expected[~enough].sum()[None], counts[~enough].sum()[None]
    result = stats.chisquare(
        torch.cat([counts[enough], rest[1]]), torch.cat([expected[enough], rest[0]])
    )
    assert result.pvalue > 1e-4


def test_draws_outside_of_the_unit_cube_go_to_the_nearest_level() -> None:
    far = dist.Normal(torch.tensor([-9.0, 9.0]), 0.1).to_event(1)
    x = Dequantized(far, UniformDequantization(256)).sample((3,))
    assert x.tolist() == [[0, 255]] * 3


@dequantizations
@pytest.mark.parametrize("batch_shape", [(), (4,), (3, 4)], ids=str)
def test_shapes(make: Callable[[], Dequantization], batch_shape: tuple[int, ...]) -> None:
    base = dist.Beta(torch.rand(*batch_shape, 2) + 1, 2.0).to_event(1)
    model = Dequantized(base, make(), num_samples=2)
    assert model.batch_shape == batch_shape
    assert model.event_shape == (2,)
    assert model.sample((6,)).shape == (6, *batch_shape, 2)
    assert model.log_prob(model.sample((6,))).shape == (6, *batch_shape)
    assert model.log_prob(torch.tensor([1, 3])).shape == batch_shape
    assert model.support.check(model.sample()).all()
    expanded = model.expand((5, *batch_shape))
    assert expanded.num_samples == 2
    assert expanded.sample().shape == (5, *batch_shape, 2)
    assert expanded.log_prob(torch.tensor([1, 3])).shape == (5, *batch_shape)


def test_a_single_number_is_an_event_too() -> None:
    base = dist.Beta(torch.tensor([2.0, 3.0, 4.0]), 2.0)
    model = Dequantized(base, UniformDequantization(LEVELS))
    assert model.log_prob(torch.tensor([0, 1, 4])).shape == (3,)
    noise = VariationalDequantization(LogitNormal(1), LEVELS)
    assert Dequantized(base, noise).log_prob(torch.tensor([[0, 1, 4]] * 2)).shape == (2, 3)


def test_the_call_is_a_distribution_of_pyro() -> None:
    probs = torch.distributions.Dirichlet(torch.ones(2, LEVELS)).sample()
    flat = dist.Uniform(torch.zeros(2), 1.0, validate_args=False).to_event(1)

    class Flow(nn.Module):
        def forward(self) -> dist.TorchDistribution:
            return Cells(probs, lambda _: flat)

    model = DequantizedFlow(Flow(), UniformDequantization(LEVELS))

    def program(data: Tensor) -> None:
        with pyro.plate("images", len(data)), poutine.scale(scale=3.0):
            pyro.sample("x", model(), obs=data)

    trace = poutine.trace(program).get_trace(_images())
    expected = 3 * model().log_prob(_images()).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_numbers_with_the_values_of_integers_are_integers(dtype: torch.dtype) -> None:
    probs = torch.distributions.Dirichlet(torch.ones(2, LEVELS)).sample()
    flat = dist.Uniform(torch.zeros(2), 1.0, validate_args=False).to_event(1)
    model = Dequantized(Cells(probs, lambda _: flat), UniformDequantization(LEVELS))
    torch.testing.assert_close(model.log_prob(_images().to(dtype)), model.log_prob(_images()))


def test_flows_start_from_integers() -> None:
    flow = ImageSplineFlow((1, 4, 4), levels=1, steps_per_level=1, hidden_channels=4)
    model = DequantizedFlow(flow, UniformDequantization(8))
    images = torch.randint(0, 3, (100, 1, 4, 4))
    before = model().log_prob(images).mean()
    model.initialize(images)
    assert model().log_prob(images).mean() > before
    other = DequantizedFlow(
        ImageSplineFlow((1, 4, 4), levels=1, steps_per_level=1, hidden_channels=4),
        UniformDequantization(8),
    )
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    expected = model().log_prob(images)
    torch.manual_seed(0)
    torch.testing.assert_close(other().log_prob(images), expected, rtol=0, atol=0)


def test_bits_per_dimension() -> None:
    bytes_ = Dequantized(
        dist.Uniform(torch.zeros(3, 4, 4), 1.0).to_event(3), UniformDequantization(256)
    )
    x = bytes_.sample((10,))
    torch.testing.assert_close(bits_per_dimension(bytes_.log_prob(x), 48), torch.full((10,), 8.0))
    with pytest.raises(ValueError, match="num_dimensions must be at least 1, got 0"):
        bits_per_dimension(torch.zeros(1), 0)


# Bad input


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-1.0, "-1.0"), (5.0, "5.0"), (1.5, "1.5"), (math.nan, "nan"), (math.inf, "inf")],
)
@dequantizations
def test_values_that_are_no_levels(
    make: Callable[[], Dequantization], value: float, shown: str
) -> None:
    model = Dequantized(_beta(), make())
    x = torch.tensor([[0.0, 1.0], [value, 2.0]])
    with pytest.raises(ValueError, match=f"integers from 0 to 4, got {shown}; scale the data"):
        model.log_prob(x)


def test_integers_that_are_no_levels() -> None:
    model = Dequantized(_beta(), UniformDequantization(LEVELS))
    with pytest.raises(ValueError, match=r"integers from 0 to 4, got 255"):
        model.log_prob(torch.tensor([0, 255], dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(3,), (5, 1), ()], ids=str)
def test_values_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    model = Dequantized(_beta(), UniformDequantization(LEVELS))
    with pytest.raises(ValueError, match=r"event shape \(2,\) on the right"):
        model.log_prob(torch.zeros(shape))


@pytest.mark.parametrize("levels", [1, 0, -3])
def test_there_are_at_least_two_levels(levels: int) -> None:
    with pytest.raises(ValueError, match=f"levels must be at least 2, got {levels}"):
        UniformDequantization(levels)
    with pytest.raises(ValueError, match=f"levels must be at least 2, got {levels}"):
        VariationalDequantization(LogitNormal(2), levels)


def test_there_is_at_least_one_sample() -> None:
    model = Dequantized(_beta(), UniformDequantization(LEVELS))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        model.log_prob(torch.zeros(2), num_samples=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        Dequantized(_beta(), UniformDequantization(LEVELS), num_samples=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got -1"):
        DequantizedFlow(LogitNormal(2), UniformDequantization(LEVELS), num_samples=-1)


class _Fixed(nn.Module):
    def __init__(self, distribution: dist.TorchDistribution) -> None:
        super().__init__()
        self.distribution = distribution

    def forward(self, context: Tensor) -> dist.TorchDistribution:
        return self.distribution


def test_noise_of_another_shape() -> None:
    noise = VariationalDequantization(_Fixed(dist.Normal(torch.zeros(3), 1.0)), LEVELS)
    with pytest.raises(ValueError, match=r"of shape \(25, 2\), must return .* event_shape \(\)"):
        Dequantized(_beta(), noise).log_prob(_images())


def test_noise_needs_gradients_through_draws() -> None:
    poisson = dist.Poisson(torch.ones(25, 2)).to_event(1)
    noise = VariationalDequantization(_Fixed(poisson), LEVELS)
    with pytest.raises(TypeError, match="has no rsample"):
        Dequantized(_beta(), noise).log_prob(_images())
