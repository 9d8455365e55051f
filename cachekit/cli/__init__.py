"""The command line: `cachekit demo`, `explain`, `coverage`, `bench`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. It needs the extra `cli`."""
    try:
        from cachekit.cli.app import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "tqdm", "diffusers"):
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'cachekit[cli]'")
