"""The mixture tutorial: exact conditionals, what was learned, figures."""

from __future__ import annotations

import itertools
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.infer import ExactBlock
from tests.tutorials.conftest import load_siblings

MODEL, METRICS, TRAIN, BASELINES = load_siblings(
    "apg_mixture", "model", "metrics", "train", "baselines"
)


@pytest.fixture
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    (module,) = load_siblings("apg_mixture", "figures")
    return module


@pytest.fixture(params=[0, 1], ids=["seed 0", "seed 1"])
def learned(float32: None, request: pytest.FixtureRequest) -> torch.nn.Module:
    """The proposals that ship with the tutorial, trained twice."""
    return TRAIN.load(MODEL.Proposals(), request.param)


def test_exact_proposals_are_the_conditionals() -> None:
    """Divergence zero, and increments of one, up to rounding."""
    proposals = MODEL.ExactProposals()
    x, latents = MODEL.simulate(20)
    of_clusters, of_points = METRICS.block_divergences(proposals, x, latents)
    assert of_clusters.abs().max() < 1e-9
    assert of_points.abs().max() < 1e-9
    sampler = TRAIN.make_sampler(proposals)
    with torch.no_grad():
        for update in sampler.objective.run((x,), {}, 5, 4):
            if update.sweep > 0:
                assert update.weighed.log_increments.abs().max() < 1e-6, update.block


def test_exact_conditionals_need_no_engine() -> None:
    """Prior times likelihood, written out for both blocks at two values."""
    x, latents = MODEL.simulate(3, 7)
    others = MODEL.simulate(3, 7)[1]
    exact = MODEL.ExactProposals()
    clusters = MODEL.NormalGamma(*exact.cluster_parameters(latents, x)).to_event(2)
    logits = torch.log_softmax(exact.assignment_logits(latents, x), -1)
    points = dist.Categorical(logits=logits).to_event(1)
    joint = MODEL.log_joint(x, latents)
    for block, conditional in (("cluster", clusters), ("assignment", points)):
        changed = MODEL.log_joint(x, {**latents, block: others[block]})
        ratio = conditional.log_prob(others[block]) - conditional.log_prob(latents[block])
        torch.testing.assert_close(changed - joint, ratio)


def test_exact_blocks_draw_the_assignments() -> None:
    proposals = MODEL.ExactProposals()
    sampler = TRAIN.make_sampler(proposals)
    x, _ = MODEL.simulate(4, 10)
    mixed = type(sampler)(
        MODEL.mixture,
        proposals.encode,
        [proposals.update_clusters, ExactBlock("assignment")],
        batch_plate="data_sets",
    )
    for apg in (sampler, mixed):
        history = apg.sample(x, num_particles=6, num_sweeps=3).history
        torch.testing.assert_close(history.ess["cluster"], torch.ones(2, 4))
        torch.testing.assert_close(history.ess["assignment"], torch.ones(2, 4))


def test_evidence_is_unbiased_with_wrong_proposals() -> None:
    """Against all clusterings of four points, with untrained proposals for three sweeps."""
    x = torch.tensor([[[0.3, -0.2], [1.1, 0.4], [-0.6, 0.2], [0.5, -0.9]]])
    terms = []
    for labels in itertools.product(range(3), repeat=4):
        one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 3).to(x)
        terms.append(_log_marginal(x[0], one_hot))
    truth = torch.stack(terms).logsumexp(0) - 4 * torch.log(torch.tensor(3.0))

    proposals = _Perturbed()
    sampler = TRAIN.make_sampler(proposals, num_sweeps=3)
    result = sampler.sample(x.expand(400, -1, -1), num_particles=200)
    ratio = (result.log_evidence - truth).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.03, f"the estimates scatter too much: {error:.3f}"
    assert abs(ratio.mean() - 1) < 5 * error, f"{ratio.mean():.4f} +- {error:.4f}"


