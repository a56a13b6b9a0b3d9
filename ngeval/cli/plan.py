"""``ngeval plan``: what a run will cost, before it starts."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ngeval import planning
from ngeval.cli import console
from ngeval.runs.from_options import make_run
from ngeval.commands.common import say
from ngeval.errors import InputError
from ngeval.utils.atomic import replace_file
from ngeval.utils.memory import describe_bytes
from ngeval.methods import get_methods
from ngeval.runs.options import (
    MAX_COUNT,
    ForceOption,
    GradingOptions,
    HubOptions,
    MethodsOption,
    QuietOption,
    RunOptions,
    StepOptions,
    parse_dampings,
    parse_metric,
    takes_options,
)
from ngeval.planning import MARGIN, PROBE_SECONDS, Plan
from ngeval.grading.prepare import check_dampings
from ngeval.results.table_files import check_output
from ngeval.runs.run import Grading

PASSES = ("forward", "backward", "tangent")

STEPS = 8
"""At most so many things are told of while a plan is made."""


@takes_options
def plan(
    run: RunOptions,
    hub: HubOptions,
    step: StepOptions,
    grading: GradingOptions,
    methods: MethodsOption = "sgd,ef,sf,ief,diag,ng",
    dampings: Annotated[
        str, typer.Option("--dampings", "--damping", help="λ: low:high:count, or a comma list.")
    ] = "1e-8:1e4:50",
    command: Annotated[
        str,
        typer.Option(help="gamma (sweep and compare cost the same), layers or imbalance."),
    ] = "gamma",
    ranks: Annotated[
        str, typer.Option(help="Processes of torchrun, a device for each; a comma list.")
    ] = "1,2,4,8",
    probe_seconds: Annotated[
        float, typer.Option(help="How long may be measured; less is less certain.")
    ] = PROBE_SECONDS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The figures, as .json.")
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """What a run will cost before it starts: passes, time, memory, disk, on one rank and several.

    The first checkpoint is graded on parts of the first batch, for a minute at most; nothing of the
    run itself is done. Times are those of this machine as busy as it is now.

    [bold]Examples:[/bold]

    ngeval plan --task digits-mlp --checkpoint runs/mlp --dampings 1e-8:1e4:50 --num-batches 100

    ngeval plan --task my.py:task -c 'runs/*.safetensors' -m sgd,kfac,ng --ranks 1,4,16 -o plan.json
    """
    launched = time.process_time()  # imports; a wall clock would count what other programs took
    counts = parse_ranks(ranks)
    if output is not None:
        check_output(output, (".json",), force=force)
    names = [method.name for method in get_methods(methods)] if methods else []
    values = check_dampings(parse_dampings(dampings))
    how = Grading(parse_metric(grading.metric_batches), grading.natural, grading.gap)
    job = make_run(run, hub, step)
    with console.progress_bar(quiet) as bar:
        task = bar.add_task("planning", total=STEPS)

        def tell(what: str) -> None:
            bar.update(task, description=f"planning: {what}")
            bar.advance(task)

        made = planning.plan(
            job,
            names,
            values,
            grading.damping_scale,
            how,
            command=command,
            probe_seconds=probe_seconds,
            launch_seconds=launched,
            on_step=tell,
        )
        bar.update(task, description="planning", completed=STEPS)
    if output is not None:
        text = json.dumps(figures(made, counts), ensure_ascii=False, indent=2) + "\n"
        replace_file(output, lambda place: place.write_text(text, encoding="utf-8"))
    shown = console.table_console(quiet)
    shown.print(unit_table(made))
    shown.print(ranks_table(made, counts))
    say(shown, verdict(made, counts))
    for note in made.notes:
        say(shown, f"note: {note}")


def parse_ranks(text: str) -> list[int]:
    """Read numbers of processes, each once, in their order.

    Raises:
        InputError: not such a list.

    >>> parse_ranks("1, 4,4")
    [1, 4]
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 0 < int(part) <= MAX_COUNT for part in parts):
        raise InputError(f"ranks {text!r}: write numbers of processes, as 4 or 1,2,4,8")
    return list(dict.fromkeys(int(part) for part in parts))


