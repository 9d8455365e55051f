"""The arithmetic of caching, each in one pass over memory.

Every function here has a reference in plain PyTorch, `cachekit_kernels.reference`, of the same name and arguments. On
tensors of a GPU it runs as a Triton kernel that is registered as an operator, so a compiled program sees through it;
everywhere else it *is* the reference, which `torch.compile` fuses itself. Inside a graph `residual_norm` alone stays a
kernel, so that a decision is the same to the bit whichever way a step is run: the others a compiler fuses with what is
around them.

Under `TRITON_INTERPRET=1` the kernels run on the CPU, slowly: for tests.
"""

from cachekit_kernels._choice import runs_on
from cachekit_kernels._guidance import guidance_delta
from cachekit_kernels._polynomial import newton_predict, newton_update, taylor_predict, taylor_update
from cachekit_kernels._residual import norm_ratio, residual_change, residual_norm

__all__ = [
    "guidance_delta",
    "newton_predict",
    "newton_update",
    "norm_ratio",
    "residual_change",
    "residual_norm",
    "runs_on",
    "taylor_predict",
    "taylor_update",
]
