"""Conditional prior networks: families of maps from noise to latents, one map for each row."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .affine import AffineMap
from .fully_connected import FullyConnectedMap
from .planar import PlanarMap
from .row_map import Chain, RowMap
from .spline import spline_flow
from .template import TemplateMap

__all__ = ["FLOWS", "Flow", "RowMap", "check_flow", "make_row_map"]

Flow = str | Callable[[int], nn.Module]

FLOWS = ("gvi", "planar", "spline", "fcn")

_NUM_LAYERS = {"planar": 16, "spline": 2, "fcn": 1}
_HIDDEN_FEATURES = {"spline": 32, "fcn": 64}


def make_row_map(
    flow: Flow,
    features: int,
    *,
    num_layers: int | None = None,
    hidden_features: int | None = None,
    bins: int = 8,
    bound: float = 4.0,
) -> RowMap:
    """
    Make the network of a guide.

    :param flow: one of "gvi", "planar", "spline" and "fcn", or a function of the number of
        latents that makes a module.
    :param int features: number of latents of a row.
    :param num_layers: number of layers, ``None`` for the default of the family.
    :param hidden_features: size of hidden layers, ``None`` for the default of the family.
    :param int bins: pieces of a spline.
    :param float bound: splines act on ``[-bound, bound]``.
    """
    if not isinstance(flow, str):
        return TemplateMap(flow(features), features)
    layers = num_layers or _NUM_LAYERS.get(flow, 1)
    hidden = hidden_features or _HIDDEN_FEATURES.get(flow, 1)
    if flow == "planar":
        # The affine map gives the whole its place and scale, which single layers take long to.
        return Chain([*(PlanarMap(features) for _ in range(layers)), AffineMap(features)])
    if flow == "spline":
        return spline_flow(features, layers, hidden, bins, bound)
    if flow == "fcn":
        return FullyConnectedMap(features, hidden, layers)
    return AffineMap(features)


def check_flow(
    flow: Flow, num_layers: int | None, hidden_features: int | None, bins: int, bound: float
) -> None:
    """
    Check the settings of a network before the number of latents is known.

    :raises ValueError: if the family is unknown, or a setting is out of its range or unused.
    :raises TypeError: if the flow is neither a name nor a function.
    """
    if isinstance(flow, str):
        if flow not in FLOWS:
            raise ValueError(
                f"flow={flow!r} is unknown: give one of {', '.join(map(repr, FLOWS))}, or a "
                "function of the number of latents that makes a TransformModule."
            )
    elif not callable(flow) or isinstance(flow, nn.Module):
        raise TypeError(
            f"flow={flow!r}: give a name, or a function of the number of latents that makes a "
            "module."
        )
    for name, value, users in (
        ("num_layers", num_layers, _NUM_LAYERS),
        ("hidden_features", hidden_features, _HIDDEN_FEATURES),
    ):
        if value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive whole number.")
        if flow not in users:
            raise ValueError(f"{name}={value} is given, but flow={flow!r} has no use for it.")
    if flow == "spline":
        make_row_map(flow, 1, bins=bins, bound=bound)
