"""The tracking tutorial: canvas, proposals, the model in the engine, what was learned, figures."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tutorials.conftest import load_siblings

pytest.importorskip("sklearn")
CANVAS, VIDEOS, MODEL, SCORING, PROPOSALS, TRAIN, METRICS = load_siblings(
    "apg_tracking", "canvas", "videos", "model", "scoring", "proposals", "train", "metrics"
)
SIZE = CANVAS.SIZE
WHOLE = CANVAS.CANVAS


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tutorials"))
    (module,) = load_siblings("apg_tracking", "figures")
    return module


def small_tracker(num_digits: int = 2) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Not trained, but with images that differ from digit to digit."""
    tracker, proposals = TRAIN.build(num_digits)
    with torch.no_grad():
        tracker.decoder[-1].weight.mul_(10)
    return tracker, proposals


def place_by_loops(image: Tensor, position: Tensor) -> Tensor:
    """Every pixel of the canvas on its own, between the four pixels of the image around it."""
    left, top = (0.5 * (WHOLE - SIZE) * (position + 1)).tolist()
    canvas = torch.zeros(WHOLE, WHOLE)
    for row in range(WHOLE):
        for column in range(WHOLE):
            y, x = row - top, column - left
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < SIZE and 0 <= j < SIZE:
                        canvas[row, column] += (1 - abs(y - i)) * (1 - abs(x - j)) * image[i, j]
    return canvas


POSITIONS = [
    pytest.param((0.0, 0.0), id="middle"),
    pytest.param((-1.0, 1.0), id="corner"),
    pytest.param((0.31, -0.77), id="between-pixels"),
    pytest.param((1.2, -1.4), id="partly-outside"),
    pytest.param((-9.0, 0.3), id="outside"),
]


@pytest.mark.parametrize("position", POSITIONS)
def test_place(position: tuple[float, float]) -> None:
    """Against a plain loop, and against the spatial transformer of torch."""
    image, where = torch.rand(SIZE, SIZE), torch.tensor(position)
    placed = CANVAS.place(image, where)
    torch.testing.assert_close(placed, place_by_loops(image, where))
    scale, shift = WHOLE / SIZE, where * (WHOLE - SIZE) / WHOLE
    theta = torch.cat([scale * torch.eye(2), -scale * shift[:, None]], 1)
    grid = F.affine_grid(theta[None], [1, 1, WHOLE, WHOLE], align_corners=False)
    sampled = F.grid_sample(image[None, None], grid, align_corners=False)
    torch.testing.assert_close(placed, sampled[0, 0])


@pytest.mark.parametrize("position", POSITIONS)
def test_crop(position: tuple[float, float]) -> None:
    """The transpose of placing; at whole pixels it takes out what was put in."""
    image, canvas = torch.rand(SIZE, SIZE), torch.rand(WHOLE, WHOLE)
    where = torch.tensor(position)
    inside = (CANVAS.place(image, where) * canvas).sum()
    torch.testing.assert_close((image * CANVAS.crop(canvas, where)).sum(), inside)
    whole = torch.tensor([3.0, 20.0]) * 2 / CANVAS.RANGE - 1
    torch.testing.assert_close(CANVAS.crop(CANVAS.place(image, whole), whole), image)


def test_trajectories_bounce() -> None:
    where = VIDEOS.trajectories(20, 3, 50)
    assert where.shape == (20, 50, 3, 2)
    assert where.abs().max() <= 1
    step = where.diff(dim=1)
    # nothing is faster than the speed, and most steps are as long as it
    length = step.norm(dim=-1)
    assert length.max() < VIDEOS.SPEED + 1e-9
    assert (length > VIDEOS.SPEED - 1e-9).float().mean() > 0.6
    # a component changes only by its sign, where it does not touch a wall between two frames
    same = (step[:, 1:].abs() - step[:, :-1].abs()).abs() < 1e-9
    assert same.float().mean() > 0.6


def test_videos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYRO_EXT_DATA", raising=False)
    train, test = (VIDEOS.load_images(part) for part in ("train", "test"))
    assert train.shape[1:] == test.shape[1:] == (SIZE, SIZE)
    assert not (train[:, None] == test[None, :20]).all(-1).all(-1).any()
    videos = VIDEOS.simulate(test, 2, num_digits=4, num_frames=3)
    assert videos.frames.shape == (2, 3, WHOLE, WHOLE)
    assert ((videos.frames == 0) | (videos.frames == 1)).all()
    image = 1 - (1 - CANVAS.place(videos.images[1], videos.where[1, 2])).prod(0)
    torch.testing.assert_close(videos.clean[1, 2], image)
    # MNIST, if it is there
    grey = np.zeros((2, 28, 28), np.uint8)
    grey[1, 7:21, 7:21] = 255
    np.savez(tmp_path / "mnist.npz", x_train=grey, x_test=grey[1:])
    for place in (tmp_path, tmp_path / "mnist.npz"):
        monkeypatch.setenv("PYRO_EXT_DATA", str(place))
        images = VIDEOS.load_images("train")
        assert images[0].abs().max() == 0
        assert images[1, 5, 5] == 1
        assert len(VIDEOS.load_images("test")) == 1


