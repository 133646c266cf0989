"""The training that the flows of all libraries go through."""

from __future__ import annotations

import copy
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.peers.spline_flows import BuiltFlow

MAX_GRADIENT_NORM = 5.0


class Data(NamedTuple):
    """Standardised data; log-densities of them plus the offset are in the wanted units."""

    train: Tensor
    test: Tensor
    offset: float
    mean: Tensor
    std: Tensor
    validation: Tensor | None = None


class Training(NamedTuple):
    steps: int
    batch: int
    learning_rate: float
    cpu_seconds: float = math.inf  # stop then, if the steps are not done
    evaluate_every: int = 50  # only with validation data
    patience: int = 10  # evaluations without improvement


class Fit(NamedTuple):
    """What happened in the training."""

    steps: int
    skipped: int  # loss or gradient was not finite
    cpu_seconds: float
    best_step: int  # whose weights were kept


def fit(flow: BuiltFlow, data: Data, training: Training, seed: int) -> Fit:
    """Maximum likelihood in place; the weights that are best on validation data, if there are."""
    optimizer = torch.optim.Adam(flow.module.parameters(), lr=training.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    best_value, best_step, best_weights = -math.inf, 0, None
    start, step, skipped = time.process_time(), 0, 0
    flow.module.train()
    while step < training.steps:
        spent = (time.process_time() - start) / training.cpu_seconds
        if spent >= 1:
            break
        done = max(step / training.steps, spent)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        rows = torch.randint(len(data.train), (training.batch,), generator=generator)
        skipped += not take_step(flow, optimizer, data.train[rows])
        step += 1
        if data.validation is not None and step % training.evaluate_every == 0:
            value = float(log_densities(flow, data.validation).mean())
            if value > best_value:
                best_value, best_step = value, step
                best_weights = copy.deepcopy(flow.module.state_dict())
            elif step - best_step >= training.patience * training.evaluate_every:
                break
    if best_weights is not None:
        flow.module.load_state_dict(best_weights)
    return Fit(step, skipped, time.process_time() - start, best_step or step)


def take_step(flow: BuiltFlow, optimizer: torch.optim.Optimizer, x: Tensor) -> bool:
    """One step on a minibatch, unless loss or gradient are not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss = -flow.log_prob(x).mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(flow.module.parameters(), MAX_GRADIENT_NORM)
    is_finite = bool(loss.isfinite() & norm.isfinite())
    if is_finite:
        optimizer.step()
    return is_finite


def log_densities(flow: BuiltFlow, x: Tensor) -> Tensor:
    was_training = flow.module.training
    flow.module.eval()
    with torch.no_grad():
        values = torch.cat([flow.log_prob(part) for part in x.split(4096)]).double()
    flow.module.train(was_training)
    return values


def standardized(
    train: Tensor, test: Tensor, validation: Tensor | None = None, offset: float = 0.0
) -> Data:
    """In float32; an offset is for data that have been scaled before."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-3)

    def scaled(x: Tensor) -> Tensor:
        return ((x - mean) / std).float()

    return Data(
        scaled(train),
        scaled(test),
        offset - float(std.log().sum()),
        mean,
        std,
        None if validation is None else scaled(validation),
    )
