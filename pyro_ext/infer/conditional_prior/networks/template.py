"""Any invertible module as a conditional prior network, with its own parameters in every row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ....distributions.transforms import Bijection
from .row_map import RowMap

__all__ = ["TemplateMap"]


class TemplateMap(RowMap):
    """
    A module that is called with the parameters of one row after the other, or of all at once.

    :param module: maps noise to latents: a :class:`~pyro_ext.distributions.transforms.Bijection`
        or a ``pyro.distributions.TransformModule``. Its parameters are what every row starts
        from; the module itself is left as it is.
    :param int features: number of latents.
    :raises TypeError: if the module is neither.
    """

    def __init__(self, module: nn.Module, features: int) -> None:
        is_map = isinstance(module, Bijection | torch.distributions.Transform)
        if not (isinstance(module, nn.Module) and is_map):
            raise TypeError(
                f"The flow made a {type(module).__name__}. Make a Bijection of "
                "pyro_ext.distributions.transforms (of a NeuralSplineFlow, its .bijection) or a "
                "pyro.distributions.TransformModule, whose parameters can be fitted."
            )
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        super().__init__(features, sum(math.prod(shape) for shape in self._shapes.values()))
        # Hidden, because the parameters of the template are not those of the guide.
        self._template = (_BothWays(module),)
        values = [p.detach().reshape(-1) for p in module.parameters()]
        if not values:
            raise ValueError(
                f"The flow {type(module).__name__} has no parameters, so there is nothing to fit."
            )
        self.register_buffer("_initial", torch.cat(values), persistent=False)
        self._buffer_names = [name for name, _ in module.named_buffers()]
        for i, (_, buffer) in enumerate(module.named_buffers()):
            self.register_buffer(f"_buffer_{i}", buffer.clone())

    def initial(self, num_rows: int) -> Tensor:
        """The module's own parameters."""
        initial = self.get_buffer("_initial").to(torch.get_default_dtype())
        return initial.expand(num_rows, -1).clone()

    def to_latents(self, noise: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_latents`."""
        return self._call(noise, psi, inverse=False)

    def to_noise(self, latents: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`RowMap.to_noise`."""
        return self._call(latents, psi, inverse=True)

    def _call(self, values: Tensor, psi: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        def of_one_row(values: Tensor, psi: Tensor) -> Any:
            tensors = self._tensors(psi)
            return functional_call(self._template[0], tensors, (values, inverse))

        if len(psi) == 1:  # also for what cannot be vectorised
            value, log_det = of_one_row(values[0], psi[0])
            return value[None], log_det[None]
        return vmap(of_one_row)(values, psi)

    def _tensors(self, psi: Tensor) -> dict[str, Tensor]:
        parts = psi.split([math.prod(shape) for shape in self._shapes.values()])
        tensors = {
            f"module.{name}": part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        for i, name in enumerate(self._buffer_names):
            tensors[f"module.{name}"] = self.get_buffer(f"_buffer_{i}")
        return tensors


class _BothWays(nn.Module):
    """One call for both directions of either kind of module."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._run = _run_bijection if isinstance(module, Bijection) else _run_transform

    def forward(self, values: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return self._run(self.module, values, inverse)


def _run_bijection(module: Any, values: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return module.to_noise(values) if inverse else module.to_data(values)


def _run_transform(module: Any, values: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    try:
        if inverse:
            noise = module._inverse(values)
            return noise, -module.log_abs_det_jacobian(noise, values)
        latents = module(values)
        return latents, module.log_abs_det_jacobian(values, latents)
    except KeyError as error:  # how transforms of Pyro without an inverse say so
        raise NotImplementedError(
            f"{type(module).__name__} has no inverse, so that only its own draws can be scored."
        ) from error
    finally:
        # the transform would otherwise keep the tensors of these rows
        module._cached_x_y = None, None
