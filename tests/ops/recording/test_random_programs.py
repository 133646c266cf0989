"""Loops over steps made at random: recorded, they have the same values and Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

from pyro_ext.ops.recording import record

UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.sin,
    torch.tanh,
    lambda x: x.square() / 3,
    lambda x: 1 - x,
    lambda x: x.abs().log1p(),
    lambda x: torch.where(x > 0.1, x, 0.5 * x),
    lambda x: x.clamp(min=-0.7),
    lambda x: x.sum() * torch.ones(2),
    lambda x: x.flip(-1),
    lambda x: x.cumsum(-1),
    lambda x: torch.stack([x[..., 1], x[..., 0].exp().reciprocal()], -1),
    lambda x: torch.tensor([[1.0, 0.3], [-0.2, 0.8]]) @ x,
    lambda x: torch.linalg.inv(torch.eye(2) * 3 + torch.outer(x, x)) @ x,
    lambda x: x.unsqueeze(0).expand(3, 2).mean(0),
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    lambda x, y: x / (2 + y.square()),
    lambda x, y: torch.outer(x, y).sum(0),
    lambda x, y: torch.cat([x[:1], y[1:]]),
    lambda x, y: x[0] * y,
]


class Instruction(NamedTuple):
    """One line of a step: an operation on values that are there already."""

    operation: int
    arguments: tuple[int, int]
    is_binary: bool
    depends_on_time: bool


class Loop(NamedTuple):
    """A loop of which every step runs the same instructions."""

    num_steps: int
    lines: list[Instruction]
    is_sequential: bool
    writes: bool

    def run(self, u: Tensor) -> Tensor:
        data = torch.linspace(-1.0, 1.0, 2 * self.num_steps + 2).reshape(-1, 2)
        shared = u[:2].exp()
        state: Tensor = data[0]
        collected = torch.zeros(self.num_steps, 2)
        outputs = []
        for t in range(self.num_steps):
            values = [shared, u[2 + 2 * t : 4 + 2 * t], state, data[t + 1]]
            for line in self.lines:
                values.append(self._value(line, values, t))
            if self.writes:
                collected[t] = values[-1]
                collected[0] += 0.1 * values[-2]
            outputs.append(values[-1])
            state = values[-1].tanh() if self.is_sequential else data[t + 1]
        return collected.flatten() if self.writes else torch.cat(outputs)

    def _value(self, line: Instruction, values: list[Tensor], t: int) -> Tensor:
        first, second = (values[i % len(values)] for i in line.arguments)
        if line.is_binary:
            value = BINARY[line.operation % len(BINARY)](first, second)
        else:
            value = UNARY[line.operation % len(UNARY)](first)
        return value * (0.2 * t) if line.depends_on_time else value


instructions = st.builds(
    Instruction,
    st.integers(0, 100),
    st.tuples(st.integers(0, 100), st.integers(0, 100)),
    st.booleans(),
    st.integers(0, 3).map(lambda k: k == 0),
)
loops = st.builds(
    Loop,
    st.integers(1, 7),
    st.lists(instructions, min_size=1, max_size=6),
    st.integers(0, 3).map(lambda k: k == 0),
    st.booleans(),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(loop=loops, seed=st.integers(0, 1000))
def test_values_and_jacobians(loop: Loop, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dim = 2 + 2 * loop.num_steps
    recorded = record(loop.run, torch.randn(dim, generator=generator))
    assert recorded.num_operations <= recorded.num_recorded
    inputs = torch.randn(2, dim, generator=generator)
    torch.testing.assert_close(vmap(recorded)(inputs), torch.stack([loop.run(u) for u in inputs]))
    expected = torch.stack([jacrev(loop.run)(u) for u in inputs])
    torch.testing.assert_close(vmap(jacfwd(recorded))(inputs), expected)
    torch.testing.assert_close(vmap(jacrev(recorded))(inputs), expected)
