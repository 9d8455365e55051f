"""What every benchmark writes beside its rows: when, of which commit, on what."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def record(device: torch.device | str, rounds: int) -> dict[str, Any]:
    """An empty record of a run on a device."""
    made: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": [],
    }
    if torch.device(device).type == "cuda":
        import triton

        made |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return made


def write(made: dict[str, Any], folder: Path, name: str, *, quiet: bool = False) -> Path:
    """Keep a record as JSON, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        print(f"\nwritten: {path}")
    return path


def commit() -> str:
    """Which commit of this repository it is, and whether something is changed since; "unknown" outside of git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
