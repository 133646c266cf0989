"""The same spline flow in pyro_ext, nflows, zuko, normflows and Pyro.

``build(library, setting)`` returns a flow of ``setting.transforms`` steps, each a random
permutation and an LU-decomposed linear map followed by a layer of splines, with one more linear
map at the end. The networks have ``blocks`` residual blocks of two layers, or as many layers
without the residual connections where a library has none. Where the libraries differ:

* zuko's coupling is the one it documents, an autoregressive layer with ``passes=2``, whose masked
  network sees all features; "zuko (plain network)" is its ``GeneralCouplingTransform``, which
  leaves the conditioning features as they are;
* Pyro has no LU-decomposed map on vectors, so that permutations alone mix its features. Its
  autoregressive layer runs its network when it draws; "Pyro (.inv)" turns it round;
* "dense layers only" is no flow. It runs the dense layers of the networks as often as an
  implementation without further ideas must: what is above it is the splines and the linear maps.

Peers are imported when they are first used, because importing zuko turns the validation of
arguments off for the whole process. Here it is off for zuko's own calls only, so that every
library validates as it does for its users.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ext.distributions.spline_flow import NeuralSplineFlow

__all__ = ["AUTOREGRESSIVE", "COUPLING", "BuiltFlow", "Setting", "build", "count_parameters"]

OURS = "pyro_ext"
OURS_COMPILED = "pyro_ext (compile=True)"
ZUKO_PLAIN = "zuko (plain network)"
PYRO_INVERSE = "Pyro (.inv)"
FLOOR = "dense layers only"

COUPLING = ("nflows", OURS, OURS_COMPILED, "zuko", ZUKO_PLAIN, "normflows", "Pyro", FLOOR)
AUTOREGRESSIVE = (
    "nflows",
    OURS,
    OURS_COMPILED,
    "zuko",
    "normflows",
    "Pyro",
    PYRO_INVERSE,
    FLOOR,
)

# Smallest slope of zuko's splines, its default.
_ZUKO_SLOPE = 1e-3


class Setting(NamedTuple):
    """A flow; the defaults are those of the speed benchmark."""

    features: int = 8
    transforms: int = 10
    hidden: int = 256
    blocks: int = 2
    bins: int = 8
    bound: float = 3.0
    coupling: bool = True
    spline: str = "rational_quadratic"  # others for pyro_ext only


class BuiltFlow(NamedTuple):
    """A flow of any library, by what the benchmarks do with it."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    to_noise: Callable[[Tensor], Tensor]
    to_data: Callable[[Tensor], Tensor]


def build(library: str, setting: Setting) -> BuiltFlow:
    """
    Build a flow with its library's own initial weights.

    :param str library: one of :data:`COUPLING` or :data:`AUTOREGRESSIVE`.
    :param Setting setting: the flow.
    :raises ValueError: for a library that is not known, or a spline that it does not have.
    """
    if library not in _BUILDERS:
        raise ValueError(f"library={library!r} is unknown; choose from {', '.join(_BUILDERS)}.")
    if library != OURS and setting.spline != "rational_quadratic":
        raise ValueError(f"spline={setting.spline!r} is for {OURS} only, not for {library}.")
    return _BUILDERS[library](setting)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# -- pyro_ext -----------------------------------------------------------------------------------


def _build_ours(setting: Setting, *, compile: bool = False) -> BuiltFlow:
    flow = NeuralSplineFlow(
        setting.features,
        transforms=setting.transforms,
        coupling=setting.coupling,
        bins=setting.bins,
        bound=setting.bound,
        spline=setting.spline,
        hidden_features=setting.hidden,
        residual_blocks=setting.blocks,
        compile=compile,
    )
    return BuiltFlow(
        flow,
        lambda x: flow().log_prob(x),
        lambda number: flow().sample((number,)),
        lambda x: flow.bijection.to_noise(x)[0],
        lambda z: flow.bijection.to_data(z)[0],
    )


# -- nflows -------------------------------------------------------------------------------------


def _build_nflows(setting: Setting) -> BuiltFlow:
    from nflows import distributions, flows, transforms

    features = setting.features

    def linear() -> list[nn.Module]:
        return [
            transforms.RandomPermutation(features),
            transforms.LULinear(features, identity_init=True),
        ]

    layers = []
    for index in range(setting.transforms):
        layers += [*linear(), _nflows_splines(setting, index)]
    layers += linear()
    flow = flows.Flow(
        transforms.CompositeTransform(layers), distributions.StandardNormal((features,))
    )
    return BuiltFlow(
        flow,
        flow.log_prob,
        flow.sample,
        flow.transform_to_noise,
        lambda z: flow._transform.inverse(z)[0],
    )


