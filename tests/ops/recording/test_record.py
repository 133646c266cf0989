"""Recorded functions give the values and derivatives of the function, in fewer operations."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx
from torch.distributions import Distribution
from torch.func import jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.ops.recording import RecordedFunction, flatten, record
from tests.ops.recording.functions import FUNCTIONS, Example

Function = Callable[[Tensor], Tensor]

each_function = pytest.mark.parametrize("example", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def _second_derivative(function: Function) -> Function:
    return jacrev(lambda u: jacfwd(function)(u).cos().sum())


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "value": lambda f: f,
    "forward": jacfwd,
    "reverse": jacrev,
    "reverse over forward": _second_derivative,
    "product": lambda f: lambda u: jvp(f, (u,), (u.cos(),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@each_function
def test_values_and_derivatives(
    example: Example, transform: Callable[[Function], Function]
) -> None:
    function = example.make()
    recorded = record(function, torch.randn(example.dim))
    inputs = torch.randn(3, example.dim)
    expected = torch.stack([transform(function)(u) for u in inputs])
    torch.testing.assert_close(vmap(transform(recorded))(inputs), expected)
    torch.testing.assert_close(transform(recorded)(inputs[0]), expected[0])


@each_function
def test_what_is_repeated_runs_as_one(example: Example) -> None:
    recorded = record(example.make(), torch.randn(example.dim))
    assert recorded.num_operations <= example.most_operations
    assert _num_calls(recorded) == recorded.num_operations


def _num_calls(recorded: RecordedFunction) -> int:
    assert isinstance(recorded.module, fx.GraphModule)
    calls = [node for node in recorded.module.graph.nodes if node.op == "call_function"]
    return sum("getitem" not in str(node.target) for node in calls)


@each_function
def test_recorded_functions_can_be_recorded(example: Example) -> None:
    recorded = record(example.make(), torch.randn(example.dim))
    again = record(recorded, torch.randn(example.dim))
    assert again.num_operations <= recorded.num_operations
    traced = make_fx(recorded)(torch.randn(example.dim))
    copied = pickle.loads(pickle.dumps(recorded))
    u = torch.randn(example.dim)
    for other in (again, traced, copied):
        torch.testing.assert_close(other(u), recorded(u))


@each_function
def test_flattened_derivatives(example: Example) -> None:
    recorded = record(example.make(), torch.randn(example.dim))
    inputs, scale = torch.randn(4, example.dim), torch.rand(example.dim) + 0.5

    def jacobian(inputs: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        def batch(inputs: Tensor) -> Tensor:
            return vmap(jacfwd(recorded))(inputs * scale)

        matrices, pullback = vjp(batch, inputs)[:2]
        return matrices, {"gradient": pullback(matrices.sin())[0]}

    flat = flatten(jacobian, inputs, scale)
    other, other_scale = torch.randn(4, example.dim), torch.rand(example.dim)
    torch.testing.assert_close(flat(other, other_scale), jacobian(other, other_scale))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_compiled() -> None:
    is_enabled = Distribution._validate_args
    example = FUNCTIONS["steps from data"]
    function = example.make()
    recorded = record(function, torch.randn(example.dim))
    inputs = torch.randn(3, example.dim)
    jacobian = vmap(jacfwd(recorded))
    # the compiler cannot look through forward mode; recorded as it is there is nothing to see
    try:
        values = torch.compile(vmap(recorded), dynamic=False)(inputs)
        (jacobians,) = torch.compile(flatten(jacobian, inputs).module, dynamic=False)(inputs)
    finally:
        Distribution.set_default_validate_args(is_enabled)  # which the compiler switches off
        torch.compiler.reset()
    torch.testing.assert_close(values, vmap(function)(inputs))
    torch.testing.assert_close(jacobians, vmap(jacfwd(function))(inputs))


class Pair(NamedTuple):
    first: Tensor
    rest: dict[str, list[Tensor]]


def test_nests_of_outputs() -> None:
    def function(u: Tensor) -> Pair:
        return Pair(u[0].exp(), {"list": [u, torch.ones(2), u[1:], (u > 0)]})

    u = torch.randn(3)
    for recorded in (record(function, torch.randn(3)), flatten(function, torch.randn(3))):
        actual = pickle.loads(pickle.dumps(recorded))(u)
        assert isinstance(actual, Pair)
        torch.testing.assert_close(actual, function(u), rtol=0, atol=0)


@pytest.mark.usefixtures("float32")
def test_single_precision() -> None:
    example = FUNCTIONS["steps from numbers"]
    function = example.make()
    recorded = record(function, torch.randn(example.dim))
    assert recorded.num_operations <= example.most_operations
    u = torch.randn(example.dim)
    assert recorded(u).dtype == torch.float32
    torch.testing.assert_close(recorded(u), function(u))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    data = torch.randn(20, 2).cuda()

    def function(u: Tensor) -> Tensor:
        outputs = []
        for t in range(20):
            number = torch.tensor(0.1 * t)  # on the CPU
            value = (u[2 * t : 2 * t + 2] * data[t] + number).sin() * (0.2 * t)
            outputs += [torch.where(value > number, value, -value).flip(0), value[:1]]
        return torch.cat(outputs)

    recorded = record(function, torch.randn(40).cuda())
    assert recorded.num_operations <= 12
    inputs = torch.randn(3, 40).cuda()
    flat = flatten(vmap(jacfwd(recorded)), inputs)
    torch.testing.assert_close(vmap(recorded)(inputs), vmap(function)(inputs))
    torch.testing.assert_close(flat(inputs), vmap(jacrev(function))(inputs))


def test_mixed_precision_keeps_its_dtypes() -> None:
    weights = torch.randn(6, dtype=torch.float32)

    def function(u: Tensor) -> tuple[Tensor, Tensor]:
        low = [(u[t].to(torch.float32) * weights[t]).exp() for t in range(6)]
        return torch.stack(low), torch.stack([x * u[0] + (u[1] > x) for x in low])

    recorded = record(function, torch.randn(6))
    u = torch.randn(6)
    torch.testing.assert_close(recorded(u), function(u))


def test_outside_tensors_are_constants() -> None:
    weight = torch.nn.Parameter(torch.tensor(2.0))
    recorded = record(lambda u: u * weight.exp(), torch.randn(2))
    expected = torch.ones(2) * weight.exp()
    with torch.no_grad():
        weight.fill_(5.0)
    actual = recorded(torch.ones(2))
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0)


def test_detached_parts_stay_detached() -> None:
    def function(u: Tensor) -> Tensor:
        return torch.stack([u[t] * (u[t].detach() * t).sin() for t in range(6)])

    recorded = record(function, torch.randn(6))
    assert recorded.num_operations <= 7
    u = torch.randn(6)
    torch.testing.assert_close(jacrev(recorded)(u), torch.diag((u * torch.arange(6)).sin()))


def test_large_members_stay_apart() -> None:
    data = torch.randn(6, 40, 40)

    def function(u: Tensor) -> Tensor:
        return torch.stack([(u[t] * data[t]).exp().mean() for t in range(6)])

    recorded = record(function, torch.randn(6))
    assert recorded.num_operations >= 18
    u = torch.randn(6)
    torch.testing.assert_close(recorded(u), function(u))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_operations_without_a_batching_rule_run_one_by_one() -> None:
    def function(u: Tensor) -> Tensor:
        rows = u.reshape(6, 2, 3)
        return torch.stack([torch.renorm(rows[t] * t, 2.0, 0, 1.0).sum() for t in range(6)])

    u = torch.randn(36)
    recorded = record(function, torch.randn(36))
    torch.testing.assert_close(recorded(u), function(u))
    torch.testing.assert_close(jacrev(recorded)(u), jacrev(function)(u))


@pytest.mark.parametrize("num_steps", [1, 6], ids=["alone", "in a group"])
def test_a_failing_factorisation_raises_as_before(num_steps: int) -> None:
    def function(u: Tensor) -> Tensor:
        factors = [torch.linalg.cholesky(torch.eye(2) * u[t]) for t in range(num_steps)]
        return torch.stack(factors).flatten()

    recorded = record(function, torch.rand(num_steps) + 0.5)
    u = torch.ones(num_steps)
    torch.testing.assert_close(recorded(u), function(u))
    u[-1] = -1.0
    for f in (function, recorded):
        with pytest.raises(RuntimeError, match="positive-definite"):
            f(u)


def test_a_factorisation_that_is_not_needed_is_not_checked() -> None:
    def function(u: Tensor) -> Tensor:
        torch.linalg.cholesky(torch.eye(2) * u[0])
        return u * 2

    assert record(function, torch.rand(2) + 0.5).num_operations == 1


def test_overwritten_values_are_not_computed() -> None:
    def function(u: Tensor) -> Tensor:
        out = u * 3
        out[0] = u[0].sin()
        out[:] = u[1]
        return out * 2

    recorded = record(function, torch.randn(3))
    assert isinstance(recorded.module, fx.GraphModule)
    assert "sin" not in recorded.module.code
    torch.testing.assert_close(recorded(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda u: u, (3,)),
        (lambda u: u[:0], (3,)),
        (lambda u: torch.cat([u[:0], u.exp()]), (3,)),
        (lambda u: torch.stack([u[:0].sum() for _ in range(5)]), (3,)),
        (lambda u: torch.ones(2), (3,)),
        (lambda u: u.sum(), (0,)),
        (lambda u: u.exp(), ()),
        (lambda u: u.mean(0), (4, 2)),
    ],
    ids=[
        "the input",
        "nothing",
        "nothing and something",
        "sums of nothing",
        "a constant",
        "of nothing",
        "a scalar",
        "a matrix",
    ],
)
def test_edge_cases(function: Function, shape: tuple[int, ...]) -> None:
    recorded = record(function, torch.randn(shape))
    u = torch.randn(2, *shape)
    expected = torch.stack([function(row) for row in u])
    torch.testing.assert_close(vmap(recorded)(u), expected)
    torch.testing.assert_close(jacrev(recorded)(u[0]), jacrev(function)(u[0]))


def test_values_that_are_not_finite() -> None:
    recorded = record(lambda u: torch.stack([u[0] / 0, u[1] * torch.nan, u[2]]), torch.randn(3))
    u = torch.tensor([-1.0, 2.0, 3.0])
    torch.testing.assert_close(
        recorded(u), torch.tensor([-torch.inf, torch.nan, 3.0]), equal_nan=True
    )


def test_recording_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    example = FUNCTIONS["plates"]
    record(example.make(), torch.ones(example.dim))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_representation_says_what_was_saved() -> None:
    assert repr(record(lambda u: u.exp().exp(), torch.randn(2))) == (
        "RecordedFunction(2 operations, recorded from 2)"
    )
