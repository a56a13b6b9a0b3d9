"""The command ``ngeval``: the list of its commands, each a function of a module of `ngeval.cli`.

Those modules import what declares their options. What a command runs (torch, pandas, matplotlib,
…) it imports when it is called, so that help, lists and typing errors are answered at once.
"""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

import ngeval
from ngeval.cli import console
from ngeval.cli.compare import compare
from ngeval.cli.demo import demo
from ngeval.cli.grade import gamma, imbalance, layers, sweep
from ngeval.cli.listing import methods, plot, report, tasks
from ngeval.cli.train import train
from ngeval.cli.verify import verify

app = typer.Typer(
    cls=console.Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="How close is the update an optimizer makes to the exact natural gradient?",
    epilog="Start with [bold]ngeval demo[/bold]. Every command has --help with examples.",
)

for command in (demo, train, gamma, sweep, compare, layers, imbalance):
    app.command()(command)
for command in (verify, plot, report, tasks, methods):
    app.command()(command)


def main() -> None:
    """Entry point of the command ``ngeval``."""
    os.environ["MPLBACKEND"] = "Agg"  # figures go into files, also where there is no display
    signal.signal(signal.SIGTERM, console.terminate)
    app()


def _print_version(value: bool) -> None:
    if value:
        print(f"ngeval {ngeval.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Options before the command."""
