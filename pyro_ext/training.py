"""Fit densities to data by maximum likelihood, or by a loss of your own."""

from __future__ import annotations

import inspect
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .averaging import averaged, update_average
from .errors import PyroExtError
from .training_data import Data, checked_data

__all__ = ["FitResult", "Loss", "fit_density"]

Loss = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
"""A scalar to minimise, from the flow, a batch of data and the context of its rows or ``None``."""

_MAX_SKIPPED_IN_A_ROW = 10


class FitResult(NamedTuple):
    """What happened in a fit; the weights are in the flow itself."""

    losses: Tensor
    """Loss of every step on its minibatch, shape ``(steps,)``; not finite where it was skipped."""

    validation_steps: Tensor
    """Steps taken before each evaluation on the validation data, shape ``(evaluations,)``."""

    validation_log_likelihoods: Tensor
    """Mean log-likelihood of a validation row at each evaluation, in nats, shape
    ``(evaluations,)``; with a loss of your own, minus the loss."""

    best_step: int
    """Steps after which the weights in the flow were reached."""

    stopped_early: bool
    """Whether the validation log-likelihood stopped improving for as long as ``patience``."""

    num_skipped: int
    """Steps that were skipped because the loss or its gradient was not finite."""

    seconds: float
    """Time taken, over all resumed parts."""


def fit_density(
    flow: nn.Module,
    train: Tensor,
    *,
    context: Tensor | None = None,
    validation: Tensor | tuple[Tensor, Tensor] | None = None,
    num_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.0,
    max_gradient_norm: float | None = 5.0,
    evaluate_every: int = 250,
    patience: int | None = None,
    ema_decay: float | None = None,
    loss: Loss | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
) -> FitResult:
    r"""
    Fit a density to data, in place.

    Minimises the mean of :math:`-\log q(x \mid c)` over minibatches with Adam (Kingma and Ba
    2015), clipped gradients, and a step size that falls to zero along half a cosine (Loshchilov
    and Hutter 2017). With validation data the flow ends with the weights that were best on it,
    otherwise with the last ones. A step whose loss or gradient is not finite is skipped.

    Minibatches are cast to the dtype and moved to the device of the flow's parameters; the data
    may stay elsewhere. Every row is used at most once before all are shuffled again. If the flow
    has a method ``initialize(x)`` or ``initialize(x, context)``, for layers that start from data,
    it is called once with the first minibatch before the first step, unless ``is_initialized``
    of the flow says that it was called before: a second fit goes on where the first one ended.

    Interrupted by Ctrl-C, it returns with a warning and keeps what was reached.

    :param nn.Module flow: ``flow()``, or ``flow(context)``, returns a distribution.
    :param Tensor train: data, one row per example, shape ``(n,) + event_shape``.
    :param Tensor context: what each row is conditioned on, shape ``(n, context_features)``.
    :param validation: further data to choose the weights by; ``(x, context)`` with a context.
    :param int num_steps: minibatches to train on.
    :param int batch_size: rows of a minibatch; all rows where there are fewer.
    :param float learning_rate: step size of Adam at the start.
    :param float weight_decay: weight of the penalty on squared weights.
    :param max_gradient_norm: longer gradients are shortened to this norm; ``None`` for never.
    :param int evaluate_every: steps between evaluations, and between writes of the checkpoint.
    :param patience: stop after this many evaluations in a row without improvement.
    :param ema_decay: average weights over steps, each of them counting this much less than the
        next, 0.999 say: the averages are what is evaluated on the validation data, and what the
        flow ends with; ``None`` for the weights themselves.
    :param loss: scalar to minimise instead, called as ``loss(flow, x, context)``.
    :param bool progress: show a progress bar with the running loss and the last evaluation.
    :param checkpoint: path of a file that the state is written to, and resumed from where it
        exists. A resumed fit gives the numbers of an uninterrupted one: the file also holds the
        state of the random number generators, which is put back.
    :param generator: draws the minibatches; torch's global generator when ``None``.
    :returns: the history of the fit.
    :raises ValueError: for data with NaN or infinite values or without rows, for rows that do not
        match, for settings out of range, and for a checkpoint of other settings or data.
    :raises TypeError: for data that are not floating-point tensors.
    :raises PyroExtError: after ten steps in a row whose loss or gradient was not finite.

    Example::

        >>> from pyro_ext.training import fit_density
        >>> class Normal(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = torch.nn.Parameter(torch.zeros(2))
        ...     def forward(self):
        ...         return dist.Normal(self.mean, 1.0).to_event(1)
        >>> data = 3.0 + torch.randn(1000, 2)
        >>> flow = Normal()
        >>> result = fit_density(flow, data, num_steps=300, learning_rate=0.1, progress=False)
        >>> (flow.mean - data.mean(0)).abs().max() < 0.1
        tensor(True)
    """
    parameters = _checked_parameters(flow)
    data, held_out = checked_data(train, context, validation)
    settings = {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "max_gradient_norm": max_gradient_norm,
        "evaluate_every": evaluate_every,
        "patience": patience,
    }
    if ema_decay is not None:
        settings["ema_decay"] = ema_decay
    _check_settings(settings, held_out)
    settings |= {"batch_size": min(batch_size, len(train)), "rows": len(train)}
    # one kernel for all tensors where there is one: many small ones take as long as the rest
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = torch.optim.Adam(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused
    )
    run = _Run(flow, optimizer, generator, settings)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        if not path.parent.is_dir():
            raise ValueError(f"checkpoint={str(path)!r}: there is no folder {path.parent}.")
        # a fit that is done would otherwise answer for other data of the same size
        settings["checksum of the data"] = data.checksum()
    was_training = flow.training
    flow.train()
    # Pyro shows no bars in continuous integration either
    bar = tqdm(total=num_steps, disable=not progress or "CI" in os.environ, dynamic_ncols=True)
    try:
        if path is not None and path.exists():
            run.load(path)
        bar.update(run.step)
        _train(run, data, held_out, loss or _negative_log_likelihood, path, bar)
    except KeyboardInterrupt:
        if run.step == 0:
            raise
        if path is not None and run.is_consistent:
            run.save(path)
        warnings.warn(
            f"Interrupted after {run.step} of {num_steps} steps; what was reached is kept.",
            stacklevel=2,
        )
    finally:
        bar.close()
        if run.best_weights is not None:
            flow.load_state_dict(run.best_weights)
        elif run.average is not None:
            flow.load_state_dict(run.average, strict=False)
        flow.train(was_training)
    return run.result()


