"""`cachekit demo`."""

from __future__ import annotations

import sys

import typer


def demo(context: typer.Context) -> None:
    """Sample digits with and without every method; print a table and write a report. Same as `make demo`."""
    try:
        from cachekit.demo.__main__ import main
    except ModuleNotFoundError as error:
        sys.exit(f"The demo needs {error.name}: pip install 'cachekit[demo]'")
    main(context.args, prog="cachekit demo")
