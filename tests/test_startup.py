"""What is imported before there is something to compute: nothing that takes long."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

import ngeval
from ngeval.cli import listing, train
from ngeval.cli.options import OPTIONS
from ngeval.curvature.krylov import GAP
from ngeval.plots import FIGURES
from ngeval.runs.options import GradingOptions
from ngeval.tasks import BUILTIN_TASKS, get_task
from ngeval.training import EXACT

SLOW = ("torch", "sklearn", "scipy", "pandas", "matplotlib", "transformers", "pyarrow")

COMMANDS = (
    *("demo", "train", "gamma", "sweep", "compare", "layers", "imbalance"),
    *("verify", "plot", "report", "tasks", "methods"),
)

CALLS = {
    0: [
        ["--help"],
        ["--version"],
        ["methods"],
        ["tasks"],
        *([name, "--help"] for name in COMMANDS),
    ],
    2: [
        ["gama"],
        ["gamma", "--no-such-option"],
        ["train", "--epochs", "many"],
        *([name, "-m", "sgdd", "-t", "x", "-c", "y"] for name in COMMANDS[2:4]),
        ["compare", "-m", "sgdd", "-t", "x", "-c", "y", "-o", "z"],
        *([name, "-m", "sgdd", "-t", "x", "-c", "y"] for name in COMMANDS[5:7]),
    ],
}

SCRIPT = """
import contextlib, io, json, sys
from ngeval.cli.app import main

slow, calls = set(sys.argv[1].split(",")), json.loads(sys.argv[2])
results = []
for words in calls:
    sys.argv = ["ngeval", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code
    results.append([code, sorted(slow & set(sys.modules))])
print(json.dumps(results))
"""


def python(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def test_help_lists_and_typing_errors_import_nothing_slow():
    calls = [words for same in CALLS.values() for words in same]
    codes = [code for code, same in CALLS.items() for _ in same]
    results = json.loads(python("-c", SCRIPT, ",".join(SLOW), json.dumps(calls)))
    for words, code, result in zip(calls, codes, results, strict=True):
        assert result == [code, []], words


def test_the_package_imports_its_names_on_first_use():
    code = f"""
import sys, ngeval
slow = {{*{SLOW}}}
print(sorted(slow & set(sys.modules)))
from ngeval import Problem, evaluate
print(Problem is ngeval.Problem, "torch" in sys.modules, ngeval.optim.__name__)
"""
    assert python("-c", code).splitlines() == ["[]", "True True ngeval.optim"]


def test_names_of_the_package():
    assert set(ngeval.__all__) <= set(dir(ngeval))
    for name in ngeval.__all__:
        assert getattr(ngeval, name) is not None
    with pytest.raises(AttributeError, match="module 'ngeval' has no attribute 'gama'"):
        _ = ngeval.gama


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_tasks_are_described_as_they_are_built(name):
    task, entry = get_task(name), BUILTIN_TASKS[name]
    assert task.name == name
    assert task.description == entry.description
    assert sum(p.numel() for p in task.model().parameters()) == entry.num_parameters


def test_what_help_repeats_is_what_it_is_elsewhere():
    assert list(FIGURES) == listing.KINDS.split(", ")
    assert list(EXACT) == train.EXACT.split(", ")
    assert GradingOptions().gap == GAP
    for group, options in OPTIONS.items():
        assert [field.name for field in fields(group)] == list(options)