@dataclass
class _Run:
    """All that changes during a fit, and how it is stored."""

    flow: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator | None
    settings: dict[str, Any]

    step: int = 0
    order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    position: int = 0
    losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_values: list[float] = field(default_factory=list)
    average: dict[str, Tensor] | None = None
    best_weights: dict[str, Tensor] | None = None
    best_step: int = 0
    skipped_in_a_row: int = 0
    num_skipped: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    random_state: dict[str, Tensor] = field(default_factory=dict)
    is_consistent: bool = True

    def __post_init__(self) -> None:
        # a walk through all modules at every step would cost as much as the average itself
        self.weights: dict[str, Tensor] = dict(self.flow.named_parameters())

    @property
    def parameter(self) -> Tensor:
        """One of the parameters, for its dtype and device."""
        first: Tensor = self.optimizer.param_groups[0]["params"][0]
        return first

    def next_batch(self) -> Tensor:
        """Row numbers of the next minibatch, the same until :attr:`position` moves on."""
        num_rows, batch_size = self.settings["rows"], self.settings["batch_size"]
        if self.position + batch_size > len(self.order):
            device = "cpu" if self.generator is None else self.generator.device
            shuffled = torch.randperm(num_rows, generator=self.generator, device=device)
            self.order, self.position = shuffled, 0
        self.remember_random_state()
        return self.order[self.position : self.position + batch_size]

    def remember_random_state(self) -> None:
        """Note the states of the generators, of which dropout, for one, uses torch's own."""
        self.random_state = {"torch": torch.get_rng_state()}
        if self.generator is not None:
            self.random_state["generator"] = self.generator.get_state()
        if self.parameter.is_cuda:
            self.random_state["cuda"] = torch.cuda.get_rng_state(self.parameter.device)

    def save(self, path: Path) -> None:
        """Write the state; an interrupted write leaves the file that was there."""
        state = {name: getattr(self, name) for name in self._stored()}
        state["flow"], state["optimizer"] = self.flow.state_dict(), self.optimizer.state_dict()
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Continue from a stored state."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if (stored := state["settings"]) != self.settings:
            changes = [
                f"{name} was {stored.get(name)} and is {value}"
                for name, value in self.settings.items()
                if stored.get(name) != value
            ]
            raise ValueError(
                f"The checkpoint {path} belongs to another fit: {', '.join(changes)}. Give the "
                "same settings to resume it, or another path to start anew."
            )
        self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self._stored():
            setattr(self, name, state[name])
        torch.set_rng_state(self.random_state["torch"])
        if self.generator is not None and "generator" in self.random_state:
            self.generator.set_state(self.random_state["generator"])
        if self.parameter.is_cuda and "cuda" in self.random_state:
            torch.cuda.set_rng_state(self.random_state["cuda"], self.parameter.device)

    def _stored(self) -> list[str]:
        others = {"flow", "optimizer", "generator", "is_consistent"}
        return [each.name for each in fields(self) if each.name not in others]

    def result(self) -> FitResult:
        """The history as tensors."""
        return FitResult(
            torch.tensor(self.losses, dtype=torch.float64),
            torch.tensor(self.validation_steps, dtype=torch.long),
            torch.tensor(self.validation_values, dtype=torch.float64),
            self.step if self.best_weights is None else self.best_step,
            self.stopped_early,
            self.num_skipped,
            self.seconds,
        )


