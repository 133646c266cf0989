"""Forward-mode derivatives keep the precision of their input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from pyro_ext.infer.constrained_hmc.jacobian.forward import forward_jacobian, forward_product

# the tangents of these are float64 in PyTorch 2.13
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a scalar times a number": lambda x: torch.stack([2.0 * x[0] * x[1], x[2]]),
    "a scalar by a number": lambda x: torch.stack([x[0] / 4.0, x[1] + x[2]]),
    "a number by a scalar": lambda x: torch.stack([1.0 / x[0], x[1] + x[2]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_precision_is_that_of_the_input(name: str, dtype: torch.dtype) -> None:
    function = FUNCTIONS[name]
    points, vectors = torch.randn(2, 4, 3, dtype=dtype)
    matrices = vmap(forward_jacobian(function))(points)
    products = vmap(lambda u, v: forward_product(function, u, v))(points, vectors)
    assert matrices.dtype == products.dtype == dtype
    expected = vmap(torch.func.jacrev(function))(points)
    torch.testing.assert_close(matrices, expected)
    torch.testing.assert_close(products, (expected @ vectors.unsqueeze(-1)).squeeze(-1))
