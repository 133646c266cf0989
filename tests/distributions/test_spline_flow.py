"""NeuralSplineFlow in all its settings: exact densities, draws, copies, contexts, bad input."""

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ext.distributions import NeuralSplineFlow
from pyro_ext.distributions.transforms import RationalQuadraticSpline
from pyro_ext.distributions.unit_box import UnitBox
from tests.distributions.layers import full_log_det, randomize

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": 8, "residual_blocks": 1, "bins": 4}
LOW, HIGH = -1.0, 3.0
SETTINGS: dict[str, dict[str, Any]] = {
    f"{layer}, {spline}{', inverse' * inverse}": {
        "coupling": layer == "coupling",
        "spline": spline,
        "inverse": inverse,
    }
    for layer in ("coupling", "autoregressive")
    for spline in ("rational_quadratic", "quadratic", "affine", "additive")
    for inverse in (False, True)
}
BOXES: dict[str, dict[str, Any]] = {
    f"{layer}, {spline}, box": {
        "coupling": layer == "coupling",
        "spline": spline,
        "box": (LOW, HIGH),
    }
    for layer in ("coupling", "autoregressive")
    for spline in ("rational_quadratic", "quadratic")
}
BOXES["coupling, inverse, box"] = {"inverse": True, "box": (LOW, HIGH)}
ALL = SETTINGS | BOXES
FEW = {
    name: ALL[name]
    for name in (
        "coupling, rational_quadratic",
        "autoregressive, rational_quadratic",
        "autoregressive, quadratic, inverse",
        "coupling, affine",
        "coupling, rational_quadratic, box",
    )
}
all_settings = pytest.mark.parametrize("setting", ALL.values(), ids=ALL)
few_settings = pytest.mark.parametrize("setting", FEW.values(), ids=FEW)
contexts = pytest.mark.parametrize("context_size", [0, 3], ids=["alone", "context"])


def _flow(features: int, context_size: int = 0, scale: float = 0.2, **setting: Any) -> Any:
    """A small flow away from its start."""
    flow = NeuralSplineFlow(features, context_size, **{**SMALL, **setting})
    return randomize(flow, scale)


def _context(size: int, *batch_shape: int) -> Tensor | None:
    return torch.randn(*batch_shape, size) if size else None


# -- densities ---------------------------------------------------------------------------------


@all_settings
@contexts
@pytest.mark.parametrize("features", [1, 2, 5])
def test_log_prob_is_that_of_the_draws(
    setting: dict[str, Any], context_size: int, features: int
) -> None:
    flow = _flow(features, context_size, **setting)
    context = _context(context_size, 6)
    x, log_prob = flow(context).rsample_and_log_prob(() if context_size else (6,))
    assert x.shape == (6, features)
    torch.testing.assert_close(flow(context).log_prob(x), log_prob, rtol=0, atol=1e-9)
    z, _ = flow.bijection.to_noise(x, context)
    torch.testing.assert_close(flow.bijection.to_data(z, context)[0], x, rtol=0, atol=1e-10)