def _train(
    run: _Run,
    data: Data,
    held_out: Data | None,
    loss: Loss,
    path: Path | None,
    bar: Any,
) -> None:
    """Take the steps that are left."""
    num_steps, every = run.settings["num_steps"], run.settings["evaluate_every"]
    running_loss, postfix = math.nan, {}
    earlier, start = run.seconds, time.monotonic()
    if run.step == 0:
        _initialize(run, data)
    while run.step < num_steps and not run.stopped_early:
        value = _take_step(run, data, loss)
        if math.isfinite(value):
            running_loss = (
                value if math.isnan(running_loss) else running_loss * 0.98 + value * 0.02
            )
        postfix["loss"] = f"{running_loss:.4g}"
        is_time = run.step % every == 0 or run.step == num_steps
        if is_time and held_out is not None:
            _evaluate(run, held_out, loss)
            postfix["validation"] = f"{run.validation_values[-1]:.4g}"
        run.seconds = earlier + time.monotonic() - start
        run.remember_random_state()
        run.is_consistent = True
        bar.set_postfix(postfix, refresh=False)
        bar.update()
        if path is not None and (is_time or run.stopped_early):
            run.save(path)


def _initialize(run: _Run, data: Data) -> None:
    initialize = getattr(run.flow, "initialize", None)
    if initialize is None or getattr(run.flow, "is_initialized", False):
        return
    x, context = data.rows(run.next_batch(), run.parameter)
    takes_context = len(inspect.signature(initialize).parameters) > 1
    with torch.no_grad():
        if context is not None and takes_context:
            initialize(x, context)
        else:
            initialize(x)


def _take_step(run: _Run, data: Data, loss: Loss) -> float:
    """One step of Adam on the next minibatch, and its loss."""
    fraction = run.step / run.settings["num_steps"]
    for group in run.optimizer.param_groups:
        group["lr"] = run.settings["learning_rate"] * 0.5 * (1 + math.cos(math.pi * fraction))
    batch = run.next_batch()
    run.optimizer.zero_grad()
    objective = _scalar_loss(loss, run.flow, *data.rows(batch, run.parameter))
    objective.backward()
    parameters = run.optimizer.param_groups[0]["params"]
    longest = run.settings["max_gradient_norm"]
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if longest is None else longest)
    value, gradient_norm = float(objective.detach()), float(norm)
    is_finite = math.isfinite(value) and math.isfinite(gradient_norm)
    # interrupted from here to the end of an evaluation, the state is that of neither step
    run.is_consistent = False
    if is_finite:
        run.optimizer.step()
    if (decay := run.settings.get("ema_decay")) is not None:
        run.average = update_average(run.average, run.weights, decay, run.step)
    run.skipped_in_a_row = 0 if is_finite else run.skipped_in_a_row + 1
    run.num_skipped += not is_finite
    run.losses.append(value)
    run.position += len(batch)
    run.step += 1
    if run.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
        raise PyroExtError(
            f"The loss or its gradient was not finite in {_MAX_SKIPPED_IN_A_ROW} steps in a row, "
            f"the last of them step {run.step} with loss {value} and gradient norm "
            f"{gradient_norm}. Use a smaller learning_rate or max_gradient_norm, standardise the "
            "data, or check that the density is positive everywhere the data are."
        )
    return value


