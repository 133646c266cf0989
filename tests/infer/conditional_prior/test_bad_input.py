"""What the guide cannot answer is refused, with the site and the cure in the message."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_ext import ConditionalPriorGuide
from pyro_ext.errors import ModelStructureError, SamplingWarning
from pyro_ext.ops.rows import RowStatus
from pyro_ext.poutine import condition_on, frozen
from tests.infer.conditional_prior.problems import linear_gaussian

pytestmark = pytest.mark.usefixtures("param_store")


def _prior(size: int = 2) -> Any:
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def _no_latents() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def _no_evidence() -> None:
    z = pyro.sample("z", _prior())
    pyro.deterministic("x", z.exp())


def _discrete() -> None:
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("x", dist.Normal(k.double(), 1.0), obs=torch.tensor(1.0))


def _subsampled() -> None:
    with pyro.plate("rows", 10, subsample_size=3) as index:
        z = pyro.sample("z", _prior())
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(10, 2)[index])


def _other_sites() -> None:
    z = pyro.sample("z", _prior())
    if torch.rand(()) < 1.0 and _other_sites.__dict__.setdefault("runs", [0]):
        runs = _other_sites.__dict__["runs"]
        runs[0] += 1
        pyro.sample(f"extra_{runs[0]}", _prior())
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2))


def _moving_support() -> None:
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Uniform(low, low + 1))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def _later_site(obs: Tensor) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", _prior())
        x = pyro.sample("x", dist.Normal(z, 1.0).to_event(1))
        pyro.sample("label", dist.Normal(x.sum(-1), 1.0), obs=obs)

    mask = torch.tensor([True, False])
    return condition_on(model, {"x": torch.zeros(2)}, {"x": mask})


MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no latents": (_no_latents, ValueError, r"no latent site.*pyro.sample\('z', prior\)"),
    "no evidence": (_no_evidence, ValueError, r"no observed site.*condition_on\(model"),
    "discrete": (_discrete, ValueError, r"'k' has the discrete distribution Categorical.*Sum it"),
    "subsampled": (_subsampled, ValueError, r"'rows' subsamples 3 of 10.*Remove subsample_size"),
    "other sites": (_other_sites, ModelStructureError, r"'extra_\d' occurs in one run"),
    "moving support": (_moving_support, ValueError, r"support of latent site 'z' depends"),
    "query in evidence": (
        _later_site(torch.tensor(0.0, dtype=torch.float64)),
        ValueError,
        r"'label' depends on elements of \['x'\] that are not observed.*latent sites",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_guided(case: str) -> None:
    model, error, message = MODELS[case]
    with pytest.raises(error, match=message):
        ConditionalPriorGuide(model).setup()


def test_an_encoder_left_in_the_model() -> None:
    """Its latents are drawn from what it makes of the evidence, not from their prior."""
    encoder, decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"'z' depends on the evidence itself: an encoder"):
        ConditionalPriorGuide(model).fit(x, progress=False)
    masked = condition_on(model, mask={"x": torch.tensor([True, True, False, False])})
    with pytest.raises(ValueError, match=r"'z' depends on the evidence itself"):
        ConditionalPriorGuide(masked).fit(x=x, progress=False)


def test_an_encoder_that_reads_the_evidence_from_outside() -> None:
    encoder, decoder, x = nn.Linear(4, 2), nn.Linear(2, 4), torch.randn(3, 4)

    def model(rows: int) -> None:
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1))

    before = x.clone()
    with pytest.raises(ValueError, match=r"'z' depends on the evidence itself: an encoder"):
        ConditionalPriorGuide(condition_on(model, {"x": x})).fit(3, progress=False)
    assert (x == before).all()


def test_a_prior_that_depends_on_other_data_is_none_of_that() -> None:
    decoder = nn.Linear(2, 4)

    def model(x: Tensor, covariate: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(covariate, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    guide = ConditionalPriorGuide(model).setup(torch.randn(3, 4), torch.randn(3, 2))
    assert guide.loc.shape == (3, 2)


@pytest.mark.parametrize("value", [-1.0, float("nan")], ids=["impossible", "decoder gives NaN"])
def test_evidence_without_a_density(value: float) -> None:
    data = torch.tensor([[0.5], [0.5], [0.5]])

    def model(rows: int) -> None:
        with pyro.plate("rows", rows):
            z = pyro.sample("z", _prior(1))
            upper = torch.where(torch.arange(rows) == 1, value, 1.0)[:, None] + 0 * z
            fn = dist.Uniform(-1.0, upper.clamp(min=-0.5), validate_args=False)
            pyro.sample("x", fn.to_event(1), obs=data[:rows])
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=data[:rows])

    guide = ConditionalPriorGuide(model)
    with pytest.warns(SamplingWarning, match=r"1 of 3 rows were not fitted.*rows \[1\]"):
        result = guide.fit(3, progress=False, num_particles=50)
    assert result.status.tolist()[1] == RowStatus.NOT_FINITE
    assert result.c_elbo[[0, 2]].isfinite().all()
    torch.testing.assert_close(guide.psi[1], torch.zeros_like(guide.psi[1]))


def test_evidence_without_a_density_in_any_row() -> None:
    def model() -> None:
        with pyro.plate("rows", 2):
            z = pyro.sample("z", _prior(1))
            fn = dist.Uniform(-1.0 + 0 * z, 1.0, validate_args=False).to_event(1)
            pyro.sample("x", fn, obs=torch.full((2, 1), 5.0))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2, 1))

    guide = ConditionalPriorGuide(model)
    with pytest.raises(ValueError, match=r"evidence at \['x'\] has no finite log-density"):
        guide.fit(progress=False, num_particles=50)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("inf"), "what the decoder computes is NaN or infinite"), (float("nan"), "loc.*nan")],
    ids=["infinite", "NaN"],
)
def test_a_decoder_without_finite_output(value: float, message: str) -> None:
    def model() -> None:
        z = pyro.sample("z", _prior())
        pyro.sample("x", dist.Normal(0 * z + value, 1.0).to_event(1), obs=torch.zeros(2))

    with pytest.raises(ValueError, match=rf"(?s){message}"):
        ConditionalPriorGuide(model).fit(progress=False, num_particles=50)


def test_evidence_outside_of_the_support_is_named() -> None:
    def model() -> None:
        z = pyro.sample("z", _prior())
        pyro.sample("x", dist.Bernoulli(logits=z).to_event(1))

    guide = ConditionalPriorGuide(condition_on(model, {"x": torch.tensor([0.5, 1.0])}))
    with pytest.raises(ValueError, match=r"evidence at site 'x' has no density under.*Bernoulli"):
        guide.fit(progress=False)


@pytest.mark.parametrize("how", ["unused", "detached"])
def test_a_decoder_that_ignores_its_input(how: str) -> None:
    def model() -> None:
        with pyro.plate("rows", 2):
            z = pyro.sample("z", _prior())
            loc = torch.zeros(2, 2) if how == "unused" else z.detach()
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones(2, 2))

    with pytest.warns(SamplingWarning, match=r"evidence at \['x'\] does not depend on any latent"):
        ConditionalPriorGuide(model).setup()


def test_no_evidence_at_all_is_a_question_too() -> None:
    """The answer is the prior, and no warning."""
    problem = linear_gaussian(2, 2, 3)
    nothing = condition_on(
        problem.unconditioned, {"x": problem.data}, {"x": torch.zeros(2, 3) > 0}
    )
    guide = ConditionalPriorGuide(nothing)
    result = guide.fit(progress=False, num_particles=50)
    torch.testing.assert_close(result.held_out_c_elbo, torch.zeros(2), rtol=0, atol=1e-6)
    z = torch.randn(5, 2, 2)
    torch.testing.assert_close(guide.log_prob({"z": z}), _prior().log_prob(z), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["BatchNorm1d", "Dropout"])
def test_layers_in_training_mode(kind: str) -> None:
    layer = nn.BatchNorm1d(4) if kind == "BatchNorm1d" else nn.Dropout(0.5)
    decoder = nn.Sequential(nn.Linear(2, 4), layer)

    def model() -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", _prior())
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=torch.ones(3, 4))

    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    with pytest.warns(SamplingWarning, match=rf"training mode \({kind}\).*frozen"):
        ConditionalPriorGuide(model).fit(progress=False, num_particles=30, max_iter=3)
    for name, value in decoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    ConditionalPriorGuide(frozen(model)).setup()  # no warning
    decoder.eval()
    ConditionalPriorGuide(model).setup()


SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown flow": ({"flow": "glow"}, ValueError, r"flow='glow' is unknown: give one of 'gvi'"),
    "module": ({"flow": nn.Linear(2, 2)}, TypeError, "a function of the number of latents"),
    "number": ({"flow": 3}, TypeError, "flow=3: give a name"),
    "no layers": ({"flow": "planar", "num_layers": 0}, ValueError, "num_layers=0: give a pos"),
    "layers of gvi": ({"num_layers": 2}, ValueError, "flow='gvi' has no use for it"),
    "hidden of planar": ({"flow": "planar", "hidden_features": 3}, ValueError, "has no use"),
    "bins": ({"flow": "spline", "bins": 1}, ValueError, "bins=1: a spline needs"),
    "base": ({"base": "uniform"}, ValueError, "base='uniform': give 'normal'"),
    "sites": ({"sites": "z"}, TypeError, "collection of names, got the string 'z'"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_the_guide(case: str) -> None:
    settings, error, message = SETTINGS[case]
    with pytest.raises(error, match=message):
        ConditionalPriorGuide(_no_evidence, **settings)


def test_settings_that_show_only_with_the_model() -> None:
    problem = linear_gaussian(2, 11, 3)
    with pytest.raises(TypeError, match="give a Pyro model"):
        ConditionalPriorGuide("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at most 10 latents"):
        ConditionalPriorGuide(problem.model, "fcn").setup()
    with pytest.raises(ValueError, match=r"'Z', which is no latent site.*\['z'\]"):
        ConditionalPriorGuide(problem.model, sites=["Z"]).setup()


FITS: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": (
        {"optimizer": "sgd"},
        r"optimizer='sgd' is unknown: give one of 'lbfgs', 'adam'",
    ),
    "particles": ({"num_particles": 5}, r"num_particles=5 draws of noise for 2 .*at least 6"),
    "starts": ({"num_starts": 2, "num_particles": 20}, r"num_starts=2: this flow does not end"),
}


@pytest.mark.parametrize("case", FITS)
def test_settings_of_a_fit(case: str) -> None:
    settings, message = FITS[case]
    guide = ConditionalPriorGuide(linear_gaussian(2, 2, 3).model, "fcn")
    with pytest.raises(ValueError, match=message):
        guide.fit(progress=False, **settings)


def test_a_network_that_folds_is_reported() -> None:
    guide = ConditionalPriorGuide(
        linear_gaussian(2, 1, 3).model, "fcn", num_layers=1, hidden_features=1
    ).setup()
    with torch.no_grad():
        guide.psi.copy_(torch.tensor([[1.0, 0.0, -3.0, 0.0], [1.0, 0.0, 0.1, 0.0]]))
    with pytest.warns(SamplingWarning, match=r"In 1 of 2 rows the network folds.*is no bound"):
        guide.fit(progress=False, max_iter=1)


def test_questions_before_the_model_is_known() -> None:
    guide = ConditionalPriorGuide(linear_gaussian(2, 2, 3).model)
    for question in (
        lambda: guide.c_elbo(),
        lambda: guide.sample_query(1),
        lambda: guide.log_prob({"z": torch.zeros(2, 2)}),
    ):
        with pytest.raises(ValueError, match=r"not seen its model yet: call guide.fit"):
            question()


QUERIES: dict[str, tuple[Any, str]] = {
    "shape": (torch.zeros(3), r"'x' has values of shape \(2, 3\), but .* shape \(3,\)"),
    "name": ({"y": torch.zeros(2, 3)}, r"values of \['y'\], but only \['x'\]"),
    "missing": ({}, r"no value of site 'x'"),
    "NumPy": (torch.zeros(3).numpy(), r"'x' has values of shape \(2, 3\), but .* shape \(3,\)"),
}


@pytest.mark.parametrize("case", QUERIES)
def test_queries_that_do_not_fit(case: str) -> None:
    guide = ConditionalPriorGuide(linear_gaussian(2, 2, 3).model).setup()
    query, message = QUERIES[case]
    with pytest.raises(ValueError, match=message):
        guide.query_log_prob(query)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (7, 2, 3)], ids=str)
def test_latents_of_another_shape(shape: tuple[int, ...]) -> None:
    guide = ConditionalPriorGuide(linear_gaussian(2, 2, 3).model).setup()
    with pytest.raises(ValueError, match=r"'z' has values of shape \(2, 2\), with any dim"):
        guide.log_prob({"z": torch.zeros(shape)})


def test_no_draws_at_all() -> None:
    problem = linear_gaussian(2, 2, 3)
    guide = ConditionalPriorGuide(problem.model).setup()
    for question in (
        lambda: guide.sample_latents(0),
        lambda: guide.sample_query(0),
        lambda: guide.query_log_prob(problem.data, 0),
        lambda: guide.c_elbo(0),
    ):
        with pytest.raises(ValueError, match=r"num_(samples|particles)=0 must be positive"):
            question()


def test_there_is_no_query_without_condition_on() -> None:
    def model() -> None:
        z = pyro.sample("z", _prior())
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2))

    guide = ConditionalPriorGuide(model).setup()
    with pytest.raises(ValueError, match=r"No site of the model is split.*condition_on"):
        guide.sample_query(3)
    with pytest.raises(ValueError, match=r"needs a value of latent site 'z'"):
        guide.log_prob({})


def test_other_rows_than_those_of_the_parameters() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", _prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = ConditionalPriorGuide(model).setup(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"for 3 rows of 2 latents, but the model has 4 rows"):
        guide.fit(torch.zeros(4, 2), progress=False)
    other = ConditionalPriorGuide(model)
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match=r"for 3 rows of 2 latents, but the model has 4 rows"):
        other.setup(torch.zeros(4, 2))


def test_the_store_has_another_guides_parameters() -> None:
    problem = linear_gaussian(2, 2, 3)

    def step(**settings: Any) -> None:
        guide = ConditionalPriorGuide(problem.model, **settings)
        SVI(problem.model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()

    step()
    with pytest.raises(ValueError, match=r"another guide under the name 'ConditionalPriorGuide.p"):
        step()
    step(name="second")
    pyro.clear_param_store()
    step()


def test_a_model_that_shows_its_parameters_to_the_optimizer() -> None:
    decoder = nn.Linear(2, 3)

    def model() -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", 2):
            z = pyro.sample("z", _prior())
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=torch.ones(2, 3))

    guide = ConditionalPriorGuide(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    with pytest.warns(SamplingWarning, match=r"decoder\$\$\$bias.*frozen\(model\)"):
        svi.step()
    svi.step()  # once is enough
    pyro.clear_param_store()
    guide = ConditionalPriorGuide(frozen(model))
    svi = SVI(frozen(model), guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step()
