"""The command line: `cachekit demo`, `explain`, `coverage`, `bench`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. It needs the extra `cli`."""
    try:
        from cachekit.cli.app import app

        app()  # a command loads diffusers, and more, when it runs
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("typer", "rich", "tqdm", "diffusers"):
            raise
        sys.exit(f"The command line needs {library}: pip install 'cachekit[cli]'")
