"""Which structure is chosen, and what is not even tried."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_ext.infer.constrained_hmc.jacobian.block_structure import BlockStructure
from pyro_ext.infer.constrained_hmc.jacobian.sparsity import find_pattern
from pyro_ext.infer.constrained_hmc.jacobian.structure import DenseStructure
from pyro_ext.infer.constrained_hmc.jacobian.triangular_jacobian import TriangularStructure
from pyro_ext.infer.constrained_hmc.system import detection
from pyro_ext.infer.constrained_hmc.system.constrained_system import ConstrainedSystem
from pyro_ext.infer.constrained_hmc.system.cost import (
    estimated_cost,
    least_dense_cost,
    step_cost,
    workload,
)
from pyro_ext.infer.constrained_hmc.system.detection import (
    Choice,
    choose_dense,
    choose_structure,
    with_structure,
)
from pyro_ext.ops.recording import record

Constraint = Callable[[Tensor], Tensor]
CHAINS = 16


def local_noise(u: Tensor) -> Tensor:
    """Every output has a noise of its own beside two inputs that act on all."""
    x = torch.linspace(0.0, 1.0, len(u) - 2)
    return (u[0] * x + u[1]).sin() + 0.3 * u[2:].sinh()


def recursion(u: Tensor) -> Tensor:
    """Noise acts on all that follows it."""
    state, outputs = u[0], []
    for noise in u[1:]:
        state = (0.9 * state).sin() + noise
        outputs.append(state)
    return torch.stack(outputs)


def mixed(u: Tensor) -> Tensor:
    matrix = torch.arange(1.0, 1.0 + len(u) * (len(u) - 5)).sin().reshape(len(u) - 5, len(u))
    return (matrix @ u).sin() + u[5:]


def choose(constraint: Constraint, dim: int, kind: str = "auto", mode: str = "auto") -> Choice:
    points = torch.randn(4, dim)
    system = ConstrainedSystem(
        record(constraint, points[0]), lambda u: 0.5 * u.square().sum(), structure=None
    )
    pattern = find_pattern(constraint, points)
    choice = choose_structure(system, pattern, points, CHAINS, kind=kind, jacobian_mode=mode)
    assert choice is not None
    return choice


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_local_noise_is_found(mode: str) -> None:
    choice = choose(local_noise, 202, mode=mode)
    assert choice.report.startswith("200 local blocks of up to 1 x 1, 2 global inputs")
    assert choice.is_certain
    assert mode == "auto" or choice.system.structure.mode == mode


def test_a_recursion_is_found_to_be_triangular() -> None:
    choice = choose(recursion, 41, kind="autoregressive")
    assert isinstance(choice.system.structure, TriangularStructure)
    assert choice.report.startswith("lower triangular in 40 blocks of up to 1 x 1, 1 other")


def test_what_has_no_structure_is_dense() -> None:
    choice = choose(mixed, 25)
    assert isinstance(choice.system.structure, DenseStructure)


def test_of_many_outputs_no_dense_jacobian_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the size of the matrix, nor recorded; 18 million entries would take minutes."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a dense Jacobian was tried")

    points = torch.randn(4, 3002)
    constraint = record(local_noise, points[0])
    system = ConstrainedSystem(constraint, lambda u: 0.5 * u.square().sum())
    monkeypatch.setattr(detection, "choose_dense", refuse)
    monkeypatch.setattr(DenseStructure, "derivatives", refuse)
    monkeypatch.setattr(BlockStructure, "matrix", refuse)
    modes = []

    class Spy(BlockStructure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            modes.append(args[2])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(detection, "BlockStructure", Spy)
    pattern = find_pattern(constraint, points, most_products=100)
    choice = choose_structure(system, pattern, points, CHAINS, kind="auto", jacobian_mode="auto")
    assert choice is not None
    assert choice.report.startswith("3000 local blocks of up to 1 x 1, 2 global inputs")
    assert sorted(modes) == ["forward", "mixed"], "in reverse it takes a product per output"


def test_large_dense_jacobians_are_neither_counted_nor_recorded() -> None:
    points = torch.randn(4, 3002)
    system = ConstrainedSystem(record(local_noise, points[0]), lambda u: u.sum())
    choice = choose_dense(system, (3000, 3002), points, CHAINS, "auto")
    assert choice.cost == math.inf
    assert not choice.system.has_recorded_derivatives


@pytest.mark.parametrize("dim", [52, 402])
def test_estimates_are_near_what_is_counted(dim: int) -> None:
    points = torch.randn(4, dim)
    constraint = record(local_noise, points[0])
    system = ConstrainedSystem(constraint, lambda u: 0.5 * u.square().sum())
    load = workload(constraint, points[:2])
    structure = choose(local_noise, dim, kind="elementwise").system.structure
    assert isinstance(structure, BlockStructure)
    products = structure.compression
    estimate = estimated_cost(
        load,
        len(products.forward_seeds),
        len(products.reverse_seeds),
        structure.partition.split.operations,
        CHAINS,
    )
    counted = step_cost(with_structure(system, structure, points[0]), points[:2], CHAINS)
    assert 0.2 < estimate / counted < 2
    dense = DenseStructure(forward=True)
    counted = step_cost(with_structure(system, dense, points[0]), points[:2], CHAINS)
    assert least_dense_cost(load, (dim - 2, dim), CHAINS) < counted
