"""One call of a pipeline: its streams, each with a state that begins and ends with the call."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachekit.asking import form as form_of
from cachekit.diffusers.schedules import Place, Schedule, timestep_of
from cachekit.diffusers.standins import stand_in, watched
from cachekit.guidance import Tokens
from cachekit.methods._planned import check_made_for
from cachekit.policy import Policy
from cachekit.state import State, state_bytes
from cachekit.transform import CachedStep

BOTH = "cond_uncond"
"""What pipelines call the context of both halves of guidance in a batch."""
UNNAMED = "call"
"""The stream of a pipeline that gives no names."""


@dataclass
class Stream:
    """What is called once a step: a branch of guidance, or the model as a whole."""

    policy: Policy | None  # None: not cached
    step: CachedStep | None = None
    state: State | None = None  # None: not cached, or answered from the state of another stream
    form: Any = None  # of the arguments that the state was made for
    begun: Place | None = None  # of the state's first step in the schedule
    parts: int = 0  # how many trajectories it has begun
    inputs: tuple[tuple, dict[str, Any]] | None = None  # of the last call, while they may be asked for again
    computed: list[bool] = field(default_factory=list)  # one a call
    seconds: float = 0.0  # of all calls
    setup: float = 0.0  # of them, to look at the model and to make states
    cut: tuple[int, int] | None = None  # steps done and steps in all, of a trajectory that was not finished
    bytes: int = 0

    @property
    def due(self) -> Place | None:
        """Where its next step is."""
        if self.begun is None or self.state is None:
            return None
        return self.begun._replace(step=self.begun.step + int(self.state.step))

    @property
    def recorded(self) -> bool:
        """Whether its state is a recording."""
        return self.policy is not None and bool(self.policy.recorded)


class Call:
    """One call of a pipeline, in one thread.

    Args:
        pipe: the pipeline.
        models: its transformers, by name.
        policy_of: transformer, stream -> policy, None to leave the stream alone.
        step_of: transformer, policy -> step.
        variant: policy, separate, tokens -> the policy for guidance in two calls a step, in a batch, or (None) without,
            and for what the transformer returns.
        separate: whether an earlier call has shown that guidance without names makes two calls a step.
        scales: of guidance, as the pipeline was given them, by argument.
        scheduler: the name of the pipeline's scheduler, if it has one.
        extra: how many timesteps of it earlier calls left over, if that is known.
    """

    def __init__(
        self,
        pipe: Any,
        models: dict[str, nn.Module],
        policy_of: Callable[[str, str], Policy | None],
        step_of: Callable[[str, Policy], CachedStep],
        variant: Callable[[Policy, bool | None, Tokens | None], Policy],
        *,
        separate: bool,
        scales: Mapping[str, float],
        scheduler: str | None,
        extra: int | None,
    ) -> None:
        self.streams: dict[tuple[str, str], Stream] = {}
        self.separate = separate
        self.used_with: dict[str, dict[str, Any]] = {}  # by transformer, at the start of its last trajectory
        self._guided: dict[str, str] = {}  # by transformer: what its first step has shown
        self._scales = scales  # of guidance, as the call was given them, by argument
        self.stand_ins = {name: stand_in(model, self._calling(name), self._context) for name, model in models.items()}
        self._pipe = pipe
        self._models = models
        self._policy_of = policy_of
        self._step_of = step_of
        self._variant = variant
        self._scheduler = scheduler
        self.schedule = Schedule(pipe, scheduler, extra)
        self._watched: tuple[Any, Any] = (None, None)  # the scheduler, and what stands in for it
        self._named: list[str] = []
        self._counts: dict[tuple[str, str], tuple[Place, int]] = {}

    def end(self) -> None:
        """Free what is remembered; what was logged stays, and what was recorded."""
        self.stand_ins.clear()
        self._models.clear()
        self._watched = (None, None)
        self.schedule.end()
        self._pipe = None
        for stream in self.streams.values():
            stream.inputs = stream.step = None
            if stream.state is not None and not stream.recorded:
                stream.state = stream.state._replace(reference=(), sites={})

    def given(self, name: str) -> Any:
        """What stands in for a transformer, or for the scheduler."""
        if name != self._scheduler:
            return self.stand_ins.get(name)
        scheduler = self.schedule.scheduler
        if self._watched[0] is not scheduler:
            self._watched = scheduler, watched(scheduler, self.schedule.is_set, self.schedule.stepped)
        return self._watched[1]

    @property
    def times(self) -> tuple[float, ...]:
        """The whole schedule."""
        return self.schedule.times

    def guided(self, component: str) -> str:
        """The streams of the first step of a transformer, cached or not: whether it is guided."""
        names = ", ".join(name for (of, name), stream in self.streams.items() if of == component and stream.computed)
        return self._guided.setdefault(component, names)

    @contextmanager
    def _context(self, name: str) -> Iterator[None]:
        self._named.append(name)
        try:
            yield
        finally:
            self._named.pop()

    def _calling(self, component: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._run(component, args, kwargs)

    def _run(self, component: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        context = self._named[-1] if self._named else UNNAMED
        place = self.schedule.look(timestep_of(args, kwargs))
        before, count = self._counts.get((component, context), (None, 0))
        count = count + 1 if place == before else 1  # calls of a step are told apart by their order
        self._counts[component, context] = place, count
        name = context if count == 1 else f"{context} {count}"
        started = time.perf_counter()
        stream, out, computed = self._answer(component, context, name, place, args, kwargs)
        stream.seconds += time.perf_counter() - started
        stream.computed.append(computed)
        return out

    def _answer(self, component: str, context: str, name: str, place: Place, args: tuple, kwargs: dict[str, Any]):
        """The stream a call belongs to, what the model returns, and whether it was computed."""
        given = self._policy_of(component, name)
        stream = self.streams.setdefault((component, name), Stream(given))
        if given is None:
            return stream, self._models[component](*args, **kwargs), True
        form = form_of((args, kwargs))  # what a state depends on
        partner = self._partner(component, context, name, place, form) if given.guidance is not None else None
        if partner is not None:
            if not _separate(partner.policy):
                # Taken for a batch of both halves, it was the first of two calls: compute it again as such. Only the
                # first step of the first call of a run comes here.
                self.separate = True
                again, partner.state = partner.inputs, None
                assert again is not None
                fitting = functools.partial(self._variant, given, True, tokens_of(again[1]))
                self._advance(component, partner, fitting, place, again, partner.form)
            stream.policy = partner.policy
            out, partner.state = _of(partner.step).uncond(_of(partner.state), *args, **kwargs)
            answered = partner.state.decider
            return stream, out, int(answered.full) == int(answered.last)
        fitting = functools.partial(self._fitting, given, context, name, args, kwargs)
        out = self._advance(component, stream, fitting, place, (args, kwargs), form)
        state = _of(stream.state)
        return stream, out, bool(state.computed[int(state.step) - 1])

    def _advance(
        self, component: str, stream: Stream, fitting: Callable[[], Policy], place: Place, inputs: Any, form: Any
    ) -> Any:
        """A step of a stream, of a new trajectory where this one does not go on: under the policy that is fitting."""
        args, kwargs = inputs
        state = stream.state
        if state is None or stream.form != form or int(state.step) >= len(state.timesteps) or stream.due != place:
            if state is not None and int(state.step) < len(state.timesteps):
                stream.cut = int(state.step), len(state.timesteps)
            policy = fitting()
            stream.step, stream.policy, stream.form, stream.begun = (
                self._step_of(component, policy),
                policy,
                form,
                place,
            )
            stream.parts += 1
            started = time.perf_counter()
            used = self.used_with[component] = self._used_with(component)
            check_made_for(policy.made_for, **used)
            times = self.schedule.ahead(place, component)
            state = stream.step.init(self.schedule.noise(place, len(times)) or 1, *args, **kwargs)
            stream.bytes = state_bytes(state)
            stream.setup += time.perf_counter() - started
        if int(state.step) == 1:  # by now every stream of a step has come, and this one not again
            check_made_for(_of(stream.policy).made_for, streams=self.guided(component))
        out, stream.state = _of(stream.step)(state, *args, **kwargs)
        stream.inputs = inputs if int(state.step) == 0 and _of(stream.policy).guidance is not None else None
        return out

    def _partner(self, component: str, context: str, name: str, place: Place, form: Any) -> Stream | None:
        """The conditional stream that this unconditional call is answered from, if it is one and that one came."""
        if context == name and context != UNNAMED and _unconditional(context):
            named = (other for of, other in self.streams if of == component and _conditional(other))
            partner = self.streams.get((component, next(named, "")))
        elif (context, name) == (UNNAMED, f"{UNNAMED} 2"):
            partner = self.streams.get((component, UNNAMED))
            # What is called beside a batch of both halves has another batch.
            if partner is not None and _first(partner.form) != _first(form):
                return None
        else:
            return None
        if partner is None or partner.state is None or partner.policy is None or partner.policy.guidance is None:
            return None
        done = int(partner.state.step) - 1
        if partner.due != place._replace(step=place.step + 1):
            return None
        if _separate(partner.policy):
            return partner if int(partner.state.decider.last) < done else None
        return partner if partner.inputs is not None else None

    def _fitting(self, policy: Policy, context: str, name: str, args: tuple, kwargs: dict[str, Any]) -> Policy:
        """The policy with guidance as this pipeline has it."""
        guidance = policy.guidance
        if guidance is None:
            return policy
        tokens = tokens_of(kwargs) if guidance.layout is None else None
        guided = getattr(self._pipe, "do_classifier_free_guidance", None)
        if guided is None and name == BOTH:
            # Elsewhere a scale above 1 may be one that the model is told, without a second half.
            guided = getattr(self._pipe, "guidance_scale", 0.0) > 1
        if name == BOTH or (name == UNNAMED and not self.separate and not guidance.separate):
            if guided is True and _batch(args, kwargs) % 2 == 0:
                return self._variant(policy, False, tokens)
            # Without guidance a batch has no halves; where that is not known it may be the first of two calls.
            return self._variant(policy, None if name == BOTH or guided is False else True, tokens)
        return self._variant(policy, True if name == UNNAMED or _conditional(name) else None, tokens)

    def _used_with(self, component: str) -> dict[str, Any]:
        """What else than the transformer a trajectory depends on, where the pipeline tells."""
        pipe, given = self._pipe, self._scales.get("guidance_scale")
        scheduler, guidance = self.schedule.scheduler, getattr(pipe, "guidance_scale", given)
        if guidance is None:
            guidance = getattr(getattr(pipe, "guider", None), "guidance_scale", None)
        if component.endswith("_2"):
            guidance = getattr(pipe, "_guidance_scale_2", guidance)
        return {
            "scheduler": None if scheduler is None else type(scheduler).__name__,
            "guidance": guidance if isinstance(guidance, (int, float)) else None,
            "true_cfg_scale": self._scales.get("true_cfg_scale"),
        }


def _unconditional(context: str) -> bool:
    """Whether a pipeline, or its guider, calls the unconditional half of guidance so: `uncond`, `pred_uncond`."""
    return context != BOTH and context.rpartition("_")[2] in ("uncond", "unconditional", "negative")


def _conditional(context: str) -> bool:
    """The same of the conditional half, in a call of its own: `cond`, `pred_cond`."""
    return context.rpartition("_")[2] in ("cond", "conditional", "positive")


def _separate(policy: Policy | None) -> bool:
    return policy is not None and policy.guidance is not None and policy.guidance.separate


def _of(value):
    """What is there by now."""
    assert value is not None
    return value


def tokens_of(kwargs: Mapping[str, Any]) -> Tokens | None:
    """How the tokens of a picture or a video lie, as the arguments of a transformer tell; None where they do not.

    Told by the sizes of one picture (`img_shapes`), by `num_frames`, `height` and `width`, or by the place of every
    token (`img_ids`: frame, row, column) where all of them are one block of rows and columns.
    """
    hidden = kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        return None
    ids, sizes = kwargs.get("img_ids"), pytree.tree_leaves(kwargs.get("img_shapes") or ())
    found: list[Any]
    if isinstance(ids, Tensor) and ids.ndim in (2, 3) and ids.shape[-1] >= 3:
        found = _block(ids.reshape(-1, *ids.shape[-2:])[0, :, :3].cpu())
    elif sizes:
        found = sizes[:3] if sizes[:3] * (len(sizes) // 3) == sizes else []  # the same of all entries of the batch
    else:
        found = [kwargs.get(name) for name in ("num_frames", "height", "width")]
    fits = len(found) == 3 and all(isinstance(size, int) for size in found) and math.prod(found) == hidden.shape[1]
    return Tokens(*found) if fits else None


def _block(places: Tensor) -> list[int]:
    """Frames, rows and columns of tokens at these places [S, 3], or nothing where they are not in this order."""
    counts = [len(column.unique()) for column in places.T]
    if math.prod(counts) != len(places):
        return []
    block = places.reshape(*counts, 3)
    lines = [block[..., axis].movedim(axis, -1) for axis in range(3)]
    rises = all(bool((line == line[0, 0]).all() and (line[0, 0].diff() > 0).all()) for line in lines)
    return counts if rises else []


def _first(form: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor: of what is denoised."""
    return next((kind[0] for kind in form[1] if isinstance(kind, tuple)), None)


def _batch(args: tuple, kwargs: dict[str, Any]) -> int:
    leaves = pytree.tree_leaves((args, kwargs))
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), 1)
