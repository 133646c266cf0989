"""Proposals for the tracker: where by cross-correlation, what from all that was cut out."""

import functools
import math

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from canvas import RANGE, SIZE, crop, pixel_positions, place
from model import BACKGROUND, FEATURES, STEP, stack_where
from pyro.distributions import TorchDistribution, constraints
from scoring import scoring_step
from torch import nn

from pyro_ext.infer import APG, WithFactors
from pyro_ext.nn import NormalHead

PIXEL = 2 / RANGE  # in units of positions
PLACES = 20  # that are proposed for a digit, the best of all
SCORING_STEPS = 2  # from what the network proposes to what the decoder makes of it


class Placement(TorchDistribution):
    """A mixture of Normals, one for each of several places.

    :param logits: ``(..., places)``.
    :param loc: ``(..., places, 2)``.
    :param scale: ``(..., places, 2)``.
    """

    arg_constraints = {}  # noqa: RUF012, as in all distributions
    support = constraints.real_vector

    def __init__(self, logits, loc, scale):
        self.log_weights = torch.log_softmax(logits, -1)
        self.loc, self.scale = loc, scale
        super().__init__(logits.shape[:-1], torch.Size([2]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        batch_shape = torch.Size(batch_shape)
        logits = self.log_weights.expand(batch_shape + self.log_weights.shape[-1:])
        loc, scale = (x.expand(batch_shape + x.shape[-2:]) for x in (self.loc, self.scale))
        return Placement(logits, loc, scale)

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape
        place_of = dist.Categorical(logits=self.log_weights).sample(sample_shape)
        index = place_of[..., None, None].expand(*shape, 1, 2)
        loc, scale = (
            x.expand(*shape, *x.shape[-2:]).gather(-2, index)[..., 0, :]
            for x in (self.loc, self.scale)
        )
        return torch.normal(loc, scale)

    def log_prob(self, value):
        distance = ((value.unsqueeze(-2) - self.loc) / self.scale).square().sum(-1)
        log_scale = self.scale.log().sum(-1)
        terms = self.log_weights - 0.5 * distance - log_scale
        return torch.logsumexp(terms, -1) - torch.log(value.new_tensor(2 * torch.pi))


class Proposals(nn.Module):
    """Encoder and kernels for the videos of a tracker, whose decoder they use as it is."""

    def __init__(self, tracker, hidden_features=128):
        super().__init__()
        self._tracker = (tracker,)  # in a tuple: not a part of the proposals
        self.network = nn.Sequential(
            nn.Linear(2 * SIZE * SIZE, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, 2 * FEATURES),
        )
        self.head = NormalHead(0.0, 1.0)
        # how far to trust pixels and expectations, and how wide the Normals are, relative to the
        # bend of the scores and at least: of the encoder, which has no good images, and of kernels
        self.log_gain = nn.Parameter(torch.tensor([[-0.7, 1.0], [0.0, 0.0]]))
        self.log_scale = nn.Parameter(torch.tensor([[0.0, -1.5], [0.0, -3.5]]))
        self.log_scale_of_what = nn.Parameter(torch.tensor(0.0))
        self.momentum = nn.Parameter(torch.tensor(1.0))

    @property
    def tracker(self):
        return self._tracker[0]

    def encode(self, frames):
        """Follow what is cut out of the first frames through the others, then look at it."""
        num_frames, num_digits = frames.shape[1], self.tracker.num_digits
        average = self._images(frames.new_zeros(1, 1, FEATURES))
        images = average.expand(len(frames), num_digits, SIZE, SIZE)
        latents = {}
        with self.tracker.videos(frames):
            for t in range(num_frames):
                images = self._sample_where(t, latents, frames, images, trust=1 / (t + 2))
            self.propose_what(*cut_out(frames, stack_where(latents, num_frames, num_digits)))

    def update_where(self, t, latents, frames):
        with self.tracker.videos(frames):
            self._sample_where(t, latents, frames, self._images(latents["what"]))

    def _sample_where(self, t, latents, frames, images, trust=0.0):
        """Digit after digit; what others explain already is left out.

        Returns the images, moved towards what was cut out by a part of the way, ``trust``.
        """
        drawn, moved, off = {}, [], 1 - BACKGROUND
        for d in range(self.tracker.num_digits):
            image, frame = images[..., d, :, :], frames[:, t]
            scores = correlate(frame, off, image)
            proposal = self.placement(scores, self.expected(t, d, latents), int(not trust))
            where = pyro.sample(f"where_{t}_{d}", proposal)
            drawn[f"where_{t}_{d}"], where = where, where.squeeze(-2)
            moved.append(image + trust * (crop(frame, where) - image) if trust else image)
            off = off * (1 - place(moved[-1], where))
        latents.update(drawn)
        return torch.stack(torch.broadcast_tensors(*moved), -3)

    def expected(self, t, d, latents):
        """Where a digit may be by the frames before and after; with only one, it goes on."""
        known = [latents.get(f"where_{t + step}_{d}") for step in (-2, -1, 1, 2)]
        ends = [(known[1], known[0]), (known[2], known[3])]
        ends = [(near, far) for near, far in ends if near is not None]
        if len(ends) == 1 and ends[0][1] is not None:
            near, far = ends[0]
            return [near + torch.sigmoid(self.momentum) * (near - far)]
        return [near for near, _ in ends]

    def placement(self, scores, neighbours, role):
        """Where a digit may be, given scores of all places, and where it is expected."""
        across = pixel_positions(scores)
        known = neighbours or [scores.new_zeros(1, 1, 2)]
        variance = STEP**2 if neighbours else 1.0
        prior = sum(-(where.unsqueeze(-2) - across[:, None]).square() for where in known) / (
            2 * variance
        )
        # log-densities on the grid (videos, 1, rows, columns) of whole pixels
        pixels, nearby = self.log_gain[role].exp()
        prior = prior[..., None, :, 0] + prior[..., :, None, 1]
        total = pixels * scores + nearby * prior
        best, index = total.flatten(-2).topk(PLACES)
        shift, width = newton_step(total, index)
        grid = torch.stack([across[index % len(across)], across[index // len(across)]], -1)
        relative, least = self.log_scale[role].exp()
        return Placement(best, grid + PIXEL * shift, PIXEL * (relative * width + least))

    def update_what(self, latents, frames):
        """Propose what digits are, given all positions: as the network says, and a little better.

        A Normal around the mode, as wide as the expected information says.
        """
        where = stack_where(latents, frames.shape[1], self.tracker.num_digits)
        with torch.no_grad():
            what, _ = self.read(*cut_out(frames, where))
        for _ in range(SCORING_STEPS):
            what, information = scoring_step(self.tracker, what, where, frames)
        scale = information.diagonal(dim1=-2, dim2=-1).rsqrt() * self.log_scale_of_what.exp()
        with self.tracker.videos(frames), pyro.plate("digits", what.shape[-2], dim=-1):
            pyro.sample("what", dist.Normal(what, scale).to_event(1))

    def propose_what(self, seen, others):
        """Propose what digits are by the network alone."""
        loc, scale = self.read(seen, others)
        with pyro.plate("digits", seen.shape[-3], dim=-1):
            pyro.sample("what", dist.Normal(loc, scale).to_event(1))

    def read(self, seen, others):
        """Add up statistics of cut-outs ``(..., frames, digits, SIZE, SIZE)``."""
        statistics = self.network(torch.cat([seen.flatten(-2), others.flatten(-2)], -1)).sum(-3)
        return self.head(statistics.unflatten(-1, (FEATURES, 2)))

    @torch.no_grad()
    def _images(self, what):
        return self.tracker.decode(what)


def cut_out(frames, where):
    """What frames show at positions ``(..., frames, digits, 2)``, and how others cover that."""
    covered = place(frames.new_ones(SIZE, SIZE), where)
    others = covered.sum(-3, keepdim=True) - covered
    return crop(frames.unsqueeze(-3), where), crop(others, where).clamp(max=1)


def correlate(frame, off, image):
    """Log-likelihood of a frame for a digit at every whole pixel, but for a constant.

    A pixel that is on counts for the digit, unless others explain it: ``off`` is the probability
    that no other turns it on. A pixel that is off counts against it. Exact where others leave a
    pixel alone and where they explain it fully.

    :param frame: ``(videos, CANVAS, CANVAS)``.
    :param off: of the shape of the frame, with particles in front, or a number.
    :param image: ``(..., videos, SIZE, SIZE)``.
    """
    clear = 1 - BACKGROUND
    gain = torch.log1p(clear / BACKGROUND * image)  # log p(on) with the digit minus without it
    loss = torch.log1p(-image)
    off = torch.as_tensor(off).to(frame)
    left = torch.log((1 - 0.5 * off) / (1 - off)) / math.log((1 - 0.5 * clear) / BACKGROUND)
    shape = torch.broadcast_shapes(image.shape[:-2], off.shape[:-2], frame.shape[:-2])
    maps = []
    for canvas, template in ((frame * left, gain), (frame, loss)):
        canvas = canvas.expand(*shape, *canvas.shape[-2:]).flatten(0, -3).unsqueeze(0)
        template = template.expand(*shape, SIZE, SIZE).reshape(-1, 1, SIZE, SIZE)
        maps.append(F.conv2d(canvas, template, groups=len(template))[0])
    score = maps[0] - maps[1]  # what is lost by pixels that are off: that of all, minus those on
    return score.unflatten(0, shape).unsqueeze(-3)


def newton_step(score, index):
    """From a pixel to the top of a parabola through it and its neighbours, and its width.

    :param score: log-densities ``(..., rows, columns)``.
    :param index: numbers of some of the pixels, ``(..., places)``.
    :returns: steps of at most half a pixel, across and down, and standard deviations of at most
        one pixel, both ``(..., places, 2)``.
    """
    # edges are continued, so that slopes there come from one side
    padded = F.pad(score.flatten(0, -3), (1, 1, 1, 1), mode="replicate").flatten(-2)
    padded = padded.unflatten(0, score.shape[:-2])
    across = score.shape[-1] + 2
    middle = (index // score.shape[-1] + 1) * across + index % score.shape[-1] + 1
    steps, widths = [], []
    for step in (1, across):
        before, here, after = (padded.gather(-1, middle + k) for k in (-step, 0, step))
        precision = (2 * here - after - before).clamp(min=1.0)
        steps.append((0.5 * (after - before) / precision).clamp(-0.5, 0.5))
        widths.append(precision.rsqrt())
    return torch.stack(steps, -1), torch.stack(widths, -1)


def make_sampler(tracker, proposals, num_frames, optim=None, **settings):
    """Amortized population Gibbs: a block for the positions in every frame, and one for what."""
    kernels = [
        WithFactors(
            functools.partial(proposals.update_where, t), functools.partial(tracker.factors, t)
        )
        for t in range(num_frames)
    ]
    settings = {"num_particles": 10, "num_sweeps": 5, **settings}
    kernels.append(proposals.update_what)
    return APG(tracker, proposals.encode, kernels, optim, batch_plate="videos", **settings)
