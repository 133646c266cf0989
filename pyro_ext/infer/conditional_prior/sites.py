"""Where the latent sites of a model stand in the vectors of its rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform

__all__ = [
    "LatentSite",
    "Structure",
    "constrain",
    "inside_plates",
    "pack",
    "sum_rows",
    "unconstrain",
    "unpack",
]


class LatentSite(NamedTuple):
    """A latent site, and its place in the vector of a row."""

    name: str
    start: int
    stop: int
    batch_shape: torch.Size
    event_shape: torch.Size  # of the unconstrained value
    event_dim: int  # of the constrained one
    is_row: tuple[bool, ...]  # which batch dimensions are those of the rows
    transform: Transform  # from real numbers to the support
    frames: tuple[Any, ...]  # the plates it is in


class Structure(NamedTuple):
    """What a guide knows of its model."""

    sites: tuple[LatentSite, ...]
    row_frames: tuple[Any, ...]  # the plates whose elements are the rows
    row_shape: torch.Size  # as many dimensions as any site has, 1 where there are no rows
    dtype: torch.dtype
    device: torch.device

    @property
    def features(self) -> int:
        """Number of latents of a row."""
        return self.sites[-1].stop

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return math.prod(self.row_shape)

    @property
    def result_shape(self) -> torch.Size:
        """Shape of a result per row: the sizes of the plates, ``()`` if there are none."""
        return torch.Size(f.size for f in sorted(self.row_frames, key=lambda f: f.dim))


def unpack(vector: Tensor, structure: Structure) -> dict[str, Tensor]:
    """
    Split vectors into unconstrained values of the sites.

    :param Tensor vector: shape ``leading + row_shape + (features,)``.
    :param Structure structure: where the sites are.
    :returns: values of shape ``leading + batch_shape + event_shape``; where a site has fewer
        batch dimensions than ``row_shape``, with dimensions of size 1 between, unless there is
        nothing leading.
    """
    num_leading = vector.dim() - 1 - len(structure.row_shape)
    leading = vector.shape[:num_leading]
    values: dict[str, Tensor] = {}
    for site in structure.sites:
        part = vector[..., site.start : site.stop]
        rows = [n for n, is_row in zip(site.batch_shape, site.is_row, strict=True) if is_row]
        own = [n for n, is_row in zip(site.batch_shape, site.is_row, strict=True) if not is_row]
        part = part.reshape([*leading, *rows, *own, *site.event_shape])
        part = part.permute(_order(site, num_leading))
        if leading:
            ones = [1] * (len(structure.row_shape) - len(site.batch_shape))
            part = part.reshape([*leading, *ones, *part.shape[num_leading:]])
        values[site.name] = part
    return values


def pack(values: dict[str, Tensor], structure: Structure) -> Tensor:
    """
    Join unconstrained values of the sites, the inverse of :func:`unpack`.

    :param values: of shape ``leading + batch_shape + event_shape``.
    :param Structure structure: where the sites are.
    :returns: shape ``leading + row_shape + (features,)``.
    """
    parts: list[Tensor] = []
    for site in structure.sites:
        value = values[site.name]
        num_leading = value.dim() - len(site.batch_shape) - len(site.event_shape)
        order = _order(site, num_leading)
        inverse = [order.index(i) for i in range(len(order))]
        part = value.permute(inverse)
        size = site.stop - site.start
        parts.append(part.reshape([*part.shape[:num_leading], *structure.row_shape, size]))
    return torch.cat(parts, -1)


def _order(site: LatentSite, num_leading: int) -> list[int]:
    """Where the dimensions of a value come from, if those of the rows stand before the others."""
    num_rows = sum(site.is_row)
    row, own = num_leading, num_leading + num_rows
    order = list(range(num_leading))
    for is_row in site.is_row:
        order.append(row if is_row else own)
        row, own = row + is_row, own + (not is_row)
    first_event = num_leading + len(site.is_row)
    return order + list(range(first_event, first_event + len(site.event_shape)))


def constrain(
    unconstrained: dict[str, Tensor], structure: Structure
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Map real numbers to the supports of the sites.

    :param unconstrained: values by name.
    :param Structure structure: has the transforms.
    :returns: values, and the log-determinants, each of the batch shape of its site.
    """
    values: dict[str, Tensor] = {}
    log_dets: dict[str, Tensor] = {}
    for site in structure.sites:
        u = unconstrained[site.name]
        value = site.transform(u)
        log_det = site.transform.log_abs_det_jacobian(u, value)
        batch_dim = value.dim() - site.event_dim
        values[site.name] = value
        log_dets[site.name] = _sum_from(log_det, batch_dim)
    return values, log_dets


def unconstrain(
    values: dict[str, Tensor], structure: Structure
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Map values of the sites to real numbers, the inverse of :func:`constrain`.

    :returns: real numbers, and the log-determinants of :func:`constrain` at them.
    """
    unconstrained = {s.name: s.transform.inv(values[s.name]) for s in structure.sites}
    return unconstrained, constrain(unconstrained, structure)[1]


def sum_rows(value: Tensor, structure: Structure) -> Tensor:
    """
    Sum a log-density at a site over all that belongs to one row.

    :param Tensor value: of the batch shape of a site.
    :param Structure structure: has the plates of the rows.
    :returns: shape ``(rows,)``.
    """
    dims = {frame.dim: frame.size for frame in structure.row_frames}
    num_dims = max([value.dim(), *(-dim for dim in dims)])
    value = value.reshape((1,) * (num_dims - value.dim()) + value.shape)
    value = value.expand([dims.get(i - num_dims, n) for i, n in enumerate(value.shape)])
    others = [i for i in range(num_dims) if i - num_dims not in dims]
    return (value.sum(others) if others else value).reshape(structure.num_rows)


def _sum_from(value: Tensor, dim: int) -> Tensor:
    return value.flatten(dim).sum(-1) if value.dim() > dim else value


@contextmanager
def inside_plates(plates: Mapping[str, Any], frames: Collection[Any]) -> Iterator[None]:
    """
    Enter those plates that a site is in.

    :param plates: by name.
    :param frames: of the site.
    """
    with ExitStack() as stack:
        for frame in frames:
            stack.enter_context(plates[frame.name])
        yield
