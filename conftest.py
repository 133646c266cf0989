"""What the doctests may use without importing it: ``torch``, ``pyro`` and ``dist``, in float64."""

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_setup(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> Iterator:
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    doctest_namespace.update(torch=torch, pyro=pyro, dist=dist)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
