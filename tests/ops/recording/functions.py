"""Functions to record: what models of Pyro compute, without Pyro."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FUNCTIONS", "Example"]

Function = Callable[[Tensor], Tensor]
STEPS = 12


class Example(NamedTuple):
    """A function with the number of its inputs and of the operations that it may be left with."""

    make: Callable[[], Function]
    dim: int
    most_operations: int


def _data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def steps_from_data() -> Function:
    """Each step starts from data: Lotka-Volterra, as in the tutorial."""
    y = 50 + 10 * _data(STEPS + 1, 2)

    def function(u: Tensor) -> Tensor:
        birth, predation, death, growth = (u[:4] - 2).exp().unbind(-1)
        residuals = []
        for t in range(STEPS):
            prey, predators = y[t].unbind(-1)
            drift = torch.stack(
                [
                    prey * (1 + birth - predation * predators),
                    predators * (1 - death + growth * prey),
                ],
                -1,
            )
            noise = u[4 + 2 * t : 6 + 2 * t]
            residuals.append((drift + noise - y[t + 1]).reshape(-1))
        return torch.cat(residuals)

    return function


def steps_from_numbers() -> Function:
    """Steps that differ by Python numbers, the first of them by what it starts from."""

    def function(u: Tensor) -> Tensor:
        previous: Tensor | float = 0.5
        outputs = []
        for t in range(STEPS):
            value = previous * u[0].tanh() + 0.1 * t * u[1] - u[2 + t] / (1 + t)
            late = torch.where(value > 0.2 * t, value, 3.0 - value)
            outputs.append(late)
            previous = torch.tensor(0.3 * t)
        return torch.stack(outputs)

    return function


def sequential() -> Function:
    """Each step starts from the step before: nothing can be grouped."""

    def function(u: Tensor) -> Tensor:
        state, outputs = u[0], []
        for t in range(STEPS):
            state = (0.9 * state + u[1] * u[t]).sin()
            outputs.append(state)
        return torch.stack(outputs)

    return function


def sequential_states() -> Function:
    """A chain of states, and an observation of each that nothing else waits for."""

    def function(u: Tensor) -> Tensor:
        state, outputs = u[0], []
        for t in range(STEPS):
            state = 0.9 * state + u[1].exp() * u[2 + t]
            outputs.append((0.5 * state).exp() * u[2 + STEPS + t] - 0.1 * t)
        return torch.stack(outputs)

    return function


def chains_in_lockstep() -> Function:
    """Several recursions side by side, one of them longer."""
    starts = _data(6)

    def function(u: Tensor) -> Tensor:
        states = list(starts.unbind(0))
        for t in range(4):
            states = [(s * u[0] + u[1 + t]).tanh() for s in states]
        states[2] = (states[2] * u[5]).tanh()
        return torch.stack(states)

    return function


def vector_states() -> Function:
    """Matrices times vectors, a solution and a factor in every step."""
    y, weights = _data(STEPS, 3), _data(3, 3)

    def function(u: Tensor) -> Tensor:
        matrix = torch.eye(3) + 0.1 * torch.outer(u[:3], u[:3])
        outputs = []
        for t in range(STEPS):
            noise = u[3 + 3 * t : 6 + 3 * t]
            mean = weights @ (matrix @ y[t]) + matrix.mv(noise)
            spread = matrix @ (torch.eye(3) + 0.1 * torch.outer(noise, noise)) @ matrix.T
            factor = torch.linalg.cholesky(spread + torch.eye(3))
            whitened = torch.linalg.solve_triangular(factor, mean.unsqueeze(-1), upper=False)
            solved = torch.cholesky_solve(whitened, factor).squeeze(-1)
            outputs += [factor @ solved + factor.diagonal().log().sum() * y[t], mean.cumsum(0)]
        return torch.cat(outputs)

    return function


def plates() -> Function:
    """Broadcasting, expanding, indexing by data and reducing in every step."""
    groups, x = torch.tensor([0, 2, 1, 1, 0]), _data(STEPS, 5)

    def function(u: Tensor) -> Tensor:
        effects, scale = u[:3], u[3].exp()
        outputs = []
        for t in range(STEPS):
            local = effects[groups] * x[t] + u[4 + t].expand(5)
            table = local.unsqueeze(-1) * torch.arange(1.0, 3.0)
            outputs.append(torch.stack([table.sum(), (scale * table.abs().log1p()).amax()]))
            outputs.append(table.mean(0).softmax(0).flip(0)[:1].expand(2))
        return torch.stack(outputs).flatten()

    return function


def writing() -> Function:
    """Values collected by writing into a tensor, and read from there."""
    y = _data(STEPS)

    def function(u: Tensor) -> Tensor:
        outputs = torch.zeros(2, STEPS)
        for t in range(STEPS):
            outputs[0, t] = (u[t] * y[t]).exp()
            outputs[1, t : t + 1] += outputs[0, t] - u[STEPS]
        outputs[:, -1] *= 2
        outputs[torch.tensor([0, 1]), torch.tensor([3, 4])] = u[:2]
        return outputs.flatten()

    return function


def moving_only() -> Function:
    """Nothing is computed."""

    def function(u: Tensor) -> Tensor:
        rows = u.reshape(4, 3)
        return torch.cat([rows[::2].T.flatten(), rows.roll(1, 0)[0], u.repeat(2)[10:15]])

    return function


def unlike() -> Function:
    """Nothing is repeated."""

    def function(u: Tensor) -> Tensor:
        return torch.stack([u[0].exp(), u[1].sin() * u[0], (u * u).sum(), u.norm()])

    return function


def several_results() -> Function:
    """Operations that return several tensors, some of them not needed."""

    def function(u: Tensor) -> Tensor:
        outputs = []
        for t in range(STEPS):
            part = u[3 * t : 3 * t + 3]
            values, order = part.sort()
            low = part.min(0).values
            outputs.append(values[1:] * (1 + order[0]) + low + torch.logsumexp(part, 0))
        return torch.cat(outputs)

    return function


def layers() -> Function:
    """A network on one vector, without a batch, and layers of its own on parts of the input."""
    first, second, local = _data(3, 7), _data(7, 3), _data(2, 4)

    def function(u: Tensor) -> Tensor:
        hidden = torch.nn.functional.linear(u[:3], first.T, first[0]).tanh()
        parts = [(part @ local).tanh() for part in u[3:].reshape(-1, 2)]
        return torch.cat([hidden @ second, *parts])

    return function


FUNCTIONS = {
    "steps from data": Example(steps_from_data, 4 + 2 * STEPS, 19),
    "steps from numbers": Example(steps_from_numbers, 2 + STEPS, 18),
    "sequential": Example(sequential, STEPS, 4 * STEPS + 2),
    "sequential states": Example(sequential_states, 2 + 2 * STEPS, 3 * STEPS + 10),
    "chains in lockstep": Example(chains_in_lockstep, 6, 22),
    "vector states": Example(vector_states, 3 + 3 * STEPS, 60),
    "plates": Example(plates, 4 + STEPS, 22),
    "writing": Example(writing, STEPS + 1, 20),
    "moving only": Example(moving_only, 12, 2),
    "unlike": Example(unlike, 3, 10),
    "layers": Example(layers, 3 + 2 * STEPS, 17),
    "several results": Example(several_results, 3 * STEPS, 16),
}
