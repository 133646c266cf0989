"""What the engine cannot do is an error that names the site and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyro_ext.errors import DegenerateWeightsError
from pyro_ext.infer import APG, ExactBlock

X = torch.zeros(4, 3)
Program = Callable[..., None]


def _model(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("points", x.shape[1], dim=-1):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(kind, rate.rsqrt()), obs=x)


def _rate(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))


def _kind(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2), pyro.plate("points", x.shape[1], dim=-1):
        pyro.sample("kind", dist.Bernoulli(0.4))


def _encoder(x: Tensor) -> None:
    _rate({}, x)
    _kind({}, x)


def _apg(
    model: Program = _model,
    encoder: Program = _encoder,
    kernels: list[Any] | None = None,
    **settings: Any,
) -> APG:
    kernels = [_rate, _kind] if kernels is None else kernels
    return APG(model, encoder, kernels, **{"batch_plate": "data_sets", **settings})


def _sample(name: str, fn: Any, *plates: tuple[str, int, int]) -> Program:
    """A kernel that samples one site in some plates."""

    def kernel(latents: Mapping[str, Tensor], x: Tensor) -> None:
        with ExitStack() as stack:
            for plate, size, dim in plates:
                stack.enter_context(pyro.plate(plate, size, dim=dim))
            pyro.sample(name, fn)

    return kernel


SETS, POINTS = ("data_sets", 4, -2), ("points", 3, -1)


def _both(latents: Mapping[str, Tensor], x: Tensor) -> None:
    _rate(latents, x)
    _kind(latents, x)


def _reads_itself(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("rate", dist.Gamma(latents["rate"], 1.0))


def _observes(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("rate", dist.Gamma(2.0, 1.0), obs=torch.ones(4, 1))


def _scales(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with poutine.scale(scale=0.5):
        _rate(latents, x)


def _subsamples(latents: Mapping[str, Tensor], x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.plate("others", 10, subsample_size=2)


def _samples_nothing(latents: Mapping[str, Tensor], x: Tensor) -> None:
    """A kernel that has forgotten to sample."""


@pytest.mark.parametrize(
    ("kernels", "match"),
    [
        ([_rate], r"No kernel samples \['kind'\]"),
        ([_rate, _kind, _rate], r"'rate' is sampled by kernels 0 and 2"),
        ([_both, _kind], r"'kind' is sampled by kernels 0 and 1"),
        (
            [_sample("rat", dist.Gamma(2.0, 1.0), SETS), _kind],
            r"kernel 0 samples 'rat', which is no latent site .* Did you mean 'rate'\?",
        ),
        ([_sample("x", dist.Normal(0.0, 1.0), SETS, POINTS), _kind], r"'x', which is no latent"),
        ([_samples_nothing, _kind], r"kernel 0 \(_samples_nothing\) samples no site"),
        ([_reads_itself, _kind], r"block \['rate'\] reads 'rate', which it samples itself"),
        ([_observes, _kind], r"has an observation at 'rate'"),
        ([_scales, _kind], r"scales 'rate' by 0.5"),
        ([_subsamples, _kind], r"Plate 'others' of the .* takes 2 of 10 elements"),
        ([_sample("rate", dist.Gamma(2.0, 1.0)), _kind], r"\['rate'\] samples 'rate' with batch"),
        ([_sample("rate", dist.Gamma(2.0, 1.0), SETS, POINTS), _kind], r"the same plates"),
        (
            [_sample("rate", dist.Gamma(2.0, 1.0), ("data_sets", 4, -1)), _kind],
            r"'rate' with batch shape",
        ),
        ([_sample("rate", dist.Gamma(torch.ones(2), 1.0).to_event(1), SETS), _kind], "event"),
        ([_rate, _sample("kind", dist.Delta(torch.tensor(1.0)), SETS, POINTS)], "point mass"),
        ([_kind, ExactBlock("rate")], r"Gamma, whose values cannot be enumerated"),
        ([_rate, ExactBlock("kid")], r"'kid', which is no latent site .* Did you mean 'kind'\?"),
        ([_rate, _kind, ExactBlock("kind")], r"'kind' is sampled by kernels 1 and 2"),
    ],
)
def test_kernels_that_do_not_fit(kernels: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _apg(kernels=kernels).sample(X)


def _without_kind(x: Tensor) -> None:
    _rate({}, x)


def _with_more(x: Tensor) -> None:
    _encoder(x)
    pyro.sample("more", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("encoder", "match"),
    [
        (_without_kind, r"encoder does not sample \['kind'\]"),
        (_with_more, r"encoder samples 'more', which is no latent site"),
    ],
)
def test_encoders_that_do_not_fit(encoder: Program, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _apg(encoder=encoder).sample(X)


def _global_site(x: Tensor) -> None:
    pyro.sample("shared", dist.Normal(0.0, 1.0))
    _model(x)


def _wrong_order(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-1):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("points", 3, dim=-2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.T)


def _undeclared(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("rate", dist.Gamma(torch.ones(3), 1.0))


def _minibatch(x: Tensor) -> None:
    with pyro.plate("data_sets", 100, dim=-2, subsample_size=4):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))


def _conditioned(x: Tensor) -> None:
    def inner(x: Tensor) -> None:
        _model(x)
        with pyro.plate("data_sets", len(x), dim=-2):
            pyro.deterministic("output", torch.zeros(4, 1))

    pyro.condition(inner, {"output": torch.ones(4, 1)})(x)


def _no_latents(x: Tensor) -> None:
    with pyro.plate("data_sets", len(x), dim=-2), pyro.plate("points", 3, dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (_global_site, r"'shared' is outside of the plate 'data_sets'"),
        (_wrong_order, r"'data_sets' of the data sets is at dimension -1, but .* go to -2"),
        (_undeclared, r"'rate' has batch shape \(4, 3\), but no plate for dimension -1"),
        (_minibatch, r"Plate 'data_sets' of the model takes 4 of 100 elements"),
        (_conditioned, r"'output' is deterministic and conditioned"),
        (_no_latents, "no latent sample site"),
    ],
)
def test_models_that_cannot_be_sampled(model: Program, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _apg(model=model).sample(X)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.zeros(4, 0)], ids=["no set", "no point"])
def test_empty_data_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="plate of the program is empty"):
        _apg().sample(x)


def test_missing_batch_plate_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of the plate 'sets' of the data sets"):
        _apg(batch_plate="sets").sample(X)


@pytest.mark.parametrize(
    ("plates", "match"),
    [
        (["point"], r"no plate 'point' for local_plates. Did you mean 'points'\?"),
        (["data_sets"], "it cannot be local"),
    ],
)
def test_local_plates_must_be_there(plates: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _apg(local_plates=plates).sample(X)


def _neighbours(x: Tensor) -> None:
    """Observations that depend on the point before, too."""
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("points", x.shape[1], dim=-1):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(kind + kind.roll(1, -1), 1.0), obs=x)


def _total(x: Tensor) -> None:
    """An observation of all points together."""
    with pyro.plate("data_sets", len(x), dim=-2):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("points", x.shape[1], dim=-1):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(kind.sum(-1, keepdim=True), 1.0), obs=x[:, :1])


@pytest.mark.parametrize(
    ("model", "where"),
    [(_neighbours, "at other elements of it"), (_total, "which is outside of it")],
)
def test_local_plates_must_be_independent(model: Program, where: str) -> None:
    x = torch.zeros(4, 12)
    _apg(model=model).sample(x)  # which is fine as long as the plate is not said to be local
    with pytest.raises(ValueError, match=rf"\['kind'\] is in the local plate 'points'.*{where}"):
        _apg(model=model, local_plates=["points"]).sample(x)


def test_exact_blocks_do_not_scale() -> None:
    def scaled(x: Tensor) -> None:
        with poutine.scale(scale=2.0):
            _model(x)

    with pytest.raises(ValueError, match=r"scaled by 2.0. An ExactBlock"):
        _apg(model=scaled, kernels=[_rate, ExactBlock("kind")]).sample(X)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf], ids=["nan", "-inf", "inf"])
@pytest.mark.parametrize("block", ["encoder", "kind"])
def test_no_particle_left_names_the_block(value: float, block: str) -> None:
    """One data set of four has no weight: the message says in which block, and why."""
    state = {"value": 0.0}

    def model(x: Tensor) -> None:
        _model(x)
        with pyro.plate("data_sets", len(x), dim=-2):
            pyro.factor("constraint", torch.tensor([0.0, 0.0, state["value"], 0.0])[:, None])

    def kind(latents: Mapping[str, Tensor], x: Tensor) -> None:
        _kind(latents, x)
        state["value"] = value

    apg = _apg(model=model, kernels=[kind, _rate])
    apg.objective.programs((X,), {})
    state["value"] = value if block == "encoder" else 0.0
    cause = "NaN" if math.isnan(value) else "infinite"
    who = "The encoder" if block == "encoder" else "Block 'kind'"
    message = f"{who} left no particle .* 1 of 4 data sets: .*'constraint' in the model is {cause}"
    with pytest.raises(DegenerateWeightsError, match=message):
        apg.sample(X)


def test_particles_without_weight_are_left_behind() -> None:
    """-inf and NaN in some particles cost these, and nothing else."""

    def model(x: Tensor) -> None:
        _model(x)
        with pyro.plate("data_sets", len(x), dim=-2):
            broken = torch.zeros(10, 4, 1)
            broken[0], broken[1], broken[2] = torch.nan, -torch.inf, torch.inf
            pyro.factor("constraint", broken if state["particles"] else torch.zeros(4, 1))

    state = {"particles": False}
    apg = _apg(model=model, num_sweeps=1)
    apg.objective.programs((X,), {})
    state["particles"] = True
    result = apg.sample(X)
    assert (result.weights[:3] == 0).all()
    torch.testing.assert_close(result.weights.sum(0), torch.ones(4))
    assert result.history.log_joint.isfinite().all()
    assert result.expectation(lambda z: z["rate"].squeeze(-1)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"num_particles": 1}, ValueError, "num_particles=1 must be at least 2"),
        ({"num_sweeps": 0}, ValueError, "num_sweeps=0 must be at least 1"),
        ({"num_sweeps": 2.0}, TypeError, "num_sweeps=2.0 must be an integer"),
        ({"model_sweeps": 0}, ValueError, "model_sweeps=0 must be at least 1"),
        ({"model_sweeps": 3, "num_sweeps": 2}, ValueError, "there are only num_sweeps=2"),
        ({"resampler": "sistematic"}, ValueError, "Did you mean 'systematic'"),
        ({"kernels": [], "num_sweeps": 2}, ValueError, "no kernels to sweep with"),
        ({"kernels": ["rate"]}, TypeError, "kernels has 'rate'"),
        ({"kernels": ExactBlock("kind")}, TypeError, "give a list of kernels"),
        ({"model": 3}, TypeError, "model=3: give a Pyro program"),
        ({"optim": 0.01}, TypeError, "optim=0.01"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        _apg(**settings)


@pytest.mark.parametrize(
    ("who", "at_run", "match"),
    [
        ("kernel", 2, r"kernel 0 samples \['rate'\] at one run and \['kind', 'rate'\] at another"),
        ("kernel", 3, r"kernel of block \['rate'\] samples \['kind', 'rate'\], but .* first run"),
        ("encoder", 2, r"encoder samples \['rate'\], but sampled \['kind', 'rate'\] at its first"),
    ],
    ids=["at once", "later", "of the encoder"],
)
def test_sites_must_not_change(who: str, at_run: int, match: str) -> None:
    """A kernel that samples outside of its block, an encoder that leaves a block out: some day."""
    runs = {"kernel": 0, "encoder": 0}

    def is_time(program: str) -> bool:
        runs[program] += 1
        return program == who and runs[program] >= at_run

    def kernel(latents: Mapping[str, Tensor], x: Tensor) -> None:
        (_both if is_time("kernel") else _rate)(latents, x)

    def encoder(x: Tensor) -> None:
        (_without_kind if is_time("encoder") else _encoder)(x)

    with pytest.raises(ValueError, match=match):
        _apg(encoder=encoder, kernels=[kernel, _kind]).sample(X)


def test_kernels_read_latent_sites_only() -> None:
    def kernel(latents: Mapping[str, Tensor], x: Tensor) -> None:
        _sample("rate", dist.Gamma(latents["kin"], 1.0), SETS)(latents, x)

    with pytest.raises(KeyError, match=r"'kin' is not a latent site. .* \['kind', 'rate'\]"):
        _apg(kernels=[kernel, _kind]).sample(X)


def test_exact_blocks_need_names() -> None:
    with pytest.raises(ValueError, match="needs the names"):
        ExactBlock()


def test_steps_need_an_optimizer_and_something_to_train() -> None:
    with pytest.raises(ValueError, match="step needs an optimizer"):
        _apg().step(X)
    with pytest.raises(ValueError, match="nothing to train"):
        _apg(optim=pyro.optim.Adam({"lr": 0.1})).step(X)


def test_parameters_that_nobody_would_train_are_refused() -> None:
    network = torch.nn.Linear(1, 1)

    def rate(latents: Mapping[str, Tensor], x: Tensor) -> None:
        with pyro.plate("data_sets", len(x), dim=-2):
            pyro.sample("rate", dist.Gamma(network(torch.ones(4, 1)).exp(), 1.0))

    apg = _apg(kernels=[rate, _kind], optim=pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match=r"block 'rate' depends on a parameter of shape \(1,"):
        apg.step(X)


def test_diagnostics_need_a_step() -> None:
    with pytest.raises(ValueError, match=r"call step\(...\) first"):
        _apg().diagnostics()
