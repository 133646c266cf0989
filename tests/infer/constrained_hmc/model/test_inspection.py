"""What is read from a model: sites, places in the flat vectors, names, and the prior's family."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_ext.errors import ModelStructureError
from pyro_ext.infer.constrained_hmc.model.inspection import (
    ModelStructure,
    computed_value,
    inspect_model,
)


def inspect(model: Callable[..., Any], **data: Any) -> ModelStructure:
    return inspect_model(pyro.condition(model, data), (), {})


def everything() -> None:
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 2):
        c = pyro.sample("c", dist.Normal(a, 1.0).expand([2, 4]).to_event(1).mask(True))
        pyro.sample("d", dist.Normal(c.sum(-1), 1.0), obs=torch.zeros(2))
    pyro.deterministic("e", c + b[0])
    pyro.deterministic("f", a)
    pyro.deterministic("g", a * b[1])


def test_sites_and_their_places() -> None:
    structure = inspect(everything, e=torch.zeros(2, 4), g=torch.tensor(0.5))
    places = {s.name: (s.start, s.stop, tuple(s.input_shape)) for s in structure.latents}
    # a simplex of three has two inputs
    assert places == {"a": (0, 1, ()), "b": (1, 3, (2,)), "c": (3, 11, (2, 4))}
    assert {s.name: (s.start, s.stop) for s in structure.constraints} == {"e": (0, 8), "g": (8, 9)}
    assert structure.deterministics == {"f"}
    assert (structure.dim, structure.num_constraints) == (11, 9)
    assert structure.dtype == torch.float64
    assert structure.max_plate_nesting == 1
    assert not structure.has_discrete
    assert not structure.is_standard_normal
    assert {s.name: s.is_scaled for s in structure.latents} == {"a": False, "b": False, "c": True}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 4), max_size=3), data=st.data())
def test_names_of_elements(shape: list[int], data: st.DataObject) -> None:
    size = torch.Size(shape)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(size).to_event(len(size)))
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("first", z.sum())
        pyro.deterministic("y", z)

    structure = inspect(model, first=torch.tensor(0.0), y=torch.zeros(size))
    index = data.draw(st.integers(0, size.numel() - 1))
    position = [int(i) for i in torch.arange(size.numel()).reshape(size).eq(index).nonzero()[0]]
    expected = f"y{position}" if shape else "y"
    assert structure.constraint_name(0) == "first"
    assert structure.constraint_name(1 + index) == expected


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (lambda: dist.Normal(1.0, 2.0), True),
        (lambda: dist.LogNormal(1.0, 2.0), True),
        (lambda: dist.Uniform(0.0, 2.0), True),
        (lambda: dist.Gamma(1.0, 2.0), False),
        (lambda: dist.StudentT(4.0), False),
    ],
    ids=["normal", "log-normal", "uniform", "gamma", "student-t"],
)
def test_standard_normal_priors_are_recognised(prior: Callable[[], Any], expected: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", prior().expand([2]).to_event(1))
        pyro.deterministic("y", z.sum())

    assert inspect(model, y=torch.tensor(1.0)).is_standard_normal is expected


@pytest.mark.parametrize("extra", ["observed", "factor", "scale", "mask", "discrete"])
def test_a_density_of_its_own_is_never_dropped(extra: str) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        if extra == "observed":
            pyro.sample("x", dist.Normal(z[0], 1.0), obs=torch.tensor(0.0))
        elif extra == "factor":
            pyro.factor("x", z[0])
        elif extra == "scale":
            with poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(0.0, 1.0))
        elif extra == "mask":
            pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
        else:
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(0.0))
        pyro.deterministic("y", z.sum())

    assert not inspect(model, y=torch.tensor(1.0)).is_standard_normal


def test_prior_draws_that_fail_validation_are_drawn_again() -> None:
    """A heavy-tailed scale may well overflow somewhere in the model."""
    runs = []

    def model() -> None:
        runs.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = torch.tensor(-1.0 if len(runs) < 5 else 1.0)
        w = pyro.sample("w", dist.Normal(0.0, scale))
        pyro.deterministic("y", z.sum() + w)

    assert inspect(model, y=torch.tensor(1.0)).dim == 3
    assert len(runs) >= 6


def test_a_model_that_never_passes_validation_shows_its_own_error() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, -torch.ones(())))
        pyro.deterministic("y", z)

    with pytest.raises(ValueError, match="parameter scale"):
        inspect(model, y=torch.tensor(1.0))


def test_inspection_leaves_the_model_and_the_stack_alone() -> None:
    weight = torch.ones(2, requires_grad=True)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("y", (weight * z).sum())

    observed = torch.tensor(1.0)
    structure = inspect(model, y=observed)
    assert structure.constraints[0].observed.item() == 1.0
    assert weight.grad is None


@pytest.mark.parametrize("change", ["name", "shape"])
def test_sites_that_change_between_runs(change: str) -> None:
    runs = []

    def model() -> None:
        runs.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        odd = len(runs) % 2
        if change == "name":
            pyro.sample(f"w_{odd}", dist.Normal(0.0, 1.0))
        else:
            pyro.sample("w", dist.Normal(0.0, 1.0).expand([1 + odd]).to_event(1))
        pyro.deterministic("y", z.sum())

    pattern = r"'w_0'.*torch\.where" if change == "name" else r"'w' had shape \([12],\)"
    with pytest.raises(ModelStructureError, match=pattern):
        inspect(model, y=torch.tensor(0.0))


def test_computed_value_drops_what_plates_added() -> None:
    value = torch.arange(3.0)
    expanded = dist.Delta(value, event_dim=1).expand([4, 2])
    torch.testing.assert_close(computed_value(expanded, 2), value)
