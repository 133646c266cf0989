"""What every network does: values at any shape, contexts shared, modes, copies, transforms."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ext.nn import ResidualConvolutionalNetwork, ResidualNetwork, ResMADE

Network = ResidualNetwork | ResidualConvolutionalNetwork | ResMADE
CONTEXT = 3


def _dense(context: int = 0, **options: Any) -> Network:
    return ResidualNetwork(4, 5, 16, context_features=context, **options)


def _convolutional(context: int = 0, **options: Any) -> Network:
    return ResidualConvolutionalNetwork(4, 5, 8, context_channels=context, **options)


def _masked(context: int = 0, **options: Any) -> Network:
    return ResMADE(4, 5, 16, context_features=context, **options)


MAKERS = [
    pytest.param(_dense, id="dense"),
    pytest.param(_convolutional, id="convolutional"),
    pytest.param(_masked, id="masked"),
]
networks = pytest.mark.parametrize("make", MAKERS)
contexts = pytest.mark.parametrize("context_size", [0, CONTEXT], ids=["alone", "context"])


def randomize(network: Any) -> Any:
    """Give every parameter and statistic a weight in the result, also where it starts small."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    return network


def _event(network: Network, size: int) -> tuple[int, ...]:
    return (size, 5, 6) if isinstance(network, ResidualConvolutionalNetwork) else (size,)


def _inputs(
    network: Network, context_size: int, *batch_shape: int
) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(*batch_shape, *_event(network, 4))
    context = torch.randn(*batch_shape, *_event(network, CONTEXT)) if context_size else None
    return x, context


@networks
@contexts
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(batch_shape=st.lists(st.integers(0, 3), max_size=3).map(tuple))
def test_leading_dimensions_are_evaluated_one_by_one(
    make: Callable[..., Network], context_size: int, batch_norm: bool, batch_shape: tuple[int, ...]
) -> None:
    network = randomize(make(context_size, batch_norm=batch_norm)).eval()
    x, context = _inputs(network, context_size, *batch_shape)
    output = network(x, context)
    one = network(*_inputs(network, context_size))
    assert output.shape == batch_shape + one.shape
    for index in torch.cartesian_prod(*map(torch.arange, batch_shape)) if batch_shape else [()]:
        at = tuple(torch.as_tensor(index).reshape(-1).tolist())
        expected = network(x[at], None if context is None else context[at])
        torch.testing.assert_close(output[at], expected, rtol=1e-12, atol=1e-12)


@networks
@pytest.mark.parametrize(
    ("of_x", "of_context"),
    [((7,), ()), ((2, 7), (7,)), ((2, 7), (2, 1)), ((), (3,)), ((2, 1), (1, 3)), ((2,), (3, 1))],
    ids=str,
)
def test_a_shared_context_equals_an_expanded_one(
    make: Callable[..., Network], of_x: tuple[int, ...], of_context: tuple[int, ...]
) -> None:
    network = randomize(make(CONTEXT))
    x, _ = _inputs(network, 0, *of_x)
    _, context = _inputs(network, CONTEXT, *of_context)
    batch_shape = torch.broadcast_shapes(of_x, of_context)
    expected = network(
        x.expand(batch_shape + _event(network, 4)),
        context.expand(batch_shape + _event(network, CONTEXT)),
    )
    torch.testing.assert_close(network(x, context), expected, rtol=1e-12, atol=1e-12)


@networks
def test_what_depends_on_the_context_alone_is_computed_at_its_shape(
    make: Callable[..., Network],
) -> None:
    network = make(CONTEXT)
    seen = []
    layers = [network.initial_context, *(block.gate for block in network.blocks)]
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    x, _ = _inputs(network, 0, 100)
    _, context = _inputs(network, CONTEXT, 1)
    network(x, context)
    assert [shape[0] for shape in seen] == [1] * (1 + len(network.blocks))


@networks
@contexts
def test_blocks_start_near_the_identity(make: Callable[..., Network], context_size: int) -> None:
    network = make(context_size)
    x, context = _inputs(network, context_size, 20)
    for block in network.blocks:
        for parameter in block.second.parameters():
            assert 0 < parameter.abs().max() <= 1e-3
    hidden = network.initial(x)
    if context is not None:
        hidden = hidden + network.initial_context(context)
    expected = network.output(hidden)
    torch.testing.assert_close(
        network(x, context).reshape(expected.shape), expected, atol=0.05, rtol=0
    )


