"""The guide against exact posteriors, evidence and queries."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext import ConditionalPriorGuide
from pyro_ext.infer.conditional_prior import guide as guide_module
from pyro_ext.ops.rows import RowStatus
from pyro_ext.poutine import condition_on
from tests.infer.conditional_prior.problems import (
    Grid,
    LinearGaussian,
    grid,
    linear_gaussian,
    small_decoder,
)
from tests.statistics import assert_mean


def _gaussian_of(guide: ConditionalPriorGuide) -> dist.MultivariateNormal:
    """What an affine map makes of normal noise, from where it takes the unit vectors."""
    d = guide.loc.shape[-1]
    points = torch.cat([torch.zeros(1, d), torch.eye(d)]).expand(len(guide.psi), -1, -1)
    with torch.no_grad():
        latents, _ = guide.row_map.to_latents(points, guide.psi)
    latents = guide.loc[:, None] + guide.scale[:, None] * latents
    factor = (latents[:, 1:] - latents[:, :1]).mT
    return dist.MultivariateNormal(latents[:, 0], factor @ factor.mT)


def _check_posterior(guide: ConditionalPriorGuide, problem: LinearGaussian) -> None:
    found, exact = _gaussian_of(guide), problem.posterior()
    torch.testing.assert_close(found.mean, exact.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.covariance_matrix, exact.covariance_matrix, rtol=0, atol=1e-3)
    assert (torch.distributions.kl_divergence(found, exact) < 1e-4).all()


def test_adam_finds_gaussian_posteriors_too() -> None:
    problem = linear_gaussian(5, 2, 5)
    guide = ConditionalPriorGuide(problem.model)
    result = guide.fit(
        progress=False,
        optimizer="adam",
        num_particles=30,
        num_starts=1,
        max_iter=800,
        learning_rate=0.05,
        tol=1e-9,
    )
    _check_posterior(guide, problem)
    done = (result.status == RowStatus.CONVERGED) | (result.status == RowStatus.STOPPED_EARLY)
    assert done.all()


def test_gaussian_posteriors_of_100_masks_are_found_in_one_batch() -> None:
    problem = linear_gaussian(100, 4, 10)
    guide = ConditionalPriorGuide(problem.model)
    result = guide.fit(progress=False)
    _check_posterior(guide, problem)
    assert (result.status == RowStatus.CONVERGED).all()
    # where the guide is the posterior, every draw gives the evidence itself
    torch.testing.assert_close(result.c_elbo, problem.log_evidence(), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.held_out_c_elbo, problem.log_evidence(), rtol=0, atol=1e-3)
    bound = guide.importance_bound()
    torch.testing.assert_close(bound.log_evidence, problem.log_evidence(), rtol=0, atol=1e-3)
    assert (bound.effective_sample_size > 990).all()


@pytest.mark.parametrize("flow", ["planar", "spline"])
def test_flows_are_no_worse_than_gaussians_where_these_are_exact(flow: str) -> None:
    """Ten times as many parameters, and as little noise as a Gaussian makes do with."""
    problem = linear_gaussian(5, 6, 10)
    guide = ConditionalPriorGuide(problem.model, flow, num_layers=2, hidden_features=None)
    result = guide.fit(progress=False, num_particles=200)
    assert (problem.log_evidence() - result.held_out_c_elbo < 0.02).all()


def test_a_prior_that_is_neither_standard_nor_independent() -> None:
    problem = linear_gaussian(20, 3, 6, standard=False)
    guide = ConditionalPriorGuide(problem.model)
    guide.setup()
    torch.testing.assert_close(guide.loc, problem.prior_mean.expand(20, -1))
    variances = (problem.prior_factor @ problem.prior_factor.T).diagonal()
    torch.testing.assert_close(guide.scale, variances.sqrt().expand(20, -1))
    guide.fit(progress=False)
    _check_posterior(guide, problem)


def test_queries_of_a_linear_model_have_their_exact_distribution() -> None:
    """Scores by many draws, and moments of completed data within their errors."""
    problem = linear_gaussian(12, 2, 5)
    guide = ConditionalPriorGuide(problem.model)
    guide.fit(progress=False)
    scores = torch.stack([guide.query_log_prob(problem.data, num_samples=4000) for _ in range(20)])
    error = scores.std(0) / 20**0.5
    assert ((scores.mean(0) - problem.query_log_prob()).abs() < 5 * error + 0.02).all()
    completed = guide.sample_query(4000)["x"]
    assert completed.shape == (4000, 12, 5)
    torch.testing.assert_close(
        completed[:, problem.mask], problem.data[problem.mask].expand(4000, -1), rtol=0, atol=0
    )
    posterior = problem.posterior()
    mean = posterior.mean @ problem.weight.T + problem.bias
    variance = (problem.weight @ posterior.covariance_matrix @ problem.weight.T).diagonal(
        dim1=-2, dim2=-1
    ) + problem.noise**2
    for row, column in (~problem.mask).nonzero()[::5].tolist():
        draws = completed[None, :, row, column]
        exact = float(mean[row, column])
        assert_mean(draws, exact, name=f"query [{row}, {column}]")
        assert_mean((draws - exact) ** 2, float(variance[row, column]), name="its variance")


def test_rows_of_a_batch_are_fitted_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = small_decoder(2, 6)
    data, mask = (torch.rand(4, 6) < 0.5).double(), torch.rand(4, 6) < 0.6
    noise = torch.randn(100, 2)
    monkeypatch.setattr(guide_module, "fixed_noise", lambda *args: noise)

    def fit(rows: slice, psi: Tensor | None = None) -> tuple[Tensor, ConditionalPriorGuide]:
        def model() -> None:
            with pyro.plate("rows", len(data[rows])):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1))

        conditioned = condition_on(model, {"x": data[rows]}, {"x": mask[rows]})
        guide = ConditionalPriorGuide(conditioned, "planar", num_layers=2).setup()
        with torch.no_grad():
            guide.psi.copy_(guide.psi if psi is None else psi)
        start = guide.psi.detach().clone()
        guide.fit(progress=False, num_particles=100, num_starts=1, max_iter=10)
        return start, guide

    start, together = fit(slice(0, 4))
    for row in range(4):
        _, alone = fit(slice(row, row + 1), start[row : row + 1])
        torch.testing.assert_close(alone.psi[0], together.psi[row], rtol=0, atol=1e-6)
        assert not torch.equal(alone.psi[0], start[row])


class _Bernoulli:
    """Rows of binary data with a curved decoder of two latents, few elements observed."""

    def __init__(self, rows: int, size: int) -> None:
        self.decoder = small_decoder(2, size)
        with torch.no_grad():
            probs = self.decoder(torch.randn(rows, 2)).sigmoid()
        self.data = torch.bernoulli(probs)
        self.mask = torch.rand(rows, size) < 0.3
        self.rows = rows

    def model(self) -> None:
        with pyro.plate("rows", self.rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1))

    def conditioned(self) -> Callable[[], None]:
        return condition_on(self.model, {"x": self.data}, {"x": self.mask})

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Of each element, shape ``(n, rows, size)``."""
        with torch.no_grad():
            return dist.Bernoulli(logits=self.decoder(z)).log_prob(self.data)

    def grid(self, num: int = 300) -> Grid:
        return grid(
            lambda z: (
                dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
                + (self.log_likelihood(z) * self.mask).sum(-1)
            ),
            num=num,
        )


