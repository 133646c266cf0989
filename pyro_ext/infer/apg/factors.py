"""The part of a model that a block changes, so that long models cost no more than short ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["WithFactors"]


class WithFactors:
    r"""
    A kernel, and the factors of the model that depend on its block.

    The weight of an update (Wu et al. 2020, eq. 9) has the ratio of the model's density at the new
    and the old values of a block. Where a block enters few of many factors, as one step of a time
    series does, the others cancel, and need not be computed at all:

    .. math:: \frac{p_\theta(x, z_b', z_{-b})}{p_\theta(x, z_b, z_{-b})}
        = \frac{f_b(z_b', z_{-b})}{f_b(z_b, z_{-b})}.

    A sweep over the T steps of a time series then costs T times a step, not :math:`T^2`. Give it
    to :class:`~pyro_ext.infer.APG` in the place of the kernel. The parameters of the model learn
    from these factors at this update, and from all of the model where a block has no factors and
    at the draw from the encoder.

    At the first run the ratio is compared with that of the whole model.

    :param kernel: samples the sites of the block, a function of ``(latents, *args)``.
    :param factors: a Pyro program of ``(latents, *args)``, with all latents. It has those sites of
        the model whose density depends on the block, its own sites among them; the latent ones
        are not drawn, but take their values from ``latents``.
    :raises TypeError: if one of the two is no function.

    >>> from pyro_ext.infer import APG, WithFactors
    >>> x = torch.randn(3).cumsum(0)
    >>> def step(t, previous):
    ...     z = pyro.sample(f"z_{t}", dist.Normal(previous, 1.0))
    ...     pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[t])
    ...     return z
    >>> def model():
    ...     z = torch.tensor(0.0)
    ...     for t in range(3):
    ...         z = step(t, z)
    >>> def encoder():
    ...     for t in range(3):
    ...         pyro.sample(f"z_{t}", dist.Normal(x[t], 0.5))
    >>> def kernel(t):
    ...     return lambda latents: pyro.sample(f"z_{t}", dist.Normal(x[t], 0.4))
    >>> def factors(t):
    ...     def program(latents):
    ...         z = step(t, latents.get(f"z_{t - 1}", torch.tensor(0.0)))
    ...         if t < 2:
    ...             pyro.sample(f"z_{t + 1}", dist.Normal(z, 1.0))
    ...     return program
    >>> apg = APG(model, encoder, [WithFactors(kernel(t), factors(t)) for t in range(3)])
    >>> apg.sample(num_particles=20, num_sweeps=3).ess.shape
    torch.Size([])
    """

    def __init__(self, kernel: Callable[..., Any], factors: Callable[..., Any]) -> None:
        for name, program in (("kernel", kernel), ("factors", factors)):
            if not callable(program):
                raise TypeError(f"{name}={program!r}: give a Pyro program, a function.")
        self.kernel = kernel
        self.factors = factors

    def __repr__(self) -> str:
        return f"WithFactors({self.kernel!r}, {self.factors!r})"
