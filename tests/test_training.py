"""Fits against closed-form answers, exact resumption, and what happens when things go wrong."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ext.averaging import averaged, update_average
from pyro_ext.errors import PyroExtError
from pyro_ext.training import FitResult, fit_density


class AffineGaussian(nn.Module):
    """A Gaussian whose mean may depend linearly on a context; the smallest flow there is."""

    def __init__(self, features: int = 2, context_features: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.dropout = nn.Dropout(dropout)
        self.slope = nn.Parameter(torch.zeros(context_features, features))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        mean = self.mean if context is None else self.mean + self.dropout(context) @ self.slope
        return dist.Normal(mean, self.log_scale.exp()).to_event(1)


class Initialized(AffineGaussian):
    """Starts from data, and counts how often."""

    def __init__(self, context_features: int = 0) -> None:
        super().__init__(2, context_features)
        self.calls: list[tuple[torch.Size, ...]] = []

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.calls.append((x.shape,) if context is None else (x.shape, context.shape))
        self.mean.copy_(x.mean(0))


def fit(flow: nn.Module, train: Tensor, **settings: Any) -> FitResult:
    """A fit without a progress bar, with minibatches of a fixed seed."""
    settings.setdefault("generator", torch.Generator().manual_seed(1))
    return fit_density(flow, train, progress=False, **settings)


def same(first: FitResult, second: FitResult) -> None:
    """Everything but the time is equal to the last bit."""
    for name, value in first._asdict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                getattr(second, name), value, rtol=0, atol=0, equal_nan=True, msg=name
            )
        elif name != "seconds":
            assert getattr(second, name) == value, name


def same_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, ours), theirs in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def interrupt_at(step: int) -> Callable[[nn.Module, Tensor, Tensor | None], Tensor]:
    """The usual loss, but Ctrl-C is pressed while it is computed for this training step."""
    calls = 0

    def loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        nonlocal calls
        calls += flow.training
        value = usual_loss(flow, x, context)
        if calls == step and flow.training:
            raise KeyboardInterrupt
        return value

    return loss


def usual_loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    density = flow() if context is None else flow(context)
    return -density.log_prob(x).mean()


# -------------------------------------------------------------------------------- the right answer


def test_full_batches_find_the_maximum_likelihood_estimate() -> None:
    train = torch.tensor([2.0, -1.0]) + torch.tensor([0.5, 2.0]) * torch.randn(400, 2)
    flow = AffineGaussian()
    result = fit(flow, train, num_steps=600, batch_size=400, learning_rate=0.1)
    torch.testing.assert_close(flow.mean.detach(), train.mean(0), rtol=1e-4, atol=1e-4)
    scale = train.std(0, correction=0)
    torch.testing.assert_close(flow.log_scale.detach().exp(), scale, rtol=1e-4, atol=1e-4)
    # the entropy of the fitted Gaussian is what the loss ends at
    entropy = float((scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum())
    assert float(result.losses[-1]) == pytest.approx(entropy, abs=1e-6)
    assert result.losses.shape == (600,)
    assert result.best_step == 600
    assert not result.stopped_early
    assert result.num_skipped == 0
    assert result.validation_steps.shape == result.validation_log_likelihoods.shape == (0,)
    assert result.seconds > 0


def test_a_context_is_used_row_by_row() -> None:
    context = torch.randn(500, 3)
    slope = torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])
    train = context @ slope + 0.1 * torch.randn(500, 2)
    flow = AffineGaussian(2, 3)
    fit(flow, train, context=context, num_steps=400, batch_size=100, learning_rate=0.1)
    error = (flow.slope.detach() - slope).abs().max()
    # standard errors are 0.1 / sqrt(500)
    assert error < 5 * 0.1 / math.sqrt(500)


def test_the_step_size_falls_along_half_a_cosine() -> None:
    """With a constant gradient, Adam moves by the learning rate in every step."""

    def slope(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        return flow.mean.sum()

    flow, num_steps, rate = AffineGaussian(), 40, 0.1
    fit(
        flow,
        torch.randn(10, 2),
        num_steps=num_steps,
        learning_rate=rate,
        loss=slope,
        max_gradient_norm=None,
    )
    steps = torch.arange(num_steps) / num_steps
    travelled = rate * (0.5 * (1 + (math.pi * steps).cos())).sum()
    torch.testing.assert_close(-flow.mean.detach(), travelled.expand(2), rtol=1e-6, atol=0)


def test_gradients_are_clipped() -> None:
    norms = []

    flow = AffineGaussian()
    step = torch.optim.Adam.step

    def recorded(optimizer: torch.optim.Adam) -> None:
        parameters = optimizer.param_groups[0]["params"]
        norms.append(
            float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())
        )
        step(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", recorded)
        fit(flow, 100 + torch.randn(50, 2), num_steps=5, max_gradient_norm=0.5)
    assert norms == pytest.approx([0.5] * 5, rel=1e-4)


def test_weight_decay_shrinks_weights() -> None:
    train = 3.0 + torch.randn(200, 2)
    free, shrunk = AffineGaussian(), AffineGaussian()
    settings = {"num_steps": 300, "batch_size": 200, "learning_rate": 0.1}
    fit(free, train, **settings)
    fit(shrunk, train, weight_decay=1.0, **settings)
    assert (shrunk.mean < 0.9 * free.mean).all()


def test_every_row_is_used_once_before_any_is_used_again() -> None:
    seen: list[float] = []

    def loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        seen.extend(x[:, 0].tolist())
        return usual_loss(flow, x, context)

    train = torch.arange(12.0).unsqueeze(1).expand(12, 2)
    fit(AffineGaussian(), train, num_steps=6, batch_size=4, loss=loss)
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


def test_fewer_rows_than_a_minibatch_are_all_used() -> None:
    sizes = []

    def loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        sizes.append(len(x))
        return usual_loss(flow, x, context)

    fit(AffineGaussian(), torch.randn(7, 2), num_steps=3, batch_size=256, loss=loss)
    assert sizes == [7, 7, 7]


def test_data_are_cast_to_the_dtype_of_the_flow() -> None:
    flow = AffineGaussian(2, 1).float()
    train, context = torch.randn(20, 2), torch.randn(20, 1)
    result = fit(flow, train, context=context, num_steps=2, validation=(train, context))
    assert flow.mean.dtype == torch.float32
    assert result.losses.isfinite().all()


def test_a_context_of_classes_stays_integer() -> None:
    class PerClass(AffineGaussian):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.Embedding(3, 2)

        def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
            return dist.Normal(self.means(context), 1.0).to_event(1)

    flow, classes = PerClass(), torch.arange(300) % 3
    fit(
        flow,
        classes[:, None] + torch.zeros(300, 2),
        context=classes,
        num_steps=300,
        learning_rate=0.1,
    )
    expected = torch.arange(3.0).unsqueeze(1).expand(3, 2)
    torch.testing.assert_close(flow.means.weight.detach(), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_batches_move_to_the_device_of_the_flow() -> None:
    flow = AffineGaussian(2, 1).cuda()
    train, context = torch.randn(20, 2), torch.randn(20, 1)
    result = fit(flow, train, context=context, num_steps=3, validation=(train, context))
    assert flow.mean.is_cuda
    assert result.losses.isfinite().all()


# ---------------------------------------------------------------------------- validation, stopping


def test_the_best_weights_are_restored() -> None:
    """The training data pull the mean past the validation data and away from it."""
    train, validation = torch.full((50, 2), 4.0), torch.full((30, 2), 1.0)
    flow = AffineGaussian()
    flow.log_scale.requires_grad_(False)
    result = fit(
        flow,
        train,
        validation=validation,
        num_steps=200,
        learning_rate=0.1,
        evaluate_every=1,
    )
    best = int(result.validation_log_likelihoods.argmax())
    assert result.best_step == int(result.validation_steps[best])
    assert 0 < result.best_step < 100
    assert (flow.mean - 1.0).abs().max() < 0.1
    value = float(flow().log_prob(validation).mean().detach())
    assert value == pytest.approx(float(result.validation_log_likelihoods.max()), rel=1e-12)


def test_averaged_weights_are_the_mean_of_those_of_the_steps() -> None:
    module = AffineGaussian()
    steps = torch.randn(20, 2)
    average = None
    expected = steps[0]
    for step, weight in enumerate(steps):
        module.mean.data.copy_(weight)
        average = update_average(average, dict(module.named_parameters()), 0.8, step)
        decay = min(0.8, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * weight
    assert average is not None
    torch.testing.assert_close(average["mean"], expected)
    with averaged(module, average):
        assert torch.equal(module.mean, average["mean"])
    assert torch.equal(module.mean, steps[-1])


def test_averaged_weights_are_what_is_evaluated_and_kept() -> None:
    x = torch.randn(30, 2) + 2
    flow = AffineGaussian()
    settings = {"num_steps": 12, "batch_size": 10, "learning_rate": 0.1, "evaluate_every": 4}
    result = fit(flow, x, validation=x, ema_decay=0.5, **settings)
    kept = float(flow().log_prob(x).mean().detach())
    assert kept == pytest.approx(float(result.validation_log_likelihoods.max()), abs=1e-12)
    plain = AffineGaussian()
    fit(plain, x, validation=x, **settings)
    assert not torch.equal(plain.mean, flow.mean)


def test_evaluations_are_where_they_should_be() -> None:
    train = torch.randn(50, 2)
    result = fit(AffineGaussian(), train, validation=train, num_steps=25, evaluate_every=10)
    assert result.validation_steps.tolist() == [10, 20, 25]


def test_the_validation_value_is_the_mean_over_rows_in_evaluation_mode() -> None:
    """In batches of unequal size, and without dropout."""
    context, x = torch.randn(57, 1), torch.randn(57, 2)
    flow = AffineGaussian(2, 1, dropout=0.9)
    result = fit(flow, x, context=context, validation=(x, context), num_steps=1, batch_size=5)
    flow.eval()
    expected = float(flow(context).log_prob(x).mean().detach())
    assert float(result.validation_log_likelihoods[0]) == pytest.approx(expected, rel=1e-12)


def test_patience_stops_a_fit() -> None:
    train, validation = torch.full((50, 2), 4.0), torch.full((30, 2), 1.0)
    settings = {"num_steps": 300, "learning_rate": 0.1, "evaluate_every": 2}
    result = fit(AffineGaussian(), train, validation=validation, patience=3, **settings)
    assert result.stopped_early
    assert len(result.losses) == result.best_step + 3 * 2 < 300


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
def test_the_mode_of_the_flow_is_left_as_it_was(is_training: bool) -> None:
    flow = AffineGaussian().train(is_training)
    fit(flow, torch.randn(20, 2), validation=torch.randn(20, 2), num_steps=2)
    assert flow.training is is_training


def test_a_flow_is_initialized_once_with_a_minibatch() -> None:
    flow = Initialized()
    fit(flow, 5.0 + torch.randn(40, 2), num_steps=3, batch_size=8, learning_rate=1e-6)
    assert flow.calls == [((8, 2),)]
    assert (flow.mean - 5.0).abs().max() < 2.0


def test_a_flow_that_was_initialized_before_is_left_as_it_is() -> None:
    flow = Initialized()
    flow.is_initialized = True
    fit(flow, torch.randn(40, 2), num_steps=1)
    assert flow.calls == []


def test_initialization_sees_the_context() -> None:
    flow = Initialized(context_features=3)
    fit(flow, torch.randn(40, 2), context=torch.randn(40, 3), num_steps=1, batch_size=8)
    assert flow.calls == [((8, 2), (8, 3))]


def test_initialization_may_do_without_the_context() -> None:
    class FromDataAlone(AffineGaussian):
        def initialize(self, x: Tensor) -> None:
            self.mean.copy_(x.mean(0))

    flow = FromDataAlone(2, 3)
    train, context = 5.0 + torch.randn(40, 2), torch.randn(40, 3)
    fit(flow, train, context=context, num_steps=1, batch_size=40, learning_rate=1e-9)
    torch.testing.assert_close(flow.mean.detach(), train.mean(0))


# ----------------------------------------------------------------------- steps that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    calls = 0

    def loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return usual_loss(flow, x, context) * (math.nan if calls in (1, 4, 5) else 1.0)

    train = 2.0 + torch.randn(100, 2)
    flow = AffineGaussian()
    result = fit(flow, train, num_steps=300, learning_rate=0.1, loss=loss)
    assert result.num_skipped == 3
    assert (~result.losses.isfinite()).nonzero().flatten().tolist() == [0, 3, 4]
    assert (flow.mean - train.mean(0)).abs().max() < 0.01


def test_a_gradient_that_is_not_finite_is_skipped_too() -> None:
    def loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        # at zero the value is zero and the slope infinite
        return flow.mean.abs().sqrt().sum()

    flow = AffineGaussian()
    result = fit(flow, torch.randn(100, 2), num_steps=5, loss=loss)
    assert result.num_skipped == 5
    assert result.losses.isfinite().all()
    assert torch.equal(flow.mean, torch.zeros(2))


def test_too_many_bad_steps_are_an_error_that_keeps_the_best_weights() -> None:
    calls = 0

    def loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        nonlocal calls
        calls += flow.training
        return usual_loss(flow, x, context) * (math.nan if calls > 20 else 1.0)

    train, flow = torch.randn(100, 2), AffineGaussian()
    with pytest.raises(PyroExtError, match=r"10 steps in a row, the last of them step 30 .*nan"):
        fit(flow, train, validation=train, num_steps=100, loss=loss, evaluate_every=5)
    assert all(p.isfinite().all() for p in flow.parameters())
    assert flow.mean.abs().sum() > 0


# -------------------------------------------------------------------------------------- resumption

CASES = {
    "own generator": {},
    "global generator": {"generator": None},
    "validation and patience": {"patience": 50, "evaluate_every": 3},
    "averaged weights": {"ema_decay": 0.9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [2, 10, 11, 13, 29])  # rows are shuffled again in step 13
def test_a_resumed_fit_is_the_uninterrupted_one(case: str, step: int, tmp_path: Path) -> None:
    """To the last bit, with dropout and minibatches that do not divide the data."""
    x, context = torch.randn(50, 2), torch.randn(50, 1)

    def arguments() -> dict[str, Any]:
        settings = {"context": context, "num_steps": 30, "batch_size": 8, "learning_rate": 0.1}
        settings |= {"validation": (x + 1, context), "evaluate_every": 10, **CASES[case]}
        return settings

    def flow() -> AffineGaussian:
        torch.manual_seed(3)
        return AffineGaussian(2, 1, dropout=0.5)

    whole = flow()
    expected = fit(whole, x, **arguments())
    path, parts = tmp_path / "fit.pt", flow()
    with pytest.warns(UserWarning, match=f"Interrupted after {step - 1} of 30 steps"):
        fit(parts, x, checkpoint=path, loss=interrupt_at(step), **arguments())
    resumed = AffineGaussian(2, 1, dropout=0.5)
    torch.manual_seed(99)  # must not matter
    arguments_again = arguments()
    if "generator" not in arguments_again:
        arguments_again["generator"] = torch.Generator().manual_seed(77)
    result = fit(resumed, x, checkpoint=path, **arguments_again)
    same(expected, result)
    same_weights(whole, resumed)


def test_interrupted_in_an_evaluation_the_checkpoint_is_the_one_before(tmp_path: Path) -> None:
    x = torch.randn(50, 2)
    settings = {"validation": x, "num_steps": 20, "evaluate_every": 5, "learning_rate": 0.1}
    whole = AffineGaussian()
    expected = fit(whole, x, **settings)
    evaluations = 0

    def loss(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        nonlocal evaluations
        evaluations += not flow.training
        if evaluations == 3:
            raise KeyboardInterrupt
        return usual_loss(flow, x, context)

    path, parts = tmp_path / "fit.pt", AffineGaussian()
    with pytest.warns(UserWarning, match="Interrupted after 15 of 20"):
        interrupted = fit(parts, x, checkpoint=path, loss=loss, **settings)
    assert interrupted.validation_steps.tolist() == [5, 10]
    assert parts.training
    assert torch.load(path, weights_only=True)["step"] == 10
    resumed = AffineGaussian()
    same(expected, fit(resumed, x, checkpoint=path, **settings))
    same_weights(whole, resumed)


def test_a_finished_fit_is_read_back(tmp_path: Path) -> None:
    x, path = torch.randn(50, 2), tmp_path / "fit.pt"
    settings = {"validation": x + 1, "num_steps": 12, "evaluate_every": 2, "learning_rate": 0.5}
    first, second = AffineGaussian(), AffineGaussian()
    expected = fit(first, x, checkpoint=path, **settings)
    result = fit(second, x, checkpoint=path, **settings)
    same(expected, result)
    same_weights(first, second)
    assert result.seconds == expected.seconds


def test_a_fit_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    train, validation = torch.full((50, 2), 4.0), torch.full((30, 2), 1.0)
    settings = {"num_steps": 300, "learning_rate": 0.1, "evaluate_every": 2, "patience": 2}
    path = tmp_path / "fit.pt"
    first, second = AffineGaussian(), AffineGaussian()
    expected = fit(first, train, validation=validation, checkpoint=path, **settings)
    assert expected.stopped_early
    same(expected, fit(second, train, validation=validation, checkpoint=path, **settings))


def test_a_resumed_flow_is_not_initialized_again(tmp_path: Path) -> None:
    x, path = torch.randn(50, 2), tmp_path / "fit.pt"
    with pytest.warns(UserWarning, match="Interrupted"):
        fit(Initialized(), x, checkpoint=path, num_steps=5, loss=interrupt_at(3))
    flow = Initialized()
    fit(flow, x, checkpoint=path, num_steps=5)
    assert flow.calls == []


def test_an_interrupt_before_the_first_step_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(AffineGaussian(), torch.randn(50, 2), loss=interrupt_at(1))


def test_a_write_that_fails_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, path = torch.randn(50, 2), tmp_path / "fit.pt"
    settings = {"num_steps": 6, "evaluate_every": 3}
    replace, writes = os.replace, 0

    def fail_at_the_second(source: Path, target: Path) -> None:
        nonlocal writes
        writes += 1
        if writes == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        fit(AffineGaussian(), x, checkpoint=path, **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]
    assert torch.load(path, weights_only=True)["step"] == 3


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    x, path = torch.randn(50, 2), tmp_path / "fit.pt"
    fit(AffineGaussian(), x, checkpoint=path, num_steps=3)
    message = r"num_steps was 3 and is 4, batch_size was 50 and is 40, rows .*another path"
    with pytest.raises(ValueError, match=message):
        fit(AffineGaussian(), x[:40], checkpoint=path, num_steps=4, batch_size=50)


@pytest.mark.parametrize("changed", ["data", "context"])
def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, changed: str) -> None:
    x, context = torch.randn(50, 2), torch.randn(50, 3)
    settings = {"checkpoint": tmp_path / "fit.pt", "num_steps": 2}
    expected = fit(AffineGaussian(2, 3), x, context=context, **settings)
    same(expected, fit(AffineGaussian(2, 3), x.clone(), context=context, **settings))
    (x if changed == "data" else context)[17, 1] += 1.0
    with pytest.raises(ValueError, match=r"checksum of the data was \d+ and is .*another path"):
        fit(AffineGaussian(2, 3), x, context=context, **settings)


def test_a_checkpoint_without_a_folder_is_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        fit(AffineGaussian(), torch.randn(50, 2), checkpoint=tmp_path / "none" / "fit.pt")


# --------------------------------------------------------------------------------------- bad input

GOOD = torch.linspace(-1.0, 1.0, 20).reshape(10, 2)


def with_value(value: float, *rows: int) -> Tensor:
    x = GOOD.clone()
    x[list(rows), 1] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train": with_value(math.nan, 3, 7)}, ValueError, "train .* 2 of 10 rows.*row 3"),
        ({"train": with_value(math.inf, 9)}, ValueError, "train .* 1 of 10 rows.*row 9"),
        ({"train": GOOD.long()}, TypeError, "int64.*dequantise"),
        ({"train": GOOD.numpy()}, TypeError, "train must be a tensor, got ndarray"),
        ({"train": GOOD[:0]}, ValueError, r"at least one row, got shape \(0, 2\)"),
        ({"train": torch.tensor(1.0)}, ValueError, r"at least one row, got shape \(\)"),
        ({"train": GOOD.repeat(1, 2)}, ValueError, r"(?s)shape|event"),
        ({"context": GOOD[:9]}, ValueError, "context has 9 rows, train has 10"),
        ({"context": with_value(math.nan, 0)}, ValueError, "context has NaN"),
        ({"validation": with_value(math.nan, 5)}, ValueError, "validation has NaN.*row 5"),
        ({"validation": GOOD[:, :1]}, ValueError, r"validation have shape \(1,\).*\(2,\)"),
        ({"validation": (GOOD, GOOD)}, ValueError, "validation must be one tensor"),
        ({"validation": GOOD, "context": GOOD}, ValueError, r"the pair \(x, context\)"),
        (
            {"validation": (GOOD, GOOD[:4]), "context": GOOD},
            ValueError,
            "context of validation has 4 rows, validation has 10",
        ),
        (
            {"validation": (GOOD, GOOD[:, :1]), "context": GOOD},
            ValueError,
            "context of validation have shape",
        ),
        ({"num_steps": 0}, ValueError, "num_steps must be an integer of at least 1, got 0"),
        ({"num_steps": 2.5}, ValueError, "num_steps must be an integer of at least 1, got 2.5"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every"),
        ({"patience": 0, "validation": GOOD}, ValueError, "patience must be an integer"),
        ({"patience": 3}, ValueError, "patience counts evaluations"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be a positive number"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must be a positive number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"max_gradient_norm": 0.0}, ValueError, "max_gradient_norm must be positive or None"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay must be a number of at least 0 and below 1"),
        ({"loss": lambda flow, x, c: flow.mean}, ValueError, r"one number, got shape \(2,\)"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"train": GOOD, **arguments}
    flow = AffineGaussian(2, 2 if "context" in arguments else 0)
    with pytest.raises(error, match=message):
        fit(flow, **arguments)
    assert torch.equal(flow.mean, torch.zeros(2))


def test_a_flow_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="Identity has no parameters"):
        fit(nn.Identity(), GOOD)
    frozen = AffineGaussian().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        fit(frozen, GOOD)


def test_a_distribution_is_no_flow() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module whose call returns a distribution"):
        fit(dist.Normal(0.0, 1.0), GOOD)  # type: ignore[arg-type]


def test_a_log_prob_of_every_element_is_refused() -> None:
    class NoEvent(AffineGaussian):
        def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
            return dist.Normal(self.mean, 1.0)

    with pytest.raises(ValueError, match=r"instead of \(10,\).*event_shape is \(\)"):
        fit(NoEvent(), GOOD)


def test_the_bar_shows_losses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    fit_density(AffineGaussian(), GOOD, validation=GOOD, num_steps=3)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss=" in shown
    assert "validation=" in shown