FLOWS: dict[str, dict[str, Any]] = {"gvi": {}, "planar": {"num_layers": 8}, "spline": {}}


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS)
def test_bounds_and_queries_of_a_nonlinear_decoder(flow: str) -> None:
    problem = _Bernoulli(4, 12)
    exact = problem.grid()
    guide = ConditionalPriorGuide(problem.conditioned(), flow, **FLOWS[flow])
    result = guide.fit(progress=False, num_particles=400)
    log_q = guide.log_prob({"z": exact.points.expand(-1, problem.rows, -1)})
    torch.testing.assert_close(
        (log_q.exp() * exact.cell).sum(0), torch.ones(problem.rows), rtol=0, atol=1e-4
    )
    divergence = exact.divergence(log_q)
    assert (divergence > 0).all()
    # eq. 5: what is missing to the evidence is the divergence, within the error of fresh noise
    missing = exact.log_evidence - result.held_out_c_elbo
    assert ((missing - divergence).abs() < 5 * result.held_out_error + 2e-3).all()
    bound = guide.importance_bound(4000)
    assert (bound.log_evidence > result.held_out_c_elbo - 5 * result.held_out_error).all()
    assert (bound.log_evidence < exact.log_evidence + 0.05).all()
    worst, average = {"gvi": (0.5, 0.2), "planar": (0.1, 0.05), "spline": (0.1, 0.05)}[flow]
    assert divergence.max() < worst
    assert divergence.mean() < average


