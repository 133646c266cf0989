"""Checks of what is asked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["check_has_query", "check_query"]


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


def check_query(
    query: Tensor | Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    Check that the values of a query are those of the sites.

    :param query: values by name, or the value of the only site.
    :param values: some values of the sites that are split into evidence and query.
    :returns: by name.
    :raises ValueError: if a site is missing, unknown, or of another shape.
    """
    names = list(values)
    if isinstance(query, Tensor):
        if len(names) != 1:
            raise ValueError(f"Give the values of the sites {names} by name, in a dictionary.")
        query = {names[0]: query}
    unknown = sorted(set(query) - set(names))
    if unknown:
        raise ValueError(f"query has values of {unknown}, but only {names} have free elements.")
    for name in names:
        if name not in query:
            raise ValueError(f"query has no value of site {name!r}; it needs those of {names}.")
        if query[name].shape != values[name].shape:
            raise ValueError(
                f"Site {name!r} has values of shape {tuple(values[name].shape)}, but the query "
                f"has one of shape {tuple(query[name].shape)}."
            )
    return {name: query[name] for name in names}
