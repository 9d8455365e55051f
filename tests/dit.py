"""A small diffusion transformer in plain PyTorch, in every shape that discovery has to tell apart.

Every flow hands its chains of blocks to `DiT.chain` as lists of functions `(x, text) -> (x, text)`. For the model that
is a plain loop; `Reference` replaces it on a copy by the cache one would write by hand. The engine sees neither.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WIDTH, CHANNELS, IMAGE, WORDS = 16, 4, 6, 5
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Image and text tokens through one joint layer. `returns` is image, text, or image alone, in this order."""

    def __init__(self, returns: str = "image text", *, inplace: bool = False, narrow: bool = False) -> None:
        super().__init__()
        self.returns, self.inplace, self.narrow = returns.split(), inplace, narrow
        self.modulate = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, skip: Tensor | None = None):
        """The tokens, each with something added."""
        x = x if skip is None else x + skip
        if self.narrow:
            x, text = x.float(), text.float()
        scale, gate = self.modulate(emb).unsqueeze(1).chunk(2, -1)
        joint = torch.cat((x, text), 1) * (1 + scale)
        added = (gate * self.mlp(joint + joint.mean(1, keepdim=True))).split((x.shape[1], text.shape[1]), 1)
        if self.inplace:
            x += added[0]
            text += added[1]
        else:
            x, text = x + added[0], text + added[1]
        if self.narrow:
            x, text = x.bfloat16(), text.bfloat16()
        results = tuple({"image": x, "text": text}[name] for name in self.returns)
        return results if len(results) > 1 else results[0]


class Replace(nn.Module):
    """A block whose result is no sum: which of two equal arguments it continues cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """New tokens."""
        return torch.tanh(self.mix(x, other))


class DiT(nn.Module):
    """Patch tokens, a time embedding, a text stream, and one of `FLOWS` between them and the head."""

    def __init__(self, flow: str = "plain", depth: int = 4) -> None:
        super().__init__()
        self.flow = flow
        self.patch, self.context = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        make = {"swapped": Block("text image"), "cross": Block("image"), "inplace": Block(inplace=True)}
        make["narrow"] = Block(narrow=True)
        block = make.get(flow, Replace() if flow == "ambiguous" else Block())
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(1 if flow == "one" else depth))
        if flow in ("interleaved", "zipped"):
            self.temporal = nn.ModuleList(Block() for _ in range(depth))
        if flow == "two":
            self.single = nn.ModuleList(Block("image") for _ in range(depth))
        if flow == "refined":
            self.refiner = nn.ModuleList(Block("image") for _ in range(2))
        self.head = nn.Linear(WIDTH, CHANNELS)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.ndim < 3 else 0.03)

    def chain(self, calls: Sequence[Run], x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """One block after the other."""
        for call in calls:
            x, text = call(x, text)
        return x, text

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Velocity [B, S, C] of tokens [B, S, C] at time [B] under text [B, L, C]."""
        emb = self.time(t.unsqueeze(-1))
        x = FLOWS[self.flow](self, self.patch(x), self.context(text), emb)
        return self.head(x * (1 + emb.unsqueeze(1)))


def joint(block: nn.Module, *more: Tensor) -> Run:
    """A block that takes and returns both streams by position."""
    return lambda x, text: block(x, text, *more)


def cross(block: nn.Module, *more: Tensor) -> Run:
    """A block that returns the image stream alone."""
    return lambda x, text: (block(x, text, *more), text)


