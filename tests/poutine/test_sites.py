"""Kinds of sites are told apart."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

from pyro_ext.poutine.sites import delta, is_computed, is_subsample, shares_storage


def model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("computed", 2 * z)
    pyro.deterministic("given", 3 * z)
    pyro.sample("point", dist.Delta(z.exp()))
    pyro.sample("observed", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
    with pyro.plate("plate", 4):
        pyro.deterministic("repeated", z + torch.zeros(4))


def test_only_values_that_the_model_computed_are_computed() -> None:
    conditioned = pyro.condition(model, {"given": torch.tensor(1.0)})
    nodes = poutine.trace(conditioned).get_trace().nodes
    sites = {name: node for name, node in nodes.items() if node["type"] == "sample"}
    computed = {name for name, node in sites.items() if is_computed(node)}
    assert computed == {"computed", "point", "repeated"}
    assert {name for name, node in sites.items() if is_subsample(node)} == {"plate"}


def test_delta_looks_through_masks_and_events() -> None:
    value = torch.arange(3.0)
    assert delta(dist.Delta(value).to_event(1).mask(False)).v is value
    assert delta(dist.Normal(0.0, 1.0)) is None


def test_views_share_storage_and_copies_do_not() -> None:
    value = torch.arange(3.0)
    assert shares_storage(value, value[1:])
    assert not shares_storage(value, value.clone())
    assert not shares_storage(value, 1.0)
