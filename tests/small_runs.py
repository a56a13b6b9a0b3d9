"""Runs of a fraction of a second: a task's file, checkpoints, commands in this process."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from click.testing import Result
from typer.testing import CliRunner

import ngeval.runs.tables
from ngeval.cli.app import app

BATCH = 5
BATCHES = 2
STAGES = 3

TASK = """
import torch
import ngeval


def batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 4):
        x = torch.randn(batch_size, 4, generator=generator)
        yield x, torch.randint(3, (batch_size,), generator=generator)


def double_batches(*args):
    return ((x.double(), y) for x, y in batches(*args))


def indices(batch_size, num_batches, seed):
    for number in range(num_batches or 4):
        yield range(number * batch_size, (number + 1) * batch_size)


task = ngeval.Task(
    "mine", lambda: torch.nn.Linear(4, 3), batches, "categorical", load_indices=indices
)
double = ngeval.Task(
    "double", lambda: torch.nn.Linear(4, 3).double(), double_batches, "categorical"
)
"""


@dataclass(frozen=True)
class Small:
    """Three checkpoints of a linear model, graded on two batches of five.

    Attributes:
        folder: where everything is.
        more: options of every command.
    """

    folder: Path
    more: tuple[str, ...] = field(default=("--quiet",))

    @classmethod
    def of(cls, folder: Path) -> Small:
        """Write the task and the checkpoints."""
        (folder / "mine.py").write_text(TASK)
        small = cls(folder)
        for stage in range(STAGES):
            small.save(stage)
        return small

    def checkpoint(self, stage: int) -> Path:
        """Its file."""
        return self.folder / f"epoch={stage}.safetensors"

    def save(self, stage: int, seed: int | None = None) -> None:
        """Write a checkpoint, or another one in its place."""
        generator = torch.Generator().manual_seed(stage if seed is None else seed)
        weights = {
            "weight": torch.randn(3, 4, generator=generator),
            "bias": torch.randn(3, generator=generator),
        }
        safetensors.torch.save_file(weights, self.checkpoint(stage))

    def args(self, command: str, output: Path, *more: object) -> list[str]:
        """A command's words; those that come later win."""
        methods = {"imbalance": "ef", "layers": "ief"}.get(command, "sgd,ief")
        words = [command, "-t", "mine.py:task", "-c", "epoch=*.safetensors"]
        words += ["--batch-size", BATCH, "--num-batches", BATCHES, "-m", methods]
        damping = {"imbalance": "0.1", "sweep": "1e-4:1:3", "layers": "1"}.get(command, "1e-3,1")
        words += ["--dampings" if command == "sweep" else "--damping", damping, "-o", output]
        return [str(word) for word in (*words, *self.more, *more)]

    def run(self, command: str, output: Path, *more: object, code: int = 0) -> Result:
        """A command in this process, in the folder: the names in tables are the same wherever."""
        with contextlib.chdir(self.folder):
            return run(*self.args(command, output, *more), code=code)


def run(*args: object, code: int = 0) -> Result:
    """A command in this process; a wrong exit code shows what it printed."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def stop_after(monkeypatch, units: int, error: BaseException | None = None) -> None:
    """Have a run stopped (Ctrl-C, or another error) once so many units are graded."""
    for name in ("evaluate", "layer_table", "sample_table"):
        _stop_one(monkeypatch, name, units, error or KeyboardInterrupt())


def _stop_one(monkeypatch, name: str, units: int, error: BaseException) -> None:
    make, calls = getattr(ngeval.runs.tables, name), []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) > units:
            raise error
        return make(*args, **kwargs)

    monkeypatch.setattr(ngeval.runs.tables, name, stopped)


def files(folder: Path) -> set[str]:
    """Names in a folder that are no checkpoints or tasks."""
    return (
        {p.name for p in folder.iterdir()}
        - {"mine.py", "__pycache__"}
        - {f"epoch={stage}.safetensors" for stage in range(STAGES)}
    )
