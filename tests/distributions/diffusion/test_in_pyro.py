"""Score flows as distributions of Pyro: shapes, sites, inference, saving."""

import copy
import io
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, Predictive
from torch import Tensor

from pyro_ext.distributions import ScoreFlow
from pyro_ext.distributions.diffusion import SDE, VPSDE, OdeSettings
from pyro_ext.distributions.diffusion.score import NoiseLevel
from tests.distributions.diffusion.problems import FADED, SDES, Mixture, known_flow
from tests.statistics import assert_moments

FAST = OdeSettings(solver="euler", num_steps=3)


def random_flow(event_shape: Any = 2, **settings: Any) -> ScoreFlow:
    """A small flow whose network is not at its start."""
    flow = ScoreFlow(event_shape, hidden_features=8, residual_blocks=1, ode=FAST, **settings)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return flow


def test_shapes_without_context() -> None:
    d = random_flow()()
    assert (d.batch_shape, d.event_shape) == ((), (2,))
    for shape in ((), (5,), (3, 5)):
        x = d.sample(shape)
        assert x.shape == (*shape, 2)
        assert d.log_prob(x).shape == shape
        assert d.elbo(x, 2).value.shape == shape
        assert d.score(x).shape == x.shape
        found = d.density(x)
        assert (found.noise.shape, found.num_evaluations.shape) == (x.shape, shape)


def test_shapes_with_context() -> None:
    flow, context = random_flow(context_features=3), torch.randn(4, 1, 3)
    d = flow(context)
    assert d.batch_shape == (4, 1)
    x = d.sample((6,))
    assert x.shape == (6, 4, 1, 2)
    assert d.log_prob(torch.randn(7, 2)).shape == (4, 7)
    wide = d.expand([4, 5])
    assert wide.sample((2,)).shape == (2, 4, 5, 2)
    one = flow(context[2, 0]).log_prob(x[0, 2, 0])
    torch.testing.assert_close(d.log_prob(x)[0, 2, 0], one)


@pytest.mark.parametrize("event_shape", [(1, 4, 4), (3, 5, 7)], ids=str)
def test_images(event_shape: tuple[int, ...]) -> None:
    flow = random_flow(event_shape, context_features=2)
    images, context = torch.randn(6, *event_shape), torch.randn(6, 2)
    flow.initialize(images)
    assert flow.loc.shape == (event_shape[0], 1, 1)
    assert flow.training_loss(images, context).shape == ()
    d = flow(context)
    assert d.sample((2,)).shape == (2, 6, *event_shape)
    assert d.log_prob(images, trace="hutchinson").shape == (6,)


def test_no_data_are_no_work() -> None:
    d = random_flow()()
    assert d.log_prob(torch.randn(0, 2)).shape == (0,)
    assert d.sample((0,)).shape == (0, 2)


def test_a_site_in_a_plate_and_predictive() -> None:
    flow = random_flow()
    data = torch.randn(10, 2)

    def model(x: Tensor | None = None) -> Tensor:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 10):
            z = pyro.sample("z", flow(), obs=x)
        return pyro.sample("y", dist.Normal(scale * z.sum(), 1.0))

    trace = pyro.poutine.trace(model).get_trace(data)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (10,)
    draws = Predictive(model, num_samples=3)()
    assert draws["z"].shape == (3, 10, 2)
    scaled = pyro.poutine.scale(model, 0.5)
    other = pyro.poutine.trace(scaled).get_trace(data)
    other.compute_log_prob()
    torch.testing.assert_close(
        0.5 * trace.nodes["z"]["log_prob_sum"], other.nodes["z"]["log_prob_sum"]
    )


