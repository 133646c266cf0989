"""Samples are properly weighted, after every update and whatever the proposals are."""

from __future__ import annotations

from typing import Any

import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyro_ext.infer import ExactBlock
from pyro_ext.infer.apg.sweep import evaluate as evaluate_model
from pyro_ext.infer.apg.sweep import initialize, propose, resample, update_block, weigh
from pyro_ext.ops.resampling import multinomial, systematic
from tests.infer.apg.problems import (
    GROUP_PROBS,
    LABEL_PROBS,
    LOCS,
    STATES,
    ExactTables,
    Labels,
    Tables,
    X,
    labels_sampler,
    state_index,
)

NUM_REPLICATIONS = 20_000


def _assert_properly_weighted(log_weights: Tensor, latents: dict[str, Tensor], name: str) -> None:
    """The average of w 1[z = s] is p(x, s), for all states s: equation 13."""
    truth = Labels().log_joints().exp().detach()
    index = state_index(latents)
    weights = log_weights.exp()
    ess = weights.mean(0).sum().square() / weights.mean(0).square().sum()
    assert ess > 2_000, f"{name}: only {ess:.0f} effective replications"
    for number, state in enumerate(STATES):
        values = torch.where(index == number, weights, 0.0).mean(0)
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - truth[number]) < 5 * error, (
            f"{name}: state {state} has {values.mean():.5f} instead of {truth[number]:.5f}, "
            f"{abs(values.mean() - truth[number]) / error:.1f} standard errors of {error:.1g} off"
        )


@pytest.mark.parametrize("resampler", ["systematic", "multinomial", None])
@pytest.mark.parametrize("exact", [(), ("group",), ("label",)], ids=["learned", "g", "l"])
def test_every_update_weighs_properly(resampler: str | None, exact: tuple[str, ...]) -> None:
    tables = Tables()
    kernels: list[Any] = [
        ExactBlock("group") if "group" in exact else tables.update_group,
        ExactBlock("label") if "label" in exact else tables.update_label,
    ]
    sampler = labels_sampler(Labels(), tables, kernels, resampler=resampler)
    x = X.expand(NUM_REPLICATIONS, 2)
    with torch.no_grad():
        for update in sampler.objective.run((x,), {}):
            particles = update.particles
            name = f"sweep {update.sweep}, {update.block}"
            _assert_properly_weighted(particles.log_weights, particles.latents, name)


def test_the_pieces_make_an_update() -> None:
    sampler = labels_sampler(Labels(), Tables())
    with torch.no_grad():
        programs = sampler.objective.programs((X.expand(NUM_REPLICATIONS, 2),), {})
        before = initialize(programs, 3).particles
        block = programs.structure.blocks[1]
        particles = resample(before, multinomial)
        draft = propose(programs, block, particles)
        density = evaluate_model(programs, {**particles.latents, **draft.values})
        weighed = weigh(programs, block, particles, draft, density)
    assert not torch.equal(draft.values["label"], particles.latents["label"])
    latents = {**particles.latents, **draft.values}
    _assert_properly_weighted(weighed.log_weights, latents, "by hand")


def test_an_update_changes_nothing_that_it_was_given() -> None:
    sampler = labels_sampler(Labels(), Tables())
    with torch.no_grad():
        programs = sampler.objective.programs((X.expand(4, 2),), {})
        before = initialize(programs, 3).particles
        copies = {name: value.clone() for name, value in before.latents.items()}
        log_weights = before.log_weights.clone()
        particles = resample(before, systematic)
        update_block(programs, programs.structure.blocks[0], particles, 1)
    assert all(torch.equal(before.latents[name], value) for name, value in copies.items())
    assert torch.equal(before.log_weights, log_weights)


def test_evidence_is_unbiased() -> None:
    """The mean of the estimates is p(x), and their logarithms are below it on average."""
    truth = torch.logsumexp(Labels().log_joints(), 0).detach()
    sampler = labels_sampler(Labels(), Tables(), num_particles=10, num_sweeps=4)
    result = sampler.sample(X.expand(NUM_REPLICATIONS, 2))
    for sweep, log_evidence in enumerate(result.history.log_evidence):
        ratio = (log_evidence - truth).exp()
        error = ratio.std() / len(ratio) ** 0.5
        assert error < 0.01, f"sweep {sweep}: the estimates scatter too much, {error:.2g}"
        assert abs(ratio.mean() - 1) < 5 * error, f"sweep {sweep}: {ratio.mean():.4f} +- {error}"
        assert log_evidence.mean() < truth


def test_masked_points_count_for_nothing() -> None:
    """Padding a data set by what is masked leaves evidence and weights where they were."""
    model, tables = Labels(), Tables()
    padded = torch.cat([X, torch.tensor([1e3])]).expand(NUM_REPLICATIONS, 3)
    mask = torch.tensor([True, True, False]).expand(NUM_REPLICATIONS, 3)
    sampler = labels_sampler(model, tables)
    with torch.no_grad():
        for update in sampler.objective.run((padded, mask), {}):
            latents = dict(update.particles.latents)
            latents["label"] = latents["label"][..., :2]
            _assert_properly_weighted(update.particles.log_weights, latents, update.block)


def test_data_sets_of_different_size_are_weighed_apart() -> None:
    """In one batch, the second data set has only its first point."""
    x = X.expand(2 * NUM_REPLICATIONS, 2)
    mask = torch.ones(2 * NUM_REPLICATIONS, 2, dtype=torch.bool)
    mask[NUM_REPLICATIONS:, 1] = False
    model = Labels()
    result = labels_sampler(model, Tables()).sample(x, mask)
    both = model.log_joints().exp().sum()
    # of one point alone: the label of the other one and its density are left out
    kernel = torch.distributions.Normal(torch.zeros(()), 1.0)
    density = kernel.log_prob(X[0] - LOCS - model.shift).exp()
    one = (GROUP_PROBS * (LABEL_PROBS * density).sum(-1)).sum()
    parts = result.log_evidence.exp().split(NUM_REPLICATIONS)
    for name, estimates, truth in (("two", parts[0], both), ("one", parts[1], one)):
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - truth) < 5 * error, f"{name}: {estimates.mean()} {truth}"


def test_scaled_sites_temper_the_target() -> None:
    """With the likelihood squared, the evidence is that of the squared likelihood."""
    model = Labels()

    class Tempered(torch.nn.Module):
        def forward(self, x: Tensor) -> None:
            with poutine.scale(scale=0.5):
                model(x)

    sampler = labels_sampler(Tempered(), Tables())
    result = sampler.sample(X.expand(NUM_REPLICATIONS, 2))
    truth = (0.5 * model.log_joints()).exp().sum()
    estimates = result.log_evidence.exp()
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - truth) < 5 * error


def test_exact_kernels_have_increments_of_one() -> None:
    """Kernels that are the conditionals themselves: eq. 9 is 1 up to rounding."""
    sampler = labels_sampler(Labels(), ExactTables())
    with torch.no_grad():
        for update in sampler.objective.run((torch.randn(50, 2),), {}, 5, 4):
            if update.block == "encoder":
                continue
            assert update.weighed.log_increments.abs().max() < 1e-12, update.block
            if update.weighed.local_weights is not None:
                torch.testing.assert_close(
                    update.weighed.local_weights,
                    torch.softmax(update.particles.log_weights, 0)
                    .unsqueeze(-1)
                    .expand(update.weighed.local_weights.shape),
                )
