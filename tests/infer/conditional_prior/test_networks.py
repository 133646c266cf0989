"""Every family of maps: inverse, log-determinant, independent rows, and any parameters at all."""

from collections.abc import Callable

import pyro.distributions.transforms as T
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyro_ext.distributions import NeuralSplineFlow
from pyro_ext.distributions.transforms import Permutation
from pyro_ext.infer.conditional_prior.networks import RowMap, make_row_map
from pyro_ext.infer.conditional_prior.networks.fully_connected import FullyConnectedMap
from pyro_ext.infer.conditional_prior.networks.planar import PlanarMap

ROWS, DRAWS = 3, 7


def _spline_bijection(features: int) -> nn.Module:
    return NeuralSplineFlow(features, transforms=1, hidden_features=8, residual_blocks=1).bijection


MAKERS: dict[str, Callable[[int], RowMap]] = {
    "gvi": lambda d: make_row_map("gvi", d),
    "planar": lambda d: make_row_map("planar", d, num_layers=3),
    "spline": lambda d: make_row_map("spline", d, hidden_features=5),
    "fcn": lambda d: make_row_map("fcn", d, num_layers=2, hidden_features=6),
    "Bijection": lambda d: make_row_map(_spline_bijection, d),
    "TransformModule": lambda d: make_row_map(T.planar, d),
}
INVERTIBLE = ["gvi", "planar", "spline", "Bijection"]


def _random(row_map: RowMap, scale: float = 0.5) -> Tensor:
    initial = row_map.initial(ROWS)
    return initial + scale * torch.randn(initial.shape)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("family", INVERTIBLE)
def test_inverse(family: str, features: int) -> None:
    row_map = MAKERS[family](features)
    psi, noise = _random(row_map), torch.randn(ROWS, DRAWS, features)
    latents, log_det = row_map.to_latents(noise, psi)
    again, log_det_of_inverse = row_map.to_noise(latents, psi)
    torch.testing.assert_close(again, noise, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_of_inverse, -log_det, rtol=0, atol=1e-8)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("family", MAKERS)
