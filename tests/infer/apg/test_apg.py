"""The trainer as its users see it: steps, samples, diagnostics, files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from torch import Tensor, nn

from pyro_ext.infer import APG, ExactBlock
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
from tests.statistics import assert_mean


def _optimizers() -> dict[str, Any]:
    return {
        "pyro": lambda apg: pyro.optim.Adam({"lr": 0.05}),
        "torch": lambda apg: torch.optim.Adam(apg.objective.parameters(), lr=0.05),
    }


@pytest.mark.parametrize("kind", _optimizers())
def test_steps_bring_proposals_to_the_conditionals(kind: str) -> None:
    """Kernels and encoder end near the exact conditionals, and the ESS near all particles."""
    model, tables = Labels(), Tables()
    model.shift.requires_grad = False
    apg = labels_sampler(model, tables, num_particles=10, num_sweeps=3)
    apg.optim = _optimizers()[kind](apg)
    x = torch.randn(50, 2)
    apg.step(x)
    before = apg.diagnostics()["ess"]
    for _ in range(50):
        loss = apg.step(x)
    after = apg.diagnostics()
    assert isinstance(loss, float)
    assert after["ess"]["label"] > max(0.97, before["label"])
    assert after["ess"]["group"] > before["group"]
    assert after["local_ess"]["label"] > 0.97
    assert len(after["log_joint"]) == len(after["log_evidence"]) == 3
    pyro.clear_param_store()


def test_steps_leave_alone_what_had_no_part_in_them() -> None:
    """With one sweep kernels do nothing, and Adam does not move them by its momentum."""
    tables = Tables()
    apg = labels_sampler(Labels(), tables, num_sweeps=2)
    apg.optim = torch.optim.Adam(apg.objective.parameters(), lr=0.1)
    apg.step(X.expand(5, 2))
    group, first = tables.group.detach().clone(), tables.first.detach().clone()
    apg.objective.num_sweeps = 1
    apg.step(X.expand(5, 2))
    assert torch.equal(tables.group, group)
    assert not torch.equal(tables.first, first)


def test_the_model_is_learned_by_its_evidence() -> None:
    """The maximum of the marginal likelihood, where the data come from."""
    model, tables = Labels(), Tables()
    x = torch.randn(300, 2) - 0.5
    apg = labels_sampler(model, tables, num_particles=10, num_sweeps=2)
    apg.optim = torch.optim.Adam(apg.objective.parameters(), lr=0.03)
    for _ in range(80):
        apg.step(x)

    def evidence(shift: float) -> Tensor:
        points = dist.Normal(LOCS[:, None, None] + shift, 1.0).log_prob(x.unsqueeze(-1))
        labels = (points + LABEL_PROBS[:, None, None].log()).logsumexp(-1).sum(-1)
        return (labels + GROUP_PROBS[:, None].log()).logsumexp(0).mean()

    learned = model.shift.item()
    assert evidence(learned) > max(evidence(learned - 0.1), evidence(learned + 0.1))


def test_samples_have_the_shapes_they_say() -> None:
    apg = labels_sampler(Labels(), Tables(), [Tables().update_group, ExactBlock("label")])
    result = apg.sample(torch.randn(4, 2), num_particles=6, num_sweeps=5)
    assert result.samples["group"].shape == (6, 4, 1)
    assert result.samples["label"].shape == (6, 4, 2)
    assert result.log_weights.shape == result.weights.shape == (6, 4)
    assert result.log_evidence.shape == result.ess.shape == (4,)
    history = result.history
    assert history.log_joint.shape == history.log_evidence.shape == (5, 4)
    assert {name: v.shape for name, v in history.ess.items()} == {
        "encoder": (1, 4),
        "group": (4, 4),
        "label": (4, 4),
    }
    torch.testing.assert_close(history.ess["label"], torch.ones(4, 4))  # increments of 1
    assert history.local_ess == {}
    of_blocks = history.block_log_joint
    assert {k: v.shape for k, v in of_blocks.items()} == {
        k: v.shape for k, v in history.ess.items()
    }
    ends = torch.cat([of_blocks["encoder"], of_blocks["label"]])  # the last block ends a sweep
    torch.testing.assert_close(history.log_joint, ends)
    assert (of_blocks["group"] != of_blocks["label"]).any()
    torch.testing.assert_close(history.log_evidence[-1], result.log_evidence)
    assert not any(value.requires_grad for value in result.samples.values())


def test_sweeps_come_as_they_go() -> None:
    apg = labels_sampler(Labels(), Tables())
    x = torch.randn(4, 2)
    pyro.set_rng_seed(1)
    apg.objective.programs((x,), {})
    pyro.set_rng_seed(2)
    populations = list(apg.sweeps(x, num_particles=5, num_sweeps=4))
    pyro.set_rng_seed(2)
    result = apg.sample(x, num_particles=5, num_sweeps=4)
    assert len(populations) == 4
    assert torch.equal(populations[-1].latents["label"], result.samples["label"])
    assert torch.equal(populations[-1].log_weights, result.log_weights)


def test_expectations_are_those_of_the_posterior() -> None:
    model = Labels()
    result = labels_sampler(model, Tables(), num_sweeps=5).sample(
        X.expand(50, 2), num_particles=1000
    )
    posterior = torch.softmax(model.log_joints().detach(), 0)
    truth = sum(float(p) for p, state in zip(posterior, STATES, strict=True) if state[0] == 1)
    values = result.expectation(lambda z: z["group"].to(torch.float64).squeeze(-1))
    assert_mean(values[None], truth, min_ess=20, name="share of the second group")
    drawn = result.resample(4000)["group"].to(torch.float64)
    assert_mean(drawn.mean((0, 2))[None], truth, min_ess=20, name="the same after resampling")


def test_expectation_refuses_other_shapes() -> None:
    result = labels_sampler(Labels(), Tables()).sample(X.expand(4, 2))
    with pytest.raises(ValueError, match=r"shape \(4, 2\), which does not begin with"):
        result.expectation(lambda z: z["label"].sum(0))
    with pytest.raises(ValueError, match="num_samples=0"):
        result.resample(0)
    with pytest.raises(ValueError, match="method='other'"):
        result.resample(3, "other")


def test_samples_convert_to_arviz() -> None:
    pytest.importorskip("arviz")
    result = labels_sampler(Labels(), Tables()).sample(X.expand(4, 2), num_particles=20)
    posterior = result.to_arviz().posterior
    assert posterior["label"].shape == (1, 20, 4, 2)
    assert result.to_arviz(7).posterior["group"].shape == (1, 7, 4, 1)


def test_one_data_set_needs_no_plate() -> None:
    """Without ``batch_plate`` there is one evidence, and weights of one dimension."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("points", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def kernel(latents: Mapping[str, Tensor], x: Tensor) -> None:
        precision = 1.0 + len(x)
        pyro.sample("mean", dist.Normal(x.sum() / precision, precision**-0.5))

    x = torch.tensor([0.3, 1.0, 2.0])
    apg = APG(model, functools.partial(kernel, {}), [kernel], num_sweeps=3)
    result = apg.sample(x, num_particles=4)
    covariance = torch.eye(3) + 1.0
    truth = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    assert result.log_weights.shape == (4,)
    torch.testing.assert_close(result.log_weights, truth.expand(4))