@few_settings
@contexts
def test_log_prob_is_the_density_of_transformed_noise(
    setting: dict[str, Any], context_size: int
) -> None:
    flow = _flow(3, context_size, **setting)
    context = _context(context_size)
    distribution = flow(context)
    x = distribution.sample((4,))

    def to_noise(vector: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = flow.bijection.to_noise(vector, context)
        return z, log_det

    noise = dist.Uniform(0.0, 1.0) if "box" in setting else dist.Normal(0.0, 1.0)
    z, _ = to_noise(x)
    expected = noise.log_prob(z).sum(-1) + full_log_det(to_noise, x)
    torch.testing.assert_close(distribution.log_prob(x), expected, rtol=0, atol=1e-9)


@few_settings
@contexts
def test_transforms_make_the_same_density_in_torch(
    setting: dict[str, Any], context_size: int
) -> None:
    flow = _flow(3, context_size, **setting)
    distribution = flow(_context(context_size, 4))
    base = distribution.base.expand(distribution.batch_shape)
    transformed = dist.TransformedDistribution(base, distribution.transforms)
    x = distribution.sample((5,))
    expected = distribution.log_prob(x)
    torch.testing.assert_close(transformed.log_prob(x), expected, rtol=0, atol=1e-9)


def _ends(distribution: Any) -> tuple[Tensor, Tensor]:
    """Ends of a box with next to all of the probability."""
    features = distribution.event_shape[0]
    if isinstance(distribution.base, UnitBox):
        return torch.full((features,), LOW), torch.full((features,), HIGH)
    draws = distribution.sample((2000,)).reshape(-1, features)
    return draws.mean(0) - 8 * draws.std(0), draws.mean(0) + 8 * draws.std(0)


def _grid(
    distribution: Any, number: int, ends: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, float]:
    """Midpoints of cells, and the volume of one."""
    features = distribution.event_shape[0]
    low, high = _ends(distribution) if ends is None else ends
    width = (high - low) / number
    unit = torch.cartesian_prod(*[torch.arange(number) + 0.5] * features).reshape(-1, features)
    return low + width * unit, float(width.prod())


@all_settings
@pytest.mark.parametrize("features", [1, 2])
def test_densities_integrate_to_one(setting: dict[str, Any], features: int) -> None:
    distribution = _flow(features, **setting)()
    with torch.no_grad():
        points, volume = _grid(distribution, 4000 if features == 1 else 200)
        total = distribution.log_prob(points).exp().sum() * volume
    assert float(total) == pytest.approx(1.0, abs=1e-3)


@few_settings
def test_conditional_densities_integrate_to_one(setting: dict[str, Any]) -> None:
    flow = _flow(1, 3, scale=0.4, **setting)
    context = torch.randn(5, 3)
    with torch.no_grad():
        points, volume = _grid(flow(context), 4000)
        log_prob = flow(context).log_prob(points.unsqueeze(1))
    totals = log_prob.exp().sum(0) * volume
    torch.testing.assert_close(totals, torch.ones(5), rtol=0, atol=1e-3)
    assert log_prob.std(1).max() > 0.01  # the context matters


@few_settings
@pytest.mark.parametrize("features", [1, 2])
def test_draws_fit_the_density(setting: dict[str, Any], features: int) -> None:
    """Counts of draws in cells, and all others in one more, against integrals of the density."""
    distribution = _flow(features, scale=0.3, **setting)()
    num_draws, num_cells = 20_000, 40
    num_points = 200 if features == 1 else 12  # in a cell, along an axis
    with torch.no_grad():
        low, high = _ends(distribution)
        x = distribution.sample((num_draws,))
        points, volume = _grid(distribution, num_cells * num_points, (low, high))
        probs = volume * distribution.log_prob(points).exp()
    probs = probs.reshape((num_cells, num_points) * features)
    probs = probs.sum(tuple(range(1, 2 * features, 2))).flatten()
    cell = ((x - low) * (num_cells / (high - low))).floor()
    is_outside = ((cell < 0) | (cell >= num_cells)).any(-1)
    number = (cell * torch.tensor([1.0] if features == 1 else [num_cells, 1.0])).sum(-1).long()
    counts = torch.bincount(number[~is_outside], minlength=num_cells**features)
    expected = num_draws * probs
    enough = expected > 5
    expected, counts = expected[enough], counts[enough]
    # the rest goes to one of the others, as it may be next to nothing
    expected[0] += num_draws - expected.sum()
    counts[0] += num_draws - counts.sum()
    result = stats.chisquare(counts, expected)
    assert result.pvalue > 1e-3


def test_a_wide_flow() -> None:
    flow = _flow(500, scale=0.01)
    x, log_prob = flow().rsample_and_log_prob((3,))
    torch.testing.assert_close(flow().log_prob(x), log_prob, rtol=0, atol=1e-8)


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [True, False], ids=["coupling", "autoregressive"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)], ids=str
)
def test_round_trips_through_ten_steps(
    coupling: bool, dtype: torch.dtype, tolerance: float
) -> None:
    flow = NeuralSplineFlow(6, coupling=coupling).to(dtype)
    x = torch.randn(500, 6, dtype=dtype)
    with torch.no_grad():
        back, _ = flow.bijection.to_data(flow.bijection.to_noise(x)[0])
    assert (back - x).abs().max() < tolerance


@few_settings
def test_the_start_is_near_the_identity(setting: dict[str, Any]) -> None:
    """Up to permutations: near the density of the noise."""
    flow = NeuralSplineFlow(4, **{**SMALL, **setting})
    x = flow().sample((200,))
    noise = 4 * torch.tensor(1 / (HIGH - LOW)).log() if "box" in setting else None
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) if noise is None else noise.expand(200)
    assert (flow().log_prob(x) - expected).abs().max() < 1.0


