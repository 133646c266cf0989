"""Imports follow the layers described in ``docs/architecture.md``."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyro_ext"
ENGINE = "pyro_ext.infer.constrained_hmc"
MATHEMATICS = [
    "transitions",
    "integrator",
    "initialization",
    "projection",
    "system",
    "structure",
    "adaptation",
    "status",
]


def _modules() -> dict[str, Path]:
    """Every module of the package that is a file of its own, by its full name."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def _imports(name: str, path: Path) -> Iterator[str]:
    """Full names of what a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


GRAPH = {name: set(_imports(name, path)) for name, path in _modules().items()}


def _reachable(name: str) -> set[str]:
    seen: set[str] = set()
    todo = [name]
    while todo:
        for target in GRAPH.get(todo.pop(), ()):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def test_no_module_imports_itself_in_a_circle() -> None:
    inside = {name: targets & GRAPH.keys() for name, targets in GRAPH.items()}
    TopologicalSorter(inside).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", [f"{ENGINE}.{part}" for part in MATHEMATICS])
def test_mathematics_does_not_know_pyro(name: str) -> None:
    assert name in GRAPH, f"{name} has moved: adapt this test and docs/architecture.md"
    assert not {target for target in _reachable(name) if target.split(".")[0] == "pyro"}
