"""How far learned proposals are from the exact conditionals of the mixture."""

import model
import pyro.distributions as dist
import torch

from pyro_ext.distributions import NormalGamma
from pyro_ext.infer.apg.sweep import resample, update_block
from pyro_ext.ops.resampling import effective_sample_size, systematic


@torch.no_grad()
def block_divergences(proposals, x, latents, mask=None):
    """Inclusive KL divergences of both blocks, at latents that the data came from.

    These are draws of the exact posterior, so that the averages are the objective of eq. 4.
    Returns one for the clusters of a data set, and one for every assignment.
    """
    exact = model.ExactProposals()
    of_clusters = torch.distributions.kl_divergence(
        NormalGamma(*exact.cluster_parameters(latents, x, mask)),
        NormalGamma(*proposals.cluster_parameters(latents, x, mask)),
    )
    of_points = torch.distributions.kl_divergence(
        dist.Categorical(logits=exact.assignment_logits(latents, x)),
        dist.Categorical(logits=proposals.assignment_logits(latents, x)),
    )
    return of_clusters.sum((-1, -2)), of_points


@torch.no_grad()
def ess_of_a_sweep(sampler, x, num_sweeps=10, num_particles=10):
    """Effective fraction of the particles after a last sweep that is not resampled between blocks.

    From the pieces that the sampler is made of: the weights of the blocks multiply.
    """
    *_, particles = sampler.sweeps(x, num_particles=num_particles, num_sweeps=num_sweeps)
    programs = sampler.objective.programs((x,), {})
    particles = resample(particles, systematic)
    for block in programs.structure.blocks:
        particles = update_block(programs, block, particles, num_sweeps).particles
    return effective_sample_size(particles.log_weights) / num_particles
