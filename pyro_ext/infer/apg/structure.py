"""What an engine has to know of its programs, and whether they fit together."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...poutine.sites import delta, is_computed
from .exact_block import ExactBlock
from .factors import WithFactors
from .recording import PARTICLES, RecordedSite, Recorder, run

__all__ = ["Block", "Programs", "Rest", "Structure", "inspect_programs", "split_kernel"]

Kernel = Callable[..., Any]


class Block(NamedTuple):
    """Sites that are updated together."""

    kernel: Kernel | ExactBlock
    sites: tuple[str, ...]
    local_plate: str | None  # the plate whose elements are independent given all other sites
    factors: Kernel | None = None  # what the block changes of the model; by default all of it

    @property
    def name(self) -> str:
        """The names of the sites, as one."""
        return ",".join(self.sites)


class Structure(NamedTuple):
    """The latent sites, their blocks, and where the dimensions are."""

    sites: tuple[str, ...]
    blocks: tuple[Block, ...]
    plate_nesting: int  # batch dimensions of the programs themselves
    num_batch: int  # of these, the leftmost ones that count data sets: 0 or 1
    local_dims: dict[str, int]  # the dimension of each local plate, from the right


class Programs(NamedTuple):
    """Model, encoder and kernels together with their arguments."""

    model: Callable[..., Any]
    encoder: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure


class Rest(dict[str, Tensor]):
    """The latents that a kernel may look at: all but those that it samples."""

    def __init__(self, latents: Mapping[str, Tensor], block: Collection[str]) -> None:
        super().__init__({k: v for k, v in latents.items() if k not in block})
        self._block = tuple(block)

    def __missing__(self, name: str) -> Tensor:
        if name in self._block:
            raise ValueError(
                f"The kernel of block {list(self._block)} reads {name!r}, which it samples "
                "itself. A kernel proposes its block given the other latents only, so that it "
                "serves as its own reverse kernel."
            )
        known = sorted({*self, *self._block})
        raise KeyError(f"{name!r} is not a latent site. The latent sites are {known}.")


def inspect_programs(
    model: Callable[..., Any],
    encoder: Callable[..., Any],
    kernels: Sequence[Kernel | ExactBlock | WithFactors],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_plate: str | None,
    local_plates: Collection[str],
) -> Structure:
    """
    Run every program, compare what they sample, and say what is wrong.

    :param model: the model.
    :param encoder: proposes all latent sites.
    :param kernels: one for each block.
    :param args: positional arguments of the model.
    :param kwargs: its keyword arguments.
    :param batch_plate: name of the plate of the data sets, if there are several.
    :param local_plates: names of plates whose elements are conditionally independent.
    :raises ValueError: if the programs do not fit together.
    """
    with torch.no_grad():
        alone = run(model, args, kwargs, values={}, num_particles=None, plate_nesting=0)
        latents = _latent_sites(alone)
        frames = {frame.name: frame for site in alone.sites.values() for frame in site.frames}
        nesting = max((-frame.dim for frame in frames.values()), default=0)
        _check_plates(alone, batch_plate, nesting)
        local_dims = _local_dims(frames, local_plates, batch_plate)
        if local_dims and any(isinstance(kernel, WithFactors) for kernel in kernels):
            raise ValueError(
                f"local_plates={sorted(local_dims)} and WithFactors do not go together: factors "
                "have no density for every element of a plate. Leave one of the two out."
            )
        _check_subsampling(alone, "model")
        if any(isinstance(kernel, ExactBlock) for kernel in kernels):
            _check_unscaled(alone)

        def run_all(
            program: Callable[..., Any], arguments: tuple[Any, ...], values: Mapping[str, Tensor]
        ) -> Recorder:
            return run(
                program, arguments, kwargs, values=values, num_particles=2, plate_nesting=nesting
            )

        encoded = run_all(encoder, args, {})
        _check_same_sites(tuple(latents), tuple(encoded.sites), "encoder")
        values = {name: encoded.sites[name].value for name in latents}
        reference = run_all(model, args, values).sites
        _check_proposals(encoded, reference, "The encoder")

        blocks: list[Block] = []
        owners: dict[str, int] = {}
        for index, given in enumerate(kernels):
            kernel, factors = split_kernel(given)
            if isinstance(kernel, ExactBlock):
                sites = _check_exact(kernel, alone)
            else:
                sites = _check_kernel(index, kernel, args, values, reference, run_all)
            for name in sites:
                if name in owners:
                    raise ValueError(
                        f"Site {name!r} is sampled by kernels {owners[name]} and {index}. A site "
                        "belongs to one block: split or join the kernels."
                    )
                owners[name] = index
            plate = _local_plate(sites, reference, local_plates)
            blocks.append(Block(kernel, sites, plate, factors))
    missing = sorted(set(latents) - set(owners))
    if missing and kernels:
        raise ValueError(
            f"No kernel samples {missing}. Every latent site belongs to one block: add a kernel "
            "for them, or ExactBlock(...) if they are discrete."
        )
    return Structure(tuple(latents), tuple(blocks), nesting, int(bool(batch_plate)), local_dims)


def split_kernel(
    given: Kernel | ExactBlock | WithFactors,
) -> tuple[Kernel | ExactBlock, Kernel | None]:
    """
    Kernel and factors of a block.

    :param given: one of the kernels as the user gave them.
    """
    return (given.kernel, given.factors) if isinstance(given, WithFactors) else (given, None)


def _latent_sites(recorder: Recorder) -> dict[str, RecordedSite]:
    for name, site in recorder.sites.items():
        point = delta(site.fn)
        node = {"fn": site.fn, "value": site.value, "is_observed": site.is_observed}
        if point is not None and site.is_observed and not is_computed(node):
            raise ValueError(
                f"Site {name!r} is deterministic and conditioned on a value, which adds nothing "
                "to the density of the model. Give the observation a distribution, or use "
                "ConstrainedHMC, which conditions on exact outputs."
            )
    latents = {k: s for k, s in recorder.sites.items() if not s.is_observed}
    points = [name for name, site in latents.items() if delta(site.fn) is not None]
    if points:
        raise ValueError(
            f"The model samples {points} from a point mass, which has no density. Compute the "
            "value with pyro.deterministic instead."
        )
    if not latents:
        raise ValueError("The model has no latent sample site: there is nothing to infer.")
    return latents


def _check_plates(recorder: Recorder, batch_plate: str | None, nesting: int) -> None:
    for name, site in recorder.sites.items():
        if delta(site.fn) is not None:
            continue
        dims = {frame.dim: frame for frame in site.frames}
        batch_shape = site.fn.batch_shape
        for place, size in enumerate(batch_shape):
            dim = place - len(batch_shape)
            if size > 1 and dim not in dims:
                raise ValueError(
                    f"Site {name!r} has batch shape {tuple(batch_shape)}, but no plate for "
                    f"dimension {dim}. Put it into a pyro.plate(..., dim={dim}), or declare the "
                    "dimension as part of the event with .to_event(1)."
                )
        if batch_plate is None:
            continue
        own = [frame for frame in site.frames if frame.name == batch_plate]
        if not own:
            raise ValueError(
                f"Site {name!r} is outside of the plate {batch_plate!r} of the data sets (its "
                f"plates are {sorted(f.name for f in site.frames)}). Every data set has latents "
                "of its own: put the site into the plate, or leave out batch_plate."
            )
        if own[0].dim != -nesting:
            raise ValueError(
                f"The plate {batch_plate!r} of the data sets is at dimension {own[0].dim}, but "
                f"the plates of the model go to {-nesting}. The data sets come first: "
                f"pyro.plate({batch_plate!r}, ..., dim={-nesting})."
            )


def _local_dims(
    frames: Mapping[str, Any], local_plates: Collection[str], batch_plate: str | None
) -> dict[str, int]:
    for name in local_plates:
        if name == batch_plate:
            raise ValueError(f"{name!r} is the plate of the data sets; it cannot be local, too.")
        if name not in frames:
            near = difflib.get_close_matches(name, frames, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"The model has no plate {name!r} for local_plates.{hint} Its plates are "
                f"{sorted(frames)}."
            )
    return {name: frames[name].dim for name in local_plates}


def _check_subsampling(recorder: Recorder, who: str) -> None:
    for name, (chosen, size) in recorder.subsampled.items():
        raise ValueError(
            f"Plate {name!r} of the {who} takes {chosen} of {size} elements, other ones at every "
            "run. Weights need one density: give the program the part of the data as its "
            "argument, and a plate of that size."
        )


def _check_unscaled(recorder: Recorder) -> None:
    for name, site in recorder.sites.items():
        if isinstance(site.scale, Tensor) or site.scale != 1.0:
            raise ValueError(
                f"Site {name!r} is scaled by {site.scale}. An ExactBlock draws from the model as "
                "it is, without scale: learn a kernel for the block instead."
            )


def _check_same_sites(expected: tuple[str, ...], seen: tuple[str, ...], who: str) -> None:
    missing = sorted(set(expected) - set(seen))
    if missing:
        raise ValueError(
            f"The {who} does not sample {missing}. It has to propose all latent sites of the "
            f"model: {sorted(expected)}."
        )
    _check_known(expected, seen, who)


def _check_known(expected: Collection[str], seen: Collection[str], who: str) -> None:
    for name in seen:
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"The {who} samples {name!r}, which is no latent site of the model.{hint} Its "
                f"latent sites are {sorted(expected)}."
            )


def _check_proposals(recorder: Recorder, reference: Mapping[str, RecordedSite], who: str) -> None:
    """Compare the sites of a proposal with those of the model."""
    _check_subsampling(recorder, who)
    for name, site in recorder.sites.items():
        of_model = reference[name]
        if site.is_observed:
            raise ValueError(f"{who} has an observation at {name!r}. A proposal only samples.")
        if delta(site.fn) is not None:
            raise ValueError(
                f"{who} proposes {name!r} by a point mass, which has no density to weigh it by. "
                "Sample from a distribution with the support of the model's."
            )
        if isinstance(site.scale, Tensor) or site.scale != 1.0:
            raise ValueError(
                f"{who} scales {name!r} by {site.scale}: what is left is no density that a "
                "sample can be weighed by. Use poutine.scale in the model only."
            )
        batch_shapes = _without_particles(site), _without_particles(of_model)
        event_shapes = tuple(site.fn.event_shape), tuple(of_model.fn.event_shape)
        if batch_shapes[0] != batch_shapes[1] or event_shapes[0] != event_shapes[1]:
            raise ValueError(
                f"{who} samples {name!r} with batch shape {batch_shapes[0]} and event shape "
                f"{event_shapes[0]}, the model with {batch_shapes[1]} and {event_shapes[1]}. Use "
                "the same plates with the same dim=..., and the same .to_event()."
            )


def _without_particles(site: RecordedSite) -> tuple[int, ...]:
    own = {frame.dim for frame in site.frames if frame.name != PARTICLES}
    shape = tuple(site.fn.batch_shape)
    return shape[len(shape) + min(own) :] if own else ()


def _check_exact(kernel: ExactBlock, recorder: Recorder) -> tuple[str, ...]:
    latents = [name for name, site in recorder.sites.items() if not site.is_observed]
    _check_known(latents, kernel.sites, repr(kernel))
    for name in kernel.sites:
        fn = recorder.sites[name].fn
        if not fn.has_enumerate_support:
            raise ValueError(
                f"{kernel!r}: site {name!r} has distribution {type(fn).__name__}, whose values "
                "cannot be enumerated. Write a kernel for it."
            )
    return tuple(kernel.sites)


def _check_kernel(
    index: int,
    kernel: Kernel,
    args: tuple[Any, ...],
    values: dict[str, Tensor],
    reference: Mapping[str, RecordedSite],
    run_all: Callable[..., Recorder],
) -> tuple[str, ...]:
    """Find the sites of a kernel: what it samples when it could look at everything."""
    who = f"kernel {index}"
    everything = run_all(kernel, (Rest(values, ()), *args), {})
    sites = tuple(everything.sites)
    if not sites:
        raise ValueError(f"The {who} ({_describe(kernel)}) samples no site.")
    latents = [name for name, site in reference.items() if not site.is_observed]
    _check_known(latents, sites, who)
    recorder = run_all(kernel, (Rest(values, sites), *args), {})
    if set(recorder.sites) != set(sites):
        raise ValueError(
            f"The {who} samples {sorted(sites)} at one run and {sorted(recorder.sites)} at "
            "another. A block has the same sites every time."
        )
    _check_proposals(recorder, reference, f"The kernel of block {list(sites)}")
    return sites


def _local_plate(
    sites: tuple[str, ...], reference: Mapping[str, RecordedSite], local_plates: Collection[str]
) -> str | None:
    for plate in local_plates:
        if all(any(f.name == plate for f in reference[name].frames) for name in sites):
            return plate
    return None


def _describe(kernel: Any) -> str:
    inner = kernel.func if isinstance(kernel, functools.partial) else kernel
    return getattr(inner, "__name__", type(inner).__name__)