@networks
def test_gates_start_about_half_open(make: Callable[..., Network]) -> None:
    network = make(CONTEXT)
    _, context = _inputs(network, CONTEXT, 1000)
    for block in network.blocks:
        gate = torch.sigmoid(block.gate(context))
        assert 0.3 < gate.mean() < 0.7
        assert 0.05 < gate.std() < 0.3


@networks
def test_a_closed_gate_switches_a_block_off(make: Callable[..., Network]) -> None:
    network = randomize(make(CONTEXT))
    x, context = _inputs(network, CONTEXT, 10)
    for block in network.blocks:
        nn.init.zeros_(block.gate.weight)
        nn.init.constant_(block.gate.bias, -1e3)
    expected = network.output(network.initial(x) + network.initial_context(context))
    torch.testing.assert_close(network(x, context).reshape(expected.shape), expected)


@networks
@contexts
def test_every_parameter_has_a_gradient(make: Callable[..., Network], context_size: int) -> None:
    network = randomize(make(context_size, batch_norm=True))
    network(*_inputs(network, context_size, 50)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # what normalisation subtracts again has no effect
        assert parameter.grad.any() or name.endswith("first.bias"), name


@networks
@contexts
def test_dropout_is_there_in_training_only(
    make: Callable[..., Network], context_size: int
) -> None:
    network = randomize(make(context_size, dropout=0.5))
    x, context = _inputs(network, context_size, 10)
    assert not torch.equal(network(x, context), network(x, context))
    network.eval()
    without = make(context_size)
    without.load_state_dict(network.state_dict())
    assert torch.equal(network(x, context), without(x, context))


@networks
def test_dropout_keeps_the_mean(make: Callable[..., Network]) -> None:
    """One block: its second layer is linear in what is dropped."""
    network = randomize(make(residual_blocks=1, dropout=0.3))
    x, _ = _inputs(network, 0, 1)
    many = network(x.expand(4_000, *x.shape[1:]))
    error = (many.mean(0) - network.eval()(x)[0]).abs()
    assert (error < 5 * many.std(0) / len(many) ** 0.5 + 1e-12).all()


@networks
@contexts
def test_batch_norm_normalises_over_all_leading_dimensions(
    make: Callable[..., Network], context_size: int
) -> None:
    network = randomize(make(context_size, batch_norm=True))
    seen = []
    norm = network.blocks[0].batch_norms[0]
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    norm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    network(*_inputs(network, context_size, 40, 3))
    before, after = seen[0]
    dims = [i for i in range(after.dim()) if after.shape[i] != norm.num_features]
    mean, variance = before.mean(dims, keepdim=True), before.var(dims, False, keepdim=True)
    torch.testing.assert_close(after, (before - mean) / (variance + 1e-3).sqrt())


@networks
def test_batch_norm_in_evaluation_uses_the_running_statistics(
    make: Callable[..., Network],
) -> None:
    network = randomize(make(batch_norm=True))
    x, _ = _inputs(network, 0, 50)
    trained = network(x)
    for _ in range(200):
        network(x)
    network.eval()
    # unbiased variances run, biased ones normalise: the difference is of order 1 / batch size
    torch.testing.assert_close(network(x), trained, rtol=0.05, atol=0.2)
    torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-10, atol=1e-10)


@networks
@contexts
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
def test_copies_compute_the_same(
    make: Callable[..., Network], context_size: int, batch_norm: bool
) -> None:
    network = randomize(make(context_size, batch_norm=batch_norm)).eval()
    x, context = _inputs(network, context_size, 3)
    expected = network(x, context)

    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = make(context_size, batch_norm=batch_norm).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in [loaded, copy.deepcopy(network), pickle.loads(pickle.dumps(network))]:
        assert torch.equal(other(x, context), expected)
        nn.init.zeros_(other.output.weight)  # nothing is shared
    assert torch.equal(network(x, context), expected)


