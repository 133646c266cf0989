"""The protocol of kernels that advance many chains at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

__all__ = ["VectorizedKernel"]


class VectorizedKernel(MCMCKernel):
    """
    An MCMC kernel that can carry a chain axis.

    With ``num_chains`` left at ``None`` the kernel behaves as stock :class:`pyro.infer.MCMC`
    expects, one chain and no chain axis. With a number, set before ``setup``, the tensors in
    ``initial_params`` and in what ``sample`` returns have chains as their first dimension.
    """

    def __init__(self) -> None:
        self.num_chains: int | None = None
        # samples are returned in the model's own coordinates: nothing to undo
        self.transforms: dict[str, Any] = {}

    @abstractmethod
    def chain_diagnostics(self) -> list[dict[str, Any]]:
        """What :meth:`diagnostics` returns, for every chain."""

    @abstractmethod
    def summary(self) -> str:
        """One line about the run so far."""

    @abstractmethod
    def required_bytes(self, num_samples: int) -> int:
        """Least memory that a run needs, known after ``setup``."""
