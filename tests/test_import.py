"""``import pyro_ext`` changes nothing but ``sys.modules``, and loads no optional dependency."""

import json
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

import pyro_ext

SCRIPT = """
import hashlib, json, logging, pickle, random, sys, warnings

import numpy as np
import pyro
import torch


def digest(value):
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def global_state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "number of torch threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "validation of torch distributions": torch.distributions.Distribution._validate_args,
        "validation of pyro.infer": pyro.infer.util.is_validation_enabled(),
        "parameter store": sorted(pyro.get_param_store().keys()),
        "pyro settings": repr(pyro.settings.get()),
        "random state of torch": digest(torch.get_rng_state().numpy()),
        "random state of numpy": digest(np.random.get_state()),
        "random state of python": digest(random.getstate()),
        "handlers and level of the root logger": repr((logging.root.handlers, logging.root.level)),
        "warning filters": repr(warnings.filters),
    }


before = global_state()
import pyro_ext
after = global_state()
print(json.dumps({"before": before, "after": after, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def fresh_process() -> dict[str, Any]:
    """What a new interpreter sees before and after the import."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_changes_no_global_state(fresh_process: dict[str, Any]) -> None:
    assert fresh_process["after"] == fresh_process["before"]


@pytest.mark.parametrize(
    "package",
    [
        "arviz",
        "h5py",
        "hypothesis",
        "IPython",
        "jax",
        "matplotlib",
        "mici",
        "numpyro",
        "pandas",
        "PIL",
        "pytest",
        "sklearn",
        "zuko",  # would switch argument validation off for the whole process
    ],
)
def test_import_does_not_load_optional_packages(
    fresh_process: dict[str, Any], package: str
) -> None:
    assert package not in fresh_process["modules"]


def test_version_is_that_of_the_installed_package() -> None:
    assert pyro_ext.__version__ == version("pyro-ext")