@all_settings
@contexts
def test_gradients_reach_every_parameter(setting: dict[str, Any], context_size: int) -> None:
    flow = _flow(3, context_size, **setting)
    distribution = flow(_context(context_size, 40))
    x = distribution.sample(() if context_size else (40,))
    distribution.log_prob(x).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        is_volume_free = setting.get("spline") == "additive"
        assert parameter.grad.any() or is_volume_free, name


@few_settings
def test_gradients_of_draws_reach_every_parameter(setting: dict[str, Any]) -> None:
    flow = _flow(3, **setting)
    x, log_prob = flow().rsample_and_log_prob((40,))
    (x.square().sum() + log_prob.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@few_settings
def test_training_lowers_the_loss(setting: dict[str, Any]) -> None:
    flow = NeuralSplineFlow(2, **{**SMALL, **setting})
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    x = 0.3 * torch.randn(200, 2) + torch.tensor([0.5, 0.8])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -flow().log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@few_settings
@contexts
@pytest.mark.parametrize("shape", [(0,), (0, 2), (3, 0)], ids=str)
def test_zero_rows(setting: dict[str, Any], context_size: int, shape: tuple[int, ...]) -> None:
    flow = _flow(3, context_size, **setting)
    distribution = flow(_context(context_size, *shape))
    x = distribution.sample(() if context_size else shape)
    assert x.shape == (*shape, 3)
    assert distribution.log_prob(x).shape == shape
    distribution.log_prob(x).sum().backward()


@few_settings
def test_memory_layout_does_not_matter(setting: dict[str, Any]) -> None:
    flow = _flow(3, 2, **setting)
    context = torch.randn(4, 2)
    x = flow(context).sample((5,))
    expected = flow(context).log_prob(x)
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    found = flow(context.t().contiguous().t()).log_prob(strided)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@few_settings
def test_batches_of_contexts(setting: dict[str, Any]) -> None:
    flow, context = _flow(2, 3, **setting), torch.randn(4, 5, 3)
    distribution = flow(context)
    assert distribution.batch_shape == (4, 5)
    assert distribution.event_shape == (2,)
    x = distribution.sample((6,))
    assert x.shape == (6, 4, 5, 2)
    log_prob = distribution.log_prob(x)
    for i, j in [(0, 0), (3, 1)]:
        alone = flow(context[i, j]).log_prob(x[:, i, j])
        torch.testing.assert_close(log_prob[:, i, j], alone, rtol=1e-11, atol=1e-11)


@few_settings
def test_the_seed_decides(setting: dict[str, Any]) -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(4)
        draws.append(_flow(3, **setting)().sample((5,)))
    assert torch.equal(*draws)


# -- copies ------------------------------------------------------------------------------------


@few_settings
@contexts
def test_copies_have_the_same_density(setting: dict[str, Any], context_size: int) -> None:
    flow = _flow(3, context_size, **setting).eval()
    context = _context(context_size)
    x = flow(context).sample((5,))
    flow(context).log_prob(x)
    expected = flow(context).log_prob(x)
    fresh = NeuralSplineFlow(3, context_size, **{**SMALL, **setting}).eval()
    assert not torch.allclose(fresh(context).log_prob(x), expected)
    fresh.load_state_dict(flow.state_dict())
    for other in (fresh, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(other(context).log_prob(x), expected)
        randomize(other)
        assert torch.equal(flow(context).log_prob(x), expected)  # nothing is shared


NEW_PROCESS = """
import sys
import torch
from pyro_ext.distributions import NeuralSplineFlow

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(12345)  # other permutations than those that were saved
for case in torch.load(sys.argv[1], weights_only=True):
    flow = NeuralSplineFlow(3, case["context"].shape[-1], **case["setting"])
    flow.load_state_dict(case["state"])
    log_prob = flow(case["context"]).log_prob(case["x"])
    error = (log_prob - case["expected"]).abs().max().item()
    assert error < 1e-12, (case["setting"], error)
"""


def test_weights_are_loaded_in_a_new_process(tmp_path: Path) -> None:
    cases = []
    for setting in FEW.values():
        flow, context = _flow(3, 2, **setting), torch.randn(2)
        if "box" not in setting:
            flow.initialize(5.0 + 2.0 * torch.randn(50, 3))
        x = flow(context).sample((5,))
        cases.append(
            {
                "setting": {**SMALL, **setting},
                "state": flow.state_dict(),
                "context": context,
                "x": x,
                "expected": flow(context).log_prob(x).detach(),
            }
        )
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-c", NEW_PROCESS, str(tmp_path / "cases.pt")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200)
    assert result.returncode == 0, result.stderr


@few_settings
@contexts
def test_precision_is_that_of_the_module(setting: dict[str, Any], context_size: int) -> None:
    flow = _flow(3, context_size, **setting).eval()
    context = _context(context_size)
    x = flow(context).sample((20,))
    expected = flow(context).log_prob(x)
    flow.float()
    context32 = None if context is None else context.float()
    single = flow(context32)
    assert single.sample((2,)).dtype == torch.float32
    log_prob = single.log_prob(x.float().clamp(*((LOW, HIGH) if "box" in setting else (-99, 99))))
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), expected, rtol=0, atol=1e-3)
    flow.double()
    assert flow(context).sample((2,)).dtype == torch.float64
    torch.testing.assert_close(flow(context).log_prob(x), expected, rtol=0, atol=1e-3)


