"""What a decider is: two pure functions that say when to compute."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from cachekit.asking import BEYOND, ask, check_same_form, check_state, check_unwritten, shown, versions
from cachekit.errors import ArgumentError, ArgumentTypeError

Number: TypeAlias = Any
"""A Python number, or a 0-d tensor on the CPU; deciders accept both alike, by operators that both have."""


class Sums(NamedTuple):
    """A signal as a fraction that is not divided yet.

    Sums of several shards add up before the division, so a sharded run decides as an unsharded one does.
    """

    numerator: Number  # [], e.g. sum |h - h_ref|
    denominator: Number  # [], e.g. sum |h_ref|


class Moment(NamedTuple):
    """What a decider may look at: where in the trajectory we are, and the signal measured there."""

    step: Number  # [] int, 0-based
    timestep: Number  # [] float, the value given to `init` (0..1000 scale by convention)
    steps: Number  # [] int, length T of the trajectory
    signal: Sums  # sums, (nan, nan) where a policy measures no signal


class Decider(NamedTuple):
    """When to compute.

    A decider is pure and knows nothing of models. Its state is a pytree of CPU tensors built by `init` and
    changed by `update`; `decide` only looks. The verdict that `update` is told may differ from the one `decide`
    gave, because deciders are wrapped by others: a decider that was overruled must hear of it.

    Attributes:
        name: for tables and error messages.
        init: `init(timesteps) -> state`, from a 1-D float64 tensor of T timesteps.
        decide: `decide(state, moment) -> bool`, True to compute. On Python numbers and 0-d tensors alike.
        update: `update(state, moment, computed) -> state`, after the verdict.
        static: whether the verdict depends on (step, timesteps, configuration) alone. A static decider is
            resolved into a plan before the loop. One that does not say so looks at a signal.

    Example:
        >>> import cachekit as ck
        >>> every_other = ck.deciders.Decider(
        ...     name="every other step",
        ...     init=lambda timesteps: (),
        ...     decide=lambda state, now: now.step % 2 == 0,
        ...     update=lambda state, now, computed: state,
        ...     static=True,
        ... )
        >>> ck.deciders.plan(every_other, 4)
        (True, False, True, False)
    """

    name: str
    init: Callable[[Tensor], Any]
    decide: Callable[[Any, Moment], Any]
    update: Callable[[Any, Moment, Any], Any]
    static: bool = False


def trajectory(timesteps: int | Sequence[float] | Tensor) -> Tensor:
    """A 1-D float64 CPU tensor of T timesteps from what users give; NaN where only their count is known."""
    if isinstance(timesteps, (bool, str, bytes)) or not isinstance(timesteps, (int, Sequence, Tensor)):
        raise ArgumentTypeError(
            f"`timesteps` must be an int, a sequence of numbers or a 1-D tensor, got {type(timesteps).__name__}. "
            "Pass the scheduler's timesteps, or only their number."
        )
    if isinstance(timesteps, int):
        if timesteps < 1:
            raise ArgumentError(f"`timesteps` must be at least 1, got {timesteps}. Pass the number of steps.")
        return torch.full((timesteps,), math.nan, dtype=torch.float64, device="cpu")
    try:
        values = doubles(timesteps)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"`timesteps` must hold numbers, got {timesteps!r}: {error}. Pass the scheduler's timesteps, or only their "
            "number."
        ) from error
    if values.ndim != 1 or values.numel() == 0:
        raise ArgumentError(
            f"`timesteps` must be 1-D with at least one step, got shape {tuple(values.shape)}. "
            "Pass the whole trajectory, e.g. scheduler.timesteps."
        )
    return values


def plan(decider: Decider, timesteps: int | Sequence[float] | Tensor) -> tuple[bool, ...]:
    """The verdicts of a static decider over a trajectory, one bool a step, True to compute.

    Step 0 computes whatever the decider says: nothing is cached yet.

    Raises:
        ArgumentError, ArgumentTypeError: it is no static decider, or looks at the signal all the same, or fails.
    """
    if not isinstance(decider, Decider):
        raise ArgumentTypeError(f"`decider` must be a Decider, got {decider!r}. Use a factory of cachekit.deciders.")
    if not decider.static:
        raise ArgumentError(f"`decider` {decider.name!r} looks at a signal, so it has no plan. Run it.")
    times = trajectory(timesteps)
    steps, unseen = len(times), _Unseen(math.nan, math.nan)
    unseen.of = decider.name
    state, verdicts = ask("decider", decider.name, "init", decider.init, times), []
    for step, timestep in enumerate(times.tolist()):
        now = Moment(step, timestep, steps, unseen)
        computed = step == 0 or decided(decider, state, now)
        state = ask("decider", decider.name, "update", decider.update, state, now, computed)
        verdicts.append(computed)
    return tuple(verdicts)


class _Unseen(Sums):
    """The signal of a plan, which nobody may look at."""

    of: str  # name of the decider that is asked

    def __getattribute__(self, name: str) -> Any:
        if name in Sums._fields:
            raise ArgumentError(
                f"`decider` {self.of!r} says static=True and looks at `signal.{name}`, which it is asked before. Say "
                "static=False, and use it with front=1 and a signal."
            )
        return super().__getattribute__(name)

    def __iter__(self) -> Any:
        return iter((self.numerator, self.denominator))

    def __getitem__(self, index: Any) -> Any:
        return (self.numerator, self.denominator)[index]


def decided(decider: Decider, state: Any, now: Moment) -> bool:
    """What a decider says, on the host."""
    verdict = ask("decider", decider.name, "decide", decider.decide, state, now)
    if isinstance(verdict, bool):
        return verdict
    if getattr(verdict, "ndim", None) != 0 or not str(getattr(verdict, "dtype", "")).endswith("bool"):
        raise ArgumentTypeError(
            f"`decider` {decider.name!r}: `decide` returns {shown(verdict)}. Return a bool or a 0-d tensor of bool, "
            "True to compute."
        )
    return bool(verdict)


def begin(decider: Decider, times: Tensor) -> Any:
    """The state of a decider that looks at a signal before step 0, after it was tried on three signals.

    Args:
        times: [T] float64.

    Raises:
        ArgumentError, ArgumentTypeError: it does not keep to what a decider is, e.g. skips on NaN.
    """
    name, at = decider.name, min(1, len(times) - 1)
    state = ask("decider", name, "init", decider.init, times)
    check_state("decider", name, state)
    written = versions((state, times))
    for sums in (Sums(1.0, 1.0), Sums(1.0, 0.0), Sums(math.nan, math.nan)):
        now = Moment(at, float(times[at]), len(times), sums)
        verdict = decided(decider, state, now)
        check_unwritten("decider", name, "decide", (state, times), written)
        if math.isnan(sums.numerator) and not verdict:
            raise ArgumentError(
                f"`decider` {name!r} skips a step whose signal is NaN. Doubt computes: a comparison with NaN is false, "
                "so write (signal < threshold) == False for signal >= threshold."
            )
        for computed in (True, False):
            after = ask("decider", name, "update", decider.update, state, now, computed)
            check_unwritten("decider", name, "update", (state, times), written)
            check_same_form("decider", name, "update", state, after)
    return state


def needs_numbers(decider: Decider, state: Any) -> str | None:
    """Why a decider can be in no graph: it branches on what is a tensor there. None if it does not.

    Args:
        state: before step 0.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = [torch.full((), value, dtype=torch.float64) for value in (math.nan, 1.0, 1.0)]
        step, steps = (torch.full((), value, dtype=torch.int64) for value in (1, 2))
        now = Moment(step, made[0], steps, Sums(*made[1:]))
        inside = pytree.tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, state)
        try:
            verdict = decider.decide(inside, now)
            decider.update(inside, now, torch.as_tensor(verdict))
        except BEYOND:
            return (
                f"`decider` {decider.name!r} asks in Python for the value of a number (`if`, `and`, `not`, `float`), "
                "and inside a graph it is a tensor without one. Use `|`, `&`, `== False` and torch.where; step(...) "
                "and step.compile() take it as it is."
            )
        except Exception:  # what fake tensors cannot do is for the compiler to say
            return None
    return None


