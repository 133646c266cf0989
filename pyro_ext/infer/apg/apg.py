"""Amortized population Gibbs samplers, in the vocabulary of Pyro's trainers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor

from ...ops.resampling import RESAMPLERS, Resampler
from .exact_block import ExactBlock
from .factors import WithFactors
from .objective import APGObjective, Kernels
from .sweep import Particles
from .weighted_samples import WeightedSamples, record_history

__all__ = ["APG"]


class APG:
    r"""
    Amortized population Gibbs: learned proposals for blocks of latents, and weighted samples.

    A population of particles starts at draws of an encoder, and is improved sweep by sweep. A
    sweep updates every block of latents by its kernel :math:`q_\phi(z_b \mid x, z_{-b})`, weighs
    the particles by

    .. math:: v = \frac{p_\theta(x, z_b', z_{-b}) \, q_\phi(z_b \mid x, z_{-b})}
        {p_\theta(x, z_b, z_{-b}) \, q_\phi(z_b' \mid x, z_{-b})},

    and resamples them. Whatever the kernels are, the samples are properly weighted for the
    posterior. Training minimises the inclusive KL divergence from the conditional posteriors to
    the kernels, and maximises the marginal likelihood of a model that has parameters; no sample
    is reparameterised, so that latents may be discrete. A kernel that is learned well is a Gibbs
    update, so that more sweeps than in training make the samples still better.

    Model, encoder and kernels are Pyro programs. The encoder has the model's arguments and samples
    all of its latent sites; a kernel has the values of the latent sites as a first argument, a
    dictionary of all but its own, and samples the sites of one block. All particles run at once,
    in a plate to the left of the model's own, so that programs have to broadcast over leading
    dimensions, as for Pyro's ``vectorize_particles``: values have a dimension for the particles
    and one for every plate of the model, of size 1 where a site is outside of it.

    Several data sets are trained on at once inside ``batch_plate``, the outermost plate of the
    model; weights, resampling and ESS are separate for each. Data sets of different size are
    padded, and the rest is masked in the model by ``poutine.mask``: the proposals of elements
    that the model masks count for nothing.

    What is trained are the parameters of programs that are modules (or their methods, or partial
    functions of them), and those that a program shows to Pyro (``pyro.module``, ``pyro.param``).
    :func:`pyro_ext.poutine.frozen` keeps a program as it is.

    :param model: a Pyro model with observations.
    :param encoder: a Pyro program that samples all latent sites of the model.
    :param kernels: one for each block, in the order of the updates: functions of ``(latents,
        *args)``, :class:`ExactBlock`, or :class:`WithFactors`, which makes updates of small parts
        of large models cheap. Where the number of blocks depends on the data, a
        function of ``(*args)`` that returns them; ``functools.partial`` makes one kernel serve
        many blocks. Empty for reweighted wake-sleep, with ``num_sweeps=1``.
    :param optim: an optimizer of Pyro, or one of torch for ``objective.parameters()``; only
        needed by :meth:`step`.
    :param int num_particles: number L of particles.
    :param int num_sweeps: number K of sweeps; the draw from the encoder is the first.
    :param resampler: "systematic", "multinomial", a function of log-weights and a number of
        ancestors, or ``None`` to never resample.
    :param batch_plate: name of the plate of the data sets, if there are several.
    :param local_plates: names of plates whose elements are independent given all latents
        outside of them. A block inside of one is trained with weights of its own for every
        element, without which blocks of many elements hardly train.
    :param int model_sweeps: how many of the last sweeps the parameters of the model are trained
        on, by default all. Particles of early sweeps are far from the posterior, and a model that
        is trained on them learns to explain these.
    :raises ValueError: if a setting is out of its range; at the first run, if the programs do not
        fit together, naming the site and what to do.

    Reference: Wu, Zimmermann, Sennesh, Le and van de Meent 2020, "Amortized Population Gibbs
    Samplers with Neural Sufficient Statistics", algorithm 3 and eq. 9.

    >>> from pyro_ext.infer import APG
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    ...     precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
    ...     with pyro.plate("points", len(x)):
    ...         pyro.sample("x", dist.Normal(mean, precision.rsqrt()), obs=x)
    >>> class Proposals(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.network = torch.nn.Linear(2, 2)
    ...     def encode(self, x):
    ...         mean = pyro.sample("mean", dist.Normal(x.mean(), 1.0))
    ...         self.update_precision({"mean": mean}, x)
    ...     def update_mean(self, latents, x):
    ...         variance = 1 / (1 / 9 + len(x) * latents["precision"])  # the exact conditional
    ...         loc = variance * latents["precision"] * x.sum()
    ...         pyro.sample("mean", dist.Normal(loc, variance.sqrt()))
    ...     def update_precision(self, latents, x):
    ...         distance = (x - latents["mean"]).square().sum(-1, keepdim=True)  # over the points
    ...         features = torch.stack([distance, distance.log()], -1)
    ...         concentration, rate = self.network(features).exp().unbind(-1)
    ...         pyro.sample("precision", dist.Gamma(concentration, rate))
    >>> own = Proposals()
    >>> optim = pyro.optim.Adam({"lr": 0.01})
    >>> apg = APG(model, own.encode, [own.update_mean, own.update_precision], optim)
    >>> x = 2 + torch.randn(20)
    >>> losses = [apg.step(x) for _ in range(10)]
    >>> posterior = apg.sample(x, num_particles=100, num_sweeps=20)
    >>> posterior.samples["mean"].shape, posterior.log_evidence.shape
    (torch.Size([100, 1]), torch.Size([]))
    >>> posterior.expectation(lambda latents: latents["mean"]).shape
    torch.Size([1])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        kernels: Kernels,
        optim: PyroOptim | torch.optim.Optimizer | None = None,
        *,
        num_particles: int = 10,
        num_sweeps: int = 10,
        resampler: str | Resampler | None = "systematic",
        batch_plate: str | None = None,
        local_plates: Collection[str] = (),
        model_sweeps: int | None = None,
    ) -> None:
        _check_programs(model, encoder, kernels)
        if isinstance(local_plates, str):
            local_plates = (local_plates,)
        _check_number("num_particles", num_particles, 2)
        _check_number("num_sweeps", num_sweeps, 1)
        if model_sweeps is not None:
            _check_number("model_sweeps", model_sweeps, 1)
            if model_sweeps > num_sweeps:
                raise ValueError(
                    f"model_sweeps={model_sweeps}, but there are only num_sweeps={num_sweeps}."
                )
        if num_sweeps > 1 and not callable(kernels) and not kernels:
            raise ValueError(
                f"num_sweeps={num_sweeps}, but there are no kernels to sweep with. Give kernels, "
                "or num_sweeps=1 for reweighted wake-sleep."
            )
        if not isinstance(optim, PyroOptim | torch.optim.Optimizer | None):
            raise TypeError(
                f"optim={optim!r}: give an optimizer of pyro.optim, or one of torch.optim made "
                "for apg.objective.parameters()."
            )
        self.optim = optim
        self.objective = APGObjective(
            model,
            encoder,
            kernels,
            num_particles=num_particles,
            num_sweeps=num_sweeps,
            resampler=_resampler(resampler),
            batch_plate=batch_plate,
            local_plates=tuple(local_plates),
            model_sweeps=model_sweeps,
        )

    def step(self, *args: Any, **kwargs: Any) -> float:
        """
        Run the sampler once, and take one step of the optimizer.

        :param args: the model's positional arguments.
        :param kwargs: the model's keyword arguments.
        :returns: the loss, which is no bound of anything: judge training by
            :meth:`diagnostics`.
        :raises ValueError: if there is no optimizer or nothing to train.
        """
        if self.optim is None:
            raise ValueError("step needs an optimizer: APG(..., optim=pyro.optim.Adam({...})).")
        loss, pairs = self.objective.gradients(*args, **kwargs)
        trained = {p: gradient for p, gradient in pairs if gradient is not None}
        if not trained:
            raise ValueError(
                "There is nothing to train: no program is a module, and none shows parameters to "
                "Pyro. Use pyro.module(name, network) in the program, or only apg.sample(...)."
            )
        for parameter, gradient in trained.items():
            parameter.grad = gradient
        if isinstance(self.optim, PyroOptim):
            parameters: Any = set(trained)
            self.optim(parameters)
            zero_grads(parameters)
        else:
            self.optim.step()
            self.optim.zero_grad()
        return loss.item()

    @torch.no_grad()
    def sample(
        self,
        *args: Any,
        num_particles: int | None = None,
        num_sweeps: int | None = None,
        **kwargs: Any,
    ) -> WeightedSamples:
        """
        Draw weighted samples of the posterior.

        :param args: the model's positional arguments.
        :param num_particles: number of particles, by default as in training.
        :param num_sweeps: number of sweeps, by default as in training; more are better.
        :param kwargs: the model's keyword arguments.
        :raises ValueError: if the programs do not fit together.
        :raises DegenerateWeightsError: if all particles of a data set have weight zero.
        """
        self._check_sizes(num_particles, num_sweeps)
        num_blocks = len(self.objective.programs(args, kwargs).structure.blocks)
        run = self.objective.run(args, kwargs, num_particles, num_sweeps)
        particles, history = record_history(run, num_blocks)
        return WeightedSamples(particles.latents, particles.log_weights, history)

    def sweeps(
        self,
        *args: Any,
        num_particles: int | None = None,
        num_sweeps: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Particles]:
        """
        The population after every sweep, as it comes, the draw from the encoder first.

        :param args: the model's positional arguments.
        :param num_particles: number of particles, by default as in training.
        :param num_sweeps: number of sweeps, by default as in training.
        :param kwargs: the model's keyword arguments.
        """
        self._check_sizes(num_particles, num_sweeps)
        with torch.no_grad():
            num_blocks = len(self.objective.programs(args, kwargs).structure.blocks)
        run = self.objective.run(args, kwargs, num_particles, num_sweeps)
        number = 0
        while True:
            with torch.no_grad():
                update = next(run, None)
            if update is None:
                return
            if number == 0 or number % num_blocks == 0:
                yield update.particles
            number += 1

    def diagnostics(self) -> dict[str, Any]:
        """
        How the latest :meth:`step` went, averaged over data sets.

        :returns: ``log_joint`` after every sweep and ``log_evidence`` as lists, ``ess`` by block
            as a fraction of the particles, averaged over sweeps, and ``local_ess`` per element.
        :raises ValueError: if there was none.
        """
        history = self.objective.history
        if history is None:
            raise ValueError("diagnostics() describes the latest step: call step(...) first.")

        def per_sweep(value: Tensor) -> list[float]:
            return value.flatten(1).mean(1).tolist() if value.dim() > 1 else value.tolist()

        return {
            "log_joint": per_sweep(history.log_joint),
            "log_evidence": per_sweep(history.log_evidence),
            "ess": {name: value.mean().item() for name, value in history.ess.items()},
            "local_ess": {name: v.mean().item() for name, v in history.local_ess.items()},
        }

    def _check_sizes(self, num_particles: int | None, num_sweeps: int | None) -> None:
        if num_particles is not None:
            _check_number("num_particles", num_particles, 1)
        if num_sweeps is not None:
            _check_number("num_sweeps", num_sweeps, 1)


def _check_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def _check_programs(model: Any, encoder: Any, kernels: Any) -> None:
    for name, program in (("model", model), ("encoder", encoder)):
        if not callable(program):
            raise TypeError(f"{name}={program!r}: give a Pyro program, a function.")
    if isinstance(kernels, ExactBlock):
        raise TypeError(f"kernels={kernels!r}: give a list of kernels, [{kernels!r}].")
    if callable(kernels):
        return
    for kernel in kernels:
        if not callable(kernel) and not isinstance(kernel, ExactBlock | WithFactors):
            raise TypeError(
                f"kernels has {kernel!r}: give functions, ExactBlock(...) or WithFactors(...)."
            )


def _resampler(resampler: str | Resampler | None) -> Resampler | None:
    if resampler is None or callable(resampler):
        return resampler
    if resampler not in RESAMPLERS:
        near = difflib.get_close_matches(str(resampler), RESAMPLERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"resampler={resampler!r}: choose one of {sorted(RESAMPLERS)}, None or a "
            f"function.{hint}"
        )
    return RESAMPLERS[resampler]
