"""The short texts that options take: tasks, methods, dampings, memory, likelihoods, patterns.

The first byte says which option the others are for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase

from hypothesis import strategies as st

from ngeval.checkpoints import find_checkpoints
from ngeval.cli.listing import relative_pairs
from ngeval.dampings import parse_dampings
from ngeval.likelihoods import get_likelihood
from ngeval.methods import METHODS, get_method, get_methods
from ngeval.runs.options import (
    parse_bytes,
    parse_dtype,
    parse_groups,
    parse_metric,
)
from ngeval.tasks import BUILTIN_TASKS, get_task
from ngeval.tasks.hf.glue import TextForm
from ngeval.tasks.hf.hub import resolve_name
from tests.fuzz.targets.base import Target, names, remembered

ROW = {"text": "fine", "a": "x", "b": "y", "label": 1}


def _prompt(template: str) -> str:
    form = TextForm(template, ("no", "yes"), "label")
    return form.prompt({name: ROW.get(name, "") for name in form.columns})


READERS: tuple[Callable[[str], object], ...] = (
    get_task,
    get_method,
    get_methods,
    parse_dampings,
    parse_bytes,
    parse_metric,
    parse_groups,
    parse_dtype,
    get_likelihood,
    relative_pairs,
    lambda text: find_checkpoints([text]),
    lambda text: resolve_name(text, "model"),
    _prompt,
)
"""What reads a text, by the first byte."""

VALID: tuple[tuple[str, ...], ...] = (
    (*BUILTIN_TASKS, "file.py:task", "package.module:name", "json:loads"),
    (*tuple(METHODS), "sf:4", "diag-ef:0.5", "diag-sf:2:0.5", "kfac:reduce:pi", "adamw:20"),
    ("sgd,ief,sf:4", "torch.optim.AdamW:0,ng"),
    ("1e-8:1e4:50", "0,1e-6,1"),
    ("8GiB", "500MB", "1.5 g"),
    ("20", "all"),
    ("layer", "parameter", "2"),
    ("float32", "bfloat16"),
    ("categorical", "gaussian:0.5", "bernoulli"),
    ("sf/ief,ef/ief", "none"),
    ("runs/*.pt", "**/[ab]*.safetensors", "~"),
    ("t5-base", "google/vit-base"),
    ("review: {text}", "{a} and {b}", "{{x}}"),
)
"""For each reader, what it takes."""


def attempt(data: bytes, folder: Path) -> None:
    """Give the text to its reader."""
    if data:
        READERS[data[0] % len(READERS)](data[1:].decode("utf-8", "surrogateescape"))


def _of(kind: int, text: str) -> bytes:
    return bytes([kind]) + text.encode("utf-8", "surrogatepass")


@remembered
def seeds() -> list[bytes]:
    """What each reader takes."""
    return [_of(kind, text) for kind, valid in enumerate(VALID) for text in valid]


@st.composite
def structured(draw: st.DrawFn) -> bytes:
    """Parts of what a reader takes, with odd ones between them."""
    kind = draw(st.integers(0, len(READERS) - 1))
    signs = st.sampled_from([*":,./*[]{}-+ \n\x00~٣∞", "", "1e400", "nan", "inf", "0x1", "9" * 30])
    valid = st.sampled_from(VALID[kind])
    cut = valid.flatmap(lambda text: st.integers(0, len(text)).map(lambda end: text[:end]))
    word = st.text(ascii_lowercase + "-_", max_size=6)
    part = st.one_of(valid, cut, signs, signs, names(), word, st.integers().map(str))
    return _of(kind, "".join(draw(st.lists(part, max_size=5))))


TARGET = Target(
    "texts",
    0.18,
    attempt,
    seeds,
    structured,
    words=sorted({text for valid in VALID for text in valid} | {"nan", "inf", "1e400", "{", "}"}),
)
