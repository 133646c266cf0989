"""A conditioned model as functions of the latents of all rows, for many draws at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.func import vmap

from ...errors import VectorizationWarning
from ...poutine.condition_on import FillFreeElements, evidence_of, free_log_prob
from ...poutine.sites import is_subsample
from .inspection import run_model, sample_nodes
from .sites import Structure, constrain, sum_rows, unpack

__all__ = ["ModelOfLatents"]

_VMAP_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError)


class ModelOfLatents:
    """
    Log-densities and completed data of a model, given unconstrained latents.

    :param model: a conditioned Pyro model.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param Structure structure: its latent sites.
    :param trace: a run of the model.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        structure: Structure,
        trace: poutine.Trace,
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.structure = structure
        # What stands in the place of free elements does not matter: nothing depends on it.
        self.fill: dict[str, Tensor] = {
            name: node["value"].detach()
            for name, node in sample_nodes(trace).items()
            if evidence_of(node) is not None
        }
        self.split = list(self.fill)
        self._why_in_a_loop: str | None = None
        self._find_out_how_to_run()

    def log_joint(self, latents: Tensor) -> Tensor:
        r"""
        :math:`\log p(z, x)` of every row, with the Jacobian of the supports.

        :param Tensor latents: unconstrained, shape ``(draws, rows, features)``.
        :returns: shape ``(draws, rows)``.
        """
        return self._map(self._log_joint_of_one, latents)

    def query_log_prob(self, latents: Tensor, query: Mapping[str, Tensor]) -> Tensor:
        r"""
        :math:`\log p(y \mid z)` of every row, where y are the free elements.

        :param Tensor latents: unconstrained, shape ``(draws, rows, features)``.
        :param query: values of the sites that have free elements, by name.
        :returns: shape ``(draws, rows)``.
        """

        def of_one(u: Tensor) -> Tensor:
            values, _ = self._values(u)
            with FillFreeElements(query):
                trace = run_model(self.model, self.args, self.kwargs, values)
            return self._total(u, [free_log_prob(trace.nodes[name]) for name in self.split])

        return self._map(of_one, latents)

    def draw_query(self, latents: Tensor) -> dict[str, Tensor]:
        """
        Complete the evidence by draws of the free elements.

        :param Tensor latents: unconstrained, shape ``(draws, rows, features)``.
        :returns: values by name of the sites that have free elements, with ``draws`` in front.
        """

        def of_one(u: Tensor) -> dict[str, Tensor]:
            values, _ = self._values(u)
            nodes = sample_nodes(run_model(self.model, self.args, self.kwargs, values))
            return {name: nodes[name]["value"] for name in self.split}

        with torch.no_grad(), warnings.catch_warnings():
            # of operations that torch vectorises by a loop of its own
            warnings.filterwarnings("ignore", "There is a performance drop")
            try:
                return self._map(of_one, latents)
            except _VMAP_ERRORS:  # not every distribution can be sampled under vmap
                return self._loop(of_one, latents)

    def values(self, latents: Tensor) -> dict[str, Tensor]:
        """
        The latents as values of the sites.

        :param Tensor latents: unconstrained, shape ``(draws, rows, features)``.
        :returns: by name, with ``draws`` in front.
        """
        return vmap(lambda u: self._values(u)[0])(latents)

    def why_not_finite(self, latents: Tensor) -> str:
        """
        What to tell a user of latents that have no finite log joint density in any row.

        :param Tensor latents: unconstrained, shape ``(rows, features)``.
        """
        names = self.sites_without_density(latents)
        where = f"at {names} " if names else ""
        return (
            f"The evidence {where}has no finite log-density at draws of the prior, in any row: it "
            "is impossible under the model, or what the decoder computes is NaN or infinite. "
            "Check the data, the supports of the observed sites, and the decoder's output."
        )

    def sites_without_density(self, latents: Tensor) -> list[str]:
        """
        Names of the sites whose log-density is not finite somewhere.

        :param Tensor latents: unconstrained, shape ``(rows, features)``.
        """
        values, _ = self._values(latents)
        with torch.no_grad(), pyro.validation_enabled(False), FillFreeElements(self.fill):
            trace = run_model(self.model, self.args, self.kwargs, values)
            trace.compute_log_prob(site_filter=lambda name, site: not is_subsample(site))
        nodes = {name: node for name, node in trace.nodes.items() if "log_prob" in node}
        return [name for name, n in nodes.items() if not bool(n["log_prob"].isfinite().all())]

    def _values(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        vector = u.reshape(*self.structure.row_shape, self.structure.features)
        return constrain(unpack(vector, self.structure), self.structure)

    def _log_joint_of_one(self, u: Tensor) -> Tensor:
        values, log_dets = self._values(u)
        with FillFreeElements(self.fill):
            trace = run_model(self.model, self.args, self.kwargs, values)
        trace.compute_log_prob(site_filter=lambda name, site: not is_subsample(site))
        terms = [node["log_prob"] for node in trace.nodes.values() if "log_prob" in node]
        return self._total(u, [*terms, *log_dets.values()])

    def _total(self, u: Tensor, terms: Iterable[Tensor]) -> Tensor:
        # in the dtype of the latents, also where the evidence has a wider one
        total = u.new_zeros(self.structure.num_rows)
        for term in terms:
            total = total + sum_rows(term, self.structure).to(u.dtype)
        return total

    def _map(self, function: Callable[[Tensor], Any], latents: Tensor) -> Any:
        if self._why_in_a_loop is not None:
            return self._loop(function, latents)
        with pyro.validation_enabled(False):
            return vmap(function, randomness="different")(latents)

    def _loop(self, function: Callable[[Tensor], Any], latents: Tensor) -> Any:
        with pyro.validation_enabled(False):
            results = [function(u) for u in latents]
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return {name: torch.stack([r[name] for r in results]) for name in results[0]}

    def _find_out_how_to_run(self) -> None:
        """Vectorised over draws if the model can be, in a loop with a warning otherwise."""
        structure = self.structure
        shape = (2, structure.num_rows, structure.features)
        latents = torch.zeros(shape, dtype=structure.dtype, device=structure.device)
        try:
            with torch.no_grad():
                self.log_joint(latents)
        except _VMAP_ERRORS as error:
            self._why_in_a_loop = str(error).strip().split("\n")[0]
            with torch.no_grad():
                self.log_joint(latents[:1])  # an error of the model's own is the user's to see
            warnings.warn(
                "The model cannot be vectorised over draws and is run once for each of them, "
                f"which is slow: {self._why_in_a_loop}",
                VectorizationWarning,
                stacklevel=5,
            )
