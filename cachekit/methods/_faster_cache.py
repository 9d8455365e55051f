"""FasterCache: attention from its two last outputs, and the unconditional half of guidance from the conditional one.

Source: FasterCache, arXiv 2410.19355 (https://github.com/Vchitect/FasterCache), and the hooks of diffusers.

Departures: attention is found by what it does. The Fourier transform is linear, so what the unconditional half adds is
split into low and high frequencies once, on a full step, where the references transform on every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cachekit import deciders, forecasters
from cachekit.errors import ArgumentError
from cachekit.guidance import Guidance, Tokens
from cachekit.methods._first_block import check_semantics
from cachekit.methods._pyramid import Range, broadcast
from cachekit.policy import Policy

CFG = ("batched", "batched_cond_first", "separate", None)
LISTS = (r"(single_|)(transformer_|)blocks\..*attn.*",)
"""Where the hooks of diffusers look for self-attention."""


def faster_cache(
    attention: int = 2,
    *,
    attention_range: Range = (-1, 681),
    weight: float | str | Callable[[Any, Any], Any] = 0.5,
    uncond: int = 5,
    uncond_range: Range = (-1, 641),
    low_range: Range = (99, 901),
    high_range: Range = (-1, 301),
    alpha_low: float | None = None,
    alpha_high: float | None = None,
    layout: str | Tokens | None = None,
    cfg: str | None = "batched",
    semantics: str = "paper",
) -> Policy:
    """Compute self-attention every few steps and the unconditional half of the batch every few more.

    Needs the values of the timesteps at `init`, on the scale 0..1000. With batched guidance `init` and every step take
    the arguments of both halves, as the model does; attention is left out only where the unconditional half is.

    Args:
        attention: compute self-attention every n-th step, n >= 1. In between it is `x1 + weight * (x1 - x2)`.
        attention_range: leave it out only while `low < t < high`.
        weight: a number; "ramp" for the paper's 0 at the first step to 1 at the last; or a function of step and number
            of steps.
        uncond: run the unconditional half every n-th step, n >= 1.
        uncond_range: leave it out only while `low < t < high`.
        low_range, high_range: where the low and the high frequencies of what it adds are weighted by `alpha_low` and
            `alpha_high`; elsewhere by 1.
        alpha_low, alpha_high: None for 1.2 under "paper", 1.1 under "diffusers", where they compound over reused steps.
        layout: of what the model returns: "BCHW", "BCFHW", "BFCHW" or `cachekit.Tokens(frames, height, width)`. None
            finds it: of four or five dimensions the last two are rows and columns; of tokens a pipeline tells
            (`cachekit.diffusers`), and elsewhere they need `cachekit.Tokens`.
        cfg: "batched" for a batch [uncond, cond]; "batched_cond_first" for [cond, uncond]; "separate" for two calls a
            step, see below; None for a model without guidance (distilled): then only attention is left out.
        semantics: "paper", or "diffusers", whose hooks leave temporal attention alone, take a forecast for the value
            before the next one, and let the weights compound.

    Raises:
        ArgumentError, ArgumentTypeError: a value is out of range.

    Example:
        >>> import cachekit as ck
        >>> policy = ck.faster_cache(cfg=None, attention_range=(0, 900))
        >>> ck.deciders.plan(policy.deciders["spatial"], [950, 850, 750, 650, 550])
        (True, False, True, False, True)

        With two calls a step the state is passed from the conditional one to the unconditional one, by value:

        >>> import torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        ...     def forward(self, x, text):
        ...         return x + self.attn(x, x, x)[0] + text.mean(1, keepdim=True)
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        ...     def forward(self, x, t, text):
        ...         for block in self.blocks:
        ...             x = block(x, text)
        ...         return x * t
        >>> x, prompt, nothing = torch.randn(1, 12, 8), torch.randn(1, 5, 8), torch.zeros(1, 1, 8)
        >>> timesteps = torch.linspace(1000, 100, 10)
        >>> step = ck.cache(Model(), ck.faster_cache(cfg="separate", layout=ck.Tokens(1, 3, 4)))
        >>> with torch.no_grad():
        ...     state = step.init(timesteps, x, timesteps[0] / 1000, prompt)
        ...     for t in timesteps / 1000:
        ...         cond, state = step(state, x, t, prompt)
        ...         uncond, state = step.uncond(state, x, t, nothing)
        ...         x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
        >>> print(step.plan(timesteps))  # no attention is left out where both calls run
        5 of 10 steps computed  ####.#....
          spatial   #######.#.
          guidance  ####.#....
    """
    check_semantics(semantics)
    if cfg not in CFG:
        raise ArgumentError(f"`cfg` must be one of {', '.join(map(repr, CFG))}, got {cfg!r}.")
    theirs = semantics == "diffusers"
    decider = broadcast("attention", attention, attention_range)
    # Without guidance what is said of it is looked at all the same: a mistake is one there, too.
    alphas = tuple((1.1 if theirs else 1.2) if alpha is None else alpha for alpha in (alpha_low, alpha_high))
    for name, alpha in zip(("alpha_low", "alpha_high"), alphas, strict=True):
        deciders.check_number(name, alpha)
        if not math.isfinite(alpha):
            raise ArgumentError(f"`{name}` must be finite, got {alpha!r}. 1 adds back what was measured.")
    for name, span in (("low", low_range), ("high", high_range)):
        broadcast(name, 1, span)  # for its checks
    guidance = Guidance(
        decider=broadcast("uncond", uncond, uncond_range),
        weigh=_weights((low_range, high_range), alphas, compounding=theirs),
        layout=layout,
        cond_first=cfg == "batched_cond_first",
        separate=cfg == "separate",
    )
    shown = f"attention {attention}" + ("" if cfg is None else f", uncond {uncond}")
    return Policy(
        name=f"faster_cache({shown})",
        decider={"spatial": decider} if theirs else {"spatial": decider, "temporal": decider},
        forecaster=forecasters.two_point(weight, feedback=theirs),
        sites=LISTS if theirs else "attention",
        guidance=None if cfg is None else guidance,
    )


def _weights(ranges: Sequence[Range], alphas: Sequence[float], *, compounding: bool) -> Callable:
    """The weights of low and high frequencies at every step."""

    def weigh(times: Sequence[float], computed: Sequence[bool]) -> list[tuple[float, float]]:
        table, now = [], [1.0, 1.0]
        for time, full in zip(times, computed, strict=True):
            for part, ((low, high), alpha) in enumerate(zip(ranges, alphas, strict=True)):
                factor = alpha if low < time < high else 1.0
                before = now[part] if compounding else 1.0
                now[part] = 1.0 if full else before * factor
            table.append((now[0], now[1]))
        return table

    return weigh
