"""Exact blocks draw from the conditional, given all that they are not."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_ext.infer import APG, ExactBlock
from pyro_ext.infer.apg.exact_block import draw_exactly
from tests.infer.apg.problems import STATES, Labels, X, state_index

SIZE = 30_000


def _assert_frequencies(index: Tensor, truth: Tensor) -> None:
    counts = torch.bincount(index.reshape(-1), minlength=len(truth)) / index.numel()
    error = (truth * (1 - truth) / index.numel()).sqrt()
    assert ((counts - truth).abs() <= 5 * error + 1e-12).all(), f"{counts} instead of {truth}"


@pytest.mark.parametrize("sites", [("group",), ("label",), ("group", "label")], ids="-".join)
def test_draws_have_the_conditional(sites: tuple[str, ...]) -> None:
    """Given the other sites, and jointly for all of the block."""
    model = Labels()
    given = {"group": torch.ones(SIZE, 1, 1), "label": torch.tensor([2, 0]).expand(SIZE, 1, 2)}
    rest = {name: value.long() for name, value in given.items() if name not in sites}
    args = (X.expand(1, 2),)
    drawn = draw_exactly(model, args, {}, sites, rest, num_particles=SIZE, plate_nesting=2)
    assert set(drawn) == set(sites)
    log_joints = model.log_joints().detach()
    for number, (group, *labels) in enumerate(STATES):
        differs = ("group" in rest and group != 1) or ("label" in rest and labels != [2, 0])
        if differs:
            log_joints[number] = -torch.inf
    index = state_index({**rest, **drawn}).expand(SIZE, 1)
    _assert_frequencies(index, torch.softmax(log_joints, 0))


def test_masked_points_are_drawn_from_anything() -> None:
    """... and leave the others as they are."""
    model = Labels()
    x = torch.cat([X, torch.tensor([50.0])]).expand(1, 3)
    mask = torch.tensor([[True, True, False]])
    drawn = draw_exactly(
        model, (x, mask), {}, ("group", "label"), {}, num_particles=SIZE, plate_nesting=2
    )
    latents = {"group": drawn["group"], "label": drawn["label"][..., :2]}
    _assert_frequencies(state_index(latents), torch.softmax(model.log_joints().detach(), 0))


def _mixture(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        with pyro.plate("clusters", 2, dim=-1):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("points", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(Vindex(loc.unsqueeze(-2))[..., c], 1.0), obs=x)


def test_exact_and_learned_blocks_mix() -> None:
    """A mixture with continuous centres: exact labels, and centres by their own conditional."""

    def encoder(x: Tensor) -> None:
        with pyro.plate("data_sets", len(x), dim=-2):
            with pyro.plate("clusters", 2, dim=-1):
                pyro.sample("loc", dist.Normal(0.0, 3.0))
            with pyro.plate("points", x.shape[1], dim=-1):
                pyro.sample("c", dist.Categorical(torch.ones(2)))

    def kernel(latents: dict[str, Tensor], x: Tensor) -> None:
        one_hot = torch.nn.functional.one_hot(latents["c"], 2).to(x).transpose(-1, -2)
        precision = 1 / 9 + one_hot.sum(-1)
        with pyro.plate("data_sets", len(x), dim=-2), pyro.plate("clusters", 2, dim=-1):
            loc = (one_hot @ x.unsqueeze(-1)).squeeze(-1) / precision
            pyro.sample("loc", dist.Normal(loc, precision.rsqrt()))

    apg = APG(_mixture, encoder, [ExactBlock("c"), kernel], batch_plate="data_sets", num_sweeps=10)
    x = torch.tensor([[-3.0, -3.5, 3.0, 2.5, 3.5, -2.0]]).expand(40, 6)
    result = apg.sample(x, num_particles=200)
    for name in ("c", "loc"):
        torch.testing.assert_close(result.history.ess[name], torch.ones(9, 40))
    # the exact evidence, by all 64 assignments
    truth = _evidence(x[0])
    error = result.log_evidence.exp().std() / 40**0.5
    assert abs(result.log_evidence.exp().mean() - truth) < 5 * error


def _evidence(x: Tensor) -> Tensor:
    terms = []
    for labels in torch.cartesian_prod(*[torch.arange(2)] * len(x)):
        term = torch.where(labels == 0, 0.4, 0.6).log().sum()
        for cluster in range(2):
            own = x[labels == cluster]
            if len(own):
                covariance = torch.eye(len(own)) + 9.0
                zero = torch.zeros(len(own))
                term = term + dist.MultivariateNormal(zero, covariance).log_prob(own)
        terms.append(term)
    return torch.stack(terms).logsumexp(0).exp()


def test_handlers_around_the_model_are_kept() -> None:
    """Conditioning from outside reaches the enumerated model, too."""
    model = Labels()
    conditioned = poutine.condition(model, {"group": torch.zeros(1, 1, dtype=torch.long)})
    drawn = draw_exactly(
        conditioned, (X.expand(1, 2),), {}, ("label",), {}, num_particles=SIZE, plate_nesting=2
    )
    log_joints = model.log_joints().detach()
    log_joints[9:] = -torch.inf
    index = drawn["label"][..., 0] * 3 + drawn["label"][..., 1]
    _assert_frequencies(index, torch.softmax(log_joints, 0)[:9])
