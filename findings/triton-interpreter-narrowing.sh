#!/usr/bin/env bash
# Surprise: under TRITON_INTERPRET=1 a cast from float32 to a narrower type is not
# the cast of the compiled kernel:
#   - to bfloat16 it cuts the low bits off (towards zero) where the compiled kernel
#     rounds to nearest, though fp_downcast_rounding="rtne" is asked for by name;
#   - to float8e4nv 500.0 becomes 256.0 and 464.0 becomes NaN, where the compiled
#     kernel saturates at 448.0; small numbers that have a subnormal form become 0.
# float16 is right.
# Seen:   triton 3.7.1, 3.8.0, 3.9.0. What the compiled kernel does is read from the
#   PTX that the same release writes for a GPU (no GPU is needed for that).
# Matters: tests of kernels in the interpreter need a tolerance of a whole bfloat16
#   step, and errors all lie on one side, so that sums drift; tests of scaled float8
#   see NaN or half the value for a scale that is right on the GPU.
# Living with it: let kernels under test store float32 and let torch do the cast;
#   clamp to +-448 before a cast to float8e4nv.
# Run: TRITON=3.8.0 ./triton-interpreter-narrowing.sh chooses another release.
set -euo pipefail
TRITON=${TRITON:-3.9.0}
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
"$work/venv/bin/pip" install --quiet "triton==$TRITON"
export OMP_NUM_THREADS=1 TRITON_CACHE_DIR="$work/triton"

cat >"$work/see.py" <<'EOF'
import os
import re

import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(source + i)
    tl.store(out + i, x.to(out.dtype.element_ty, fp_downcast_rounding="rtne"))


if os.environ["TRITON_INTERPRET"] == "0":
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    print("torch", torch.__version__, "triton", triton.__version__)
    for name, wanted in (("bf16", "cvt.rn.bf16"), ("fp8e4nv", "cvt.rn.satfinite.e4m3x2")):
        source = ASTSource(cast, {"source": "*fp32", "out": "*" + name, "N": "constexpr"}, {(2,): 128})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        found = sorted(set(re.findall(r"cvt\.r[.\w]*", ptx)))
        print(f"compiled, to {name}: {found}")
        assert found and all(op.startswith(wanted) for op in found)
    raise SystemExit

x = torch.tensor([1.0, 1.00390625, 1.005859375, 1.0078125, 0.001, 0.005, 464.0, 500.0])
surprises = {
    torch.float16: x.to(torch.float16).tolist(),
    torch.bfloat16: [1.0, 1.0, 1.0, 1.0078125, 0.00099945068359375, 0.0049743652343750, 464.0, 500.0],
    torch.float8_e4m3fn: [1.0, 1.0, 1.0, 1.0, 0.0, 0.00390625, float("nan"), 256.0],
}
still = True
for dtype, surprise in surprises.items():
    out = torch.zeros(8, dtype=dtype)
    cast[(1,)](x, out, 8)
    seen = out.float()
    print(f"interpreted, to {dtype}: {seen.tolist()}")
    print(f"    expected (as torch rounds): {x.clamp(-448, 448).to(dtype).float().tolist() if dtype.itemsize == 1 else x.to(dtype).float().tolist()}")
    still &= torch.equal(seen.nan_to_num(-1), torch.tensor(surprise).nan_to_num(-1))
raise SystemExit(0 if still else 1)
EOF
for interpret in 0 1; do
    TRITON_INTERPRET=$interpret "$work/venv/bin/python" -W ignore "$work/see.py"
done
echo "The surprise is still there."
