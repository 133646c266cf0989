"""Videos of moving digits as a Pyro model with a learned decoder, and its factors by frame."""

import pyro
import pyro.distributions as dist
import torch
from canvas import SIZE, place
from torch import nn

FEATURES = 10  # of what a digit looks like
STEP = 0.2  # standard deviation of a movement between frames, as in the paper
BACKGROUND = 0.01  # probability of a pixel where there is no digit


class Tracker(nn.Module):
    """Digits that look the same in all frames (what), and move at random (where)."""

    def __init__(self, num_digits=3, hidden_features=128):
        super().__init__()
        self.num_digits = num_digits
        self.decoder = nn.Sequential(
            nn.Linear(FEATURES, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, SIZE * SIZE),
        )
        # untrained, a digit is a blob in the middle
        across = torch.linspace(-1, 1, SIZE)
        distance = across.square() + across.square()[:, None]
        self.decoder[-1].bias.data = (-3 * distance).flatten()

    def forward(self, frames):
        """Model of binary frames, ``(videos, frames, CANVAS, CANVAS)``."""
        num_frames, where = frames.shape[1], []
        with self.videos(frames):
            for t in range(num_frames):
                for d in range(self.num_digits):
                    before = where[-self.num_digits] if t else None
                    where.append(self.sample_where(t, d, before, frames))
            where = torch.cat(where, -2).unflatten(-2, (num_frames, self.num_digits))
            with pyro.plate("digits", self.num_digits, dim=-1):
                what = self.sample_what(frames)
            with pyro.plate("frames", num_frames, dim=-1):
                self.observe(self.decode(what).unsqueeze(-4), where, frames)

    def cut_outs(self, seen, others):
        """A model of what is cut out of frames, but for pixels where another digit may be.

        :param seen: from 0 to 1, as positions are between pixels; what is above one half counts
            as black. ``(frames, digits, SIZE, SIZE)``, all digits of all videos.
        :param others: positive where another digit may be, of the same shape.
        """
        with pyro.plate("digits", seen.shape[1], dim=-1):
            image = self.decode(self.sample_what(seen))
            on = 1 - (1 - BACKGROUND) * (1 - image)
            pixels = dist.Bernoulli(on).expand(seen.shape).mask(others == 0)
            with pyro.plate("frames", seen.shape[0], dim=-2):
                pyro.sample("seen", pixels.to_event(2), obs=seen.round())

    def factors(self, t, latents, frames):
        """The part of the model that depends on the positions in frame t."""
        with self.videos(frames):
            where = []
            for d in range(self.num_digits):
                before = latents[f"where_{t - 1}_{d}"] if t else None
                where.append(self.sample_where(t, d, before, frames))
                if t + 1 < frames.shape[1]:
                    self.sample_where(t + 1, d, where[-1], frames)
            with pyro.plate("frames", 1, dim=-1):
                where = torch.cat(where, -2).unsqueeze(-3)
                self.observe(self.decode(latents["what"]).unsqueeze(-4), where, frames[:, t, None])

    def videos(self, frames):
        return pyro.plate("videos", len(frames), dim=-2)

    def sample_what(self, frames):
        prior = dist.Normal(frames.new_zeros(FEATURES), 1.0).to_event(1)
        return pyro.sample("what", prior)

    def sample_where(self, t, d, before, frames):
        loc, scale = (frames.new_zeros(1, 1, 2), 1.0) if before is None else (before, STEP)
        return pyro.sample(f"where_{t}_{d}", dist.Normal(loc, scale).to_event(1))

    def observe(self, images, where, frames):
        on = 1 - darkness(place(images, where))
        pyro.sample("frames_seen", dist.Bernoulli(on).to_event(2), obs=frames)

    def decode(self, what):
        """Images ``(..., SIZE, SIZE)`` between 0 and 0.99."""
        return 0.99 * torch.sigmoid(self.decoder(what)).unflatten(-1, (SIZE, SIZE))

    def reconstruct(self, what, where):
        """Probabilities of pixels, from ``what`` and positions ``(..., frames, digits, 2)``."""
        return 1 - darkness(place(self.decode(what).unsqueeze(-4), where))


def darkness(placed, dim=-3):
    """Probability that a pixel is off: neither a digit nor the background turns it on."""
    return (1 - BACKGROUND) * (1 - placed).prod(dim)


def stack_where(latents, num_frames, num_digits):
    """All positions as one tensor, ``(..., frames, digits, 2)``."""
    names = (f"where_{t}_{d}" for t in range(num_frames) for d in range(num_digits))
    where = torch.cat([latents[name] for name in names], -2)
    return where.unflatten(-2, (num_frames, num_digits))
