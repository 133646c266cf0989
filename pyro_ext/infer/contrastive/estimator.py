"""What all estimators share: simulate, fit, ask for a posterior, in one round or several."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import PyroExtError
from ...training import FitResult, fit_density
from .inspection import inspect_model
from .losses import Batch
from .observations import ObservationEncoder, flatten, flatten_one
from .posterior import Posterior
from .posteriors import RatioPosterior
from .simulations import Simulations, join, make_simulations
from .simulator import Simulator
from .sites import constrain, is_inside, unconstrain, without_transforms
from .workers import simulate_in_processes

__all__ = ["CAUTIOUS_LEARNING_RATE", "ContrastiveEstimator"]

CAUTIOUS_LEARNING_RATE = 2e-3
"""Step size for networks that nothing is known of."""

_MIN_BATCH = 100
_EMA_DECAY = 0.98
_FEW = 1000


class ContrastiveEstimator(nn.Module):
    r"""
    Base class of estimators that learn a posterior from simulations alone.

    Every estimator is a function :math:`f(\theta, x) = \log p(x \mid \theta) + c(x)` (Durkan et
    al. 2020, eq. 15), and differs from the others in what :math:`f` is made of.

    :param model: a Pyro model without arguments (bind them by :func:`functools.partial`), whose
        latent sites are the prior and whose observed sites are the simulator's output, drawn or
        deterministic. Observations in the model are taken out.
    :param observed: names of the observed sites.
    :param latents: names of the latent sites to infer, or patterns as ``"rate_*"``; all when
        ``None``.
    :param nuisance: names or patterns of latent sites that are not inferred, but averaged over:
        the noise inside a simulator.
    :param embedding: a network for the observed site, or several by site. It gets standardised
        values with a leading dimension, runs once per observation, and is trained with the rest.
    :param vectorize: ``"vmap"`` for models written for one run, ``"plate"`` for those written
        for batches, ``"loop"``; ``None`` takes the first that works.
    :param float max_failed: largest fraction of failed runs that is no error.
    :param str support: ``"transform"`` for vectors of unconstrained latents, ``"reject"`` for
        the latents as they are.
    """

    num_steps: ClassVar[int] = 400
    """Steps of a fit by default, in the first round."""
    num_further_steps: ClassVar[int] = 200
    """The same in further rounds, whose networks know most of what there is to learn."""
    num_minibatches: ClassVar[int] = 10
    """Minibatches of a pass by default, where each has some hundred simulations or more."""
    patience: ClassVar[int] = 10
    """Passes without improvement after which a fit stops by default."""

    is_standardized: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        model: Callable[[], Any],
        *,
        observed: Sequence[str],
        latents: Collection[str] | None = None,
        nuisance: Collection[str] = (),
        embedding: nn.Module | Mapping[str, nn.Module] | None = None,
        vectorize: str | None = None,
        max_failed: float = 0.5,
        support: str = "transform",
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be a Pyro model, got {type(model).__name__}.")
        if not 0.0 <= max_failed < 1.0:
            raise ValueError(f"max_failed={max_failed!r}: give a fraction of at least 0, below 1.")
        if support not in ("transform", "reject"):
            raise ValueError(f"support={support!r}: give 'transform' or 'reject'.")
        structure = inspect_model(model, observed, latents, nuisance)
        self.structure = without_transforms(structure) if support == "reject" else structure
        self.simulator = Simulator(model, self.structure, vectorize)
        self.max_failed = max_failed
        self.learning_rate = 5e-3 if embedding is None else CAUTIOUS_LEARNING_RATE
        """Step size that a fit starts from by default."""
        self.simulations: Simulations | None = None
        """All simulations so far, ``None`` before the first."""
        self.encoder = ObservationEncoder(self.structure, embedding)
        like = torch.zeros((), dtype=self.structure.dtype, device=self.structure.device)
        self.register_buffer("is_standardized", torch.tensor(False, device=like.device))
        self.register_buffer("loc", like.expand(self.structure.features).clone())
        self.register_buffer("scale", torch.ones_like(self.loc))

    def simulate(
        self,
        num_simulations: int,
        proposal: Posterior | None = None,
        *,
        batch_size: int = 1000,
        num_workers: int = 0,
        timeout: float | None = None,
        mp_context: str | None = None,
    ) -> Simulations:
        """
        Run the model, and add the simulations to those that there are.

        A run that raises, or whose observations are not finite, has failed. It stays among the
        simulations: see :func:`~pyro_ext.infer.contrastive.losses.contrastive_loss`.

        :param int num_simulations: number of runs.
        :param Posterior proposal: where latents are drawn from; the prior when ``None``.
        :param int batch_size: runs at once.
        :param int num_workers: processes to run in, 0 for this one. The model then has to be one
            that can be sent to them, which for ``mp_context="fork"`` is any.
        :param timeout: seconds after which a run has failed; needs ``num_workers``.
        :param mp_context: how processes are started; Python's default when ``None``.
        :returns: the new simulations.
        :raises ~pyro_ext.errors.PyroExtError: if more than ``max_failed`` of the runs failed.
        """
        _check_counts(num_simulations=num_simulations, batch_size=batch_size)
        if num_workers < 0 or (timeout is not None and (not num_workers or timeout <= 0)):
            raise ValueError(
                f"num_workers={num_workers} and timeout={timeout}: a time limit is a positive "
                "number of seconds and needs processes that can be stopped, num_workers >= 1."
            )
        if proposal is None:
            unconstrained = self.simulator.draw_prior(num_simulations)
        else:
            unconstrained = proposal.draw_unconstrained(num_simulations)
        if num_workers:
            outcome = simulate_in_processes(
                self.simulator,
                unconstrained,
                num_workers=num_workers,
                batch_size=batch_size,
                timeout=timeout,
                mp_context=mp_context,
            )
            observations, failure = outcome.observations, outcome.failure
        else:
            parts = [self.simulator.simulate(u) for u in unconstrained.split(batch_size)]
            failure = next((part.failure for part in parts if part.failure), "")
            observations = {
                name: torch.cat([part.observations[name] for part in parts])
                for name in self.structure.observed_names
            }
        new = make_simulations(
            constrain(unconstrained, self.structure),
            observations,
            self.structure,
            0 if proposal is None else self._next_round(),
        )
        self._check_failures(new, failure)
        self.simulations = join(self.simulations, new)
        return new

    def add_simulations(
        self,
        latents: Mapping[str, Tensor],
        observations: Mapping[str, Tensor],
        *,
        from_prior: bool = True,
    ) -> Simulations:
        """
        Add simulations that were made elsewhere or before.

        :param latents: values of the latent sites, shape ``(runs, ...)``.
        :param observations: values of the observed sites; not finite where a run failed.
        :param bool from_prior: whether the latents are draws from the model's prior. If not,
            they are taken for a further round.
        :returns: the new simulations.
        :raises ValueError: if sites or shapes are not those of the model, or latents are outside
            of the prior's support.
        """
        round_index = 0 if from_prior else self._next_round()
        new = make_simulations(latents, observations, self.structure, round_index)
        for site in self.structure.latents:
            inside = is_inside(new.latents, self.structure._replace(latents=(site,)))
            if not bool(inside.all()):
                raise ValueError(
                    f"Latent site {site.name!r} has {int((~inside).sum())} of {len(inside)} "
                    f"values outside of its support {site.support}. Leave these rows out: there "
                    "is no density there."
                )
        self._check_failures(new, "")
        self.simulations = join(self.simulations, new)
        return new

    def fit(
        self,
        *,
        num_epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> FitResult:
        """
        Train on all simulations, from where the networks are.

        Location and scale of latents and observations are taken from the simulations of the
        first fit, and outliers among the observations are drawn in, see
        :class:`~pyro_ext.infer.contrastive.observations.ObservationEncoder`. A part of the
        simulations is held out, the same one in every fit, and the weights that are best on it
        are kept, where weights are averages over some fifty steps.
        See :func:`~pyro_ext.training.fit_density`, which does it.

        :param num_epochs: passes over the simulations at most; the step size falls to zero over
            them. When ``None``, as many as make :attr:`num_steps` steps, or
            :attr:`num_further_steps` in further rounds.
        :param batch_size: simulations in a minibatch, among which each observation finds its
            contrasting parameters. When ``None``, 100 or more, so that a pass over many
            simulations has :attr:`num_minibatches`.
        :param learning_rate: step size of Adam at the start. When ``None``,
            :attr:`learning_rate`, which is small for networks of your own, and for others in
            proportion to the number of simulations where there are fewer than a thousand.
        :param float weight_decay: weight of the penalty on squared weights.
        :param float validation_fraction: of the simulations that is held out.
        :param patience: stop after this many epochs in a row without improvement; when ``None``,
            after :attr:`patience`.
        :param bool progress: show a progress bar.
        :param checkpoint: path of a file that the state is written to, and resumed from.
        :param generator: draws the minibatches; torch's global generator when ``None``.
        :raises ValueError: if there are too few simulations, or a setting is out of its range.
        """
        simulations = self._checked_simulations()
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction={validation_fraction!r}: give a number between 0 and 1."
            )
        num = len(simulations.is_valid)
        is_held_out = _held_out(num, validation_fraction)
        num_validation = int(is_held_out.sum())
        num_train = num - num_validation
        batch_size, num_epochs = self._batch_size_and_epochs(num_train, batch_size, num_epochs)
        if num_train < batch_size:
            raise ValueError(
                f"There are {num} simulations, of which {num_validation} are held out: too few "
                f"for minibatches of batch_size={batch_size}. Simulate more, or make it smaller."
            )
        packed, flat = self._training_data(simulations)
        is_held_out = is_held_out.to(flat.device)
        steps_per_epoch = num_train // batch_size
        return fit_density(
            self,
            packed[~is_held_out],
            context=flat[~is_held_out],
            validation=(packed[is_held_out], flat[is_held_out]),
            num_steps=num_epochs * steps_per_epoch,
            batch_size=batch_size,
            learning_rate=self._step_size(num) if learning_rate is None else learning_rate,
            weight_decay=weight_decay,
            evaluate_every=steps_per_epoch,
            patience=self.patience if patience is None else patience,
            # weights of one step are too noisy to be chosen among, at step sizes like these
            ema_decay=_EMA_DECAY,
            loss=_loss,
            progress=progress,
            checkpoint=checkpoint,
            generator=generator,
        )

    def posterior(self, observations: Tensor | Mapping[str, Tensor]) -> Posterior:
        """
        The latents given one observation.

        :param observations: values by site, or the value of the only site.
        :raises ValueError: if a site is missing or has another shape, or before training.
        """
        if not bool(self.is_standardized):
            raise ValueError("There is no posterior yet: call simulate(...) and fit() first.")
        flat = flatten_one(observations, self.structure)
        self.encoder.warn_if_far(flat)
        was_training = self.training
        self.eval()
        with torch.no_grad():
            features = self._encode(flat[None])
        self.train(was_training)
        return self._make_posterior(features, flat)

    def run_rounds(
        self,
        observations: Tensor | Mapping[str, Tensor],
        *,
        num_rounds: int = 5,
        num_simulations: int = 1000,
        simulate_options: Mapping[str, Any] | None = None,
        **fit_options: Any,
    ) -> Posterior:
        """
        Simulate where the posterior is, round by round.

        The first round draws from the prior, unless there are simulations already; every further
        one draws from the latest posterior. All simulations are trained on. What is learned
        holds for this observation, not for others.

        Reference: Durkan et al. 2020, algorithm 1.

        :param observations: values by site, or the value of the only site.
        :param int num_rounds: number R of rounds.
        :param int num_simulations: simulations N of each round.
        :param simulate_options: options of :meth:`simulate`.
        :param fit_options: options of :meth:`fit`.
        :returns: the posterior after the last round.
        """
        _check_counts(num_rounds=num_rounds, num_simulations=num_simulations)
        flatten_one(observations, self.structure)
        posterior = self.posterior(observations) if bool(self.is_standardized) else None
        for _ in range(num_rounds):
            self.simulate(num_simulations, posterior, **(simulate_options or {}))
            self.fit(**fit_options)
            posterior = self.posterior(observations)
        if posterior is None:
            raise ValueError("num_rounds must be at least 1.")
        return posterior

    @abstractmethod
    def log_ratio(self, latents: Tensor, log_prior: Tensor, features: Tensor) -> Tensor:
        r"""
        :math:`f(\theta, x) = \log p(x \mid \theta) + c(x)`.

        :param Tensor latents: unconstrained, shape ``batch + (d,)``.
        :param Tensor log_prior: log-density of the prior there, shape ``batch``.
        :param Tensor features: of the observations, with leading dimensions that broadcast
            against ``batch``.
        :returns: shape ``batch``.
        """

    @abstractmethod
    def loss(self, batch: Batch, flat: Tensor) -> Tensor:
        """
        What is minimised.

        :param Batch batch: simulations.
        :param Tensor flat: their observations, shape ``(rows, in_features)``.
        """

    def _make_posterior(self, features: Tensor, flat: Tensor) -> Posterior:
        """The posterior given features of an observation."""
        return RatioPosterior(self.simulator, self.log_ratio, features, flat)

    def _encode(self, flat: Tensor) -> Tensor:
        """What :meth:`log_ratio` takes for an observation."""
        features: Tensor = self.encoder(flat)
        return features

    def _standardize(self, latents: Tensor, flat: Tensor) -> None:
        """Take from the first simulations what networks need to know beside their scale."""

    def _num_contrasted(self) -> int:
        """How many parameters each observation is tried with."""
        return 1

    def _effort(self) -> float:
        """What minibatches and numbers of steps are by default, relative to the usual."""
        return 1.0

    def _before_fit(self, is_valid: Tensor) -> None:
        """Take notice of the simulations that failed."""

    def _training_data(self, simulations: Simulations) -> tuple[Tensor, Tensor]:
        """Simulations as two matrices, with something finite where a run failed."""
        latents = unconstrain(simulations.latents, self.structure)
        is_valid = simulations.is_valid
        flat = flatten(simulations.observations, self.structure)
        if not bool(self.is_standardized):
            self.loc.copy_(latents.mean(0))
            self.scale.copy_(latents.std(0).clamp(min=torch.finfo(latents.dtype).tiny))
            self.encoder.standardize(flat[is_valid])
            self._standardize(latents, flat[is_valid])
            self.is_standardized.fill_(True)
        self._before_fit(is_valid)
        flat = torch.where(is_valid[:, None], flat, self.encoder.loc)
        with torch.no_grad():
            log_prior = torch.cat([self.simulator.log_prior(u) for u in latents.split(10_000)])
        batch = Batch(latents, log_prior, is_valid, simulations.round == 0)
        return batch.pack(), flat

    def _batch_size_and_epochs(
        self, num_train: int, batch_size: int | None, num_epochs: int | None
    ) -> tuple[int, int]:
        num_contrasted, factor = self._num_contrasted(), self._effort()
        if batch_size is None:
            rows = factor * max(_MIN_BATCH, num_train // self.num_minibatches)
            batch_size = max(num_contrasted, min(round(rows), num_train))
        _check_counts(batch_size=batch_size)
        if batch_size < num_contrasted:
            raise ValueError(
                f"num_atoms={num_contrasted} parameters to choose from, but batch_size="
                f"{batch_size}: contrasting parameters are the others of a minibatch."
            )
        if num_epochs is None:
            num_steps = self.num_further_steps if self._has_proposals() else self.num_steps
            num_epochs = -(-round(num_steps * factor) // max(1, num_train // batch_size))
        _check_counts(num_epochs=num_epochs)
        return batch_size, num_epochs

    def _step_size(self, num: int) -> float:
        if self.learning_rate <= CAUTIOUS_LEARNING_RATE:
            return self.learning_rate
        # few simulations are learned by heart within some tens of large steps
        return self.learning_rate * min(1.0, num / _FEW)

    def _has_proposals(self) -> bool:
        """Whether there are simulations from other than the prior."""
        return self.simulations is not None and bool((self.simulations.round > 0).any())

    def _next_round(self) -> int:
        return 1 if self.simulations is None else int(self.simulations.round.max()) + 1

    def _checked_simulations(self) -> Simulations:
        if self.simulations is None:
            raise ValueError("There is nothing to train on: call simulate(...) first.")
        return self.simulations

    def _check_failures(self, new: Simulations, failure: str) -> None:
        num, num_failed = len(new.is_valid), new.num_failed
        if num_failed > self.max_failed * num:
            reason = failure or "observations with NaN or infinite values"
            raise PyroExtError(
                f"{num_failed} of {num} simulations failed ({reason}), more than the fraction "
                f"max_failed={self.max_failed}. Narrow the prior to where the simulator works, "
                "mend it, or allow more failures if they are what it should do there."
            )


def _loss(estimator: nn.Module, packed: Tensor, flat: Tensor | None) -> Tensor:
    if not isinstance(estimator, ContrastiveEstimator) or flat is None:
        raise TypeError("The loss is that of an estimator and its observations.")
    return estimator.loss(Batch.unpack(packed), flat)


def _held_out(num: int, fraction: float) -> Tensor:
    """
    Which rows are held out: at even distances, so that every round has its share of them.

    The same ones however many more there are: a row that networks were once trained on would
    make them look better than they are.
    """
    before = (torch.arange(num + 1, dtype=torch.float64) * fraction).ceil()
    return before.diff() > 0


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