def doubles(values: Sequence[float] | Tensor) -> Tensor:
    """Numbers as a float64 CPU tensor of its own; Python floats do not pass through float32 on the way."""
    if isinstance(values, Tensor) and values.is_complex():
        raise TypeError("complex numbers have no order")
    dtype = None if isinstance(values, Tensor) else torch.float64
    return torch.as_tensor(values, dtype=dtype).detach().to(device="cpu", dtype=torch.float64, copy=True)


def check_number(name: str, value: Any) -> None:
    """Refuse what is no Python number, with the fix."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(f"`{name}` must be a number, got {value!r}. Pass a Python float or int.")


def ratio(sums: Sums) -> Number:
    """`numerator / denominator` without an exception: x / 0 is inf, 0 / 0 is NaN, as tensors have it."""
    numerator, denominator = sums
    if isinstance(numerator, Tensor) or isinstance(denominator, Tensor) or denominator != 0:
        return numerator / denominator
    return math.nan if numerator == 0 or math.isnan(numerator) else math.inf


def where(condition: Number, yes: Number, no: Number) -> Any:
    """`yes if condition else no`, inside a graph too."""
    if isinstance(condition, Tensor):
        # A Python operand takes the type of the tensor one, so that a state never changes its dtype.
        like = yes if isinstance(yes, Tensor) else no
        dtype = like.dtype if isinstance(like, Tensor) else None
        return torch.where(condition, torch.as_tensor(yes, dtype=dtype), torch.as_tensor(no, dtype=dtype))
    return yes if condition else no


def take(values: Tensor, index: Number) -> Number:
    """`values[index]`, read so that a compiled graph does not specialise on the index."""
    if isinstance(index, Tensor):
        return values.index_select(0, index.reshape(1)).squeeze(0)
    return values[index].item()
