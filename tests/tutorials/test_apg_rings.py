"""The rings tutorial: exact conditionals, what was learned, figures."""

from __future__ import annotations

import math
from types import ModuleType

import pyro.distributions as dist
import pytest
import torch

from tests.tutorials.conftest import load_siblings

MODEL, TRAIN = load_siblings("apg_rings", "model", "train")


@pytest.fixture
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    (module,) = load_siblings("apg_rings", "figures")
    return module


@pytest.fixture
def learned(float32: None) -> torch.nn.ModuleDict:
    """Model and proposals that ship with the tutorial."""
    return TRAIN.load()


def test_exact_proposals_have_increments_of_one() -> None:
    """Up to the Bessel functions of the von Mises, which are good to seven digits."""
    x, _ = MODEL.simulate(6, 40)
    sampler = TRAIN.make_sampler(MODEL.Model(MODEL.Ring()), MODEL.ExactProposals())
    with torch.no_grad():
        for update in sampler.objective.run((x,), {}, 5, 4):
            if update.sweep > 0:
                limit = 1e-9 if update.block == "centre" else 1e-4
                assert update.weighed.log_increments.abs().max() < limit, update.block


def test_exact_assignments_integrate_the_angle_out() -> None:
    """Against sums over a grid of angles."""
    x, latents = MODEL.simulate(2, 3)
    grid = torch.arange(256) * (2 * math.pi / 256) - math.pi
    ring = MODEL.Ring()(grid)
    centre = latents["centre"].unsqueeze(-3).unsqueeze(-2)  # (sets, 1, clusters, 1, 2)
    places = centre + ring
    log_prob = dist.Normal(places, MODEL.NOISE).log_prob(x[:, :, None, None]).sum(-1)
    expected = torch.log_softmax(log_prob.logsumexp(-1), -1)
    logits = MODEL.ExactProposals().assignment_logits(x, latents["centre"])
    torch.testing.assert_close(torch.log_softmax(logits, -1), expected, rtol=1e-6, atol=1e-6)


def test_exact_centres_need_no_engine() -> None:
    """Prior times likelihood, at two values of the centres."""
    x, latents = MODEL.simulate(3, 7)
    others = MODEL.simulate(3, 7)[1]["centre"]
    loc, scale = MODEL.ExactProposals().centre_parameters(latents, x)
    conditional = dist.Normal(loc, scale).to_event(2)
    ratio = conditional.log_prob(others) - conditional.log_prob(latents["centre"])
    changed = MODEL.log_joint(x, {**latents, "centre": others}) - MODEL.log_joint(x, latents)
    torch.testing.assert_close(changed, ratio)


def test_the_shape_was_learned(learned: torch.nn.ModuleDict) -> None:
    """From points alone, a ring of the right radius."""
    radius, deviation = TRAIN.shape_error(learned["rings"].decoder)
    assert abs(radius - MODEL.RADIUS) < 0.15
    assert deviation < 0.2
    untrained, _ = TRAIN.shape_error(TRAIN.build()["rings"].decoder)
    assert untrained < 1


@pytest.mark.parametrize("num_points", [60, 400])
def test_sweeps_bring_the_particles_to_the_truth(
    learned: torch.nn.ModuleDict, num_points: int
) -> None:
    """... where the draw of the encoder is hundreds of nats away, at sizes not trained on, too."""
    x, latents = MODEL.simulate(8, num_points)
    truth = MODEL.log_joint(x, latents)
    sampler = TRAIN.make_sampler(learned["rings"], learned["proposals"])
    history = sampler.sample(x, num_particles=10, num_sweeps=20).history
    gap = (history.log_joint - truth) / num_points
    assert gap[0].median() < -1.5
    assert gap[-1].median() > -0.7
    assert history.ess["centre"][-1].mean() > 0.75
    assert history.local_ess["assignment,angle"][-1].mean() > 0.85


@pytest.mark.parametrize("name", sorted(TRAIN.baselines.ENCODERS))
def test_encoders_alone_are_far_behind(float32: None, name: str) -> None:
    """Reweighted wake-sleep, by the same engine: a few steps, and what ships."""
    parts = TRAIN.build(name)
    optim = TRAIN.make_optimizer(parts)
    sampler = TRAIN.make_sampler(parts["rings"], parts["proposals"], optim, num_sweeps=1)
    rows = list(TRAIN.train(sampler, 2, num_sets=2, num_points=10))
    assert [row["step"] for row in rows] == [0, 1]
    x, latents = MODEL.simulate(20, 60)
    truth = MODEL.log_joint(x, latents)
    gaps = {}
    for trained in (name, TRAIN.SAMPLER):
        parts = TRAIN.load(trained)
        sampler = TRAIN.make_sampler(parts["rings"], parts["proposals"])
        sweeps = 20 if trained == TRAIN.SAMPLER else 1
        gaps[trained] = (sampler.sample(x, num_sweeps=sweeps).history.log_joint[-1] - truth).mean()
    assert gaps[name] < gaps[TRAIN.SAMPLER] - 300


def test_masked_points_are_no_data(learned: torch.nn.ModuleDict) -> None:
    """A padded batch has the proposals of its data sets one by one."""
    x, latents = MODEL.simulate(2, 30)
    mask = torch.arange(30) < torch.tensor([[30], [12]])
    short = {name: value[1:, :12] for name, value in latents.items()}
    short["centre"] = latents["centre"][1:]
    padded = learned["proposals"].centre_parameters(latents, x, mask)
    alone = learned["proposals"].centre_parameters(short, x[1:, :12])
    for whole, part in zip(padded, alone, strict=True):
        torch.testing.assert_close(whole[1:], part, rtol=1e-4, atol=1e-4)


def test_model_and_proposals_are_trained_together(float32: None) -> None:
    parts = TRAIN.build()
    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    optim = TRAIN.make_optimizer(parts)
    sampler = TRAIN.make_sampler(
        parts["rings"], parts["proposals"], optim, num_particles=3, num_sweeps=2
    )
    settings = {"num_sets": 2, "num_points": 10, "warm_up": 2}

    def changed() -> set[str]:
        return {name for name, p in parts.named_parameters() if bool((p != before[name]).any())}

    list(TRAIN.train(sampler, 2, **settings))  # the model waits
    assert changed() == {name for name in before if name.startswith("proposals")}
    list(TRAIN.train(sampler, 3, **settings))
    assert changed() == set(before)


def test_figures(figures: ModuleType) -> None:
    x, latents = MODEL.simulate(2, 20)
    mask = torch.arange(20) < torch.tensor([[20], [10]])
    columns = {"points": {}, "truth": latents, "moved": {**latents, "x": x + 1}}
    drawn = [
        figures.clustering_figure(x, mask, columns, MODEL.Ring()),
        figures.shape_figure({"truth": MODEL.Ring(), "untrained": MODEL.Decoder()}),
        figures.sweeps_figure({"learned": torch.randn(5)}, {"centres": torch.rand(4)}, 3),
    ]
    assert [len(figure.axes) for figure in drawn] == [6, 2, 2]
    for figure in drawn:
        figure.canvas.draw()