def test_lemma_1() -> None:
    """The divergence of the query, over all its values, is at most that of the latents."""
    problem = _Bernoulli(4, 6)
    exact = problem.grid(150)
    guide = ConditionalPriorGuide(problem.conditioned())
    guide.fit(progress=False)
    log_q = guide.log_prob({"z": exact.points.expand(-1, problem.rows, -1)})
    latent_divergence = exact.divergence(log_q)
    values = torch.tensor([[(i >> j) & 1 for j in range(6)] for i in range(2**6)]).double()
    with torch.no_grad():
        likelihood = dist.Bernoulli(logits=problem.decoder(exact.points[:, 0]))
    total = torch.zeros(problem.rows)
    for row in range(problem.rows):
        free = ~problem.mask[row]
        queries = values[:, free].unique(dim=0)
        log_p = torch.stack(
            [
                (likelihood.log_prob(queries.new_zeros(6).index_put((free,), y)) * free).sum(-1)
                for y in queries
            ]
        )
        q, p = (
            (log_p + log_density[:, row]).logsumexp(-1) + torch.tensor(exact.cell).log()
            for log_density in (log_q, exact.log_posterior)
        )
        torch.testing.assert_close(p.exp().sum(), torch.ones(()), rtol=0, atol=1e-3)
        total[row] = (q.exp() * (q - p)).sum()
    assert (total <= latent_divergence + 1e-6).all()
    assert (total > -1e-6).all()
    assert (total < 0.9 * latent_divergence).any()


_LOCS = torch.tensor([[-1.5, -1.0], [1.2, 1.4], [1.5, -1.2]], dtype=torch.float64)
_WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def _mixture() -> dist.MixtureSameFamily:
    return dist.MixtureSameFamily(dist.Categorical(_WEIGHTS), dist.Normal(_LOCS, 0.4).to_event(1))


def _mixture_model() -> None:
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    z = pyro.sample("z", prior)
    pyro.factor("target", _mixture().log_prob(z) - prior.log_prob(z))


def _two_sides() -> None:
    """The sign of the first latent is lost."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    loc = torch.stack([z[..., 0] ** 2, z[..., 1]], -1)
    pyro.sample("x", dist.Normal(loc, 0.25).to_event(1), obs=torch.tensor([1.0, 0.5]))


def _two_sides_log_joint(z: Tensor) -> Tensor:
    likelihood = dist.Normal(torch.stack([z[..., 0] ** 2, z[..., 1]], -1), 0.25)
    evidence = likelihood.log_prob(torch.tensor([1.0, 0.5])).sum(-1)
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + evidence


def _mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy, with a Gaussian kernel of unit width."""

    def mean_kernel(a: Tensor, b: Tensor, *, same: bool) -> Tensor:
        kernel = (-0.5 * torch.cdist(a, b).square()).exp()
        n = len(a)
        return (kernel.sum() - n) / (n * (n - 1)) if same else kernel.mean()

    total = mean_kernel(x, x, same=True) + mean_kernel(y, y, same=True)
    return float(total - 2 * mean_kernel(x, y, same=False))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixture", "two sides"])
def test_flows_represent_several_modes_in_order_of_their_power(case: str) -> None:
    """The check of the paper's appendix 7.1: divergences by grid, and MMD of the mixture."""
    model = _mixture_model if case == "mixture" else _two_sides
    joint = _mixture().log_prob if case == "mixture" else _two_sides_log_joint
    exact = grid(joint, width=5.0)
    divergence: dict[str, Tensor] = {}
    discrepancy: dict[str, Tensor] = {}
    for flow in ("gvi", "planar", "spline"):
        found: list[tuple[float, float]] = []
        for seed in range(2):
            torch.manual_seed(seed)
            guide = ConditionalPriorGuide(model, flow)
            result = guide.fit(progress=False, num_particles=1000)
            assert float(result.held_out_c_elbo - exact.log_evidence) < 5 * result.held_out_error
            log_q = guide.log_prob({"z": exact.points[:, 0]})
            draws = guide.sample_latents(2000)["z"]
            mmd = _mmd(draws, _mixture().sample((2000,)))
            found.append((float(exact.divergence(log_q[:, None])), mmd))
        divergence[flow], discrepancy[flow] = torch.tensor(found).mean(0)
    assert divergence["spline"] < divergence["planar"] < divergence["gvi"]
    assert divergence["spline"] < 0.15 < 0.5 < divergence["gvi"]
    if case == "mixture":
        # draws of the mixture itself have 0 +- 0.001, and those of one of its parts 0.3
        assert discrepancy["gvi"] > 0.2
        assert discrepancy["planar"] < 0.1
        assert discrepancy["spline"] < 0.05


