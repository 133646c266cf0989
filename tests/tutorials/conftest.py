"""Tutorials are no package: their modules are loaded from files, under names of their own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks._tutorials import load_siblings as load_siblings

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"


def load_module(tutorial: str, name: str) -> ModuleType:
    full_name = f"_tutorial_{tutorial}_{name}"
    if full_name not in sys.modules:
        path = TUTORIALS / tutorial / f"{name}.py"
        spec = importlib.util.spec_from_file_location(full_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]


@pytest.fixture(scope="session")
def simulator() -> ModuleType:
    return load_module("lotka_volterra", "simulator")


@pytest.fixture(scope="session")
def abc_baselines() -> ModuleType:
    return load_module("lotka_volterra", "abc_baselines")


@pytest.fixture(scope="session")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_module("lotka_volterra", "figures")


@pytest.fixture(scope="session")
def autoencoder() -> ModuleType:
    return load_module("spline_flows", "vae")


@pytest.fixture(scope="session")
def spline_figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_module("spline_flows", "figures")


@pytest.fixture(scope="session")
def digit_autoencoder() -> ModuleType:
    return load_module("conditional_vae", "autoencoder")


@pytest.fixture(scope="session")
def references() -> ModuleType:
    return load_module("conditional_vae", "references")


@pytest.fixture(scope="session")
def question_figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_module("conditional_vae", "figures")