def plain(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """One list of blocks."""
    return model.chain([joint(block, emb) for block in model.blocks], x, text)[0]


def crossed(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """One list of blocks that return one tensor."""
    return model.chain([cross(block, emb) for block in model.blocks], x, text)[0]


def swapped(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """Keyword arguments, and the text first among the results."""

    def keywords(block: nn.Module) -> Run:
        return lambda x, text: block(emb=emb, text=text, x=x)[::-1]

    return model.chain([keywords(block) for block in model.blocks], x, text)[0]


def glue(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """A residual added between blocks, as a ControlNet does."""
    calls = [joint(block, emb) for block in model.blocks]
    control = torch.sin(x)
    x, text = model.chain(calls[:2], x, text)
    return model.chain(calls[2:], x + control, text)[0]


def read(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """An intermediate result is read after the blocks."""
    calls = [joint(block, emb) for block in model.blocks]
    middle, text = model.chain(calls[:2], x, text)
    return middle * model.chain(calls[2:], middle, text)[0]


def interleaved(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """Two lists in turn, with the tokens turned in between: every block is a chain."""
    for first, second in zip(model.blocks, model.temporal, strict=True):
        x, text = model.chain([joint(first, emb)], x, text)
        x, text = model.chain([joint(second, emb)], x.flip(1), text)
        x = x.flip(1)
    return x


def zipped(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """Two lists in turn, with nothing in between: one chain."""
    pairs = zip(model.blocks, model.temporal, strict=True)
    return model.chain([joint(block, emb) for pair in pairs for block in pair], x, text)[0]


def two(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """Joint blocks, then blocks on the concatenation."""
    x, words = model.chain([joint(block, emb) for block in model.blocks], x, text)
    merged, _ = model.chain([cross(block, emb) for block in model.single], torch.cat((words, x), 1), text)
    return merged[:, words.shape[1] :]


def twice(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """Every block is called two times in a row."""
    return model.chain([joint(block, emb) for block in model.blocks for _ in range(2)], x, text)[0]


def skips(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """The second half of the blocks takes what the first half returned, last first."""
    kept: list[Tensor] = []

    def down(block: nn.Module) -> Run:
        def call(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            x, text = block(x, text, emb)
            kept.append(x)
            return x, text

        return call

    def up(block: nn.Module) -> Run:
        return lambda x, text: block(x, text, emb, kept.pop())

    half = len(model.blocks) // 2
    return model.chain([*map(down, model.blocks[:half]), *map(up, model.blocks[half:])], x, text)[0]


def refined(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """Two blocks see the image before the text joins it."""
    x, _ = model.chain([cross(block, emb) for block in model.refiner], x, emb.unsqueeze(1))
    return plain(model, x, text, emb)


def branching(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """A decision that looks at data."""
    return plain(model, 2 * x if emb.sum() > 1e9 else x, text, emb)


def ambiguous(model: DiT, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
    """Two arguments of one shape, another operation between blocks, and no additions."""
    other = torch.cos(x)
    for block in model.blocks:
        x, _ = model.chain([lambda x, text, block=block: (block(x, other), text)], x, text)
        x = x / 2
    return x


FLOWS = {
    "plain": plain,
    "cross": crossed,
    "swapped": swapped,
    "one": plain,
    "glue": glue,
    "read": read,
    "interleaved": interleaved,
    "zipped": zipped,
    "two": two,
    "twice": twice,
    "skips": skips,
    "refined": refined,
    "inplace": plain,
    "narrow": plain,
    "branching": branching,
    "ambiguous": ambiguous,
}


def dit(flow: str = "plain", depth: int = 4, seed: int = 0) -> DiT:
    """A model with random weights; equal seeds give equal ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiT(flow, depth).eval()


shared = functools.cache(dit)
"""The same model at every call, and so what was recorded of it: for tests that change nothing about it."""


def feed(step: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of a step; from one to the next they change by some per cent."""
    draw = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, batch, IMAGE, CHANNELS, generator=draw)
    text = torch.randn(batch, WORDS, CHANNELS, generator=draw)
    turn = torch.tensor(0.05 * step)
    return turn.cos() * start + turn.sin() * end, torch.full((batch,), 1 - 0.02 * step), text


class Reference:
    """The cache by hand: a chain's input, plus what it added at the last computed step."""

    def __init__(self, model: DiT, front: int = 0, leader: int = 0) -> None:
        self.original, self.model = model, copy.deepcopy(model)
        self.model.chain = self._chain
        self.front, self.leader = front, leader
        self.added: dict[int, tuple[Tensor, Tensor]] = {}
        self.dtypes: dict[int, torch.dtype] = {}

    def __call__(self, computed: bool, *args: Tensor) -> Tensor:
        """A step that computes, or not."""
        self.computed, self.chains = computed, 0
        return self.model(*args)

    def _chain(self, calls: Sequence[Run], x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        number, self.chains = self.chains, self.chains + 1
        front = {self.leader: self.front}.get(number, 0) if number >= self.leader else len(calls)
        x, text = DiT.chain(self.model, calls[:front], x.clone(), text.clone())
        if self.computed:
            after = DiT.chain(self.model, calls[front:], x.clone(), text.clone())
            self.added[number] = after[0] - x, after[1] - text
            self.dtypes[number] = after[0].dtype
            return after
        values = x + self.added[number][0], text + self.added[number][1]
        return values[0].to(self.dtypes[number]), values[1].to(self.dtypes[number])