def test_fully_connected_networks_take_several_modes_but_bound_nothing() -> None:
    guide = ConditionalPriorGuide(_mixture_model, "fcn", hidden_features=16)
    guide.fit(progress=False, num_particles=300, max_iter=150)
    draws = guide.sample_latents(2000)["z"]
    near = (torch.cdist(draws, _LOCS) < 1.2).any(-1).double().mean()
    assert near > 0.85
    nearest = torch.cdist(draws, _LOCS).argmin(-1)
    assert (torch.bincount(nearest, minlength=3) > 100).all()
    with pytest.raises(NotImplementedError, match="'fcn' has no inverse"):
        guide.log_prob({"z": torch.zeros(2)})


@pytest.mark.parametrize(
    "setting", [{}, {"flow": "planar", "num_layers": 4}], ids=["gvi", "planar"]
)
def test_weighted_queries_are_exact_for_any_guide(setting: dict[str, Any]) -> None:
    """A guide that is still the prior, and one that was fitted, odd numbers of draws too."""
    problem = linear_gaussian(4, 2, 5)
    guide = ConditionalPriorGuide(problem.model, **setting)
    guide.setup()
    for _ in range(2):
        scores = torch.stack(
            [guide.query_log_prob(problem.data, 4001, weighted=True) for _ in range(20)]
        )
        error = scores.std(0) / 20**0.5
        assert (error < 0.1).all()
        assert ((scores.mean(0) - problem.query_log_prob()).abs() < 5 * error + 0.02).all()
        guide.fit(progress=False, max_iter=30)


def test_weighted_queries_find_the_mode_that_a_guide_has_left_out() -> None:
    """The posterior has modes at 1 and -1. A Gaussian guide has one; the query is at the other."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("square", dist.Normal(z**2, 0.05), obs=torch.tensor(1.0))
        pyro.sample("y", dist.Normal(z, 0.2).expand([1]).to_event(1))

    nothing_seen = torch.tensor([False])
    asked = condition_on(model, {"y": torch.zeros(1)}, {"y": nothing_seen})
    guide = ConditionalPriorGuide(asked)
    guide.fit(progress=False)
    z = torch.linspace(-5, 5, 20_001)
    log_posterior = -0.5 * z**2 - 0.5 * ((z**2 - 1) / 0.05) ** 2
    missed = -guide.sample_latents(100)["z"].mean().sign().reshape(1)
    log_y = dist.Normal(z, 0.2).log_prob(missed)
    exact = (log_posterior.log_softmax(0) + log_y).logsumexp(0)
    assert guide.query_log_prob({"y": missed}, 20_000) < exact - 20
    weighted = guide.query_log_prob({"y": missed}, 20_000, weighted=True)
    torch.testing.assert_close(weighted.squeeze(), exact, rtol=0, atol=0.1)


def test_weighted_queries_need_an_inverse() -> None:
    problem = linear_gaussian(2, 2, 4)
    guide = ConditionalPriorGuide(problem.model, "fcn").setup()
    with pytest.raises(NotImplementedError):
        guide.query_log_prob(problem.data, weighted=True)


def test_padding_that_the_model_masks_is_no_query() -> None:
    """Rows of different length: what stands in the padding has no density."""
    valid: Any = torch.tensor([[True] * 4, [True, True, False, False]])

    def model() -> None:
        with pyro.plate("rows", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("elements", 4, dim=-1), pyro.poutine.mask(mask=valid):
                pyro.sample("x", dist.Laplace(z, 1.0))

    x = torch.randn(2, 4)
    mask = torch.tensor([True, False, True, False]) & valid
    guide = ConditionalPriorGuide(condition_on(model, {"x": x}, {"x": mask}))
    guide.fit(progress=False, num_particles=100)
    scores = guide.query_log_prob(torch.where(valid, x, 1e3), 20_000, weighted=True)

    z = torch.linspace(-8, 8, 4001)[:, None, None]
    log_prob = torch.where(valid, dist.Laplace(z, 1.0).log_prob(x), 0.0)
    posterior = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + (log_prob * mask).sum(-1)
    exact = (posterior.log_softmax(0) + (log_prob * ~mask).sum(-1)).logsumexp(0)
    torch.testing.assert_close(scores, exact, rtol=0, atol=0.05)


def test_queries_of_which_few_draws_know() -> None:
    """The difference of two evidences, where the average over draws is too low."""
    problem = linear_gaussian(4, 3, 8, noise=0.1)
    mask = torch.arange(8) < 1
    evidences = []
    for observed in (mask, torch.ones_like(mask)):
        model = condition_on(problem.unconditioned, {"x": problem.data}, {"x": observed})
        guide = ConditionalPriorGuide(model)
        guide.fit(progress=False, num_particles=50)
        evidences.append(guide.importance_bound().log_evidence)
    exact = problem._replace(mask=mask.expand(4, 8)).query_log_prob()
    torch.testing.assert_close(evidences[1] - evidences[0], exact, rtol=0, atol=1e-3)
