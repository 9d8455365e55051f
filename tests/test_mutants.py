"""A law that no bug breaks is no test: every mutant must fail the law that it names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels" / "cachekit_kernels"
PACKAGE = TESTS.parent / "cachekit"
SUITES = (
    *("conftest.py", "tiers.py", "dit.py", "laws.py", "traces.py", "test_deciders.py", "test_forecasters.py"),
    *("test_recording.py", "test_replaying.py", "test_planning.py", "test_choosing.py"),
    *("test_alike.py", "test_store.py", "test_kinds.py"),
)
FAILED = 1  # pytest's exit status for tests that ran and failed, unlike those that could not be run


@pytest.fixture(scope="module")
def warmed() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported all but the package."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HYPOTHESIS_PROFILE": "mutants",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Not from the repository: what lies there might be imported in the place of the copy.
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, str(TESTS / "warmed.py")]
        with subprocess.Popen(command, env=environment, cwd=elsewhere, **pipes) as process:
            yield process
            process.stdin.close()


def run_laws(process: subprocess.Popen[str], folder: Path, laws: Sequence[str]) -> tuple[int, str]:
    """Run laws on the copy of the package in `folder`, until the first fails: pytest's exit status, and its output."""
    for name in SUITES:
        shutil.copy(TESTS / name, folder)
    process.stdin.write(json.dumps({"folder": str(folder), "laws": [*laws]}) + "\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    return answer["code"], answer["output"]


def copy_package(folder: Path) -> Path:
    """A copy of the package, and of the kernels' references, in `folder`."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, folder / "cachekit_kernels", ignore=ignore)
    return Path(shutil.copytree(PACKAGE, folder / "cachekit", ignore=ignore))


def test_a_copy_without_a_mutant_passes(warmed, tmp_path):
    copy_package(tmp_path)
    (tmp_path / "test_where.py").write_text(
        "import cachekit, cachekit_kernels\n"
        "def test_where():\n"
        "    for package in (cachekit, cachekit_kernels):\n"
        f"        assert package.__file__.startswith({str(tmp_path)!r})\n"
    )
    laws = [MUTANTS[0].law, MUTANTS[-1].law, "test_where.py"]  # all of them pass where their suites run
    code, output = run_laws(warmed, tmp_path, laws)
    assert code == 0, output


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, warmed, tmp_path: Path):
    target = copy_package(tmp_path) / mutant.file
    source = target.read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.old!r} is not in {mutant.file} once: update the mutant."
    target.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    code, output = run_laws(warmed, tmp_path, [mutant.law])
    assert code == FAILED, output
