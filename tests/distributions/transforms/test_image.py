"""Layers on images against Jacobians by automatic differentiation and their own definitions."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ext.distributions.transforms.affine import Affine
from pyro_ext.distributions.transforms.bijection import Bijection, Composite
from pyro_ext.distributions.transforms.elementwise import ElementwiseMap
from pyro_ext.distributions.transforms.image import (
    ActNorm,
    ImageCoupling,
    InvertibleConvolution,
    PixelRange,
    Squeeze,
)
from pyro_ext.distributions.transforms.multiscale import MultiScale, initialize, level_shapes
from pyro_ext.distributions.transforms.rational_quadratic import RationalQuadraticSpline
from pyro_ext.nn import ResidualConvolutionalNetwork


def _network(context_channels: int = 0) -> Callable[[int, int], nn.Module]:
    # smooth activations: no kink of the density near a test point
    return partial(
        ResidualConvolutionalNetwork,
        hidden_channels=6,
        residual_blocks=1,
        activation=torch.tanh,
        context_channels=context_channels,
    )


def _level(channels: int, elementwise_map: ElementwiseMap, context_channels: int) -> Bijection:
    coupling = ImageCoupling(channels, elementwise_map, _network(context_channels))
    level = Composite([ActNorm(channels), InvertibleConvolution(channels), coupling])
    level.event_dim = 3
    return level


def _multi_scale(
    factor_out: bool = True,
    context_shape: tuple[int, ...] | None = None,
    elementwise_map: ElementwiseMap | None = None,
) -> Bijection:
    shapes = level_shapes((1, 4, 4), 2, factor_out)
    contexts = [4 ** (i + 1) * context_shape[0] if context_shape else 0 for i in range(2)]
    levels = [
        _level(shape[0], elementwise_map or RationalQuadraticSpline(3), context)
        for shape, context in zip(shapes, contexts, strict=True)
    ]
    return MultiScale((1, 4, 4), levels, factor_out=factor_out, context_shape=context_shape)


class Scaling(ElementwiseMap):
    """The simplest family with a slope, for what is about layers and not about splines."""

    num_parameters = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = parameters[..., 0].tanh().expand(x.shape)
        return x * log_slope.exp(), log_slope

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = -parameters[..., 0].tanh().expand(y.shape)
        return y * log_slope.exp(), log_slope


LAYERS: dict[str, tuple[Callable[[], Bijection], tuple[int, int, int]]] = {
    "pixel range": (lambda: PixelRange(-1.0, 4.0), (2, 2, 3)),
    "squeeze": (Squeeze, (3, 2, 4)),
    "squeeze by three": (lambda: Squeeze(3), (1, 3, 6)),
    "actnorm": (lambda: ActNorm(3), (3, 2, 3)),
    "convolution": (lambda: InvertibleConvolution(4), (4, 2, 3)),
    "scaling coupling": (lambda: ImageCoupling(4, Scaling(), _network()), (4, 2, 3)),
    "affine coupling": (lambda: ImageCoupling(4, Affine(), _network()), (4, 2, 3)),
    "spline coupling, odd": (
        lambda: ImageCoupling(3, RationalQuadraticSpline(4), _network()),
        (3, 2, 3),
    ),
    "spline multi-scale": (_multi_scale, (1, 4, 4)),
    "scaling multi-scale": (partial(_multi_scale, elementwise_map=Scaling()), (1, 4, 4)),
    "spline multi-scale, nothing leaves": (partial(_multi_scale, False), (1, 4, 4)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def _some_layers(leave_out: tuple[str, ...]) -> pytest.MarkDecorator:
    kept = [name for name in LAYERS if not name.startswith(leave_out)]
    return pytest.mark.parametrize(("make", "shape"), [LAYERS[k] for k in kept], ids=kept)


def _randomized(layer: Bijection, scale: float = 0.3) -> Bijection:
    """A layer whose parameters are not those it starts with."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return layer


