import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ext import NeuralPosteriorEstimator
from pyro_ext.infer.contrastive.inspection import inspect_model
from pyro_ext.infer.contrastive.observations import ObservationEncoder

DEGREES = torch.tensor([1.0, 2.5])  # one without a mean, one without a fourth moment
NOISE = 0.3


def test_features_of_light_tails_are_standardised() -> None:
    x = 3.0 + 0.1 * torch.randn(10_000, 2)
    features = _encoder(x)(x)
    assert features.mean(0).abs().max() < 0.01
    # half a per cent on either side, moved in, is 1.5 % of the deviation
    assert (features.std(0) - 1.0).abs().max() < 0.03
    # and an affine map
    y = x[:2].mean(0, keepdim=True)
    torch.testing.assert_close(_encoder(x)(y), features[:2].mean(0, keepdim=True))


def test_outliers_neither_set_the_unit_nor_leave_the_rest_behind() -> None:
    x = torch.randn(10_000, 2)
    outlying = x.clone()
    outlying[::1000] = 1e6 * outlying[::1000].sign()
    torch.testing.assert_close(_encoder(outlying)(x[1:9]), _encoder(x)(x[1:9]), atol=0.02, rtol=0)
    far = _encoder(outlying)(outlying[::1000])
    assert far.abs().min() > 5.0
    assert far.abs().max() < 25.0
    assert torch.equal(far.sign(), outlying[::1000].sign())


def test_features_keep_order_and_slope_beyond_the_limit() -> None:
    encoder = _encoder(torch.randn(1000, 2))
    z = torch.linspace(-20.0, 20.0, 4001)
    x = (encoder.loc + encoder.scale * z[:, None]).requires_grad_()
    features = encoder(x)
    (slopes,) = torch.autograd.grad(features.sum(), x)
    slopes = slopes * encoder.scale
    assert (features.diff(dim=0) > 0).all()
    assert (slopes[z.abs() < 4.9] - 1.0).abs().max() < 1e-12
    assert slopes.diff(dim=0).abs().max() < 0.011  # (1 + |z| - 5) ** -1 at steps of 0.01
    torch.testing.assert_close(slopes[-1], torch.full((2,), 1.0 / 16.0))


def test_counts_of_rare_events_and_constants_keep_a_unit() -> None:
    x = torch.zeros(1000, 2)
    x[::250, 0] = 1.0
    x[:, 1] = 0.1
    encoder = _encoder(x)
    torch.testing.assert_close(encoder.scale[0], x[:, 0].std(correction=0))
    assert encoder(x)[0, 0] > 5.0
    assert encoder.scale[1] == 1.0
    assert encoder(x)[:, 1].abs().max() < 1e-12


def test_networks_of_the_user_get_all_of_an_outlier() -> None:
    x = torch.randn(1000, 2)
    x[0] = 1e4
    features = _encoder(x, nn.Identity())(x)
    assert features[0].min() > 5e3


@pytest.mark.filterwarnings("ignore:The observation is far")
def test_posterior_given_outputs_without_moments() -> None:
    torch.manual_seed(0)
    estimator = NeuralPosteriorEstimator(_heavy_tails, observed=["x"])
    estimator.simulate(2000)
    estimator.fit()
    new = estimator.simulate(500)
    theta, x = new.latents["theta"], new.observations["x"]
    grid = torch.linspace(-6.0, 6.0, 1201)[:, None]
    log_evidence = _log_joint(grid, x).logsumexp(0) + math.log(0.01)
    exact = _log_joint(theta, x) - log_evidence
    with torch.no_grad():
        learned = [estimator.posterior(x[i]).log_prob({"theta": theta[i]}) for i in range(len(x))]
    divergence = float((exact - torch.stack(learned)).mean())
    assert divergence < 0.12, f"the learned posteriors are {divergence:.3f} nats off"


def _heavy_tails() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.StudentT(DEGREES.to(theta), theta[..., None], NOISE).to_event(1))


def _log_joint(theta: Tensor, x: Tensor) -> Tensor:
    likelihood = dist.StudentT(DEGREES, theta[..., None], NOISE).to_event(1)
    return dist.Normal(0.0, 1.0).log_prob(theta) + likelihood.log_prob(x)


def _encoder(x: Tensor, network: nn.Module | None = None) -> ObservationEncoder:
    """An encoder of two numbers that is standardised by data."""

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0).expand([2]).to_event(1))

    encoder = ObservationEncoder(inspect_model(model, ["x"], None, ()), network)
    encoder.standardize(x)
    return encoder