def test_the_density_of_the_model() -> None:
    """Prior and Bernoulli pixels, written out."""
    tracker, _ = small_tracker()
    videos = VIDEOS.simulate(torch.rand(5, SIZE, SIZE), 2, 2, 3)
    trace = poutine.trace(tracker).get_trace(videos.frames)
    trace.compute_log_prob()
    latents = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    what, where = latents["what"], MODEL.stack_where(latents, 3, 2)
    assert where.shape == (2, 3, 2, 2)
    standard = dist.Normal(0.0, 1.0)
    expected = standard.log_prob(what).sum((-1, -2)) + standard.log_prob(where[:, 0]).sum((-1, -2))
    expected = expected + dist.Normal(0.0, MODEL.STEP).log_prob(where.diff(dim=1)).sum((1, 2, 3))
    images = tracker.decode(what)
    for video in range(2):
        for t in range(3):
            off = torch.full((WHOLE, WHOLE), 1 - MODEL.BACKGROUND)
            for d in range(2):
                off = off * (1 - place_by_loops(images[video, d].detach(), where[video, t, d]))
            seen = videos.frames[video, t]
            expected[video] += torch.where(seen > 0, 1 - off, off).log().sum()
    total = sum(trace.nodes[n]["log_prob"].sum(-1) for n in (*latents, "frames_seen"))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        tracker.reconstruct(what, where), trace.nodes["frames_seen"]["fn"].base_dist.probs
    )


def test_scores_are_log_likelihoods() -> None:
    """Of a frame without other digits, and where others explain pixels fully, at every place."""
    image = 0.99 * torch.rand(SIZE, SIZE)
    frame = torch.bernoulli(0.3 * torch.ones(WHOLE, WHOLE))
    other = torch.zeros(WHOLE, WHOLE)
    other[10:20, 5:25] = 1 - 1e-9
    off = (1 - MODEL.BACKGROUND) * (1 - other)
    scores = PROPOSALS.correlate(frame[None], off[None], image[None])[0, 0]
    across = CANVAS.pixel_positions(frame)
    grid = torch.stack(torch.meshgrid(across, across, indexing="xy"), -1)
    darkness = off * (1 - CANVAS.place(image, grid))
    exact = torch.where(frame > 0, 1 - darkness, darkness).log().sum((-1, -2))
    difference = scores - exact
    torch.testing.assert_close(
        difference, difference.mean().expand_as(difference), atol=1e-4, rtol=0
    )


