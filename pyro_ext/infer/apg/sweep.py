"""Propose, weigh, resample: the population Gibbs sampler as functions of its particles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import DegenerateWeightsError
from ...ops.resampling import Resampler, log_mean_exp, take_particles
from .exact_block import ExactBlock, draw_exactly
from .recording import RecordedSite, Recorder, run, site_log_prob, total
from .structure import Block, Programs, Rest

__all__ = [
    "Density",
    "Draft",
    "Particles",
    "Update",
    "Weighed",
    "evaluate",
    "evaluate_update",
    "initialize",
    "propose",
    "resample",
    "update_block",
    "updates",
    "weigh",
]


class Particles(NamedTuple):
    """A weighted population for every data set, ``(particles, *data_sets)``."""

    latents: dict[str, Tensor]
    log_weights: Tensor  # unnormalised: their mean estimates the evidence
    log_joint: Tensor
    local_log_joint: dict[str, Tensor]  # by local plate, with its elements behind


class Density(NamedTuple):
    """The log joint density of the model, per data set and per element of each local plate."""

    log_joint: Tensor
    local: dict[str, Tensor]
    masks: dict[str, Any]  # of the latent sites: what is masked is not part of the target
    sites: dict[str, RecordedSite]
    parameters: dict[str, Tensor]


class Draft(NamedTuple):
    """New values for a block, not weighed yet."""

    values: dict[str, Tensor]
    forward: Recorder  # the kernel with the new values
    reverse: Recorder  # ... and with the old ones


class Weighed(NamedTuple):
    """Weights of new values, and the log-density that they were proposed with."""

    log_weights: Tensor
    log_increments: Tensor  # logarithm of eq. 9
    log_prob: Tensor | None  # with a graph; None where the block was drawn exactly
    local_weights: Tensor | None  # of the elements of the local plate, normalised
    local_log_prob: Tensor | None


class Update(NamedTuple):
    """One update of a block, before it is resampled."""

    sweep: int
    block: str  # "encoder" for the first draw
    particles: Particles
    weighed: Weighed
    log_joint: Tensor  # as in the particles, but with a graph to the parameters of the model
    parameters: dict[str, Tensor]


def evaluate(
    programs: Programs,
    latents: Mapping[str, Tensor],
    factors: Callable[..., Any] | None = None,
) -> Density:
    """
    Evaluate the log joint density of the model at all particles.

    :param Programs programs: has the model.
    :param latents: values of all latent sites, ``(particles, ...)``.
    :param factors: a part of the model to evaluate instead, a function of ``(latents, *args)``.
    """
    structure = programs.structure
    num_particles = len(next(iter(latents.values())))
    program, args = programs.model, programs.args
    if factors is not None:
        program, args = factors, (latents, *args)
    recorder = _run(programs, program, args, latents, num_particles)
    num_leading = 1 + structure.num_batch
    terms: list[Tensor] = []
    local: dict[str, list[Tensor]] = {plate: [] for plate in structure.local_dims}
    for site in recorder.sites.values():
        log_prob = site_log_prob(site, site.value)
        inside = [f.name for f in site.frames if f.name in local]
        for plate in inside:
            local[plate].append(total(log_prob, num_leading, structure.local_dims[plate]))
        # of a site inside a local plate, the sum per element is there already
        terms.append(local[inside[0]][-1].sum(-1) if inside else total(log_prob, num_leading))
    masks = {k: recorder.sites[k].mask for k in structure.sites if k in recorder.sites}
    sums = {plate: sum(parts[1:], parts[0]) for plate, parts in local.items() if parts}
    return Density(
        sum(terms[1:], terms[0]), sums, masks, recorder.sites, dict(recorder.parameters)
    )


def evaluate_update(
    programs: Programs, block: Block, particles: Particles, latents: Mapping[str, Tensor]
) -> Density:
    """
    Evaluate the log joint density after an update of a block.

    Where the block has factors, only these are evaluated, before and after, and the rest of the
    density is that of the particles.

    :param Programs programs: the programs and their arguments.
    :param Block block: the block that was updated.
    :param Particles particles: the population before the update.
    :param latents: values of all latent sites after it.
    """
    if block.factors is None:
        return evaluate(programs, latents)
    with torch.no_grad():
        before = evaluate(programs, particles.latents, block.factors).log_joint
    after = evaluate(programs, latents, block.factors)
    return after._replace(log_joint=particles.log_joint + (after.log_joint - before))


def initialize(programs: Programs, num_particles: int) -> Update:
    r"""
    Draw all latents from the encoder, and weigh them (algorithm 3, lines 2 to 6).

    :math:`w = p_\theta(x, z) / q_\phi(z \mid x)`.

    :param Programs programs: the programs and their arguments.
    :param int num_particles: number L of particles.
    """
    structure = programs.structure
    recorder = _run(programs, programs.encoder, programs.args, {}, num_particles)
    _check_sites(recorder, structure.sites, "The encoder")
    latents = {name: recorder.sites[name].value for name in structure.sites}
    density = evaluate(programs, latents)
    log_q = _log_prob(recorder, latents, density.masks, 1 + structure.num_batch)
    log_weights = _drop_invalid(density.log_joint.detach() - log_q.detach())
    weighed = Weighed(log_weights, log_weights, log_q, None, None)
    sampled = recorder.sites
    return _record(0, "encoder", latents, weighed, density, sampled, recorder.parameters)


def resample(particles: Particles, resampler: Resampler) -> Particles:
    """
    Choose the particles that go on, by weight, and give them equal weights (algorithm 2).

    :param Particles particles: a weighted population.
    :param resampler: chooses ancestors from log-weights.
    """
    ancestors = resampler(particles.log_weights, len(particles.log_weights))
    mean = log_mean_exp(particles.log_weights)
    latents, local = particles.latents, particles.local_log_joint
    log_joint, *values = take_particles(
        ancestors, particles.log_joint, *latents.values(), *local.values()
    )
    return Particles(
        dict(zip(latents, values[: len(latents)], strict=True)),
        mean.expand(particles.log_weights.shape),
        log_joint,
        dict(zip(local, values[len(latents) :], strict=True)),
    )


def propose(programs: Programs, block: Block, particles: Particles) -> Draft:
    r"""
    Draw new values of a block from its kernel, :math:`z_b' \sim q_\phi(\cdot \mid x, z_{-b})`.

    Line 12 of algorithm 3.

    :param Programs programs: the programs and their arguments.
    :param Block block: the block, with a kernel that proposes.
    :param Particles particles: the population, which stays as it is.
    """
    kernel: Any = block.kernel
    num_particles = len(particles.log_weights)
    args = (Rest(particles.latents, block.sites), *programs.args)
    forward = _run(programs, kernel, args, {}, num_particles)
    _check_sites(forward, block.sites, f"The kernel of block {list(block.sites)}")
    values = {name: forward.sites[name].value for name in block.sites}
    if len(block.sites) == 1:
        # A site that is alone in its block depends on nothing that changes: its distribution is
        # also that of the reverse kernel. In larger blocks later sites depend on earlier ones.
        return Draft(values, forward, forward)
    old = {name: particles.latents[name] for name in block.sites}
    with torch.no_grad():
        return Draft(values, forward, _run(programs, kernel, args, old, num_particles))


def weigh(
    programs: Programs, block: Block, particles: Particles, draft: Draft, density: Density
) -> Weighed:
    r"""
    Weigh new values of a block against the old ones (eq. 9; line 13 of algorithm 3).

    .. math:: \log v = \log \frac{p_\theta(x, z_b', z_{-b})}{p_\theta(x, z_b, z_{-b})}
        - \log \frac{q_\phi(z_b' \mid x, z_{-b})}{q_\phi(z_b \mid x, z_{-b})}.

    Where the elements n of a block are independent given the other sites, both ratios are
    products over n, and factor n alone weighs element :math:`z_{bn}'` properly.

    :param Programs programs: the programs and their arguments.
    :param Block block: the block.
    :param Particles particles: the population before the update.
    :param Draft draft: the new values.
    :param Density density: the model at the new values.
    """
    plate, num_leading = block.local_plate, 1 + programs.structure.num_batch
    kept = None if plate is None else programs.structure.local_dims[plate]
    old = {name: particles.latents[name] for name in block.sites}
    log_q = _log_prob(draft.forward, draft.values, density.masks, num_leading, kept)
    with torch.no_grad():
        reverse = _log_prob(draft.reverse, old, density.masks, num_leading, kept)
        change_of_q = log_q - reverse
        change_of_p = density.log_joint - particles.log_joint
        own = change_of_q if plate is None else change_of_q.sum(-1)
        increments = _drop_invalid(change_of_p - own)
        log_weights = _add(particles.log_weights, increments)
        if plate is None:
            return Weighed(log_weights, increments, log_q, None, None)
        change = density.local[plate] - particles.local_log_joint[plate] - change_of_q
        local_weights = torch.softmax(_add(particles.log_weights.unsqueeze(-1), change), 0)
    return Weighed(log_weights, increments, log_q.sum(-1), local_weights, log_q)


def update_block(programs: Programs, block: Block, particles: Particles, sweep: int) -> Update:
    """
    Update a block of all particles (lines 11 to 14 of algorithm 3).

    :param Programs programs: the programs and their arguments.
    :param Block block: the block.
    :param Particles particles: the population, resampled or not.
    :param int sweep: number of the sweep, for the record.
    """
    if isinstance(block.kernel, ExactBlock):
        new = draw_exactly(
            programs.model,
            programs.args,
            programs.kwargs,
            block.sites,
            Rest(particles.latents, block.sites),
            num_particles=len(particles.log_weights),
            plate_nesting=programs.structure.plate_nesting,
        )
        latents = {**particles.latents, **new}
        density = evaluate_update(programs, block, particles, latents)
        # eq. 9 with q = p(z_b | x, z_-b) is 1, whatever rounding would make of it
        log_weights = particles.log_weights
        weighed = Weighed(log_weights, torch.zeros_like(log_weights), None, None, None)
        return _record(sweep, block.name, latents, weighed, density, {}, {})
    draft = propose(programs, block, particles)
    latents = {**particles.latents, **draft.values}
    density = evaluate_update(programs, block, particles, latents)
    weighed = weigh(programs, block, particles, draft, density)
    sampled, parameters = draft.forward.sites, draft.forward.parameters
    return _record(sweep, block.name, latents, weighed, density, sampled, parameters)


def updates(
    programs: Programs,
    num_particles: int,
    num_sweeps: int,
    resampler: Resampler | None,
) -> Iterator[Update]:
    """
    Run the sampler, update by update (algorithm 3).

    :param Programs programs: the programs and their arguments.
    :param int num_particles: number L of particles.
    :param int num_sweeps: number K of sweeps, the draw from the encoder being the first.
    :param resampler: chooses ancestors before each update, or ``None`` for none at all.
    :returns: every update, with the population before it is resampled.
    """
    update = initialize(programs, num_particles)
    particles = update.particles
    yield update
    del update  # whose graph has served its purpose
    for sweep in range(1, num_sweeps):
        for block in programs.structure.blocks:
            if resampler is not None:
                particles = resample(particles, resampler)
            update = update_block(programs, block, particles, sweep)
            particles = update.particles
            yield update
            del update


def _record(
    sweep: int,
    block: str,
    latents: dict[str, Tensor],
    weighed: Weighed,
    density: Density,
    sampled: Mapping[str, RecordedSite],
    parameters: Mapping[str, Tensor],
) -> Update:
    _check_weights(weighed.log_weights, block, density.sites, sampled)
    local = {plate: value.detach() for plate, value in density.local.items()}
    particles = Particles(latents, weighed.log_weights, density.log_joint.detach(), local)
    both = {**density.parameters, **parameters}
    return Update(sweep, block, particles, weighed, density.log_joint, both)


def _run(
    programs: Programs,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    values: Mapping[str, Tensor],
    num_particles: int,
) -> Recorder:
    return run(
        program,
        args,
        programs.kwargs,
        values=values,
        num_particles=num_particles,
        plate_nesting=programs.structure.plate_nesting,
    )


def _log_prob(
    recorder: Recorder,
    values: Mapping[str, Tensor],
    masks: Mapping[str, Any],
    num_leading: int,
    kept: int | None = None,
) -> Tensor:
    terms = [
        total(site_log_prob(recorder.sites[name], value, masks[name]), num_leading, kept)
        for name, value in values.items()
    ]
    return sum(terms[1:], terms[0])


def _drop_invalid(log_weights: Tensor) -> Tensor:
    """Particles whose weight is not a number, or infinite, count for nothing."""
    return log_weights.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _add(log_weights: Tensor, increments: Tensor) -> Tensor:
    # A particle of weight zero keeps it, whatever its increment: -inf + inf is NaN.
    return _drop_invalid(log_weights + increments)


def _check_sites(recorder: Recorder, sites: tuple[str, ...], who: str) -> None:
    if set(recorder.sites) != set(sites):
        raise ValueError(
            f"{who} samples {sorted(recorder.sites)}, but sampled {sorted(sites)} at its first "
            "run. What is sampled may not depend on what was sampled before."
        )


def _check_weights(
    log_weights: Tensor,
    block: str,
    of_model: Mapping[str, RecordedSite],
    of_proposal: Mapping[str, RecordedSite],
) -> None:
    dead = (log_weights == -torch.inf).all(0)
    if not bool(dead.any()):
        return
    causes = []
    for who, sites in (("the model", of_model), ("its proposal", of_proposal)):
        for name, site in sites.items():
            with torch.no_grad():
                log_prob = site_log_prob(site, site.value)
            for kind, wrong in (("NaN", log_prob.isnan()), ("infinite", log_prob.isinf())):
                if bool(wrong.any()):
                    causes.append(f"the log-density of {name!r} in {who} is {kind}")
    which = f"{int(dead.sum())} of {dead.numel()} data sets" if dead.dim() else "the data"
    where = f"Block {block!r}" if block != "encoder" else "The encoder"
    why = "; ".join(causes) or "the weights overflow"
    raise DegenerateWeightsError(
        f"{where} left no particle with a positive weight for {which}: {why}. Check the data, the "
        "support of the proposals and the outputs of the networks, or use more particles."
    )
