"""Train the autoencoder and write ``weights.npz``: python train.py (a minute)."""

from __future__ import annotations

import argparse
import copy
import math

import torch
from torch import Tensor
from vae import WEIGHTS, Decoder, Encoder, images, save_decoder

BATCH_SIZE = 100
LEARNING_RATE = 2e-3
EVALUATE_EVERY = 500


def elbo(encoder: Encoder, decoder: Decoder, x: Tensor) -> Tensor:
    r"""
    Estimate :math:`E_q \log p(x | z) - KL(q(z | x) \| p(z))` for every row.

    :param Tensor x: images, shape ``(n, 64)``.
    """
    mean, scale = encoder(x)
    z = mean + scale * torch.randn(mean.shape)
    noise = decoder.log_scale.exp()
    log_likelihood = -0.5 * ((x - decoder(z)) / noise).square() - decoder.log_scale
    divergence = 0.5 * (mean.square() + scale.square() - 1) - scale.log()
    log_constant = -0.5 * math.log(2 * math.pi) * x.shape[-1]
    return log_likelihood.sum(-1) + log_constant - divergence.sum(-1)


def train(num_steps: int, seed: int = 0) -> tuple[Encoder, Decoder, float]:
    """
    Maximise the bound by Adam with a cosine schedule.

    :param int num_steps: number of steps.
    :param int seed: seed of the weights and of the noise.
    :returns: the networks at their best on the validation part, and the bound there.
    """
    torch.manual_seed(seed)
    data, encoder, decoder = images(), Encoder(), Decoder()
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    best, weights = -math.inf, (encoder.state_dict(), decoder.state_dict())
    for step in range(1, num_steps + 1):
        rows = torch.randint(len(data.train), (BATCH_SIZE,))
        optimizer.zero_grad()
        (-elbo(encoder, decoder, data.train[rows]).mean()).backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0 or step == num_steps:
            with torch.no_grad():
                value = float(elbo(encoder, decoder, data.validation.repeat(20, 1)).mean())
            if value > best:
                best = value
                weights = copy.deepcopy((encoder.state_dict(), decoder.state_dict()))
    encoder.load_state_dict(weights[0])
    decoder.load_state_dict(weights[1])
    return encoder, decoder, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _, decoder, bound = train(arguments.steps)
    save_decoder(decoder)
    scale = float(decoder.log_scale.exp().detach())
    print(f"validation bound {bound:.2f} nats, noise scale {scale:.3f}, written to {WEIGHTS.name}")


if __name__ == "__main__":
    main()
