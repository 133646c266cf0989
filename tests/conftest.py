"""Every test starts from the same state, in float64, and must leave that state as it found it."""

import logging
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import _PYRO_STACK


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _root_handlers() -> list[logging.Handler]:
    # pytest swaps its own handlers between the phases of a test.
    handlers = logging.getLogger().handlers
    return [h for h in handlers if not type(h).__module__.startswith("_pytest")]


def _global_state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        "number of torch threads": torch.get_num_threads(),
        "validation flag of torch distributions": torch.distributions.Distribution._validate_args,
        "validation flag of pyro.infer": is_validation_enabled(),
        "parameters in Pyro's store": sorted(pyro.get_param_store().keys()),
        "handlers of the root logger": _root_handlers(),
        "Pyro's stack of effect handlers": list(_PYRO_STACK),
    }


def _restore(state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["default dtype"])
    if torch.get_default_device() != state["default device"]:
        # even the default one, once set, goes through every call of torch, and stops compilation
        is_default = state["default device"] == torch.device("cpu")
        torch.set_default_device(None if is_default else state["default device"])
    torch.set_grad_enabled(state["gradient mode"])
    torch.set_num_threads(state["number of torch threads"])
    pyro.enable_validation(state["validation flag of pyro.infer"])
    torch.distributions.Distribution.set_default_validate_args(
        state["validation flag of torch distributions"]
    )
    pyro.clear_param_store()
    root = logging.getLogger()
    for handler in _root_handlers():
        if handler not in state["handlers of the root logger"]:
            root.removeHandler(handler)
    _PYRO_STACK[:] = state["Pyro's stack of effect handlers"]


@pytest.fixture(autouse=True)
def unchanged_global_state() -> Iterator[None]:
    """Seed, compute in float64, and fail the test that leaves any global state changed.

    The state is put back in any case, so that one careless test does not fail the next.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = _global_state()
    yield
    after = _global_state()
    _restore(before)
    torch.set_default_dtype(dtype)
    changes = [f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k]]
    if changes:
        pytest.fail("the test left global state changed:\n  " + "\n  ".join(changes))


@pytest.fixture
def param_store() -> Iterator[pyro.params.param_store.ParamStoreDict]:
    """Pyro's parameter store, empty at the start and emptied again: for tests that train."""
    yield pyro.get_param_store()
    pyro.clear_param_store()


@pytest.fixture
def float32() -> Iterator[None]:
    """Run the test in single precision."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)
