"""Gradients are those of the inclusive KL divergence and of the log evidence."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.infer import APG, ExactBlock
from pyro_ext.infer.apg.objective import update_loss
from pyro_ext.poutine import frozen
from tests.infer.apg.problems import (
    GROUP_PROBS,
    LABEL_PROBS,
    LOCS,
    STATES,
    Labels,
    Tables,
    X,
    labels_sampler,
)

PARAMETERS = {"encoder": "first", "group": "group", "label": "label"}


def _exact_gradients() -> dict[str, Tensor]:
    r"""Gradients of :math:`-E_{p(z|x)}[\log q(z_b | x, z_{-b})]` and of :math:`-\log p(x)`."""
    model, tables = Labels(), Tables()
    log_joints = model.log_joints()
    posterior = torch.softmax(log_joints, 0).detach()
    log_probs = [tables.log_probs(state) for state in STATES]
    gradients = {}
    for program, name in PARAMETERS.items():
        terms = torch.stack([row[program] for row in log_probs])
        (gradient,) = torch.autograd.grad(
            -(posterior * terms).sum(), [getattr(tables, name)], retain_graph=True
        )
        gradients[program] = gradient
    (gradients["model"],) = torch.autograd.grad(-torch.logsumexp(log_joints, 0), [model.shift])
    return gradients


def _estimates(num_particles: int, num_runs: int, **settings: Any) -> dict[str, Tensor]:
    """Gradients of every update of the second sweep, ``(runs, ...)``, by what they are of."""
    model, tables = Labels(), Tables()
    sampler = labels_sampler(model, tables, num_particles=num_particles, num_sweeps=2, **settings)
    found: dict[str, list[Tensor]] = {}
    for _ in range(num_runs):
        for update in sampler.objective.run((X.expand(10, 2),), {}):
            loss = update_loss(update)
            parameter = getattr(tables, PARAMETERS[update.block])
            of_q, of_p = torch.autograd.grad(loss, [parameter, model.shift])
            found.setdefault(update.block, []).append(of_q)
            found.setdefault(f"model at {update.block}", []).append(of_p)
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("resampler", "local"),
    [("systematic", True), ("multinomial", False), (None, True)],
    ids=["systematic-local", "multinomial-global", "never-local"],
)
def test_gradients_are_exact_as_particles_grow(resampler: str | None, local: bool) -> None:
    exact = _exact_gradients()
    settings: dict[str, Any] = {"resampler": resampler}
    if not local:
        settings["local_plates"] = []
    estimates = _estimates(2_000, 20, **settings)
    assert set(estimates) == {*PARAMETERS, *(f"model at {name}" for name in PARAMETERS)}
    for name, values in estimates.items():
        truth = exact["model" if name.startswith("model") else name]
        error = values.std(0) / len(values) ** 0.5
        # self-normalised weights have a bias of the order of one particle in all
        assert error.max() < 0.01, f"{name}: too few particles, errors up to {error.max():.2g}"
        assert ((values.mean(0) - truth).abs() < 5 * error + 1.0 / 2_000).all(), (
            f"{name}: {values.mean(0)} instead of {truth}, standard errors {error}"
        )


def test_few_particles_are_biased_and_more_are_less() -> None:
    """The estimator is consistent, not unbiased: the error falls with the particles."""
    exact = _exact_gradients()["encoder"]
    errors = []
    for num_particles, num_sets in ((2, 20_000), (8, 20_000), (128, 5_000)):
        model, tables = Labels(), Tables()
        sampler = labels_sampler(model, tables, num_particles=num_particles, num_sweeps=1)
        sampler.objective(X.expand(num_sets, 2)).backward()
        assert tables.first.grad is not None
        errors.append(float((tables.first.grad - exact).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_local_weights_have_less_bias() -> None:
    """What they are for: few particles, and many points in a data set."""
    x = X.repeat(20)
    model, tables = Labels(), Tables()
    # exactly: points are independent given the group, so that both sums are short
    joint = LABEL_PROBS.log().unsqueeze(1) + dist.Normal(
        LOCS.unsqueeze(1) + model.shift, 1.0
    ).log_prob(x.unsqueeze(-1))
    of_group = torch.softmax(GROUP_PROBS.log() + joint.logsumexp(-1).sum(-1), 0)
    of_label = of_group[:, None, None] * torch.softmax(joint, -1)
    log_q = torch.log_softmax(tables.label_logits(torch.arange(2)[:, None], x), -1)
    (exact,) = torch.autograd.grad(-(of_label.detach() * log_q).sum(), [tables.label])
    errors = {}
    for local in (["points"], []):
        sampler = labels_sampler(model, tables, num_particles=10, num_sweeps=4, local_plates=local)
        *_, last = sampler.objective.run((x.expand(500, 40),), {})
        (gradient,) = torch.autograd.grad(update_loss(last), [tables.label])
        errors[bool(local)] = float((gradient - exact).abs().max() / exact.abs().max())
    assert errors[True] < 0.3 * errors[False], errors


@pytest.mark.parametrize("part", ["model", "encoder", "kernels"])
def test_each_part_can_be_frozen(part: str) -> None:
    model, tables, other = Labels(), Tables(), Tables()
    encode = other.encode
    kernels: list[Any] = [tables.update_group, tables.update_label]
    sampler = APG(
        frozen(model) if part == "model" else model,
        frozen(encode) if part == "encoder" else encode,
        [frozen(kernel) for kernel in kernels] if part == "kernels" else kernels,
        num_particles=4,
        num_sweeps=3,
        batch_plate="data_sets",
        local_plates=["points"],
    )
    sampler.objective(X.expand(5, 2)).backward()
    trained = {"model": model.shift, "encoder": other.first, "kernels": tables.group}
    for name, parameter in trained.items():
        assert (parameter.grad is None) == (name == part), name
        assert name == part or bool(parameter.grad.abs().sum() > 0)  # type: ignore[union-attr]
    assert all(p.requires_grad for p in trained.values())


def test_the_module_has_the_gradient_of_all_updates() -> None:
    """The scalar's gradient is that of the sum of the losses of the updates."""
    model, tables = Labels(), Tables()
    objective = labels_sampler(model, tables).objective
    x = X.expand(5, 2)
    objective.programs((x,), {})
    pyro.set_rng_seed(3)
    loss = objective(x)
    (2.0 * loss).backward()
    ready = {name: p.grad for name, p in objective.named_parameters()}
    objective.zero_grad()
    pyro.set_rng_seed(3)
    losses = [update_loss(update) for update in objective.run((x,), {})]
    total = torch.stack(losses).sum()
    total.backward()
    torch.testing.assert_close(loss, total)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(ready[name], 2.0 * parameter.grad)
    with torch.no_grad():
        pyro.set_rng_seed(3)
        assert objective(x) == loss
    assert set(ready) == set(objective.state_dict())  # and no module is there twice