@networks
@contexts
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.1)],
    ids=["float32", "bfloat16"],
)
def test_other_precisions(
    make: Callable[..., Network], context_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    network = randomize(make(context_size))
    x, context = _inputs(network, context_size, 3)
    expected = network(x, context)
    network.to(dtype)
    output = network(x.to(dtype), None if context is None else context.to(dtype))
    assert output.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance * scale)


@networks
@contexts
def test_vmap_over_parameters(make: Callable[..., Network], context_size: int) -> None:
    ensemble = [randomize(make(context_size)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(ensemble)
    x, context = _inputs(ensemble[0], context_size, 3, 7)

    def evaluate(parameters: Any, buffers: Any, *arguments: Tensor) -> Tensor:
        return torch.func.functional_call(ensemble[0], (parameters, buffers), arguments)

    arguments = (x,) if context is None else (x, context)
    output = torch.vmap(evaluate)(parameters, buffers, *arguments)
    for i, network in enumerate(ensemble):
        expected = network(x[i], None if context is None else context[i])
        torch.testing.assert_close(output[i], expected)


@pytest.fixture
def compiler() -> Iterator[None]:
    """The compiler of PyTorch, which switches the validation of its distributions off."""
    is_enabled = Distribution._validate_args
    yield
    torch.compiler.reset()
    Distribution.set_default_validate_args(is_enabled)


@networks
@contexts
@pytest.mark.usefixtures("compiler")
def test_compilation_has_no_graph_breaks(make: Callable[..., Network], context_size: int) -> None:
    network = randomize(make(context_size))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x, context = _inputs(network, context_size, 3)
    torch.testing.assert_close(compiled(x, context), network(x, context))


@networks
@pytest.mark.parametrize("activation", [torch.tanh, nn.SiLU()], ids=["function", "module"])
def test_activations(make: Callable[..., Network], activation: Any) -> None:
    network = randomize(make(activation=activation))
    x, _ = _inputs(network, 0, 3)
    relu = make()
    relu.load_state_dict(network.state_dict())
    assert not torch.allclose(network(x), relu(x))
    if activation is torch.tanh:  # smooth everywhere: no trace of a relu is left
        assert torch.autograd.gradcheck(network, x.requires_grad_())


@networks
def test_without_blocks_the_network_is_linear(make: Callable[..., Network]) -> None:
    network = randomize(make(residual_blocks=0))
    x, y = (_inputs(network, 0, 2)[0] for _ in range(2))
    torch.testing.assert_close(network(x) + network(y), network(x + y) + network(0 * x))


@networks
@pytest.mark.parametrize(
    "options",
    [
        {"context": -1},
        {"residual_blocks": -1},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"residual_blocks": 1.5},
    ],
    ids=str,
)
def test_bad_settings_are_named(make: Callable[..., Network], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* got"):
        make(**options)


@pytest.mark.parametrize("network", [ResidualNetwork, ResidualConvolutionalNetwork, ResMADE])
@pytest.mark.parametrize("sizes", [(4, 0), (4, 5, 0), (-1, 5), (4, 2.5), (None, 5)], ids=str)
def test_bad_sizes_are_named(network: type[Network], sizes: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"(features|channels|per_feature) must be an integer"):
        network(*sizes)


@networks
@contexts
def test_bad_inputs_are_explained(make: Callable[..., Network], context_size: int) -> None:
    network = make(context_size)
    x, context = _inputs(network, context_size, 7)
    too_long = torch.randn(7, *_event(network, 9))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 4.*got \(7, 9"):
        network(too_long, context)
    with pytest.raises(ValueError, match=r"x must have shape"):
        network(torch.tensor(1.0), context)
    if context is None:
        with pytest.raises(ValueError, match=r"got a context of shape \(7, 9"):
            network(x, too_long)
        return
    with pytest.raises(ValueError, match="pass a context"):
        network(x)
    with pytest.raises(ValueError, match=r"context must have shape \(..., 3.*got \(7, 9"):
        network(x, too_long)
    with pytest.raises(ValueError, match=r"context must have shape \(..., 3.*got \(\)"):
        network(x, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\(6,\) of the context do not broadcast .* \(7,\)"):
        network(x, context[:6])
