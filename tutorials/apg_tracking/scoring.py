"""What digits look like, given where they are: Fisher scoring with the decoder."""

import torch
from canvas import crop, place
from model import FEATURES, darkness


@torch.no_grad()
def scoring_step(tracker, what, where, frames):
    """A step from ``what`` towards its mode, given positions and frames.

    The gradient is that of the log joint density. The information is what is expected of each
    digit, as if nothing else were uncertain, with the pixels of its image one by one; between
    whole pixels of the canvas these share information, and it is a little too large.

    :param what: ``(..., videos, digits, FEATURES)``.
    :param where: ``(..., videos, frames, digits, 2)``.
    :param frames: ``(videos, frames, CANVAS, CANVAS)``.
    :returns: the new ``what``, and the information ``(..., digits, FEATURES, FEATURES)`` at the
        old one.
    """
    slopes, weights = of_pixels(tracker.decode(what), where, frames)
    jacobian = images_by_feature(tracker, what).flatten(-2)
    gradient = jacobian @ slopes.flatten(-2).unsqueeze(-1) - what.unsqueeze(-1)
    information = (
        torch.eye(FEATURES) + (jacobian * weights.flatten(-2).unsqueeze(-2)) @ jacobian.mT
    )
    step = torch.linalg.solve(information, gradient).squeeze(-1)
    # far from the mode no further than the prior is wide
    return what + step.clamp(-1, 1), information


def of_pixels(images, where, frames):
    """Derivative of the log likelihood by the pixels of images, and its expected negative second.

    Both are sums over frames, ``(..., videos, digits, SIZE, SIZE)``.
    """
    sums = 0
    for t in range(frames.shape[1]):
        placed = place(images, where[..., t, :, :])
        clear = 1 - placed
        off = darkness(placed).unsqueeze(-3)
        on = 1 - off
        slope = (frames[:, t].unsqueeze(-3) - on) / (on * clear)
        weight = off / (on * clear.square())
        sums = sums + crop(torch.stack([slope, weight]), where[..., t, :, :])
    return sums


def images_by_feature(tracker, what):
    """Derivatives of images by what they are decoded from, ``(..., FEATURES, SIZE, SIZE)``."""

    def along(direction):
        return torch.func.jvp(tracker.decode, (what,), (direction.expand_as(what),))[1]

    return torch.func.vmap(along, out_dims=-3)(torch.eye(FEATURES))
