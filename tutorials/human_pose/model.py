r"""Human pose and camera from images of joints: body, camera, and the Pyro model.

A body has bone lengths :math:`\ell`, log-normal, and joint angles, whose distribution is the
decoder of a variational autoencoder. Its Gaussian outputs are the cosines and sines of the angles
up to a factor,

.. math::

    h \sim N(0, I), \qquad q \sim N(m(h), s(h)^2), \qquad
    \theta_j = \mathrm{atan2}(q_{J+j}, q_j).

A pin-hole camera, at an unknown position and of fixed orientation, takes images of the joints,
with a little Gaussian noise. Where the depth is unknown, as it is from one image, the posterior is
wide in some directions and, by the small noise, extremely narrow in all others.

This is section 7.2 of Graham and Storkey, "Asymptotically exact inference in differentiable
generative models", AISTATS 2017. With the parameters that its authors published under
``$PYRO_EXT_DATA/pose`` the body is theirs; otherwise a simpler one of our own takes its place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from skeleton import Joint, Skeleton, build_skeleton, forward_kinematics, read_bvh
from torch import Tensor

__all__ = [
    "BASELINE",
    "IMAGE_NOISE",
    "Body",
    "Camera",
    "joint_positions",
    "load_body",
    "pose_model",
    "project",
    "stick_figure",
    "trained_body",
]

IMAGE_NOISE = 0.001
FOCAL_LENGTH = math.exp(2.0)
BASELINE = 0.5  # metres from the middle to either of two cameras
CAMERA_SCALE = 0.1
LOG_DEPTH = (1.5, 0.5)

Decoder = Callable[[Tensor], tuple[Tensor, Tensor]]


class Body(NamedTuple):
    """
    A skeleton and the distribution of its measures.

    ``log_length_mean``, ``log_length_scale_tril``
        of the bone lengths' logarithms, in metres.
    ``latent_size``
        size of the pose's latent vector.
    ``decoder``
        from latent vectors to means and standard deviations of the cosines of all angles, followed
        by the sines, shape ``(..., 2 * num_angles)``.
    ``source``
        where the body is from, in words.
    """

    skeleton: Skeleton
    log_length_mean: Tensor
    log_length_scale_tril: Tensor
    latent_size: int
    decoder: Decoder
    source: str


class Camera(NamedTuple):
    """Position of a camera: ``sideways`` of shape ``(..., 2)``, and ``depth``, both in metres."""

    sideways: Tensor
    depth: Tensor


def joint_positions(body: Body, log_lengths: Tensor, features: Tensor) -> Tensor:
    """
    Place the joints of a body.

    :param Tensor log_lengths: shape ``(..., num_bones)``.
    :param Tensor features: cosines and sines of the angles, up to a factor each, shape
        ``(..., 2 * num_angles)``.
    :returns: positions in metres from the root, shape ``(..., num_joints, 3)``.
    """
    cosines, sines = features.chunk(2, -1)
    size = (cosines.square() + sines.square()).sqrt()
    return forward_kinematics(body.skeleton, log_lengths.exp(), cosines / size, sines / size)


def project(joints: Tensor, camera: Camera, shift: float = 0.0) -> Tensor:
    """
    Take an image of joints through a pin-hole.

    The camera looks at the front of the body, so that its axes are those of the body turned by
    half a turn about the vertical one.

    :param Tensor joints: shape ``(..., num_joints, 3)``.
    :param Camera camera: where it is.
    :param float shift: sideways distance of this camera from there.
    :returns: all horizontal, then all vertical coordinates, shape ``(..., 2 * num_joints)``.
    """
    x, y, z = joints.unbind(-1)
    right, up = camera.sideways[..., :1] + shift - x, camera.sideways[..., 1:] + y
    away = camera.depth.unsqueeze(-1) - z
    return FOCAL_LENGTH * torch.cat([right / away, up / away], -1)


def pose_model(body: Body, num_cameras: int = 2, image: Tensor | None = None) -> Tensor:
    """
    Draw a body, its pose and a camera, and take one or two images.

    :param Body body: whose pose.
    :param int num_cameras: two cameras stand side by side, one metre apart.
    :param Tensor image: what was seen, if anything.
    :returns: the images, one after another, shape ``(2 * num_joints * num_cameras,)``.
    :raises ValueError: for another number of cameras.
    """
    if num_cameras not in (1, 2):
        raise ValueError(f"num_cameras must be 1 or 2, got {num_cameras}")
    log_lengths = pyro.sample(
        "log_lengths",
        dist.MultivariateNormal(body.log_length_mean, scale_tril=body.log_length_scale_tril),
    )
    latent = pyro.sample("latent", dist.Normal(0.0, 1.0).expand([body.latent_size]).to_event(1))
    mean, scale = body.decoder(latent)
    features = pyro.sample("features", dist.Normal(mean, scale).to_event(1))
    sideways = pyro.sample("sideways", dist.Normal(0.0, CAMERA_SCALE).expand([2]).to_event(1))
    depth = pyro.sample("depth", dist.LogNormal(*LOG_DEPTH))
    joints = pyro.deterministic("joints", joint_positions(body, log_lengths, features))
    shifts = (BASELINE, -BASELINE) if num_cameras == 2 else (0.0,)
    seen = torch.cat([project(joints, Camera(sideways, depth), shift) for shift in shifts], -1)
    return pyro.sample("image", dist.Normal(seen, IMAGE_NOISE).to_event(1), obs=image)


# ----------------------------------------------------------------------------------------- bodies


def load_body() -> Body:
    """Return the trained body if ``$PYRO_EXT_DATA/pose`` is there, the stick figure otherwise."""
    folder = Path(os.environ.get("PYRO_EXT_DATA", "")) / "pose"
    is_there = "PYRO_EXT_DATA" in os.environ and folder.is_dir()
    return trained_body(folder) if is_there else stick_figure()


# The end of the bone whose length it is, or of both of that name; left and right are alike.
_TRAINED_BONES = {
    "waist": ["spine"],
    "spine": ["head"],
    "head": ["headendsite"],
    "mid-spine": ["{side}shoulder"],
    "half-shoulder": ["{side}arm"],
    "upper-arm": ["{side}forearm"],
    "lower-arm": ["{side}hand"],
    "hand": ["{side}handendsite"],
    "half-hip": ["{side}upleg"],
    "upper-leg": ["{side}leg"],
    "lower-leg": ["{side}foot"],
    "back-foot": ["{side}toebase"],
}
_ARM = ["{side}arm", "{side}forearm", "{side}hand", "{side}handendsite"]
_LEG = ["{side}upleg", "{side}leg", "{side}foot", "{side}toebase"]


def _both(names: list[str]) -> list[str]:
    """Left ones, then right ones."""
    return [name.format(side=side) for side in ("left", "right") for name in names]


def _chain(names: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(names))


def trained_body(folder: Path) -> Body:
    """
    Read the body of the paper: 19 joints, 47 angles, 13 bone lengths.

    :param Path folder: contains ``skeleton.bvh``, ``fixed_angles.json``, ``params.npz``,
        ``bone_length_params.npz`` and ``bone_length_lengths_order.json``.
    """
    order = json.loads((folder / "bone_length_lengths_order.json").read_text())
    bones = {
        joint.format(side=side): order[bone]
        for bone, joints in _TRAINED_BONES.items()
        for joint in joints
        for side in ("left", "right")
    }
    edges = _chain(["spine", "head", "headendsite"])
    for side in ("left", "right"):
        edges += _chain(["head", *(name.format(side=side) for name in _ARM)])
        edges += _chain(["spine", *(name.format(side=side) for name in _LEG)])
    skeleton, _ = build_skeleton(
        read_bvh((folder / "skeleton.bvh").read_text()),
        bones,
        ["spine", "head", "headendsite", *_both(_ARM), *_both(_LEG)],
        edges,
        json.loads((folder / "fixed_angles.json").read_text()),
    )
    lengths = np.load(folder / "bone_length_params.npz")
    params = {name: torch.from_numpy(w) for name, w in np.load(folder / "params.npz").items()}
    return Body(
        skeleton=skeleton,
        log_length_mean=torch.from_numpy(lengths["mean"]),
        log_length_scale_tril=torch.from_numpy(lengths["covar_chol"]).T.contiguous(),
        latent_size=len(params["W_0"]),
        decoder=lambda latent: _decode(params, latent),
        source="the trained body of Graham and Storkey (2017)",
    )


def _decode(params: dict[str, Tensor], latent: Tensor) -> tuple[Tensor, Tensor]:
    """Six hidden layers, each added to the one before, and a linear one."""
    last = len(params) // 2 - 1
    hidden = torch.tanh(latent @ params["W_0"] + params["b_0"])
    for i in range(1, last):
        hidden = torch.tanh(hidden @ params[f"W_{i}"] + params[f"b_{i}"]) + hidden
    mean, log_variance = (hidden @ params[f"W_{last}"] + params[f"b_{last}"]).chunk(2, -1)
    return mean, (0.5 * log_variance).exp()


# joint, parent, direction, length in metres, and lower and upper limits of its angles in degrees
_Limits = dict[str, tuple[float, float]]
_TRUNK: list[tuple[str, str | None, tuple[float, float, float], float, _Limits]] = [
    ("pelvis", None, (0, 0, 0), 0.0, {"x": (-15, 25), "y": (-40, 40), "z": (-10, 10)}),
    ("neck", "pelvis", (0, 1, 0), 0.50, {"x": (-20, 40), "y": (-30, 30), "z": (-20, 20)}),
    ("crown", "neck", (0, 1, 0), 0.25, {}),
]
_SIDE: list[tuple[str, str, tuple[float, float, float], float, _Limits]] = [
    (
        "shoulder",
        "pelvis",
        (0.37, 0.93, 0),
        0.48,
        {"x": (-90, 40), "y": (-60, 30), "z": (-85, 60)},
    ),
    ("elbow", "shoulder", (1, 0, 0), 0.31, {"y": (-130, -5)}),
    ("hand", "elbow", (1, 0, 0), 0.33, {}),
    ("hip", "pelvis", (1, -0.3, 0), 0.13, {"x": (-70, 30), "y": (-25, 25), "z": (-5, 30)}),
    ("knee", "hip", (0, -1, 0), 0.44, {"x": (5, 100)}),
    ("foot", "knee", (0, -1, 0), 0.43, {}),
]
_FEATURE_SCALE = 0.05
_LENGTH_SPREAD = 0.06


def stick_figure() -> Body:
    """
    Return a body of 15 joints, 22 angles and 8 bone lengths, which turns each joint on its own.

    The decoder is no network: every angle lies between two limits, by the hyperbolic tangent of a
    latent of its own.
    """
    joints, lengths, low, high = [], {}, [], []
    for name, parent, direction, length, limits in _TRUNK:
        joints.append(Joint(name, parent, direction, "".join(limits)))
        if parent is not None:
            lengths[name] = length
        low += [limit[0] for limit in limits.values()]
        high += [limit[1] for limit in limits.values()]
    for side, sign in (("left", 1.0), ("right", -1.0)):
        for name, parent, (x, y, z), length, limits in _SIDE:
            above = parent if parent == "pelvis" else f"{side} {parent}"
            joints.append(Joint(f"{side} {name}", above, (sign * x, y, z), "".join(limits)))
            lengths[name] = length
            for axis, (lower, upper) in limits.items():  # mirror images turn the other way
                is_mirrored = axis != "x" and sign < 0
                low.append(-upper if is_mirrored else lower)
                high.append(-lower if is_mirrored else upper)
    bones = {joint.name: list(lengths).index(joint.name.split()[-1]) for joint in joints[1:]}
    arms = [
        [f"{side} {part}" for part in ("shoulder", "elbow", "hand")] for side in ("left", "right")
    ]
    legs = [[f"{side} {part}" for part in ("hip", "knee", "foot")] for side in ("left", "right")]
    edges = _chain(["pelvis", "neck", "crown"])
    edges += [edge for arm in arms for edge in _chain(["neck", *arm])]
    edges += [edge for leg in legs for edge in _chain(["pelvis", *leg])]
    outputs = ["neck", "crown", *arms[0], *arms[1], *legs[0], *legs[1]]
    skeleton, _ = build_skeleton(joints, bones, ["pelvis", *outputs], edges)
    limits = torch.tensor([low, high], dtype=torch.float64).deg2rad()
    return Body(
        skeleton=skeleton,
        log_length_mean=torch.tensor(list(lengths.values()), dtype=torch.float64).log(),
        log_length_scale_tril=_LENGTH_SPREAD * torch.eye(len(lengths), dtype=torch.float64),
        latent_size=len(low),
        decoder=lambda latent: _turn(limits, latent),
        source="a stick figure",
    )


def _turn(limits: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    middle, half = limits.mean(0), 0.5 * (limits[1] - limits[0])
    angles = middle + half * torch.tanh(latent)
    mean = torch.cat([angles.cos(), angles.sin()], -1)
    return mean, torch.full_like(mean, _FEATURE_SCALE)
