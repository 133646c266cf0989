"""Simulators that the literature compares likelihood-free inference on, as Pyro models.

Each has the latent site ``theta`` and the observed site ``x``; some have noise as further latents.

    from benchmarks.simulators import TASKS, cached_reference
    task = TASKS["two_moons"]
    task.model, task.observation, cached_reference(task, 1000).draws
"""

from .gaussian_linear import GAUSSIAN_LINEAR as GAUSSIAN_LINEAR
from .lotka_volterra_jump import LOTKA_VOLTERRA_JUMP as LOTKA_VOLTERRA_JUMP
from .lotka_volterra_sde import LOTKA_VOLTERRA_SDE as LOTKA_VOLTERRA_SDE
from .lotka_volterra_sde import LOTKA_VOLTERRA_SDE_PLAUSIBLE as LOTKA_VOLTERRA_SDE_PLAUSIBLE
from .queue import QUEUE as QUEUE
from .slcp import SLCP as SLCP
from .task import Reference as Reference
from .task import Task as Task
from .task import cached_reference as cached_reference
from .two_moons import TWO_MOONS as TWO_MOONS

__all__ = [
    "GAUSSIAN_LINEAR",
    "LOTKA_VOLTERRA_JUMP",
    "LOTKA_VOLTERRA_SDE",
    "LOTKA_VOLTERRA_SDE_PLAUSIBLE",
    "QUEUE",
    "SLCP",
    "TASKS",
    "TWO_MOONS",
    "Reference",
    "Task",
    "cached_reference",
]

TASKS = {
    task.name: task
    for task in (
        GAUSSIAN_LINEAR,
        TWO_MOONS,
        SLCP,
        LOTKA_VOLTERRA_SDE,
        LOTKA_VOLTERRA_SDE_PLAUSIBLE,
        LOTKA_VOLTERRA_JUMP,
        QUEUE,
    )
}
