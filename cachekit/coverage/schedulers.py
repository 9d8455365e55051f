"""Every scheduler of diffusers under a cached pipeline: what its timesteps are, and what becomes of them.

`python -m cachekit.coverage.schedulers docs/schedulers.md` writes the table.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit.coverage.trial import first_line, quiet
from cachekit.diffusers.schedules import ENDS
from cachekit.plans import pattern

WIDTH, STEPS = 8, 8
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NO_SIGNAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
OPTIONS: dict[str, Sequence[dict[str, Any]]] = {
    "timestep_spacing": ({"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}),
    "use_karras_sigmas": ({"use_karras_sigmas": True},),
    "use_exponential_sigmas": ({"use_exponential_sigmas": True},),
    "use_beta_sigmas": ({"use_beta_sigmas": True},),
    "use_lu_lambdas": ({"use_lu_lambdas": True},),
    "use_flow_sigmas": (FLOW,),
    "rescale_betas_zero_snr": (NO_SIGNAL,),
    "invert_sigmas": ({"invert_sigmas": True},),
    "stochastic_sampling": ({"stochastic_sampling": True},),
    "skip_prk_steps": ({"skip_prk_steps": True},),
    "algorithm_type": ({"algorithm_type": "sde-dpmsolver++"},),
}
"""By the argument that a scheduler has: what it is made with beside its defaults."""

SET: dict[str, dict[str, Any]] = {"SCMScheduler": {"intermediate_timesteps": None}}
"""What `set_timesteps` needs beside the number of steps."""

OTHERS = {
    "AmusedScheduler": "fills masked tokens in",
    "BlockRefinementScheduler": "fills masked tokens in",
    "DiscreteDDIMScheduler": "of discrete tokens",
    "EntropyBoundScheduler": "fills masked tokens in",
    "VQDiffusionScheduler": "of discrete tokens",
    "KarrasVeScheduler": "of UNets: it goes back up in every step",
    "ScoreSdeVeScheduler": "of UNets: it has no method `step`",
    "RePaintScheduler": "of UNets: it goes back up, beside a picture",
    "RFD4ProteinaScheduler": "of proteins, set up by what its model knows",
    "PiflowScheduler": "its model predicts a network for every step",
    "HeliosScheduler": "of pyramids: Helios sets it up for every stage, each a trajectory of its own",
    "HeliosDMDScheduler": "of pyramids: Helios sets it up for every stage, each a trajectory of its own",
}
"""Schedulers that drive no transformer step by step alone, and why they are not tried."""


class Block(nn.Module):
    """A network with a residual that depends on the time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """New tokens."""
        return x + 0.3 * self.down(torch.tanh(self.up(x) + time))


