"""How a kernel becomes an operator that a compiler sees through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cachekit_kernels._choice import INTERPRETED

ELEMENTS, WARPS = 2048, 8
"""Of a program that looks at each element by itself. A heuristic: 8 elements a thread are one load of 16 bytes of
bfloat16, two of float32, from every tensor. All kernels have as many warps."""

PLAIN = (Tensor, torch.nn.Parameter)

CUTS_OFF = tl.constexpr(INTERPRETED)
"""The interpreter cuts the low bits of a bfloat16 off where a GPU rounds."""


def operator(name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()) -> Callable[..., Any]:
    """Register a function that launches kernels as `torch.ops.cachekit.<name>`.

    The operator is there for those who trace. Where nobody does, the function runs as it is: the way through the
    dispatcher takes time of the host, at every site.

    Args:
        name: of the operator.
        fake: the same function without the work: empty results of the right shape, dtype and device.
        mutates: names of the arguments that it writes to.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
        made: Any = make(f"cachekit::{name}", function, mutates_args=mutates)
        made.register_fake(fake)

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            if torch.compiler.is_compiling() or _looked_at(args):
                return made(*args)
            token = _DIRECT.set(True)
            try:
                return function(*args)
            finally:
                _DIRECT.reset(token)

        return run

    return register


_DIRECT: ContextVar[bool] = ContextVar("direct", default=False)


def _looked_at(args: tuple) -> bool:
    """Whether somebody sees what operators are called: a mode, a transform, a tensor that is none of torch's own."""
    if _get_current_dispatch_mode() is not None or peek_interpreter_stack() is not None:
        return True
    leaves = chain.from_iterable(arg if isinstance(arg, list) else (arg,) for arg in args)
    return any(isinstance(leaf, Tensor) and type(leaf) not in PLAIN for leaf in leaves)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on tensors and whole numbers, in a way that traces where somebody does."""
    with _on(next(arg for arg in args if isinstance(arg, Tensor)).device):
        run = kernel if INTERPRETED or _DIRECT.get() else torch.library.wrap_triton(kernel)
        run[grid](*args, **constants, num_warps=WARPS)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    if device.type != "cuda" or not torch.cuda.is_initialized() or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def launch_each(kernel: Any, size: int, *args: Any, **constants: Any) -> None:
    """Run a kernel over as many elements, a block of them a program; its last plain argument is their number."""
    if size:
        launch(kernel, (cdiv(size, ELEMENTS),), *args, size, **constants, BLOCK=ELEMENTS)


def cdiv(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)


@triton.jit
def loaded(pointer, at, kept):
    """As float32, and 0 where there is nothing."""
    return tl.load(pointer + at, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def rounded(value, pointer):
    """In the type that the pointer points to, rounded to the nearest."""
    kind = pointer.dtype.element_ty
    if CUTS_OFF and kind == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(kind)
