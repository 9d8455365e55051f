#!/usr/bin/env bash
# Surprise: running diffusers' QwenImageTransformer2DModel once under torch's
# FakeTensorMode, only to learn shapes, spoils the model: the next real forward of the
# same picture size raises "Tensor must have a last dimension of size 2", while every
# other size works. No parameter or buffer is fake afterwards. The rotary table is kept
# by functools.lru_cache, with the module and the size for a key, and the cache hands
# the fake table to the real run. diffusers leaves the cache out while exporting or
# compiling but not under a fake mode, and its wrapper hides cache_clear().
# Seen:   diffusers 0.42.1 with torch 2.13.0 and 2.15.0.
# Matters: tools that plan memory, count operators or shard a model run it with fake
#   tensors first and for real afterwards.
# Living with it: look at a deep copy of the model; or run it for real first, which
#   fills the cache for that size; or build the pos_embed module anew afterwards.
# Run: TORCH=2.15.0 ./qwen-rope-keeps-fake.sh chooses another release of torch.
set -euo pipefail
TORCH=${TORCH:-2.13.0}
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==$TORCH" numpy==2.2.6 diffusers==0.42.1
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

cat >"$work/see.py" <<'EOF'
import copy
import logging

import diffusers
import torch
from diffusers import QwenImageTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

print("torch", torch.__version__, "diffusers", diffusers.__version__)
torch.set_grad_enabled(False)
torch.manual_seed(0)
logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it logs the error too


def build():
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def forward(model, size):
    return model(
        hidden_states=torch.ones(1, size * size, 16),
        encoder_hidden_states=torch.ones(1, 8, 16),
        encoder_hidden_states_mask=torch.ones(1, 8, dtype=torch.long),
        timestep=torch.tensor([0.5]),
        img_shapes=[(1, size, size)],
        return_dict=False,
    )[0]


def only_shapes(model, size):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(forward(model, size).shape)


def outcome(model, size):
    try:
        return "works" if type(forward(model, size)) is torch.Tensor else "gives a fake tensor"
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"


model = build()
print("shape found with fake tensors:", only_shapes(model, 4))
tensors = [*model.parameters(), *model.buffers()]
print("fake parameters and buffers afterwards:", sum(isinstance(t, FakeTensor) for t in tensors))
seen = {
    "a real run of the same size": outcome(model, 4),
    "a real run of another size": outcome(model, 2),
    "a deep copy, same size": outcome(copy.deepcopy(model), 4),
}
warm = build()
forward(warm, 4)
only_shapes(warm, 4)
seen["real before fake, same size"] = outcome(warm, 4)
for what, result in seen.items():
    print(f"{what}: {result} (expected: works)")
still = seen.pop("a real run of the same size") != "works" and set(seen.values()) == {"works"}
raise SystemExit(0 if still else 1)
EOF
"$work/venv/bin/python" -W ignore "$work/see.py"
echo "The surprise is still there."
