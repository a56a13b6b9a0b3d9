"""The options that commands share, and how their text is read."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
import typer

from ngeval.curvature.krylov import GAP
from ngeval.errors import InputError, nearest_name

MAX_SEED = 2**32 - 1
MOST_BYTES = 2**60
MAX_COUNT = 10_000
"""Values in a range; more are a typing error."""

SeedOption = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="For batches, sampled labels and training.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace output that exists.")]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Do only what is missing of a run that was stopped, or start."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
MethodsOption = Annotated[
    str, typer.Option("--methods", "-m", help="Comma list; `ngeval methods` shows them.")
]

DampingScaleOption = Annotated[
    str,
    typer.Option(help="What λ multiplies: absolute (sum-reduced), mean (Nλ), relative (λ·λmax)."),
]
MetricOption = Annotated[
    str | None,
    typer.Option(help="Grade by the task's first K batches, or all of an epoch; default: the own."),
]

HUB = "Hugging Face model and data"
"""The panel of ``--help`` for what makes up a task on the command line."""

STEP = "Steps of optimizers (methods such as adamw, adamw:20, muon)"
"""The panel of ``--help`` for how an optimizer's step is taken."""

SHARDS = ("auto", "units", "samples")

REDUCTIONS = ("mean", "sum", "token-mean")


@dataclass(frozen=True)
class RunOptions:
    """Which checkpoints of which task are graded, on what, and how it is computed."""

    task: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="Built-in name, path/to/file.py:name or package.module:name."
        ),
    ] = None
    checkpoint: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", "-c", help="File, folder or glob; repeat or list several."),
    ] = None
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECKPOINT]...", help="More checkpoints.")
    ] = None
    batch_size: Annotated[int, typer.Option(help="N, samples in a graded batch.")] = 160
    num_batches: Annotated[int, typer.Option(help="Graded batches for each checkpoint.")] = 5
    seed: SeedOption = 0
    device: DeviceOption = "cpu"
    shard: Annotated[
        str,
        typer.Option(
            help="Under torchrun: units spreads checkpoints and batches over processes, samples "
            "splits every batch among all; auto: samples if there are fewer units than processes."
        ),
    ] = "auto"
    dtype: Annotated[
        str | None,
        typer.Option(help="Run the model in float32, float64 or bfloat16; default: as it is."),
    ] = None
    engine: Annotated[str, typer.Option(help="auto, layers, vmap or loop.")] = "auto"
    memory: Annotated[
        str | None,
        typer.Option(help="To work in, e.g. 8GiB; default: four fifths of what is free."),
    ] = None
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Run code in checkpoints; only for files you trust."),
    ] = False


@dataclass(frozen=True)
class HubOptions:
    """What makes up a Hugging Face task; see `ngeval.tasks.hf.hub_task`."""

    hf_model: Annotated[
        str | None,
        typer.Option(help="Folder or name on the hub, in place of --task.", rich_help_panel=HUB),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="PEFT adapter: folder, folder of them, glob, hub name; repeat or list several.",
            rich_help_panel=HUB,
        ),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(help="glue, cifar10, cifar100, hub name or folder.", rich_help_panel=HUB),
    ] = None
    subset: Annotated[
        str | None, typer.Option(help="Part of the data set, as sst2.", rich_help_panel=HUB)
    ] = None
    split: Annotated[str, typer.Option(help="Of the data set.", rich_help_panel=HUB)] = "train"
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data set's files.", rich_help_panel=HUB)
    ] = None
    objective: Annotated[
        str | None,
        typer.Option(
            help="seq2seq, classification, causal or image; default: as the model says.",
            rich_help_panel=HUB,
        ),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option(help="Text or image columns, a comma list.", rich_help_panel=HUB),
    ] = None
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels.", rich_help_panel=HUB)
    ] = None
    template: Annotated[
        str | None,
        typer.Option(help="Prompt, e.g. 'review: {text}'; glue has its own.", rich_help_panel=HUB),
    ] = None
    label_words: Annotated[
        str | None,
        typer.Option(
            help="Answers of a language model by class, a comma list.", rich_help_panel=HUB
        ),
    ] = None
    max_length: Annotated[
        int, typer.Option(help="Tokens of a text at most.", rich_help_panel=HUB)
    ] = 256
    max_target_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer at most.", rich_help_panel=HUB)
    ] = 16
    padding_side: Annotated[str, typer.Option(help="right or left.", rich_help_panel=HUB)] = "right"
    samples: Annotated[
        str,
        typer.Option(help="Of a causal model: sequence, or token.", rich_help_panel=HUB),
    ] = "sequence"
    processor: Annotated[
        str | None,
        typer.Option(
            help="Folder of the tokenizer or image processor; default: the model's.",
            rich_help_panel=HUB,
        ),
    ] = None
    attention: Annotated[
        str | None,
        typer.Option(help="eager, sdpa, …; default: transformers'.", rich_help_panel=HUB),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code of the model's repository; only if you trust it.",
            rich_help_panel=HUB,
        ),
    ] = False