def _nflows_splines(setting: Setting, index: int) -> nn.Module:
    from nflows import transforms
    from nflows.nn.nets import ResidualNet
    from nflows.utils.torchutils import create_alternating_binary_mask

    splines = {"num_bins": setting.bins, "tails": "linear", "tail_bound": setting.bound}
    if setting.coupling:

        def network(in_features: int, out_features: int) -> nn.Module:
            return ResidualNet(
                in_features, out_features, setting.hidden, num_blocks=setting.blocks
            )

        return transforms.PiecewiseRationalQuadraticCouplingTransform(
            create_alternating_binary_mask(setting.features, even=index % 2 == 0),
            network,
            apply_unconditional_transform=True,
            **splines,
        )
    return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        setting.features, setting.hidden, num_blocks=setting.blocks, **splines
    )


# -- zuko ---------------------------------------------------------------------------------------


@contextmanager
def _validation_off() -> Iterator[None]:
    """What importing zuko does, undone at the end."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _build_zuko(setting: Setting, *, plain_network: bool = False) -> BuiltFlow:
    with _validation_off():
        import zuko
        from zuko.lazy import Flow, UnconditionalDistribution, UnconditionalTransform

    features = setting.features

    def linear() -> list[nn.Module]:
        permutation, identity = torch.randperm(features), torch.eye(features)
        return [
            UnconditionalTransform(zuko.transforms.PermutationTransform, permutation, buffer=True),
            UnconditionalTransform(zuko.transforms.LULinearTransform, identity),
        ]

    splines = _zuko_coupling if plain_network else _zuko_autoregressive
    layers: list[nn.Module] = []
    for index in range(setting.transforms):
        layers += [*linear(), splines(setting, index)]
    layers += linear()
    base = UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )
    flow = Flow(layers, base)
    return BuiltFlow(
        flow,
        _validation_off()(lambda x: flow().log_prob(x)),
        _validation_off()(lambda number: flow().sample((number,))),
        _validation_off()(lambda x: flow().transform(x)),
        _validation_off()(lambda z: flow().transform.inv(z)),
    )


def _zuko_splines(setting: Setting) -> dict[str, Any]:
    from zuko.transforms import MonotonicRQSTransform

    return {
        "univariate": functools.partial(
            MonotonicRQSTransform, bound=setting.bound, slope=_ZUKO_SLOPE
        ),
        "shapes": [(setting.bins,), (setting.bins,), (setting.bins - 1,)],
    }


def _zuko_autoregressive(setting: Setting, index: int) -> nn.Module:
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform

    order = torch.arange(setting.features)
    return MaskedAutoregressiveTransform(
        setting.features,
        passes=2 if setting.coupling else None,
        order=order if index % 2 == 0 else order.flip(0),
        hidden_features=(setting.hidden,) * setting.blocks,
        residual=True,
        **_zuko_splines(setting),
    )


def _zuko_coupling(setting: Setting, index: int) -> nn.Module:
    from zuko.flows.coupling import GeneralCouplingTransform

    return GeneralCouplingTransform(
        setting.features,
        mask=torch.arange(setting.features) % 2 == index % 2,
        hidden_features=(setting.hidden,) * (2 * setting.blocks + 1),
        **_zuko_splines(setting),
    )


# -- normflows ----------------------------------------------------------------------------------


def _build_normflows(setting: Setting) -> BuiltFlow:
    import normflows

    layers: list[nn.Module] = []
    for index in range(setting.transforms):
        sizes = (setting.features, setting.blocks, setting.hidden)
        splines = {"num_bins": setting.bins, "tail_bound": setting.bound}
        if setting.coupling:
            layer = normflows.flows.CoupledRationalQuadraticSpline(
                *sizes, reverse_mask=bool(index % 2), **splines
            )
        else:
            layer = normflows.flows.AutoregressiveRationalQuadraticSpline(*sizes, **splines)
        layers += [layer, normflows.flows.LULinearPermute(setting.features)]
    base = normflows.distributions.DiagGaussian(setting.features, trainable=False)
    flow = normflows.NormalizingFlow(base, layers)
    return BuiltFlow(
        flow, flow.log_prob, lambda number: flow.sample(number)[0], flow.inverse, flow.forward
    )


# -- Pyro ---------------------------------------------------------------------------------------


def _build_pyro(setting: Setting, *, inverse: bool = False) -> BuiltFlow:
    import pyro.distributions as dist
    from pyro.distributions.transforms import Permute

    features = setting.features
    layers: list[Any] = []
    for _ in range(setting.transforms):
        # with two features a random permutation may be the identity, which mixes nothing
        swap = torch.tensor([1, 0])
        layers.append(Permute(torch.randperm(features) if features > 2 else swap))
        layers.append(_pyro_splines(setting))
    chain = [layer.inv if inverse and isinstance(layer, nn.Module) else layer for layer in layers]
    base = dist.Normal(torch.zeros(features), torch.ones(features)).to_event(1)
    flow = dist.TransformedDistribution(base, chain)

    def forget() -> None:
        # values kept from before an optimizer step are stale; the flow's own clear_cache() does
        # not reach the transform behind an .inv
        for layer in layers:
            layer.clear_cache()

    def log_prob(x: Tensor) -> Tensor:
        forget()
        return flow.log_prob(x)

    def sample(number: int) -> Tensor:
        forget()
        return flow.sample((number,))

    def to_noise(x: Tensor) -> Tensor:
        forget()
        for transform in reversed(chain):
            x = transform.inv(x)
        return x

    def to_data(z: Tensor) -> Tensor:
        forget()
        for transform in chain:
            z = transform(z)
        return z

    module = nn.ModuleList([layer for layer in layers if isinstance(layer, nn.Module)])
    return BuiltFlow(module, log_prob, sample, to_noise, to_data)


def _pyro_splines(setting: Setting) -> nn.Module:
    from pyro.distributions.transforms import SplineAutoregressive, SplineCoupling
    from pyro.nn import AutoRegressiveNN, DenseNN

    features, bins = setting.features, setting.bins
    sizes = [setting.hidden] * (2 * setting.blocks + 1)
    if not setting.coupling:
        network = AutoRegressiveNN(features, sizes, param_dims=[bins, bins, bins - 1])
        return SplineAutoregressive(features, network, bins, setting.bound, order="quadratic")
    half = features // 2
    param_dims = [(features - half) * size for size in (bins, bins, bins - 1)]
    network = DenseNN(half, sizes, param_dims=param_dims)
    return SplineCoupling(features, half, network, bins, setting.bound, order="quadratic")


# -- the dense layers alone ---------------------------------------------------------------------


def _build_floor(setting: Setting) -> BuiltFlow:
    features = setting.features
    inputs = features // 2 if setting.coupling else features
    outputs = (features - inputs if setting.coupling else features) * (3 * setting.bins - 1)
    passes_of_a_draw = 1 if setting.coupling else features

    def network() -> nn.Module:
        sizes = [inputs] + [setting.hidden] * (2 * setting.blocks + 1)
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            layers += [nn.Linear(size, next_size), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(setting.hidden, outputs))

    networks = nn.ModuleList([network() for _ in range(setting.transforms)])

    def log_prob(x: Tensor) -> Tensor:
        return torch.stack([network(x[:, :inputs]).mean(-1) for network in networks]).sum(0)

    def sample(number: int) -> Tensor:
        x = torch.randn(number, features, device=next(networks.parameters()).device)
        for network in networks:
            for _ in range(passes_of_a_draw):
                network(x[:, :inputs])
        return x

    def none(x: Tensor) -> Tensor:
        raise NotImplementedError(f"{FLOOR!r} is no flow and maps nothing.")

    return BuiltFlow(networks, log_prob, sample, none, none)


_BUILDERS: dict[str, Callable[[Setting], BuiltFlow]] = {
    OURS: _build_ours,
    OURS_COMPILED: functools.partial(_build_ours, compile=True),
    "nflows": _build_nflows,
    "zuko": _build_zuko,
    ZUKO_PLAIN: functools.partial(_build_zuko, plain_network=True),
    "normflows": _build_normflows,
    "Pyro": _build_pyro,
    PYRO_INVERSE: functools.partial(_build_pyro, inverse=True),
    FLOOR: _build_floor,
}
