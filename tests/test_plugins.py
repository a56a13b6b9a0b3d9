"""Methods of other packages: found by entry point, listed, graded; broken ones harm nobody."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ngeval
from ngeval.cli.app import app
from ngeval.methods import all_methods, check_name, get_method, method_names
from ngeval.utils.plugins import plugins
from tests import problems

PAGE = Path(__file__).parent.parent / "docs" / "plug-ins.md"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with entry points on the path, as an installer leaves it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def place(package: str, module: str, source: str, points: dict[str, str]) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[ngeval.methods]\n{lines}\n")
        importlib.invalidate_caches()
        plugins.cache_clear()

    yield place
    plugins.cache_clear()


def example() -> tuple[str, dict[str, str]]:
    """The module and the entry points of the page."""
    text = PAGE.read_text()
    project = tomllib.loads(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0])
    module = re.findall(r"```python\n# ngeval_sign.py\n(.*?)```", text, re.DOTALL)[0]
    return module, project["project"]["entry-points"]["ngeval.methods"]


def test_the_page_in_25_lines(install: Install, monkeypatch: pytest.MonkeyPatch):
    module, points = example()
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
    sys_modules = importlib.import_module("sys").modules
    sys_modules.pop("broken_plugin", None)


def test_own_names_cannot_be_taken(install: Install):
    install("thief", "thief_plugin", "entry = None", {"ief": "thief_plugin:entry"})
    with pytest.warns(UserWarning, match=r"method 'ief' of thief 1\.2 is ignored, because ngeval"):
        assert get_method("ief").improved
    assert all_methods()["ief"].source == "ngeval"
