"""The LU layer: its matrix, its start, and the inverse it keeps."""

import copy
from collections.abc import Callable

import pytest
import torch

from pyro_ext.distributions.transforms import LULinear
from tests.distributions.layers import randomize


def _matrix(layer: LULinear, features: int) -> torch.Tensor:
    return layer.to_noise(torch.eye(features).to(layer.bias))[0].detach().t() - layer.bias[:, None]


@pytest.mark.parametrize("features", [1, 2, 5, 50])
def test_the_start_is_a_permutation(features: int) -> None:
    layer, x = LULinear(features), torch.randn(7, features)
    z, log_det = layer.to_noise(x)
    expected, _ = layer.permutation.to_noise(x)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-14)
    assert torch.equal(log_det, torch.zeros(7))
    assert features == 1 or not torch.allclose(z, x)
    torch.testing.assert_close(layer.to_data(z)[0], x, rtol=0, atol=1e-14)


def test_the_matrix_is_the_product_of_its_factors() -> None:
    layer = randomize(LULinear(5))
    lower = layer.lower_and_upper.tril(-1) + torch.eye(5)
    upper = layer.lower_and_upper.triu(1) + layer.log_diagonal.exp().diag()
    permutation = torch.eye(5)[layer.permutation.permutation]
    torch.testing.assert_close(_matrix(layer, 5), lower @ upper @ permutation)


def test_every_matrix_with_positive_minors_is_reached_by_training() -> None:
    """Few steps to a given matrix: nothing of the parameterisation is stuck."""
    layer = LULinear(3, torch.arange(3))
    target = torch.tensor([[2.0, 0.5, -0.3], [0.4, 1.0, 0.2], [-0.2, 0.3, 0.5]])
    x = torch.randn(200, 3)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = (layer.to_noise(x)[0] - x @ target.t() - 1.0).square().mean()
        error.backward()  # type: ignore[no-untyped-call]
        return error

    optimizer.step(loss)
    torch.testing.assert_close(_matrix(layer, 3), target, rtol=0, atol=1e-3)
    torch.testing.assert_close(layer.bias.detach(), torch.ones(3), rtol=0, atol=1e-3)


def _optimizer_step(layer: LULinear) -> None:
    layer.to_noise(torch.randn(9, 4))[0].square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()


def _load(layer: LULinear) -> None:
    layer.load_state_dict(randomize(LULinear(4)).state_dict())


def _change_data(layer: LULinear) -> None:
    layer.lower_and_upper.data[2, 1] += 1.0


def _change_diagonal_data(layer: LULinear) -> None:
    layer.log_diagonal.data.add_(0.5)


def _replace_data(layer: LULinear) -> None:
    layer.lower_and_upper.data = torch.randn(4, 4)


def _change_bias(layer: LULinear) -> None:
    layer.bias.data.add_(1.0)


def _double(layer: LULinear) -> None:
    layer.float()
    with torch.no_grad():
        layer.to_data(torch.randn(2, 4, dtype=torch.float32))
    layer.double()


def _assign(layer: LULinear) -> None:
    layer.log_diagonal = torch.nn.Parameter(torch.randn(4))


def _train_and_evaluate(layer: LULinear) -> None:
    layer.train()
    _optimizer_step(layer)
    layer.eval()


CHANGES = [
    _optimizer_step,
    _load,
    _change_data,
    _change_diagonal_data,
    _replace_data,
    _change_bias,
    _double,
    _assign,
    _train_and_evaluate,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_kept_inverse_is_never_stale(
    change: Callable[[LULinear], None], mode: Callable[[], torch.no_grad]
) -> None:
    layer, z = randomize(LULinear(4)).eval(), torch.randn(6, 4)
    with mode():
        layer.to_data(z)
        layer.to_data(z)
    change(layer)
    with mode():
        x, log_det = layer.to_data(z)
        back, back_log_det = layer.to_noise(x)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det, -back_log_det)


def test_the_inverse_is_kept_only_in_evaluation_without_gradients() -> None:
    layer, z = randomize(LULinear(4)), torch.randn(6, 4)
    solves = []
    compute = layer._compute_inverse
    layer._compute_inverse = lambda: solves.append(1) or compute()  # type: ignore[func-returns-value,method-assign]

    def solves_of_two_calls() -> int:
        solves.clear()
        layer.to_data(z)
        layer.to_data(z)
        return len(solves)

    with torch.no_grad():
        assert solves_of_two_calls() == 2
    layer.eval()
    assert solves_of_two_calls() == 2
    with torch.no_grad():
        assert solves_of_two_calls() == 1
    # with gradients again: they have to flow, whatever is kept
    layer.to_data(z)[0].square().sum().backward()
    assert layer.lower_and_upper.grad is not None
    assert layer.lower_and_upper.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_after_use_are_independent(mode: Callable[[], torch.no_grad]) -> None:
    layer, z = randomize(LULinear(4)).eval(), torch.randn(6, 4)
    with mode():
        expected, _ = layer.to_data(z)
    other = copy.deepcopy(layer)
    randomize(other)
    with torch.no_grad():
        assert torch.equal(layer.to_data(z)[0], expected)
        torch.testing.assert_close(other.to_noise(other.to_data(z)[0])[0], z)


def test_the_inverse_is_right_inside_vmap() -> None:
    layers = [randomize(LULinear(4)).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    z = torch.randn(5, 4)
    with torch.no_grad():
        layers[0].to_data(z)  # keeps an inverse, of no use to the others

        class ToData(torch.nn.Module):
            def __init__(self, layer: LULinear) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, z: torch.Tensor) -> torch.Tensor:
                return self.layer.to_data(z)[0]

        def evaluate(p: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
            names = [{f"layer.{k}": v for k, v in each.items()} for each in (p, b)]
            return torch.func.functional_call(ToData(layers[0]), (names[0], names[1]), (z,))

        found = torch.vmap(evaluate)(parameters, buffers)
        for i, layer in enumerate(layers):
            torch.testing.assert_close(found[i], layer.to_data(z)[0])


def test_a_given_permutation_is_used() -> None:
    layer = LULinear(3, torch.tensor([1, 2, 0]))
    assert layer.to_noise(torch.tensor([1.0, 2.0, 3.0]))[0].tolist() == [2.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="not a permutation"):
        LULinear(3, torch.tensor([1, 1, 0]))


def test_the_representation_tells_the_size() -> None:
    assert "features=3" in repr(LULinear(3))
