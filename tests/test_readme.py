"""CI runs the README's commands, and its examples can be pasted."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ngeval.methods import METHODS
from tests.pages import in_folder

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def block_with(text: str) -> str:
    bodies = [body for _, body in BLOCKS if text in body]
    assert bodies, f"no code block of the README holds {text!r}"
    return bodies[0]


@pytest.mark.parametrize("command", ["&& ngeval demo", "&& python -m pytest"])
def test_ci_runs_the_commands_of_the_readme(command):
    line = block_with(command).strip()
    assert line in (ROOT / ".ci" / "run").read_text()


def test_the_python_examples_run(capsys):
    names: dict[str, object] = {}
    for start, output in (
        ("import torch, ngeval", "damping"),
        ("optimizer = torch.optim.AdamW", "excess"),
        ("from ngeval.methods import ParameterState", "sign"),
        ("metric = ngeval.Metric(", ""),
        ("optimizer = ngeval.optim.iEF", "mean loss"),
    ):
        exec(compile(block_with(start), "README.md", "exec"), names)
        assert output in capsys.readouterr().out


@pytest.mark.second_stage
def test_the_worked_example_runs_as_written(tmp_path):
    (tmp_path / "my_task.py").write_text(block_with("# my_task.py"))
    for line in block_with("ngeval train --task my_task.py").splitlines():
        words = shlex.split(line, comments=True)
        in_folder(tmp_path, ["-m", *words, *(["--quiet"] if "plot" not in words else [])])
    for name in ("gamma.csv", "sweep.csv", "imbalance.csv", "stages.png", "damping.pdf"):
        assert (tmp_path / name).stat().st_size > 1000
    reader = block_with("import pandas, ngeval")
    done = subprocess.run(
        [sys.executable, "-c", reader], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[24 rows x 17 columns]" in done.stdout


def test_every_method_and_likelihood_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    rows = "".join(line for line in text.splitlines() if line.startswith("| `"))
    for name in [*METHODS, "categorical", "gaussian", "bernoulli"]:
        assert re.search(rf"`{name}[:`]", rows), name