def test_newton_step_finds_the_top() -> None:
    grid = torch.arange(7.0)
    top = torch.tensor([2.3, 4.1])  # across, down
    score = -2 * (grid - top[0]) ** 2 - 8 * (grid[:, None] - top[1]) ** 2
    index = torch.tensor([4 * 7 + 2, 4 * 7 + 6, 0])
    step, width = PROPOSALS.newton_step(score[None], index[None])
    torch.testing.assert_close(step[0, 0], torch.tensor([0.3, 0.1]))
    torch.testing.assert_close(width[0, 0], torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(step[0, 1, 0], torch.tensor(-0.5))  # at the right edge: to the left
    torch.testing.assert_close(step[0, 2], torch.tensor([0.5, 0.5]))


def _log_density(tracker: torch.nn.Module, what: Tensor, where: Tensor, frames: Tensor) -> Tensor:
    """Of ``what`` of all digits together, but for a constant."""
    on = tracker.reconstruct(what, where)
    likelihood = torch.where(frames > 0, on, 1 - on).log().sum((-1, -2, -3))
    return likelihood - 0.5 * what.square().sum((-1, -2))


def test_scoring_steps_follow_the_gradient() -> None:
    """That of the log-density by automatic differentiation, divided by the information."""
    tracker, _ = small_tracker(3)
    videos = VIDEOS.simulate(torch.rand(5, SIZE, SIZE), 2, 3, 4)
    where = torch.stack([videos.where, 0.5 * videos.where])  # two particles; digits overlap
    what = (0.1 * torch.randn(2, 2, 3, MODEL.FEATURES)).requires_grad_()
    log_density = _log_density(tracker, what, where, videos.frames)
    (gradient,) = torch.autograd.grad(log_density.sum(), what)
    moved, information = SCORING.scoring_step(tracker, what.detach(), where, videos.frames)
    step = torch.linalg.solve(information, gradient)
    torch.testing.assert_close(moved, what.detach() + step.clamp(-1, 1))
    assert not moved.requires_grad


@pytest.mark.parametrize(
    ("pixels", "is_exact"), [((3.0, 17.0), True), ((3.3, 16.6), False)], ids=["whole", "between"]
)
def test_information_is_that_of_the_pixels(pixels: tuple[float, float], is_exact: bool) -> None:
    """Of all pixels of the canvas, by automatic differentiation; never less than that."""
    tracker, _ = small_tracker(1)
    what = torch.randn(1, 1, MODEL.FEATURES)
    where = (torch.tensor(pixels) * 2 / CANVAS.RANGE - 1).expand(1, 2, 1, 2)  # in two frames
    frames = torch.zeros(1, 2, WHOLE, WHOLE)
    _, information = SCORING.scoring_step(tracker, what, where, frames)

    def on(what: Tensor) -> Tensor:
        return tracker.reconstruct(what, where).flatten()

    jacobian = torch.autograd.functional.jacobian(on, what).flatten(1)  # type: ignore[no-untyped-call]
    probability = on(what).detach()
    weights = 1 / (probability * (1 - probability))
    expected = torch.eye(MODEL.FEATURES) + (jacobian.T * weights) @ jacobian
    excess = torch.linalg.eigvalsh(information[0, 0] - expected)
    assert excess.min() > -1e-8 * expected.diagonal().max()
    assert (excess.max() < 1e-8 * expected.diagonal().max()) == is_exact


def test_scoring_finds_what_was_drawn(float32: None) -> None:
    """From the prior's mean, with the decoder that ships: nearly the mode after a few steps."""
    tracker, _ = TRAIN.load(1)
    what = 0.7 * torch.randn(8, 1, MODEL.FEATURES)
    where = VIDEOS.trajectories(8, 1, 6)
    with torch.no_grad():
        frames = torch.bernoulli(tracker.reconstruct(what, where))
        truth = _log_density(tracker, what, where, frames)
        found, densities = torch.zeros_like(what), []
        for _ in range(6):
            densities.append(_log_density(tracker, found, where, frames))
            found, _ = SCORING.scoring_step(tracker, found, where, frames)
    assert (densities[0] < truth).all(), "there is nothing to find"
    assert (densities[-1] > truth).float().mean() >= 0.8, "the mode is above the truth"


def test_placement_is_a_distribution() -> None:
    """Its density integrates to one, and that of its draws is what it says."""
    torch.manual_seed(0)
    logits, loc = torch.randn(3, 4), torch.randn(3, 4, 2)
    own = PROPOSALS.Placement(logits, loc, 0.2 + torch.rand(3, 4, 2))
    axis = torch.linspace(-7, 7, 300)
    points = torch.cartesian_prod(axis, axis)
    mass = own.log_prob(points[:, None]).exp().sum(0) * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(mass, torch.ones(3), atol=1e-3, rtol=0)
    weights = torch.softmax(logits, -1)[..., None]
    mean = (weights * loc).sum(-2)
    draws = own.expand([2, 3]).sample((20_000,))
    assert draws.shape == (20_000, 2, 3, 2)
    second = (weights * (loc**2 + own.scale**2)).sum(-2)
    error = (second - mean**2).sqrt() / 20_000**0.5
    assert ((draws.mean(0) - mean).abs() < 5 * error).all()
    fourth = draws.square().std(0) / 20_000**0.5
    assert ((draws.square().mean(0) - second).abs() < 5 * fourth).all()


@pytest.mark.parametrize("num_digits", [1, 3])
def test_the_engine_accepts_the_programs(num_digits: int) -> None:
    """Factors agree with the model, and weights with densities written out for one update."""
    tracker, proposals = small_tracker(num_digits)
    frames = VIDEOS.simulate(torch.rand(5, SIZE, SIZE), 2, num_digits, 3).frames
    sampler = PROPOSALS.make_sampler(tracker, proposals, 3, num_particles=4, num_sweeps=3)
    blocks = sampler.objective.programs((frames,), {}).structure.blocks
    names = [{f"where_{t}_{d}" for d in range(num_digits)} for t in range(3)]
    assert [set(block.sites) for block in blocks] == [*names, {"what"}]
    for update in sampler.objective.run((frames,), {}, 4, 3):
        latents = update.particles.latents
        torch.testing.assert_close(
            update.particles.log_joint, log_joint(tracker, frames, latents), atol=1e-6, rtol=0
        )
        assert update.particles.log_weights.isfinite().all()


def log_joint(tracker: torch.nn.Module, frames: Tensor, latents: dict[str, Tensor]) -> Tensor:
    """Particle by particle, by a trace of the model."""
    rows = []
    for number in range(len(latents["what"])):
        own = {name: value[number] for name, value in latents.items()}
        trace = poutine.trace(poutine.condition(tracker, own)).get_trace(frames)
        trace.compute_log_prob()
        sites = [*own, "frames_seen"]
        rows.append(sum(trace.nodes[name]["log_prob"].sum(-1) for name in sites))
    return torch.stack(rows).detach()


def test_steps_change_all_parameters(float32: None) -> None:
    tracker, proposals = TRAIN.build(2)
    images = VIDEOS.load_images("test")
    before = [p.clone() for p in (*tracker.parameters(), *proposals.parameters())]
    losses = list(TRAIN.warm_up(tracker, proposals, images, 2, num_digits=5))
    assert all(math.isfinite(loss) for loss in losses)
    optim = TRAIN.optimizer(tracker, proposals)
    sampler = PROPOSALS.make_sampler(
        tracker, proposals, TRAIN.NUM_FRAMES, optim, num_particles=3, num_sweeps=2
    )
    list(TRAIN.train(sampler, images, 2, num_videos=2, num_digits=2))
    after = (*tracker.parameters(), *proposals.parameters())
    assert all(not bool((p == old).all()) for p, old in zip(after, before, strict=True))


def test_weights_are_small() -> None:
    assert TRAIN.WEIGHTS.stat().st_size < 2_000_000


def test_what_was_learned(float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On new videos of other digits: most are found, and sweeps improve on the encoder."""
    monkeypatch.delenv("PYRO_EXT_DATA", raising=False)
    torch.manual_seed(0)
    videos = VIDEOS.simulate(VIDEOS.load_images("test"), 6, 3, 8)
    tracker, proposals = TRAIN.load(3)
    sampler = PROPOSALS.make_sampler(tracker, proposals, 8)
    sweeps = METRICS.follow(sampler, tracker, videos, 3)
    error = sweeps.clean_squared_error.mean(1)
    blank = videos.clean.square().mean()
    assert error[-1] < 0.35 * blank, "reconstructions are little better than empty frames"
    assert error[-1] < error[0], "sweeps do not improve on the encoder"
    assert (sweeps.log_joint[-1] > sweeps.log_joint[0]).float().mean() > 0.7
    assert sweeps.distance_of_frames[-1].mean() < 1.5
    assert (sweeps.distance > sweeps.distance_of_frames - 1e-3).all()


def test_tracking_error_has_no_names() -> None:
    where = torch.rand(4, 6, 3, 2)
    swapped = where[:, :, [2, 0, 1]]
    assert METRICS.tracking_error(swapped, where).max() == 0
    moved = METRICS.tracking_error(swapped + torch.tensor([0.3, 0.4]) / CANVAS.RANGE, where)
    torch.testing.assert_close(moved, torch.full((4,), 0.25))
    order = METRICS.best_order(swapped, where)
    assert (order == torch.tensor([2, 0, 1])).all()


def test_figures(figures: ModuleType) -> None:
    videos = VIDEOS.simulate(torch.rand(5, SIZE, SIZE), 1, 5, 4)
    rows = {"video": (videos.frames[0], None), "truth": (videos.clean[0], videos.where[0])}
    curve = torch.rand(5)
    drawn = [
        figures.frames_figure(rows, every=2),
        figures.images_figure({"digits": videos.images[0], "two": videos.images[0, :2]}),
        figures.scores_figure(
            videos.frames[0, 0], videos.images[0, :2], torch.rand(2, 29, 29), torch.rand(2, 6, 2)
        ),
        figures.sweeps_figure(
            {"D = 3, T = 10": (curve, curve), "D = 4, T = 10": (curve, curve)}, 3
        ),
        figures.ess_figure({"D = 3": (curve, curve[0])}),
    ]
    assert [len(figure.axes) for figure in drawn] == [4, 10, 3, 2, 1]
    for figure in drawn:
        figure.canvas.draw()
    movie = figures.animation(rows)
    image = pytest.importorskip("PIL.Image")
    import io

    with image.open(io.BytesIO(movie)) as opened:
        assert (opened.format, opened.n_frames) == ("GIF", 4)