def _log_det(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The logarithm of the determinant of the full Jacobian."""
    jacobian = torch.func.jacrev(lambda v: function(v.reshape(x.shape))[0].flatten())(x.flatten())
    return torch.linalg.slogdet(jacobian)[1]


@layers
def test_log_determinants_are_those_of_the_full_jacobian(
    make: Callable[[], Bijection], shape: tuple[int, int, int]
) -> None:
    layer = _randomized(make())
    for _ in range(3):
        x = 2.0 * torch.randn(shape)
        z, log_det = layer.to_noise(x)
        torch.testing.assert_close(log_det, _log_det(layer.to_noise, x), rtol=0, atol=1e-8)
        _, inverse_log_det = layer.to_data(z)
        torch.testing.assert_close(inverse_log_det, _log_det(layer.to_data, z), rtol=0, atol=1e-8)


@layers
@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)], ids=str)
def test_both_directions_agree_for_any_batch(
    make: Callable[[], Bijection], shape: tuple[int, int, int], batch_shape: tuple[int, ...]
) -> None:
    layer = _randomized(make())
    x = 2.0 * torch.randn(batch_shape + shape)
    z, log_det = layer.to_noise(x)
    back, inverse_log_det = layer.to_data(z)
    assert log_det.shape == inverse_log_det.shape == batch_shape
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)
    # each element is what it would be alone
    for single, single_z, single_log_det in zip(
        x.reshape(-1, *shape),
        z.reshape(-1, *z.shape[len(batch_shape) :]),
        log_det.flatten(),
        strict=True,
    ):
        alone_z, alone_log_det = layer.to_noise(single)
        torch.testing.assert_close(single_z, alone_z)
        torch.testing.assert_close(single_log_det, alone_log_det)


@layers
def test_a_fresh_module_computes_the_same_with_a_loaded_state(
    make: Callable[[], Bijection], shape: tuple[int, int, int]
) -> None:
    layer, x = _randomized(make()), torch.randn(10, *shape)
    torch.manual_seed(1)  # other permutations
    other = make()
    other.load_state_dict(layer.state_dict())
    for ours, theirs in zip(layer.to_noise(x), other.to_noise(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@_some_layers(leave_out=("pixel", "squeeze"))
def test_gradients_reach_every_parameter(
    make: Callable[[], Bijection], shape: tuple[int, int, int]
) -> None:
    layer = _randomized(make())
    z, log_det = layer.to_noise(torch.randn(20, *shape))
    (z.square().sum() + log_det.sum() + layer.to_data(z.detach())[0].square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.usefixtures("float32")
@layers
def test_round_trip_in_single_precision(
    make: Callable[[], Bijection], shape: tuple[int, int, int]
) -> None:
    layer, x = _randomized(make(), 0.1), torch.randn(100, *shape)
    z, log_det = layer.to_noise(x)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(layer.to_data(z)[0], x, rtol=0, atol=1e-4)


@pytest.fixture
def compiler() -> Iterator[None]:
    """The compiler of PyTorch, which switches the validation of its distributions off."""
    is_enabled = Distribution._validate_args
    yield
    torch.compiler.reset()
    Distribution.set_default_validate_args(is_enabled)


@_some_layers(leave_out=("affine", "spline"))
@pytest.mark.usefixtures("compiler")
def test_layers_compile_in_one_piece(
    make: Callable[[], Bijection], shape: tuple[int, int, int]
) -> None:
    layer, x = _randomized(make()), torch.randn(4, *shape)
    compiled = torch.compile(layer.to_noise, fullgraph=True, backend="eager")
    for ours, theirs in zip(layer.to_noise(x), compiled(x), strict=True):
        torch.testing.assert_close(ours, theirs)


# The range of pixels and squeezing


def test_pixels_are_centred() -> None:
    z, log_det = PixelRange(0.0, 256.0).to_noise(torch.tensor([[[0.0, 128.0, 256.0]]]))
    torch.testing.assert_close(z, torch.tensor([[[-0.5, 0.0, 0.5]]]))
    torch.testing.assert_close(log_det, torch.tensor(-3 * math.log(256.0)))


@pytest.mark.parametrize("limits", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_a_range_needs_two_ends(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="range from low to high"):
        PixelRange(*limits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_have_no_density(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"torch\.\w+; .*UniformDequantization"):
        PixelRange().to_noise(torch.ones(1, 2, 2, dtype=dtype))


def test_squares_of_pixels_become_channels() -> None:
    x = torch.arange(16.0).reshape(1, 4, 4)
    z, _ = Squeeze().to_noise(x)
    assert z.shape == (4, 2, 2)
    torch.testing.assert_close(z[:, 0, 0], torch.tensor([0.0, 1.0, 4.0, 5.0]))
    torch.testing.assert_close(z[:, 1, 1], torch.tensor([10.0, 11.0, 14.0, 15.0]))


@pytest.mark.parametrize("size", [(3, 4), (4, 5), (1, 1)], ids=str)
def test_squeezing_names_a_size_it_cannot_divide(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        Squeeze().to_noise(torch.zeros(2, 3, *size))


def test_unsqueezing_names_channels_it_cannot_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        Squeeze().to_data(torch.zeros(6, 2, 2))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Squeeze(0)


# Activation normalisation


def test_actnorm_starts_as_the_identity_and_stays_it() -> None:
    layer = ActNorm(3)
    x = 7.0 + 2.0 * torch.randn(10, 3, 4, 4)
    for _ in range(2):
        z, log_det = layer.to_noise(x)
        torch.testing.assert_close(z, x, rtol=0, atol=0)
        torch.testing.assert_close(log_det, torch.zeros(10))
    assert not layer.initialized


@pytest.mark.parametrize("batch_shape", [(), (50,), (5, 4)], ids=str)
def test_actnorm_normalises_each_channel(batch_shape: tuple[int, ...]) -> None:
    layer = ActNorm(3)
    location = torch.tensor([5.0, -100.0, 0.0])[:, None, None]
    scale = torch.tensor([0.01, 1.0, 300.0])[:, None, None]
    x = location + scale * torch.randn(*batch_shape, 3, 6, 6)
    layer.initialize(x)
    values = layer.to_noise(x)[0].movedim(-3, 0).flatten(1)
    torch.testing.assert_close(values.mean(-1), torch.zeros(3), rtol=0, atol=1e-10)
    torch.testing.assert_close(values.var(-1, correction=0), torch.ones(3), rtol=1e-9, atol=0)
    assert layer.initialized


def test_actnorm_remembers_that_it_is_set() -> None:
    layer, other = ActNorm(2), ActNorm(2)
    layer.initialize(3.0 * torch.randn(10, 2, 2, 2))
    other.load_state_dict(layer.state_dict())
    assert other.initialized
    torch.testing.assert_close(other.log_scale, layer.log_scale)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_actnorm_leaves_the_scale_of_a_constant_channel() -> None:
    layer, x = ActNorm(2), torch.randn(10, 2, 3, 3)
    x[:, 0] = 0.1
    layer.initialize(x)
    z, log_det = layer.to_noise(x)
    torch.testing.assert_close(z[:, 0], torch.zeros(10, 3, 3), rtol=0, atol=1e-12)
    assert log_det.isfinite().all()
    assert layer.log_scale[0] == 0


@pytest.mark.parametrize("shape", [(4, 2, 2), (2, 2), (0, 3, 2, 2), (3,)], ids=str)
def test_actnorm_names_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ActNorm\(3\) needs images of shape"):
        ActNorm(3).initialize(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_actnorm_does_not_start_from_bad_data(value: float) -> None:
    layer, x = ActNorm(1), torch.randn(2, 1, 2, 2)
    x[1, 0, 0, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.initialize(x)
    assert not layer.initialized


# 1×1 convolutions


def test_every_pixel_has_the_same_linear_map() -> None:
    layer = _randomized(InvertibleConvolution(3))
    x = torch.randn(3, 2, 2)
    z, _ = layer.to_noise(x)
    origin, _ = layer.to_noise(torch.zeros(3, 2, 2))
    columns = [
        (layer.to_noise(e[:, None, None].expand(3, 2, 2))[0] - origin)[:, 0, 0]
        for e in torch.eye(3)
    ]
    expected = origin + torch.einsum("oi,ihw->ohw", torch.stack(columns, 1), x)
    torch.testing.assert_close(z, expected)


def test_a_new_convolution_permutes_channels() -> None:
    x = torch.randn(6, 2, 2)
    z, log_det = InvertibleConvolution(6).to_noise(x)
    torch.testing.assert_close(log_det, torch.tensor(0.0))
    torch.testing.assert_close(
        z.flatten(1).sort(0).values, x.flatten(1).sort(0).values, rtol=1e-12, atol=1e-12
    )


# Couplings


@pytest.mark.parametrize("elementwise_map", [Affine(), RationalQuadraticSpline(4)])
def test_a_new_coupling_is_the_identity(elementwise_map: ElementwiseMap) -> None:
    x = torch.randn(5, 3, 2, 2)
    z, log_det = ImageCoupling(3, elementwise_map, _network()).to_noise(x)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(log_det, torch.zeros(5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [2, 5])
def test_the_second_half_sees_the_first_at_all_pixels_around(channels: int) -> None:
    layer = _randomized(ImageCoupling(channels, RationalQuadraticSpline(4), _network()), 0.5)
    half = channels // 2
    shape = (channels, 3, 3)
    jacobian = torch.func.jacrev(lambda x: layer.to_noise(x)[0])(torch.randn(shape))
    mask = jacobian.abs() > 1e-12
    pixel = mask[:, 1, 1]  # of the output in the middle: (channels, channels, 3, 3)
    alone = torch.zeros(channels, channels, 3, 3, dtype=torch.bool)
    alone[torch.arange(channels), torch.arange(channels), 1, 1] = True
    assert torch.equal(pixel[:half], alone[:half])  # elementwise
    assert torch.equal(pixel[half:, half:], alone[half:, half:])
    assert pixel[half:, :half].all()  # through two 3×3 convolutions


@pytest.mark.parametrize("direction", ["to_noise", "to_data"])
def test_contexts_broadcast(direction: str) -> None:
    layer = _randomized(ImageCoupling(3, Affine(), _network(context_channels=2)), 0.5)
    x, context = torch.randn(4, 3, 2, 2), torch.randn(5, 1, 2, 2, 2)
    z, log_det = getattr(layer, direction)(x, context)
    assert z.shape == (5, 4, 3, 2, 2)
    assert log_det.shape == (5, 4)
    alone_z, alone_log_det = getattr(layer, direction)(x[1], context[2, 0])
    torch.testing.assert_close(z[2, 1], alone_z)
    torch.testing.assert_close(log_det[2, 1], alone_log_det)
    assert (z[0] - z[1]).abs().max() > 1e-3


@pytest.mark.parametrize("layer", [ActNorm, InvertibleConvolution], ids=lambda t: t.__name__)
def test_layers_need_channels(layer: Callable[[int], Bijection]) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        layer(0)


def test_couplings_need_two_channels_and_a_last_layer() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ImageCoupling(1, Affine(), _network())
    with pytest.raises(TypeError, match="Conv2d has none"):
        ImageCoupling(2, Affine(), lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1))


# The multi-scale architecture


def test_half_of_the_channels_leave_after_each_level() -> None:
    levels = [InvertibleConvolution(c) for c, _, _ in level_shapes((1, 8, 8), 3)]
    for level in levels:  # without the permutations
        level.to_noise = lambda x, context=None: (x, x.new_zeros(x.shape[:-3]))  # type: ignore[method-assign]
    x = torch.arange(64.0).reshape(1, 8, 8)
    z, log_det = MultiScale((1, 8, 8), levels).to_noise(x)
    first = nn.functional.pixel_unshuffle(x, 2)
    second = nn.functional.pixel_unshuffle(first[:2], 2)
    third = nn.functional.pixel_unshuffle(second[:4], 2)
    expected = torch.cat([first[2:].flatten(), second[4:].flatten(), third.flatten()])
    torch.testing.assert_close(z, expected)
    assert log_det == 0


@pytest.mark.parametrize(
    ("factor_out", "expected"),
    [
        (True, [(12, 16, 8), (24, 8, 4), (48, 4, 2)]),
        (False, [(12, 16, 8), (48, 8, 4), (192, 4, 2)]),
    ],
)
def test_shapes_of_levels(factor_out: bool, expected: list[tuple[int, int, int]]) -> None:
    assert level_shapes((3, 32, 16), 3, factor_out) == expected


@pytest.mark.parametrize(
    ("shape", "num_levels", "message"),
    [
        ((28, 28), 1, r"\(channels, height, width\), got \(28, 28\)"),
        ((0, 4, 4), 1, r"got \(0, 4, 4\)"),
        ((1, 28, 28), 3, "multiples of 8; 28 x 28 is enough for 2"),
        ((1, 3, 8), 1, "multiples of 2; 3 x 8 is enough for 0"),
        ((1, 8, 8), 0, "at least one level, got 0"),
    ],
)
def test_images_too_small_for_the_levels(
    shape: tuple[int, ...], num_levels: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        level_shapes(shape, num_levels)


def test_multi_scale_names_wrong_shapes() -> None:
    flow = _multi_scale()
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 1, 4, 4\), got \(2, 1, 8, 8\)"):
        flow.to_noise(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 16\), got \(2, 15\)"):
        flow.to_data(torch.zeros(2, 15))
    with pytest.raises(ValueError, match="height and width of the data"):
        _multi_scale(context_shape=(1, 8, 8))


def test_each_level_sees_all_of_a_context_image() -> None:
    flow = _randomized(_multi_scale(context_shape=(1, 4, 4)), 0.5)
    x, context = torch.randn(1, 4, 4), torch.randn(16)
    jacobian = torch.func.jacrev(lambda c: flow.to_noise(x, c)[0])(context)
    assert (jacobian[:8].abs() > 1e-12).any(0).all()
    assert (jacobian[8:].abs() > 1e-12).any(0).all()
    z, log_det = flow.to_noise(x, context)
    torch.testing.assert_close(log_det, _log_det(lambda x: flow.to_noise(x, context), x))
    torch.testing.assert_close(flow.to_data(z, context)[0], x)


def test_initializing_reaches_every_actnorm_in_order() -> None:
    flow = _randomized(_multi_scale(), 0.2)
    x = 3.0 + 0.2 * torch.randn(200, 1, 4, 4)
    initialize(flow, x)
    seen: list[Tensor] = []

    class Spy(ActNorm):
        def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            z, log_det = super().to_noise(x, context)
            seen.append(z.movedim(-3, 0).flatten(1))
            return z, log_det

    norms = [module for module in flow.modules() if isinstance(module, ActNorm)]
    assert len(norms) == 2
    for norm in norms:
        norm.__class__ = Spy
        assert norm.initialized
    flow.to_noise(x)
    for values in seen:
        torch.testing.assert_close(values.mean(-1), torch.zeros(len(values)), rtol=0, atol=1e-9)
        torch.testing.assert_close(values.var(-1, correction=0), torch.ones(len(values)))
    assert len(seen) == 2
