"""A caching method as a value: what is measured, when to compute, what to return instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cachekit.deciders import Decider, Sums
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster

SITES = ("chain", "output")


@dataclass(frozen=True)
class Policy:
    """One row of the table of methods: a signal, a decider and a forecaster on the chain of blocks.

    Attributes:
        name: of the method, for tables.
        decider: when to compute.
        forecaster: what to add to the input of the chain otherwise. It sees the chain's residual, output minus
            input, of every stream that is read after the chain.
        signal: `signal(value, reference) -> Sums`, or None to measure nothing. With `front` blocks, `value` is
            their residual on the denoised tokens and `reference` that of the last computed step, and the decider
            sees the outcome of this step. Without, `value` is the residual of a whole chain and `reference` its
            forecast, and the outcome is only logged.
        front: how many blocks of the leading chain always run, as a probe.
        sites: what is left out and forecast. "chain": the residual of every chain of blocks, the rest of the model
            runs. "output": what the model returns, and on a reuse nothing of it runs but the front blocks and what
            they need.

    Raises:
        ArgumentError, ArgumentTypeError: the parts do not fit together.

    Example:
        >>> import cachekit as ck
        >>> ck.Policy(
        ...     name="first block, quadratic forecast",
        ...     decider=ck.deciders.warmup(3, ck.deciders.drift(0.1)),
        ...     forecaster=ck.forecasters.newton(2),
        ...     signal=ck.signals.change,
        ...     front=1,
        ... ).name
        'first block, quadratic forecast'
    """

    name: str
    decider: Decider
    forecaster: Forecaster
    signal: Callable[[Tensor, Tensor], Sums] | None = None
    front: int = 0
    sites: str = "chain"

    def __post_init__(self) -> None:
        if not isinstance(self.decider, Decider):
            raise ArgumentTypeError(
                f"`decider` must be a Decider, got {type(self.decider).__name__}. Use a factory of cachekit.deciders."
            )
        if not isinstance(self.forecaster, Forecaster):
            raise ArgumentTypeError(
                f"`forecaster` must be a Forecaster, got {type(self.forecaster).__name__}. "
                "Use a factory of cachekit.forecasters, e.g. cachekit.forecasters.hold()."
            )
        if isinstance(self.front, bool) or not isinstance(self.front, int) or self.front < 0:
            raise ArgumentError(f"`front` must be an int >= 0, got {self.front!r}. It counts blocks.")
        if self.sites not in SITES:
            raise ArgumentError(f"`sites` must be one of {', '.join(map(repr, SITES))}, got {self.sites!r}.")
        if self.sites == "output" and self.signal is not None and not self.front:
            raise ArgumentError('`signal` is measured on chains; with sites="output" and front=0 give signal=None.')
        if self.front and self.signal is None:
            raise ArgumentError(
                f"`signal` is None with front={self.front}. Give a signal, e.g. cachekit.signals.change."
            )
        if not self.front and not self.decider.static:
            raise ArgumentError(
                f"`decider` {self.decider.name!r} looks at a signal, and with front=0 none is measured before the "
                "decision. Use front=1."
            )

    @property
    def probed(self) -> bool:
        """Whether the decision waits for the front blocks of this very step."""
        return self.front > 0 and not self.decider.static
