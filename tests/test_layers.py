"""Imports follow the layers described in ``docs/architecture.md``."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyro_ext"
ENGINE = "pyro_ext.infer.constrained_hmc"
# folders of the engine that know numbers only, each of which imports those before it
MATHEMATICS = ["jacobian", "system", "dynamics", "search", "warmup"]


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


@pytest.mark.parametrize("folder", MATHEMATICS)
def test_mathematics_does_not_know_pyro(folder: str) -> None:
    for name in _below(folder):
        assert not {target for target in _reachable(name) if target.split(".")[0] == "pyro"}


@pytest.mark.parametrize("folder", [*MATHEMATICS, "model"])
def test_folders_of_an_engine_import_what_is_below(folder: str) -> None:
    known = [] if folder == "model" else MATHEMATICS[: MATHEMATICS.index(folder)]
    allowed = tuple(f"{ENGINE}.{other}" for other in (*known, folder))
    inside = {t for name in _below(folder) for t in GRAPH[name] if t.startswith(f"{ENGINE}.")}
    assert not {target for target in inside if not target.startswith(allowed)}


def _below(folder: str) -> list[str]:
    names = [name for name in GRAPH if name.startswith(f"{ENGINE}.{folder}.")]
    assert names, f"{folder} has moved: adapt this test and docs/architecture.md"
    return names


def _all_modules_below(package: str) -> dict[str, Path]:
    """Every module of a package, ``__init__`` included under the name of its folder."""
    paths = {path: path.with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))}
    names = {
        ".".join(
            (stem.parent if path.name == "__init__.py" else stem).relative_to(PACKAGE.parent).parts
        ): path
        for path, stem in paths.items()
    }
    below = {n: p for n, p in names.items() if n == package or n.startswith(f"{package}.")}
    assert below, f"{package} has moved: adapt this test and docs/architecture.md"
    return below


def _libraries(package: str) -> set[str]:
    """What the modules of a package import from outside pyro_ext and the standard library."""
    found: set[str] = set()
    for name, path in _all_modules_below(package).items():
        # relative imports count from the package, which an __init__ is itself
        name_of_file = f"{name}.__init__" if path.name == "__init__.py" else name
        found |= {target.split(".")[0] for target in _imports(name_of_file, path)}
    return found - set(sys.stdlib_module_names) - {"pyro_ext", "__future__"}


def test_networks_import_only_torch() -> None:
    assert _libraries("pyro_ext.nn") == {"torch"}


def test_operations_on_tensors_do_not_know_pyro() -> None:
    assert "pyro" not in _libraries("pyro_ext.ops")


def test_layers_of_flows_do_not_know_pyro() -> None:
    assert "pyro" not in _libraries("pyro_ext.distributions.transforms")
    inside = {
        target
        for name, path in _all_modules_below("pyro_ext.distributions.transforms").items()
        for target in _imports(f"{name}.__init__" if path.name == "__init__.py" else name, path)
        if target.startswith("pyro_ext.")
    }
    allowed = ("pyro_ext.distributions.transforms", "pyro_ext.nn", "pyro_ext.ops")
    assert all(target.startswith(allowed) for target in inside)
