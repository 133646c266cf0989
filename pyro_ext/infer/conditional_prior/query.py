"""Checks of what is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .sites import Structure

__all__ = ["check_has_query", "check_latents", "check_num", "check_query"]


def check_has_query(names: list[str]) -> None:
    """
    Check that there is something to ask for.

    :param names: sites that are split into evidence and query.
    :raises ValueError: if there are none.
    """
    if not names:
        raise ValueError(
            "No site of the model is split into evidence and query. Condition it by "
            "pyro_ext.poutine.condition_on(model, data={...}, mask={...})."
        )


def check_query(query: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Check that the values of a query are those of the sites.

    :param query: values by name, or the value of the only site; tensors, or what becomes one.
    :param values: some values of the sites that are split into evidence and query.
    :returns: by name.
    :raises ValueError: if a site is missing, unknown, or of another shape.
    """
    names = list(values)
    if not isinstance(query, Mapping):
        if len(names) != 1:
            raise ValueError(f"Give the values of the sites {names} by name, in a dictionary.")
        query = {names[0]: query}
    unknown = sorted(set(query) - set(names))
    if unknown:
        raise ValueError(f"query has values of {unknown}, but only {names} have free elements.")
    checked: dict[str, Tensor] = {}
    for name in names:
        if name not in query:
            raise ValueError(f"query has no value of site {name!r}; it needs those of {names}.")
        checked[name] = torch.as_tensor(query[name], device=values[name].device)
        if checked[name].shape != values[name].shape:
            raise ValueError(
                f"Site {name!r} has values of shape {tuple(values[name].shape)}, but the query "
                f"has one of shape {tuple(checked[name].shape)}."
            )
    return checked


def check_num(name: str, number: int) -> None:
    """
    Check how many draws are asked for.

    :param str name: of the argument.
    :param int number: its value.
    :raises ValueError: if it is not positive.
    """
    if number < 1:
        raise ValueError(f"{name}={number} must be positive.")


def check_latents(latents: Mapping[str, Tensor], structure: Structure) -> None:
    """
    Check that there are values of all latent sites, of their shapes.

    :param latents: values by name.
    :param Structure structure: the sites.
    :raises ValueError: if a site is missing or has another shape.
    """
    for site in structure.sites:
        if site.name not in latents:
            raise ValueError(f"log_prob needs a value of latent site {site.name!r}.")
        own = site.batch_shape + site.transform.forward_shape(site.event_shape)
        shape = latents[site.name].shape
        if shape[max(0, len(shape) - len(own)) :] != own:
            raise ValueError(
                f"Latent site {site.name!r} has values of shape {tuple(own)}, with any dimensions "
                f"in front, but log_prob was given one of shape {tuple(shape)}."
            )