def test_as_a_prior_by_the_noise_of_the_equation() -> None:
    """A model samples standard normal noise, and the flow makes the unknown of it."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    prior = Mixture(torch.ones(1), torch.tensor([[0.5, -0.5]]), covariance[None])
    flow = known_flow(prior, FADED["vp"])

    def model() -> None:
        with pyro.plate("draws", 4000):
            noise = pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            x = pyro.deterministic("x", flow().to_data(noise, solver="rk4", num_steps=25))
            pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=torch.full((4000,), 1.2))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    # draws of the prior, resampled by their likelihood, are draws of the posterior
    weights = trace.nodes["y"]["log_prob"].detach().softmax(-1)
    x = trace.nodes["x"]["value"].detach()[torch.multinomial(weights, 1000)]
    gain = covariance[:, 0] / (covariance[0, 0] + 0.25)
    mean = prior.means[0] + gain * (1.2 - prior.means[0, 0])
    expected = covariance - torch.outer(gain, covariance[0])
    assert_moments(x[None], mean, covariance=expected, name="x")


def test_gradients_reach_the_noise_of_the_equation() -> None:
    """Of a Gaussian prior the map is linear, with the covariance as its square."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    prior = Mixture(torch.ones(1), torch.tensor([[0.5, -0.5]]), covariance[None])
    flow = known_flow(prior, FADED["vp"])
    jacobian = torch.autograd.functional.jacobian(
        lambda noise: flow().to_data(noise, solver="rk4", num_steps=50), torch.randn(2)
    )
    torch.testing.assert_close(jacobian @ jacobian.T, covariance, atol=1e-3, rtol=0)


def test_as_a_prior_by_its_density() -> None:
    """Gradients of the density, through the solution of the equation, are the posterior's."""
    prior = Mixture(torch.ones(1), torch.tensor([[0.5]]), torch.tensor([[[0.7]]]))
    flow = known_flow(prior, FADED["vp"])

    def model() -> None:
        x = pyro.sample("x", flow())
        pyro.sample("y", dist.Normal(x[0], 0.5), obs=torch.tensor(1.2))

    value = torch.tensor([0.9], requires_grad=True)
    conditioned = pyro.poutine.condition(model, {"x": value})
    log_joint = pyro.poutine.trace(conditioned).get_trace().log_prob_sum()
    gradient = torch.autograd.grad(log_joint, value)[0]
    expected = -(0.9 - 0.5) / 0.7 + (1.2 - 0.9) / 0.25
    assert float(gradient) == pytest.approx(expected, abs=1e-2)


class Gaussian(torch.nn.Module):
    """The score of independent Gaussians, in few operations."""

    def __init__(self, sde: SDE, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.sde, self.mean, self.variance = sde, mean, variance

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        a, std = self.sde.mean_factor(t)[:, None], self.sde.std(t)[:, None]
        return (a * self.mean - x) / (a.square() * self.variance + std.square())


def _gaussian(mean: Tensor, variance: Tensor, **settings: Any) -> ScoreFlow:
    sde = VPSDE(start=1e-2)
    ode = OdeSettings(solver="rk4", num_steps=4, **settings)
    network = Gaussian(sde, mean, variance)
    return ScoreFlow(len(mean), network, sde=sde, parametrization="score", ode=ode)


def _draws(model: Any, site: str, step_size: float, num_samples: int) -> Tensor:
    """Draws by Hamiltonian Monte Carlo of a site of many problems side by side."""
    kernel = HMC(
        model, step_size=step_size, num_steps=4, adapt_step_size=False, adapt_mass_matrix=False
    )
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=8, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()[site].transpose(0, 1)


def test_hamiltonian_monte_carlo_over_the_noise_of_the_equation() -> None:
    """Of a Gaussian prior and likelihood the posterior is known, for the map as it is solved."""
    mean, variance = torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.3])
    flow, number = _gaussian(mean, variance), 100

    def model() -> None:
        with pyro.plate("problems", number):
            noise = pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            x = flow().to_data(noise)
            pyro.sample("y", dist.Normal(x.sum(-1), 0.7), obs=torch.full((number,), 1.2))

    noise = _draws(model, "noise", 0.35, 12)
    with torch.no_grad():
        x = flow().to_data(noise)
        # the map is linear: the prior that the solver makes of standard normal noise
        origin, *ends = flow().to_data(torch.cat([torch.zeros(1, 2), torch.eye(2)]))
    covariance = torch.diag((torch.stack(ends) - origin).diagonal().square())
    torch.testing.assert_close(covariance.diagonal(), variance, atol=0.01, rtol=0)
    torch.testing.assert_close(origin, mean, atol=0.01, rtol=0)
    gain = covariance.sum(0) / (covariance.sum() + 0.49)
    expected = origin + gain * (1.2 - origin.sum())
    assert_moments(
        x, expected, covariance=covariance - torch.outer(gain, covariance.sum(0)), name="x"
    )


