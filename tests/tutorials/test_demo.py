"""The demonstration of the Lotka-Volterra tutorial, from the functions to the command."""

import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tutorials" / "lotka_volterra"
SIBLINGS = ("abc_baselines", "demo", "figures", "simulator")


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    """The module as a script sees it, its siblings found by their plain names."""
    pytest.importorskip("arviz")
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(FOLDER))
    import demo

    yield demo
    sys.path.remove(str(FOLDER))
    for name in SIBLINGS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def results(demo: ModuleType) -> Any:
    pyro.set_rng_seed(0)
    return demo.run_all(demo.Sizes(4, 5, 6, 4, 2, 5, 1, 5, 8))


@pytest.mark.slow
def test_draws_reproduce_the_data(demo: ModuleType, results: Any) -> None:
    assert results.resimulated.shape == (4, 6, 50, 2)
    assert demo.largest_difference(results.resimulated, results.x) < 1e-8
    text = demo.closing_lines(results)
    assert "from all 24 draws" in text
    assert "of 24." in text


@pytest.mark.slow
def test_table_holds_finite_numbers_for_every_method(demo: ModuleType, results: Any) -> None:
    table = demo.summary_table(results)
    assert list(dict.fromkeys(method for method, _ in table)) == [
        "truth",
        "exact posterior",
        "ConstrainedHMC",
        "NUTS",
        "ABC, radius 10",
        "ABC, radius 100",
    ]
    assert all(values.shape == (4,) and values.isfinite().all() for values in table.values())
    lines = demo.format_table(table).splitlines()
    assert max(map(len, lines)) < 100
    assert sum("r-hat" in line for line in lines) == 3


@pytest.mark.slow
def test_files_are_written(demo: ModuleType, results: Any, tmp_path: Path) -> None:
    files = demo.save_figures(results, tmp_path)
    demo.save_picture(results, tmp_path / "overview.png")
    for file in [*files, tmp_path / "overview.png"]:
        assert file.read_bytes().startswith(b"\x89PNG")
    table = demo.summary_table(results)
    demo.write_csv(table, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["method", "quantity", "theta1", "theta2", "theta3", "theta4"]
    assert len(rows) == len(table)
    assert all(math.isfinite(float(number)) for row in rows for number in row[2:])
    torch.testing.assert_close(float(rows[1][2]), results.exact.mean[0].item(), rtol=0, atol=0)


@pytest.mark.slow
def test_command_says_where_its_results_are(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(FOLDER / "demo.py"), "--quick", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert "Largest difference between simulated and observed data" in run.stdout
    for name in ("trajectories.png", "marginals.png", "summary.csv"):
        assert name in run.stdout
        assert (tmp_path / name).stat().st_size > 0
