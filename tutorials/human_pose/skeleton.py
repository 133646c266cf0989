"""Skeletons: trees of joints, and where the joints are, given bone lengths and joint angles.

A joint carries a rotation, composed of up to three rotations about the axes of its parent's frame.
It turns whatever hangs from the joint, not the joint itself. :func:`forward_kinematics` works on
all joints of the same depth at once, so that a skeleton costs a few operations per level.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Joint", "Skeleton", "build_skeleton", "forward_kinematics", "read_bvh"]

_AXES = "xyz"


class Joint(NamedTuple):
    """
    One joint as a person would describe it.

    ``name``, ``parent``
        the parent comes earlier in a list of joints; the root has none.
    ``offset``
        direction from the parent in the parent's frame, of any length; zero for the root.
    ``order``
        axes of the rotations, first one first, such as ``"xyz"``; empty where nothing turns.
    """

    name: str
    parent: str | None
    offset: tuple[float, float, float]
    order: str


class Skeleton(NamedTuple):
    """
    Joints as tensors, ordered by depth; only those that the outputs depend on.

    ``directions``
        unit vector of the bone that ends at a joint, shape ``(num_joints, 3)``.
    ``bones``
        which length that bone has, shape ``(num_joints,)``.
    ``axes``
        generators of the three rotations, shape ``(num_joints, 3, 3, 3)``.
    ``angles``
        which angles they use, shape ``(num_joints, 3)``; the fixed ones follow the free ones.
    ``fixed``
        angles that do not vary, shape ``(num_fixed,)``.
    ``parents``
        for each depth the parents of its joints, as places within the depth before.
    ``outputs``
        joints to return, in the order asked for.
    ``edges``
        pairs of outputs to draw lines between.
    """

    directions: Tensor
    bones: Tensor
    axes: Tensor
    angles: Tensor
    fixed: Tensor
    parents: tuple[Tensor, ...]
    outputs: Tensor
    edges: tuple[tuple[int, int], ...]


def build_skeleton(
    joints: Sequence[Joint],
    bones: Mapping[str, int],
    outputs: Sequence[str],
    edges: Sequence[tuple[str, str]],
    fixed_angles: Mapping[str, float] | None = None,
) -> tuple[Skeleton, int]:
    """
    Turn a list of joints into tensors.

    :param joints: parents before children. The rotations that are not fixed use the free angles
        in the order of this list.
    :param bones: index of the length of the bone that ends at a joint, by the joint's name.
    :param outputs: names of the joints whose positions are wanted.
    :param edges: pairs of outputs, for drawings.
    :param fixed_angles: radians of rotations that do not vary, by ``<joint>_<axis>``.
    :returns: the skeleton and the number of free angles.
    :raises ValueError: if a joint, a parent or a bone is missing.
    """
    fixed_angles = fixed_angles or {}
    by_name = {joint.name: joint for joint in joints}
    for name in [*outputs, *(joint.parent for joint in joints if joint.parent is not None)]:
        if name not in by_name:
            raise ValueError(f"no joint is called {name!r}; there are {sorted(by_name)}")
    free, fixed = _number_angles(joints, fixed_angles)
    needed = _ancestors(by_name, outputs)
    depths = {name: _depth(by_name, name) for name in needed}
    ordered = sorted(needed, key=lambda name: (depths[name], list(by_name).index(name)))
    missing = [name for name in ordered[1:] if name not in bones]
    if missing:
        raise ValueError(f"there are no bone lengths of {missing}")
    index = {name: i for i, name in enumerate(ordered)}
    offsets = torch.tensor([by_name[name].offset for name in ordered], dtype=torch.float64)
    levels: list[list[str]] = [[] for _ in range(1 + max(depths.values()))]
    for name in ordered:
        levels[depths[name]].append(name)
    parents = [torch.zeros(1, dtype=torch.long)]
    for above, names in pairwise(levels):
        parents.append(torch.tensor([above.index(str(by_name[name].parent)) for name in names]))
    angles, axes = _rotations([by_name[name] for name in ordered], free, fixed)
    skeleton = Skeleton(
        directions=torch.nn.functional.normalize(offsets, dim=-1),
        bones=torch.tensor([bones.get(name, 0) for name in ordered]),
        axes=axes,
        angles=angles,
        fixed=torch.tensor([0.0, *fixed_angles.values()], dtype=torch.float64),
        parents=tuple(parents),
        outputs=torch.tensor([index[name] for name in outputs]),
        edges=tuple((list(outputs).index(a), list(outputs).index(b)) for a, b in edges),
    )
    return skeleton, len(free)


def forward_kinematics(
    skeleton: Skeleton, lengths: Tensor, cosines: Tensor, sines: Tensor
) -> Tensor:
    r"""
    Positions of the joints, with the root at the origin.

    Rotations accumulate from the root, :math:`R_j = R_{p(j)} \prod_k R(a_{jk}, \theta_{jk})`, and
    :math:`x_j = x_{p(j)} + \ell_j R_{p(j)} d_j`.

    :param Tensor lengths: lengths of the bones, shape ``batch_shape + (num_bones,)``.
    :param Tensor cosines: cosines of the free angles, shape ``batch_shape + (num_angles,)``.
    :param Tensor sines: their sines, likewise.
    :returns: shape ``batch_shape + (num_outputs, 3)``.
    """
    batch_shape = torch.broadcast_shapes(lengths.shape[:-1], cosines.shape[:-1])
    lengths = lengths.expand(*batch_shape, -1)
    cosines, sines = cosines.expand(*batch_shape, -1), sines.expand(*batch_shape, -1)
    fixed = skeleton.fixed.to(cosines).expand(*cosines.shape[:-1], -1)
    cosines = torch.cat([cosines, fixed.cos()], -1)[..., skeleton.angles, None, None]
    sines = torch.cat([sines, fixed.sin()], -1)[..., skeleton.angles, None, None]
    # Rodrigues: I + sin K + (1 - cos) K^2, for all rotations of all joints
    K, identity = skeleton.axes.to(cosines), torch.eye(3, dtype=cosines.dtype)
    first, second, third = (identity + sines * K + (1 - cosines) * (K @ K)).unbind(-3)
    local = first @ second @ third
    bones = lengths[..., skeleton.bones].unsqueeze(-1) * skeleton.directions.to(lengths)
    # joints are ordered by depth: split into levels, which differentiates faster than indexing
    sizes = [len(parents) for parents in skeleton.parents]
    (R, *turns), (x, *steps) = local.split(sizes, -3), bones.split(sizes, -2)
    positions = [x]
    for parents, turn, step in zip(skeleton.parents[1:], turns, steps, strict=True):
        R, x = R[..., parents, :, :], x[..., parents, :]
        x = x + (R @ step.unsqueeze(-1)).squeeze(-1)
        R = R @ turn
        positions.append(x)
    return torch.cat(positions, -2)[..., skeleton.outputs, :]


# ------------------------------------------------------------------------------------------ files


def read_bvh(text: str) -> list[Joint]:
    """
    Read the hierarchy of a file in Biovision's format.

    Names become lower case. An end site is a joint without rotations, called by its parent's name
    and ``endsite``. Position channels, and the motion that may follow, are ignored.

    :param str text: content of the file.
    :returns: joints, depth first.
    :raises ValueError: if the text has no hierarchy, or an unknown word in it.
    """
    words = iter(re.findall(r"[^\s]+", text))
    if next(words, "") != "HIERARCHY" or next(words, "") != "ROOT":
        raise ValueError("a BVH file begins with HIERARCHY and ROOT")
    joints: list[Joint] = []
    _read_joint(words, next(words).lower(), None, joints)
    return joints


def _read_joint(words: Iterator[str], name: str, parent: str | None, joints: list[Joint]) -> None:
    """Read what stands between the braces of a joint, the joints in it included."""
    place = len(joints)
    joints.append(Joint(name, parent, (0.0, 0.0, 0.0), ""))
    next(words)  # the opening brace
    while (word := next(words)) != "}":
        if word == "OFFSET":
            x, y, z = (float(next(words)) for _ in range(3))
            joints[place] = joints[place]._replace(offset=(x, y, z))
        elif word == "CHANNELS":
            channels = [next(words) for _ in range(int(next(words)))]
            order = "".join(c[0].lower() for c in channels if c.endswith("rotation"))
            joints[place] = joints[place]._replace(order=order)
        elif word == "JOINT":
            _read_joint(words, next(words).lower(), name, joints)
        elif word == "End":
            next(words)  # Site
            _read_joint(words, f"{name}endsite", name, joints)
        else:
            raise ValueError(f"unknown word {word!r} in the description of joint {name!r}")


# ------------------------------------------------------------------------------------------- tree


def _ancestors(by_name: Mapping[str, Joint], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        ancestor: str | None = name
        while ancestor is not None and ancestor not in found:
            found.add(ancestor)
            ancestor = by_name[ancestor].parent
    return found


def _depth(by_name: Mapping[str, Joint], name: str) -> int:
    parent = by_name[name].parent
    return 0 if parent is None else 1 + _depth(by_name, parent)


def _number_angles(
    joints: Sequence[Joint], fixed_angles: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return places of the free and of the fixed angles; before the fixed ones is a zero."""
    channels = [f"{joint.name}_{axis}" for joint in joints for axis in joint.order]
    unknown = sorted(set(fixed_angles) - set(channels))
    if unknown:
        raise ValueError(f"the fixed angles {unknown} belong to no rotation of a joint")
    free_channels = [channel for channel in channels if channel not in fixed_angles]
    free = {channel: i for i, channel in enumerate(free_channels)}
    fixed = {channel: len(free) + 1 + i for i, channel in enumerate(fixed_angles)}
    return free, fixed


def _rotations(
    joints: Sequence[Joint], free: Mapping[str, int], fixed: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Which angle each of the three rotations of a joint uses, and its generator."""
    places = {**free, **fixed}
    angles = torch.full((len(joints), 3), len(free))  # the zero before the fixed angles
    axes = torch.zeros(len(joints), 3, 3, 3, dtype=torch.float64)
    for j, joint in enumerate(joints):
        for k, axis in enumerate(joint.order):
            angles[j, k] = places[f"{joint.name}_{axis}"]
            a = _AXES.index(axis)
            b, c = (a + 1) % 3, (a + 2) % 3
            axes[j, k, c, b], axes[j, k, b, c] = 1.0, -1.0  # right-handed
    return angles, axes
