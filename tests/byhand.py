"""A small diffusion transformer with attention, and every cache on it as one would write it by hand.

The forecasts are written from the formulas, in float64; the engine sees none of this.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, HEADS, CHANNELS, IMAGE, WORDS = 16, 2, 4, 6, 5


class Attention(nn.Module):
    """Attention of tokens to themselves, or to others."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """New tokens [B, S, C]."""
        other = x if other is None else other
        parts = (layer(of) for layer, of in ((self.query, x), (self.key, other), (self.value, other)))
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward. With `inplace` it writes to what the attention returned."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.attn, self.cross = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
        """The tokens, with something added three times."""
        attended = self.attn(x)
        if self.inplace:
            attended *= self.gate(emb).unsqueeze(1)
        else:
            attended = attended * self.gate(emb).unsqueeze(1)
        x = x + attended
        x = x + self.cross(x, text)
        return x + self.mlp(x)


class Net(nn.Module):
    """Patch tokens and a time embedding, blocks, a head."""

    def __init__(self, depth: int = 3, inplace: bool = False) -> None:
        super().__init__()
        self.patch, self.context, self.head = (nn.Linear(*sizes) for sizes in ((CHANNELS, WIDTH),) * 2 + ((WIDTH, 4),))
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block(inplace) for _ in range(depth))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Velocity [B, S, C] of tokens [B, S, C] at time [B] under text [B, L, C]."""
        emb = self.time(t.unsqueeze(-1))
        x, text = self.patch(x), self.context(text)
        for block in self.blocks:
            x = block(x, text, emb)
        return self.head(x * (1 + emb.unsqueeze(1)))


def net(**options: Any) -> Net:
    """A model with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(**options).eval()


shared = functools.cache(net)
"""The same model at every call, and so what was recorded of it: for tests that change nothing about it."""


def hold(points: dict[int, Tensor], at: int) -> Tensor:
    """The last value."""
    return list(points.values())[-1].double()


def two_point(points: dict[int, Tensor], at: int) -> Tensor:
    """The last value, and half of how far it was from the one before."""
    values = [value.double() for value in points.values()]
    return values[-1] + 0.5 * (values[-1] - values[-2]) if len(values) > 1 else values[-1]


def polynomial(points: dict[int, Tensor], at: int) -> Tensor:
    """Lagrange's form of the polynomial through all `points`."""
    total = torch.zeros_like(next(iter(points.values())), dtype=torch.float64)
    for i, value in points.items():
        weight = 1.0
        for j in points:
            if j != i:
                weight *= (at - j) / (i - j)
        total += weight * value.double()
    return total


def newton(order: int) -> Callable[[dict[int, Tensor], int], Tensor]:
    """The polynomial through the last values."""
    return lambda points, at: polynomial(dict(list(points.items())[-order - 1 :]), at)


def repaid(order: int) -> Callable[[dict[int, Tensor], int], Tensor]:
    """What the gap before the last value was off, where all is known by now, on top of the very next forecast."""

    def forecast(points: dict[int, Tensor], at: int) -> Tensor:
        total, (*earlier, last) = newton(order)(points, at), points
        if earlier and at == last + 1:
            before, now = (
                {step: points[step] for step in steps[-order - 1 - n :]} for n, steps in ((0, earlier), (1, [*points]))
            )
            for step in range(earlier[-1] + 1, last):
                total = total + polynomial(now, step) - polynomial(before, step)
        return total

    return forecast


def taylor(order: int) -> Callable[[dict[int, Tensor], int], Tensor]:
    """Derivatives by differences of successive computed steps, as the paper writes them."""

    def forecast(points: dict[int, Tensor], at: int) -> Tensor:
        steps, factors = list(points), []
        for n, step in enumerate(steps):
            fresh = [points[step].double()]
            for i in range(min(order, n)):
                fresh.append((fresh[i] - factors[i]) / (step - steps[n - 1]))
            factors = fresh
        offset, total, factorial = at - steps[-1], torch.zeros_like(factors[0]), 1.0
        for i, factor in enumerate(factors):
            factorial *= max(i, 1)
            total += factor * offset**i / factorial
        return total

    return forecast


NAMES = {"self": ("attn",), "attention": ("attn", "cross"), "mlp": ("mlp",), "attention+mlp": ("attn", "cross", "mlp")}


class Held(nn.Module):
    """A module that is forecast when the cache says so."""

    def __init__(self, module: nn.Module, cache: Cache) -> None:
        super().__init__()
        self.module, self.cache, self.points = module, [cache], {}

    def forward(self, *args: Tensor) -> Tensor:
        """What the module returns, or the forecast."""
        cache = self.cache[0]
        if cache.computing:
            value = self.module(*args)
            self.points[cache.step] = value.clone()
            return value
        return cache.forecast(self.points, cache.step).to(args[0].dtype)


class Rest(nn.Module):
    """A chain of blocks whose residual is forecast when the cache says so."""

    def __init__(self, blocks: Sequence[nn.Module], cache: Cache) -> None:
        super().__init__()
        self.blocks, self.cache, self.points = nn.ModuleList(blocks), [cache], {}

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        """The tokens after the blocks."""
        cache = self.cache[0]
        if cache.computing:
            start = x
            for block in self.blocks:
                x = block(x, *args)
            self.points[cache.step] = x - start
            return x
        return x + cache.forecast(self.points, cache.step).to(x.dtype)


class Probe(nn.Module):
    """The first block, whose change decides."""

    def __init__(self, block: nn.Module, cache: Cache, threshold: float | None) -> None:
        super().__init__()
        self.block, self.cache, self.threshold = block, [cache], threshold

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        """The block as it is."""
        cache, out = self.cache[0], self.block(x, *args)
        residual = out - x
        if self.threshold is not None:
            change = (residual - self.kept).abs().sum() / self.kept.abs().sum() if cache.step else torch.tensor(1e9)
            cache.computing = bool(change >= self.threshold)
        if cache.computing:
            self.kept = residual
        return out


class Cache:
    """The model under a cache: `sites` are left out when `plan` or the probe says so."""

    def __init__(
        self,
        model: Net,
        sites: str,
        forecast: Callable[[dict[int, Tensor], int], Tensor],
        plan: Sequence[bool] | None = None,
        threshold: float | None = None,
    ) -> None:
        self.model, self.forecast, self.plan = copy.deepcopy(model), forecast, plan
        self.sites, self.points, self.computing, self.step = sites, {}, True, -1
        blocks = list(self.model.blocks)
        front = [Probe(blocks.pop(0), self, threshold)] if threshold is not None else []
        for block in blocks:
            for name in NAMES.get(sites, ()):
                setattr(block, name, Held(getattr(block, name), self))
        self.model.blocks = nn.ModuleList([*front, *([Rest(blocks, self)] if sites == "chain" else blocks)])

    def __call__(self, *args: Tensor) -> Tensor:
        """The next step."""
        self.step += 1
        if self.plan is not None:
            self.computing = self.plan[self.step]
        if self.sites != "output" or self.plan is None:
            out = self.model(*args)
        else:
            out = self.model(*args) if self.computing else None
        if self.sites == "output":
            if self.computing:
                self.points[self.step] = out
            else:
                out = self.forecast(self.points, self.step).float()
        return out
