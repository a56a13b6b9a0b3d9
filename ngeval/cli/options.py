"""The options that several commands share, and commands that take dataclasses of options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from ngeval.runs.options import MAX_SEED, GradingOptions, OutputOptions, RunOptions

SEED = typer.Option(min=0, max=MAX_SEED, help="For batches, sampled labels and training.")
DEVICE = typer.Option(help="cpu, cuda, cuda:1, mps.")
FORCE = typer.Option("--force", help="Replace output that exists.")
RESUME = typer.Option("--resume", help="Do only what a stopped run has not done, or start it.")
STOP_AFTER = typer.Option(min=1, help="End after N units, which are kept; --resume continues.")
QUIET = typer.Option("--quiet", "-q", help="Show errors only.")
DAMPING_SCALE = typer.Option(
    help="What λ multiplies: absolute (sum-reduced), mean (Nλ), relative (λ·λmax)."
)
METRIC = typer.Option(
    help="Grade on the task's first K batches, or on all of an epoch; default: the graded batch."
)
TASK = typer.Option(
    "--task", "-t", help="Built-in name, path/to/file.py:name or package.module:name."
)

SeedOption = Annotated[int, SEED]
DeviceOption = Annotated[str, DEVICE]
ForceOption = Annotated[bool, FORCE]
ResumeOption = Annotated[bool, RESUME]
StopAfterOption = Annotated[int | None, STOP_AFTER]
QuietOption = Annotated[bool, QUIET]
MethodsOption = Annotated[
    str, typer.Option("--methods", "-m", help="Comma list; `ngeval methods` lists them.")
]
DampingScaleOption = Annotated[str, DAMPING_SCALE]
MetricOption = Annotated[str | None, METRIC]

_hub: Any = functools.partial(typer.Option, rich_help_panel="Hugging Face model and data")
_step: Any = functools.partial(
    typer.Option, rich_help_panel="Steps of optimizers (methods such as adamw, adamw:20, muon)"
)

OPTIONS: dict[type, dict[str, Any]] = {
    RunOptions: {
        "hf_model": _hub(help="Folder or name on the hub, in place of --task."),
        "adapter": _hub(
            help="PEFT adapter: folder, folder of them, glob, hub name; repeat or list several."
        ),
        "dataset": _hub(help="glue, cifar10, cifar100, hub name or folder."),
        "subset": _hub(help="Part of the data set, as sst2."),
        "split": _hub(help="Of the data set."),
        "data_dir": _hub(help="Folder with the data set's files."),
        "objective": _hub(
            help="seq2seq, classification, causal or image; default: as the model says."
        ),
        "columns": _hub(help="Text or image columns, a comma list."),
        "label_column": _hub(help="Column of the labels."),
        "template": _hub(help="Prompt, e.g. 'review: {text}'; glue has its own."),
        "label_words": _hub(help="Answers of a language model by class, a comma list."),
        "max_length": _hub(help="Tokens of a text at most."),
        "max_target_tokens": _hub(help="Tokens of an answer at most."),
        "padding_side": _hub(help="right or left."),
        "samples": _hub(help="sequence; token (causal), first-token (seq2seq)."),
        "processor": _hub(help="Folder of the tokenizer or image processor; default: the model's."),
        "attention": _hub(help="eager, sdpa, …; default: that of transformers."),
        "trust_remote_code": _hub(
            "--trust-remote-code",
            help="Run Python code of the model's repository; only if you trust it.",
        ),
        "task": TASK,
        "checkpoint": typer.Option(
            "--checkpoint", "-c", help="File, folder or glob; repeat or list several."
        ),
        "more": typer.Argument(metavar="[CHECKPOINT]...", help="More checkpoints."),
        "batch_size": typer.Option(help="N, samples in a graded batch."),
        "num_batches": typer.Option(help="Graded batches for each checkpoint."),
        "seed": SEED,
        "device": DEVICE,
        "shard": typer.Option(
            help="Under torchrun: units spreads checkpoints and batches over processes, samples "
            "splits every batch among all; auto: samples if there are fewer units than processes."
        ),
        "dtype": typer.Option(
            help="What the model is graded in: auto (float64 where affordable), model (its own "
            "types), float64, float32 or bfloat16."
        ),
        "engine": typer.Option(help="auto, layers, vmap or loop."),
        "memory": typer.Option(help="To work in, e.g. 8GiB; default: four fifths of what is free."),
        "allow_pickle": typer.Option(
            "--allow-pickle", help="Run code in checkpoints; only for files you trust."
        ),
        "checkpoint_key": typer.Option(
            help="Where the weights are in each file, as in model.state_dict; default: what fits."
        ),
        "strict": typer.Option(
            help="Names in a checkpoint and in the model must agree; else the rest is reported."
        ),
        "optimizer_state": _step(
            help="File with its state, one for each checkpoint; default: the one beside each."
        ),
        "reduction": _step(
            help="Of the training loss: mean, sum or token-mean; its state depends on it."
        ),
        "weight_decay": _step(help="With the optimizer's weight decay."),
    },
    GradingOptions: {
        "damping_scale": DAMPING_SCALE,
        "metric_batches": METRIC,
        "natural": typer.Option(help="Also γ_min and bounds on the exact natural gradient's γ."),
        "gap": typer.Option(help="Relative gap between those bounds at which a Krylov run stops."),
    },
    OutputOptions: {
        "output": typer.Option("--output", "-o", help="Result file: .csv, .parquet or .jsonl."),
        "force": FORCE,
        "resume": RESUME,
        "stop_after": STOP_AFTER,
        "quiet": QUIET,
    },
}
"""The flags and the help of each field of the options of a run."""


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread the dataclasses among a command's parameters into one parameter for each field.

    The flags and the help of the fields are those of `OPTIONS`.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if (group := groups.get(name)) is None:
            parameters.append(keyword(name, default=parameter.default, annotation=hints[name]))
            continue
        types = get_type_hints(group)
        for field in fields(group):
            annotation: Any = Annotated[types[field.name], OPTIONS[group][field.name]]
            parameters.append(keyword(field.name, default=field.default, annotation=annotation))

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    # typer reads the signature and the annotations; the wrapped command must not shadow them.
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del spread.__wrapped__
    return spread
