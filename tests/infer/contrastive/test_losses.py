import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_ext.infer.contrastive.losses import Batch, contrast_with, contrastive_loss

NOISE = 0.5


@pytest.mark.parametrize("at_random", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("num_atoms", [2, 5, 12], ids=lambda k: f"K={k}")
def test_contrasting_rows_are_others_without_repetition(num_atoms: int, at_random: bool) -> None:
    index = contrast_with(12, num_atoms, at_random=at_random)
    assert index.shape == (12, num_atoms)
    assert torch.equal(index[:, 0], torch.arange(12))
    assert all(len(set(row)) == num_atoms for row in index.tolist())


def test_contrasting_rows_are_drawn_anew_in_training_only() -> None:
    fixed = [contrast_with(12, 5, at_random=False) for _ in range(2)]
    drawn = [contrast_with(12, 5, at_random=True) for _ in range(2)]
    assert torch.equal(fixed[0], fixed[1])
    assert not torch.equal(drawn[0], drawn[1])


def test_fewer_rows_than_parameters() -> None:
    assert contrast_with(3, 10, at_random=True).shape == (3, 3)


def test_every_other_row_is_equally_likely() -> None:
    counts = torch.zeros(6)
    for _ in range(3000):
        counts += torch.bincount(contrast_with(6, 3, at_random=True)[0, 1:], minlength=6)
    assert counts[0] == 0
    # two of five, each with the standard deviation of 3000 draws
    assert ((counts[1:] / 3000 - 0.4).abs() < 5 * math.sqrt(0.24 / 3000)).all()


def test_loss_with_all_rows_is_that_of_the_whole_minibatch() -> None:
    x, theta = torch.randn(7, 1), torch.randn(7, 1)
    f = -0.5 * (x - theta[:, 0]) ** 2
    expected = (f.logsumexp(1) - f.diag()).mean()
    batch = _batch(theta, torch.ones(7, dtype=torch.bool))
    index = contrast_with(7, 7, at_random=True)
    loss, own = contrastive_loss(lambda u, _, e: -0.5 * (e - u).squeeze(-1) ** 2, batch, x, index)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own, f.diag())


def test_a_batch_of_failures_has_no_loss() -> None:
    weight = torch.ones((), requires_grad=True)
    batch = _batch(torch.randn(4, 1), torch.zeros(4, dtype=torch.bool))
    loss, own = contrastive_loss(
        lambda u, _, e: weight * (u - e).squeeze(-1),
        batch,
        torch.zeros(4, 1),
        contrast_with(4, 3, at_random=True),
    )
    loss.backward()
    assert loss == 0
    assert own.shape == (0,)
    assert weight.grad == 0


PROPOSALS = {"prior": (0.0, 1.0), "proposal": (0.7, 0.5)}


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)
@pytest.mark.parametrize("may_fail", [False, True], ids=["all valid", "some fail"])
@pytest.mark.parametrize("num_atoms", [2, 8], ids=lambda k: f"K={k}")
def test_the_true_likelihood_is_a_stationary_point(
    num_atoms: int, may_fail: bool, proposal: tuple[float, float]
) -> None:
    z = _scores(num_atoms, proposal, may_fail=may_fail, keep_failures=True)
    assert z.abs().max() < 5, f"the gradient is {z.tolist()} standard errors from zero"


def test_without_the_failures_it_is_not() -> None:
    z = _scores(8, PROPOSALS["prior"], may_fail=True, keep_failures=False)
    assert z.abs().max() > 10


def _scores(
    num_atoms: int, proposal: tuple[float, float], *, may_fail: bool, keep_failures: bool
) -> Tensor:
    """Gradient of the loss at the true likelihood, in standard errors, in three directions."""
    loc, scale = proposal
    gradients = []
    for _ in range(400):
        theta = loc + scale * torch.randn(40, 1)
        x = theta + NOISE * torch.randn_like(theta)
        is_valid = torch.ones(40, dtype=torch.bool)
        if may_fail:
            is_valid = torch.rand(40) < torch.sigmoid(2.0 * theta[:, 0])
        if not keep_failures:
            theta, x, is_valid = theta[is_valid], x[is_valid], is_valid[is_valid]
        direction = torch.zeros(3, requires_grad=True)

        def log_ratio(u: Tensor, _: Tensor, e: Tensor, direction: Tensor = direction) -> Tensor:
            f = -0.5 * ((e - u) / NOISE) ** 2
            if may_fail:
                f = f + logsigmoid(2.0 * u)
            away = torch.stack([u, u * e, u * u], -1)
            return (f + (away * direction).sum(-1)).squeeze(-1)

        index = contrast_with(len(theta), num_atoms, at_random=True)
        loss, _ = contrastive_loss(log_ratio, _batch(theta, is_valid), x, index)
        # of the sum over the valid rows: a mean over a random number of rows is another question
        loss = loss * is_valid.sum()
        gradients.append(torch.autograd.grad(loss, direction)[0])
    values = torch.stack(gradients)
    return values.mean(0) / (values.std(0) / math.sqrt(len(values)))


def _batch(theta: Tensor, is_valid: Tensor) -> Batch:
    return Batch(theta, torch.zeros(len(theta)), is_valid, torch.ones_like(is_valid))


def test_batches_are_stored_as_one_tensor() -> None:
    batch = Batch(
        torch.randn(5, 2),
        torch.randn(5),
        torch.tensor([True, False, True, True, False]),
        torch.tensor([True, True, False, True, False]),
    )
    packed = batch.pack()
    assert packed.shape == (5, 5)
    for found, expected in zip(Batch.unpack(packed), batch, strict=True):
        assert torch.equal(found, expected)
