"""A Pyro model as prior and simulator: vectorised where it can be, run by run where not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR
from torch import Tensor
from torch.func import vmap

from ...errors import VectorizationWarning
from ...poutine.frozen import FrozenMessenger
from .handlers import DrawUnderVmap, PriorIsDrawn, Recorder, Released
from .sites import Structure, constrain, log_abs_det, unconstrain

__all__ = ["VECTORIZE", "Outcome", "Simulator"]

VECTORIZE = ("vmap", "plate", "loop")

_PLATE = "_pyro_ext_simulations"

Values = dict[str, Tensor]
_Around = Callable[[Collection[str]], contextlib.AbstractContextManager[Any]]
"""What to enter around the model, whose sites of these names have values already."""
_OfOneRun = Callable[[Values, _Around], Any]


class Outcome(NamedTuple):
    """Observations of some runs; what failed has NaN everywhere."""

    observations: Values
    """Values by site, shape ``(runs, ...)``."""
    failure: str
    """Why the first run that raised did so, empty if none did."""


class Simulator:
    """
    A model as functions of many latents at once.

    Models written for one run go through :func:`torch.func.vmap`; models written for batches
    run under a plate (``"plate"``); any others one run after the other (``"loop"``).

    :param model: a Pyro model without arguments.
    :param Structure structure: its sites.
    :param vectorize: one of :data:`VECTORIZE`; ``None`` takes the first that works.
    """

    def __init__(
        self, model: Callable[[], Any], structure: Structure, vectorize: str | None = None
    ) -> None:
        if vectorize is not None and vectorize not in VECTORIZE:
            raise ValueError(f"vectorize={vectorize!r}: give one of {VECTORIZE}, or None.")
        self.model = model
        self.structure = structure
        self._scores_by_vmap = False
        self.vectorize = vectorize or self._find_out_how_to_run()
        if vectorize == "plate":
            self.draw_prior(2)  # says which site has no batch
        # the prior alone is asked for most often, and may be one for vmap where the rest is not
        self._scores_by_vmap = self.vectorize == "loop" and self._can_score_by_vmap()

    def draw_prior(self, num: int) -> Tensor:
        """
        Draw from the prior, without running the simulator.

        :param int num: number of draws.
        :returns: unconstrained latents, shape ``(num, features)``.
        """

        def draw(_: Values, around: _Around) -> Values:
            recorder = Recorder(frozenset(self.structure.latent_names), self.structure.last_latent)
            self._run(recorder, {}, around)
            return recorder.values

        with torch.no_grad():
            drawn = self._map(draw, {}, num)
        return unconstrain(
            {s.name: _with_runs(s.name, drawn[s.name], num, s.shape) for s in self._latents},
            self.structure,
        )

    def log_prior(self, unconstrained: Tensor) -> Tensor:
        """
        Log-density of the prior in unconstrained coordinates.

        :param Tensor unconstrained: shape ``(runs, features)``.
        :returns: shape ``(runs,)``.
        """
        names = frozenset(self.structure.latent_names)
        way = "vmap" if self._scores_by_vmap else self.vectorize
        return self._score(unconstrained, names, self.structure.last_latent, {}, way)

    def log_joint(self, unconstrained: Tensor, observations: Mapping[str, Tensor]) -> Tensor:
        """
        Log-density of latents and observations, for models whose likelihood is tractable.

        :param Tensor unconstrained: shape ``(runs, features)``.
        :param observations: values of the observed sites by name, of one run.
        :returns: shape ``(runs,)``.
        """
        names = frozenset([*self.structure.latent_names, *self.structure.observed_names])
        return self._score(unconstrained, names, None, observations, self.vectorize)

    def simulate(self, unconstrained: Tensor) -> Outcome:
        """
        Run the simulator at given latents.

        A run that raises is a failed run. If a vectorised batch raises, its runs are repeated one
        by one, which tells those that fail from the others.

        :param Tensor unconstrained: shape ``(runs, features)``.
        """
        num = len(unconstrained)
        values = constrain(unconstrained, self.structure)
        with torch.no_grad():
            if self.vectorize != "loop":
                try:
                    found = self._map(self._observe, self._for_model(values), num)
                    return Outcome(self._shaped(found, num), "")
                except _WrongShapeError:
                    raise
                except Exception:  # some run of the batch failed: find out which
                    pass
            return self._simulate_one_by_one(values, num)

    def nothing(self, num: int) -> Values:
        """
        The observations of runs that failed.

        :param int num: number of runs.
        """
        device = self.structure.device
        return {
            site.name: torch.full((num, *site.shape), torch.nan, device=device)
            for site in self.structure.observed
        }

    @property
    def _latents(self) -> Any:
        return self.structure.latents

    def _run(self, recorder: Recorder, given: Mapping[str, Tensor], around: _Around) -> None:
        """One run of the model, which nothing around it sees."""
        released = Released(frozenset(self.structure.observed_names), given)
        with poutine.block(), _own_dimensions(), FrozenMessenger(), released, recorder:
            with contextlib.suppress(PriorIsDrawn), around(given):
                self.model()

    def _observe(self, given: Values, around: _Around) -> Values:
        """Values of the observed sites at given latents."""
        recorder = Recorder(frozenset(self.structure.observed_names))
        self._run(recorder, given, around)
        return recorder.values

    def _score(
        self,
        unconstrained: Tensor,
        names: frozenset[str],
        stop_after: str | None,
        observations: Mapping[str, Tensor],
        way: str,
    ) -> Tensor:
        leading = 1 if way == "plate" else 0

        def score(given: Values, around: _Around) -> Tensor:
            recorder = Recorder(names, stop_after, score=True)
            self._run(recorder, {**given, **observations}, around)
            return torch.cat([_rows(v, leading) for v in recorder.log_probs.values()], -1)

        num = len(unconstrained)
        values = constrain(unconstrained, self.structure)
        terms: Tensor = self._map(score, self._for_model(values), num, way)
        return terms.reshape(num, -1).sum(-1) + log_abs_det(unconstrained, self.structure)

    def _map(self, function: _OfOneRun, values: Values, num: int, way: str | None = None) -> Any:
        """
        Apply a function of one run to many.

        :param function: of the values of the latents in one run, or of all under a plate, and
            of what to enter around the model.
        :param values: shape ``(num, ...)``.
        :param int num: number of runs.
        :param way: one of :data:`VECTORIZE`, if not that of the simulator.
        """
        way = way or self.vectorize
        with pyro.validation_enabled(False):
            if way == "vmap":
                zeros = torch.zeros(num, device=self.structure.device)

                def of_one(zero: Tensor, given: Values) -> Any:
                    return function(given, lambda names: DrawUnderVmap(zero, names))

                return vmap(of_one, randomness="different")(zeros, values)
            if way == "plate":
                dim = -1 - self.structure.max_plate_nesting
                return function(values, lambda _: pyro.plate(_PLATE, num, dim=dim))
            rows = [{name: value[i] for name, value in values.items()} for i in range(num)]
            runs = [function(row, lambda _: contextlib.nullcontext()) for row in rows]
        if isinstance(runs[0], Tensor):
            return torch.stack(runs)
        return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}

    def _for_model(self, values: Values) -> Values:
        """Values of the latents as the model sees them, with runs left of all its plates."""
        if self.vectorize != "plate":
            return values
        result: Values = {}
        for site in self.structure.latents:
            between = self.structure.max_plate_nesting - site.batch_dim
            value = values[site.name]
            result[site.name] = value.reshape(len(value), *(1,) * between, *site.shape)
        return result

    def _shaped(self, values: Values, num: int) -> Values:
        return {
            site.name: _with_runs(site.name, values[site.name], num, site.shape)
            for site in self.structure.observed
        }

    def _simulate_one_by_one(self, values: Values, num: int) -> Outcome:
        way = "plate" if self.vectorize == "plate" else "loop"
        values = self._for_model(values)
        rows: list[Values] = []
        failure = ""
        for i in range(num):
            given = {name: value[i : i + 1] for name, value in values.items()}
            try:
                rows.append(self._shaped(self._map(self._observe, given, 1, way), 1))
            except Exception as error:  # whatever a simulator does, the other runs go on
                failure = failure or f"{type(error).__name__}: {error}".split("\n")[0]
                rows.append(self.nothing(1))
        return Outcome({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, failure)

    def _find_out_how_to_run(self) -> str:
        """The first way of running the model that works, with a warning for the slow one."""
        reasons: list[str] = []
        for way, check in (("vmap", self._check_vmap), ("plate", self._check_plate)):
            self.vectorize = way
            try:
                with torch.random.fork_rng(devices=[]):
                    check()
            except Exception as error:  # a model can fail in any way here
                message = str(error).strip() or type(error).__name__
                reasons.append(f"{way}: {message.splitlines()[0]}")
            else:
                return way
        warnings.warn(
            "The model cannot be vectorised and is run once per simulation, which is slow "
            f"({'; '.join(reasons)}). If it is written for batches of latents, say so by "
            "vectorize='plate'; vectorize='loop' accepts it as it is, and num_workers spreads "
            "the runs over processes.",
            VectorizationWarning,
            stacklevel=5,
        )
        return "loop"

    def _check_vmap(self) -> None:
        latents = self.draw_prior(3)
        self.log_prior(latents)
        self._check_randomness_is_torchs(constrain(latents, self.structure), 3)

    def _can_score_by_vmap(self) -> bool:
        with torch.random.fork_rng(devices=[]):
            latents = self.draw_prior(3)
            one_by_one = self.log_prior(latents)
            self._scores_by_vmap = True
            try:
                together = self.log_prior(latents)
            except Exception:  # for any reason that vmap has
                return False
            finally:
                self._scores_by_vmap = False
            return torch.allclose(one_by_one, together)

    def _check_plate(self) -> None:
        """
        Check that every run under a plate depends on its own latents and random numbers alone.

        Two batches from the same random numbers, in which two runs have other latents, nuisance
        included: those two have to differ, and the others to be the same.
        """
        num, changed = 5, torch.tensor([True, False, False, True, False])
        self.log_prior(self.draw_prior(num))
        first, second = self._all_latents(num), self._all_latents(num)
        self._check_randomness_is_torchs(first, num)
        mixed: Values = {}
        for name, value in first.items():
            where = changed.reshape(num, *(1,) * (value.dim() - 1)).to(value.device)
            mixed[name] = torch.where(where, second[name], value)
        seed = int(torch.randint(2**31, ()))
        data = self._map(self._observe, first, num)
        effects = [self._effect(seed, values, data, num) for values in (first, mixed)]
        differs = torch.zeros(num, dtype=torch.bool)
        for one, other in zip(*effects, strict=True):
            same = (one == other) | (one.isnan() & other.isnan())
            differs |= ~same.reshape(num, -1).all(1).cpu()
        if not torch.equal(differs, changed):
            raise ValueError(
                "runs under a plate do not depend on their own latents alone, the model is not "
                "written for batches of latents"
            )
        alike = {name: value[:1].expand_as(value) for name, value in first.items()}
        before, after = (self._observe_from(seed + i, alike, num) for i in range(2))
        for name, value in before.items():
            is_shared = (value == value[:1]).all(0) & (value[0] != after[name][0])
            if bool(is_shared.any()):
                raise ValueError(
                    f"site {name!r} has random numbers that all runs under a plate share, the "
                    "model is not written for batches of latents"
                )

    def _check_randomness_is_torchs(self, values: Values, num: int) -> None:
        """Check that torch's generator is the only one: others know nothing of many runs."""
        seed = int(torch.randint(2**31, ()))
        first, second = (self._observe_from(seed, values, num) for _ in range(2))
        for name, value in first.items():
            if not torch.allclose(value, second[name], equal_nan=True):
                raise ValueError(
                    f"site {name!r} has random numbers that are not of torch's generator, which "
                    "all runs may share"
                )

    def _effect(self, seed: int, values: Values, data: Values, num: int) -> list[Tensor]:
        """
        What latents make of the observed sites.

        For sites that are drawn, the log-density of given data: draws of many distributions take
        more or fewer random numbers by their parameters, and shift those of all later draws.
        """
        drawn = [site.name for site in self.structure.observed if site.has_density]
        given = values | {name: data[name] for name in drawn}

        def effect(given: Values, around: _Around) -> list[Tensor]:
            recorder = Recorder(frozenset(self.structure.observed_names), score=True)
            self._run(recorder, given, around)
            found = recorder.log_probs | {
                name: value for name, value in recorder.values.items() if name not in drawn
            }
            return [found[name] for name in self.structure.observed_names]

        torch.manual_seed(seed)
        with torch.no_grad():
            result: list[Tensor] = self._map(effect, given, num)
        if any(value.shape[:1] != (num,) for value in result):
            raise ValueError(f"observed sites in {num} runs do not have {num} densities")
        return result

    def _observe_from(self, seed: int, values: Values, num: int) -> Values:
        torch.manual_seed(seed)
        with torch.no_grad():
            return self._shaped(self._map(self._observe, values, num), num)

    def _all_latents(self, num: int) -> Values:
        """Values of all sites that have a dimension of the plate, nuisance included."""
        everything = _All(frozenset(self.structure.observed_names))
        with torch.no_grad():
            self._map(lambda values, around: self._run(everything, values, around), {}, num)
        return {n: v for n, v in everything.values.items() if v.shape[:1] == (num,)}


