"""The command ``ngeval``: its list of commands; each is a function of `ngeval.cli`."""

from __future__ import annotations

import signal
from typing import Annotated

import matplotlib as mpl
import typer

import ngeval
from ngeval.cli import console
from ngeval.cli.compare import compare
from ngeval.cli.grade import gamma, imbalance, layers, sweep
from ngeval.cli.listing import methods, plot, tasks
from ngeval.cli.report import report
from ngeval.cli.train import demo, train
from ngeval.cli.verify import verify

app = typer.Typer(
    cls=console.Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="How close is the update an optimizer makes to the exact natural gradient?",
    epilog="Start with [bold]ngeval demo[/bold]. Every command has --help with examples.",
)

for command in (
    *(demo, train, gamma, sweep, compare, layers, imbalance),
    *(verify, plot, report, tasks, methods),
):
    app.command()(command)


def main() -> None:
    """Entry point of the command ``ngeval``."""
    mpl.use("Agg")
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
