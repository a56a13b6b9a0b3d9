"""Methods and likelihoods of other packages: resolved, listed, graded; broken ones do no harm."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ngeval
from ngeval.cli.app import app
from ngeval.likelihoods import Likelihood, get_likelihood, likelihood_names
from ngeval.methods import all_methods, check_name, get_method, method_names
from ngeval.tasks import Task
from ngeval.utils.plugins import plugins
from tests import problems
from tests.problems import prepared

PAGE = Path(__file__).parent.parent / "docs" / "plug-ins.md"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with entry points on the path, as an installer leaves it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def place(
        package: str,
        module: str,
        source: str,
        points: dict[str, str],
        group: str = "ngeval.methods",
    ) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")
        importlib.invalidate_caches()
        plugins.cache_clear()

    yield place
    plugins.cache_clear()


def example(name: str, group: str) -> tuple[str, dict[str, str]]:
    """A module of the page, and its entry points."""
    text = PAGE.read_text()
    projects = map(tomllib.loads, re.findall(r"```toml\n(.*?)```", text, re.DOTALL))
    project = next(each["project"] for each in projects if each["project"]["name"] == name)
    file = name.replace("-", "_")
    module = re.findall(rf"```python\n# {file}\.py\n(.*?)```", text, re.DOTALL)[0]
    return module, project["entry-points"][group]


def test_the_page_in_25_lines(install: Install, monkeypatch: pytest.MonkeyPatch):
    module, points = example("ngeval-sign", "ngeval.methods")
    assert len([line for line in module.splitlines() if line.strip()]) <= 25
    install("ngeval-sign", "ngeval_sign", module, points)
    problem = problems.make("categorical-mlp-float64").problem()
    table = ngeval.evaluate(problem, ["sgd", "sign", "sign:1"], [1e-3])
    assert (table["status"] == "ok").all()
    # sign(g) max(|g|, λ)¹ is g but for entries below λ
    gradient = problem.gradient()
    expected = gradient.sign() * gradient.abs().clamp_min(1e-3)
    assert table["gamma"][2] == pytest.approx(problem.gamma(expected), rel=1e-9)
    assert table["gamma"][1] == pytest.approx(problem.gamma(gradient.sign()), rel=1e-9)
    monkeypatch.setenv("COLUMNS", "200")
    listed = CliRunner().invoke(app, ["methods"]).output
    assert re.search(r"sign .*max\(\|g\|, λ\)\^p.*ngeval-sign 1\.2", listed)
    assert all_methods()["sign"].source == "ngeval-sign 1.2"
    with pytest.raises(ngeval.InputError, match=r"'sign:x' of ngeval-sign 1\.2 cannot be built"):
        get_method("sign:x")


def test_names_are_known_without_torch():
    code = (
        "import sys, ngeval\n"
        "from ngeval.methods import all_methods, check_name, get_methods, method_names\n"
        "assert 'kfac' in method_names() and all_methods()['adamw'].source == 'torch.optim'\n"
        "check_name('kfac-sf:4:pi')\n"
        "try:\n    get_methods('sgd,kfca')\n"
        "except ngeval.InputError as error:\n    print(error, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(r"unknown method 'kfca'; did you mean 'kfac'\?.* False\n", done.stdout)


def test_a_function_will_do(install: Install):
    source = (
        "from ngeval.methods.sgd import Sgd\n"
        "def make(name, text):\n    'The gradient again.'\n    return Sgd(name)\n"
    )
    install("plain", "plain_method", source, {"again": "plain_method:make"})
    assert all_methods()["again"].formula == "The gradient again."
    table = ngeval.evaluate(problems.make("gaussian-linear-float64").problem(), ["again"], [1.0])
    assert table["gamma_over_sgd"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("import no_such_package", "broken_plugin:entry", "ModuleNotFoundError"),
        ("entry = 3", "broken_plugin:entry", "neither an ngeval.MethodEntry"),
        ("", "broken_plugin:entry", "AttributeError"),
    ],
)
def test_a_broken_plugin_says_why_and_harms_nobody(install, source, value, message):
    install("broken", "broken_plugin", source, {"broken": value})
    assert message in all_methods()["broken"].formula
    assert get_method("sf:2").name == "sf:2"
    check_name("broken")  # which imports nothing
    assert method_names()[-1] == "broken"
    with pytest.raises(ngeval.InputError, match=message):
        get_method("broken")
    shown = CliRunner().invoke(app, ["methods"])
    assert shown.exit_code == 0
    sys.modules.pop("broken_plugin", None)


def test_a_function_that_returns_no_method(install: Install):
    source = "def make(name, text):\n    return 3\n"
    install("empty", "empty_method", source, {"empty": "empty_method:make"})
    message = r"'empty' of empty 1\.2 cannot be built: TypeError: it has type int, without \.name"
    with pytest.raises(ngeval.InputError, match=message):
        get_method("empty")


def test_own_names_cannot_be_taken(install: Install):
    install("thief", "thief_plugin", "entry = None", {"ief": "thief_plugin:entry"})
    with pytest.warns(UserWarning, match=r"method 'ief' of thief 1\.2 is ignored, because ngeval"):
        assert get_method("ief").improved
    assert all_methods()["ief"].source == "ngeval"


class TestLikelihoods:
    group = "ngeval.likelihoods"

    @pytest.fixture
    def exponential(self, install: Install) -> Likelihood:
        """The page's."""
        install(
            "ngeval-exponential",
            "ngeval_exponential",
            *example("ngeval-exponential", self.group),
            self.group,
        )
        return get_likelihood("exponential")

    def test_the_page(self, exponential: Likelihood):
        assert exponential.name == "exponential"
        own = ["categorical", "gaussian", "bernoulli", "poisson", "gaussian-nll", "mse"]
        assert likelihood_names() == [*own, "exponential"]
        generator = torch.Generator().manual_seed(3)
        model = torch.nn.Linear(4, 3, dtype=torch.float64)
        inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        times = 0.1 + torch.rand(8, 3, generator=generator, dtype=torch.float64)
        problem = ngeval.Problem(model, inputs, times, likelihood="exponential")
        table = ngeval.evaluate(problem, ["sgd", "ief", "sf:2", "diag", "ng"], [1e-2])
        assert (table["status"] == "ok").all()
        # By autograd through torch's distribution, and F = JᵀJ, as H = I.
        loss = -torch.distributions.Exponential((-model(inputs)).exp()).log_prob(times).sum()
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]
        )
        assert torch.allclose(problem.gradient(), gradient, rtol=1e-12)
        jacobian = torch.func.jacrev(
            lambda p: torch.func.functional_call(model, p, inputs).flatten()
        )(dict(model.named_parameters()))
        rows = torch.cat([jacobian[n].flatten(1) for n, _ in model.named_parameters()], 1).detach()
        fisher = rows.T @ rows
        expected = torch.linalg.solve(fisher + 1e-2 * torch.eye(len(fisher)).double(), gradient)
        update = prepared("ng", problem).direction(1e-2)
        assert torch.allclose(update, expected, rtol=1e-9)
        with pytest.raises(ngeval.InputError, match="exponential takes no parameter"):
            get_likelihood("exponential:2")
        with pytest.raises(ngeval.InputError, match=r"did you mean 'exponential'.*gaussian-nll"):
            get_likelihood("exponentail:2")

    def test_definitions_hold(self, exponential: Likelihood):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
        times = 0.1 + torch.rand(5, 2, 3, generator=generator, dtype=torch.float64)
        bound = exponential.bind(logits, times)
        leaf = logits.clone().requires_grad_()
        model = torch.distributions.Exponential((-leaf).exp())
        (slope,) = torch.autograd.grad(-model.log_prob(times).sum(), leaf)
        assert torch.allclose(bound.residual(), slope)
        assert torch.allclose(bound.factor_product(bound.whitened_residual()), bound.residual())
        tangents = torch.randn(4, 5, 2, 3, generator=generator, dtype=torch.float64)
        halves = bound.factor_transpose_product(tangents)
        assert torch.allclose(bound.factor_product(halves), bound.fisher_product(tangents))
        draws = bound.residual(bound.sample(20_000, generator))
        assert draws.mean(0).abs().max() < 0.1
        assert torch.allclose(draws.square().mean(0), torch.ones_like(logits), rtol=0.1)
        assert bound.floor_terms().shape == bound.loss().shape == (5,)

    def test_by_name_in_a_task(self, exponential: Likelihood):
        task = Task("times", lambda: torch.nn.Linear(2, 1), lambda *_: [], "exponential")
        assert task.resolved_likelihood() == exponential

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("import no_such_package", r"of broken 1\.2 cannot be loaded .*ModuleNotFoundError"),
            ("raise SystemExit(3)", r"of broken 1\.2 cannot be loaded .*SystemExit: 3"),
            ("", r"of broken 1\.2 cannot be loaded .*AttributeError"),
            ("entry = 3", r"'broken_likelihood:entry' is not a subclass of ngeval\.Likelihood"),
            (
                "import ngeval\nclass entry(ngeval.Likelihood):\n    pass\n",
                r"'broken' of broken 1\.2 cannot be built: TypeError: Can't instantiate",
            ),
            (
                "import ngeval\nclass entry(ngeval.Likelihood):\n"
                "    parse = classmethod(lambda *_: 3)\n",
                r"cannot be built: TypeError: its parse returned int, not a Likelihood",
            ),
        ],
    )
    def test_a_broken_one_says_why_and_does_no_harm(self, install: Install, source, message):
        points = {"broken": "broken_likelihood:entry"}
        install("broken", "broken_likelihood", source, points, self.group)
        assert get_likelihood("gaussian:2").name == "gaussian:2"
        assert "broken" in likelihood_names()
        with pytest.raises(ngeval.InputError, match=message):
            get_likelihood("broken")
        sys.modules.pop("broken_likelihood", None)

    def test_own_names_cannot_be_taken(self, install: Install):
        points = {"gaussian": "thief_likelihood:entry"}
        install("thief", "thief_likelihood", "entry = None", points, self.group)
        message = r"likelihood 'gaussian' of thief 1\.2 is ignored, because ngeval has"
        with pytest.warns(UserWarning, match=message):
            assert get_likelihood("gaussian") == ngeval.Gaussian(1.0)

    def test_two_packages_with_one_name(self, install: Install):
        points = {"laplace": "first_likelihood:entry"}
        install("first", "first_likelihood", "", points, self.group)
        install("second", "second_likelihood", "", {"laplace": "second:entry"}, self.group)
        with pytest.warns(UserWarning, match=r"of second 1\.2 is ignored, because first 1\.2 has"):
            assert likelihood_names()[6:] == ["laplace"]
