"""What kind of site a message or a node of a trace is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["delta", "is_computed", "is_subsample", "shares_storage"]


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a site is a plate's own choice of indices."""
    return isinstance(site["fn"], _Subsample)


def delta(fn: Any) -> Any:
    """The point mass inside masks and events, if a distribution is one, else ``None``."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn if isinstance(fn, dist.Delta) else None


def is_computed(site: Mapping[str, Any]) -> bool:
    """
    Whether a site is deterministic and has the value that it computed.

    A deterministic site that is conditioned has another tensor for its value; one that is not has
    the very one it computed, or the view of it that a plate made.
    """
    point = None if is_subsample(site) else delta(site["fn"])
    if point is None:
        return False
    return not site["is_observed"] or shares_storage(point.v, site["value"])


def shares_storage(a: Any, b: Any) -> bool:
    """Whether two values are views of one tensor."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