class _Perturbed(MODEL.ExactProposals):  # type: ignore[name-defined,misc]
    """Proposals that are wrong on purpose; the encoder draws clusters from near the prior."""

    def encode(self, x: Tensor, mask: Tensor | None = None) -> None:
        with pyro.plate("data_sets", len(x), dim=-2), pyro.plate("clusters", 3, dim=-1):
            prior = MODEL.NormalGamma(torch.zeros(2), 0.12, 2.0, 1.8)
            cluster = pyro.sample("cluster", prior.to_event(1))
        self.update_assignments({"cluster": cluster}, x)

    def cluster_parameters(
        self, latents: dict[str, Tensor], x: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        loc, nu, alpha, beta = super().cluster_parameters(latents, x, mask)
        return loc + 0.1, 1.2 * nu, 1.1 * alpha, 1.1 * beta

    def assignment_logits(self, latents: dict[str, Tensor], x: Tensor) -> Tensor:
        return 0.8 * super().assignment_logits(latents, x)


def _log_marginal(x: Tensor, one_hot: Tensor) -> Tensor:
    """Log-density of points of known assignment, without their clusters."""
    head = MODEL.NormalGammaHead(**MODEL.PRIOR)
    number = one_hot.sum(0)[:, None].expand(3, 2)
    statistics = torch.stack([number, one_hot.T @ x, one_hot.T @ x.square()], -1)
    _, nu, alpha, beta = head(statistics)
    _, nu_0, alpha_0, beta_0 = head(torch.zeros_like(statistics))
    terms = 0.5 * (nu_0 / nu).log() - 0.5 * number * torch.log(torch.tensor(2 * torch.pi))
    terms = terms + alpha_0 * beta_0.log() - alpha * beta.log()
    return (terms + torch.lgamma(alpha) - torch.lgamma(alpha_0)).sum()


@pytest.mark.parametrize("num_points", [20, 60, 240])
def test_learned_proposals_are_near_the_conditionals(
    learned: torch.nn.Module, num_points: int
) -> None:
    """... at sizes of data sets that were not trained on, too."""
    x, latents = MODEL.simulate(300, num_points)
    of_clusters, of_points = METRICS.block_divergences(learned, x, latents)
    is_trained = num_points == 60
    assert of_clusters.median() <= (0.02 if is_trained else 0.05)
    assert of_points.mean() <= (0.012 if is_trained else 0.015)


def test_learned_proposals_sample_like_gibbs(learned: torch.nn.Module) -> None:
    """ESS near all particles, and sweeps beyond those of training go on to the truth."""
    x, latents = MODEL.simulate(60)
    truth = MODEL.log_joint(x, latents)
    sampler = TRAIN.make_sampler(learned)
    encoder = (next(sampler.sweeps(x)).log_joint - truth).mean()
    history = sampler.sample(x, num_sweeps=31).history
    assert history.ess["cluster"][-10:].mean() >= 0.97
    assert history.local_ess["assignment"][-10:].mean() >= 0.95
    gap = (history.log_joint - truth).mean(1)
    assert encoder <= -25, f"the encoder alone is {encoder:.0f} from the truth"
    assert gap[-1] >= -8, f"31 sweeps end {gap[-1]:.1f} from the truth"


def test_ess_of_a_sweep_is_below_that_of_its_blocks(learned: torch.nn.Module) -> None:
    x, _ = MODEL.simulate(30)
    sampler = TRAIN.make_sampler(learned)
    together = METRICS.ess_of_a_sweep(sampler, x).mean()
    ess = sampler.sample(x, num_sweeps=11).history.ess
    assert 0.1 < together < ess["cluster"][-1].mean()


def test_masked_points_are_no_data(learned: torch.nn.Module) -> None:
    """A padded batch has the divergences of its data sets one by one."""
    x, latents = MODEL.simulate(2, 30)
    mask = MODEL.first_points([30, 12], 30)
    padded = METRICS.block_divergences(learned, x, latents, mask)[0]
    short = {"cluster": latents["cluster"][1:], "assignment": latents["assignment"][1:, :12]}
    alone = METRICS.block_divergences(learned, x[1:, :12], short)[0]
    torch.testing.assert_close(padded[1:], alone, rtol=1e-3, atol=1e-4)


def test_a_few_steps_of_training(float32: None) -> None:
    proposals = MODEL.Proposals()
    optim = torch.optim.Adam(proposals.parameters())
    before = [p.detach().clone() for p in proposals.parameters()]
    sampler = TRAIN.make_sampler(proposals, optim, num_particles=3, num_sweeps=2)
    rows = TRAIN.train(sampler, 3, num_sets=2, num_points=6, every=2)
    assert [row["step"] for row in rows] == [0, 2]
    assert all((p != old).any() for p, old in zip(proposals.parameters(), before, strict=True))


@pytest.mark.parametrize("name", sorted(BASELINES.ENCODERS))
def test_encoders_alone_are_far_behind(float32: None, name: str) -> None:
    """Reweighted wake-sleep, by the same engine: a few steps, and what ships."""
    encoder = BASELINES.ENCODERS[name]()
    optim = torch.optim.Adam(encoder.parameters())
    TRAIN.train(BASELINES.make_sampler(encoder, optim), 2, num_sets=2, num_points=6)
    x, latents = MODEL.simulate(50)
    sampler = BASELINES.make_sampler(BASELINES.load(name))
    gap = (next(sampler.sweeps(x)).log_joint - MODEL.log_joint(x, latents)).mean()
    assert gap < -25
    assert gap.isfinite()


def test_figures(figures: ModuleType) -> None:
    x, latents = MODEL.simulate(2, 20)
    mask = MODEL.first_points([20, 10], 20)
    drawn = [
        figures.clustering_figure(x, mask, {"truth": latents, "again": latents}),
        figures.sweeps_figure({"learned": torch.randn(5)}, {"clusters": torch.rand(4)}, 3),
        figures.budget_figure([1, 2], -torch.rand(2, 4), torch.rand(2, 4), 20),
    ]
    assert [len(figure.axes) for figure in drawn] == [4, 2, 2]
    for figure in drawn:
        figure.canvas.draw()
