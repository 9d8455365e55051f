"""Laws to test your own parts against: what cachekit relies on, tried on many trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachekit.asking import ask, check_same_form, form, shown
from cachekit.deciders import Decider, Moment, Sums
from cachekit.deciders._decider import begin, decided, needs_numbers, plan
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Clock, Forecaster
from cachekit.forecasters._forecaster import check_forecaster
from cachekit.policy import Policy
from cachekit.signals import check_signal
from cachekit.state import State, summary
from cachekit.structure.parts import PARTS
from cachekit.transform import cache

LENGTHS = (9, 2, 1)  # of trajectories; the longest tells most
AGAIN = 30  # times that a decider is asked before its answers on tensors are called another meaning
SHAPE = (2, 3, 4)  # of values: batch, tokens, channels
DTYPES = (torch.float32, torch.bfloat16)
DOUBTS = (Sums(math.nan, 1.0), Sums(1.0, math.nan), Sums(1.0, 0.0), Sums(0.0, 0.0), Sums(math.inf, 1.0))


def check(part: Policy | Decider | Forecaster, model: nn.Module | None = None, /, *args, seed: int = 0, **kwargs):
    """Try the laws that cachekit relies on, on a part that you wrote. It says nothing where they hold.

    A decider: its state keeps its form; it writes to nothing and says the same twice; doubt (NaN, infinity, a
    denominator of 0) computes; Python numbers and tensors give the same; compiled is eager; a static one looks at no
    signal. A forecaster: the same of its state; only the form of the value counts at `init`; `predict` keeps shape and
    dtype; a constant is forecast as the constant; `overwrite` is `update`; `weights` are those of `predict`. A policy:
    its parts, and a model under it, whose decisions and outputs are the same eager, as programs and as one graph, and
    its plan what it does.

    Args:
        part: a policy, a decider or a forecaster.
        model: to run a policy on; None for a small transformer. Patterns of names and guidance need one of yours.
        *args, **kwargs: what it is called with.
        seed: of the signals and values that are drawn.

    Raises:
        ArgumentError, ArgumentTypeError: a law does not hold, with what was seen and how to mend it.

    Example:
        >>> import cachekit as ck
        >>> forgetful = ck.deciders.Decider(
        ...     name="mine",
        ...     init=lambda timesteps: (),
        ...     decide=lambda state, now: now.signal.numerator > 0.1 * now.signal.denominator,
        ...     update=lambda state, now, computed: state,
        ... )
        >>> ck.testing.check(forgetful)
        Traceback (most recent call last):
            ...
        cachekit.errors.ArgumentError: `decider` 'mine' skips a step whose signal is NaN. Doubt computes: ...
        >>> ck.testing.check(ck.deciders.max_skips(3, ck.deciders.drift(0.1)))
    """
    draw = torch.Generator().manual_seed(seed)
    if isinstance(part, Decider):
        _check_decider(part, draw)
    elif isinstance(part, Forecaster):
        _check_forecaster(part, draw)
    elif isinstance(part, Policy):
        _check_policy(part, model, args, kwargs, draw)
    else:
        raise ArgumentTypeError(f"`part` must be a Policy, a Decider or a Forecaster, got {type(part).__name__}.")


# Deciders ----------------------------------------------------------------------------------------------------


def _check_decider(decider: Decider, draw: torch.Generator) -> None:
    name = decider.name
    for steps in LENGTHS:
        times = torch.linspace(1000, 1, steps, dtype=torch.float64)
        if decider.static:
            plan(decider, times)
            signals = [Sums(math.nan, math.nan)] * steps
        else:
            begin(decider, times)
            signals = list(_signals(steps, draw))
        told, on_tensors = (_roll(decider, times, signals, convert) for convert in (_numbers, _tensors))
        # What draws may agree with itself by chance: where the two differ, numbers are asked until that is unlikely.
        for _ in range(1 if told == on_tensors else AGAIN):
            if (now := _roll(decider, times, signals, _numbers)) != told:
                raise ArgumentError(
                    f"`decider` {name!r} does not say the same twice: {told} and {now}. It keeps something "
                    "outside of its state, e.g. a list, a counter or a random number. Put it into the state."
                )
        if told != on_tensors:
            raise ArgumentError(
                f"`decider` {name!r} decides {told} on Python numbers and {on_tensors} on 0-d tensors, which is what "
                "it sees inside a graph. Use operators that mean the same for both."
            )
        if not decider.static:
            _check_doubt(decider, times, signals)
    if decider.static:  # a plan is made on the host
        return
    times = torch.linspace(1000, 1, LENGTHS[0], dtype=torch.float64)
    if (why := needs_numbers(decider, decider.init(times))) is not None:
        raise ArgumentError(why)
    _check_compiled_decider(decider, times, list(_signals(len(times), draw)))


def _signals(steps: int, draw: torch.Generator) -> Iterator[Sums]:
    for step in range(steps):
        if step % 4 == 3:
            yield DOUBTS[step // 4 % len(DOUBTS)]
        else:
            size, share = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
            yield Sums(size * 10 ** (-3 * share), size)  # from none to a whole one


def _numbers(now: Moment) -> Moment:
    return now


def _tensors(now: Moment) -> Moment:
    """A moment as a graph shows it."""
    step, steps = (torch.tensor(value) for value in (now.step, now.steps))
    time, *sums = (torch.tensor(value, dtype=torch.float64) for value in (now.timestep, *now.signal))
    return Moment(step, time, steps, Sums(*sums))


def _roll(decider: Decider, times: Tensor, signals: list[Sums], convert: Callable[[Moment], Moment]) -> str:
    """The decisions of a trajectory, as a pattern; with tests of every state on the way."""
    state, trail = decider.init(times.clone()), ""
    for step, sums in enumerate(signals):
        now = convert(Moment(step, float(times[step]), len(signals), sums))
        before = _copied(state)
        computed = decided(decider, state, now) or step == 0
        verdict = torch.tensor(computed) if convert is _tensors else computed
        after = ask("decider", decider.name, "update", decider.update, state, now, verdict)
        _check_unchanged("decider", decider.name, before, state)
        if not decider.static or convert is _tensors:
            check_same_form("decider", decider.name, "update", state, after)
        state, trail = after, trail + ".#"[computed]
    return trail


def _check_doubt(decider: Decider, times: Tensor, signals: list[Sums]) -> None:
    """Whatever came before, a doubtful signal computes."""
    state = decider.init(times)
    for step, sums in enumerate(signals):
        now = Moment(step, float(times[step]), len(signals), sums)
        for doubt in DOUBTS:
            if not decided(decider, state, now._replace(signal=doubt)):
                raise ArgumentError(
                    f"`decider` {decider.name!r} skips step {step} at the signal {doubt.numerator} / "
                    f"{doubt.denominator}. Doubt computes: nothing to compare with, or a value that is not finite, is "
                    "no reason to skip. Divide with cachekit.deciders.ratio, and write (it < threshold) == False."
                )
        state = decider.update(state, now, step == 0 or decided(decider, state, now))


def _check_compiled_decider(decider: Decider, times: Tensor, signals: list[Sums]) -> None:
    def step(state: Any, now: Moment) -> tuple[Any, Any]:
        computed = decider.decide(state, now) | (now.step == 0)
        return computed, decider.update(state, now, computed)

    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    state = decider.init(times)
    for index, sums in enumerate(signals):
        now = _tensors(Moment(index, float(times[index]), len(signals), sums))
        wanted, after = step(state, now)
        found, same = ask("decider", decider.name, "decide, compiled", compiled, state, now)
        if bool(found) != bool(wanted) or not _equal(same, after):
            raise ArgumentError(
                f"`decider` {decider.name!r} does something else inside a graph, at step {index}: computes is "
                f"{bool(found)}, and eager {bool(wanted)}. What a graph has read once stays: nothing may change "
                "outside of its state."
            )
        state = after


# Forecasters -------------------------------------------------------------------------------------------------


def _check_forecaster(forecaster: Forecaster, draw: torch.Generator) -> None:
    name = forecaster.name
    for dtype in DTYPES:
        check_forecaster(forecaster, SHAPE, dtype, torch.device("cpu"))
        values = [torch.randn(SHAPE, generator=draw).to(dtype) for _ in range(4)]
        state = forecaster.init(values[0])
        if not _equal(state, forecaster.init(values[1])):
            raise ArgumentError(
                f"`forecaster` {name!r}: `init` looks at the value it is given, which is none yet: its shape, dtype "
                "and device count. Use e.g. torch.zeros_like(value)."
            )
        steady = forecaster.init(values[0])
        given = forecaster.init(values[0])
        for at, value in zip((0, 1, 3, 6), values, strict=True):
            now = _clock(forecaster, at)
            before = _copied((state, value))
            after = _asked(forecaster, "update", state, value, now)
            _check_unchanged("forecaster", name, before, (state, value))
            if not _equal(after, forecaster.update(state, value, now)):
                raise ArgumentError(f"`forecaster` {name!r}: `update` does not do the same twice. It keeps something.")
            kept = _copied(after)
            _asked(forecaster, "predict", after, now)
            _check_unchanged("forecaster", name, kept, after)
            steady = forecaster.update(steady, torch.full_like(value, 2.0), now)
            if forecaster.overwrite is not None:
                given = forecaster.overwrite(given, value, now)
                _check_close(forecaster, _flat(given), _flat(after), "`overwrite` gives another state than `update`")
            state = after
        ahead = _clock(forecaster, 8)
        found = _asked(forecaster, "predict", steady, ahead)
        _check_close(forecaster, found, torch.full_like(found, 2.0), "the forecast of a constant is not the constant")
        compiled = torch.compile(forecaster.predict, fullgraph=True, backend="eager")
        found = ask("forecaster", name, "predict, compiled", compiled, state, ahead)
        _check_close(forecaster, found, forecaster.predict(state, ahead), "`predict` does something else in a graph")
    if forecaster.weights is not None:
        _check_weights(forecaster, draw)


def _clock(forecaster: Forecaster, step: int) -> Clock | None:
    return Clock(torch.tensor(float(step)), torch.tensor(10.0)) if forecaster.timed else None


def _asked(forecaster: Forecaster, function: str, *arguments: Any) -> Any:
    return ask("forecaster", forecaster.name, function, getattr(forecaster, function), *arguments)


def _check_close(forecaster: Forecaster, found: Tensor, wanted: Tensor, otherwise: str) -> None:
    size = 0.05 if found.dtype == torch.bfloat16 else 1e-4
    if not torch.allclose(found.float(), wanted.float(), rtol=size, atol=size, equal_nan=True):
        off = (found.float() - wanted.float()).abs().max().item()
        raise ArgumentError(f"`forecaster` {forecaster.name!r}: {otherwise}, by {off:.3g} ({found.dtype}).")


def _check_weights(forecaster: Forecaster, draw: torch.Generator) -> None:
    """Planning reckons with `weights`: they must give what `predict` gives."""
    assert forecaster.weights is not None
    nodes, values = (0, 1, 3, 6), [torch.randn(SHAPE, generator=draw, dtype=torch.float64) for _ in range(4)]
    state = forecaster.init(values[0])
    for count, (at, value) in enumerate(zip(nodes, values, strict=True), 1):
        state = forecaster.update(state, value, _clock(forecaster, at))
        kept = slice(max(0, count - (forecaster.memory or count)), count)
        seen = torch.tensor(nodes[kept], dtype=torch.float64)
        now = torch.tensor(at + 2.0, dtype=torch.float64)
        factors = forecaster.weights(seen, now, 10)
        wanted = torch.einsum("m,m...->...", factors, torch.stack(values[kept]))
        # At the second step after a computed one, where nothing is repaid any more.
        found = forecaster.predict(state, _clock(forecaster, at + 2))
        _check_close(forecaster, found, wanted, f"`weights` after {count} values are not those of `predict`")


# Policies ----------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + (1 + torch.sin(t)) * self.attention(x, x, x, need_weights=False)[0]
        return x + 0.3 * self.feed_forward(x)


class _Small(nn.Module):
    """A transformer to run a policy on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, N, 8] -> [B, N, 8]."""
        for block in self.blocks:
            x = block(x, t)
        return x


def _check_policy(policy: Policy, model: nn.Module | None, args: tuple, kwargs: Any, draw: torch.Generator) -> None:
    for decider in policy.deciders.values():
        _check_decider(decider, draw)
    if not policy.recorded:
        _check_forecaster(policy.forecaster, draw)
    if policy.signal is not None:
        check_signal(policy.signal, SHAPE, torch.float32, torch.device("cpu"))
    if model is None:
        if policy.guidance is not None or policy.sites not in ("chain", "output", *PARTS):
            raise ArgumentError(
                f"`model` is missing: {policy.name!r} names modules, or halves of a batch, which the small model that "
                "is taken otherwise does not have. Call check(policy, model, *args) with what the model is called with."
            )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(draw.initial_seed())
            model = _Small().eval()
        args, kwargs = (torch.randn(1, 5, 8, generator=draw), torch.zeros(1)), {}
    times = torch.linspace(1000, 1, LENGTHS[0], dtype=torch.float64)
    with torch.no_grad():
        step = cache(model, policy)
        wanted = _run(step, step.init, times, args, kwargs)
        known = step.plan(times)
        if known is not None and known.computed != summary(wanted[1]).computed:
            raise ArgumentError(
                f"`policy` {policy.name!r} computes {summary(wanted[1]).computed}, and its plan says {known.computed}."
            )
        programs = step.compile(backend="eager")
        for way, call, init in (
            ("step.compile()", programs, programs.init),
            ("one graph", torch.compile(step, fullgraph=True, backend="eager"), step.init),
        ):
            found = ask("policy", policy.name, way, lambda call=call, init=init: _run(call, init, times, args, kwargs))
            if summary(found[1]).computed != summary(wanted[1]).computed or not _close(found[0], wanted[0]):
                raise ArgumentError(
                    f"`policy` {policy.name!r} does something else under {way} than in eager steps: it computes "
                    f"{summary(found[1]).computed}, and eager {summary(wanted[1]).computed}."
                )


def _run(
    call: Callable[..., Any], init: Callable[..., State], times: Tensor, args: tuple, kwargs: Any
) -> tuple[list[Tensor], State]:
    state, outputs = init(times, *args, **kwargs), []
    for step in range(len(times)):
        moved = pytree.tree_map(lambda leaf, step=step: _moved(leaf, step), (args, kwargs))
        out, state = call(state, *moved[0], **moved[1])
        outputs += [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return outputs, state


def _moved(leaf: Any, step: int) -> Any:
    return leaf + 0.05 * step if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


# Comparisons -------------------------------------------------------------------------------------------------


def _flat(tree: Any) -> Tensor:
    return torch.cat([leaf.flatten().float() for leaf in pytree.tree_leaves(tree)] or [torch.zeros(0)])


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _equal(one: Any, other: Any) -> bool:
    """To the bit, NaN where NaN is."""
    if form(one) != form(other):
        return False
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        if isinstance(a, Tensor)
        else a == b
        for a, b in pairs
    )


def _close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(ours, theirs, strict=True))


def _check_unchanged(part: str, name: str, before: Any, after: Any) -> None:
    if not _equal(before, after):
        pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
        was, now = next((a, b) for a, b in pairs if not _equal(a, b))
        raise ArgumentError(
            f"`{part}` {name!r} writes to what it is given: {shown(was)} has changed. States are values, which others "
            f"may hold, too: return a new tensor. It was {was.flatten()[:3].tolist()}, is {now.flatten()[:3].tolist()}."
        )


__all__ = ["check"]
