"""Sum over discrete latent sites, in a way that :mod:`torch.func` can differentiate and batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyro.poutine as poutine
from pyro.infer.enum import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from . import log_einsum

__all__ = ["EnumeratedDensity", "enumerate_discrete"]


def enumerate_discrete(model: Callable[..., Any], max_plate_nesting: int) -> Callable[..., Any]:
    """
    A model whose discrete latent sites run over their supports, each in a dimension of its own.

    :param model: a Pyro model.
    :param int max_plate_nesting: number of dimensions that plates take.
    """
    enumerate_ = _EnumMessenger(first_available_dim=-1 - max_plate_nesting)
    enumerated: Callable[..., Any] = enumerate_(config_enumerate(model))
    return enumerated


class EnumeratedDensity(TraceEinsumEvaluator):
    """
    Log density of a trace, summed over its enumerated sites.

    :param trace: a trace of the enumerated model, with the structure that all others have.
    :param int max_plate_nesting: number of dimensions that plates take.
    """

    def __init__(self, trace: poutine.Trace, max_plate_nesting: int) -> None:
        super().__init__(trace, True, max_plate_nesting)

    def log_prob(self, model_trace: poutine.Trace) -> Tensor:
        """Log density, a scalar."""
        factors = self._get_log_factors(model_trace)
        total: Tensor = contract_to_tensor(factors, self._enum_dims, ring=_LogRing())
        return total


class _LogRing(LogRing):
    _backend = log_einsum.__name__


class _EnumMessenger(EnumMessenger):
    def _pyro_post_sample(self, msg: Any) -> None:
        # Pyro reads the shape through value.data, which vmap forbids
        value = msg["value"]
        stand_in = SimpleNamespace(data=SimpleNamespace(shape=value.shape), dim=value.dim)
        shown: Any = {**msg, "value": stand_in}
        super()._pyro_post_sample(shown)