def _chain(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-1):
        z: Tensor | float = 0.0
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])


class _Step(nn.Module):
    """One kernel for all times of a random walk: the conditional given both neighbours."""

    def forward(self, latents: Mapping[str, Tensor], x: Tensor, t: int) -> None:
        before = latents[f"z_{t - 1}"] if t else 0.0
        is_last = t == x.shape[1] - 1
        after = 0.0 if is_last else latents[f"z_{t + 1}"]
        precision = 5.0 if is_last else 6.0
        with pyro.plate("data_sets", len(x), dim=-1):
            loc = (before + after + 4.0 * x[:, t]) / precision
            pyro.sample(f"z_{t}", dist.Normal(loc, precision**-0.5))


def test_one_kernel_serves_many_blocks_of_any_number() -> None:
    """Exact conditionals of a random walk: increments of 1, at lengths seen never before."""
    step = _Step()

    def encoder(x: Tensor) -> None:
        with pyro.plate("data_sets", len(x), dim=-1):
            for t in range(x.shape[1]):
                pyro.sample(f"z_{t}", dist.Normal(x[:, t], 0.4))

    def kernels(x: Tensor) -> list[Any]:
        return [functools.partial(step, t=t) for t in range(x.shape[1])]

    apg = APG(_chain, encoder, kernels, batch_plate="data_sets", num_sweeps=3)
    for length in (3, 5, 2):
        x = torch.randn(6, length)
        result = apg.sample(x, num_particles=5)
        blocks = [name for name in result.history.ess if name != "encoder"]
        assert blocks == [f"z_{t}" for t in range(length)]
        for name in blocks:
            torch.testing.assert_close(result.history.ess[name], torch.ones(2, 6))


def test_blocks_of_several_sites_are_weighed_as_one() -> None:
    """The later site is proposed given the earlier one, new or old."""

    def encoder(x: Tensor) -> None:
        with pyro.plate("data_sets", len(x), dim=-1):
            first = pyro.sample("z_0", dist.Normal(x[:, 0], 1.0))
            pyro.sample("z_1", dist.Normal(first, 1.0))

    def kernel(latents: Mapping[str, Tensor], x: Tensor) -> None:
        # the exact posterior of both, z_1 given z_0 last
        with pyro.plate("data_sets", len(x), dim=-1):
            matrix = torch.tensor([[6.0, -1.0], [-1.0, 5.0]]).inverse()
            mean = 4.0 * x @ matrix
            first = pyro.sample("z_0", dist.Normal(mean[:, 0], matrix[0, 0].sqrt()))
            loc = (first + 4.0 * x[:, 1]) / 5.0
            pyro.sample("z_1", dist.Normal(loc, 5.0**-0.5))

    apg = APG(_chain, encoder, [kernel], batch_plate="data_sets", num_sweeps=2)
    *_, last = apg.objective.run((torch.randn(6, 2),), {}, 5)
    assert last.block == "z_0,z_1"
    assert last.weighed.log_increments.abs().max() < 1e-12


def test_what_was_learned_is_in_the_state(tmp_path: Any) -> None:
    model, tables = Labels(), Tables()
    objective = labels_sampler(model, tables).objective
    torch.save(objective.state_dict(), tmp_path / "state.pt")
    others = Labels(), Tables()
    with torch.no_grad():
        for module in others:
            for parameter in module.parameters():
                parameter.add_(1.0)
    fresh = labels_sampler(*others).objective
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for first, second in zip(objective.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(first, second)


def test_global_state_is_left_alone_by_errors() -> None:
    """A program that fails midway leaves no handler and no validation flag behind."""
    state = {"fails": False}

    class Failing(Tables):
        def update_label(self, *args: Any, **kwargs: Any) -> None:
            if state["fails"]:
                raise RuntimeError("on purpose")
            super().update_label(*args, **kwargs)

    apg = labels_sampler(Labels(), Failing())
    apg.objective.programs((X.expand(4, 2),), {})
    state["fails"] = True
    with pytest.raises(RuntimeError, match="on purpose"):
        apg.sample(X.expand(4, 2))