def test_log_determinant_is_that_of_the_jacobian(family: str, features: int) -> None:
    row_map = MAKERS[family](features)
    psi, noise = _random(row_map), torch.randn(ROWS, DRAWS, features)
    _, log_det = row_map.to_latents(noise, psi)
    for row in range(ROWS):
        for draw in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda e, row=row: row_map.to_latents(e[None, None], psi[row : row + 1])[0][0, 0],
                noise[row, draw],
            )
            expected = torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(log_det[row, draw], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", MAKERS)
def test_rows_are_independent(family: str) -> None:
    row_map = MAKERS[family](3)
    psi, noise = _random(row_map), torch.randn(ROWS, DRAWS, 3)
    together, log_dets = row_map.to_latents(noise, psi)
    for row in range(ROWS):
        one, log_det = row_map.to_latents(noise[row : row + 1], psi[row : row + 1])
        torch.testing.assert_close(one[0], together[row])
        torch.testing.assert_close(log_det[0], log_dets[row])


@pytest.mark.parametrize("family", ["gvi", "planar", "spline", "fcn"])
def test_start_is_near_the_identity_and_the_same_in_all_rows(family: str) -> None:
    row_map = MAKERS[family](4)
    psi, noise = row_map.initial(ROWS), torch.randn(ROWS, DRAWS, 4)
    assert psi.shape == (ROWS, row_map.num_parameters)
    assert (psi == psi[0]).all()
    latents, log_det = row_map.to_latents(noise, psi)
    ordered = latents.flip(-1) if family == "spline" else latents  # of two layers, one reversal
    torch.testing.assert_close(ordered, noise, rtol=0, atol=0.3)
    assert (log_det.abs() < 0.3).all()


@pytest.mark.parametrize("family", MAKERS)
def test_gradients_reach_all_parameters(family: str) -> None:
    row_map = MAKERS[family](4)
    psi = _random(row_map, 0.1).requires_grad_()
    latents, log_det = row_map.to_latents(torch.randn(ROWS, 200, 4), psi)
    (gradient,) = torch.autograd.grad((latents.square().sum(-1) - log_det).mean(), psi)
    assert gradient.isfinite().all()
    # parameters of a spline's pieces are only used where there are draws
    assert (gradient != 0).double().mean() > (0.6 if family in ("spline", "Bijection") else 0.99)


@pytest.mark.parametrize("family", ["gvi", "planar", "spline"])
def test_gradients_of_the_inverse(family: str) -> None:
    row_map = MAKERS[family](2)
    psi = _random(row_map)[:1].requires_grad_()
    latents = torch.randn(1, 2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(row_map.to_noise, (latents, psi), atol=1e-5)


@pytest.mark.parametrize("family", INVERTIBLE)
def test_densities_integrate_to_one(family: str) -> None:
    row_map = MAKERS[family](2)
    psi = _random(row_map, 0.3)
    axis = torch.linspace(-12, 12, 401)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(1, -1, 2)
    noise, log_det = row_map.to_noise(grid.expand(ROWS, -1, -1), psi)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1) + log_det
    mass = log_q.exp().sum(-1) * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(mass, torch.ones(ROWS), rtol=0, atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(["gvi", "planar", "spline"]),
    features=st.integers(1, 6),
    size=st.floats(-2.0, 12.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_no_parameters_make_the_log_determinant_fail(
    family: str, features: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    """Whatever an optimizer tries, up to parameters of a trillion."""
    generator = torch.Generator().manual_seed(seed)
    row_map = MAKERS[family](features)
    shape = (ROWS, row_map.num_parameters)
    psi = 10**size * torch.randn(shape, generator=generator, dtype=dtype)
    noise = torch.randn(ROWS, DRAWS, features, generator=generator, dtype=dtype)
    latents, log_det = row_map.to_latents(noise, psi)
    assert log_det.isfinite().all()
    assert latents.isfinite().all()
    assert latents.dtype == log_det.dtype == dtype


@settings(max_examples=60, deadline=None)
@given(
    features=st.integers(1, 5),
    size=st.floats(-3.0, 2.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_planar_layers_are_always_invertible(
    features: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    """Along u, the only direction that is bent, the slope is positive everywhere."""
    generator = torch.Generator().manual_seed(seed)
    layer = PlanarMap(features)
    psi = 10**size * torch.randn(ROWS, layer.num_parameters, generator=generator, dtype=dtype)
    noise = torch.randn(ROWS, DRAWS, features, generator=generator, dtype=dtype)
    latents, log_det = layer.to_latents(noise, psi)
    _, _, _, slope = layer._parts(psi)
    assert (slope > -1).all()
    again, log_det_of_inverse = layer.to_noise(latents, psi)
    # a layer compresses at most a thousandfold, so that this much is lost
    eps = 3e3 * torch.finfo(dtype).eps * (1 + float(latents.abs().max())) * (1 + 10**size)
    torch.testing.assert_close(again, noise, rtol=0, atol=eps)
    torch.testing.assert_close(log_det_of_inverse, -log_det, rtol=0, atol=max(1e3 * eps, 1e-9))


def test_every_planar_layer_that_is_invertible_can_be_written() -> None:
    """Given w and an admissible u-hat, there is a u that gives it."""
    layer = PlanarMap(3)
    w = torch.randn(200, 3)
    u_hat = 3 * torch.randn(200, 3)
    product = (u_hat * w).sum(-1, keepdim=True)
    u_hat, w, product = (v[product.squeeze(-1) > -0.99] for v in (u_hat, w, product))
    u = u_hat / (1 + product.clamp(max=0) / 0.999)
    psi = torch.cat([u, w, torch.zeros(len(w), 1)], -1)
    found, _, _, slope = layer._parts(psi)
    torch.testing.assert_close(found.squeeze(1), u_hat)
    torch.testing.assert_close(slope, product)


def test_an_affine_map_has_any_gaussian() -> None:
    row_map = make_row_map("gvi", 3)
    square = torch.randn(3, 3)
    covariance = square @ square.T + 0.01 * torch.eye(3)
    factor = torch.linalg.cholesky(covariance)
    log_scale = factor.diagonal().log()
    theta = log_scale / (1 - log_scale.abs() / 25.0)
    below = factor[torch.tril_indices(3, 3, -1).unbind()]
    psi = torch.cat([torch.tensor([1.0, 2.0, 3.0]), theta, below])[None]
    noise = torch.eye(3)[None]
    latents, log_det = row_map.to_latents(noise, psi)
    columns = (latents[0] - torch.tensor([1.0, 2.0, 3.0])).T
    torch.testing.assert_close(columns @ columns.T, covariance)
    torch.testing.assert_close(log_det[0, 0], 0.5 * torch.logdet(covariance))


@pytest.mark.parametrize("family", ["gvi", "planar", "spline"])
def test_flows_end_in_an_affine_map_that_can_be_centred(family: str) -> None:
    row_map = MAKERS[family](3)
    affine = row_map.affine_end()
    assert affine is not None
    loc = torch.randn(ROWS, 3)
    psi = torch.cat(
        [row_map.initial(ROWS)[:, : -affine.num_parameters], affine.centred(loc, 0.01)], -1
    )
    latents, _ = row_map.to_latents(torch.randn(ROWS, DRAWS, 3), psi)
    torch.testing.assert_close(latents, loc[:, None].expand(-1, DRAWS, -1), rtol=0, atol=0.06)


@pytest.mark.parametrize("family", ["fcn", "Bijection"])
def test_other_maps_do_not(family: str) -> None:
    row_map = MAKERS[family](3)
    assert row_map.affine_end() is None
    with pytest.raises(NotImplementedError, match="is not affine"):
        row_map.centred(torch.zeros(ROWS, 3), 0.01)


def test_fully_connected_maps_are_for_few_latents_and_have_no_inverse() -> None:
    with pytest.raises(ValueError, match=r"determinant of 11 x 11.*Use 'gvi'"):
        FullyConnectedMap(11, 4, 1)
    row_map = MAKERS["fcn"](2)
    assert not row_map.is_invertible
    with pytest.raises(NotImplementedError, match=r"'fcn' has no inverse"):
        row_map.to_noise(torch.zeros(1, 1, 2), row_map.initial(1))


def test_a_map_folds_where_its_determinant_changes_sign() -> None:
    """z = e + c tanh(e) turns back near zero if c is below -1, and only then."""
    row_map = FullyConnectedMap(1, 1, 1)
    psi = torch.tensor([[1.0, 0.0, c, 0.0] for c in (-3.0, -0.9, 3.0)])
    noise = torch.linspace(-3, 3, 20)[:, None].expand(3, -1, -1)
    assert row_map.folds(noise, psi).tolist() == [True, False, False]
    steps = row_map.to_latents(noise, psi)[0].diff(dim=1).squeeze(-1)
    assert ((steps < 0).any(1) & (steps > 0).any(1)).tolist() == [True, False, False]
    gvi = make_row_map("gvi", 1)
    assert not gvi.folds(noise, gvi.initial(3)).any()


def test_templates_leave_the_module_as_it_is() -> None:
    module = _spline_bijection(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    row_map = make_row_map(lambda d: module, 3)
    psi = _random(row_map).requires_grad_()
    row_map.to_latents(torch.randn(ROWS, DRAWS, 3), psi)[1].sum().backward()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in module.parameters())
    assert list(row_map.parameters()) == []


def test_transforms_without_an_inverse_say_so() -> None:
    row_map = make_row_map(T.planar, 2)
    with pytest.raises(NotImplementedError, match="Planar has no inverse"):
        row_map.to_noise(torch.zeros(1, 1, 2), row_map.initial(1))


@pytest.mark.parametrize(
    ("maker", "error", "message"),
    [
        (lambda d: nn.Linear(d, d), TypeError, r"made a Linear. Make a Bijection"),
        (lambda d: NeuralSplineFlow(d, transforms=1), TypeError, r"NeuralSplineFlow, its .bijec"),
        (lambda d: T.Permute(torch.arange(d)), TypeError, r"made a Permute"),
        (lambda d: Permutation(torch.arange(d)), ValueError, r"Permutation has no parameters"),
    ],
    ids=["network", "flow", "transform", "fixed bijection"],
)
def test_templates_of_the_wrong_kind_are_refused(
    maker: Callable[[int], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_row_map(maker, 3)
