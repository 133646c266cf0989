"""Flows over images: exact densities, start from data, contexts, use inside Pyro, bad input."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.distributions.dequantization import DequantizedFlow, UniformDequantization
from pyro_ext.distributions.image_flow import ImageSplineFlow
from pyro_ext.distributions.transforms.image import ActNorm

SMALL: dict[str, Any] = {"steps_per_level": 1, "hidden_channels": 12, "residual_blocks": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "affine": {"spline": "affine"},
    "one level": {"levels": 1, "steps_per_level": 2},
    "nothing leaves": {"factor_out": False},
    "range": {"low": -2.0, "high": 3.0},
    "vector context": {"context_shape": (3,)},
    "image context": {"context_shape": (2, 4, 4)},
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def _flow(
    image_shape: tuple[int, ...] = (1, 4, 4), *, scale: float = 0.2, **setting: Any
) -> ImageSplineFlow:
    """A small flow whose parameters are not those it starts with."""
    flow = ImageSplineFlow(image_shape, **{**SMALL, **setting})
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow


def _context(flow: ImageSplineFlow, batch_shape: tuple[int, ...] = ()) -> Tensor | None:
    return torch.randn(batch_shape + flow.context_shape) if flow.context_shape else None


@settings
def test_log_prob_is_the_density_of_transformed_noise(setting: dict[str, Any]) -> None:
    flow = _flow(**setting)
    context = _context(flow)
    flat = None if context is None else context.flatten()
    x = flow(context).sample()

    def to_noise(vector: Tensor) -> Tensor:
        return flow.bijection.to_noise(vector.reshape(1, 4, 4), flat)[0]

    jacobian = torch.func.jacrev(to_noise)(x.flatten())
    noise = dist.Normal(torch.zeros(16), 1.0).to_event(1)
    expected = noise.log_prob(to_noise(x.flatten())) + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(flow(context).log_prob(x), expected, rtol=0, atol=1e-8)


@settings
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
def test_shapes(setting: dict[str, Any], batch_shape: tuple[int, ...]) -> None:
    flow = _flow(**setting)
    density = flow(_context(flow, batch_shape))
    expected = batch_shape if flow.context_shape else ()
    assert density.batch_shape == expected
    assert density.event_shape == (1, 4, 4)
    x = density.sample((5,))
    assert x.shape == (5, *expected, 1, 4, 4)
    assert density.log_prob(x).shape == (5, *expected)


@settings
def test_draws_are_scored_with_their_density(setting: dict[str, Any]) -> None:
    flow = _flow(**setting)
    density = flow(_context(flow, (2,)))
    x, log_prob = density.rsample_and_log_prob((7,))
    torch.testing.assert_close(density.log_prob(x), log_prob, rtol=0, atol=1e-8)


@settings
def test_gradients_reach_every_parameter(setting: dict[str, Any]) -> None:
    flow = _flow(**setting)
    flow(_context(flow, (30,))).log_prob(torch.rand(30, 1, 4, 4)).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("spline", ["rational_quadratic", "affine"])
def test_densities_integrate_to_one(spline: str) -> None:
    """By importance sampling: a mean of weights, within five of its standard errors."""
    flow = _flow((1, 2, 2), levels=1, steps_per_level=2, spline=spline, scale=0.15)
    with torch.no_grad():
        draws = flow().sample((20_000,)).flatten(1)
        # heavier tails than those of the flow, which are normal
        proposal = dist.MultivariateStudentT(
            torch.tensor(5.0), draws.mean(0), torch.linalg.cholesky(1.3 * draws.T.cov())
        )
        x = proposal.sample((20_000,))
        weights = (flow().log_prob(x.reshape(-1, 1, 2, 2)) - proposal.log_prob(x)).exp()
    effective = weights.sum().square() / weights.square().sum()
    assert effective > 2_000, f"only {effective:.0f} effective samples"
    error = (weights.mean() - 1).abs()
    assert error < 5 * weights.std() / math.sqrt(len(weights)), f"off by {error:.4f}"


def test_a_fresh_flow_computes_the_same_with_a_loaded_state() -> None:
    flow = _flow()
    flow.initialize(torch.rand(50, 1, 4, 4))
    torch.manual_seed(1)  # other permutations
    other = ImageSplineFlow((1, 4, 4), **SMALL)
    other.load_state_dict(flow.state_dict())
    x = torch.rand(10, 1, 4, 4)
    torch.testing.assert_close(flow().log_prob(x), other().log_prob(x), rtol=0, atol=0)
    assert all(m.initialized for m in other.modules() if isinstance(m, ActNorm))


def test_noise_of_the_data_has_unit_scale_after_initialization() -> None:
    flow = ImageSplineFlow((2, 8, 8), levels=2, **{**SMALL, "steps_per_level": 3})
    norms = [module for module in flow.modules() if isinstance(module, ActNorm)]
    assert len(norms) == 6
    assert not any(norm.initialized for norm in norms)
    x = 0.3 + 0.1 * torch.rand(100, 2, 8, 8)
    before = flow().log_prob(x).mean()
    flow.initialize(x)
    assert all(norm.initialized for norm in norms)
    noise, _ = flow.bijection.to_noise(x)
    # new couplings and convolutions keep means and variances of channels
    torch.testing.assert_close(noise.mean(), torch.tensor(0.0), rtol=0, atol=1e-9)
    torch.testing.assert_close(noise.var(correction=0), torch.tensor(1.0), rtol=1e-9, atol=0)
    assert flow().log_prob(x).mean() > before + 50


def test_initialization_with_a_context() -> None:
    flow = _flow(context_shape=(3,))
    flow.initialize(torch.rand(20, 1, 4, 4), torch.randn(20, 3))
    assert all(m.initialized for m in flow.modules() if isinstance(m, ActNorm))


def test_training_finds_a_density() -> None:
    """Images whose pixels are all equal up to a little noise; optimum known."""
    flow = ImageSplineFlow((1, 2, 2), levels=1, **{**SMALL, "steps_per_level": 2})
    deviation = torch.tensor([0.2, 0.02, 0.02, 0.02])
    basis = torch.linalg.qr(torch.ones(4, 4) + 3 * torch.eye(4))[0]
    truth = dist.MultivariateNormal(
        0.5 * torch.ones(4), basis @ deviation.square().diag() @ basis.T
    )
    x = truth.sample((2000,)).reshape(-1, 1, 2, 2)
    flow.initialize(x.clamp(0, 1))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    start = flow().log_prob(x).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow().log_prob(x[torch.randint(2000, (200,))]).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        reached = flow().log_prob(x).mean().item()
    best = -truth.entropy().item()
    assert start < best - 1.0
    assert best - 0.4 < reached < best + 0.1


@pytest.mark.usefixtures("param_store")
def test_the_call_is_a_distribution_of_pyro() -> None:
    flow, x = _flow(), torch.rand(10, 1, 4, 4)

    def model(data: Tensor | None = None) -> Tensor:
        pyro.module("flow", flow)
        with pyro.plate("images", 10), poutine.scale(scale=2.0):
            return pyro.sample("x", flow(), obs=data)

    trace = poutine.trace(model).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), 2 * flow().log_prob(x).sum())
    assert model().shape == (10, 1, 4, 4)


def test_batch_normalisation_and_dropout_rest_in_evaluation() -> None:
    flow = _flow(batch_norm=True, dropout=0.3)
    x = torch.rand(20, 1, 4, 4)
    flow().log_prob(x)  # moves the running statistics
    flow.eval()
    z, log_det = flow.bijection.to_noise(x)
    back, inverse_log_det = flow.bijection.to_data(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)
    torch.testing.assert_close(flow().log_prob(x[:1]), flow().log_prob(x)[:1])


def test_another_base_distribution() -> None:
    base = dist.Laplace(torch.zeros(16), 1.0).to_event(1)
    flow = _flow(base=base)
    x = torch.rand(3, 1, 4, 4)
    z, log_det = flow.bijection.to_noise(x)
    torch.testing.assert_close(flow().log_prob(x), base.log_prob(z) + log_det)


def test_a_base_distribution_that_depends_on_the_context() -> None:
    flow = _flow(context_shape=(16,), base=lambda context: dist.Normal(context, 1.0).to_event(1))
    x, context = torch.rand(3, 1, 4, 4), torch.randn(3, 16)
    z, log_det = flow.bijection.to_noise(x, context)
    expected = dist.Normal(context, 1.0).to_event(1).log_prob(z) + log_det
    torch.testing.assert_close(flow(context).log_prob(x), expected)


@pytest.mark.usefixtures("float32")
def test_single_precision() -> None:
    flow = _flow((3, 8, 8), steps_per_level=2, scale=0.05)
    x = torch.rand(10, 3, 8, 8)
    flow.initialize(x)
    z, log_det = flow.bijection.to_noise(x)
    back, _ = flow.bijection.to_data(z)
    assert log_det.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageSplineFlow((28, 28)), r"\(channels, height, width\), got \(28, 28\)"),
        (lambda: ImageSplineFlow((1, 28, 28), levels=3), "28 x 28 is enough for 2"),
        (lambda: ImageSplineFlow((1, 3, 3)), "3 x 3 is enough for 0"),
        (lambda: ImageSplineFlow((1, 4, 4), levels=0), "at least one level"),
        (lambda: ImageSplineFlow((1, 4, 4), steps_per_level=0), "steps_per_level"),
        (lambda: ImageSplineFlow((1, 4, 4), spline="cubic"), "'affine', got 'cubic'"),
        (lambda: ImageSplineFlow((1, 4, 4), bins=0), "bins"),
        (lambda: ImageSplineFlow((1, 4, 4), low=1.0), "range from low to high"),
        (lambda: ImageSplineFlow((1, 4, 4), context_shape=(2, 4)), r"context_shape .* \(2, 4\)"),
        (lambda: ImageSplineFlow((1, 4, 4), context_shape=(2, 8, 8)), "height and width"),
    ],
)
def test_settings_out_of_range(make: Callable[[], ImageSplineFlow], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_integer_images_need_a_dequantisation() -> None:
    flow = _flow()
    images = torch.randint(0, 256, (5, 1, 4, 4))
    with pytest.raises(TypeError, match="UniformDequantization"):
        flow().log_prob(images)
    model = DequantizedFlow(flow, UniformDequantization(256))
    assert model().log_prob(images).isfinite().all()


@pytest.mark.parametrize("value", [255.0, -0.1, math.nan, math.inf])
def test_initialization_names_values_out_of_range(value: float) -> None:
    x = torch.rand(5, 1, 4, 4)
    x[2, 0, 1, 1] = value
    with pytest.raises(ValueError, match=r"between low=0\.0 and high=1\.0, got values between"):
        _flow().initialize(x)


@pytest.mark.parametrize(
    ("context_shape", "given", "message"),
    [
        (None, (3,), "takes no context"),
        ((3,), None, r"needs a context of shape \(\.\.\., 3\)"),
        ((3,), (2, 4), r"shape \(\.\.\., 3\), got \(2, 4\)"),
        ((2, 4, 4), (2, 32), r"shape \(\.\.\., 2, 4, 4\), got \(2, 32\)"),
    ],
)
def test_contexts_of_the_wrong_shape(
    context_shape: tuple[int, ...] | None, given: tuple[int, ...] | None, message: str
) -> None:
    flow = _flow(context_shape=context_shape)
    with pytest.raises(ValueError, match=message):
        flow(None if given is None else torch.zeros(given))


def test_a_base_distribution_of_the_wrong_size() -> None:
    base = dist.Normal(torch.zeros(4, 4), 1.0).to_event(2)
    with pytest.raises(ValueError, match=r"16 elements, got event_shape \(4, 4\)"):
        _flow(base=base)()


def test_images_of_the_wrong_shape() -> None:
    with pytest.raises((ValueError, RuntimeError), match="4"):
        _flow()().log_prob(torch.rand(5, 1, 8, 8))
