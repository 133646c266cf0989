"""The wake-phase objective of all proposals and of the model, as a torch module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from ...ops.resampling import Resampler
from ...poutine.frozen import FrozenMessenger
from .exact_block import ExactBlock
from .factors import WithFactors
from .locality import check_factors, check_local_blocks
from .structure import Block, Programs, Structure, inspect_programs, split_kernel
from .sweep import Update, updates
from .weighted_samples import History, record_history

__all__ = ["APGObjective", "Gradients", "Kernels", "update_loss"]

Kernels = Sequence[Callable[..., Any] | ExactBlock | WithFactors] | Callable[..., Sequence[Any]]


class Gradients(NamedTuple):
    """Loss of a run of the sampler, and its gradients."""

    loss: Tensor
    by_parameter: list[tuple[Tensor, Tensor | None]]  # None where the loss does not depend on it


def update_loss(update: Update, model_learns: bool = True) -> Tensor:
    r"""
    What an update contributes to the objective (algorithm 3, lines 5, 6, 15 and 16).

    .. math:: -\sum_l \bar w_l \left[\log q_\phi(z_b'^l \mid x, z_{-b}^l)
        + \log p_\theta(x, z^l)\right],

    averaged over data sets, with constant weights, normalised for each data set. Its gradient is
    that of the inclusive KL divergence (eq. 5) and of the negative log marginal likelihood
    (eq. 6). In the first term a block of a local plate has weights of its own for each element:
    those of a whole data set of N elements would be far from even long after each element is
    proposed well.

    :param Update update: the update.
    :param bool model_learns: whether the model's parameters have a gradient.
    :returns: a scalar.
    """
    weighed = update.weighed
    weights = torch.softmax(weighed.log_weights, 0)
    log_joint = update.log_joint if model_learns else update.log_joint.detach()
    loss = -_weighted(weights, log_joint).mean()
    if weighed.local_log_prob is not None and weighed.local_weights is not None:
        return loss - _weighted(weighed.local_weights, weighed.local_log_prob).sum(-1).mean()
    if weighed.log_prob is not None:
        return loss - _weighted(weights, weighed.log_prob).mean()
    return loss


def _weighted(weights: Tensor, log_prob: Tensor) -> Tensor:
    # a particle of weight zero may have a density of zero: 0 * -inf counts for nothing
    return torch.where(weights > 0, weights * log_prob, 0.0).sum(0)


class APGObjective(nn.Module):
    """
    Loss of amortized population Gibbs samplers.

    Made by :class:`~pyro_ext.infer.APG`, as its ``objective``. Its parameters are those of the
    modules among model, encoder and kernels, so that any optimizer of torch, ``DataParallel``
    or Lightning can train it; ``state_dict`` has what was learned. A call runs the sampler and
    returns a scalar, whose gradient is ready: it was computed update by update, because samples
    and weights are constants, so that the memory does not grow with the number of sweeps.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        kernels: Kernels,
        *,
        num_particles: int,
        num_sweeps: int,
        resampler: Resampler | None,
        batch_plate: str | None,
        local_plates: tuple[str, ...],
        model_sweeps: int | None = None,
    ) -> None:
        super().__init__()
        self._model = (model,)  # in tuples, so that only what is trained is registered
        self._encoder = (encoder,)
        self._kernels = (kernels,)
        self.num_particles, self.num_sweeps = num_particles, num_sweeps
        self.resampler = resampler
        self.batch_plate, self.local_plates = batch_plate, local_plates
        self.model_sweeps = num_sweeps if model_sweeps is None else model_sweeps
        parts: dict[str, list[Any]] = {"model": [model], "encoder": [encoder]}
        parts["kernels"] = [kernels] if callable(kernels) else list(kernels)
        self.parts = nn.ModuleDict()
        for name, part in parts.items():
            known = {id(module) for module in self.modules()}
            new = [module for module in _trained_modules(part) if id(module) not in known]
            self.parts[name] = nn.ModuleList(new)
        self.history: History | None = None
        """Figures of the latest run."""
        self._structure: Structure | None = None
        self._is_checked = False

    def programs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Programs:
        """
        Model, encoder and kernels with their arguments, looked at where they are new.

        :param args: positional arguments of the model.
        :param kwargs: keyword arguments of the model.
        :raises ValueError: if the programs do not fit together.
        """
        model, encoder, given = self._model[0], self._encoder[0], self._kernels[0]
        kernels = list(given(*args, **kwargs)) if callable(given) else list(given)
        structure = self._structure
        if structure is None or len(structure.blocks) != len(kernels):
            structure = inspect_programs(
                model, encoder, kernels, args, kwargs, self.batch_plate, self.local_plates
            )
            programs = Programs(model, encoder, args, kwargs, structure)
            check_local_blocks(programs)
            check_factors(programs)
        elif callable(given):  # new kernels for the same blocks
            pairs = zip(structure.blocks, kernels, strict=True)
            blocks = tuple(_with_kernel(block, kernel) for block, kernel in pairs)
            structure = structure._replace(blocks=blocks)
        self._structure = structure
        return Programs(model, encoder, args, kwargs, structure)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_particles: int | None = None,
        num_sweeps: int | None = None,
    ) -> Iterator[Update]:
        """
        Run the sampler, update by update.

        :param args: positional arguments of the model.
        :param kwargs: keyword arguments of the model.
        :param num_particles: as in training by default.
        :param num_sweeps: as in training by default.
        """
        return updates(
            self.programs(args, kwargs),
            self.num_particles if num_particles is None else num_particles,
            self.num_sweeps if num_sweeps is None else num_sweeps,
            self.resampler,
        )

    def loss_of(self, update: Update) -> Tensor:
        """
        What an update contributes to the objective, with the model's part in the last sweeps only.

        :param Update update: the update.
        :returns: a scalar.
        """
        return update_loss(update, update.sweep >= self.num_sweeps - self.model_sweeps)

    def gradients(self, *args: Any, **kwargs: Any) -> Gradients:
        """
        Run the sampler, and compute the loss and its gradients.

        :param args: the model's positional arguments.
        :param kwargs: the model's keyword arguments.
        :returns: loss, and pairs of parameters and gradients, also for ``pyro.param``.
        :raises ValueError: if the programs do not fit together, or have parameters that the
            objective does not know.
        """
        known: dict[int, Tensor] = {id(p): p for p in self.parameters() if p.requires_grad}
        sums: dict[int, Tensor] = {}
        losses: list[Tensor] = []

        def differentiate() -> Iterator[Update]:
            for update in self.run(args, kwargs):
                known.update({id(p): p for p in update.parameters.values()})
                loss = self.loss_of(update)
                losses.append(loss.detach())
                if loss.requires_grad:
                    if not self._is_checked:
                        _check_leaves(loss, known, update.block)
                    _accumulate(loss, known, sums)
                yield update

        with torch.enable_grad():
            structure = self.programs(args, kwargs).structure
            _, self.history = record_history(differentiate(), len(structure.blocks))
        self._is_checked = True
        pairs = [(parameter, sums.get(key)) for key, parameter in known.items()]
        return Gradients(torch.stack(losses).sum(), pairs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """
        Run the sampler, and return the loss, whose gradient is ready.

        :param args: the model's positional arguments.
        :param kwargs: the model's keyword arguments.
        :returns: a scalar.
        """
        if not torch.is_grad_enabled():
            losses = [self.loss_of(update) for update in self.run(args, kwargs)]
            return torch.stack(losses).sum()
        loss, pairs = self.gradients(*args, **kwargs)
        if not pairs:
            return loss
        parameters = [parameter for parameter, _ in pairs]
        # zeros rather than nothing: distributed training waits for every parameter
        gradients = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        return _ReadyGradient.apply(loss, gradients, *parameters)


def _with_kernel(block: Block, given: Any) -> Block:
    kernel, factors = split_kernel(given)
    return block._replace(kernel=kernel, factors=factors)


class _ReadyGradient(torch.autograd.Function):
    """A scalar with gradients that were computed before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, output: Tensor) -> Any:
        return None, None, *(output * gradient for gradient in ctx.saved_tensors)


def _accumulate(loss: Tensor, known: Mapping[int, Tensor], sums: dict[int, Tensor]) -> None:
    parameters = list(known.values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            key = id(parameter)
            sums[key] = sums[key] + gradient if key in sums else gradient


def _check_leaves(loss: Tensor, known: Mapping[int, Tensor], block: str) -> None:
    """Refuse parameters that nobody would train."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"The loss of block {block!r} depends on a parameter of shape "
                f"{tuple(leaf.shape)} that APG does not know and would not train. Give programs "
                "that are modules, show the parameters to Pyro with pyro.module(name, network) "
                "or pyro.param, or keep them as they are with pyro_ext.poutine.frozen(program)."
            )
        todo.extend(next_node for next_node, _ in node.next_functions)


def _trained_modules(programs: Sequence[Any]) -> list[nn.Module]:
    """The modules that programs are, or are methods of, without those that are frozen."""
    found: dict[int, nn.Module] = {}
    for program in programs:
        for inner in _unwrapped(program):
            owner = getattr(inner, "__self__", inner)
            if isinstance(owner, nn.Module):
                found[id(owner)] = owner
    return list(found.values())


def _unwrapped(program: Any) -> Iterator[Any]:
    """The function inside of handlers and partial functions, if none of them freezes it."""
    if isinstance(program, WithFactors):
        yield from _unwrapped(program.kernel)
        yield from _unwrapped(program.factors)
    elif isinstance(program, functools.partial):
        if any(isinstance(part, FrozenMessenger) for part in program.args):
            return
        handled = unwrap(program)
        yield from _unwrapped(program.func if handled is program else handled)
    else:
        yield program
