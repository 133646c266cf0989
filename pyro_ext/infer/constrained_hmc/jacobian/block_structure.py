"""Computing and factorising Jacobians with local blocks and global columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .block_jacobian import BlockJacobian, BlockSlopes, factorize_blocks
from .compression import compress
from .partition import Split, partition
from .sparsity import Pattern

__all__ = ["BlockStructure"]


class BlockStructure:
    """
    Jacobians with blocks of local columns beside global ones; see :class:`.structure.Structure`.

    :param pattern: places of the Jacobian that may be nonzero.
    :param split: its blocks and global columns.
    :param str mode: ``"forward"``, ``"reverse"`` or ``"mixed"`` products.
    :param dtype: of the inputs.
    :param device: of the inputs.
    """

    def __init__(
        self,
        pattern: Pattern,
        split: Split,
        mode: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pattern: Pattern | None = pattern
        self._pattern = pattern
        self.mode = mode
        self.partition = partition(split, device)
        self.compression = compress(pattern, self.partition, mode, dtype)

    def with_mode(self, mode: str) -> BlockStructure:
        """The same structure with other products."""
        return BlockStructure(
            self._pattern,
            self.partition.split,
            mode,
            dtype=self.compression.forward_seeds.dtype,
            device=self.compression.forward_seeds.device,
        )

    def derivatives(self, constraint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """See :meth:`.structure.Structure.derivatives`."""
        return self.compression.products(constraint)

    def factorize(self, derivatives: Tensor, scale: Tensor) -> BlockJacobian:
        """See :meth:`.structure.Structure.factorize`."""
        return factorize_blocks(self.partition, *self.slopes(derivatives, scale))

    def slopes(self, derivatives: Tensor, scale: Tensor) -> BlockSlopes:
        """See :meth:`.structure.Structure.slopes`."""
        columns, remaining = self.compression.entries(derivatives)
        column_scale, shared_scale = self._scales(scale)
        return BlockSlopes(columns * column_scale, remaining * shared_scale)

    def cotangent(self, jacobian: BlockJacobian, scale: Tensor) -> Tensor:
        """See :meth:`.structure.Structure.cotangent`."""
        columns, remaining = jacobian.dual()
        column_scale, shared_scale = self._scales(scale)
        return self.compression.cotangent(columns * column_scale, remaining * shared_scale)

    def matrix(self, derivatives: Tensor, scale: Tensor) -> Tensor:
        """See :meth:`.structure.Structure.matrix`."""
        columns, remaining = self.compression.entries(derivatives)
        return self.partition.dense(columns, remaining) * scale

    def describe(self) -> str:
        """What was found, in a line."""
        split, (r, k) = self.partition.split, self.partition.split.block_shape
        remaining = f", {split.num_remaining} outputs beside" if split.num_remaining else ""
        return (
            f"{split.num_blocks} local blocks of up to {r} x {k}, {split.num_global} global "
            f"inputs{remaining}, {self.compression.num_products} products per Jacobian "
            f"({self.mode})"
        )

    def _scales(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of local and global columns, ``(k + g, 1, blocks)`` and ``(g,)``."""
        local, shared = self.partition.split_columns(scale.unsqueeze(0))
        local, shared = local[0], shared[0]
        columns = torch.cat([local, shared.unsqueeze(-1).expand(-1, local.shape[-1])])
        return columns.unsqueeze(1), shared
