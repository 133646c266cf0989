"""The guard in ``conftest.py`` catches what it says it catches."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CARELESS = {
    "default dtype": "torch.set_default_dtype(torch.float32)",
    "default device": "torch.set_default_device('meta')",
    "gradient mode": "torch.set_grad_enabled(False)",
    "validation flag of torch distributions": "pyro.enable_validation(False)",
    "parameters in Pyro's store": "pyro.param('a', torch.zeros(()))",
    "handlers of the root logger": "logging.getLogger().addHandler(logging.NullHandler())",
    "Pyro's stack of effect handlers": "pyro.poutine.block().__enter__()",
}


@pytest.fixture
def guarded(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    return pytester


@pytest.mark.parametrize("what", CARELESS)
def test_change_of_global_state_is_reported(guarded: pytest.Pytester, what: str) -> None:
    guarded.makepyfile(
        f"""
        import logging
        import pyro
        import torch

        def test_careless():
            {CARELESS[what]}

        def test_next():
            assert torch.get_default_dtype() == torch.float64
        """
    )
    result = guarded.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines([f"*{what}: *"])


def test_same_seed_for_every_test(guarded: pytest.Pytester) -> None:
    guarded.makepyfile(
        """
        import torch

        draws = []

        def test_first():
            draws.append(torch.randn(()))

        def test_second():
            assert torch.randn(()) == draws[0]
        """
    )
    guarded.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)
