#!/usr/bin/env bash
# Surprise: torch.compile(module) leaves a new attribute, _is_torch_compile, in the
# __dict__ of the module that was handed to it, although the compiled module is the
# object returned and is never called. The mark says "compiled" of a module that is
# not; torch._dynamo.reset() keeps it, copy.deepcopy and pickle carry it on.
# The wrapper passes on what is set on it, and torch.compile sets the mark there.
# Seen:   torch 2.13.0, 2.14.1, 2.15.0; not in 2.11.0.
# Matters: a fingerprint of a module by its attributes (is this the module that I
#   have analysed or pickled before?) changes when somebody compiles it elsewhere,
#   and code that asks the attribute takes the plain module for a compiled one.
# Living with it: leave names that start with "_is_torch" or "_torchdynamo" out of
#   fingerprints; ask isinstance(m, torch._dynamo.eval_frame.OptimizedModule).
# Run: TORCH=2.15.0 ./compile-marks-module.sh chooses another release.
set -euo pipefail
TORCH=${TORCH:-2.13.0}
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==$TORCH" numpy==2.2.6
export OMP_NUM_THREADS=1

"$work/venv/bin/python" -W ignore - <<'EOF'
import copy
import pickle

import torch

print("torch", torch.__version__)
module = torch.nn.Linear(2, 2)
before = set(vars(module))
torch.compile(module, backend="eager")  # the result is thrown away
torch._dynamo.reset()
still = True
for what, m in (
    ("the module itself", module),
    ("its deep copy", copy.deepcopy(module)),
    ("pickled and read again", pickle.loads(pickle.dumps(module))),
):
    new = set(vars(m)) - before
    print(f"{what}: new attributes {sorted(new)} (expected none)")
    still &= new == {"_is_torch_compile"}
raise SystemExit(0 if still else 1)
EOF
echo "The surprise is still there."
