"""Training of energy machines: the loss and its gradient, warm-up, the monitor, safety."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Uniform

from pyro_ext.datasets import RotatedGrid
from pyro_ext.distributions import AutoregressiveEnergyMachine
from pyro_ext.distributions.energy.monitor import NormalizerMonitor, check_normalizers
from pyro_ext.errors import NormalizerWarning
from pyro_ext.training import fit_density
from tests.distributions.energy.problems import conditionals, log_normal, machine, random_machine

LOSS = AutoregressiveEnergyMachine.training_loss


def _two_bumps(number: int) -> Tensor:
    """One feature with a gap and an edge that one Gaussian cannot follow."""
    x = torch.rand(number, 1)
    return torch.where(torch.rand(number, 1) < 0.5, x - 1.5, 1.0 + 0.5 * x)


# --- loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["proposal", "broad"])
def test_the_loss_is_minus_both_log_densities(reference: str) -> None:
    aem, x = (
        random_machine(2, reference=reference, num_importance_samples=3000),
        torch.randn(20, 2),
    )
    aem.initialize(2 * torch.randn(50, 2))
    with torch.no_grad():
        log_p, log_q = aem().log_prob(x, exact=True), aem().proposal_log_prob(x)
        evaluated = aem.training_loss(x)
        trained = aem.train().training_loss(x)
    assert float(evaluated) == pytest.approx(-float(log_p.mean()), abs=0.05)
    assert float(trained) == pytest.approx(-float((log_p + log_q).mean()), abs=0.05)


@pytest.mark.parametrize("reference", ["proposal", "broad"])
def test_gradients_of_the_loss_are_those_of_finite_differences(reference: str) -> None:
    """With the same random numbers; of all that the proposal does not depend on."""
    aem = random_machine(2, reference=reference, num_gradient_samples=None, amount=0.25)
    x = torch.randn(30, 2)

    def loss() -> Tensor:
        torch.manual_seed(3)
        value: Tensor = aem.train().training_loss(x)
        return value

    rows = torch.zeros_like(aem.network.output.bias).view(2, -1)
    rows[:, : aem.energy_context] = 1.0
    of_context = rows.flatten()
    for name, parameter in [
        *aem.energy.named_parameters(),
        ("context", aem.network.output.bias),
    ]:
        direction = torch.randn_like(parameter)
        if name == "context":
            direction = direction * of_context
        (gradient,) = torch.autograd.grad(loss(), parameter)
        values, step = [], 1e-6
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(sign * step * direction)
                values.append(float(loss()))
                parameter.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        found = float((gradient * direction).sum())
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def test_some_of_the_conditionals_stand_for_all() -> None:
    """The loss and its gradient have the same mean; in evaluation mode none are left out."""
    aem = random_machine(5, amount=0.3).train()
    x = torch.randn(8, 5)

    def loss_and_slope(max_conditionals: int | None) -> Tensor:
        aem.max_conditionals = max_conditionals
        loss = aem.training_loss(x)
        slope = torch.autograd.grad(loss, aem.energy.output.bias)[0]
        return torch.stack([loss.detach(), slope[0]])

    whole, parts = (
        torch.stack([loss_and_slope(number) for _ in range(100)]) for number in (None, 10)
    )
    error = ((parts.var(0) + whole.var(0)) / len(parts)).sqrt()
    assert (parts.std(0) > 2 * whole.std(0)).all(), "all conditionals took part"
    assert ((parts.mean(0) - whole.mean(0)).abs() < 5 * error).all()
    values = []
    for number in (None, 10):
        torch.manual_seed(0)
        aem.eval().max_conditionals = number
        values.append(float(aem.training_loss(x).detach()))
    assert values[0] == values[1]


def test_the_proposal_learns_from_its_own_density_alone() -> None:
    aem, x = random_machine(2).train(), torch.randn(30, 2)
    with torch.no_grad():
        aem.network.output.weight.view(2, -1, 16)[:, : aem.energy_context] = 0.0
    proposal_rows = aem.network.output.bias

    def gradient(loss: Tensor) -> Tensor:
        grad = torch.autograd.grad(loss, proposal_rows)[0]
        return grad.view(2, -1)[:, aem.energy_context :]

    torch.testing.assert_close(
        gradient(aem.training_loss(x)), gradient(-aem().proposal_log_prob(x).mean())
    )


def test_warm_up_trains_the_proposal_alone() -> None:
    aem, x = machine(2, warmup_steps=2), torch.randn(30, 2)
    for step in range(4):
        assert int(aem.training_steps) == step
        aem.zero_grad()
        loss = aem.training_loss(x)
        loss.backward()
        is_warm = step >= 2
        assert (aem.energy.output.weight.grad is not None) == is_warm
        if not is_warm:
            torch.testing.assert_close(loss, -aem().proposal_log_prob(x).mean())
    aem.eval().training_loss(x)
    assert int(aem.training_steps) == 4


def test_a_fixed_proposal_needs_no_warm_up() -> None:
    aem = machine(1, proposal=Uniform(-1.0, 1.0), warmup_steps=5)
    aem.training_loss(torch.rand(10, 1)).backward()
    assert aem.energy.output.weight.grad is not None


def test_with_gradients_training_mode_scores_with_the_datum() -> None:
    """So that `SVI` and others that only call `log_prob` cannot be fooled either."""
    aem = random_machine(1, amount=3.0, num_importance_samples=3).train()
    x = 3 * torch.randn(500, 1)
    log_p, log_q = aem().log_prob(x), aem().proposal_log_prob(x)
    assert log_p.requires_grad
    assert (log_p <= log_q + math.log(3) + 1e-9).all()


# --- what is learnt -----------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["proposal", "broad"])
def test_energies_learn_what_the_proposal_cannot(reference: str) -> None:
    aem = machine(
        1,
        mixture_components=1,
        reference=reference,
        energy_hidden_features=16,
        frequencies=4,
        monitor_every=100,
    )
    train, test = _two_bumps(5000), _two_bumps(1000)
    fit_density(aem, train, loss=LOSS, num_steps=150, learning_rate=1e-2, progress=False)
    aem.eval()
    truth = math.log(0.5) * 0.5  # density 1/2 on the left, and 1 on the right
    with torch.no_grad():
        exact = float(aem().log_prob(test, exact=True).mean())
        estimate = float(aem().log_prob(test).mean())
        proposal = float(aem().proposal_log_prob(test).mean())
    assert exact > proposal + 0.5
    assert exact > truth - 0.15
    assert estimate == pytest.approx(exact, abs=0.02)
    assert set(aem.diagnostics()["status"]) == {"ok"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_no_run_on_the_diamond_runs_away(seed: int, warmup_steps: int) -> None:
    """The reference code's estimate is at +90 nats after 100 steps, and at 1e12 after 500."""
    torch.manual_seed(seed)
    grid = RotatedGrid(std=torch.tensor(0.06))
    aem = machine(2, warmup_steps=warmup_steps, monitor_every=40)
    data = grid.sample((5000,))
    # ten times the step size that the densities of the plane are trained with
    settings: dict[str, Any] = {"batch_size": 64, "learning_rate": 1e-2, "progress": False}
    result = fit_density(aem, data, loss=LOSS, num_steps=121, **settings)
    assert result.num_skipped == 0
    assert result.losses.isfinite().all()
    diagnostics = aem.diagnostics()
    assert set(diagnostics["status"]) == {"ok"}
    assert max(abs(float(each)) for each in diagnostics["optimism"]) < 0.1
    aem.eval()
    with torch.no_grad():
        exact = aem().log_prob(data[:100], exact=True).mean()
        proposal = aem().proposal_log_prob(data[:100]).mean()
    assert proposal - 0.1 < exact < proposal + 3.0