@contextlib.contextmanager
def _own_dimensions() -> Iterator[None]:
    """Plates inside get their dimensions as if there were none around, as those of a guide."""
    outside = _DIM_ALLOCATOR._stack
    _DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = outside


class _All(Recorder):
    """Record every random choice but some."""

    def __init__(self, but: frozenset[str]) -> None:
        super().__init__(frozenset())
        self.but = but

    def _pyro_post_sample(self, msg: Any) -> None:
        is_latent = not msg["is_observed"] and isinstance(msg["value"], Tensor)
        if is_latent and msg["name"] not in self.but and msg["name"] != _PLATE:
            self.values[msg["name"]] = msg["value"]


class _WrongShapeError(ValueError):
    """The value of a site has another shape than one per run."""


def _with_runs(name: str, value: Tensor, num: int, shape: torch.Size) -> Tensor:
    """A value with one leading dimension of runs, whatever dimensions of size 1 follow it."""
    if value.shape[:1] == (num,) and value.numel() == num * shape.numel():
        return value.reshape(num, *shape)
    raise _WrongShapeError(
        f"Site {name!r} has shape {tuple(value.shape)} in {num} runs at once and {tuple(shape)} "
        f"in one; expected was {(num, *shape)}. The model may not be written for batches, then "
        "vectorize='loop' runs it."
    )


def _rows(value: Tensor, leading: int) -> Tensor:
    return value.reshape((*value.shape[:leading], -1)) if leading else value.reshape(-1)
