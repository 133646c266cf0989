"""ResMADE: what depends on what, and the evaluation feature by feature against that at once."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyro_ext.nn import ResMADE


def _randomized(made: ResMADE) -> ResMADE:
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in made.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    return made


def _one_by_one(made: ResMADE, x: Tensor, context: Tensor | None = None) -> Tensor:
    """All outputs, though each step has seen nothing but the features before."""
    state = made.start(x.shape[:-1], context)
    outputs = []
    for feature in range(made.features):
        output, state = made.step(state, x[..., feature - 1] if feature else None)
        outputs.append(output)
    return torch.stack(outputs, -2)


@pytest.mark.parametrize("context_features", [0, 3], ids=["alone", "context"])
@pytest.mark.parametrize("features", [1, 2, 5, 8])
@pytest.mark.parametrize("residual_blocks", [0, 2])
def test_outputs_depend_on_all_features_before_and_no_others(
    features: int, context_features: int, residual_blocks: int
) -> None:
    made = ResMADE(
        features,
        3,
        4 * features,
        context_features=context_features,
        residual_blocks=residual_blocks,
        activation=torch.tanh,  # no unit is off
    )
    _randomized(made)
    x = torch.randn(features)
    context = torch.randn(context_features) if context_features else None
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x, context), x)
    depends = jacobian != 0
    allowed = torch.ones(features, features).tril(-1).bool()
    assert torch.equal(depends, allowed[:, None].expand_as(depends))
    if context is not None:
        jacobian = torch.autograd.functional.jacobian(lambda c: made(x, c), context)
        assert (jacobian != 0).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    features=st.integers(1, 7),
    hidden_features=st.integers(1, 12),
    context_features=st.integers(0, 2),
)
def test_outputs_never_depend_on_later_features(
    features: int, hidden_features: int, context_features: int
) -> None:
    made = ResMADE(features, 2, hidden_features, context_features=context_features)
    _randomized(made)
    x = torch.randn(features)
    context = torch.randn(context_features) if context_features else None
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x, context), x)
    for i, j in itertools.product(range(features), repeat=2):
        assert j < i or not jacobian[i, :, j].any()


@pytest.mark.parametrize("context_features", [0, 3], ids=["alone", "context"])
@pytest.mark.parametrize(("features", "hidden_features"), [(2, 8), (4, 9), (5, 64)])
def test_degrees_are_sorted_and_shared_out_evenly(
    features: int, hidden_features: int, context_features: int
) -> None:
    made = ResMADE(features, 1, hidden_features, context_features=context_features)
    degrees = made.initial.mask.sum(1)
    assert (degrees.diff() >= 0).all()
    smallest = 0 if context_features else 1
    assert degrees.unique().tolist() == list(range(smallest, features))
    counts = degrees.long().bincount()[smallest:]
    assert counts.max() - counts.min() <= 1


def test_values_are_those_of_masked_layers() -> None:
    """The masks of Nash and Durkan (2019), eq. 14, written down for three features."""
    made = _randomized(ResMADE(3, 2, 4, residual_blocks=1))
    x = torch.randn(6, 3)
    w = dict(made.named_parameters())
    degrees = torch.tensor([1, 1, 2, 2])
    between = (degrees[:, None] >= degrees).double()
    h = x @ (w["initial.weight"] * (degrees[:, None] >= torch.tensor([1, 2, 3]))).T
    h = h + w["initial.bias"]
    u = h.clamp(min=0) @ (w["blocks.0.first.weight"] * between).T + w["blocks.0.first.bias"]
    u = u.clamp(min=0) @ (w["blocks.0.second.weight"] * between).T + w["blocks.0.second.bias"]
    outputs = torch.tensor([1, 1, 2, 2, 3, 3])
    output = (h + u) @ (w["output.weight"] * (outputs[:, None] > degrees)).T + w["output.bias"]
    torch.testing.assert_close(made(x), output.reshape(6, 3, 2), rtol=1e-12, atol=1e-12)


SHAPES = pytest.mark.parametrize(
    ("batch_shape", "context_shape"),
    [((), ()), ((3,), (3,)), ((3,), ()), ((2, 3), (2, 3)), ((2, 3), (2, 1)), ((0,), ())],
    ids=str,
)


@SHAPES
@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("hidden_features", [1, 3, 16])
@pytest.mark.parametrize("context_features", [0, 3], ids=["alone", "context"])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
def test_one_by_one_gives_the_same_values(
    features: int,
    hidden_features: int,
    context_features: int,
    batch_shape: tuple[int, ...],
    context_shape: tuple[int, ...],
    batch_norm: bool,
) -> None:
    made = ResMADE(
        features, 4, hidden_features, context_features=context_features, batch_norm=batch_norm
    )
    _randomized(made).eval()
    x = torch.randn(*batch_shape, features)
    context = torch.randn(*context_shape, context_features) if context_features else None
    expected = made(x, context)
    outputs = _one_by_one(made, x, context)
    assert outputs.requires_grad
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        outputs = _one_by_one(made, x, context)
    torch.testing.assert_close(outputs, expected.detach(), rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        assert torch.equal(_one_by_one(made, x, context), outputs)


@pytest.mark.parametrize("context_features", [0, 3], ids=["alone", "context"])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
def test_one_by_one_has_the_same_gradients(context_features: int, batch_norm: bool) -> None:
    made = ResMADE(5, 4, 16, context_features=context_features, batch_norm=batch_norm)
    _randomized(made).eval()
    inputs = [torch.randn(3, 5, requires_grad=True)]
    if context_features:
        inputs.append(torch.randn(context_features, requires_grad=True))
    wanted = [*inputs, *made.parameters()]
    weights = torch.randn(3, 5, 4)
    expected = torch.autograd.grad((weights * made(*inputs).tanh()).sum(), wanted)
    actual = torch.autograd.grad((weights * _one_by_one(made, *inputs).tanh()).sum(), wanted)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def _sample(made: ResMADE, noise: Tensor, context: Tensor) -> Tensor:
    """A Gaussian autoregressive flow: the features fed are those just computed."""
    state = made.start(noise.shape[:-1], context)
    features: list[Tensor] = []
    for one in noise.unbind(-1):
        output, state = made.step(state, features[-1] if features else None)
        loc, log_scale = output.unbind(-1)
        features.append(loc + log_scale.tanh().exp() * one)
    return torch.stack(features, -1)


def test_a_sample_is_differentiable() -> None:
    """The gradient by implicit differentiation of the inverse, which is one call at once."""
    made = _randomized(ResMADE(4, 2, 16, context_features=2))
    noise, context = torch.randn(4), torch.randn(2, requires_grad=True)

    def inverse(x: Tensor, context: Tensor) -> Tensor:
        loc, log_scale = made(x, context).unbind(-1)
        return (x - loc) * (-log_scale.tanh()).exp()

    x = _sample(made, noise, context).detach()
    torch.testing.assert_close(inverse(x, context), noise)
    by_x, by_context = torch.autograd.functional.jacobian(inverse, (x, context))
    expected = -torch.linalg.solve(by_x, by_context)
    actual = torch.autograd.functional.jacobian(lambda c: _sample(made, noise, c), context)
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(lambda n: _sample(made, n, context), noise.requires_grad_())


def test_with_gradients_states_stay_valid() -> None:
    """Two continuations of one state do not disturb each other."""
    made = _randomized(ResMADE(3, 2, 9))
    x = torch.randn(6, 3)
    _, start = made.step(made.start((6,)))
    second, state = made.step(start, x[:, 0])
    made.step(start, x[:, 0] + 1)
    third, _ = made.step(state, x[:, 1])
    torch.testing.assert_close(torch.stack([second, third], 1), made(x)[:, 1:])


def test_a_state_without_gradients_is_no_silent_source_of_wrong_ones() -> None:
    made = _randomized(ResMADE(4, 2, 9))
    x = torch.randn(6, 4)
    with torch.no_grad():
        state = made.start((6,))
    outputs = []
    for feature in range(4):
        output, state = made.step(state, x[:, feature - 1] if feature else None)
        outputs.append(output)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.stack(outputs).sum().backward()


def test_one_by_one_under_vmap() -> None:
    ensemble = [_randomized(ResMADE(4, 2, 9, context_features=2)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(ensemble)
    noise, context = torch.randn(3, 7, 4), torch.randn(3, 2)
    template = copy.deepcopy(ensemble[0])

    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = template

        def forward(self, noise: Tensor, context: Tensor) -> Tensor:
            return _sample(self.made, noise, context)

    sampler = Sampler()

    def draw(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        state = {f"made.{name}": value for name, value in {**parameters, **buffers}.items()}
        return torch.func.functional_call(sampler, state, inputs)

    samples = torch.vmap(draw)(parameters, buffers, noise, context)
    with torch.no_grad():
        for i, made in enumerate(ensemble):
            torch.testing.assert_close(samples[i].detach(), _sample(made, noise[i], context[i]))


def test_each_unit_is_computed_once() -> None:
    """Multiplications of all steps: those of the nonzero blocks of one call."""
    made = ResMADE(8, 23, 64)
    done = []
    for layer in made.modules():
        if hasattr(layer, "rows"):
            rows = layer.rows

            def counting(input: Tensor, start: int, stop: int, rows: Any = rows) -> Tensor:
                done.append(math.prod(input.shape) * (stop - start))
                return rows(input, start, stop)

            layer.rows = counting
    _one_by_one(made, torch.randn(1, 8))
    assert sum(done) == sum(int(m.mask.sum()) for m in made.modules() if hasattr(m, "mask"))


def test_dropped_units_stay_dropped() -> None:
    """In training the units that later steps see are those that were drawn."""
    made = _randomized(ResMADE(6, 3, 32, dropout=0.5))
    x = torch.randn(2000, 6)
    assert not torch.equal(_one_by_one(made, x[:1]), _one_by_one(made, x[:1]))
    same = x[:1].expand(2000, 6)
    outputs, at_once = _one_by_one(made, same).detach(), made(same).detach()
    error = (outputs.mean(0) - at_once.mean(0)).abs()
    assert (error <= 5 * ((outputs.var(0) + at_once.var(0)) / 2000).sqrt() + 1e-12).all()
    # fresh masks in every step would make the outputs of different features less dependent
    ours, theirs = (torch.corrcoef(o.flatten(1).T[3:]) for o in (outputs, at_once))
    assert theirs.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * 2**0.5 / 2000**0.5)


def test_batch_norm_in_training_is_refused_one_by_one() -> None:
    made = ResMADE(3, 2, batch_norm=True)
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        made.start((5,))
    made.eval().start((5,))


def test_wrong_steps_are_explained() -> None:
    made = ResMADE(2, 3, context_features=4)
    with pytest.raises(ValueError, match="pass a context"):
        made.start((5,))
    with pytest.raises(ValueError, match=r"\(6,\) of the context do not broadcast .* \(5,\)"):
        made.start((5,), torch.randn(6, 4))
    state = made.start((5,), torch.randn(4))
    with pytest.raises(ValueError, match="no feature before"):
        made.step(state, torch.randn(5))
    _, state = made.step(state)
    with pytest.raises(ValueError, match=r"shape \(5,\), got None"):
        made.step(state)
    with pytest.raises(ValueError, match=r"shape \(5,\), got shape \(4,\)"):
        made.step(state, torch.randn(4))
    _, state = made.step(state, torch.randn(5))
    with pytest.raises(ValueError, match="all 2 features are done"):
        made.step(state, torch.randn(5))


def test_a_batch_of_contexts_extends_the_batch() -> None:
    made = _randomized(ResMADE(3, 2, context_features=4))
    x, context = torch.randn(5, 3), torch.randn(5, 4)
    state = made.start((), context)
    first, state = made.step(state)
    second, _ = made.step(state, x[:, 0])
    torch.testing.assert_close(torch.stack([first, second], 1), made(x, context)[:, :2])
