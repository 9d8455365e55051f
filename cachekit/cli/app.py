"""All commands, each in a file of its own."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import cachekit
from cachekit.cli import bench, coverage, demo, explain, planning

app = typer.Typer(
    name="cachekit",
    help="Caching for diffusion transformers: look at a model, measure it, tune it on a recording.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the help is plain text: it is read in logs, too
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cachekit {cachekit.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which release this is.")
    ] = False,
) -> None:
    """What is asked of no command. The help is that of the application."""


app.command(epilog=explain.EXAMPLES)(explain.explain)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=coverage.EXAMPLES)(coverage.coverage)
app.command(epilog=planning.RECORD)(planning.record)
app.command(epilog=planning.REPLAY)(planning.replay)
app.command(epilog=planning.PLAN)(planning.plan)
app.command(epilog=planning.CHOOSE)(planning.choose)
# The demo has its own options, the same as `python -m cachekit.demo`.
OWN = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(add_help_option=False, context_settings=OWN)(demo.demo)