class Tiny(nn.Module):
    """[B, L, D] -> [B, L, D]; timesteps on any scale."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.transformer_blocks = nn.ModuleList(Block() for _ in range(3))
            self.text = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """What is to be taken away."""
        time = torch.cos(timestep.float().reshape(timestep.shape[0], -1).mean(1) / 100)[:, None, None]
        x = hidden_states + self.text(encoder_hidden_states)
        for block in self.transformer_blocks:
            x = block(x, time)
        return x


class Loop(DiffusionPipeline):
    """A loop over the timesteps of a scheduler, as pipelines have one.

    Attributes:
        calls: the timesteps of the calls of the transformer so far.
    """

    def __init__(self, transformer: nn.Module, **schedulers: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, **schedulers)
        self.set_progress_bar_config(disable=True)
        self.name = next(iter(schedulers))
        self.calls: list[float] = []

    def __call__(self, steps: int = STEPS, spoiled: int | None = None) -> Tensor:
        """[1, 2, D]: a sample; what the call at the place `spoiled` returns counts ten times."""
        scheduler, self.calls = getattr(self, self.name), []
        kind = type(scheduler).__name__
        torch.manual_seed(0)
        x = torch.randn(1, 2, WIDTH)
        scheduler.set_timesteps(steps, **SET.get(kind, {}))
        times = scheduler.timesteps[: len(scheduler.timesteps) - ENDS.get(kind, 0)]
        before: list[Any] = [None, None]  # what CogVideoX's scheduler returned last, and its timestep
        for place, t in enumerate(times):
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = 0.1 * self.ask(given, t) * (10 if place == spoiled else 1)
            if "timestep_back" in inspect.signature(type(scheduler).step).parameters:
                x, before[0] = scheduler.step(out, before[0], t, before[1], x, return_dict=False)
                before[1] = t
            else:
                at = t.expand(1) if kind == "DDPMWuerstchenScheduler" else t
                x = scheduler.step(out, at, x, return_dict=False)[0]
        return x

    def ask(self, x: Tensor, t: Tensor, text: float = 1.0) -> Tensor:
        """What the transformer returns."""
        self.calls.append(float(t))
        words = torch.full((1, 1, WIDTH), text)
        return self.transformer(x, timestep=t.expand(1), encoder_hidden_states=words)


class Row(NamedTuple):
    """A scheduler, and what becomes of its timesteps."""

    scheduler: str  # name of its class
    options: str  # that it was made with, beside its defaults
    reason: str  # why it was not tried; "" of one that was
    calls: int = 0  # of the transformer, in `STEPS` steps
    entries: int = 0  # of `timesteps`
    first: float = 0.0
    last: float = 0.0  # timestep of the last call
    equal: bool = False  # whether a timestep comes twice in a row
    thrown_away: bool = False  # whether what the last call returns changes nothing
    noise: tuple[float, float] = (0.0, 0.0)  # at the first and the last call, as ranges of timesteps see it
    flaw: str = ""  # what is wrong under a cache; "" if nothing is


def names() -> list[str]:
    """The schedulers of the installed diffusers."""
    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and "Flax" not in name)


def variants(name: str) -> Iterator[dict[str, Any]]:
    """What a scheduler is made with: its defaults, and one option each."""
    yield {}
    try:
        known = inspect.signature(getattr(diffusers, name)).parameters
    except ImportError:  # it stands for one that needs another package
        return
    for option, each in OPTIONS.items():
        if option in known:
            yield from (made for made in each if made.keys() <= known.keys() and _changes(known, made))


def _changes(known: Any, made: dict[str, Any]) -> bool:
    return any(known[option].default != value for option, value in made.items())


def cover(name: str, options: dict[str, Any]) -> Row:
    """Try one scheduler: uncached, with every step computed, and with two thirds of them skipped.

    Example:
        >>> row = cover("HeunDiscreteScheduler", {})
        >>> row.calls, row.equal, row.flaw
        (15, True, '')
    """
    shown = ", ".join(f"{option}={value!r}" for option, value in options.items())
    if name in OTHERS:
        return Row(name, shown, OTHERS[name])
    with torch.no_grad(), quiet():
        try:
            scheduler = getattr(diffusers, name)(**options)
            pipe = Loop(Tiny().eval(), scheduler=scheduler)
            plain = pipe()
            if not plain.isfinite().all():
                return Row(name, shown, "without a cache, too, the sample is not finite")
        except Exception as error:  # whatever it is, it is the scheduler's, and belongs in the table
            return Row(name, shown, first_line(error))
        calls, times = pipe.calls, scheduler.timesteps
        same, run = _under(pipe, ck.step_mask([True] * len(calls)))
        [state] = run.states.values()
        noise = state.timesteps.tolist()
        return Row(
            name,
            shown,
            "",
            calls=len(calls),
            entries=len(times),
            first=calls[0],
            last=calls[-1],
            equal=any(a == b for a, b in itertools.pairwise(calls)),
            thrown_away=torch.equal(pipe(spoiled=len(calls) - 1), plain),
            noise=(noise[0], noise[-1]),
            flaw=_flaw(pipe, plain, same, len(noise)),
        )


def _flaw(pipe: Loop, plain: Tensor, same: Tensor, believed: int) -> str:
    calls = len(pipe.calls)
    if not torch.equal(same, plain):
        return "with every step computed the sample is another one"
    if believed != calls:
        return f"{believed} steps were believed, {calls} were made"
    mask = [place % 3 == 0 for place in range(calls)]
    skipping, run = _under(pipe, ck.step_mask(mask))
    [stream] = run.summary().streams.values()
    if list(stream.computed) != mask:
        return f"of the mask {pattern(mask)} came {pattern(stream.computed)}"
    return "" if skipping.isfinite().all() else "the sample is not finite"


def _under(pipe: Loop, policy: ck.Policy) -> tuple[Tensor, ckd.Run]:
    with ckd.cached(pipe, policy) as run:
        return pipe(), run


def rows(wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Row]:
    """Of all schedulers, or of those that are wanted by name."""
    for name in filter(wanted, names()):
        yield from (cover(name, options) for options in variants(name))


PAGE = """# Schedulers