def figures(made: Plan, ranks: list[int]) -> dict[str, Any]:
    """All of a plan as JSON has it; times in seconds, amounts in bytes."""
    by_rank = {
        str(count): {"seconds": made.seconds(count), "seconds_here": made.seconds_here(count)}
        for count in ranks
    }
    return {
        **asdict(made),
        "units": made.units,
        "passes": asdict(made.passes),
        "gradient_equivalents": made.gradient_equivalents,
        "peak_bytes": made.peak_bytes,
        "margin": MARGIN,
        "ranks": by_rank,
    }


def duration(seconds: float) -> str:
    """A time with two digits or so, as people say it.

    >>> [duration(value) for value in (0.0312, 7.26, 99.6, 12_000, 400_000)]
    ['0.031 s', '7.3 s', '2 min', '3 h 20 min', '4 d 15 h']
    """
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def between(value: float) -> str:
    """From what to what a time may be."""
    return f"{duration(value * (1 - MARGIN))} to {duration(value * (1 + MARGIN))}"


def unit_table(made: Plan) -> Table:
    """What a unit and the whole run take."""
    unit = made.unit
    if made.measured:
        how = f"measured on all {made.batch_size} samples"
    else:
        how = f"from up to {made.rungs[-1].samples} of {made.batch_size} samples"
    table = Table(
        title=f"{made.units:,} units: {made.checkpoints:,} checkpoints × {made.batches:,} batches "
        f"of {made.batch_size:,}; {made.methods} methods, {made.dampings} dampings"
    )
    for name in ("", "one", "times", "the run"):
        table.add_column(name, justify="left" if not name else "right")

    def add(name: str, seconds: float, times: int) -> None:
        table.add_row(name, duration(seconds), f"{times:,}", duration(times * seconds))

    add("starting the program", made.launch_seconds, 1)
    add("starting the run: the model, first calls", made.startup_seconds, 1)
    add("loading a checkpoint with its data", made.load_seconds, made.checkpoints)
    add(f"a unit, {how}", unit.seconds, made.units)
    table.add_row("time in all", "", "", duration(made.seconds()), end_section=True)
    if unit.factoring:
        add("factorisations of a unit", unit.factoring, made.units)
    if unit.iterations:
        add(f"Krylov run of a unit, {unit.iterations} iterations", unit.krylov, made.units)
    amounts = {
        "a unit in gradient equivalents": made.gradient_equivalents,
        **{f"{name} passes of a unit": getattr(unit.passes, name) for name in PASSES},
    }
    for name, once in amounts.items():
        table.add_row(name, amount(once), f"{made.units:,}", amount(made.units * once))
    table.add_row(
        "rows of a unit", f"{unit.rows:,}", f"{made.units:,}", f"{made.units * unit.rows:,}"
    )
    table.add_row("peak memory of the process", "", "", describe_bytes(made.peak_bytes))
    for suffix, size in made.disk.items():
        table.add_row(f"results as {suffix}", "", "", describe_bytes(size))
    return table


def amount(value: float) -> str:
    """A number with three digits at most.

    >>> [amount(value) for value in (0.0625, 18, 1234.5, 2_345_678)]
    ['0.0625', '18', '1,230', '2,350,000']
    """
    return f"{float(f'{value:.3g}'):,.12g}"


def ranks_table(made: Plan, ranks: list[int]) -> Table:
    """What it takes on several ranks."""
    on_gpu = made.device.startswith("cuda")
    own = "a GPU" if on_gpu else "a machine"
    here = f"{made.cores} {'GPUs' if on_gpu else 'cores'}"
    table = Table(title="time with torchrun")
    for name in (
        "ranks",
        "units on the busiest rank",
        f"if every rank has {own} like this",
        f"if all share this machine's {here}",
    ):
        table.add_column(name, justify="right")
    for count in ranks:
        table.add_row(
            f"{count}",
            f"{math.ceil(made.units / count):,}",
            between(made.seconds(count)),
            between(made.seconds_here(count)),
        )
    return table


def verdict(made: Plan, ranks: list[int]) -> str:
    """One line."""
    several = [f"{duration(made.seconds(count))} on {count} ranks" for count in ranks if count > 1]
    size = describe_bytes(made.disk[".parquet"])
    line = (
        f"about {duration(made.seconds())} here"
        f"{', ' + ', '.join(several) if several else ''} with a device each "
        f"(± {MARGIN:.0%}), from the program's start to its end; "
        f"peak memory {describe_bytes(made.peak_bytes)}; {size} of results"
    )
    if any(count > made.units for count in ranks):
        line += (
            f"; there are {made.units} units: on more ranks, --shard samples spreads the samples "
            "of each"
        )
    return line
