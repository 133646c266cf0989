"""Check that conditioned outputs can be moved, independently, by moving the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .inspection import ModelStructure

__all__ = ["check_dependence", "check_rank"]


def check_dependence(
    structure: ModelStructure, matrices: Tensor, outputs: Tensor, *, at: str
) -> None:
    """
    Refuse outputs whose derivative by every input is zero at every point tried.

    :param structure: the model's structure, for the names of sites.
    :param Tensor matrices: Jacobians at several points, ``(points, num_constraints, dim)``.
    :param Tensor outputs: residuals at the same points, ``(points, num_constraints)``.
    :param str at: what the points are, for the message.
    :raises ValueError: naming the outputs.
    """
    is_flat = (matrices == 0).all(-1).all(0)
    if not is_flat.any():
        return
    index = int(is_flat.nonzero()[0])
    name, count = structure.constraint_name(index), int(is_flat.sum())
    varies = bool((outputs[:, index] != outputs[0, index]).any())
    cause = (
        "its value changes from draw to draw, so it passes through a step that has no "
        "derivative: .detach(), .item(), a conversion to NumPy, rounding, a comparison or a "
        "random draw outside pyro.sample. Make it a differentiable function of pyro.sample sites"
        if varies
        else "its value is the same at every draw, so it does not depend on any latent site. "
        "Remove it from the conditioned values, or register an output that depends on them"
    )
    more = f" (and {count - 1} more conditioned elements)" if count > 1 else ""
    raise ValueError(
        f"Output {name!r}{more} is conditioned on, but its derivative by every latent site is "
        f"zero at {len(matrices)} {at}: {cause}."
    )


def check_rank(structure: ModelStructure, matrices: Tensor) -> None:
    """
    Refuse outputs that are functions of each other.

    :param structure: the model's structure, for the names of sites.
    :param Tensor matrices: Jacobians at points on the manifold, ``(points, num_constraints,
        dim)``.
    :raises ValueError: naming the outputs, if the Jacobian has less than full row rank at every
        point.
    """
    unit = matrices / matrices.norm(dim=-1, keepdim=True)
    left, singular, _ = torch.linalg.svd(unit, full_matrices=False)
    precision = max(unit.shape[-2:]) * torch.finfo(unit.dtype).eps
    is_deficient = singular[:, -1] <= precision * singular[:, 0]
    if not is_deficient.all():
        return
    # the left singular vector of the smallest singular value says which rows depend on others
    weights = left[0, :, -1].abs()
    involved = weights.argsort(descending=True)[:4]
    names = [structure.constraint_name(int(i)) for i in involved if weights[i] > 1e-3]
    rank = int((singular[0] > precision * singular[0, 0]).sum())
    raise ValueError(
        f"The Jacobian of the {len(weights)} conditioned outputs has rank {rank}: "
        f"outputs {names} are functions of each other (smallest singular value "
        f"{float(singular[0, -1]):.1e} after scaling rows to length one). Condition on each "
        "independent quantity once, or add noise inputs."
    )
