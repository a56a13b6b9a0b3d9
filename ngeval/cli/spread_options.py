"""Options as the command line has them: flags, help texts, and how dataclasses are spread out.

What the options are and their defaults is written in `ngeval.runs.options`, which needs no typer;
`takes_options` joins the two.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from ngeval.runs.options import (
    MAX_SEED,
    GradingOptions,
    HubOptions,
    OutputOptions,
    RunOptions,
    StepOptions,
)

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


def _option_of(annotated: Any) -> Any:
    """The flags and help of one of the annotations above."""
    return annotated.__metadata__[0]


OPTIONS: dict[type, dict[str, Any]] = {
    RunOptions: {
        "task": typer.Option(
            "--task", "-t", help="Built-in name, path/to/file.py:name or package.module:name."
        ),
        "checkpoint": typer.Option(
            "--checkpoint", "-c", help="File, folder or glob; repeat or list several."
        ),
        "more": typer.Argument(metavar="[CHECKPOINT]...", help="More checkpoints."),
        "batch_size": typer.Option(help="N, samples in a graded batch."),
        "num_batches": typer.Option(help="Graded batches for each checkpoint."),
        "seed": _option_of(SeedOption),
        "device": _option_of(DeviceOption),
        "shard": typer.Option(
            help="Under torchrun: units spreads checkpoints and batches over processes, "
            "samples splits every batch among all; auto: samples if there are fewer units than "
            "processes."
        ),
        "dtype": typer.Option(
            help="Run the model in float32, float64 or bfloat16; default: as it is."
        ),
        "engine": typer.Option(help="auto, layers, vmap or loop."),
        "memory": typer.Option(help="To work in, e.g. 8GiB; default: four fifths of what is free."),
        "allow_pickle": typer.Option(
            "--allow-pickle", help="Run code in checkpoints; only for files you trust."
        ),
    },
    HubOptions: {
        "hf_model": typer.Option(
            help="Folder or name on the hub, in place of --task.", rich_help_panel=HUB
        ),
        "adapter": typer.Option(
            help="PEFT adapter: folder, folder of them, glob, hub name; repeat or list several.",
            rich_help_panel=HUB,
        ),
        "dataset": typer.Option(
            help="glue, cifar10, cifar100, hub name or folder.", rich_help_panel=HUB
        ),
        "subset": typer.Option(help="Part of the data set, as sst2.", rich_help_panel=HUB),
        "split": typer.Option(help="Of the data set.", rich_help_panel=HUB),
        "data_dir": typer.Option(help="Folder with the data set's files.", rich_help_panel=HUB),
        "objective": typer.Option(
            help="seq2seq, classification, causal or image; default: as the model says.",
            rich_help_panel=HUB,
        ),
        "columns": typer.Option(help="Text or image columns, a comma list.", rich_help_panel=HUB),
        "label_column": typer.Option(help="Column of the labels.", rich_help_panel=HUB),
        "template": typer.Option(
            help="Prompt, e.g. 'review: {text}'; glue has its own.", rich_help_panel=HUB
        ),
        "label_words": typer.Option(
            help="Answers of a language model by class, a comma list.", rich_help_panel=HUB
        ),
        "max_length": typer.Option(help="Tokens of a text at most.", rich_help_panel=HUB),
        "max_target_tokens": typer.Option(help="Tokens of an answer at most.", rich_help_panel=HUB),
        "padding_side": typer.Option(help="right or left.", rich_help_panel=HUB),
        "samples": typer.Option(help="Of a causal model: sequence, or token.", rich_help_panel=HUB),
        "processor": typer.Option(
            help="Folder of the tokenizer or image processor; default: the model's.",
            rich_help_panel=HUB,
        ),
        "attention": typer.Option(
            help="eager, sdpa, …; default: transformers'.", rich_help_panel=HUB
        ),
        "trust_remote_code": typer.Option(
            "--trust-remote-code",
            help="Run Python code of the model's repository; only if you trust it.",
            rich_help_panel=HUB,
        ),
    },
    GradingOptions: {
        "damping_scale": _option_of(DampingScaleOption),
        "metric_batches": _option_of(MetricOption),
        "natural": typer.Option(help="Also γ_min and bounds on the exact natural gradient's γ."),
        "gap": typer.Option(help="Relative gap of those bounds where a Krylov run finds them."),
    },
    StepOptions: {
        "optimizer_state": typer.Option(
            help="File with its state, one for each checkpoint; default: found beside them.",
            rich_help_panel=STEP,
        ),
        "reduction": typer.Option(
            help="Of the training loss: mean, sum or token-mean; its state depends on it.",
            rich_help_panel=STEP,
        ),
        "weight_decay": typer.Option(
            help="With the optimizer's weight decay.", rich_help_panel=STEP
        ),
    },
    OutputOptions: {
        "output": typer.Option("--output", "-o", help="Result file: .csv, .parquet or .jsonl."),
        "force": _option_of(ForceOption),
        "resume": _option_of(ResumeOption),
        "quiet": _option_of(QuietOption),
    },
}
"""Flags and help of the options that are written in `ngeval.runs.options`, by their names."""


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread a command's dataclasses of options out for typer, and put them together again."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            group = groups[name]
            members = get_type_hints(group, include_extras=True)
            flags = OPTIONS.get(group, {})
            spread_out = [
                (m.name, _with_flags(members[m.name], flags.get(m.name)), m.default)
                for m in fields(group)
            ]
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


def _with_flags(hint: Any, option: Any) -> Any:
    return hint if option is None else Annotated[hint, option]