def test_the_model_learns_from_the_last_sweeps_only() -> None:
    """Its gradient is that of their updates; those of the proposals are as ever."""
    model, tables = Labels(), Tables()
    x = X.expand(5, 2)
    gradients = {}
    for model_sweeps in (None, 1):
        objective = labels_sampler(model, tables, model_sweeps=model_sweeps).objective
        objective.programs((x,), {})
        pyro.set_rng_seed(3)
        objective.zero_grad()
        objective(x).backward()
        gradients[model_sweeps] = {name: p.grad for name, p in objective.named_parameters()}
    pyro.set_rng_seed(3)
    losses = [update_loss(u) for u in objective.run((x,), {}) if u.sweep == 2]
    (expected,) = torch.autograd.grad(torch.stack(losses).sum(), [model.shift])
    for name, parameter in objective.named_parameters():
        if parameter is model.shift:
            torch.testing.assert_close(gradients[1][name], expected)
            assert gradients[None][name] != expected
        else:
            torch.testing.assert_close(gradients[1][name], gradients[None][name])


class _Saved:
    """A tensor that a graph keeps for its backward pass, counted as long as it is kept."""

    alive = peak = 0

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()  # of its own output a graph would be kept by itself
        _Saved.alive += 1
        _Saved.peak = max(_Saved.peak, _Saved.alive)

    def __del__(self) -> None:
        _Saved.alive -= 1


def test_memory_does_not_grow_with_sweeps() -> None:
    """No graph is kept for longer than an update, also where the model is learned."""

    def peak(num_sweeps: int) -> int:
        sampler = labels_sampler(Labels(), Tables(), num_sweeps=num_sweeps)
        _Saved.peak = _Saved.alive
        with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.value):
            sampler.objective(X.expand(6, 2)).backward()
        return _Saved.peak

    assert 0 < peak(2) == peak(12)


def test_parameters_of_pyro_are_trained() -> None:
    """``pyro.param``, with a constraint, and ``pyro.module``."""
    network = torch.nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        scale = pyro.param(
            "scale", torch.tensor(2.0), constraint=torch.distributions.constraints.positive
        )
        z = pyro.sample("z", dist.Normal(0.0, scale))
        with pyro.plate("points", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def encoder(x: Tensor) -> None:
        pyro.module("network", network)
        pyro.sample("z", dist.Normal(network(x.mean().reshape(1)).squeeze(), 0.5))

    apg = APG(model, encoder, [], pyro.optim.Adam({"lr": 0.01}), num_sweeps=1)
    before = network.weight.detach().clone()
    try:
        apg.step(torch.tensor([1.0, 2.0]))
        assert pyro.param("scale") != 2.0
        assert (network.weight != before).all()
    finally:
        pyro.clear_param_store()


def test_exact_blocks_have_no_loss_of_their_own() -> None:
    model, tables = frozen(Labels()), Tables()
    kernels: list[Any] = [tables.update_group, ExactBlock("label")]
    sampler = APG(
        model, tables.encode, kernels, num_particles=5, num_sweeps=2, batch_plate="data_sets"
    )
    *_, last = sampler.objective.run((X.expand(3, 2),), {})
    assert last.block == "label"
    assert not update_loss(last).requires_grad
