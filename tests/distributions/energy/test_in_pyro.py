"""Energy machines at their places in Pyro: likelihood, prior, plates, handlers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from pyro_ext.distributions import AutoregressiveEnergyMachine, NeuralSplineFlow
from pyro_ext.training import fit_density
from tests.distributions.energy.problems import machine, random_machine

pytestmark = pytest.mark.usefixtures("param_store")


def test_svi_learns_a_likelihood() -> None:
    aem = machine(2, num_importance_samples=5)
    data = 5.0 + 0.3 * torch.randn(100, 2)
    aem.initialize(data)

    def model(data: Tensor) -> None:
        pyro.module("aem", aem)
        with pyro.plate("data", len(data)):
            pyro.sample("x", aem(), obs=data)

    svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_conditional_machine_in_plates_with_scale_and_mask() -> None:
    aem = random_machine(2, 3)
    context, x = torch.randn(4, 3), torch.randn(4, 2)
    mask = torch.tensor([True, False, True, True])

    def model() -> None:
        with pyro.plate("rows", 4), poutine.scale(scale=0.5), poutine.mask(mask=mask):
            pyro.sample("x", aem(context), obs=x)

    with torch.no_grad(), aem.evaluation(exact=True):
        total = poutine.trace(model).get_trace().log_prob_sum()
        expected = 0.5 * aem(context).log_prob(x)[mask].sum()
    torch.testing.assert_close(total, expected)


def test_draws_of_a_prior_have_the_shapes_of_plates() -> None:
    aem = random_machine(2)

    def model() -> None:
        with pyro.plate("rows", 4):
            pyro.sample("x", aem())

    draws = Predictive(model, num_samples=5)()["x"]
    assert draws.shape == (5, 4, 2)


def test_a_machine_as_the_prior_of_a_trained_autoencoder() -> None:
    """Nash and Durkan 2019, section 4.4: fitted to draws of the aggregate posterior, post hoc."""
    decoder = nn.Linear(1, 2)
    signs = torch.randint(2, (1000, 1)) * 2.0 - 1.0
    x = decoder(2.0 * signs).detach() + 0.1 * torch.randn(1000, 2)

    def posterior() -> Tensor:
        """Draws of q(z | x), of which the exact one is nearly a point here."""
        return 2.0 * signs + 0.1 * torch.randn(1000, 1)

    prior = machine(1, mixture_components=2)
    loss = AutoregressiveEnergyMachine.training_loss
    fit_density(prior, posterior(), loss=loss, num_steps=100, learning_rate=1e-2, progress=False)
    prior.eval()

    def elbo(prior_of_z: dist.TorchDistribution) -> float:
        def model() -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior_of_z)
                pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=x)

        def guide() -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(2.0 * signs, 0.1).to_event(1))

        with torch.no_grad(), prior.evaluation(exact=True):
            return -Trace_ELBO().loss(model, guide) / len(x)

    standard = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
    assert elbo(prior()) > elbo(standard) + 1.0


def test_a_machine_as_the_base_of_a_flow() -> None:
    """Whose linear maps find better axes; trained through `log_prob` alone, gradients included."""
    aem = machine(2, num_importance_samples=5)
    flow = NeuralSplineFlow(2, transforms=1, base=aem, hidden_features=8)
    data = torch.randn(200, 2) @ torch.tensor([[2.0, 1.9], [0.0, 0.3]])
    result = fit_density(flow, data, num_steps=40, learning_rate=2e-2, progress=False)
    assert result.losses[-5:].mean() < result.losses[:5].mean()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    flow.eval()
    with torch.no_grad(), aem.evaluation(exact=True):
        z, log_det = flow.bijection.to_noise(data)
        torch.testing.assert_close(flow().log_prob(data), aem().log_prob(z) + log_det)
    assert flow().sample((3,)).shape == (3, 2)