def _evaluate(run: _Run, held_out: Data, loss: Loss) -> None:
    """Evaluate on the validation data, and keep the weights if they are the best so far."""
    total, num_rows = 0.0, len(held_out.x)
    rows_at_once = 4 * run.settings["batch_size"]
    run.flow.eval()
    try:
        with torch.no_grad(), averaged(run.flow, run.average):
            for rows in torch.arange(num_rows).split(rows_at_once):
                x, context = held_out.rows(rows, run.parameter)
                total -= float(_scalar_loss(loss, run.flow, x, context)) * len(x)
    finally:
        run.flow.train()
    value = total / num_rows
    best = max(filter(math.isfinite, run.validation_values), default=-math.inf)
    run.validation_steps.append(run.step)
    run.validation_values.append(value)
    if math.isfinite(value) and value > best:
        weights = run.flow.state_dict() | (run.average or {})
        run.best_weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        run.best_step = run.step
    elif (patience := run.settings["patience"]) is not None:
        since = sum(step > run.best_step for step in run.validation_steps)
        run.stopped_early = since >= patience


def _scalar_loss(loss: Loss, flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    value = loss(flow, x, context)
    if value.dim() != 0:
        raise ValueError(f"loss must return one number, got shape {tuple(value.shape)}.")
    return value


def _negative_log_likelihood(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    density = flow() if context is None else flow(context)
    log_prob: Tensor = density.log_prob(x)
    if log_prob.shape != x.shape[:1]:
        raise ValueError(
            f"log_prob of {len(x)} rows of shape {tuple(x.shape[1:])} has shape "
            f"{tuple(log_prob.shape)} instead of ({len(x)},): the flow's event_shape is "
            f"{tuple(density.event_shape)} and its batch_shape {tuple(density.batch_shape)}."
        )
    return -log_prob.mean()


def _checked_parameters(flow: nn.Module) -> list[nn.Parameter]:
    if not isinstance(flow, nn.Module):
        raise TypeError(
            f"flow must be an nn.Module whose call returns a distribution, got "
            f"{type(flow).__name__}."
        )
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(flow).__name__} has no parameters that require gradients: there is nothing "
            "to fit."
        )
    return parameters


def _check_settings(settings: dict[str, Any], held_out: Data | None) -> None:
    counts = {name: settings[name] for name in ("num_steps", "batch_size", "evaluate_every")}
    if settings["patience"] is not None:
        counts["patience"] = settings["patience"]
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    if "patience" in counts and held_out is None:
        raise ValueError("patience counts evaluations on validation data: give validation too.")
    if not 0 < settings["learning_rate"] < math.inf:
        raise ValueError(
            f"learning_rate must be a positive number, got {settings['learning_rate']}."
        )
    if not 0 <= settings["weight_decay"] < math.inf:
        raise ValueError(
            f"weight_decay must be a number of at least 0, got {settings['weight_decay']}."
        )
    if not 0 <= settings.get("ema_decay", 0.0) < 1:
        raise ValueError(
            f"ema_decay must be a number of at least 0 and below 1, got {settings['ema_decay']}."
        )
    if settings["max_gradient_norm"] is not None and not settings["max_gradient_norm"] > 0:
        raise ValueError(
            f"max_gradient_norm must be positive or None, got {settings['max_gradient_norm']}."
        )
