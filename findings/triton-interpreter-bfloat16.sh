#!/usr/bin/env bash
# Surprise: under TRITON_INTERPRET=1 Triton keeps bfloat16 as 16-bit integers and
# then computes with those integers: x + y, x * y, x < y and tl.dot give numbers
# that have nothing to do with the values, without an error. Up to 3.8 tl.maximum,
# tl.minimum and tl.clamp were right; from 3.9 on they compare the integers too, so
# that the larger of two negative numbers is the smaller one.
# float16 and even float8 inputs of tl.dot are right, which makes it look like a
# fault of the kernel.
# Seen:   triton 3.7.1, 3.8.0, 3.9.0 (with torch 2.13.0, 2.14.1, 2.15.0).
# Matters: the interpreter is how kernels are tested where there is no GPU, and
#   bfloat16 is the type that diffusion models run in. Compiled for a GPU the same
#   kernel is right. (The manual lists bfloat16 as not supported; the interpreter
#   itself says nothing.)
# Living with it: cast to tl.float32 right after the load, in every kernel that is
#   to be tested this way, and see triton-interpreter-narrowing.sh for the way back.
# Run: TRITON=3.8.0 ./triton-interpreter-bfloat16.sh chooses another release.
set -euo pipefail
TRITON=${TRITON:-3.9.0}
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
"$work/venv/bin/pip" install --quiet "triton==$TRITON"
export OMP_NUM_THREADS=1 TRITON_INTERPRET=1 TRITON_CACHE_DIR="$work/triton"

cat >"$work/see.py" <<'EOF'
import torch
import triton
import triton.language as tl

print("torch", torch.__version__, "triton", triton.__version__)


@triton.jit
def kernel(a, b, out, WHAT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(a + i)
    y = tl.load(b + i)
    if WHAT == "add":
        z = x + y
    elif WHAT == "multiply":
        z = x * y
    elif WHAT == "less":
        z = tl.where(x < y, x, y)
    elif WHAT == "maximum":
        z = tl.maximum(x, y)
    elif WHAT == "add float32":
        z = x.to(tl.float32) + y.to(tl.float32)
    tl.store(out + i, z.to(tl.float32))


@triton.jit
def matmul(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


x = torch.tensor([-1.5, -3.0, 0.5, 2.0])
y = torch.tensor([-0.25, -1.0, 0.25, -4.0])
right = {"add": x + y, "multiply": x * y, "less": torch.minimum(x, y), "maximum": torch.maximum(x, y), "add float32": x + y}


def run(what, dtype):
    out = torch.zeros(4)
    kernel[(1,)](x.to(dtype), y.to(dtype), out, what, 4)
    return out


same = {}
for what, want in right.items():
    half, brain = run(what, torch.float16), run(what, torch.bfloat16)
    same[what] = torch.equal(brain, want)
    print(f"{what}: expected {want.tolist()}, bfloat16 {brain.tolist()}, float16 {half.tolist()}")
    assert torch.equal(half, want)

a = torch.arange(256.0).reshape(16, 16) % 7 - 3
for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
    out = torch.zeros(16, 16)
    matmul[(1,)](a.to(dtype), a.to(dtype), out, 16)
    same[dtype] = torch.equal(out, a @ a)
    print("tl.dot", dtype, "right" if same[dtype] else f"wrong: {out[0, :3].tolist()}, expected {(a @ a)[0, :3].tolist()}")

release = tuple(int(n) for n in triton.__version__.split(".")[:2])
surprise = {
    "add": False,
    "multiply": False,
    "less": False,
    "maximum": release < (3, 9),
    "add float32": True,
    torch.float16: True,
    torch.bfloat16: False,
    torch.float8_e4m3fn: True,
}
changed = [what for what in surprise if surprise[what] != same[what]]
print("changed:", changed or "nothing")
raise SystemExit(1 if changed else 0)
EOF
"$work/venv/bin/python" -W ignore "$work/see.py"
echo "The surprise is still there."
