"""Effect handlers that draw from a prior, score it, and run a simulator without its data."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...poutine.sites import delta, is_subsample

__all__ = ["DrawUnderVmap", "PriorIsDrawn", "Recorder", "Released"]


class PriorIsDrawn(Exception):  # noqa: N818  it is control flow, as StopIteration
    """Raised to leave a model after its last latent site, before the simulator runs."""


class Released(Messenger):
    """
    Run a model with observed sites drawn instead, and latent sites at given values.

    A deterministic site that is conditioned has the value that it computes.

    :param released: names of the sites to draw.
    :param values: values of latent sites by name.
    """

    def __init__(self, released: frozenset[str], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.released = released
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            # as in replay: the value is of a latent site, not an observation
            msg["value"], msg["done"] = self.values[name], True
        elif name in self.released and msg["is_observed"]:
            point = delta(msg["fn"])
            if point is None:
                msg["value"], msg["is_observed"], msg["done"] = None, False, False
            else:
                msg["value"] = point.v


class Recorder(Messenger):
    """
    Record values of sites, and leave the model after one of them.

    :param names: sites to record.
    :param stop_after: name of the site after which the model is left, ``None`` to go on.
    :param bool score: whether to record log-densities too.
    """

    def __init__(
        self, names: frozenset[str], stop_after: str | None = None, *, score: bool = False
    ) -> None:
        super().__init__()
        self.names = names
        self.stop_after = stop_after
        self.score = score
        self.values: dict[str, Tensor] = {}
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.names:
            self.values[name] = msg["value"]
            if self.score:
                log_prob = msg["fn"].log_prob(msg["value"])
                self.log_probs[name] = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        if name == self.stop_after:
            raise PriorIsDrawn


class DrawUnderVmap(Messenger):
    """
    Draw sites inside :func:`torch.func.vmap`, where distributions fill new tensors in place.

    These tensors do not have the dimension that is mapped over, and torch refuses to fill them
    with different numbers. The same is done with tensors that have it.

    :param Tensor zero: a zero that has the dimension.
    :param given: names of sites that are not drawn, as handlers outside of this one set them.
    """

    def __init__(self, zero: Tensor, given: Collection[str] = ()) -> None:
        super().__init__()
        self.given = given
        self.mode = _FillBatched(zero)

    def _pyro_sample(self, msg: Any) -> None:
        is_set = msg["done"] or msg["value"] is not None or msg["name"] in self.given
        if is_set or msg["is_observed"] or is_subsample(msg):
            return
        with self.mode, warnings.catch_warnings():
            # of small operations that torch loops over runs
            warnings.filterwarnings("ignore", "There is a performance drop")
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["done"] = True


class _FillBatched(TorchFunctionMode):
    """Calls that fill a tensor at random, on a copy of it that has the mapped dimension."""

    _FILLS = frozenset(
        (
            Tensor.cauchy_,
            Tensor.exponential_,
            Tensor.geometric_,
            Tensor.log_normal_,
            Tensor.normal_,
            Tensor.random_,
            Tensor.uniform_,
        )
    )

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._FILLS:
            # distributions use what the call returns, and nothing else has seen the tensor
            args = (torch.zeros_like(args[0]) + self.zero.to(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))
