"""Run MCMC kernels: drop-in for :class:`pyro.infer.MCMC` that can also vectorise chains."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import pyro
import pyro.infer
import pyro.poutine as poutine
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.infer.mcmc.util import diagnostics as sample_diagnostics
from pyro.infer.mcmc.util import select_samples
from pyro.util import optional
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import SamplingWarning
from .summary import summary_table
from .vectorized import VectorizedKernel

__all__ = ["MCMC"]

_METHODS = ("vectorized", "sequential", "parallel")
_DRAWS_FOR_DIAGNOSTICS = 4


class MCMC:
    """
    Run an MCMC kernel, with the arguments and results of :class:`pyro.infer.MCMC`.

    New are ``chain_method="vectorized"``, which advances all chains by the same tensor operations
    in one process, and that an interrupted run (Ctrl-C) keeps the draws it has.

    :param kernel: an MCMC kernel: :class:`~pyro_ext.infer.ConstrainedHMC`, or any of Pyro's.
    :param int num_samples: draws to keep of each chain.
    :param warmup_steps: draws to adapt in and discard; ``num_samples`` when ``None``.
    :param initial_params: dictionary of initial values, with a leading chain dimension when
        there are several chains, in the space that the kernel expects.
    :param int num_chains: number of chains.
    :param hook_fn: called as ``hook_fn(kernel, samples, stage, i)`` after every draw, where
        ``stage`` is ``"Warmup"`` or ``"Sample"``.
    :param mp_context: multiprocessing context of parallel chains.
    :param bool disable_progbar: show no progress bar and no summary line.
    :param disable_validation: switch Pyro's validation off during the run; ``None`` leaves it
        as it is.
    :param transforms: transforms to unconstrained space, if not the kernel's own.
    :param save_params: names of the sites to keep; all when ``None``.
    :param chain_method: ``"vectorized"`` (default for kernels that can), ``"sequential"``, or
        ``"parallel"`` (one process per chain, through :class:`pyro.infer.MCMC`; default for the
        others).
    :raises ValueError: for arguments out of range, naming the valid ones.

    Example::

        >>> from pyro_ext import ConstrainedHMC
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.deterministic("total", x.sum())
        >>> kernel = ConstrainedHMC(pyro.condition(model, {"total": torch.tensor(1.0)}))
        >>> mcmc = MCMC(kernel, num_samples=20, num_chains=8, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        torch.Size([8, 20, 2])
    """

    def __init__(
        self,
        kernel: MCMCKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., Any] | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: Mapping[str, Any] | None = None,
        save_params: Sequence[str] | None = None,
        *,
        chain_method: str | None = None,
    ) -> None:
        if not isinstance(kernel, MCMCKernel):
            raise TypeError(
                f"kernel must be an MCMC kernel such as ConstrainedHMC(model), got "
                f"{type(kernel).__name__}."
            )
        if chain_method is None:
            can_vectorize = isinstance(kernel, VectorizedKernel)
            chain_method = "vectorized" if can_vectorize else "parallel"
        if chain_method not in _METHODS:
            raise ValueError(f"chain_method must be one of {_METHODS}, got {chain_method!r}.")
        if chain_method == "vectorized" and not isinstance(kernel, VectorizedKernel):
            raise ValueError(
                f"{type(kernel).__name__} cannot vectorise chains; use chain_method='parallel' or "
                "'sequential'."
            )
        for name, number in (
            ("num_samples", num_samples),
            ("warmup_steps", warmup_steps),
            ("num_chains", num_chains),
        ):
            if not isinstance(number, Integral | None):
                raise ValueError(f"{name} must be a whole number, got {number!r}.")
        if num_samples < 1 or num_chains < 1:
            raise ValueError(
                f"num_samples and num_chains must be at least 1, got {num_samples} and "
                f"{num_chains}."
            )
        if warmup_steps is not None and warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}.")
        self.kernel = kernel
        self.num_samples = num_samples
        self.warmup_steps = num_samples if warmup_steps is None else warmup_steps
        self.num_chains = num_chains
        self.chain_method = chain_method
        self.transforms = transforms
        self._initial_params = _with_chain_axis(initial_params, num_chains)
        self._hook = hook_fn
        self._mp_context = mp_context
        self._disable_progbar = disable_progbar
        self._disable_validation = disable_validation
        # draws are stored in one order and read back in another, so the order is fixed here
        self._save_params = None if save_params is None else sorted(_names_of(save_params))
        self._samples: dict[str, Tensor] | None = None
        self._diagnostics: list[dict[str, Any]] = []
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def run(self, *args: Any, **kwargs: Any) -> None:
        """
        Draw the samples.

        Interrupted by Ctrl-C after at least one draw, it returns with a warning and keeps what
        was drawn.

        :param args: the model's positional arguments.
        :param kwargs: the model's keyword arguments.
        """
        self._args, self._kwargs = args, kwargs
        self._samples, self._diagnostics = None, []
        if self.chain_method == "parallel" and self.num_chains > 1:
            self._run_parallel(args, kwargs)
            return
        validation = pyro.validation_enabled(not self._disable_validation)
        with poutine.block(), optional(validation, self._disable_validation is not None):
            if self.chain_method == "vectorized":
                draws = self._run_vectorized(args, kwargs)
            else:
                draws = self._run_sequential(args, kwargs)
        transforms = self.transforms or getattr(self.kernel, "transforms", None) or {}
        self._samples = {
            name: transforms[name].inv(value) if name in transforms else value
            for name, value in draws.items()
        }
        if isinstance(self.kernel, VectorizedKernel) and not self._disable_progbar:
            tqdm.write(self.kernel.summary())

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        """
        Draws by site name.

        :param num_samples: resample this many with replacement; all draws when ``None``.
        :param bool group_by_chain: keep chains apart, ``(chains, draws, ...)``.
        :raises RuntimeError: before :meth:`run`.
        """
        samples: dict[str, Tensor] = select_samples(self._drawn(), num_samples, group_by_chain)
        return samples

    def diagnostics(self) -> dict[str, Any]:
        """
        Effective sample size and split R-hat of every site, and the kernel's own statistics.

        :returns: ``{site: {"n_eff": ..., "r_hat": ...}}`` and, for every statistic of the kernel,
            ``{name: {"chain 0": ..., ...}}``.
        """
        samples = self._drawn()
        enough = all(value.shape[1] >= _DRAWS_FOR_DIAGNOSTICS for value in samples.values())
        result: dict[str, Any] = dict(sample_diagnostics(samples)) if enough else {}
        for name in self._diagnostics[0] if self._diagnostics else ():
            result[name] = {f"chain {i}": chain[name] for i, chain in enumerate(self._diagnostics)}
        return result

    def summary(self, prob: float = 0.9, *, sites: Sequence[str] | None = None) -> None:
        """
        Print mean, spread, quantiles, effective sample size and R-hat of every site.

        :param float prob: probability mass of the interval.
        :param sites: names of the sites to show, for models with many numbers; all when ``None``.
        :raises ValueError: if a name is not among the draws, or ``prob`` not between 0 and 1.
        """
        samples = self._drawn()
        if not 0 < prob < 1:
            raise ValueError(f"prob must lie in (0, 1), got {prob}.")
        if sites is not None:
            names = _names_of(sites)
            if unknown := sorted(set(names) - samples.keys()):
                raise ValueError(f"There are no draws of {unknown}, only of {sorted(samples)}.")
            samples = {name: samples[name] for name in names}
        print(summary_table(samples, prob))
        divergences = [len(chain.get("divergences", ())) for chain in self._diagnostics]
        print(f"Number of divergences: {sum(divergences)}")

    def _drawn(self) -> dict[str, Tensor]:
        if self._samples is None:
            raise RuntimeError("There are no samples yet: call MCMC.run(...) first.")
        return self._samples

    def _run_vectorized(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        kernel = self.kernel
        if not isinstance(kernel, VectorizedKernel):  # checked in __init__; tells the type
            raise TypeError(f"{type(kernel).__name__} cannot vectorise chains.")
        kernel.num_chains = self.num_chains
        if self._initial_params:
            kernel.initial_params = self._initial_params
        draws = self._run_chain(args, kwargs, label="")
        self._diagnostics = kernel.chain_diagnostics()
        kernel.cleanup()
        _trim(self._diagnostics, draws)
        return {name: torch.stack(values, dim=1) for name, values in draws.items()}

    def _run_sequential(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        if isinstance(self.kernel, VectorizedKernel):
            self.kernel.num_chains = None
        finished: list[dict[str, list[Tensor]]] = []
        for chain in range(self.num_chains):
            if self._initial_params:
                self.kernel.initial_params = {k: v[chain] for k, v in self._initial_params.items()}
            label = f" [{chain + 1}]" if self.num_chains > 1 else ""
            draws = self._run_chain(args, kwargs, label)
            diagnostics = self.kernel.diagnostics()
            self.kernel.cleanup()  # Pyro's kernels forget their statistics here
            is_complete = len(next(iter(draws.values()), [])) == self.num_samples
            if is_complete or not finished:
                finished.append(draws)
                self._diagnostics.append(diagnostics)
                _trim(self._diagnostics[-1:], draws)
            if not is_complete:
                break
        return {
            name: torch.stack([torch.stack(draws[name]) for draws in finished])
            for name in finished[0]
        }

    def _run_chain(self, args: Any, kwargs: Any, label: str) -> dict[str, list[Tensor]]:
        """Warm up and sample the kernel once; its draws by site, shorter if interrupted."""
        total = self.warmup_steps + self.num_samples
        # Pyro shows no bars in continuous integration either
        quiet = self._disable_progbar or "CI" in os.environ
        with tqdm(total=total, desc="Setup" + label, disable=quiet, dynamic_ncols=True) as bar:
            self.kernel.setup(self.warmup_steps, *args, **kwargs)
            _check_memory(self.kernel, self.num_samples)
            params = self.kernel.initial_params
            names = self._names(params)
            draws: dict[str, list[Tensor]] = {name: [] for name in names}
            try:
                for i in range(total):
                    stage = "Warmup" if i < self.warmup_steps else "Sample"
                    params = self.kernel.sample(params)
                    if stage == "Sample":
                        for name in names:
                            draws[name].append(params[name].detach())
                    self._report(bar, params, stage + label, i)
            except KeyboardInterrupt:
                drawn = len(draws[names[0]]) if names else 0
                if drawn == 0:
                    raise
                _even_out(draws)
                warnings.warn(
                    f"Interrupted after {drawn} of {self.num_samples} draws{label}; those are "
                    "kept.",
                    SamplingWarning,
                    stacklevel=4,
                )
        return draws

    def _report(self, bar: Any, params: Mapping[str, Tensor], stage: str, i: int) -> None:
        bar.set_description(stage, refresh=False)
        bar.set_postfix(self.kernel.logging(), refresh=False)
        bar.update()
        if self._hook is not None:
            index = i if i < self.warmup_steps else i - self.warmup_steps
            self._hook(self.kernel, params, stage, index)

    def _names(self, params: Mapping[str, Tensor]) -> list[str]:
        if self._save_params is None:
            return sorted(params)
        unknown = sorted(set(self._save_params) - params.keys())
        if unknown:
            raise ValueError(
                f"save_params names {unknown}, which are not latent sites; those are "
                f"{sorted(params)}."
            )
        return self._save_params

    def _run_parallel(self, args: Any, kwargs: Any) -> None:
        if isinstance(self.kernel, VectorizedKernel):
            self.kernel.num_chains = None
        stock = pyro.infer.MCMC(
            self.kernel,
            self.num_samples,
            self.warmup_steps,
            initial_params=self._initial_params,
            num_chains=self.num_chains,
            hook_fn=self._hook,
            mp_context=self._mp_context,
            disable_progbar=self._disable_progbar,
            disable_validation=self._disable_validation,
            transforms=self.transforms,
            save_params=self._save_params,
        )
        stock.run(*args, **kwargs)
        self._samples = stock.get_samples(group_by_chain=True)
        self._diagnostics = [dict(chain or {}) for chain in stock._diagnostics]


def _with_chain_axis(
    initial_params: Mapping[str, Tensor] | None, num_chains: int
) -> dict[str, Tensor] | None:
    if initial_params is None:
        return None
    values = {name: torch.as_tensor(value) for name, value in initial_params.items()}
    if num_chains == 1:
        return {name: value.unsqueeze(0) for name, value in values.items()}
    for name, value in values.items():
        if value.shape[:1] != (num_chains,):
            raise ValueError(
                f"initial_params[{name!r}] has shape {tuple(value.shape)}; its first dimension "
                f"must be the number of chains, {num_chains}."
            )
    return values


def _names_of(sites: Sequence[str]) -> Sequence[str]:
    """One name alone is meant as a list of it, not as its letters."""
    return [sites] if isinstance(sites, str) else sites


def _even_out(draws: dict[str, list[Tensor]]) -> None:
    """Drop draws of some sites that an interrupt left without their companions."""
    shortest = min(len(values) for values in draws.values())
    for values in draws.values():
        del values[shortest:]


def _trim(diagnostics: list[dict[str, Any]], draws: dict[str, list[Tensor]]) -> None:
    """Drop statistics of a draw that an interrupt kept from being stored."""
    number = min((len(values) for values in draws.values()), default=0)
    for chain in diagnostics:
        for name, value in chain.items():
            if isinstance(value, Tensor) and value.dim() == 1:
                chain[name] = value[:number]


def _check_memory(kernel: MCMCKernel, num_samples: int) -> None:
    if not isinstance(kernel, VectorizedKernel):
        return
    needed, available = kernel.required_bytes(num_samples), _available_bytes(kernel)
    if available is not None and needed > available:
        raise MemoryError(
            f"The run needs at least {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB "
            "are free. Use fewer chains or draws (several runs in turn), or keep fewer sites "
            "with save_params."
        )


def _available_bytes(kernel: VectorizedKernel) -> int | None:
    """Free memory of the device the chains are on, where the system tells."""
    device = next(iter(kernel.initial_params.values())).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
