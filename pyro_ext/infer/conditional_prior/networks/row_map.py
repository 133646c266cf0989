"""What every conditional prior network is: a map from noise to latents, one for each row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["Chain", "Reverse", "RowMap"]


class RowMap(nn.Module, ABC):
    """
    A map from noise to latents whose parameters come as one vector for each row.

    The object holds the settings, and what is fixed; psi, what is fitted to the evidence of each
    row, comes as a tensor with every call. So the rows of a batch are fitted at once, and an
    optimizer sees nothing but a matrix.

    :param int features: size of the noise and of the latents.
    :param int num_parameters: length of psi, for one row.
    """

    is_invertible: bool = True
    """Whether :meth:`to_noise` exists, so that any latents can be scored."""

    def __init__(self, features: int, num_parameters: int) -> None:
        super().__init__()
        self.features = features
        self.num_parameters = num_parameters

    @abstractmethod
    def initial(self, num_rows: int) -> Tensor:
        """
        Parameters to start from, at which the map is the identity or near it.

        :param int num_rows: how many rows.
        :returns: shape ``(num_rows, num_parameters)``, in the default dtype.
        """

    @abstractmethod
    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """
        Map noise to latents.

        :param Tensor noise: shape ``(rows, draws, features)``.
        :param Tensor psi: shape ``(rows, num_parameters)``.
        :returns: the latents, and the log-determinant of the Jacobian, shape ``(rows, draws)``.
        """

    @abstractmethod
    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """
        Map latents to noise, the inverse of :meth:`to_latents`.

        :param Tensor latents: shape ``(rows, draws, features)``.
        :param Tensor psi: shape ``(rows, num_parameters)``.
        :returns: the noise, and the log-determinant of the Jacobian of this inverse, shape
            ``(rows, draws)``.
        """

    def folds(self, noise: Tensor, psi: Tensor) -> Tensor:
        """
        Which rows have a map that is seen not to be one-to-one; none, where there is an inverse.

        :param Tensor noise: shape ``(rows, draws, features)``.
        :param Tensor psi: shape ``(rows, num_parameters)``.
        :returns: boolean, shape ``(rows,)``.
        """
        return torch.zeros(len(psi), dtype=torch.bool, device=psi.device)

    def affine_end(self) -> RowMap | None:
        """The affine map that the latents come out of, by which they can be moved, if any."""
        return None

    def centred(self, loc: Tensor, scale: float) -> Tensor:
        """
        Parameters of an affine map that put the latents around given places.

        :param Tensor loc: where the latents should lie, shape ``(rows, features)``.
        :param float scale: by how much the noise should shrink.
        :returns: shape ``(rows, num_parameters)``.
        """
        raise NotImplementedError(f"{type(self).__name__} is not affine.")


class Chain(RowMap):
    """
    Maps one after the other, the first one next to the noise.

    :param maps: of the same number of features.
    """

    def __init__(self, maps: Sequence[RowMap]) -> None:
        super().__init__(maps[0].features, sum(each.num_parameters for each in maps))
        self.maps = cast("Sequence[RowMap]", nn.ModuleList(maps))
        self.is_invertible = all(each.is_invertible for each in maps)

    def initial(self, num_rows: int) -> Tensor:
        """See :meth:`RowMap.initial`."""
        return torch.cat([each.initial(num_rows) for each in self.maps], -1)

    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_latents`."""
        log_det = noise.new_zeros(noise.shape[:-1])
        for each, part in zip(self.maps, self._split(psi), strict=True):
            noise, log_det_of_one = each.to_latents(noise, part)
            log_det = log_det + log_det_of_one
        return noise, log_det

    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_noise`."""
        log_det = latents.new_zeros(latents.shape[:-1])
        for each, part in zip(reversed(self.maps), reversed(self._split(psi)), strict=True):
            latents, log_det_of_one = each.to_noise(latents, part)
            log_det = log_det + log_det_of_one
        return latents, log_det

    def affine_end(self) -> RowMap | None:
        """See :meth:`RowMap.affine_end`."""
        return self.maps[-1].affine_end()

    def _split(self, psi: Tensor) -> list[Tensor]:
        return list(psi.split([each.num_parameters for each in self.maps], -1))


class Reverse(RowMap):
    """
    The features in the opposite order, without parameters.

    :param int features: how many.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features, 0)

    def initial(self, num_rows: int) -> Tensor:
        """See :meth:`RowMap.initial`."""
        return torch.zeros(num_rows, 0)

    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_latents`."""
        return noise.flip(-1), noise.new_zeros(noise.shape[:-1])

    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_noise`."""
        return self.to_latents(latents, psi)
