#!/usr/bin/env bash
# Surprise: Module.compile() on one of PyTorch's own layers (nn.Linear,
# nn.Sequential, nn.MultiheadAttention, nn.TransformerEncoderLayer) compiles nothing.
# The call is accepted, the layer answers, and its backend is never asked. The same
# layer under torch.compile(layer) is compiled, and so is a class of one's own, of the
# same code, under .compile().
# Seen:   torch 2.11.0, 2.13.0; gone in 2.14.1 and 2.15.0.
# Matters: "compile the blocks in place" over a model built of nn.Sequential or
#   nn.TransformerEncoderLayer costs nothing and gains nothing, and no log says so.
# Living with it: torch.compile(layer), or compile the module around it; count the
#   graphs (torch._dynamo.utils.counters) before believing a timing.
# Run: TORCH=2.15.0 ./module-compile-own-layers.sh chooses another release.
set -euo pipefail
TORCH=${TORCH:-2.13.0}
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==$TORCH" numpy==2.2.6
export OMP_NUM_THREADS=1

"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter


class Own(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


def graphs(module, arguments, *, in_place):
    torch._dynamo.reset()
    counter = CompileCounter()
    if in_place:
        module.compile(backend=counter)
    else:
        module = torch.compile(module, backend=counter)
    with torch.no_grad():
        module(*arguments)
    return counter.frame_count


print("torch", torch.__version__)
x = torch.ones(2, 3, 8)
layers = {
    "nn.Linear": (lambda: nn.Linear(8, 8), (x,)),
    "nn.Sequential": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), (x,)),
    "nn.MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x)),
    "nn.TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (x,)),
    "a class of one's own": (lambda: Own(nn.Linear(8, 8), nn.GELU()), (x,)),
}
still = True
for name, (make, arguments) in layers.items():
    counts = [graphs(make().eval(), arguments, in_place=in_place) for in_place in (True, False)]
    print(f"{name}: {counts[0]} graphs after .compile() (expected 1), {counts[1]} after torch.compile")
    still &= counts == ([1, 1] if name.startswith("a class") else [0, 1])
raise SystemExit(0 if still else 1)
EOF
echo "The surprise is still there."
