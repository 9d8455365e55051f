"""What a forecaster is: three pure functions that stand in for a computed value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cachekit.asking import BEYOND, ask, check_same_form, check_state, form, shown
from cachekit.errors import ArgumentError, ArgumentTypeError


class Clock(NamedTuple):
    """Where in the trajectory a forecaster is asked: 0-d tensors on the device of the values."""

    step: Tensor  # [] float32, 0-based
    steps: Tensor  # [] float32, length of the trajectory


class Forecaster(NamedTuple):
    """What to return instead of computing.

    Attributes:
        name: for tables and error messages.
        init: `init(value) -> state`; only the shape, dtype and device of `value` count. Nothing is known yet.
        update: `update(state, value, now) -> state`, after `value` was computed.
        predict: `predict(state, now) -> value`, with the shape and dtype of the values seen.
        timed: whether `now` is looked at. It is a `Clock` then, and None for a forecaster that says it does not look.
        overwrite: `update` for a state that was given away: what is as large as the value is written over what the
            state held. None copies what `update` returns.
        memory: how many of the last computed values a forecast looks at, for one that is a fixed linear combination of
            them; None for one that is not, or that looks at all of them.
        weights: `weights(nodes, step, steps)`: the factors [..., m] of the values computed at `nodes` [..., m],
            ascending, in the forecast for `step` [...], all float64. `nodes` are all so far, or the last `memory` of
            them, or fewer where fewer have been computed. None for a forecaster that is not linear.
        repaid: factors as `weights` gives them, of what is added for one step alone, the first after a computed one, to
            make up for what the forecasts of the gap before that one were off. The forecast is the sum of both. None
            for a forecaster that does not look back.

    A leaf of the state either has the shape of the value, so that its first dimension is the batch wherever the value's
    is, or is a few numbers about the steps, the same for the whole batch.

    Example:
        >>> import torch, cachekit as ck
        >>> f = ck.forecasters.newton(order=1)
        >>> s = f.init(torch.zeros(1))
        >>> for step in (0, 2):
        ...     now = ck.forecasters.Clock(step=torch.tensor(float(step)), steps=torch.tensor(6.0))
        ...     s = f.update(s, torch.tensor([10.0 + step]), now)
        >>> f.predict(s, now._replace(step=torch.tensor(5.0)))
        tensor([15.])
    """

    name: str
    init: Callable[[Tensor], Any]
    update: Callable[[Any, Tensor, Any], Any]
    predict: Callable[[Any, Any], Tensor]
    timed: bool = True
    overwrite: Callable[[Any, Tensor, Any], Any] | None = None
    memory: int | None = None
    weights: Callable[[Tensor, Tensor, int], Tensor] | None = None
    repaid: Callable[[Tensor, Tensor, int], Tensor] | None = None


def check_forecaster(forecaster: Forecaster, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Try a forecaster on values of this kind. Nothing is computed: forms alone count.

    Raises:
        ArgumentError, ArgumentTypeError: it does not keep to what a forecaster is.
    """
    name = forecaster.name
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            value = torch.empty(shape, dtype=dtype, device=device)
            now: Any = None
            if forecaster.timed:
                now = Clock(*(torch.empty((), dtype=torch.float32, device=device) for _ in range(2)))
            state = ask("forecaster", name, "init", forecaster.init, value)
            check_state("forecaster", name, state)
            for _ in range(2):
                after = _timed(forecaster, "update", now, state, value, now)
                check_same_form("forecaster", name, "update", state, after)
                state = after
            found = _timed(forecaster, "predict", now, state, now)
            if form(found) != form(value):
                raise ArgumentTypeError(
                    f"`forecaster` {name!r}: `predict` returns {shown(found)}, and the values it stands for are "
                    f"{shown(value)}. Return one tensor of their shape and dtype, e.g. with .to(value.dtype)."
                )
    except BEYOND:  # it reads a number, or calls what has no fake: the first real step tells
        return


def _timed(forecaster: Forecaster, function: str, now: Clock | None, *arguments: Any) -> Any:
    try:
        return ask("forecaster", forecaster.name, function, getattr(forecaster, function), *arguments)
    except ArgumentError as error:
        if now is None and isinstance(error.__cause__, (AttributeError, TypeError)) and "None" in str(error.__cause__):
            raise ArgumentError(
                f"`forecaster` {forecaster.name!r}: `{function}` looks at the clock, which is None where a forecaster "
                "says timed=False. Say timed=True."
            ) from error.__cause__
        raise


def check_order(order: int, dtype: torch.dtype | None) -> None:
    """Refuse what is no order or no storage type, with the fix."""
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ArgumentError(f"`order` must be an int >= 0, got {order!r}. Use 0 to hold the last value.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentTypeError(f"`dtype` must be a floating point torch.dtype or None, got {dtype!r}.")
