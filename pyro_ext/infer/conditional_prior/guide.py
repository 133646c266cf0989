"""A guide that answers any question to a trained model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ...ops.rows import RowsResult, RowStatus
from .density import ConditionalPrior
from .evaluation import ModelOfLatents
from .fitting import FitResult, check_fit, minimize, summarize
from .importance import ImportanceBound, defensive_draws, importance_bound
from .inspection import Inspection, inspect_model
from .metrics import log_mean_exp
from .networks import Flow, RowMap, check_flow, make_row_map
from .noise import Base, base_distribution, check_base, fixed_noise
from .parameter_store import check_store
from .prior_scale import prior_loc_scale
from .query import check_has_query, check_latents, check_num, check_query
from .sites import constrain, inside_plates, pack, unconstrain, unpack
from .starts import all_starts

__all__ = ["ConditionalPriorGuide"]


class ConditionalPriorGuide(PyroModule):
    r"""
    Guide over the latents of a trained model, fitted to whatever evidence there is.

    A small network turns noise into latents, :math:`z = \mathrm{Prior}_\psi(\epsilon)`, so that
    decoded they agree with the evidence x. Its parameters maximise the conditional ELBO

    .. math:: \mathbb{E}_{q(\epsilon)} \left[\log p(\mathrm{Prior}_\psi(\epsilon), x)
        + \log |\nabla \mathrm{Prior}_\psi(\epsilon)|\right] + \mathbb{H}[q(\epsilon)]
        \le \log p(x),

    and the divergence of the query :math:`q(y) = \int q(z) p(y \mid z) dz` from
    :math:`p(y \mid x)` is at most that of the latents. What the model has learned stays as it is.

    Where all latent and observed sites of the model are in a plate, its elements are *rows*: each
    is a question of its own, with its own evidence and its own parameters, and all are answered at
    once. Otherwise all latents together are one row. At the start the guide is the prior, or near
    it, with the prior's location and scale in each dimension.

    ===========  ====================================================================
    ``flow``     :math:`\mathrm{Prior}_\psi`
    ===========  ====================================================================
    "gvi"        affine: any Gaussian. Fast; right where the evidence is plenty
    "planar"     ``num_layers`` planar layers, always invertible, and an affine map
    "spline"     ``num_layers`` couplings of splines and affine maps: several modes
    "fcn"        fully connected; at most 10 latents, and its objective is no bound
    a function   ``flow(num_latents)`` makes a ``TransformModule`` or ``Bijection``
    ===========  ====================================================================

    Fit by :meth:`fit`, or as any guide by ``SVI``, ``Trace_ELBO()(model, guide)`` and a torch
    optimizer; give these ``frozen(model)``. The network's parameters are made at the first call,
    or by ``load_state_dict``.

    :param model: a Pyro model with evidence, as :func:`~pyro_ext.poutine.condition_on` makes it.
    :param flow: the family, as above.
    :param num_layers: layers of "planar" (16), "spline" (2) or "fcn" (1).
    :param hidden_features: size of a hidden layer of "spline" (32) or "fcn" (64).
    :param base: the noise, "normal" or a distribution of one element or of the whole vector.
    :param sites: names of the latent sites to guide, all by default. Others need a guide of their
        own, and :meth:`fit` is not available.
    :param int bins: pieces of a spline.
    :param float bound: splines act on ``[-bound, bound]``, in standard deviations of the prior.
    :param str name: in front of the names of the parameters in Pyro's store.
    :raises ValueError: if a setting is out of its range; at the first call, if the model cannot
        be guided, naming the site and what to do.
    :raises TypeError: if the flow is neither a name nor a function.

    Reference: Wu, Domke and Sanner 2022, "Arbitrary Conditional Inference in Variational
    Autoencoders via Fast Prior Network Training", eq. 5-9, lemma 1 and theorem 2.

    >>> from pyro_ext import ConditionalPriorGuide
    >>> from pyro_ext.poutine import condition_on
    >>> decoder = torch.nn.Linear(2, 4)
    >>> def model(num_rows):
    ...     with pyro.plate("rows", num_rows):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1))
    >>> x = torch.randn(3, 4)
    >>> mask = torch.tensor([True, True, False, False])
    >>> guide = ConditionalPriorGuide(condition_on(model, {"x": x}, {"x": mask}))
    >>> result = guide.fit(3, progress=False)
    >>> result.c_elbo.shape
    torch.Size([3])
    >>> completed = guide.sample_query(100)["x"]
    >>> completed.shape, bool((completed[..., mask] == x[:, mask]).all())
    (torch.Size([100, 3, 4]), True)
    """

    psi: nn.Parameter
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Flow = "gvi",
        *,
        num_layers: int | None = None,
        hidden_features: int | None = None,
        base: Base = "normal",
        sites: Collection[str] | None = None,
        bins: int = 8,
        bound: float = 4.0,
        name: str = "ConditionalPriorGuide",
    ) -> None:
        super().__init__(name=name)
        if not callable(model):
            raise TypeError(f"model={model!r}: give a Pyro model, a function.")
        if isinstance(sites, str):
            raise TypeError(f"sites must be a collection of names, got the string {sites!r}.")
        check_flow(flow, num_layers, hidden_features, bins, bound)
        check_base(base)
        self._model = (model,)  # in a tuple, so that its modules are not those of the guide
        self._flow = flow
        self._flow_options = {
            "num_layers": num_layers,
            "hidden_features": hidden_features,
            "bins": bins,
            "bound": bound,
        }
        self._base = base
        self._sites = sites
        self._inspection: Inspection | None = None
        self._arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.row_map: RowMap | None = None

    @property
    def model(self) -> Callable[..., Any]:
        """The model that is guided."""
        return self._model[0]

    def setup(self, *args: Any, **kwargs: Any) -> ConditionalPriorGuide:
        """
        Look at the model and make the parameters, as the first call does.

        :param args: the model's positional arguments.
        :param kwargs: the model's keyword arguments.
        :returns: the guide.
        :raises ValueError: if the model cannot be guided, or has other rows or latents than the
            parameters that the guide has already.
        """
        inspection = inspect_model(self.model, args, kwargs, self._sites)
        structure = inspection.structure
        shape = (structure.num_rows, structure.features)
        if self.row_map is None:
            loc, scale = prior_loc_scale(self.model, args, kwargs, structure, inspection.trace)
            row_map = self._make_row_map(structure.features)
            psi = row_map.initial(shape[0]).to(dtype=structure.dtype, device=structure.device)
            self._set_parameters(row_map, psi, loc, scale)
        elif self.loc.shape != shape:
            raise ValueError(
                f"The guide has parameters for {self.loc.shape[0]} rows of {self.loc.shape[1]} "
                f"latents, but the model has {shape[0]} rows of {shape[1]}. Make a new guide: "
                "parameters belong to the evidence that they were fitted to."
            )
        self._inspection = inspection
        self._arguments = (args, kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Draw the latent sites.

        :param args: the model's positional arguments.
        :param kwargs: the model's keyword arguments.
        :returns: values by the names of the sites.
        """
        inspection = self._ready(args, kwargs)
        structure = inspection.structure
        if torch.is_grad_enabled() and self._pyro_context.active:
            psi = self._parameters["psi"]  # not by attribute, which is a pyro.param statement
            if psi is not None and check_store(f"{self._pyro_name}.psi", psi, inspection.learned):
                self._inspection = inspection._replace(learned=frozenset())  # warn once
        frames = {frame.name: frame for site in structure.sites for frame in site.frames}
        plates = {name: pyro.plate(name, f.size, dim=f.dim) for name, f in frames.items()}
        with inside_plates(plates, structure.row_frames):
            vector = pyro.sample(
                f"_{self._pyro_name}_latents", self._density(), infer={"is_auxiliary": True}
            )
        values, log_dets = constrain(unpack(vector, structure), structure)
        for site in structure.sites:
            fn = dist.Delta(values[site.name], -log_dets[site.name], event_dim=site.event_dim)
            with inside_plates(plates, site.frames):
                pyro.sample(site.name, fn)
        return values

    def fit(
        self,
        *args: Any,
        optimizer: str = "lbfgs",
        num_particles: int = 500,
        num_starts: int | None = None,
        max_iter: int | None = None,
        tol: float | None = None,
        learning_rate: float | None = None,
        chunk_size: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> FitResult:
        """
        Fit all rows at once, with noise that is drawn once and kept.

        The average over fixed noise is an ordinary function, which L-BFGS maximises to the end,
        each row with its own line search. A second set of noise decides which parameters of each
        row are the best, and when it is time to stop; no row ends worse than it began. A third one
        tells what the C-ELBO is.

        It goes on from the present parameters, at first the prior, from where all modes can be
        seen. Further starts are Gaussian: "gvi" begins at draws of the prior that agree with the
        evidence, other flows at what "gvi" finds so. Each row keeps the best.

        :param args: the model's positional arguments.
        :param str optimizer: "lbfgs" or "adam".
        :param int num_particles: draws of noise, many more than the latents of a row.
        :param num_starts: by default 2, or 1 for flows that do not end in an affine map.
        :param max_iter: most steps; 500 of L-BFGS, 2000 of Adam by default.
        :param tol: a row is done when steps gain less than this, relative to the C-ELBO; 1e-8 by
            default, more in single precision.
        :param learning_rate: of Adam, 0.02 by default.
        :param chunk_size: draws that are evaluated together, all by default. Less needs less
            memory.
        :param bool progress: show a progress bar.
        :param kwargs: the model's keyword arguments.
        :returns: C-ELBO, also on fresh noise, and how each row ended.
        :raises ValueError: if a setting is out of its range, latent sites are not guided, or the
            evidence has no density in any row.
        """
        started = time.perf_counter()
        self.setup(*args, **kwargs)
        target = self._target()
        check_fit(optimizer, num_particles, self.loc.shape[-1])
        noise, validation_noise = (
            fixed_noise(self._base, num_particles, self.loc.shape[-1], self.psi) for _ in range(2)
        )

        def best_of(row_map: RowMap, starts: Iterable[Tensor]) -> RowsResult:
            return minimize(
                lambda psi, chunk: self._terms(target, row_map, psi, chunk),
                starts,
                noise,
                validation_noise,
                optimizer=optimizer,
                max_iter=max_iter,
                tol=tol,
                learning_rate=learning_rate,
                chunk_size=chunk_size,
                progress=progress,
            )

        psi, log_joint = self.psi.detach().clone(), partial(self._log_joint, target)
        starts = all_starts(self._network(), psi, noise, log_joint, num_starts, best_of)
        result = best_of(self._network(), starts)
        if bool((result.status == RowStatus.NOT_FINITE).all()):
            raise ValueError(target.why_not_finite(self.loc))
        with torch.no_grad():
            self.psi.copy_(result.point)
            held_out = self._fresh_noise(num_particles)
            terms = self._terms(target, self._network(), self.psi, held_out)
            folded = self._network().folds(held_out.expand(len(self.psi), -1, -1), self.psi)
        return summarize(result, terms, folded, self._result_shape(), started)

    @torch.no_grad()
    def c_elbo(self, num_particles: int = 1000) -> Tensor:
        """
        The conditional ELBO on fresh noise, a lower bound of the log-evidence of each row.

        That of "fcn" is none where the network folds, of which :meth:`fit` warns.

        :param int num_particles: number of draws.
        :returns: of the shape of the rows.
        """
        target = self._target()
        check_num("num_particles", num_particles)
        noise = self._fresh_noise(num_particles)
        terms = self._terms(target, self._network(), self.psi, noise)
        return terms.mean(0).reshape(self._result_shape())

    @torch.no_grad()
    def importance_bound(self, num_particles: int = 1000) -> ImportanceBound:
        """
        A tighter bound of the log-evidence, and how well the guide fits, by importance weights.

        Of "fcn" it is no bound where the network folds, because the weights are too large there.

        :param int num_particles: number of draws, at least 25.
        """
        target = self._target()
        z, log_q = self._density().rsample_and_log_prob([num_particles])
        log_weights = target.log_joint(self._flat(z)) - log_q.reshape(num_particles, -1)
        return importance_bound(log_weights, self._result_shape())

    @torch.no_grad()
    def sample_latents(self, num_samples: int) -> dict[str, Tensor]:
        """
        Draw latents from the guide.

        :param int num_samples: number of draws.
        :returns: values by the names of the sites, with ``num_samples`` in front.
        """
        check_num("num_samples", num_samples)
        z = self._density().rsample([num_samples])
        return self._target(needs_all=False).values(self._flat(z))

    @torch.no_grad()
    def log_prob(self, latents: Mapping[str, Tensor]) -> Tensor:
        """
        Log-density of the guide at any latents.

        :param latents: values of all guided sites by name, of shape ``leading + site_shape``.
        :returns: shape ``leading + rows``.
        :raises NotImplementedError: if the flow has no inverse.
        :raises ValueError: if a site is missing, or has another shape.
        """
        structure = self._inspected().structure
        check_latents(latents, structure)
        unconstrained, log_dets = unconstrain(dict(latents), structure)
        vector = pack(unconstrained, structure)
        leading = vector.shape[: vector.dim() - 1 - len(structure.row_shape)]
        log_q = self._density().log_prob(vector).reshape([*leading, *self._result_shape()])
        for site in structure.sites:
            own = [len(leading) + i for i, is_row in enumerate(site.is_row) if not is_row]
            log_det = log_dets[site.name]
            log_q = log_q - (log_det.sum(own) if own else log_det).reshape(log_q.shape)
        return log_q

    def sample_query(self, num_samples: int) -> dict[str, Tensor]:
        """
        Complete the evidence: draws of what was not observed, given what was.

        :param int num_samples: number of draws.
        :returns: values of the sites of :func:`~pyro_ext.poutine.condition_on` by name, with
            ``num_samples`` in front; the evidence stands where it was observed.
        """
        target = self._target(needs_all=False)
        check_has_query(target.split)
        check_num("num_samples", num_samples)
        with torch.no_grad():
            return target.draw_query(self._flat(self._density().rsample([num_samples])))

    @torch.no_grad()
    def query_log_prob(
        self,
        query: Tensor | Mapping[str, Tensor],
        num_samples: int = 500,
        *,
        weighted: bool = False,
    ) -> Tensor:
        r"""
        Log-density of what was not observed, given what was.

        .. math:: \log p(y \mid x) \approx \log \frac1M \sum_{m=1}^M p(y \mid z_m), \qquad
            z_m \sim q_\psi.

        The guide of the largest C-ELBO may leave out a mode of small mass, where a surprising
        query belongs. ``weighted`` makes up for it: half of the draws are from a Gaussian r as
        wide as the prior, and the mean has the weights
        :math:`p(z_m, x) / (\frac12 q_\psi(z_m) + \frac12 r(z_m))`, so that it converges to
        :math:`\log p(y \mid x)` for any guide; with many latents too slowly to be of use.

        Where the query says much more of the latents than the evidence does, few draws agree with
        it, and both averages are too low. There take :math:`\log p(x, y) - \log p(x)`, the
        difference of the :meth:`importance_bound` of this guide and of one to which both are
        evidence.

        :param query: values of the sites by name, or the value of the only one, of the shape of
            the site. Elements that are evidence are ignored.
        :param int num_samples: number M of draws of the latents.
        :param bool weighted: whether to weight the draws.
        :returns: of the shape of the rows.
        :raises ValueError: if a site is missing or has another shape.
        :raises NotImplementedError: with ``weighted``, if the flow has no inverse.

        Reference: Wu, Domke and Sanner 2022, algorithm 1 and section 4.3.
        """
        target = self._target(needs_all=weighted)
        check_has_query(target.split)
        check_num("num_samples", num_samples)
        values = check_query(query, target.fill)
        if not weighted:
            z = self._flat(self._density().rsample([num_samples]))
            return log_mean_exp(target.query_log_prob(z, values)).reshape(self._result_shape())
        z, log_proposal = defensive_draws(self._density(), self.loc, self.scale, num_samples)
        log_weights = (target.log_joint(z) - log_proposal).log_softmax(0)
        log_y = log_weights + target.query_log_prob(z, values)
        return log_y.logsumexp(0).reshape(self._result_shape())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Make the parameters, if a new guide is to have those of a saved one."""
        names = [prefix + name for name in ("psi", "loc", "scale")]
        if self.row_map is None and all(name in state_dict for name in names):
            psi, loc, scale = (state_dict[name].clone() for name in names)
            self._set_parameters(self._make_row_map(loc.shape[-1]), psi, loc, scale)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _make_row_map(self, features: int) -> RowMap:
        return make_row_map(self._flow, features, **self._flow_options)  # type: ignore[arg-type]

    def _set_parameters(self, row_map: RowMap, psi: Tensor, loc: Tensor, scale: Tensor) -> None:
        base_distribution(self._base, row_map.features, psi)  # refuses a base of another size
        # Not by assignment, which in a call would look for the values in Pyro's store.
        self.register_parameter("psi", nn.Parameter(psi))
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.row_map = row_map.to(device=psi.device)

    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inspection:
        if self._inspection is None:
            self.setup(*args, **kwargs)
        self._arguments = (args, kwargs)
        return self._inspected()

    def _inspected(self) -> Inspection:
        if self._inspection is None:
            raise ValueError(
                "The guide has not seen its model yet: call guide.fit(...), or guide.setup(...) "
                "with the arguments of the model."
            )
        return self._inspection

    def _target(self, *, needs_all: bool = True) -> ModelOfLatents:
        """The model with the latest arguments, as functions of the latents."""
        inspection = self._inspected()
        if needs_all and inspection.not_guided:
            raise ValueError(
                f"Latent sites {list(inspection.not_guided)} are not guided, so that the C-ELBO "
                "cannot be computed from this guide alone. Train it with SVI together with a "
                "guide for them, or leave out sites=[...]."
            )
        return ModelOfLatents(self.model, *self._arguments, inspection.structure, inspection.trace)

    def _density(self) -> ConditionalPrior:
        structure, row_map = self._inspected().structure, self._network()
        base = base_distribution(self._base, row_map.features, self.psi)
        return ConditionalPrior(row_map, self.psi, base, self.loc, self.scale, structure.row_shape)

    def _terms(
        self, target: ModelOfLatents, row_map: RowMap, psi: Tensor, noise: Tensor
    ) -> Tensor:
        """Theorem 2 for each draw and row: shape ``(draws, rows)``."""
        latents, log_det = row_map.to_latents(noise.expand(len(psi), -1, -1), psi)
        log_det = log_det + self.scale.log().sum(-1, keepdim=True)
        log_joint = self._log_joint(target, latents)
        # The entropy of the noise as the average of -log q: so the terms of all draws are equal
        # where the guide is the posterior, and their spread shows how far it is from it.
        log_q = base_distribution(self._base, noise.shape[-1], noise).log_prob(noise)
        return log_joint + log_det.T - log_q[:, None]

    def _log_joint(self, target: ModelOfLatents, latents: Tensor) -> Tensor:
        """Of what comes out of the network, ``(rows, draws, features)``: ``(draws, rows)``."""
        latents = self.loc[:, None] + self.scale[:, None] * latents
        return target.log_joint(latents.transpose(0, 1))

    def _network(self) -> RowMap:
        if self.row_map is None:
            raise ValueError("The guide has no parameters yet: call guide.setup(...).")
        return self.row_map

    def _fresh_noise(self, num: int) -> Tensor:
        features = self.loc.shape[-1]
        return base_distribution(self._base, features, self.psi).sample([num]).to(self.psi)

    def _flat(self, z: Tensor) -> Tensor:
        return z.reshape(len(z), *self.loc.shape)

    def _result_shape(self) -> torch.Size:
        return self._inspected().structure.result_shape
