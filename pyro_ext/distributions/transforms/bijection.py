"""What every layer of a flow is: an invertible module that also returns its log-determinant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from .compilation import CompiledLayers, can_compile

__all__ = ["Bijection", "Composite", "Inverse"]


class Bijection(nn.Module):
    """
    An invertible map between data and noise, with trainable parameters and perhaps a context.

    Layers are written from the data to the noise, the direction that maximum likelihood needs.
    Both directions return the value and the log-determinant in one pass. A context has shape
    ``batch_shape + (context_features,)``; its ``batch_shape`` broadcasts against that of the
    values, so that a context shared by many values is processed once.

    (No abstract base class: its metaclass would not go with that of ``PyroModule``.)
    """

    event_dim: int = 1
    """Dimensions of one datum, counted from the right: 1 for vectors, 3 for images."""

    noise_event_dim: int | None = None
    """Dimensions of the noise of one datum, if they are not :attr:`event_dim`."""

    worth_compiling: tuple[str, ...] = ()
    """Names of the methods that gain from being native code."""

    is_compiled_with_next: bool = False
    """Whether ``to_noise`` gains from being compiled together with the layer that follows."""

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map data to noise.

        :param Tensor x: data, shape ``batch_shape + event_shape``.
        :param Tensor context: shape ``batch_shape + (context_features,)``, or broadcastable.
        :returns: the noise, and ``log |det dz/dx|`` of shape ``batch_shape``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no to_noise.")

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Map noise to data, the exact inverse of :meth:`to_noise`.

        :param Tensor z: noise, shape ``batch_shape + event_shape``.
        :param Tensor context: shape ``batch_shape + (context_features,)``, or broadcastable.
        :returns: the data, and ``log |det dx/dz|`` of shape ``batch_shape``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no to_data.")


class Composite(Bijection):
    """
    Bijections one after the other, in the order from data to noise.

    :param bijections: the layers, the one next to the data first.
    :param bool compile: run the layers that gain from it as native code.
    """

    def __init__(self, bijections: Iterable[Bijection], *, compile: bool = False) -> None:
        super().__init__()
        self._compiled = CompiledLayers() if compile else None
        self.bijections = cast("Sequence[Bijection]", nn.ModuleList(bijections))
        first, last = self.bijections[0], self.bijections[-1]
        self.event_dim = first.event_dim
        self.noise_event_dim = last.noise_event_dim or last.event_dim

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply every layer; see :meth:`Bijection.to_noise`."""
        log_det = x.new_zeros(x.shape[: x.dim() - self.event_dim])
        for first, second in self._steps():
            if self._compiled is not None and second is not None:
                x, log_det_of_step = self._compiled.pair_to_noise(first, second, x, context)
            else:
                x, log_det_of_step = self._call(first, "to_noise", x, context)
            log_det = log_det + log_det_of_step
        return x, log_det

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo every layer, the last one first; see :meth:`Bijection.to_data`."""
        log_det = z.new_zeros(z.shape[: z.dim() - (self.noise_event_dim or self.event_dim)])
        for bijection in reversed(self.bijections):
            z, log_det_of_one = self._call(bijection, "to_data", z, context)
            log_det = log_det + log_det_of_one
        return z, log_det

    def _steps(self) -> Iterator[tuple[Bijection, Bijection | None]]:
        """The layers, in pairs where two are compiled together."""
        may_pair = self._compiled is not None and can_compile()
        layers = list(self.bijections)
        while layers:
            first = layers.pop(0)
            is_first_of_pair = may_pair and first.is_compiled_with_next and layers
            if is_first_of_pair and "to_noise" in layers[0].worth_compiling:
                yield first, layers.pop(0)
            else:
                yield first, None

    def _call(
        self, bijection: Bijection, direction: str, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self._compiled and direction in bijection.worth_compiling and can_compile():
            return self._compiled.call(bijection, direction, x, context)
        result: tuple[Tensor, Tensor] = getattr(bijection, direction)(x, context)
        return result


class Inverse(Bijection):
    """
    A bijection used the other way round: what it does to data is done to noise.

    An autoregressive layer then draws in one pass and scores feature by feature, as in inverse
    autoregressive flow (Kingma et al. 2016).

    :param Bijection bijection: the bijection to turn round.
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection
        self.event_dim = bijection.noise_event_dim or bijection.event_dim
        self.noise_event_dim = bijection.event_dim
        opposite = {"to_noise": "to_data", "to_data": "to_noise"}
        self.worth_compiling = tuple(opposite[name] for name in bijection.worth_compiling)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_noise`."""
        return self.bijection.to_data(x, context)

    def to_data(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Bijection.to_data`."""
        return self.bijection.to_noise(z, context)