# -- data --------------------------------------------------------------------------------------


@few_settings
def test_initialize_standardises(setting: dict[str, Any]) -> None:
    flow = _flow(3, **setting)
    x = torch.tensor([5.0, -100.0, 0.1]) + torch.tensor([1.0, 30.0, 0.01]) * torch.randn(300, 3)
    before = copy.deepcopy(flow.state_dict())
    flow.initialize(x)
    if "box" in setting:
        after = flow.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return
    z, _ = flow.bijection.bijections[0].to_noise(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-10)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-10)


BOX_ENDS = [(0.1, 0.7), (-1000.0, 0.001), (0.0, 1.0), (1e-3, 1e6), (-1.0 / 3.0, 2.0 / 3.0)]


@pytest.mark.parametrize(("low", "high"), BOX_ENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("coupling", [True, False], ids=["coupling", "autoregressive"])
def test_boxes_hold_their_ends_and_their_draws(
    low: float, high: float, dtype: torch.dtype, coupling: bool
) -> None:
    flow = _flow(2, box=(low, high), scale=1.0, coupling=coupling).to(dtype)
    ends = torch.tensor([low, high], dtype=dtype)
    assert flow().log_prob(torch.cartesian_prod(ends, ends)).isfinite().all()
    x = flow().sample((5_000,))
    assert flow().log_prob(x).isfinite().all()  # validation is on
    slack = 4 * torch.finfo(dtype).eps * max(abs(low), abs(high))
    assert x.min() >= low - slack
    assert x.max() <= high + slack


def test_a_box_of_its_own_for_every_feature() -> None:
    low, high = torch.tensor([0, -5]), torch.tensor([1, 10])
    flow = _flow(2, box=(low, high))
    x = flow().sample((1000,))
    assert ((x >= low) & (x <= high)).all()
    assert (x.amax(0) - x.amin(0) > 0.5 * (high - low)).all()
    assert flow().support.check(x).all()
    with pytest.raises(ValueError, match="within the support"):
        flow().log_prob(torch.tensor([0.5, 10.5]))


# -- the noise ---------------------------------------------------------------------------------


class _Base(nn.Module):
    def __init__(self, context_size: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context_size, features)

    def forward(self, context: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.linear(context), 0.5).to_event(1)


@contexts
def test_another_distribution_as_the_noise(context_size: int) -> None:
    base = dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    flow = _flow(2, context_size, base=base)
    context = _context(context_size, 3)
    x, log_prob = flow(context).rsample_and_log_prob((4,))
    z, log_det = flow.bijection.to_noise(x, context)
    expected = base.log_prob(z) + log_det
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(flow(context).log_prob(x), expected, rtol=0, atol=1e-9)


def test_the_noise_may_depend_on_the_context() -> None:
    flow = _flow(2, 3, base=_Base(3, 2))
    context = torch.randn(5, 3)
    x = flow(context).sample()
    z, log_det = flow.bijection.to_noise(x, context)
    expected = flow.base(context).log_prob(z) + log_det
    torch.testing.assert_close(flow(context).log_prob(x), expected, rtol=0, atol=1e-9)
    flow(context).log_prob(x).sum().backward()
    assert flow.base.linear.weight.grad.abs().sum() > 0
    assert any(name.startswith("base.") for name in flow.state_dict())


def test_the_noise_may_be_trained_without_a_context() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self) -> dist.TorchDistribution:
            return dist.Laplace(self.loc, 1.0).to_event(1)

    flow = _flow(2, base=Noise())
    flow().log_prob(torch.randn(5, 2)).sum().backward()
    assert flow.base.loc.grad.abs().sum() > 0


