"""The tutorial on human pose: kinematics, bodies, cameras and figures."""

import io
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

from pyro_ext import ConstrainedHMC, lift_observations
from tests.tutorials.conftest import load_siblings

POSE_DATA = Path(os.environ.get("PYRO_EXT_DATA", "")) / "pose"


@pytest.fixture(scope="module")
def modules() -> list[ModuleType]:
    return load_siblings("human_pose", "skeleton", "model", "comparison")


@pytest.fixture(scope="module")
def skeleton(modules: list[ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def pose(modules: list[ModuleType]) -> ModuleType:
    return modules[1]


@pytest.fixture(scope="module")
def comparison(modules: list[ModuleType]) -> ModuleType:
    return modules[2]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load_siblings("human_pose", "figures")[0]


# ---------------------------------------------------------------------------------- kinematics


def rotation(axis: str, angle: float) -> np.ndarray:
    """A right-handed rotation about a coordinate axis, as it is written on paper."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array(
        {
            "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
            "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
            "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
        }[axis]
    )


def joint_by_joint(
    joints: list[Any], lengths: dict[str, float], angles: dict[str, float]
) -> dict[str, np.ndarray]:
    """Follow every bone from the root."""
    frames: dict[Any, tuple[np.ndarray, np.ndarray]] = {None: (np.eye(3), np.zeros(3))}
    for joint in joints:
        R, x = frames[joint.parent]
        offset = np.array(joint.offset, dtype=float)
        if offset.any():
            x = x + R @ (lengths[joint.name] * offset / np.linalg.norm(offset))
        for axis in joint.order:
            R = R @ rotation(axis, angles[f"{joint.name}_{axis}"])
        frames[joint.name] = (R, x)
    return {name: x for name, (_, x) in frames.items() if name is not None}


def a_tree(skeleton: ModuleType) -> list[Any]:
    Joint = skeleton.Joint
    return [
        Joint("root", None, (0.0, 0.0, 0.0), "xyz"),
        Joint("a", "root", (0.0, 2.0, 0.0), "yzx"),
        Joint("aa", "a", (1.0, 1.0, -3.0), "z"),
        Joint("aaa", "aa", (0.0, 0.0, 1.0), ""),
        Joint("b", "root", (-1.0, 0.5, 0.0), "xzy"),
        Joint("unused", "b", (1.0, 0.0, 0.0), "xy"),
        Joint("bb", "b", (0.0, -1.0, 0.2), ""),
    ]


def test_positions_are_those_of_following_every_bone(skeleton: ModuleType) -> None:
    joints, outputs = a_tree(skeleton), ["bb", "aaa", "a", "root"]
    bones = {"a": 0, "aa": 1, "aaa": 0, "b": 2, "bb": 1}
    fixed = {"a_z": 0.3, "b_x": -1.2}
    tree, num_angles = skeleton.build_skeleton(joints, bones, outputs, [("root", "a")], fixed)
    channels = [f"{j.name}_{axis}" for j in joints for axis in j.order]
    free = [channel for channel in channels if channel not in fixed]
    assert num_angles == len(free) == 10
    assert tree.edges == ((3, 2),)

    angles, lengths = 2 * torch.randn(5, num_angles), torch.rand(5, 3) + 0.5
    found = skeleton.forward_kinematics(tree, lengths, angles.cos(), angles.sin())
    assert found.shape == (5, 4, 3)
    for i in range(5):
        named = {**dict(zip(free, angles[i].tolist(), strict=True)), **fixed}
        sizes = {name: float(lengths[i, bone]) for name, bone in bones.items()}
        sizes["unused"] = 1.0
        expected = joint_by_joint(joints, sizes, named)
        torch.testing.assert_close(
            found[i], torch.tensor(np.stack([expected[name] for name in outputs]))
        )


def test_hierarchies_are_read_from_biovision_files(skeleton: ModuleType) -> None:
    text = """HIERARCHY
    ROOT Hips { OFFSET 0 0 0 CHANNELS 6 Xposition Yposition Zposition Xrotation Yrotation Zrotation
      JOINT Leg { OFFSET 1.5 -2 0 CHANNELS 2 Zrotation Xrotation End Site { OFFSET 0 -1e1 0 } }
      JOINT Tail { OFFSET 0 0 -1 CHANNELS 1 Yrotation } }
    MOTION Frames: 1"""
    Joint = skeleton.Joint
    assert skeleton.read_bvh(text) == [
        Joint("hips", None, (0.0, 0.0, 0.0), "xyz"),
        Joint("leg", "hips", (1.5, -2.0, 0.0), "zx"),
        Joint("legendsite", "leg", (0.0, -10.0, 0.0), ""),
        Joint("tail", "hips", (0.0, 0.0, -1.0), "y"),
    ]


def test_skeletons_say_what_is_missing(skeleton: ModuleType) -> None:
    joints, bones = a_tree(skeleton), {"a": 0, "aa": 1, "aaa": 0, "b": 2, "bb": 1}
    with pytest.raises(ValueError, match="no joint is called 'hand'"):
        skeleton.build_skeleton(joints, bones, ["hand"], [])
    with pytest.raises(ValueError, match=r"no bone lengths of \['aa'\]"):
        skeleton.build_skeleton(joints, {"a": 0}, ["aa"], [])
    with pytest.raises(ValueError, match=r"fixed angles \['a_w'\]"):
        skeleton.build_skeleton(joints, bones, ["a"], [], {"a_w": 0.0})
    with pytest.raises(ValueError, match="begins with HIERARCHY"):
        skeleton.read_bvh("MOTION")
    with pytest.raises(ValueError, match="unknown word 'SIZE'"):
        skeleton.read_bvh("HIERARCHY ROOT Hips { SIZE 3 }")


# -------------------------------------------------------------------------------------- bodies


def bone_vectors(body: Any, joints: Tensor) -> Tensor:
    first, second = torch.tensor(body.skeleton.edges).T
    return joints[..., second, :] - joints[..., first, :]


def test_stick_figure_keeps_its_bones_whatever_its_pose(pose: ModuleType) -> None:
    body = pose.stick_figure()
    features = torch.randn(100, 44)
    joints = pose.joint_positions(body, body.log_length_mean, features)
    assert joints.shape == (100, 15, 3)
    sizes = bone_vectors(body, joints).norm(dim=-1)
    named = dict(zip(body.skeleton.edges, sizes.unbind(-1), strict=True))
    bones = body.log_length_mean.exp()
    for edge in ((3, 4), (6, 7)):  # upper arms: left, right
        torch.testing.assert_close(named[edge], bones[3].expand(100))
    for edge in ((10, 11), (13, 14)):  # lower legs
        torch.testing.assert_close(named[edge], bones[7].expand(100))


def test_stick_figure_is_symmetric_when_its_latents_are(pose: ModuleType) -> None:
    body = pose.stick_figure()
    side = torch.randn(8)  # shoulder x y z, elbow y, hip x y z, knee x
    mirrored = side * torch.tensor([1.0, -1, -1, -1, 1, -1, -1, 1])
    latent = torch.cat([torch.zeros(6), side, mirrored])
    low, high = (body.decoder(torch.full((22,), value))[0] for value in (-40.0, 40.0))
    angle = torch.atan2(high[22:], high[:22]) + torch.atan2(low[22:], low[:22])
    # the trunk's own limits are not symmetric; straight up, only its turns and tilts matter
    trunk = torch.atanh(-angle[:6] / (torch.atan2(high[22:], high[:22])[:6] * 2 - angle[:6]))
    latent[:6] = trunk
    joints = pose.joint_positions(body, body.log_length_mean, body.decoder(latent)[0])
    left, right = joints[[3, 4, 5, 9, 10, 11]], joints[[6, 7, 8, 12, 13, 14]]
    torch.testing.assert_close(left * torch.tensor([-1.0, 1, 1]), right)


def test_angles_of_the_stick_figure_stay_within_their_limits(pose: ModuleType) -> None:
    body = pose.stick_figure()
    mean, scale = body.decoder(50 * torch.randn(1000, 22))
    angles = torch.atan2(mean[:, 22:], mean[:, :22]).rad2deg()
    assert (scale > 0).all()
    knees = angles[:, [13, 21]]
    assert knees.min() >= 5 - 1e-9
    assert knees.max() <= 100 + 1e-9


def test_camera_sees_by_the_theorem_of_intersecting_lines(pose: ModuleType) -> None:
    joints = torch.tensor([[0.2, 1.0, 0.5]])
    camera = pose.Camera(torch.tensor([0.1, -0.3]), torch.tensor(4.5))
    image = pose.project(joints, camera, shift=0.5)
    expected = np.exp(2) * torch.tensor([(0.1 + 0.5 - 0.2) / 4.0, (-0.3 + 1.0) / 4.0])
    torch.testing.assert_close(image, expected)


@pytest.mark.parametrize("num_cameras", [1, 2])
def test_model_draws_an_image_of_its_joints(pose: ModuleType, num_cameras: int) -> None:
    body = pose.stick_figure()
    nodes = pyro.poutine.trace(pose.pose_model).get_trace(body, num_cameras).nodes
    camera = pose.Camera(nodes["sideways"]["value"], nodes["depth"]["value"])
    seen = pose.project(nodes["joints"]["value"], camera, 0.5 if num_cameras == 2 else 0.0)
    image = nodes["image"]["value"]
    assert image.shape == (30 * num_cameras,)
    assert ((image[:30] - seen).abs() < 6 * pose.IMAGE_NOISE).all()


def test_model_names_a_wrong_number_of_cameras(pose: ModuleType) -> None:
    with pytest.raises(ValueError, match="must be 1 or 2, got 3"):
        pose.pose_model(pose.stick_figure(), 3)


def test_stick_figure_stands_in_where_there_are_no_data(
    pose: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYRO_EXT_DATA", raising=False)
    assert pose.load_body().source == "a stick figure"
    monkeypatch.setenv("PYRO_EXT_DATA", str(tmp_path))
    assert pose.load_body().source == "a stick figure"


@pytest.mark.skipif(not POSE_DATA.is_dir(), reason="no pose data under PYRO_EXT_DATA")
def test_trained_body_agrees_with_another_implementation(pose: ModuleType) -> None:
    body = pose.trained_body(POSE_DATA)
    scenes = np.random.RandomState(1234).normal(size=(3, 216))
    inputs = torch.from_numpy(np.concatenate([np.zeros((1, 216)), scenes]))
    lengths, latent, noise, camera, image_noise = inputs.split([13, 30, 94, 3, 76], -1)
    mean, scale = body.decoder(latent)
    log_lengths = body.log_length_mean + lengths @ body.log_length_scale_tril.T
    joints = pose.joint_positions(body, log_lengths, mean + scale * noise)
    place = pose.Camera(0.1 * camera[:, :2], (1.5 + 0.5 * camera[:, 2]).exp())
    seen = [pose.project(joints, place, shift) for shift in (0.5, -0.5)]
    image = torch.cat(seen, -1) + 0.001 * image_noise

    close: Any = torch.testing.assert_close
    close(
        image.sum(-1),
        torch.tensor([-2.686222455448611, 1.4770443379, -14.0411554586, -2.1021891262]),
    )
    close(
        image.square().sum(-1),
        torch.tensor([70.165425645, 24.4385940829, 83.5403343355, 33.8877518025]),
        rtol=1e-9,
        atol=0,
    )
    first = [[0.84558896, 0.89579739, 0.89088715, 0.58755705]]
    first += [[0.62937038, 0.60765402, 0.57413793, 0.45633545]]
    close(image[:2, :4], torch.tensor(first), rtol=0, atol=1e-8)
    close(joints[0, 2], torch.tensor([-0.03251997, 0.74066699, 0.06494572]), rtol=0, atol=1e-8)
    close(joints[0, 14], torch.tensor([0.19240892, -0.95387679, 0.09092569]), rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------- comparison


def test_running_error_is_that_of_the_mean_so_far(comparison: ModuleType) -> None:
    joints, truth = torch.randn(2, 5, 7, 3), torch.randn(7, 3)
    errors = comparison.running_error(joints, truth)
    distance = (joints[:, :3].mean((0, 1)) - truth).norm(dim=-1)
    torch.testing.assert_close(errors[2], distance.square().mean().sqrt())


def test_poses_that_are_drawn_have_the_same_image(
    pose: ModuleType, comparison: ModuleType
) -> None:
    body = pose.stick_figure()
    image = pyro.poutine.trace(pose.pose_model).get_trace(body, 1).nodes["image"]["value"]

    def seen() -> None:
        pose.pose_model(body, 1, image)

    model = lift_observations(seen)
    options: dict[str, Any] = {"structure": "dense", "adapt_step_size": False}
    kernel = ConstrainedHMC(model, num_steps=2, step_size=0.002, **options)
    run = comparison.timed_run(kernel, model, 2, 0, 2)
    assert run.joints.shape == (2, 2, 15, 3)
    assert run.seconds.shape == (2,)
    assert (run.seconds.diff() > 0).all()
    draws = run.mcmc.get_samples(group_by_chain=True)
    camera = pose.Camera(draws["sideways"], draws["depth"])
    again = pose.project(run.joints, camera) + pose.IMAGE_NOISE * draws["image_noise"]
    assert (again - image).abs().max() < 1e-8


# ------------------------------------------------------------------------------------- figures


def rendered(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def test_poses_are_drawn_from_three_sides(figures: ModuleType, pose: ModuleType) -> None:
    body = pose.stick_figure()
    joints = pose.joint_positions(body, body.log_length_mean, torch.randn(2, 44))
    images = joints[..., :2].transpose(-1, -2).flatten(-2)
    titles = ["truth", "draw"]
    poses = dict(zip(titles, joints, strict=True))
    pictures = dict(zip(titles, images, strict=True))
    figure = figures.poses_figure(body.skeleton.edges, poses, pictures, images[0])
    assert len(figure.axes) == 6
    assert rendered(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="an image of every pose"):
        figures.poses_figure(body.skeleton.edges, poses, {}, images[0])


def test_errors_are_drawn_for_every_run(figures: ModuleType) -> None:
    run = (torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.05]))
    figure = figures.errors_figure({"a": [run, run], "b": [run]})
    assert len(figure.axes[0].lines) == 3
    assert rendered(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one run"):
        figures.errors_figure({"a": []})
