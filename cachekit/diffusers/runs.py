"""Caching switched on for a pipeline, and off again."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from cachekit.diffusers.calls import Call
from cachekit.diffusers.compat import refuse, refuse_hooks
from cachekit.diffusers.configs import from_config, is_config
from cachekit.diffusers.reports import Report, StreamReport, notes
from cachekit.diffusers.standins import MARK, pipeline_class
from cachekit.errors import ArgumentError, ArgumentTypeError, StateError, StructureError
from cachekit.guidance import Tokens
from cachekit.planning.sampler import step_sizes
from cachekit.planning.trace import Trace
from cachekit.policy import Policy
from cachekit.state import State
from cachekit.structure.chains import Chain
from cachekit.transform import CachedStep

ALL = ""
Structure: TypeAlias = Chain | Sequence[Chain] | None


class Run:
    """Caching that is enabled on a pipeline: made by `enable` and `cached`.

    Every call of the pipeline begins with new states, whatever happened before; they belong to the call and to its
    thread alone. Two pipelines may share a transformer, each with a run of its own or with none.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        policies: Mapping[str, Policy],
        options: Mapping[str, Any] | None = None,
        structure: Mapping[str, Structure] | None = None,
    ) -> None:
        self._of = weakref.ref(pipe)  # the pipeline's class holds the run
        self._policies = dict(policies)
        self._options = options
        self._structure = dict(structure or {})
        self._used: set[str] = set()
        self._told: set[Any] = set()  # keys of notes
        self._names = _transformers(pipe)
        self._scheduler = _scheduler(pipe)
        self._extra: dict[type, int] = {}  # by class of scheduler: how many of its timesteps calls have left over
        self._class = type(pipe)
        self._steps: dict[tuple[int, int], tuple[nn.Module, Policy, CachedStep]] = {}
        self._lock = threading.Lock()
        self._here = threading.local()
        weakref.finalize(pipe, self._steps.clear)
        self._variants: dict[tuple[int, bool | None, Any], Policy] = {}
        self._separate = False
        self._last: Call | None = None
        for key in self._policies:
            component, slash, _ = key.partition("/")
            if slash and component not in self._names:
                raise ArgumentError(
                    f"`policy` names {key!r}; the transformers of {self._class.__name__} are {', '.join(self._names)}."
                )
        self._check(self._models())

    def disable(self) -> None:
        """Switch caching off. The pipeline is what it was before; a second time changes nothing."""
        pipe = self._of()
        if pipe is not None and getattr(type(pipe), MARK, None) is self:
            pipe.__class__ = self._class
        self._steps.clear()

    @property
    def states(self) -> dict[str, State]:
        """The states of the last call, by transformer and stream: `states["transformer/cond"]`.

        While a call runs they are whole. What is cached is freed when it ends: what was logged stays, and what was
        recorded.
        """
        call = self._last
        streams = call.streams if call is not None else {}
        return {"/".join(key): stream.state for key, stream in streams.items() if stream.state is not None}

    def summary(self) -> Report:
        """What the last call did, stream by stream; `print` shows a table."""
        call = self._last
        streams = call.streams if call is not None else {}
        return Report(
            streams={
                "/".join(key): StreamReport(
                    policy="not cached" if stream.policy is None else stream.policy.name,
                    computed=tuple(stream.computed),
                    seconds=stream.seconds - stream.setup,
                    setup_seconds=stream.setup,
                    state_bytes=stream.bytes,
                )
                for key, stream in streams.items()
            },
            unused=self._unused,
        )

    def trace(self, transformer: str = "transformer") -> Trace:
        """What the last call has recorded, under `cachekit.recording`, of all streams of a transformer.

        Its notes say with which pipeline, scheduler and guidance, so that a plan made from it refuses others.

        Args:
            transformer: of a pipeline with several, which.

        Raises:
            ArgumentError: the last call recorded nothing of it.
            StateError: it was not finished.
        """
        call = self._last
        streams = {} if call is None else call.streams
        states = {
            name: each.state for (of, name), each in streams.items() if of == transformer and each.state is not None
        }
        if call is None or not states:
            there = ", ".join(self.states) or "no call yet"
            raise ArgumentError(f"`transformer` {transformer!r} has recorded nothing; there is {there}.")
        # Beside one that is recorded another may be cached.
        states = {name: state for name, state in states.items() if streams[transformer, name].recorded} or states
        for name in states:
            parts = streams[transformer, name].parts
            if parts > 1 and not streams[transformer, name].cut:
                raise StateError(
                    f"{name!r} of {transformer!r} went through its schedule {parts} times in one call (stages, "
                    "windows), and a recording is of one. Use a policy that is set by hand there, e.g. "
                    "cachekit.taylorseer(3)."
                )
            if cut := streams[transformer, name].cut:
                raise StateError(
                    f"{name!r} of {transformer!r} began anew after {cut[0]} of {cut[1]} steps, with other arguments or "
                    "at another timestep. Record a call that goes through, e.g. without a callback that changes them."
                )
        used = {name: value for name, value in call.used_with[transformer].items() if value is not None}
        # The last step goes on to where the next transformer begins, which this one does not know.
        begun, steps = streams[transformer, next(iter(states))].begun, len(next(iter(states.values())).timesteps)
        sizes = None if begun is None else step_sizes(call.times)[begun.step : begun.step + steps]
        if sizes is not None and len(sizes) != steps:  # calls of frames that have timesteps of their own
            sizes = None
        used["streams"] = call.guided(transformer)
        if "," not in used["streams"]:  # nothing was guided by it
            used.pop("true_cfg_scale", None)
        return Trace.from_state(states, step_sizes=sizes, notes={"model": self._class.__name__, **used})

    @property
    def _pipe(self) -> Any:
        return self._of()

    @property
    def _unused(self) -> tuple[str, ...]:
        """Keys of the mapping of policies that no stream has had yet."""
        return tuple(key for key in self._policies if key != ALL and key not in self._used)

    @property
    def _interrupted(self) -> bool:
        """Whether a callback has told the pipeline to stop: its last call did not go through."""
        return getattr(self._pipe, "interrupt", False) is True

    # What the classes in standins.py ask ----------------------------------------------------------------------

    @contextmanager
    def opened(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        """A call of the pipeline, in this thread."""
        models = self._models()
        with self._lock:  # one that was there before is let go
            held = {id(model) for model in models.values()}
            for key in [key for key in self._steps if key[0] not in held]:
                del self._steps[key]
        self._check(models)
        call = Call(
            self._pipe,
            models,
            self._policy_of,
            self._step_of,
            self._variant,
            separate=self._separate,
            scales=self._scales(args, kwargs),
            scheduler=self._scheduler,
            extra=self._extra.get(type(self._pipe.__dict__.get(self._scheduler or ""))),
        )
        calls: list[Call] = self._here.__dict__.setdefault("calls", [])
        calls.append(call)
        self._last = call  # lets go of the one before, and of its memory
        try:
            yield
            self._learn(call)
            self._tell(call)
        finally:
            calls.pop()
            self._separate |= call.separate
            call.end()

    def _learn(self, call: Call) -> None:
        """How many timesteps the pipeline leaves over: of a scheduler that has one entry more than there are calls."""
        kind, left = type(call.schedule.scheduler), call.schedule.left_over
        if left != 1 or self._interrupted:
            self._extra.pop(kind, None)
        elif call.schedule.surprised:
            self._extra[kind] = left
            warnings.warn(
                f"`pipe` {self._class.__name__} has called its transformer {len(call.times) - 1} times, and its "
                f"{kind.__name__} has {len(call.times)} timesteps: the last one was waited for in vain. From the next "
                "call on it is not; a recording or a calibration of this call is to be made again.",
                stacklevel=5,
            )

    def _tell(self, call: Call) -> None:
        """Say, once each, what a whole call has shown of the policies."""
        if self._interrupted:
            return
        for key, note in notes(call.streams, self._policy_of, self._unused):
            if key not in self._told:
                self._told.add(key)
                warnings.warn(note, stacklevel=5)

    def _scales(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, float]:
        """What the pipeline is given as scales of guidance, by argument."""
        try:
            bound = inspect.signature(self._class.__call__).bind(self._pipe, *args, **kwargs)
        except TypeError:  # the pipeline itself says what is wrong
            return {}
        bound.apply_defaults()
        given = {name: bound.arguments.get(name) for name in ("guidance_scale", "true_cfg_scale")}
        return {name: scale for name, scale in given.items() if isinstance(scale, (int, float))}

    def owns(self, pipe: Any) -> bool:
        """Whether it is this pipeline, and not one that was made of its class meanwhile."""
        return pipe is self._of()

    def given(self, name: str) -> Any:
        """What stands in for a transformer, or for the scheduler, in this thread now; None outside a call."""
        calls: list[Call] = self._here.__dict__.get("calls", [])
        return calls[-1].given(name) if calls else None

    def shows_progress(self, steps: int) -> None:
        """The pipeline shows progress of so many steps."""
        calls: list[Call] = self._here.__dict__.get("calls", [])
        if calls:
            calls[-1].schedule.expects(steps)

    # Transformers, policies and steps -------------------------------------------------------------------------

    def _models(self) -> dict[str, nn.Module]:
        found = {name: self._pipe.__dict__[name] for name in self._names}
        return {name: model for name, model in found.items() if model is not None}

    def _check(self, models: dict[str, nn.Module]) -> None:
        """Refuse early what would fail in the midst of an image."""
        for name, model in models.items():
            meant = [
                policy
                for key, policy in self._policies.items()
                if key.partition("/")[0] == name or not ("/" in key or key in self._names)
            ]
            if not meant:
                continue  # it is left alone
            refuse(model)
            refuse_hooks(name, model)
            for policy in meant:
                self._step(name, model, policy)

    def _policy_of(self, component: str, stream: str) -> Policy | None:
        for key in (f"{component}/{stream}", stream, component, ALL):
            if key in self._policies:
                self._used.add(key)
                return self._policies[key]
        return None

    def _variant(self, policy: Policy, separate: bool | None, tokens: Tokens | None) -> Policy:
        """A policy for guidance in two calls a step, in a batch, or (None) without guidance: made once.

        Args:
            policy, separate: which, and for what.
            tokens: how what the transformer returns is laid out, for a policy that leaves that to be found.
        """
        guidance = policy.guidance
        assert guidance is not None
        layout = tokens if guidance.layout is None else guidance.layout
        if (guidance.separate, guidance.layout) == (separate, layout):
            return policy
        if separate is None:
            made = dataclasses.replace(policy, guidance=None, name=f"{policy.name} without guidance")
        else:
            guided = dataclasses.replace(guidance, separate=separate, layout=layout)
            made = dataclasses.replace(policy, guidance=guided)
        return self._variants.setdefault((id(policy), separate, layout), made)

    def _step_of(self, component: str, policy: Policy) -> CachedStep:
        return self._step(component, self._pipe.__dict__[component], policy)

    def _step(self, component: str, model: nn.Module, policy: Policy) -> CachedStep:
        """The step of a transformer, made once; it holds both, so that their ids stay theirs."""
        with self._lock:
            key = id(model), id(policy)
            if key not in self._steps:
                step = CachedStep(model, policy, self._structure.get(component, self._structure.get(ALL)))
                self._steps[key] = model, policy, step if self._options is None else step.compile(**self._options)
            return self._steps[key][2]


def enable(
    pipe: Any,
    policy: Any,
    *,
    compile: bool | Mapping[str, Any] = False,
    structure: Structure | Mapping[str, Structure] = None,
) -> Run:
    """Switch caching on for a pipeline, until `run.disable()`. `cached` switches it off by itself.

    Args:
        pipe: a pipeline with a `transformer`, classic or modular. It is called as always; offloading, adapters and
            whatever is set on the pipeline or its transformers in the meantime work as without a cache.
        policy: a policy, or one of diffusers' cache configs as it is. Or a mapping to such: from a stream of the
            pipeline ("cond"), a transformer ("transformer_2"), or both ("transformer_2/cond"), of which the more exact
            one counts, as `run.summary()` names them; what it does not name is not cached.
        compile: True to run compiled steps, or the arguments of `step.compile`, e.g. `{"regional": True}`. What is
            compiled is kept until the run is disabled, for every call.
        structure: chains of blocks stated by hand, as for `cachekit.cache`; or a mapping to such from a transformer.

    Returns:
        The run. `run.summary()` tells what the last call did, `run.states` what it logged.

    Raises:
        ArgumentError, ArgumentTypeError: `pipe` is no pipeline or has a cache already, `policy` is no policy.
        StructureError: the pipeline has no transformer, or something in the way of a cache: hooks of diffusers' own
            caches, group offloading with a stream or of several blocks a group.

    Example:
        ```python
        run = ckd.enable(pipe, ck.first_block_cache(threshold=0.1))
        image = pipe("a cat", num_inference_steps=28).images[0]
        print(run.summary())
        run.disable()
        ```
    """
    _check_pipeline(pipe)
    there: Run | None = getattr(type(pipe), MARK, None)
    if there is not None and there.owns(pipe):
        raise ArgumentError(
            f"`pipe` has caching enabled already, a {type(pipe).__name__}. Call disable() on that run first."
        )
    if there is not None:
        pipe.__class__ = there._class  # made of the class of a pipeline that has caching enabled
    if not isinstance(compile, (bool, Mapping)):
        raise ArgumentTypeError(
            f"`compile` must be True, False or the arguments of step.compile, got {compile!r}. Use e.g. "
            '{"regional": True}.'
        )
    stated = structure if isinstance(structure, Mapping) else {ALL: structure}
    run = Run(pipe, _policies(policy), None if compile is False else {} if compile is True else {**compile}, stated)
    replaced = run._names if run._scheduler is None else (*run._names, run._scheduler)
    pipe.__class__ = pipeline_class(type(pipe), run, replaced)
    return run


def disable(pipe: Any) -> None:
    """Switch caching off for a pipeline, where the run is not at hand. One without a cache stays as it is.

    Args:
        pipe: the pipeline that was given to `enable`.

    Raises:
        ArgumentTypeError: `pipe` is no pipeline.

    Example:
        ```python
        ckd.enable(pipe, ck.first_block_cache(threshold=0.1))
        image = pipe("a cat", num_inference_steps=28).images[0]
        ckd.disable(pipe)
        ```
    """
    _check_pipeline(pipe)
    there: Run | None = getattr(type(pipe), MARK, None)
    if there is not None and there.owns(pipe):
        there.disable()


@contextmanager
def cached(
    pipe: Any,
    policy: Any,
    *,
    compile: bool | Mapping[str, Any] = False,
    structure: Structure | Mapping[str, Structure] = None,
) -> Iterator[Run]:
    """Caching for a pipeline inside a `with` block. After it, or after an exception, nothing is left on the pipeline.

    Args:
        pipe, policy, compile, structure: as for `enable`.

    Example:
        ```python
        with ckd.cached(pipe, FirstBlockCacheConfig(threshold=0.2)) as run:
            image = pipe("a cat", num_inference_steps=28).images[0]
        print(run.summary())
        ```

        MagCache in two steps: a calibration, then any number of images. Every stream has ratios of its own.

        ```python
        with ckd.cached(pipe, ck.mag_calibration()) as run:
            pipe("a cat", num_inference_steps=28)
        for stream, state in run.states.items():
            ck.MagRatios.from_state(state).save(f"{stream.replace('/', '-')}.json")

        ratios = {stream: ck.MagRatios.load(f"{stream.replace('/', '-')}.json") for stream in run.states}
        with ckd.cached(pipe, {stream: ck.mag_cache(each) for stream, each in ratios.items()}):
            image = pipe("a dog", num_inference_steps=28).images[0]
        ```

        A plan, from one recording:

        ```python
        with ckd.cached(pipe, ck.recording()) as run:
            pipe("a cat", num_inference_steps=28)
        plan = ck.plan(run.trace(), computed=10)

        with ckd.cached(pipe, ck.planned(plan)):
            image = pipe("a dog", num_inference_steps=28).images[0]
        ```
    """
    run = enable(pipe, policy, compile=compile, structure=structure)
    try:
        yield run
    finally:
        run.disable()


def _check_pipeline(pipe: Any) -> None:
    modular = sys.modules.get("diffusers.modular_pipelines.modular_pipeline")  # loaded by whoever has one
    kinds = (DiffusionPipeline,) if modular is None else (DiffusionPipeline, modular.ModularPipeline)
    if not isinstance(pipe, kinds):
        raise ArgumentTypeError(
            f"`pipe` must be a DiffusionPipeline or a ModularPipeline, got {type(pipe).__name__}. A transformer alone: "
            "cachekit.cache."
        )


def _policies(policy: Any) -> dict[str, Policy]:
    """The policies by what they are for."""
    if not isinstance(policy, Mapping):
        return {ALL: _policy("policy", policy)}
    if not policy:
        raise ArgumentError("`policy` is an empty mapping. Name at least one stream or transformer.")
    for key in policy:
        if not isinstance(key, str) or not key:
            raise ArgumentTypeError(f"`policy` has the key {key!r}. Keys are names of streams, e.g. 'cond'.")
    return {key: _policy(f"policy[{key!r}]", each) for key, each in policy.items()}


def _policy(name: str, value: Any) -> Policy:
    if isinstance(value, Policy):
        return value
    if is_config(value):
        return from_config(value)
    raise ArgumentTypeError(
        f"`{name}` must be a Policy, a cache config of diffusers or a mapping to such, got {type(value).__name__}. Use "
        "e.g. cachekit.first_block_cache(0.1)."
    )


def _scheduler(pipe: DiffusionPipeline) -> str | None:
    """The name of the component that is its scheduler; of several the first."""
    found = [
        name
        for name, component in vars(pipe).items()
        if not isinstance(component, nn.Module) and callable(getattr(component, "set_timesteps", None))
    ]
    return "scheduler" if "scheduler" in found else next(iter(found), None)


def _transformers(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Names of the components that are transformers."""
    names = tuple(
        name for name, component in vars(pipe).items() if "transformer" in name and isinstance(component, nn.Module)
    )
    if not names:
        parts = ", ".join(name for name, component in pipe.components.items() if isinstance(component, nn.Module))
        raise StructureError(
            f"`pipe` {type(pipe).__name__} has no transformer; its models are {parts or 'none'}. Caching is for "
            "diffusion transformers: for another model with a list of blocks use cachekit.cache."
        )
    return names
