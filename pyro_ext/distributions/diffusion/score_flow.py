"""Score-based diffusion, trained by maximum likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...nn import ScoreNetwork, UNet
from ..context import ContextScale
from ..flow import check_precision
from ..transforms.standardize import mean_and_scale
from .bound import training_errors
from .distribution import ScoreFlowDistribution, check_data
from .score import PARAMETRIZATIONS, NoiseLevel, Score, evaluate_score
from .sde import SDE, make_sde
from .settings import OdeSettings, check_settings, check_whole

__all__ = ["ScoreFlow"]


class ScoreFlow(nn.Module):
    r"""
    A diffusion model that is a distribution.

    Data are turned into noise by a stochastic differential equation; a network learns the score
    :math:`s(x, t) \approx \nabla \log p_t(x)` of all that is in between. It gives an ordinary
    differential equation from data to noise, so that there is a density, a map from noise to
    data, and a bound that is cheap to train by: two evaluations of the network for each datum,
    where other continuous flows solve an equation::

        flow = ScoreFlow(features=8)
        fit_density(flow, data, loss=ScoreFlow.training_loss, ema_decay=0.999)
        pyro.sample("x", flow(), obs=x)

    Data are shifted and scaled to zero mean and unit variance first, by :meth:`initialize`, which
    :func:`~pyro_ext.training.fit_density` calls.

    :param event_shape: number of features of a vector, or the shape ``(channels, height,
        width)`` of an image.
    :param nn.Module score_net: called with x of shape ``(n,) + event_shape``, t of shape
        ``(n,)``, and the context of shape ``(n, context_features)`` or ``None``, standardised
        unless it is of integers; returns the shape of x. By default a
        :class:`~pyro_ext.nn.ScoreNetwork` for vectors, and a :class:`~pyro_ext.nn.UNet` for
        images.
    :param sde: the diffusion: "vp", "subvp", "ve", or an
        :class:`~pyro_ext.distributions.diffusion.SDE` with settings of your own.
    :param str parametrization: what the output of the network is: ``"velocity"``,
        ``"noise"`` or ``"score"``, see
        :func:`~pyro_ext.distributions.diffusion.score.evaluate_score`. With ``"velocity"`` the
        network is given x of unit scale and time from 0 to 1 on the natural scale, else x and t
        themselves.
    :param int context_features: size of a context, 0 for none.
    :param float context_dropout: share of the data whose context is hidden in training (it is
        zero then, and an added last feature says so), for guidance without a classifier.
    :param int hidden_features: of the default network: size of hidden layers, or channels.
    :param int residual_blocks: of the default network: blocks, or blocks for each resolution.
    :param int frequencies: of the default network for vectors: waves that are put next to the
        data, for densities with fine structure in few dimensions; 128, say.
    :param float dropout: of the default network.
    :param OdeSettings ode: how densities and draws are computed.
    :raises ValueError: if an argument is out of range.
    :raises TypeError: if the score network is no module, or the diffusion none.

    Reference: Song, Durkan, Murray and Ermon 2021, "Maximum likelihood training of score-based
    diffusion models".

    >>> from pyro_ext.distributions import ScoreFlow
    >>> flow = ScoreFlow(2, hidden_features=16)
    >>> x = torch.randn(100, 2)
    >>> flow().log_prob(x).shape, flow().sample((5,)).shape
    (torch.Size([100]), torch.Size([5, 2]))
    >>> flow.training_loss(x).backward()
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        score_net: nn.Module | None = None,
        *,
        sde: str | SDE = "vp",
        parametrization: str = "velocity",
        context_features: int = 0,
        context_dropout: float = 0.0,
        hidden_features: int | None = None,
        residual_blocks: int | None = None,
        frequencies: int = 0,
        dropout: float = 0.0,
        ode: OdeSettings | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = _checked_shape(event_shape)
        self.sde = make_sde(sde)
        self.ode = check_settings(OdeSettings() if ode is None else ode)
        if parametrization not in PARAMETRIZATIONS:
            names = ", ".join(PARAMETRIZATIONS)
            raise ValueError(f"parametrization must be one of {names}, got {parametrization!r}")
        self.parametrization = parametrization
        self.context_features = check_whole("context_features", context_features, 0)
        if not 0.0 <= context_dropout < 1.0 or (context_dropout and not context_features):
            raise ValueError(
                "context_dropout must be a probability below 1, and 0 without a context, got "
                f"{context_dropout!r} with context_features={context_features}"
            )
        self.context_dropout = context_dropout
        if score_net is None:
            score_net = self._network(hidden_features, residual_blocks, frequencies, dropout)
        elif not isinstance(score_net, nn.Module):
            raise TypeError(f"score_net must be an nn.Module, got a {type(score_net).__name__}")
        self.score_net = score_net
        shape = (self.event_shape[0], *[1] * (len(self.event_shape) - 1))
        like = next(score_net.parameters(), torch.zeros(()))
        self.register_buffer("loc", like.new_zeros(shape).detach())
        self.register_buffer("scale", like.new_ones(shape).detach())
        self.context_scale = ContextScale(self.context_features, self.loc)

    def forward(self, context: Tensor | None = None) -> ScoreFlowDistribution:
        """
        The distribution.

        :param Tensor context: shape ``batch_shape + (context_features,)``.
        :returns: a distribution with the event shape of the data.
        :raises ValueError: if a context is missing, not expected, or has the wrong shape.
        """
        self.context_scale.check(context)
        return ScoreFlowDistribution(self, context)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """
        Take shift and scale from data: of every feature of vectors, and channel of images.

        :param Tensor x: data, shape ``(n,) + event_shape``.
        :param Tensor context: their contexts, shape ``(n, context_features)``, which are
            standardised too.
        :raises ValueError: if the shape is wrong, or values are not finite.
        """
        self._check(x)
        if not len(x):
            raise ValueError("data without rows cannot tell shift and scale")
        self.context_scale.initialize(context)
        loc, scale = mean_and_scale(x.movedim(1, -1).flatten(0, -2))
        self.loc.copy_(loc.reshape(self.loc.shape))
        self.scale.copy_(scale.reshape(self.scale.shape))

    @property
    def is_initialized(self) -> bool:
        """Whether :meth:`initialize` has run, here or before the weights were saved."""
        return (
            bool((self.loc != 0).any() or (self.scale != 1).any())
            and self.context_scale.is_initialized
        )

    def training_loss(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        weighting: str = "likelihood",
        importance_sampling: bool = True,
    ) -> Tensor:
        r"""
        Denoising score matching: data at random times, with noise and with its opposite.

        .. math:: \tfrac12 \int_\epsilon^T \lambda(t) \, \mathbb E \| s(x_t, t)
            - \nabla \log p_{0t}(x_t \mid x) \|^2 dt

        With :math:`\lambda = g^2` it bounds the Kullback-Leibler divergence of the data from
        the model (theorem 1), up to a constant; :meth:`ScoreFlowDistribution.elbo` adds that.

        :param Tensor x: data, shape ``(n,) + event_shape``.
        :param Tensor context: shape ``(n, context_features)``.
        :param str weighting: ``"likelihood"``, or ``"original"``, :math:`\lambda = \sigma^2`, for
            better looks of samples and worse densities.
        :param bool importance_sampling: draw times from the density of eq. 12, under which the
            estimate varies far less.
        :returns: the mean over the data, one number.
        :raises ValueError: if an argument is out of range, or a shape wrong.
        """
        return self.training_errors(
            x, context, weighting=weighting, importance_sampling=importance_sampling
        ).mean()

    def training_errors(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        weighting: str = "likelihood",
        importance_sampling: bool = True,
    ) -> Tensor:
        """
        What :meth:`training_loss` is the mean of.

        :param Tensor x: see :meth:`training_loss`.
        :param Tensor context: see :meth:`training_loss`.
        :param str weighting: see :meth:`training_loss`.
        :param bool importance_sampling: see :meth:`training_loss`.
        :returns: shape ``(n,)``.
        """
        if weighting not in ("likelihood", "original"):
            raise ValueError(f"weighting must be 'likelihood' or 'original', got {weighting!r}")
        self._check(x)
        self.context_scale.check(context)
        if context is not None and context.shape[:-1] != x.shape[:1]:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, but there are {len(x)} data"
            )
        score = self.score_of(context, hides=self.training)
        z = (x - self.loc) / self.scale
        return training_errors(score, self.sde, z, weighting, importance_sampling)

    def score_of(self, context: Tensor | None, *, hides: bool = False) -> Score:
        """
        The score of standardised data.

        :param Tensor context: rows of context, shape ``(n, context_features)``, or ``None`` for
            none, also for the unconditional score after training with ``context_dropout``.
        :param bool hides: whether to leave out contexts at random.
        :returns: a function of noisy data, times and numbers of rows.
        """
        network, dropout = self.score_net, self.context_dropout

        def score(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            some = None if context is None else context[rows]
            if some is not None and some.is_floating_point():
                some = self.context_scale(some)
            if dropout:
                if some is None:
                    some = x.new_zeros(len(x), self.context_features)
                    hidden = x.new_ones(len(x), 1)
                else:
                    hidden = (torch.rand_like(some[:, :1]) < dropout * hides).to(some)
                some = torch.cat([some * (1 - hidden), hidden], -1)
            return evaluate_score(network, self.parametrization, self.sde, x, t, some)

        return score

    def extra_repr(self) -> str:
        """The diffusion and the solver."""
        return f"sde={self.sde}, parametrization={self.parametrization}, solver={self.ode.solver}"

    def _network(
        self, hidden: int | None, blocks: int | None, frequencies: int, dropout: float
    ) -> nn.Module:
        context_features = self.context_features + bool(self.context_dropout)
        if len(self.event_shape) == 1:
            return ScoreNetwork(
                self.event_shape[0],
                128 if hidden is None else hidden,
                context_features=context_features,
                residual_blocks=3 if blocks is None else blocks,
                frequencies=frequencies,
                noise_level=NoiseLevel(self.sde, self.parametrization),
                dropout=dropout,
            )
        return UNet(
            self.event_shape,
            32 if hidden is None else hidden,
            context_features=context_features,
            residual_blocks=1 if blocks is None else blocks,
            dropout=dropout,
        )

    def _check(self, x: Tensor) -> None:
        check_data("data", x, self.event_shape)
        if x.dim() != len(self.event_shape) + 1:
            raise ValueError(
                f"The data have shape {tuple(x.shape)}; (n, {str(tuple(self.event_shape))[1:]} "
                "is needed."
            )
        check_precision("data", x, self)


def _checked_shape(event_shape: int | Sequence[int]) -> torch.Size:
    sizes = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    if len(sizes) not in (1, 3) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            "event_shape must be a number of features or (channels, height, width), got "
            f"{event_shape!r}"
        )
    return torch.Size(sizes)
