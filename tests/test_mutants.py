"""A law that no bug breaks is no test: every mutant must fail the law that it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels" / "cachekit_kernels"
PACKAGE = TESTS.parent / "cachekit"
SUITES = (
    *("conftest.py", "dit.py", "laws.py", "traces.py", "test_deciders.py", "test_forecasters.py"),
    *("test_recording.py", "test_replaying.py", "test_planning.py", "test_choosing.py"),
)
FAILED = 1  # pytest's exit status for tests that ran and failed, unlike those that could not be run


def run_laws(folder: Path, laws: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run laws on the copy of the package in `folder`, until the first fails."""
    for name in SUITES:
        shutil.copy(TESTS / name, folder)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "HYPOTHESIS_PROFILE": "mutants",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a third of the time
    }
    # No configuration of the repository: it might put the package itself before the copy.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-c", os.devnull, "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", *laws]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def copy_package(folder: Path) -> Path:
    """A copy of the package, and of the kernels' references, in `folder`."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, folder / "cachekit_kernels", ignore=ignore)
    return Path(shutil.copytree(PACKAGE, folder / "cachekit", ignore=ignore))


def test_a_copy_without_a_mutant_passes(tmp_path):
    copy_package(tmp_path)
    done = run_laws(tmp_path, [MUTANTS[0].law, MUTANTS[-1].law])  # all of them pass where their suites run
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path):
    target = copy_package(tmp_path) / mutant.file
    source = target.read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.old!r} is not in {mutant.file} once: update the mutant."
    target.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    done = run_laws(tmp_path, [mutant.law])
    assert done.returncode == FAILED, f"{mutant.law} did not notice {mutant.new!r}:\n{done.stdout}{done.stderr}"
