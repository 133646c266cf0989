"""Speed and memory of spline flows: pyro_ext beside nflows, zuko, normflows and Pyro.

Claim: a training step, the density and draws of the same flow take less time and memory, and
draws of autoregressive flows take time in the order of one pass, not of one per feature.

    python benchmarks/spline_flow.py speed       # training step, log_prob, sampling at 8 features
    python benchmarks/spline_flow.py sizes       # training step and log_prob at other sizes
    python benchmarks/spline_flow.py sampling    # autoregressive flows, 8 and 63 features
    python benchmarks/spline_flow.py memory
    python benchmarks/spline_flow.py threads     # one thread and two

The libraries take turns, operation by operation and round by round, in one process; figures are
medians over rounds. Processor time with one thread is what other programs on the machine spoil
least, so that the ratios are of it, round by round to nflows; with more threads, or on a GPU, they
are of wall time. Memory is measured in a fresh process for each figure. ``peers/spline_flows.py``
says what each library runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import Tensor

from benchmarks._memory import growth
from benchmarks._report import progress, threads_in_words, write_table
from benchmarks.peers.spline_flows import (
    AUTOREGRESSIVE,
    COUPLING,
    FLOOR,
    OURS,
    OURS_COMPILED,
    BuiltFlow,
    Setting,
    build,
    count_parameters,
)

NAME = "spline_flow"
PACKAGES = ["torch", "pyro-ppl", "nflows", "zuko", "normflows"]
REFERENCE = "nflows"
BATCH = 512
DRAWS = 10_000
LEARNING_RATE = 5e-4
CALLS = {"training step": 3, "log_prob": 3, "sampling": 1}  # timed together in a round
SIZES = ((2, 64), (21, 128), (63, 256))  # features and hidden units


class Options(NamedTuple):
    threads: int
    rounds: int
    seconds: float  # for the rounds of one table
    device: str

    @property
    def how(self) -> str:
        return threads_in_words(self.threads) if self.device == "cpu" else self.device

    @property
    def suffix(self) -> str:
        """What names a table that is not of the usual circumstances."""
        if self.device != "cpu":
            return f"_{self.device}"
        return "" if self.threads == 1 else f"_{self.threads}_threads"


class Seconds(NamedTuple):
    """What one call took."""

    wall: float
    processor: float


class Case(NamedTuple):
    """One library in one table, ready to run."""

    library: str
    flow: BuiltFlow | None  # None if it failed, with the reason in `error`
    operations: dict[str, Callable[[], object]]
    error: str = ""


Times = dict[tuple[str, str], list[Seconds]]  # by library and operation, one entry per round


# -- what is timed ------------------------------------------------------------------------------


def make_case(library: str, setting: Setting, draws: int, options: Options) -> Case:
    """Build a flow and run each operation once; what fails is left out and named."""
    torch.manual_seed(0)
    try:
        with torch.device(options.device):
            flow = build(library, setting)
            x = torch.randn(BATCH, setting.features)
        optimizer = torch.optim.Adam(flow.module.parameters(), lr=LEARNING_RATE)
        operations = make_operations(flow, optimizer, x, draws)
        # the first calls compile, where anything is compiled
        for name in operations if setting.coupling else ("training step", "log_prob"):
            set_mode(flow, name)
            operations[name]()
    except Exception as error:
        progress(f"{library} failed: {error!r}")
        return Case(library, None, {}, type(error).__name__)
    return Case(library, flow, operations)


def set_mode(flow: BuiltFlow, operation: str) -> None:
    """Training mode for training, not timed: a loop sets it once."""
    flow.module.train(operation == "training step")


def make_operations(
    flow: BuiltFlow, optimizer: torch.optim.Optimizer, x: Tensor, draws: int
) -> dict[str, Callable[[], object]]:
    def training_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()

    def log_prob() -> Tensor:
        with torch.no_grad():
            return flow.log_prob(x)

    def sampling() -> Tensor:
        with torch.no_grad(), torch.device(x.device):
            return flow.sample(draws)

    return {"training step": training_step, "log_prob": log_prob, "sampling": sampling}


def timed(operation: Callable[[], object], calls: int, device: str) -> Seconds:
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        operation()
    synchronize(device)
    return Seconds((time.perf_counter() - wall) / calls, (time.process_time() - processor) / calls)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_rounds(cases: Sequence[Case], operations: Sequence[str], options: Options) -> Times:
    """Time all cases in turn, for as many rounds as there is time for, at least two."""
    times: Times = {(case.library, name): [] for case in cases for name in operations}
    start = time.perf_counter()
    for done in range(options.rounds):
        elapsed = time.perf_counter() - start
        if done >= 2 and elapsed * (done + 1) / done > options.seconds:
            break
        for name in operations:
            for case in cases:
                if case.flow is not None:
                    set_mode(case.flow, name)
                    spent = timed(case.operations[name], CALLS[name], options.device)
                    times[case.library, name].append(spent)
        progress(f"round {done + 1}, {time.perf_counter() - start:.0f} s")
    return times


# -- columns of the tables ----------------------------------------------------------------------


def milliseconds(spent: Sequence[Seconds], which: str) -> str:
    median = 1e3 * statistics.median(getattr(each, which) for each in spent)
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"


def ratio(spent: Sequence[Seconds], reference: Sequence[Seconds], which: str) -> str:
    if not reference:
        return "-"
    pairs = zip(spent, reference, strict=True)
    return f"{statistics.median(getattr(a, which) / getattr(b, which) for a, b in pairs):.2f}"


def timing_columns(
    case: Case, times: Times, operations: dict[str, str], options: Options
) -> dict[str, str]:
    """Processor time, wall time and ratio of each operation, by the name of its columns."""
    on_processor = options.device == "cpu" and options.threads == 1
    decisive = "processor" if on_processor else "wall"
    columns = {}
    for name, label in operations.items():
        spent = times[case.library, name]
        if on_processor:
            text = milliseconds(spent, "processor") if spent else case.error
            columns[f"{label}, CPU ms"] = text
        columns[f"{label}, wall ms"] = milliseconds(spent, "wall") if spent else case.error
        reference = times.get((REFERENCE, name), [])
        columns[f"{label}, ratio"] = ratio(spent, reference, decisive) if spent else "-"
    return columns


def parameters_column(case: Case) -> str:
    return "-" if case.flow is None else f"{count_parameters(case.flow.module):,}"


# -- parts --------------------------------------------------------------------------------------


def speed(options: Options) -> None:
    for kind, libraries, coupling in (
        ("coupling", COUPLING, True),
        ("autoregressive", AUTOREGRESSIVE, False),
    ):
        progress(f"speed, {kind}")
        setting = Setting(coupling=coupling)
        cases = [make_case(library, setting, DRAWS, options) for library in libraries]
        times = run_rounds(cases, list(CALLS), options)
        labels = {
            "training step": "training step",
            "log_prob": f"log_prob of {BATCH}",
            "sampling": f"{DRAWS:,} draws",
        }
        rows = [
            {
                "library": case.library,
                "parameters": parameters_column(case),
                **timing_columns(case, times, labels, options),
            }
            for case in cases
        ]
        write_table(f"{NAME}_{kind}{options.suffix}", rows, options.how, PACKAGES)


def sizes(options: Options) -> None:
    rows = []
    for coupling in (True, False):
        for features, hidden in SIZES:
            progress(f"sizes, {features} features, {'C' if coupling else 'AR'}")
            setting = Setting(features, hidden=hidden, coupling=coupling)
            libraries = [REFERENCE, OURS, "zuko", "normflows", FLOOR]
            cases = [make_case(library, setting, DRAWS, options) for library in libraries]
            labels = {"training step": "training step", "log_prob": f"log_prob of {BATCH}"}
            times = run_rounds(cases, list(labels), options)
            rows += [
                {
                    "layers": "coupling" if coupling else "autoregressive",
                    "features": str(features),
                    "hidden": str(hidden),
                    "library": case.library,
                    **timing_columns(case, times, labels, options),
                }
                for case in cases
            ]
    write_table(f"{NAME}_sizes{options.suffix}", rows, options.how, PACKAGES)


def sampling(options: Options) -> None:
    rows = []
    for setting, draws in (
        (Setting(coupling=False), DRAWS),
        (Setting(63, transforms=2, coupling=False), 1_000),
    ):
        progress(f"sampling, {setting.features} features")
        libraries = [REFERENCE, OURS, "zuko"]
        cases = [make_case(library, setting, draws, options) for library in libraries]
        times = run_rounds(cases, ["sampling"], options)
        rows += [
            {
                "features": str(setting.features),
                "steps": str(setting.transforms),
                "draws": f"{draws:,}",
                "library": case.library,
                **timing_columns(case, times, {"sampling": "all draws"}, options),
            }
            for case in cases
        ]
    write_table(f"{NAME}_sampling{options.suffix}", rows, options.how, PACKAGES)


def threads(options: Options) -> None:
    """Wall times with one thread and with two, in turn."""
    # native code is made for a number of threads, and would be made anew at every turn
    libraries = [library for library in COUPLING if library != OURS_COMPILED]
    cases = [make_case(library, Setting(), DRAWS, options) for library in libraries]
    by_threads: dict[int, Times] = {1: {}, 2: {}}
    start = time.perf_counter()
    for done in range(options.rounds):
        if done >= 2 and (time.perf_counter() - start) * (done + 1) / done > options.seconds:
            break
        for number, times in by_threads.items():
            progress(f"round {done + 1}, {threads_in_words(number)}")
            torch.set_num_threads(number)
            once = run_rounds(cases, list(CALLS), options._replace(rounds=1))
            for key, spent in once.items():
                times.setdefault(key, []).extend(spent)
    torch.set_num_threads(options.threads)
    rows = [threads_row(case, by_threads) for case in cases]
    write_table(f"{NAME}_threads", rows, "wall time", PACKAGES)


def threads_row(case: Case, by_threads: dict[int, Times]) -> dict[str, str]:
    row = {"library": case.library}
    for name in CALLS:
        for number, times in by_threads.items():
            spent = times[case.library, name]
            label = f"{name}, {threads_in_words(number)}, ms"
            row[label] = milliseconds(spent, "wall") if spent else case.error
    return row


# -- memory -------------------------------------------------------------------------------------


def memory(options: Options) -> None:
    # Otherwise glibc raises this threshold as a program frees, and keeps what is freed in a heap
    # with holes; fixed, every large tensor goes back, and the resident set is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    rows = []
    for coupling, libraries in ((True, COUPLING), (False, AUTOREGRESSIVE)):
        for library in libraries:
            if library == FLOOR:  # no flow
                continue
            progress(f"memory, {library}, {'C' if coupling else 'AR'}")
            setting = Setting(coupling=coupling)
            saved, step = in_fresh_process(library, setting, "training step", options)
            _, draws = in_fresh_process(library, setting, "sampling", options)
            rows.append(
                {
                    "layers": "coupling" if coupling else "autoregressive",
                    "library": library,
                    "training step, peak MiB": step,
                    "saved for backward, MiB": saved,
                    f"{DRAWS:,} draws, peak MiB": draws,
                }
            )
    write_table(f"{NAME}_memory{options.suffix}", rows, options.how, PACKAGES)


def in_fresh_process(
    library: str, setting: Setting, operation: str, options: Options
) -> tuple[str, str]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure_memory, library, setting, operation, options).result()
        except Exception as error:
            progress(f"{library} failed: {error!r}")
            return type(error).__name__, type(error).__name__


def measure_memory(
    library: str, setting: Setting, operation: str, options: Options
) -> tuple[str, str]:
    """Bytes that one log_prob saves for backward, and growth of the process in one operation."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.device(options.device):
        flow = build(library, setting)
        x = torch.randn(BATCH, setting.features)
    optimizer = torch.optim.Adam(flow.module.parameters(), lr=LEARNING_RATE)
    # what is made once: imports, gradients and the state of the optimizer
    make_operations(flow, optimizer, x[:2], 2)["training step"]()
    operations = make_operations(flow, optimizer, x, DRAWS)
    saved = saved_for_backward(flow, x)
    set_mode(flow, operation)
    make_operations(flow, optimizer, x[:2], 2)[operation]()  # compiles, where anything is
    grown = growth(operations[operation], options.device)
    return f"{saved / 2**20:.1f}", f"{grown / 2**20:.1f}"


def saved_for_backward(flow: BuiltFlow, x: Tensor) -> int:
    """Bytes of all tensors that autograd keeps, without parameters and buffers."""
    module = flow.module.train()
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, Tensor] = {}  # holds them, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        flow.log_prob(x).mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


PARTS = {
    "speed": speed,
    "sizes": sizes,
    "sampling": sampling,
    "memory": memory,
    "threads": threads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--rounds", type=int, default=11, help="at most, per table")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the rounds of a table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of the peers, about functions that torch will remove
    torch.set_num_threads(args.threads)
    options = Options(args.threads, args.rounds, args.seconds, args.device)
    for part, run in PARTS.items():
        if args.part in ("all", part) and (part != "threads" or args.device == "cpu"):
            run(options)


if __name__ == "__main__":
    main()
