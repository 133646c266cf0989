"""What can go wrong between a guide and Pyro's parameter store, said before it does."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import pyro
from torch import Tensor

from ...errors import SamplingWarning

__all__ = ["check_store"]


def check_store(name: str, parameter: Tensor, learned: Collection[str]) -> bool:
    """
    Check that training by the store's parameters trains the guide, and only the guide.

    :param str name: of the guide's parameter in the store.
    :param Tensor parameter: the guide's parameter.
    :param learned: names of parameters that the model shows to the store.
    :returns: whether a warning was given.
    :raises ValueError: if the store has another guide's parameter under the name.
    """
    stored = dict(pyro.get_param_store().named_parameters()).get(name)
    if stored is None:
        return False
    if stored is not parameter:
        raise ValueError(
            f"Pyro's parameter store has the parameters of another guide under the name {name!r}, "
            "and would train those. Call pyro.clear_param_store() before, or give this guide "
            "another name: ConditionalPriorGuide(..., name='...')."
        )
    if learned:
        warnings.warn(
            f"The model shows its own parameters ({', '.join(sorted(learned)[:3])}, ...) to the "
            "optimizer, which trains them together with the guide. Give SVI "
            "pyro_ext.poutine.frozen(model) to keep what it has learned.",
            SamplingWarning,
            stacklevel=4,
        )
    return bool(learned)
