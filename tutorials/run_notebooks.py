"""Run the tutorial notebooks from start to end, and say how long each took.

    python tutorials/run_notebooks.py             # all, with small numbers: do they still work?
    python tutorials/run_notebooks.py --write     # all, in full, and keep the outputs
    python tutorials/run_notebooks.py PATH ...    # only these

With small numbers means that ``PYRO_EXT_SMOKE=1`` is set: a notebook reads it and draws a few
samples instead of thousands. Each notebook then runs in a copy of its folder, so that nothing in
the repository changes, and as many run at once as there are processors.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

TUTORIALS = Path(__file__).resolve().parent


def execute(notebook: Path, folder: Path, timeout: float) -> nbformat.NotebookNode:
    """Return ``notebook`` with the outputs of a run whose working directory is ``folder``."""
    node = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        node,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,  # times would change the file with every run
        resources={"metadata": {"path": str(folder)}},
        # The kernel would warn, each time, that it talks to this process over a local socket.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    return client.execute()


def smoke(notebook: Path, timeout: float) -> None:
    """Run ``notebook`` with small numbers, in a copy of its folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / notebook.parent.name
        shutil.copytree(notebook.parent, folder, ignore=shutil.ignore_patterns("output", ".*"))
        for shared in TUTORIALS.glob("*.py"):  # notebooks find it one folder up
            shutil.copy(shared, temporary)
        execute(notebook, folder, timeout)


def write(notebook: Path, timeout: float) -> None:
    """Run ``notebook`` in full, and keep its outputs in the file."""
    nbformat.write(execute(notebook, notebook.parent, timeout), notebook)


def attempt(notebook: Path, *, in_full: bool, timeout: float) -> tuple[bool, str]:
    """Run ``notebook``; whether it worked, and a line about it."""
    name = os.path.relpath(notebook, TUTORIALS.parent)
    start = time.perf_counter()
    try:
        (write if in_full else smoke)(notebook, timeout)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return False, f"FAILED {name} after {time.perf_counter() - start:.1f} s\n{error}"
    return True, f"ok     {name} in {time.perf_counter() - start:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tutorial notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook here")
    parser.add_argument("--write", action="store_true", help="run in full and keep the outputs")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one cell")
    arguments = parser.parse_args()

    notebooks = [path.resolve() for path in arguments.notebooks] or sorted(
        path
        for path in TUTORIALS.rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts and "output" not in path.parts
    )
    if not notebooks:
        print(f"no notebooks under {TUTORIALS.name}/")
        return 0

    if arguments.write:
        os.environ.pop("PYRO_EXT_SMOKE", None)
        jobs = 1  # some measure times
    else:
        os.environ["PYRO_EXT_SMOKE"] = "1"
        jobs = min(os.cpu_count() or 1, len(notebooks))
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed = 0
    with ProcessPoolExecutor(jobs) as executor:
        runs = [
            executor.submit(attempt, notebook, in_full=arguments.write, timeout=arguments.timeout)
            for notebook in notebooks
        ]
        for run in as_completed(runs):
            worked, line = run.result()
            failed += not worked
            print(line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