# -- torch.func and the compiler ---------------------------------------------------------------


@few_settings
@contexts
def test_vmap_over_parameters(setting: dict[str, Any], context_size: int) -> None:
    torch.manual_seed(0)
    flows = [_flow(3, context_size, **setting) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(flows)
    x, context = flows[0](_context(context_size)).sample((5,)), _context(context_size)

    class LogProb(nn.Module):
        def __init__(self, flow: NeuralSplineFlow) -> None:
            super().__init__()
            self.flow = flow

        def forward(self) -> Tensor:
            distribution = self.flow(context)
            distribution._validate_args = False
            return distribution.log_prob(x)

    module = LogProb(flows[0])

    def evaluate(*states: dict[str, Tensor]) -> Tensor:
        prefixed = tuple({f"flow.{k}": v for k, v in state.items()} for state in states)
        return torch.func.functional_call(module, prefixed, ())

    found = torch.vmap(evaluate)(parameters, buffers)
    for i, flow in enumerate(flows):
        expected = flow(context).log_prob(x)
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def compiler() -> Iterator[None]:
    """The compiler of PyTorch, which switches the validation of its distributions off."""
    is_enabled = Distribution._validate_args
    yield
    torch.compiler.reset()
    Distribution.set_default_validate_args(is_enabled)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("coupling", [True, False], ids=["coupling", "autoregressive"])
@contexts
def test_compilation_has_no_graph_breaks(coupling: bool, context_size: int) -> None:
    flow = _flow(3, context_size, coupling=coupling, transforms=1)
    context, x = _context(context_size, 4), torch.randn(4, 3)

    def log_prob(x: Tensor) -> Tensor:
        return flow(context).log_prob(x)

    def sample(z: Tensor) -> Tensor:
        return flow.bijection.to_data(z, context)[0]

    def draw() -> Tensor:
        return flow(context).rsample(() if context_size else (4,))

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    with torch.no_grad():
        torch.testing.assert_close(compiled(sample)(x), sample(x))
        assert compiled(draw)().isfinite().all()
    results = []
    for function in (log_prob, compiled(log_prob)):
        flow.zero_grad()
        value = function(x)
        value.sum().backward()
        results.append([value, *(p.grad for p in flow.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
# the compiler looks at the gradients of its inputs
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
@pytest.mark.parametrize("coupling", [True, False], ids=["coupling", "autoregressive"])
def test_compiled_layers_do_the_same(coupling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # all that the compiler does, but for the C++
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = _flow(3, coupling=coupling)
    compiled = _flow(3, coupling=coupling, compile=True)
    compiled.load_state_dict(plain.state_dict())
    is_validated = Distribution._validate_args
    x = torch.randn(6, 3)
    gradients = []
    for flow in (plain, compiled):
        flow().log_prob(x).sum().backward()
        gradients.append([p.grad for p in flow.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(compiled().log_prob(x), plain().log_prob(x))
        draws = []
        for flow in (plain, compiled):
            torch.manual_seed(1)
            draws.append(flow().rsample_and_log_prob((6,)))
        torch.testing.assert_close(*draws)
    assert Distribution._validate_args == is_validated

    # one program for all steps in each direction
    functions = compiled.bijection._compiled._functions
    assert len(functions) == (2 if coupling else 1)
    # copies compile for themselves, and transforms see the plain layers
    assert pickle.loads(pickle.dumps(compiled)).bijection._compiled._functions == {}
    assert copy.deepcopy(compiled).bijection._compiled._functions == {}
    in_rows = torch.vmap(lambda row: compiled.bijection.to_noise(row)[0])(x)
    torch.testing.assert_close(in_rows, plain.bijection.to_noise(x)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_native_code_does_the_same() -> None:
    flow = _flow(3, compile=True)
    x = torch.randn(6, 3)
    with torch.no_grad():
        found = flow().log_prob(x)
        noise, log_det = torch.vmap(flow.bijection.to_noise)(x)  # does not compile
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) + log_det
    torch.testing.assert_close(found, expected)


# -- bad input ---------------------------------------------------------------------------------


def test_more_digits_than_the_parameters_have_are_refused() -> None:
    flow = _flow(3, 2).float()
    context = torch.randn(2, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"context is of torch.float64.*flow.to\(torch.float64\)"):
        flow(context.double())
    with pytest.raises(TypeError, match=r"value is of torch.float64.*value.to\(torch.float32\)"):
        flow(context).log_prob(torch.randn(4, 3))
    assert flow(context).log_prob(torch.ones(4, 3, dtype=torch.long)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features=0: .* at least 1"),
        ({"features": 2.0}, "features=2.0"),
        ({"transforms": 0}, "transforms=0: .* at least 1"),
        ({"context_features": -1}, "context_features"),
        ({"features": 1, "context_features": -1}, "context_features"),
        ({"bins": 1}, "bins=1: .* at least 2"),
        ({"bound": 0.0}, "give bound > 0"),
        ({"bound": -1.0}, "give bound > 0"),
        ({"hidden_features": 0}, "hidden_features must be an integer"),
        ({"dropout": 1.0}, "dropout .*got 1.0"),
        ({"dropout": -0.1}, "dropout .*got -0.1"),
        ({"residual_blocks": -1}, "residual_blocks"),
        ({"spline": "cubic"}, "spline='cubic' is unknown; choose 'rational_quadratic'"),
        ({"spline": None}, "spline=None is unknown"),
        ({"spline": "affine", "box": (0.0, 1.0)}, "leave the box: choose a spline"),
        ({"box": (1.0, 0.0)}, "lower end has to be below its upper end"),
        ({"box": (0.0, 0.0)}, "lower end has to be below its upper end"),
        ({"box": (0.0, float("inf"))}, "lower end has to be below its upper end"),
        ({"box": (float("nan"), 1.0)}, "lower end has to be below its upper end"),
        ({"box": (torch.zeros(3), 1.0)}, r"box has an end of shape \(3,\).*\(2,\)"),
        (
            {"spline": RationalQuadraticSpline(4, tails=False)},
            "tails=False.* needs a box",
        ),
        (
            {"spline": RationalQuadraticSpline(4), "box": (0.0, 1.0)},
            "in a box every spline needs tails=False",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralSplineFlow(**{"features": 2, **arguments})


def test_bad_contexts_are_explained() -> None:
    with pytest.raises(ValueError, match=r"conditional: call it with a context .*\(\.\.\., 3\)"):
        _flow(2, 3)()
    with pytest.raises(
        ValueError, match=r"no context.*\(4, 3\); make it with context_features > 0"
    ):
        _flow(2)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="no context"):
        _flow(2)(torch.tensor(1.0))
    for wrong in (torch.randn(4, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="last dimension has to be context_features=3"):
            _flow(2, 3)(wrong)


@few_settings
def test_bad_data_are_explained(setting: dict[str, Any]) -> None:
    distribution = _flow(3, **setting)()
    x = distribution.sample((4,))
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="within the support"):
        distribution.log_prob(x)
    with pytest.raises(ValueError, match="right-most size of value must match event_shape"):
        distribution.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="event_shape"):
        distribution.log_prob(torch.tensor(0.5))


def test_values_do_not_match_the_batch_of_contexts() -> None:
    distribution = _flow(2, 3)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="not broadcastable"):
        distribution.log_prob(torch.randn(5, 2))


@few_settings
def test_integers_are_numbers(setting: dict[str, Any]) -> None:
    distribution = _flow(3, **setting)()
    x = torch.tensor([[0, 1, 2], [1, 1, 0]])
    torch.testing.assert_close(distribution.log_prob(x), distribution.log_prob(x.double()))


@pytest.mark.parametrize(
    "base",
    [
        dist.Normal(torch.zeros(2), 1.0),
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        dist.Normal(torch.zeros(2, 2), 1.0).to_event(2),
    ],
    ids=["no event", "too many features", "matrices"],
)
def test_a_base_of_the_wrong_shape_is_explained(base: Any) -> None:
    with pytest.raises(ValueError, match=r"needs \(2,\).*`\.to_event\(1\)`"):
        _flow(2, base=base)()


def test_the_representation_tells_the_sizes() -> None:
    text = repr(_flow(2, 3))
    assert text.startswith("NeuralSplineFlow(\n  features=2, context_features=3")
    assert "RationalQuadraticSpline(bins=4, bound=3.0" in text
