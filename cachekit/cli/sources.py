"""What `cachekit record` and `cachekit choose` sample from: a pipeline, or the digits model that comes with it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import typer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit.cli.options import described, dtype_of, runs_on, setting
from cachekit.demo.sample import GUIDANCE, Stream, sample, timesteps
from cachekit.diffusers import digits

DIGITS = "digits"


class Source(Protocol):
    """Something to sample from, always the same."""

    def record(self, policy: ck.Policy) -> ck.Trace:
        """Sample under a recording."""
        ...

    def run(self, policy: ck.Policy | None) -> Tensor:
        """Samples [B, ...] under a policy, or uncached."""
        ...


def source(
    model: str,
    prompts: Sequence[str] | None,
    steps: int,
    seed: int,
    given: Sequence[str] | None,
    device: str | None,
    dtype: str | None,
    tick: Callable[[], object],
) -> Source:
    """What MODEL names. `tick` is called at every step."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    runs_on(place)
    if model == DIGITS:
        for hint, value in (("--set", given), ("--dtype", dtype)):
            if value:
                raise typer.BadParameter(f"{value!r} is for a pipeline; {DIGITS} takes none", param_hint=hint)
        return Digits(prompts, steps, seed, place, tick)
    return Pipeline(model, prompts, steps, seed, dict(map(setting, given or ())), place, dtype or "bfloat16", tick)


class Digits:
    """The digits model, ten classes or those that are asked for, guided."""

    def __init__(self, prompts: Sequence[str] | None, steps: int, seed: int, device: str, tick: Callable[[], object]):
        try:
            classes = [int(prompt) for prompt in prompts or map(str, range(digits.CLASSES))]
        except ValueError as error:
            raise typer.BadParameter(f"{list(prompts or ())} are no digits", param_hint="--prompt") from error
        if not set(classes) <= set(range(digits.CLASSES)):
            raise typer.BadParameter(f"{classes} are no digits", param_hint="--prompt")
        self._labels = torch.tensor(classes, device=device)
        self._model = digits.load().to(device)
        self._steps, self._seed, self._tick = steps, seed, tick

    def record(self, policy: ck.Policy) -> ck.Trace:
        """One run."""
        _, states = self._sample(policy)
        notes = {"model": DIGITS, "scheduler": "Euler", "guidance": GUIDANCE}
        return ck.Trace.from_state(states, notes=notes)

    def run(self, policy: ck.Policy | None) -> Tensor:
        """One run."""
        return self._sample(policy)[0]

    @torch.no_grad()
    def _sample(self, policy: ck.Policy | None) -> tuple[Tensor, dict[str, ck.State]]:
        states: dict[str, ck.State] = {}
        step = None if policy is None else ck.cache(self._model, policy, donate=True)

        def velocity(x: Tensor, t: Tensor, labels: Tensor, stream: Stream) -> Tensor:
            if stream == "uncond":
                self._tick()
            arguments = digits.inputs(x, t, labels)
            if step is None:
                return self._model(**arguments)[0]
            if stream not in states:
                states[stream] = step.init(1000 * timesteps(self._steps)[:-1], **arguments)
            out, states[stream] = step(states[stream], **arguments)
            return out[0]

        return sample(velocity, self._labels, self._steps, GUIDANCE, self._seed), states


class Pipeline:
    """A pipeline of diffusers."""

    def __init__(
        self,
        model: str,
        prompts: Sequence[str] | None,
        steps: int,
        seed: int,
        given: dict[str, Any],
        device: str,
        dtype: str,
        tick: Callable[[], object],
    ) -> None:
        kind = dtype_of(dtype)
        try:
            self._pipe: Any = DiffusionPipeline.from_pretrained(model, torch_dtype=kind).to(device)
        except Exception as error:  # whatever diffusers makes of files that are no pipeline
            where = "no pipeline can be read from this folder" if Path(model).is_dir() else "the hub gave no pipeline"
            raise typer.BadParameter(f"{model!r}: {where}: {described(error)}", param_hint="MODEL") from error
        self._pipe.set_progress_bar_config(disable=True)
        self._name, self._seed = type(self._pipe).__name__, seed
        self._given = {"num_inference_steps": steps, "output_type": "np", **given}
        self._named = {"prompt", *given}
        if prompts:
            self._given["prompt"] = list(prompts) if len(prompts) > 1 else prompts[0]
        known = inspect.signature(type(self._pipe).__call__).parameters
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{self._name} takes no {name!r}", param_hint="--set")
        if "callback_on_step_end" in self._pipe.__call__.__code__.co_varnames:
            self._given["callback_on_step_end"] = lambda pipe, step, timestep, kwargs: tick() or kwargs

    def record(self, policy: ck.Policy) -> ck.Trace:
        """One call."""
        with ckd.cached(self._pipe, policy) as run:
            self._call()
            names = list(dict.fromkeys(name.partition("/")[0] for name in run.states))
            if len(names) != 1:
                raise ck.ArgumentError(
                    f"{self._name} has {len(names)} transformers in use ({', '.join(names)}), "
                    "each with a trajectory of its own. Record them in Python: run.trace(name)."
                )
            return run.trace(names[0])

    def run(self, policy: ck.Policy | None) -> Tensor:
        """One call."""
        if policy is None:
            return self._call()
        with warnings.catch_warnings(), ckd.cached(self._pipe, policy):
            warnings.filterwarnings("ignore", ".*has skipped nothing")  # the table that is made of it says so
            return self._call()

    def _call(self) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        try:
            out = self._pipe(**{"generator": generator, **self._given, "return_dict": False})[0]
        except ck.CacheError:
            raise
        except Exception as error:  # whatever a pipeline makes of what it is called with
            given = ", ".join(f"{name}={value!r}" for name, value in self._given.items() if name in self._named)
            reason = f"{self._name} fails with {given or 'no prompt'}: {described(error)}"
            raise typer.BadParameter(reason, param_hint="--prompt, --set") from error
        return torch.as_tensor(out).detach().cpu()
