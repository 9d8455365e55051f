"""A policy that leaves nothing out and writes everything down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cachekit import deciders
from cachekit.errors import ArgumentError
from cachekit.forecasters import Clock, Forecaster
from cachekit.policy import RECORDED, Policy

WHOLE = 2**20
"""Values of at most so many numbers are kept as they are."""
SKETCH = 65_521
"""How many numbers are kept of larger ones: a prime, so that no stride of a tensor divides it."""


class RecordState(NamedTuple):
    """What is written down of one tensor of a site."""

    last: Tensor  # [...], as last computed
    rows: Tensor  # [T, n], every value, flat; or its sketch, float32
    sample: Tensor  # [T, m] numbers of every value, where rows is a sketch; else [T, 0]
    norms: Tensor  # [T, tokens] float32, of the last dimension; [T, 0] for a stream that is not the denoised one


torch.serialization.add_safe_globals([RecordState])


def recording(sites: Sequence[str] = RECORDED, *, sketch: int | None = None) -> Policy:
    """Compute every step and write down what the caches of this library would look at.

    Read the state with `cachekit.Trace.from_state` after the last step. A compiled step records as well.

    Args:
        sites: any of "output", what the model returns; "chain", the residual of every chain of blocks; "probe", that
            of the first block of the leading chain, which FirstBlockCache decides by.
        sketch: how many numbers of a value to keep. None keeps values of up to 2^20 numbers whole, and 65521 numbers
            of larger ones. Of a value that is not kept whole there is a random projection, from which the norm of any
            combination of steps comes out within a factor of about 1 +- 1/sqrt(2 sketch) (0.3 % for 65521), and a
            sample of its numbers for the distances that deciders look at. Best a prime.

    Raises:
        ArgumentError: `sites` names something else or nothing, or `sketch` is no int >= 1.

    Example:
        >>> import torch, cachekit as ck
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> step, x = ck.cache(Model(), ck.recording()), torch.ones(1, 2, 4)
        >>> with torch.no_grad():
        ...     state = step.init([1000.0, 750.0, 500.0, 250.0], x)
        ...     for _ in range(4):
        ...         out, state = step(state, x)
        ...         x = x - 0.25 * out
        >>> ck.Trace.from_state(state).sites
        ('output', 'chain', 'probe', 'rest')
    """
    wanted = (sites,) if isinstance(sites, str) else tuple(sites) if isinstance(sites, Iterable) else ()
    if not wanted or any(site not in RECORDED for site in wanted):
        raise ArgumentError(f"`sites` must name some of {', '.join(map(repr, RECORDED))}, got {sites!r}.")
    if sketch is not None and (isinstance(sketch, bool) or not isinstance(sketch, int) or sketch < 1):
        raise ArgumentError(f"`sketch` must be an int >= 1 or None, got {sketch!r}. It counts numbers, e.g. {SKETCH}.")
    return Policy(
        name=f"recording({', '.join(wanted)})",
        decider=deciders.always(),
        forecaster=recorder(),
        sites="output" if wanted == ("output",) else "chain",
        recorded=wanted,
        sketch=sketch,
    )


def fresh_record(value: Tensor, steps: int, sketch: int | None, *, main: bool) -> RecordState:
    """The state before step 0, for values like `value` [...].

    Args:
        value: only its shape, dtype and device count.
        steps: T.
        sketch: as for `recording`.
        main: whether it is the stream of the denoised tokens.
    """
    numbers = value.numel()
    whole = numbers <= (WHOLE if sketch is None else sketch)
    kept = numbers if whole else sketch or SKETCH
    tokens = numbers // value.shape[-1] if main and value.ndim and value.shape[-1] else 0
    return RecordState(
        last=torch.zeros_like(value),
        rows=value.new_zeros(steps, kept, dtype=value.dtype if whole else torch.float32),
        sample=value.new_zeros(steps, 0 if whole else kept),
        norms=value.new_zeros(steps, tokens, dtype=torch.float32),
    )


def recorder() -> Forecaster:
    """What writes down; its forecast is the last value."""

    def written(state: RecordState, value: Tensor, now: Clock, *, donate: bool) -> RecordState:
        at, flat = now.step.long().reshape(1), value.reshape(-1)
        kept, sample = _sketch(flat, state.rows.shape[1]), flat[:0]
        if state.sample.shape[1]:
            sample = flat[_places(flat, state.sample.shape[1])]
        norms = state.norms.new_zeros(0)
        if state.norms.shape[1]:
            norms = torch.linalg.vector_norm(value.float(), dim=-1).reshape(-1)
        write = Tensor.index_copy_ if donate else Tensor.index_copy
        return RecordState(
            last=state.last.copy_(value) if donate else value,
            rows=write(state.rows, 0, at, kept[None].to(state.rows.dtype)),
            sample=write(state.sample, 0, at, sample[None]),
            norms=write(state.norms, 0, at, norms[None]),
        )

    return Forecaster(
        name="recorder",
        init=lambda value: fresh_record(value, 1, None, main=False),
        update=lambda state, value, now: written(state, value, now, donate=False),
        predict=lambda state, now: state.last,
        timed=True,
        overwrite=lambda state, value, now: written(state, value, now, donate=True),
    )


def _sketch(flat: Tensor, kept: int) -> Tensor:
    """`kept` sums over numbers with random signs: [n] -> [kept]; the value itself where that is as long."""
    if kept == len(flat):
        return flat
    signs = 1.0 - 2.0 * (_scrambled(torch.arange(len(flat), device=flat.device)) >> 15 & 1)
    return torch.nn.functional.pad(flat.float() * signs, (0, -len(flat) % kept)).reshape(-1, kept).sum(0)


def _places(flat: Tensor, kept: int) -> Tensor:
    """Where the sample of a value stands: `kept` places, the same for every value of this size."""
    return _scrambled(torch.arange(kept, device=flat.device)) % len(flat)


def _scrambled(index: Tensor) -> Tensor:
    """[n] int64 >= 0: a fixed hash of every index, on any device and inside a graph.

    Three times a shift and a product with an odd number, as in the finaliser of MurmurHash3, kept to 31 bits so that
    nothing overflows. Two are too few: the signs of numbers a few million apart then go together, which a value that is
    the same everywhere shows.
    """
    mixed = index
    for factor in (0x45D9F3B,) * 3:
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0x7FFFFFFF
    return mixed ^ (mixed >> 16)