@dataclass(frozen=True)
class GradingOptions:
    """How updates are graded."""

    damping_scale: DampingScaleOption = "absolute"
    metric_batches: MetricOption = None
    natural: Annotated[
        bool, typer.Option(help="Also γ_min and bounds on the exact natural gradient's γ.")
    ] = True
    gap: Annotated[
        float, typer.Option(help="Relative gap of those bounds where a Krylov run finds them.")
    ] = GAP


@dataclass(frozen=True)
class StepOptions:
    """How an optimizer's step is taken; see `ngeval.OptimizerStep`."""

    optimizer_state: Annotated[
        list[Path] | None,
        typer.Option(
            help="File with its state, one for each checkpoint; default: found beside them.",
            rich_help_panel=STEP,
        ),
    ] = None
    reduction: Annotated[
        str,
        typer.Option(
            help="Of the training loss: mean, sum or token-mean; its state depends on it.",
            rich_help_panel=STEP,
        ),
    ] = "mean"
    weight_decay: Annotated[
        bool, typer.Option(help="With the optimizer's weight decay.", rich_help_panel=STEP)
    ] = True


@dataclass(frozen=True)
class OutputOptions:
    """Where results go."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Result file: .csv, .parquet or .jsonl.")
    ] = None
    force: ForceOption = False
    resume: ResumeOption = False
    quiet: QuietOption = False


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread a command's dataclasses of options out for typer, and put them together again."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            members = get_type_hints(groups[name], include_extras=True)
            spread_out = [(m.name, members[m.name], m.default) for m in fields(groups[name])]
        else:
            spread_out = [(name, hints[name], parameter.default)]
        parameters += [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for n, hint, default in spread_out
        ]

    @functools.wraps(command)
    def spread(**given: Any) -> None:
        made = {
            name: group(**{member.name: given.pop(member.name) for member in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **given)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    del spread.__wrapped__
    return spread


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {
    f"{letter}{end}": 2**power
    for letter, power in zip("KMG", (10, 20, 30), strict=True)
    for end in ("", "IB")
}


def parse_dampings(text: str) -> list[float]:
    """Read ``"1e-8:1e4:50"`` (log-spaced low:high:count) or ``"0,1e-6,1"``.

    Raises:
        InputError: neither of the two, or a range that is empty or reaches 0.

    >>> parse_dampings("1e-2:1:3")
    [0.01, 0.1, 1.0]
    """
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",") if part.strip()]
        low, high, count = text.split(":")
        ends, number = (float(low), float(high)), int(count)
    except ValueError as error:
        raise InputError(
            f"damping {text!r}: write a comma list like 0,1e-6,1 or low:high:count like 1e-8:1e4:50"
        ) from error
    if not (0 < ends[0] <= ends[1] < math.inf) or not 1 <= number <= MAX_COUNT:
        raise InputError(
            f"damping range {text!r} needs 0 < low ≤ high and a count from 1 to {MAX_COUNT}"
        )
    # Rounded to 12 digits, so that 1e-06 is there as typed and can be asked for.
    return [float(f"{value:.12g}") for value in np.geomspace(*ends, number)]


def parse_numbers(option: str, text: str | None) -> list[float] | None:
    """Read an option's comma list, or log-spaced low:high:count; None stays None.

    Raises:
        InputError: neither of the two.

    >>> parse_numbers("--lr", "0.1,1")
    [0.1, 1.0]
    """
    if text is None:
        return None
    try:
        values = parse_dampings(text)
    except InputError:
        values = []
    if not values:
        raise InputError(
            f"{option} {text!r}: write a number, a comma list like 0.01,0.1,1 or low:high:count "
            "like 0.01:1:5"
        )
    return values


def parse_bytes(text: str | None) -> int | None:
    """Read an amount of memory such as ``8GiB``, ``8G`` or ``500MB``; None stays None.

    Raises:
        InputError: no such amount.

    >>> parse_bytes("2GiB")
    2147483648
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise InputError(f"memory {text!r}: write an amount like 8GiB or 500MB")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if not count < MOST_BYTES:
        raise InputError(f"memory {text[:40]!r} is more than there is anywhere")
    return int(count)


def parse_metric(text: str | None) -> int | str | None:
    """Read a number of batches, or ``all``; None stays None.

    Raises:
        InputError: neither.
    """
    if text is None or text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"metric batches {text!r}: write a number of batches, or all")
    return int(text)


def parse_groups(text: str) -> str | int:
    """Read ``layer``, ``parameter``, or a number of components of parameters' names.

    Raises:
        InputError: neither.
    """
    if text in ("layer", "parameter"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise InputError(
            f"groups {text!r}: write layer, parameter, or how many components of a parameter's "
            "name make a group, like 2"
        )
    return int(text)


def parse_dtype(text: str | None) -> torch.dtype | None:
    """Read a floating-point type by name; None stays None.

    Raises:
        InputError: no such type.
    """
    if text is None:
        return None
    if text not in DTYPES:
        raise InputError(f"unknown dtype {text!r}; {nearest_name(text, DTYPES)}")
    return DTYPES[text]