def test_a_run_is_resumed_from_a_checkpoint(tmp_path: Any) -> None:
    data, path = torch.randn(200, 2), tmp_path / "fit.pt"
    settings: dict[str, Any] = {"num_steps": 6, "evaluate_every": 3, "progress": False}

    def train(checkpoint: Any, interrupt_at: int | None = None) -> Any:
        torch.manual_seed(5)
        aem = machine(2, warmup_steps=2)

        def loss(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
            if int(flow.training_steps) == interrupt_at:
                raise KeyboardInterrupt
            return LOSS(flow, x, context)

        fit_density(aem, data, loss=loss, checkpoint=checkpoint, **settings)
        return aem

    whole = train(None)
    with pytest.warns(UserWarning, match="Interrupted"):
        train(path, interrupt_at=4)
    resumed = train(path)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


# --- monitor ------------------------------------------------------------------------------------


def test_the_monitor_sees_and_says_that_an_estimate_is_optimistic() -> None:
    """A mode of 2 % of the width of the proposals, which five draws mostly miss."""
    known = conditionals(64, lambda x: log_normal(x, 0.3, 0.01))
    check = check_normalizers(known, torch.zeros(64), 5, features=2)
    assert check.status == "optimistic"
    assert check.optimism > 1.0
    assert check.optimism > 5 * check.standard_error
    monitor = NormalizerMonitor(10)
    with pytest.warns(NormalizerWarning, match="nats above its value by quadrature"):
        monitor.check(known, torch.zeros(64), 5, features=2, step=7)
    monitor.check(known, torch.zeros(64), 5, features=2, step=17)  # only once
    assert monitor.table()["step"] == [7, 17]


def test_the_monitor_sees_energies_that_are_not_finite() -> None:
    known = conditionals(8, lambda x: torch.full_like(x, math.nan))
    assert check_normalizers(known, torch.zeros(8), 5, features=1).status == "not finite"


def test_the_monitor_looks_at_the_steps_it_was_asked_for() -> None:
    aem, x = machine(2, monitor_every=3), torch.randn(30, 2)
    for _ in range(7):
        aem.training_loss(x)
    assert aem.diagnostics()["step"] == [0, 3, 6]
    assert aem.training


def test_dropout_trains_and_is_off_in_checks_and_evaluation() -> None:
    aem, x = machine(2, dropout=0.5, monitor_every=1), torch.randn(30, 2)
    aem.training_loss(x).backward()
    assert aem.energy.training
    assert aem.diagnostics()["is_converged"] == [True]
    aem.eval()
    with torch.no_grad():
        first, second = (aem().log_prob(x, exact=True) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("context_features", [0, 2], ids=["alone", "context"])
@pytest.mark.parametrize("proposal", ["gaussian_mixture", Uniform(-6.0, 6.0)], ids=["q", "box"])
def test_all_parameters_get_gradients(context_features: int, proposal: Any) -> None:
    aem = random_machine(3, context_features, proposal=proposal).train()
    context = torch.randn(40, 2) if context_features else None
    aem.training_loss(torch.randn(40, 3).clamp(-5, 5), context).backward()
    for name, parameter in aem.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
