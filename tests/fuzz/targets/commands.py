"""The command line, in this process: arguments between NUL bytes, as a program's really are."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import typer
import typer.testing
from hypothesis import strategies as st
from typer.testing import CliRunner

from ngeval.cli.app import app
from ngeval.errors import NgevalError
from tests.fuzz.targets.base import HOSTILE_NAMES, Target, damaged, remembered
from tests.fuzz.targets.checkpoints import STATE, _saved
from tests.fuzz.targets.results import _csv, _gammas, _samples

CODES = {0, 1, 2, 3, 130, 143}
"""Done; a comparison failed; refused; done but for a part; interrupted; terminated."""

SLOW = ("demo",)
"""Commands that would train for minutes; their arguments are tried behind a wrong one."""

TASK = """
import torch
import ngeval


def load_batches(batch_size, num_batches, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches or 2):
        x = torch.randn(batch_size, 4, generator=generator)
        yield x, x[:, :3].argmax(1)


task = ngeval.Task("tiny", lambda: torch.nn.Linear(4, 3), load_batches, "categorical")
"""

VALUES = (
    *("tiny.py:task", "digits-mlp", "good.safetensors", "hostile.pt", "gammas.csv", "norms.csv"),
    *("out.csv", "out.parquet", "out.jsonl", "out.html", "out.png", "folder", "run", "new/out.csv"),
    *("sgd,ief", "sf:4", "kfac", "adamw:2", "ng", "1e-3", "0,1e-6,1", "1e-4:1:3", "8", "2", "0"),
    *("-1", "relative", "layer", "float64", "cpu", "cuda:7", "auto", "1MiB", "mean", "stages"),
    *("nothing.pt", "*.safetensors", "broken.csv", "task.py:none", "json:loads", "all", "page"),
)
"""Values of options, whatever these take."""


def attempt(data: bytes, folder: Path) -> None:
    """Run the command in the folder, and judge exit code, messages and traces."""
    words = [part.decode("utf-8", "surrogateescape") for part in data.split(b"\0")]
    if words[0] in SLOW:
        words[1:1] = ["--no-such-option"]
    place = folder / "place"
    _furnish(place)
    with _inside(place):
        result = CliRunner().invoke(app, words)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise error
    shown = result.output_bytes
    assert result.exit_code in CODES, f"exit code {result.exit_code}: {words}"
    assert b"Traceback" not in shown, "a traceback is printed"
    assert b"\x1b" not in shown, "an escape sequence is printed"
    if result.exit_code and not result.stderr_bytes.strip():
        raise NgevalError("")  # which the oracle takes for what it is: no message


@contextlib.contextmanager
def _inside(place: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


@cache
def _contents() -> dict[str, bytes]:
    saved = _saved()
    return {
        "tiny.py": TASK.encode(),
        "good.safetensors": safetensors.torch.save(STATE),
        "good.json": b'{"epoch": 3}',
        "hostile.pt": saved["hostile"],
        "gammas.csv": _csv(_gammas()),
        "norms.csv": _csv(_samples()),
        "broken.csv": b'a,"b\n1\x00,\xff\n',
        "run/epoch-000.safetensors": safetensors.torch.save(STATE),
        "run/\x1b[31mepoch\n-001.pt": saved["bin"],
        "folder/[bold]x.pt": b"nothing of the kind",
    }


def _furnish(place: Path) -> None:
    """The files that arguments name, and none that an earlier command left."""
    if place.exists():
        shutil.rmtree(place)
    for name, content in _contents().items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


_GROUP: Any = typer.main.get_command(app)
_get_command = typer.testing._get_command
# Made once, which takes a sixth of a second; the tests also run the studies' commands.
typer.testing._get_command = lambda made: _GROUP if made is app else _get_command(made)


@cache
def options() -> dict[str, list[str]]:
    """Every command with its options, as the program has them."""
    return {
        name: [text for option in command.params for text in option.opts if text.startswith("-")]
        for name, command in _GROUP.commands.items()
    }


@remembered
def seeds() -> list[bytes]:
    """Commands that work, and each command alone and with --help."""
    lines = [
        "gamma --task tiny.py:task --checkpoint good.safetensors --batch-size 8 --output out.csv",
        "sweep -t tiny.py:task -c run --batch-size 8 --num-batches 1 --dampings 1e-4:1:3 -q",
        "imbalance -t tiny.py:task -c good.safetensors --batch-size 8 -o out.jsonl",
        "layers -t tiny.py:task -c good.safetensors --methods sgd,ief --batch-size 8",
        "plot gammas.csv --kind stages --output out.png",
        "report gammas.csv norms.csv --output out.html",
        "train --task tiny.py:task --optimizer sgd --epochs 1 --batch-size 8 --output new",
        "gamma -t tiny.py:task -c hostile.pt --batch-size 8",
        "tasks",
        "methods",
    ]
    lines += [f"{name}{end}" for name in options() for end in ("", " --help")]
    return [b"\0".join(word.encode() for word in line.split()) for line in lines]


@st.composite
def _line(draw: st.DrawFn) -> bytes:
    """A command with some of its options, and values that fit or do not."""
    name = draw(st.sampled_from(list(options())))
    odd = st.sampled_from(VALUES) | st.sampled_from(HOSTILE_NAMES) | st.text(max_size=6)
    words = [name]
    if name in ("gamma", "sweep", "imbalance", "layers", "compare") and draw(st.booleans()):
        words += ["--task", "tiny.py:task", "--checkpoint", "good.safetensors"]
        words += ["--batch-size", "8", "--num-batches", "1", "--methods", "sgd"][
            : 4 + 2 * (name != "imbalance")
        ]
    for _ in range(draw(st.integers(0, 5))):
        words.append(draw(st.sampled_from(options()[name] or ["--help"])))
        if draw(st.booleans()):
            words.append(draw(odd))
    words += draw(st.lists(odd, max_size=2))
    return b"\0".join(word.replace("\0", "").encode("utf-8", "surrogatepass") for word in words)


def structured() -> st.SearchStrategy[bytes]:
    """Commands with their own options, and commands that work with something changed."""
    whole = damaged(st.sampled_from(seeds()))
    return st.one_of(_line(), _line(), _line(), whole)


TARGET = Target(
    "commands",
    0.02,
    attempt,
    seeds,
    structured,
    words=(*VALUES, "--help", "--output", "--methods", "--task", "--checkpoint", "\0--"),
)
