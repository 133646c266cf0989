"""The sampler against exact distributions on manifolds that are known in closed form."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from tests.sampling import sample
from tests.statistics import Quadrature, assert_distribution, assert_moments

# -- linear generators ---------------------------------------------------------------------------


def linear_problem(dim: int, num_outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prior mean and standard deviations of the inputs, a matrix, and outputs to condition on."""
    generator = torch.Generator().manual_seed(dim)
    loc = torch.randn(dim, generator=generator)
    scale = 0.5 + 2 * torch.rand(dim, generator=generator)
    matrix = torch.randn(num_outputs, dim, generator=generator)
    return loc, scale, matrix, 2 * torch.randn(num_outputs, generator=generator)


def gaussian_conditional(
    loc: Tensor, covariance: Tensor, matrix: Tensor, noise: Tensor, observed: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``x`` given that ``matrix @ x`` plus noise is ``observed``."""
    gain = torch.linalg.solve(matrix @ covariance @ matrix.T + noise, matrix @ covariance).T
    return loc + gain @ (observed - matrix @ loc), covariance - gain @ matrix @ covariance


@pytest.mark.parametrize(
    ("dim", "num_outputs"), [(2, 1), (5, 2), (12, 9), (30, 4)], ids=lambda n: str(n)
)
def test_linear_generator_gives_the_conditional_normal(dim: int, num_outputs: int) -> None:
    loc, scale, matrix, observed = linear_problem(dim, num_outputs)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(loc, scale).to_event(1))
        pyro.deterministic("y", matrix @ x)

    draws = sample(model, {"y": observed})["x"]
    noise = torch.zeros(num_outputs, num_outputs)
    mean, covariance = gaussian_conditional(loc, scale.square().diag(), matrix, noise, observed)
    assert_moments(draws, mean, covariance=covariance, min_ess=1500, name="x")


def test_several_sites_outputs_and_an_observed_site() -> None:
    """Of any shape; the observed site stays a factor of the density."""
    loc, _, matrix, observed = linear_problem(9, 4)
    prior = torch.eye(9) + 0.5 * torch.ones(9, 9)
    prior[3:, :3] = prior[:3, 3:] = 0
    tril = torch.linalg.cholesky(prior[:3, :3])
    noise_scale = 0.3

    def model() -> None:
        a = pyro.sample("a", dist.MultivariateNormal(loc[:3], scale_tril=tril))
        b = pyro.sample("b", dist.MultivariateNormal(loc[3:], prior[3:, 3:]))
        x = torch.cat([a, b])
        y = matrix @ x
        pyro.deterministic("vector", y[:2])
        pyro.sample("noisy", dist.Normal(y[2], noise_scale), obs=observed[2])
        pyro.deterministic("scalar", y[3])

    draws = sample(model, {"vector": observed[:2], "scalar": observed[3]})
    noise = torch.diag(torch.tensor([0.0, 0.0, noise_scale**2, 0.0]))
    mean, covariance = gaussian_conditional(loc, prior, matrix, noise, observed)
    x = torch.cat([draws["a"], draws["b"]], -1)
    assert_moments(x, mean, covariance=covariance, min_ess=1500, name="x")


# -- circle, sphere, torus -----------------------------------------------------------------------

OUTPUTS = {
    "norm": lambda x: x.norm(),
    "square": lambda x: x.square().sum(),
    "log": lambda x: x.square().sum().log(),
}
RADIUS = 1.7
# short enough steps for every projection to have a solution: a batch waits for the slowest chain
SHORT_STEPS = {"step_size": 0.6, "adapt_step_size": False, "num_steps": 3, "warmup_steps": 5}


def sphere_model(dim: int, output: str) -> tuple[Callable[[], None], dict[str, Tensor]]:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
        pyro.deterministic("output", OUTPUTS[output](x))

    return model, {"output": OUTPUTS[output](torch.tensor([RADIUS]))}


@pytest.mark.parametrize("output", OUTPUTS)
def test_circle_is_uniform(output: str) -> None:
    x = sample(*sphere_model(2, output), **SHORT_STEPS)["x"]
    assert_moments(
        x, torch.zeros(2), covariance=RADIUS**2 / 2 * torch.eye(2), min_ess=800, name="x"
    )
    angle = torch.atan2(x[..., 1], x[..., 0])
    assert_distribution(angle, scipy.stats.uniform(-np.pi, 2 * np.pi).cdf, name="angle")


def test_sphere_is_uniform() -> None:
    x = sample(*sphere_model(3, "square"), **SHORT_STEPS)["x"]
    assert_moments(
        x, torch.zeros(3), covariance=RADIUS**2 / 3 * torch.eye(3), min_ess=800, name="x"
    )
    # Archimedes: every coordinate of a uniform point on a sphere is uniform
    height = scipy.stats.uniform(-RADIUS, 2 * RADIUS).cdf
    assert_distribution(x[..., 2], height, name="height")
    angle = torch.atan2(x[..., 1], x[..., 0])
    assert_distribution(angle, scipy.stats.uniform(-np.pi, 2 * np.pi).cdf, name="longitude")


TUBE, RING = 0.8, 1.5


def distance_to_ring(x: Tensor) -> Tensor:
    """Squared; the gradient has the same length all over the torus."""
    return (x[..., :2].norm(dim=-1) - RING).square() + x[..., 2].square()


def quartic(x: Tensor) -> Tensor:
    """A polynomial with the same zeros; its gradient grows with the distance to the axis."""
    sphere = x.square().sum(-1) + RING**2 - TUBE**2
    return sphere.square() - 4 * RING**2 * x[..., :2].square().sum(-1)


def torus_point(around_tube: Tensor, around_axis: Tensor) -> Tensor:
    ring = RING + TUBE * around_tube.cos()
    return torch.stack(
        [ring * around_axis.cos(), ring * around_axis.sin(), TUBE * around_tube.sin()], -1
    )


def uniform() -> dist.Distribution:
    return dist.Uniform(-3.0, 3.0).expand([3])


def normal() -> dist.Distribution:
    return dist.Normal(0.0, 1.0).expand([3])


def tilted() -> dist.Distribution:
    return dist.Normal(torch.tensor([0.8, 0.0, 0.4]), torch.tensor([1.0, 1.5, 1.0]))


@pytest.mark.parametrize(
    ("constraint", "value", "steepness", "prior"),
    [
        pytest.param(distance_to_ring, TUBE**2, torch.ones_like, uniform, id="distance, uniform"),
        pytest.param(quartic, 0.0, torch.clone, uniform, id="quartic, uniform"),
        pytest.param(quartic, 0.0, torch.clone, normal, id="quartic, normal"),
        pytest.param(distance_to_ring, TUBE**2, torch.ones_like, tilted, id="distance, tilted"),
    ],
)
def test_torus(
    constraint: Callable[[Tensor], Tensor],
    value: float,
    steepness: Callable[[Tensor], Tensor],
    prior: Callable[[], dist.Distribution],
) -> None:
    r"""
    The density with respect to the surface element is :math:`p(x) / |\nabla F(x)|`.

    It depends on how the constraint is written. Uniform inputs and the distance make it uniform on
    the surface, uniform inputs and the polynomial make it uniform in both angles.
    """

    def model() -> None:
        x = pyro.sample("x", prior().to_event(1))
        pyro.deterministic("output", constraint(x))

    def log_density(around_tube: Tensor, around_axis: Tensor) -> Tensor:
        ring = RING + TUBE * around_tube.cos()
        log_prior = prior().log_prob(torus_point(around_tube, around_axis)).sum(-1)
        return log_prior + ring.log() - steepness(ring).log()

    circle = (-np.pi, np.pi, 1000)
    truth = Quadrature(log_density, circle, circle)
    x = sample(model, {"output": value}, **SHORT_STEPS | {"step_size": 0.12, "num_steps": 6})["x"]

    def coordinate(i: int) -> Callable[..., Tensor]:
        return lambda *angles: torus_point(*angles)[..., i]

    mean = torch.tensor([truth.mean(coordinate(i)) for i in range(3)])
    products = [
        truth.mean(lambda *angles, i=i, j=j: coordinate(i)(*angles) * coordinate(j)(*angles))
        for i in range(3)
        for j in range(3)
    ]
    covariance = torch.tensor(products).reshape(3, 3) - torch.outer(mean, mean)
    assert_moments(x, mean, covariance=covariance, min_ess=300, name="x")
    around_tube = torch.atan2(x[..., 2], x[..., :2].norm(dim=-1) - RING)
    around_axis = torch.atan2(x[..., 1], x[..., 0])
    assert_distribution(around_tube, truth.cdf(0), min_ess=300, name="angle around the tube")
    assert_distribution(around_axis, truth.cdf(1), min_ess=300, name="angle around the axis")


# -- a skewed target -----------------------------------------------------------------------------

OBSERVED = 1.5


def location(z: Tensor) -> Tensor:
    return 0.7 * z.exp() - 0.4 * z.square()


def spread(z: Tensor) -> Tensor:
    return 0.5 + 0.4 * torch.sigmoid(3 * z)


def skewed_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", location(z) + spread(z) * noise)


def delta_model() -> None:
    """The same, with the output as a sample site with a Delta distribution."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Delta(location(z) + spread(z) * noise))


def bent_model() -> None:
    """The same posterior from an output on another scale, which a sampler may not notice."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    y = location(z) + spread(z) * noise
    pyro.deterministic("y", OBSERVED + 3 * torch.sinh(y - OBSERVED))


def skewed_truth() -> Quadrature:
    def log_density(z: Tensor) -> Tensor:
        normal = dist.Normal(0.0, 1.0)
        return normal.log_prob(z) + dist.Normal(location(z), spread(z)).log_prob(
            torch.tensor(OBSERVED)
        )

    return Quadrature(log_density, (-8.0, 8.0, 20000))


SETTINGS = {
    "default": {},
    "newton": {"projection": "newton"},
    "inner steps": {"num_inner_steps": 2},
    "mass matrix": {"adapt_mass_matrix": True},
    "long steps": {"num_steps": 1, "step_size": 1.2, "adapt_step_size": False},
    "reverse mode": {"jacobian_mode": "reverse"},
    "low target": {"target_accept_prob": 0.6},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_skewed_target(settings: dict[str, Any]) -> None:
    check_skewed(sample(skewed_model, {"y": OBSERVED}, num_samples=120, **settings))


@pytest.mark.parametrize("model", [delta_model, bent_model])
def test_skewed_target_written_otherwise(model: Callable[[], None]) -> None:
    check_skewed(sample(model, {"y": OBSERVED}))


def check_skewed(draws: dict[str, Tensor]) -> None:
    truth = skewed_truth()
    z, noise = draws["z"], draws["noise"]

    def noise_of(z: Tensor) -> Tensor:
        return (OBSERVED - location(z)) / spread(z)

    assert_moments(z, truth.mean(), truth.sd(), min_ess=1000, name="z")
    assert_moments(noise, truth.mean(noise_of), truth.sd(noise_of), min_ess=1000, name="noise")
    assert_distribution(z, truth.cdf(), name="z")
