"""A process that has imported what tests need, and runs tests in copies of itself: `python warmed.py`.

It reads lines of JSON, {"folder": ..., "laws": [...]}, and answers each with one, {"code": ..., "output": ...}. The
package under test is imported by the copies alone, so that each may have another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile

import diffusers  # noqa: F401  (what takes long to import, of other packages alone)
import einops  # noqa: F401
import hypothesis  # noqa: F401
import pytest
import torch._dynamo
import torch._inductor.config
import torch._subclasses.fake_tensor

QUIET = ["-q", "-x", "-c", os.devnull, "-p", "no:cacheprovider"]


def run(folder: str, laws: list[str]) -> tuple[int, str]:
    """Run tests of a folder in a copy of this process: pytest's exit status, and what it said."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            code = 70
            try:
                os.chdir(folder)
                sys.path.insert(0, folder)
                for number in (1, 2):
                    os.dup2(output.fileno(), number)
                with contextlib.suppress(SystemExit):
                    code = int(pytest.main([*QUIET, "--rootdir", folder, *laws]))
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


if __name__ == "__main__":
    torch.set_num_threads(1)  # a copy of a process has none but its first
    for line in sys.stdin:
        code, said = run(**json.loads(line))
        print(json.dumps({"code": code, "output": said}), flush=True)
