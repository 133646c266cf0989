"""Blocks that evaluate only their own factors of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ext.infer import APG, WithFactors

STEPS = 4
DATA = torch.tensor([[0.3, 1.1, 0.4, -0.6], [2.0, 1.5, 2.6, 3.0]], dtype=torch.float64)


class Walk(nn.Module):
    """A random walk under noise, for several data sets: model, proposals and factors."""

    def __init__(self, forget_next: bool = False) -> None:
        super().__init__()
        self.log_noise = nn.Parameter(torch.tensor(0.2))
        self.gain = nn.Parameter(torch.tensor(-0.6))
        self.forget_next = forget_next
        self.evaluations = 0

    def step(self, t: int, previous: Tensor | float, x: Tensor) -> Tensor:
        z = pyro.sample(f"z_{t}", dist.Normal(previous, 1.0))
        self.observe(t, z, x)
        return z

    def observe(self, t: int, z: Tensor, x: Tensor) -> None:
        self.evaluations += 1
        pyro.sample(f"x_{t}", dist.Normal(z, self.log_noise.exp()), obs=x[:, t])

    def model(self, x: Tensor) -> None:
        z: Tensor | float = 0.0
        with pyro.plate("data_sets", len(x), dim=-1):
            for t in range(STEPS):
                z = self.step(t, z, x)

    def encode(self, x: Tensor) -> None:
        with pyro.plate("data_sets", len(x), dim=-1):
            for t in range(STEPS):
                pyro.sample(f"z_{t}", dist.Normal(x[:, t], 1.0))

    def update(self, t: int, latents: dict[str, Tensor], x: Tensor) -> None:
        neighbours = [latents[name] for name in (f"z_{t - 1}", f"z_{t + 1}") if name in latents]
        mean = sum(neighbours, x[:, t]) / (1 + len(neighbours))
        with pyro.plate("data_sets", len(x), dim=-1):
            pyro.sample(f"z_{t}", dist.Normal(mean, self.gain.exp()))

    def factors(self, t: int, latents: dict[str, Tensor], x: Tensor) -> None:
        with pyro.plate("data_sets", len(x), dim=-1):
            z = self.step(t, latents.get(f"z_{t - 1}", 0.0), x)
            if t + 1 < STEPS and not self.forget_next:
                pyro.sample(f"z_{t + 1}", dist.Normal(z, 1.0))

    def sampler(self, with_factors: bool, **settings: Any) -> APG:
        kernels: list[Any] = [functools.partial(self.update, t) for t in range(STEPS)]
        if with_factors:
            kernels = [
                WithFactors(kernel, functools.partial(self.factors, t))
                for t, kernel in enumerate(kernels)
            ]
        return APG(self.model, self.encode, kernels, batch_plate="data_sets", **settings)


def test_same_samples_as_with_the_whole_model() -> None:
    walk = Walk()
    results = []
    for with_factors in (True, False):
        pyro.set_rng_seed(0)
        sampler = walk.sampler(with_factors, num_particles=7, num_sweeps=5)
        sampler.sample(DATA)  # the first run looks at the programs, with draws of its own
        pyro.set_rng_seed(1)
        results.append(sampler.sample(DATA))
    for name, value in results[0].samples.items():
        torch.testing.assert_close(value, results[1].samples[name])
    torch.testing.assert_close(results[0].log_weights, results[1].log_weights)
    torch.testing.assert_close(results[0].history.log_joint, results[1].history.log_joint)
    for name, ess in results[0].history.ess.items():
        torch.testing.assert_close(ess, results[1].history.ess[name])


def test_evidence_and_moments() -> None:
    """Against the Gaussian that the data are jointly distributed as."""
    walk = Walk()
    noise = walk.log_noise.detach().exp()
    time = torch.arange(1.0, STEPS + 1)
    prior = torch.minimum(time[:, None], time)
    covariance = prior + noise**2 * torch.eye(STEPS)
    truth = dist.MultivariateNormal(torch.zeros(STEPS), covariance).log_prob(DATA)
    mean = torch.linalg.solve(covariance, DATA.T).T @ prior
    result = walk.sampler(True, num_particles=20_000, num_sweeps=4).sample(DATA)
    assert result.ess.min() > 1000, "few effective particles: the proposals are poor"
    torch.testing.assert_close(result.log_evidence, truth, atol=0.05, rtol=0)
    own = result.expectation(lambda z: torch.stack([z[f"z_{t}"] for t in range(STEPS)], -1))
    # standard deviations are below 0.65: five standard errors of so many independent draws
    torch.testing.assert_close(own, mean, atol=5 * 0.65 / 1000**0.5, rtol=0)


def test_the_model_learns_from_the_factors() -> None:
    """The gradient of an update is that of its factors: the noise of one observation."""
    walk = Walk()
    sampler = walk.sampler(True, num_particles=50, num_sweeps=2)
    sampler.sample(DATA)
    torch.manual_seed(3)
    updates = sampler.objective.run((DATA,), {}, 50, 2)
    next(updates)
    for t, update in enumerate(updates):
        (gradient,) = torch.autograd.grad(update.log_joint.sum(), walk.log_noise)
        residual = (DATA[:, t] - update.particles.latents[f"z_{t}"]) / walk.log_noise.exp()
        torch.testing.assert_close(gradient, (residual.square() - 1).sum().detach())
        whole = _log_joint(walk, update.particles.latents)
        torch.testing.assert_close(update.particles.log_joint, whole)


def _log_joint(walk: Walk, latents: dict[str, Tensor]) -> Tensor:
    values = torch.stack([latents[f"z_{t}"] for t in range(STEPS)], -1)
    steps = values.diff(dim=-1, prepend=torch.zeros_like(values[..., :1]))
    log_prob = dist.Normal(0.0, 1.0).log_prob(steps)
    return (log_prob + dist.Normal(values, walk.log_noise.exp()).log_prob(DATA)).sum(-1).detach()


def test_cost_is_linear_in_the_steps() -> None:
    """Observations evaluated in a sweep: two for each step, not one for each pair of steps."""
    counts = {}
    for with_factors in (True, False):
        walk = Walk()
        sampler = walk.sampler(with_factors, num_particles=2, num_sweeps=3)
        sampler.sample(DATA)
        walk.evaluations = 0
        sampler.sample(DATA)
        counts[with_factors] = walk.evaluations - STEPS  # without those of the encoder's draw
    assert counts == {True: 2 * 2 * STEPS, False: 2 * STEPS**2}


def test_training_reaches_parameters_of_the_factors() -> None:
    walk = Walk()
    sampler = walk.sampler(True, num_particles=20, num_sweeps=4)
    assert {id(p) for p in sampler.objective.parameters()} == {id(p) for p in walk.parameters()}
    sampler.optim = torch.optim.Adam(sampler.objective.parameters(), lr=0.05)
    before = [p.detach().clone() for p in walk.parameters()]
    for _ in range(3):
        sampler.step(DATA)
    assert all(bool(p != old) for p, old in zip(walk.parameters(), before, strict=True))


def test_kernels_as_a_function_of_the_data() -> None:
    """New functions at every call, bound to the blocks that were found at the first."""
    walk = Walk()

    def kernels(x: Tensor) -> list[WithFactors]:
        return [
            WithFactors(functools.partial(walk.update, t), functools.partial(walk.factors, t))
            for t in range(x.shape[1])
        ]

    sampler = APG(walk.model, walk.encode, kernels, batch_plate="data_sets", num_sweeps=2)
    sampler.sample(DATA)
    walk.evaluations = 0
    sampler.sample(DATA)
    assert walk.evaluations == STEPS + 2 * STEPS


def _no_own_site(latents: dict[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-1):
        pyro.sample("x_0", dist.Normal(latents["z_0"], 1.0), obs=x[:, 0])


def _unknown_site(latents: dict[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-1):
        pyro.sample("z_0", dist.Normal(0.0, 1.0))
        pyro.sample("z_9", dist.Normal(latents["z_0"], 1.0))


def test_forgotten_factor() -> None:
    with pytest.raises(ValueError, match=r"factors of block \['z_0'\] change by another amount"):
        Walk(forget_next=True).sampler(True).sample(DATA)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        pytest.param(_no_own_site, r"have no site \['z_0'\]", id="own-site-missing"),
        pytest.param(_unknown_site, r"sample \['z_9'\], no latent site", id="unknown-site"),
    ],
)
def test_wrong_sites(factors: Callable[..., None], message: str) -> None:
    walk = Walk()
    kernels: list[Any] = [functools.partial(walk.update, t) for t in range(STEPS)]
    kernels[0] = WithFactors(kernels[0], factors)
    sampler = APG(walk.model, walk.encode, kernels, batch_plate="data_sets")
    with pytest.raises(ValueError, match=message):
        sampler.sample(DATA)


def test_no_function() -> None:
    with pytest.raises(TypeError, match="factors=3: give a Pyro program"):
        WithFactors(Walk().update, 3)  # type: ignore[arg-type]


def test_local_plates() -> None:
    walk = Walk()

    kernels = [
        WithFactors(functools.partial(walk.update, t), functools.partial(walk.factors, t))
        for t in range(STEPS)
    ]
    sampler = APG(walk.model, walk.encode, kernels, local_plates=["data_sets"])
    with pytest.raises(ValueError, match="do not go together"):
        sampler.sample(DATA)
