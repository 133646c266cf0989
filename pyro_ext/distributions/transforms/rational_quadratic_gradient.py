"""The gradient of rational-quadratic splines in closed form.

Automatic differentiation of the same formulas takes three times as long and keeps ten times as
much in memory: splines are many small operations on many small numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .knots import bounded_positive, bounded_positive_log_slope
from .rational_quadratic_pieces import Pieces, SplineSettings, indices_of_piece, spline

__all__ = ["SplineWithGradient"]


class SplineWithGradient(torch.autograd.Function):
    """:func:`spline` with its gradient in closed form; returns the pieces after the results."""

    @staticmethod
    def forward(x: Tensor, parameters: Tensor, settings: SplineSettings) -> tuple[Tensor, ...]:
        """Evaluate the splines."""
        value, log_slope, pieces = spline(x, parameters, settings)
        return value, log_slope, *pieces

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, SplineSettings], output: tuple[Tensor, ...]
    ) -> None:
        """Keep what the gradient needs."""
        x, parameters, ctx.settings = inputs
        pieces = output[2:]
        ctx.mark_non_differentiable(*pieces)
        ctx.save_for_backward(x, parameters, *pieces)
        ctx.save_for_forward(x, parameters)
        ctx.set_materialize_grads(True)

    @staticmethod
    def backward(
        ctx: Any, grad_value: Tensor, grad_log_slope: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        """Gradients to the inputs and the parameters."""
        x, parameters, *pieces = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated itself
            pull_back = torch.func.vjp(_results(ctx.settings), x, parameters)[1]
            return *pull_back((grad_value, grad_log_slope)), None
        grad_x, grad_parameters = spline_gradient(
            x, parameters, Pieces(*pieces), ctx.settings, grad_value, grad_log_slope
        )
        return grad_x, grad_parameters.sum_to_size(parameters.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, parameters_tangent: Tensor, _: None) -> tuple[Tensor, ...]:
        """Derivative along a direction."""
        x, parameters = ctx.saved_tensors
        tangents = torch.func.jvp(
            _results(ctx.settings), (x, parameters), (tangent, parameters_tangent)
        )[1]
        return *tangents, *(None for _ in Pieces._fields)


def _results(settings: SplineSettings) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The plain formulas, for derivatives of other kinds and orders."""

    def evaluate(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        value, log_slope, _ = spline(x, parameters, settings)
        return value, log_slope

    return evaluate


def spline_gradient(
    x: Tensor,
    parameters: Tensor,
    pieces: Pieces,
    settings: SplineSettings,
    grad_value: Tensor,
    grad_log_slope: Tensor,
) -> tuple[Tensor, Tensor]:
    """
    Gradients of splines or of their inverses.

    :param Tensor x: the inputs.
    :param Tensor parameters: the parameters.
    :param Pieces pieces: the pieces that the inputs fall into.
    :param SplineSettings settings: bins, interval, direction.
    :param Tensor grad_value: gradient to the values.
    :param Tensor grad_log_slope: gradient to the log slopes.
    :returns: gradients to the inputs and to the parameters of every input.
    """
    grad_outside = grad_value
    is_inside = (x >= settings.low) & (x <= settings.high)
    if settings.tails:
        grad_value, grad_log_slope = grad_value * is_inside, grad_log_slope * is_inside
    xi, r_left, r_right = pieces.xi, pieces.left_ratio, pieces.right_ratio
    rest = 1.0 - xi
    xi_squared, rest_squared, both = xi * xi, rest * rest, xi * rest
    denominator = torch.addcmul(xi_squared + rest_squared, r_left + r_right, both)
    to_right, to_left = r_right * xi, r_left * rest
    twist = rest - xi
    numerator = torch.addcmul(torch.addcmul(both + both, to_right, xi), to_left, rest)
    # The piece rises from 0 to 1 by rise(xi), with this slope, whose logarithm is log_slope(xi).
    rise = torch.addcmul(xi_squared, to_left, xi) / denominator
    rise_slope = numerator / (denominator * denominator)
    half_bend = 0.5 * (r_left + r_right) - 1.0
    half_log_slope_xi = (to_right + twist - to_left) / numerator - (
        (half_bend + half_bend) * twist / denominator
    )
    log_slope_xi = half_log_slope_xi + half_log_slope_xi

    # Gradients to: the rise at fixed xi, the log sizes of the piece, its corner, the input.
    if settings.is_inverse:
        grad_log_slope = -grad_log_slope
        grad_xi = torch.addcmul(grad_value * pieces.width, grad_log_slope, log_slope_xi)
        grad_rise = -grad_xi / rise_slope
        grad_log_width = grad_value * pieces.width * xi - grad_log_slope
        grad_left, grad_bottom = grad_value, grad_rise / pieces.height
        grad_x = -grad_bottom
    else:
        grad_rise = grad_value * pieces.height
        grad_xi = torch.addcmul(grad_rise * rise_slope, grad_log_slope, log_slope_xi)
        grad_log_width = -torch.addcmul(grad_log_slope, grad_xi, xi)
        grad_x = grad_xi / pieces.width
        grad_left, grad_bottom = -grad_x, grad_value
    grad_log_height = torch.addcmul(grad_log_slope, grad_rise, rise)

    # Gradients to the logarithms of the two ratios.
    shared = both / denominator
    common = shared * torch.addcmul(grad_log_slope + grad_log_slope, grad_rise, rise)
    of_numerator = grad_log_slope / numerator
    to_log_left = torch.addcmul(grad_rise * shared - common, of_numerator, rest_squared)
    to_log_right = torch.addcmul(-common, of_numerator, xi_squared)
    # Computed again rather than kept: it is the largest of all that the gradient needs.
    relative = bounded_positive(parameters, settings.min_ratio)
    grad_relative = _to_log_relative(
        relative,
        pieces,
        settings,
        (grad_left, grad_bottom),
        (grad_log_width, grad_log_height),
        (r_left * to_log_left, r_right * to_log_right),
    )
    slope = bounded_positive_log_slope(parameters, settings.min_ratio)
    grad_x = torch.where(is_inside, grad_x, grad_outside) if settings.tails else grad_x * is_inside
    return grad_x, grad_relative * slope


def _to_log_relative(
    relative: Tensor,
    pieces: Pieces,
    settings: SplineSettings,
    grad_corner: tuple[Tensor, Tensor],
    grad_log_size: tuple[Tensor, Tensor],
    grad_log_ratios: tuple[Tensor, Tensor],
) -> Tensor:
    """From a piece to the logarithms of the relative widths, heights and derivatives."""
    K = settings.bins
    (grad_left, grad_bottom), (grad_log_width, grad_log_height) = grad_corner, grad_log_size
    has_left, has_right = pieces.k > 0, pieces.k < K - 1
    grad_log_left, grad_log_right = grad_log_ratios
    inner_left, inner_right = grad_log_left * has_left, grad_log_right * has_right
    # A ratio r = 2 rho / (1 + q), where q is the slope of the piece over that of its neighbour:
    # d log r = d log rho - q / (1 + q) d log q, and q / (1 + q) = 1 - r / (2 rho).
    two_left, two_right = pieces.left_rho + pieces.left_rho, pieces.right_rho + pieces.right_rho
    to_q_left = inner_left * (pieces.left_ratio / two_left) - inner_left
    to_q_right = inner_right * (pieces.right_ratio / two_right) - inner_right
    if settings.tails:  # at the ends the ratio is width / height
        at_ends = (grad_log_left - inner_left) + (grad_log_right - inner_right)
        grad_log_width, grad_log_height = grad_log_width + at_ends, grad_log_height - at_ends
        grad_log_left, grad_log_right = inner_left, inner_right
    to_q = to_q_left + to_q_right
    of_piece = torch.stack(
        [
            to_q_left,
            grad_log_width - to_q,
            to_q_right,
            -to_q_left,
            grad_log_height + to_q,
            -to_q_right,
            grad_log_left,
            grad_log_right,
        ]
    ).movedim(0, -1)
    # The corner moves with all pieces before it, and everything with the sums.
    length = settings.high - settings.low
    before = torch.stack([grad_left * pieces.x_unit, grad_bottom * pieces.y_unit], -1)
    from_low = torch.stack(
        [
            torch.addcmul(grad_log_width, grad_left, pieces.left - settings.low) * pieces.x_unit,
            torch.addcmul(grad_log_height, grad_bottom, pieces.bottom - settings.low)
            * pieces.y_unit,
        ],
        -1,
    )
    of_sum = (from_low / -length)[..., None]
    is_before = torch.arange(K, device=pieces.k.device) < pieces.k[..., None, None]
    sizes = relative[..., : 2 * K].unflatten(-1, (2, K))
    share = torch.where(is_before, before[..., None] + of_sum, of_sum)
    # Out of place, so that gradients in batches (`is_grads_batched`) work too.
    of_sizes = (sizes * share).reshape(*pieces.k.shape, 2 * K)
    gradient = F.pad(of_sizes, (0, settings.num_parameters - 2 * K))
    return gradient.scatter_add(-1, indices_of_piece(pieces.k, settings), of_piece)