Every scheduler of diffusers {version}, and each of its options that changes timesteps or sigmas, in a pipeline that
loops over its timesteps, for {steps} steps. Written by `python -m cachekit.coverage.schedulers docs/schedulers.md`.

What cachekit takes from a scheduler is where a call is: steps are counted as the scheduler takes them, on whatever
scale its timesteps are. A step of a policy is a call of the model, so of a scheduler of second order it sees nearly
twice as many (`calls`). Ranges of timesteps (`pyramid_attention_broadcast`, `faster_cache`, `deciders.within`) are
ranges of noise, from 1000 down to 0 (`noise`): the timesteps themselves where they are that, else by the sigmas, else
spread evenly.

{tried} of {all} were run: uncached, with every step computed (bitwise identical), and with two thirds of the calls
skipped (those of the mask that was given). {well} went well.

| scheduler | options | calls | timesteps | falls | one twice in a row | last call counts | noise | cachekit |
|---|---|---|---|---|---|---|---|---|
{rows}

Where the last call does not count, what the model returns in it changes nothing, and a policy that skips it is free to:
`ck.step_mask([..., 0])`, or a plan without that call.

## Not run

{others}
"""


def markdown(found: Sequence[Row]) -> str:
    """The page."""
    tried = [row for row in found if not row.reason]
    others = (
        f"{row.scheduler}{f' ({row.options})' if row.options else ''}: {row.reason}" for row in found if row.reason
    )
    return PAGE.format(
        version=version("diffusers"),
        steps=STEPS,
        tried=len(tried),
        all=len(found),
        well=sum(not row.flaw for row in tried),
        rows="\n".join(map(line, tried)),
        others="\n".join(f"- {each}" for each in others),
    )


def line(row: Row) -> str:
    """Its row of the table."""
    cells = (
        row.scheduler.removesuffix("Scheduler"),
        f"`{row.options}`" if row.options else "",
        str(row.calls) if row.calls == row.entries else f"{row.calls} of {row.entries}",
        f"{row.first:.4g} … {row.last:.4g}",
        "yes" if row.first > row.last else "no, it rises",
        "yes" if row.equal else "",
        "no" if row.thrown_away else "yes",
        f"{row.noise[0]:.0f} … {row.noise[1]:.0f}",
        row.flaw or "✓",
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> None:
    """Write the page to the file that is named, and say what went wrong."""
    if len(arguments) != 1:
        sys.exit("usage: python -m cachekit.coverage.schedulers docs/schedulers.md")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(rows())
    Path(arguments[0]).write_text(markdown(found), encoding="utf-8")
    flaws = [f"{row.scheduler} {row.options}: {row.flaw}" for row in found if row.flaw]
    print("\n".join(flaws) or f"{len(found)} schedulers and options")
    sys.exit(bool(flaws))


if __name__ == "__main__":
    main(sys.argv[1:])
