"""Run a simulator in processes of its own, which may be slow, hang or crash."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from pyro.util import set_rng_seed
from torch import Tensor

from .simulator import Outcome, Simulator

__all__ = ["simulate_in_processes"]


class _Task(NamedTuple):
    number: int
    latents: Tensor
    seed: int


def simulate_in_processes(
    simulator: Simulator,
    unconstrained: Tensor,
    *,
    num_workers: int,
    batch_size: int,
    timeout: float | None,
    mp_context: str | None,
) -> Outcome:
    """
    Run a simulator on batches of latents in worker processes.

    Every batch has a seed of its own, drawn here, so that the result does not depend on which
    worker takes it. A worker that takes longer than the timeout, or dies, is replaced, and the
    runs of its batch have failed.

    :param Simulator simulator: what to run.
    :param Tensor unconstrained: latents, shape ``(runs, features)``.
    :param int num_workers: number of processes.
    :param int batch_size: runs of a batch; 1 with a timeout, which is then per run.
    :param timeout: seconds that a run may take, ``None`` for any.
    :param mp_context: how processes are started, ``"fork"``, ``"spawn"`` or ``"forkserver"``.
    """
    size = 1 if timeout is not None else batch_size
    parts = unconstrained.split(size)
    seeds = torch.randint(2**32, (len(parts),)).tolist()
    todo = [_Task(i, part, seeds[i]) for i, part in enumerate(parts)][::-1]
    done: dict[int, Outcome] = {}
    context: Any = get_context(mp_context)
    workers = [_Worker(context, simulator) for _ in range(min(num_workers, len(parts)))]
    try:
        while len(done) < len(parts):
            for i, worker in enumerate(workers):
                if worker.task is not None and worker.is_late(timeout):
                    done[worker.task.number] = _failed(
                        simulator, worker.task, f"the simulator took longer than {timeout} seconds"
                    )
                    worker.kill()
                    worker = workers[i] = _Worker(context, simulator)
                if worker.task is None and todo:
                    worker.give(todo.pop())
            _collect(workers, done, simulator, context, timeout)
    finally:
        for worker in workers:
            worker.kill()
    ordered = [done[i] for i in range(len(parts))]
    names = ordered[0].observations
    joined = {name: torch.cat([each.observations[name] for each in ordered]) for name in names}
    return Outcome(joined, next((each.failure for each in ordered if each.failure), ""))


class _Worker:
    """A process, and the batch it is at."""

    def __init__(self, context: Any, simulator: Simulator) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, simulator), daemon=True)
        self.process.start()
        theirs.close()
        self.task: _Task | None = None
        self._deadline_from: float | None = None
        self._is_ready = False

    def give(self, task: _Task) -> None:
        self.task = task
        self._deadline_from = time.monotonic() if self._is_ready else None
        # as arrays: tensors would share memory with a process that may be killed
        self.connection.send((task.latents.numpy(), task.seed))

    def receive(self) -> Outcome | None:
        """What the process has sent, ``None`` for the news that it has started."""
        message = self.connection.recv()
        if message is None:
            # the time that a process takes to start is not the simulator's
            self._is_ready, self._deadline_from = True, time.monotonic()
            return None
        arrays, failure = message
        return Outcome({name: torch.from_numpy(a) for name, a in arrays.items()}, failure)

    def is_late(self, timeout: float | None) -> bool:
        since = self._deadline_from
        return timeout is not None and since is not None and time.monotonic() - since > timeout

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _collect(
    workers: list[_Worker],
    done: dict[int, Outcome],
    simulator: Simulator,
    context: Any,
    timeout: float | None,
) -> None:
    """Take the results that have come, after waiting for one or for a deadline."""
    pause = 1.0 if timeout is None else min(0.05, timeout)
    connections: Sequence[Connection] = [w.connection for w in workers if w.task is not None]
    ready = wait(connections, pause)
    for i, worker in enumerate(workers):
        if worker.connection not in ready or worker.task is None:
            continue
        try:
            outcome = worker.receive()
        except (EOFError, ConnectionError):
            worker.process.join()
            code = worker.process.exitcode
            done[worker.task.number] = _failed(
                simulator, worker.task, f"the process of the simulator died with exit code {code}"
            )
            worker.kill()
            workers[i] = _Worker(context, simulator)
        else:
            if outcome is not None:
                done[worker.task.number] = outcome
                worker.task = None


def _failed(simulator: Simulator, task: _Task, why: str) -> Outcome:
    return Outcome(simulator.nothing(len(task.latents)), why)


def _serve(connection: Any, simulator: Simulator) -> None:
    """The life of a worker: latents in, observations out."""
    torch.set_num_threads(1)
    connection.send(None)
    while True:
        try:
            latents, seed = connection.recv()
        except EOFError:
            return
        # Python's and numpy's generators too, whose states a forked process has from its parent
        set_rng_seed(seed)
        outcome = simulator.simulate(torch.from_numpy(latents))
        arrays = {name: value.numpy() for name, value in outcome.observations.items()}
        connection.send((arrays, outcome.failure))