def test_hamiltonian_monte_carlo_over_the_data_with_the_score() -> None:
    """Steps follow the learned score, and the density decides."""
    flow = _gaussian(torch.tensor([0.5]), torch.tensor([0.7]), score_gradient=True)
    number = 150

    def model() -> None:
        with pyro.plate("problems", number):
            x = pyro.sample("x", flow())
            pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=torch.full((number,), 1.2))

    x = _draws(model, "x", 0.2, 12)
    precision = 1 / 0.7 + 1 / 0.25
    mean = (0.5 / 0.7 + 1.2 / 0.25) / precision
    assert_moments(x, torch.tensor([mean]), covariance=torch.tensor([[1 / precision]]), name="x")


def test_the_score_as_the_gradient_of_the_density() -> None:
    prior = Mixture(torch.ones(1), torch.tensor([[0.5, 0.0]]), 0.7 * torch.eye(2)[None])
    flow = known_flow(prior, FADED["vp"])
    flow.loc.copy_(torch.tensor([3.0, -1.0]))
    flow.scale.copy_(torch.tensor([2.0, 0.1]))
    x = (flow.loc + flow.scale * torch.randn(4, 2)).requires_grad_()
    plain, fast = (flow().log_prob(x, score_gradient=choice) for choice in (False, True))
    torch.testing.assert_close(plain, fast)
    gradients = [torch.autograd.grad(log_prob.sum(), x)[0] for log_prob in (plain, fast)]
    torch.testing.assert_close(gradients[1], flow().score(x).detach())
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_weights_go_to_a_file_and_back() -> None:
    flow, x = random_flow(context_features=1), torch.randn(5, 2)
    flow.initialize(torch.randn(50, 2) * 3 + 1)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = random_flow(context_features=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    context = torch.randn(5, 1)
    assert torch.equal(flow(context).log_prob(x), other(context).log_prob(x))
    again = copy.deepcopy(flow)
    assert torch.equal(flow(context).log_prob(x), again(context).log_prob(x))


@pytest.mark.usefixtures("float32")
def test_single_precision() -> None:
    flow = ScoreFlow(2, hidden_features=8, residual_blocks=1)
    x = torch.randn(20, 2)
    with torch.no_grad():
        found = flow().density(x)
    assert found.log_prob.dtype == torch.float32
    # the network is zero at the start: data are standard normal
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(found.log_prob, expected, atol=1e-3, rtol=0)
    assert flow().sample((3,)).dtype == torch.float32


def test_both_parametrizations_of_the_noise_agree() -> None:
    """The same score, whatever the output of the network stands for."""
    sde = FADED["vp"]
    mixture = Mixture(torch.ones(1), torch.zeros(1, 2), 0.4 * torch.eye(2)[None])
    x, t = torch.randn(6, 2), torch.linspace(0.01, 1.0, 6)
    expected = mixture.score(sde, x, t)

    class Noise(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
            return -sde.std(t)[:, None] * mixture.score(sde, x, t)

    class Velocity(torch.nn.Module):
        def forward(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Tensor:
            t = sde.time(u)
            a, std = sde.mean_factor(t)[:, None], sde.std(t)[:, None]
            total = (a.square() + std.square()).sqrt()
            noise = -std * mixture.score(sde, x * total, t)
            # the expected velocity, from the expected noise and datum
            datum = (x * total - std * noise) / a
            return (a * noise - std * datum) / total

    for name, network in {"noise": Noise(), "velocity": Velocity()}.items():
        flow = ScoreFlow(2, network, sde=sde, parametrization=name)
        torch.testing.assert_close(flow().score(x, t), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
@pytest.mark.parametrize("parametrization", ["velocity", "noise"])
def test_the_noise_in_what_a_network_reads(name: str, parametrization: str) -> None:
    sde = SDES[name]
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
            seen.append((x, t))
            return 0 * x

    flow = ScoreFlow(1, Spy(), sde=sde, parametrization=parametrization)
    noise = torch.randn(20, 1)
    for t in (sde.start, 0.3, 1.0):
        times = torch.full((len(noise),), t)
        flow.score_of(None)(sde.std(times)[:, None] * noise, times, torch.arange(len(noise)))
        x, time = seen[-1]
        expected = NoiseLevel(sde, parametrization)(time) * noise[:, 0]
        torch.testing.assert_close(x[:, 0], expected)
