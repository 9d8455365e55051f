"""The transform: a model and a policy become a pure step function over an explicit state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachekit.deciders import Moment, Sums
from cachekit.deciders import plan as plan_of
from cachekit.deciders._decider import ratio, take, trajectory
from cachekit.errors import ArgumentTypeError, StateError
from cachekit.frames import EAGER, GRAPH, Frame, check_reached
from cachekit.layout import Found, Layout
from cachekit.opening import Opened
from cachekit.policy import Policy
from cachekit.programs import Programs, numbers
from cachekit.sites import run_framed
from cachekit.state import State, fresh_log, human_bytes, state_bytes
from cachekit.structure import Chain


@dataclass(frozen=True)
class Plan:
    """The actions of a whole trajectory, known before it starts."""

    computed: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.computed)

    def __str__(self) -> str:
        pattern = "".join("#" if computed else "." for computed in self.computed)
        return f"{sum(self.computed)} of {len(self)} steps computed  {pattern}"


class _Trajectory(NamedTuple):
    timesteps: Tensor  # of its states, which all hold the same tensor
    names: tuple[str, ...]  # of its sites
    layout: Layout
    times: tuple[float, ...]


def cache(model: nn.Module, policy: Policy, structure: Chain | Sequence[Chain] | None = None) -> CachedStep:
    """Make a cached step function of a model. The model itself stays untouched.

    Args:
        model: any nn.Module made of nn.ModuleList blocks. Nobody has to edit its forward.
        policy: the caching method, e.g. `first_block_cache(0.1)`.
        structure: the chains of blocks, stated by hand; None finds them in one forward on fake tensors.

    Returns:
        The step. `step.init(...)` makes a state, `step(state, ...)` returns what the model returns, and the next
        state.

    Raises:
        ArgumentTypeError: `model` is no module, `policy` no policy, `structure` no chain.
        StructureError: the model has no list of blocks.

    Example:
        A guided loop: two branches with prompts of unequal length are two states of one step, and nothing is told
        apart by the order of the calls.

        >>> import torch, cachekit as ck
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mix = torch.nn.Linear(8, 8)
        ...     def forward(self, x, text):
        ...         return x + 0.1 * self.mix(x + text.mean(1, keepdim=True))
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
        ...     def forward(self, x, t, text):
        ...         for block in self.blocks:
        ...             x = block(x, text)
        ...         return x * t
        >>> x, prompt, nothing = torch.randn(1, 6, 8), torch.randn(1, 5, 8), torch.zeros(1, 1, 8)
        >>> timesteps = torch.linspace(1, 0.1, 10)
        >>> step = ck.cache(Model(), ck.first_block_cache(0.2))
        >>> with torch.no_grad():
        ...     cond = step.init(timesteps, x, timesteps[0], prompt)
        ...     uncond = step.init(timesteps, x, timesteps[0], nothing)
        ...     for t in timesteps:
        ...         with_prompt, cond = step(cond, x, t, prompt)
        ...         without, uncond = step(uncond, x, t, nothing)
        ...         x = x - 0.1 * (without + 3.0 * (with_prompt - without))
        >>> ck.summary(cond).steps, ck.summary(uncond).steps
        (10, 10)

        Two transformers that share a trajectory (one for the noisy, one for the clean half) are two steps with
        two states; each counts the steps it runs.

        >>> high, low = (ck.cache(Model(), ck.step_mask([1, 0] * 5)) for _ in range(2))
        >>> with torch.no_grad():
        ...     states = [
        ...         high.init(timesteps[:4], x, timesteps[0], prompt),
        ...         low.init(timesteps[4:], x, timesteps[0], prompt),
        ...     ]
        ...     for i, t in enumerate(timesteps):
        ...         n = 0 if i < 4 else 1
        ...         out, states[n] = (high, low)[n](states[n], x, t, prompt)
        >>> [ck.summary(state).steps for state in states]
        [4, 6]
    """
    return CachedStep(model, policy, structure)


class CachedStep(nn.Module):
    """A model under a caching policy: made by `cache`, called as `out, state = step(state, *args, **kwargs)`.

    It runs as it is (eager), under `torch.compile(step, fullgraph=True)` and `torch.export` (one graph that
    decides inside), and as `step.compile()` (one program an action, the host picks). Use one grad mode for `init`
    and all steps of a trajectory. Flags of the model and patched forwards are followed at every step; inside a graph
    of your own, from the next `init` on.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        structure: Chain | Sequence[Chain] | None = None,
        *,
        programs: Programs | None = None,
        block_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(model, CachedStep):
            raise ArgumentTypeError(
                "`model` is a cached step already. Give cache the model itself, and another policy."
            )
        if not isinstance(policy, Policy):
            raise ArgumentTypeError(
                f"`policy` must be a Policy, got {type(policy).__name__}. Use e.g. cachekit.first_block_cache(0.1)."
            )
        several = structure if isinstance(structure, (list, tuple)) else (structure,)
        stated = tuple(chain for chain in several if isinstance(chain, Chain))
        if structure is not None and len(stated) != len(several):
            raise ArgumentTypeError(f"`structure` must be a cachekit.Chain or several, got {structure!r}.")
        self.policy = policy
        self.structure = stated
        self.opened = Opened(model, policy.front, stated, block_options, output=policy.sites == "output")
        # The shadow holds the parameters of the model under their own names.
        self.shadow = self.opened.shadow
        self._programs = programs
        self._forms: dict[tuple[str, ...], Any] = {}
        self._known: _Trajectory | None = None

    def _find(self, args: tuple, kwargs: Mapping[str, Any], device: torch.device | str | None) -> Found:
        found = self.opened.find(args, kwargs, device)
        if self.shadow is not self.opened.shadow:
            self.shadow = self.opened.shadow
        return found

    # Making states -------------------------------------------------------------------------------------------

    def init(self, timesteps: int | Sequence[float] | Tensor, /, *args, device=None, **kwargs) -> State:
        """A state for a trajectory. Nothing is computed: only shapes count.

        Args:
            timesteps: the timesteps of the trajectory, length T, or only their number.
            *args, **kwargs: the arguments of the first call of the model.
            device: where the cached tensors live; None for where the model runs.

        Returns:
            The state before step 0. Its tree, shapes, dtypes and devices stay the same at every step.

        Raises:
            ArgumentError, ArgumentTypeError: `timesteps` is no trajectory, or does not fit the policy.
            StructureError: no chain of blocks is found, or the policy has nothing to skip in it.
        """
        times = trajectory(timesteps)
        found = self._find(args, kwargs, device)
        plan, decider = self._fresh(times)
        sites, reference = {}, ()
        for span, residuals in zip(found.layout.spans, found.residuals, strict=True):
            examples = [torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) for spec in residuals]
            if span.front:
                reference = examples[span.main]
            elif found.layout.output is None:
                sites[span.name] = tuple(self.policy.forecaster.init(example) for example in examples)
        if found.layout.output is not None:
            examples = [torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) for spec in found.output]
            sites[found.layout.output.name] = tuple(self.policy.forecaster.init(example) for example in examples)
        computed, signal = fresh_log(len(times))
        state = State(
            step=torch.zeros((), dtype=torch.int64),
            timesteps=times,
            plan=plan,
            decider=decider,
            reference=reference,
            sites=sites,
            computed=computed,
            signal=signal,
        )
        self._forms[tuple(sites)] = _form_of(state)
        return _mark(state)

    def init_like(self, state: State, timesteps: int | Sequence[float] | Tensor | None = None) -> State:
        """A fresh state of the same shapes, for another image: no discovery.

        Args:
            state: any state of this step.
            timesteps: of the new trajectory; None for those of `state`.
        """
        self.check_state(state)
        times = trajectory(state.timesteps if timesteps is None else timesteps)
        plan, decider = self._fresh(times)
        computed, signal = fresh_log(len(times))
        fresh = State(
            step=torch.zeros_like(state.step),
            timesteps=times,
            plan=plan,
            decider=decider,
            reference=pytree.tree_map(torch.zeros_like, state.reference),
            sites=pytree.tree_map(torch.zeros_like, state.sites),
            computed=computed,
            signal=signal,
        )
        return _mark(fresh)

    def _fresh(self, times: Tensor) -> tuple[Any, Any]:
        if self.policy.decider.static:
            return torch.tensor(plan_of(self.policy.decider, times)), ()
        return (), self.policy.decider.init(times)

    def plan(self, timesteps: int | Sequence[float] | Tensor) -> Plan | None:
        """The actions of a trajectory where they are known beforehand, None where they depend on the data."""
        if not self.policy.decider.static:
            trajectory(timesteps)
            return None
        return Plan(plan_of(self.policy.decider, timesteps))

    def explain(self, timesteps: int | Sequence[float] | Tensor, /, *args, device=None, **kwargs) -> str:
        """What would happen, before anything runs: chains, sites, bytes of state, the plan."""
        with torch.no_grad():
            state = self.init(timesteps, *args, device=device, **kwargs)
        found = self._find(args, kwargs, device)
        rows = [f"{type(self.opened.original).__name__} under {self.policy.name}"]
        how = "a forward on fake tensors" if found.faked else "one real forward (it branches on data or is patched)"
        rows.append(f"found by {how}: {len(found.chains)} chains")
        rows.append(f"leading chain: {found.leader} ({found.reason})")
        rows += [f"always runs: {entry}" for entry in found.left]
        rows.append(f"{'site':<58} {'blocks':>6} {'streams':>7} {'state':>10}")
        spans = [span for span in found.layout.spans if span.front or found.layout.output is None]
        for span in spans:
            held = state.reference if span.front else state.sites[span.name]
            name = f"{span.name} (probe, always runs)" if span.front else span.name
            size = human_bytes(state_bytes(held))
            rows.append(f"{name:<58} {len(span.paths):>6} {1 if span.front else len(span.streams):>7} {size:>10}")
        if found.layout.output is not None:
            name = found.layout.output.name
            held = state.sites[name]
            rows.append(f"{name:<58} {'-':>6} {len(held):>7} {human_bytes(state_bytes(held)):>10}")
        rows.append(f"total state: {human_bytes(state_bytes(state))} ({state_bytes(state)} bytes)")
        plan = self.plan(timesteps)
        rows.append(f"plan: {plan}" if plan else f"plan: none, decided step by step ({self.policy.decider.name})")
        return "\n".join(rows)

    # Running -------------------------------------------------------------------------------------------------

    def forward(self, state: State, /, *args, **kwargs) -> tuple[Any, State]:
        """One denoising step: exactly what the model returns, and the next state. `state` is not changed.

        Raises:
            StateError: the trajectory is over, or the state was made for other shapes, dtypes or devices.
            StructureError: a module was replaced since `init`, or the forward took another way.
        """
        if torch.compiler.is_compiling():
            return self._in_graph(state, args, kwargs)
        return self._on_host(state, args, kwargs)

    def _on_host(self, state: State, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, State]:
        known = self._trajectory(state)
        self.opened.follow()
        index, steps = int(state.step), len(known.times)
        if index >= steps:
            raise StateError(
                f"The state has done all {steps} of its timesteps. Start another trajectory with step.init or "
                "step.init_like."
            )
        moment = Moment(index, known.times[index], steps, Sums(math.nan, math.nan))
        if self._programs is not None:
            return self._programs.run(self, state, moment, args, kwargs)
        return self.run_eagerly(known.layout, state, moment, args, kwargs)

    def run_eagerly(
        self, layout: Layout, state: State, moment: Moment, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, State]:
        """One step without a compiler, decided on the way."""
        frame = self.frame(EAGER, layout, state.sites, state.reference, self.clock(state))
        frame["compute"] = self.verdict(state, moment) if not self.policy.probed else None
        frame["decide"] = lambda sums: self.verdict(state, moment._replace(signal=numbers(torch.stack(sums))))
        out = run_framed(frame, self.shadow, args, kwargs)
        check_reached(frame)
        sums = torch.stack(frame["sums"]) if frame["sums"] is not None else None
        return out, self.advance(state, moment, bool(frame["compute"]), frame["updated"], frame["residual"], sums)

    def verdict(self, state: State, moment: Moment) -> bool:
        """Whether this step computes. Step 0 does: nothing is cached yet."""
        if self.policy.decider.static:
            return bool(state.plan[moment.step])
        return moment.step == 0 or bool(self.policy.decider.decide(state.decider, moment))

    def advance(self, state: State, moment: Moment, computed: bool, updated, residual, sums) -> State:
        """The next state, on the host. Only what changed is new."""
        if sums is not None:
            moment = moment._replace(signal=numbers(sums))
        decider = state.decider
        if not self.policy.decider.static:
            decider = self.policy.decider.update(state.decider, moment, computed)
        # On small models every operator here is felt. A fresh log says "computed" and NaN already.
        signal = ratio(moment.signal)
        return State(
            step=state.step + 1,
            timesteps=state.timesteps,
            plan=state.plan,
            decider=decider,
            reference=residual if computed and residual is not None else state.reference,
            sites={**state.sites, **updated},
            computed=state.computed if computed else state.computed.index_fill(0, state.step, False),
            signal=state.signal if math.isnan(signal) else state.signal.index_fill(0, state.step, signal),
        )

    def layout(self, names: tuple[str, ...]) -> Layout:
        """The layout whose sites have these names."""
        return self.opened.layouts[names]

    def _in_graph(self, state: State, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, State]:
        layout = self.layout(tuple(state.sites))
        steps = state.timesteps.shape[0]
        torch.ops.aten._assert_async.msg(
            state.step < steps, "The state has done all of its timesteps. Start another trajectory with step.init."
        )
        self.opened.prepare_trace()
        nan = torch.full((), math.nan, dtype=torch.float64)
        moment = Moment(
            step=state.step,
            timestep=take(state.timesteps, state.step),
            steps=torch.full((), steps, dtype=torch.int64),
            signal=Sums(nan, nan),
        )
        policy = self.policy
        frame = self.frame(GRAPH, layout, state.sites, state.reference, self.clock(state))
        if policy.decider.static:
            frame["compute"] = take(state.plan, state.step)

        def decide(sums):
            seen = moment._replace(signal=_tensors(sums))
            return (state.step == 0) | policy.decider.decide(state.decider, seen)

        frame["decide"] = decide
        out = run_framed(frame, self.shadow, args, kwargs)
        check_reached(frame)
        computed = frame["compute"]
        if frame["sums"] is not None:
            moment = moment._replace(signal=_tensors(frame["sums"]))
        decider, reference = state.decider, state.reference
        if not policy.decider.static:
            decider = policy.decider.update(state.decider, moment, computed)
        if self.policy.front:
            residual = frame["residual"]
            reference = torch.where(computed.to(residual.device), residual, state.reference)
        at = (state.step.reshape(1),)
        signal = ratio(moment.signal)
        return out, State(
            step=state.step + 1,
            timesteps=state.timesteps,
            plan=state.plan,
            decider=decider,
            reference=reference,
            sites={**state.sites, **frame["updated"]},
            computed=state.computed.index_put(at, computed.reshape(1)),
            signal=state.signal.index_put(at, signal.reshape(1)),
        )

    def frame(self, mode: str, layout: Layout, sites, reference, now, carried=None, early=None) -> Frame:
        """All that the sites need during one call."""
        policy = self.policy
        return {
            "mode": mode,
            "layout": layout,
            "blocks": self.opened.blocks,
            "forecaster": policy.forecaster,
            "signal": policy.signal,
            "entered": True,
            "observe": policy.signal is not None and not policy.front,
            "sites": sites,
            "reference": reference,
            "now": now,
            "carried": carried,
            "early": early if early is not None else {},
            "residual": None,
            "compute": None,
            "sums": None,
            "updated": {},
            "counts": {},
            "calls": {},
            "handed": {},
        }

    def clock(self, state: State) -> Tensor | None:
        """The step as forecasters see it: float32, where the cached tensors are."""
        if not self.policy.forecaster.timed:
            return None
        first = pytree.tree_leaves(state.sites)[0]
        return state.step.to(device=first.device, dtype=torch.float32)

    def check_state(self, state: State) -> Layout:
        """The layout a state belongs to, or an error that says why it does not belong to this step."""
        if not isinstance(state, State):
            raise ArgumentTypeError(
                f"`state` must be a cachekit State, got {type(state).__name__}. Make one with "
                "step.init(timesteps, ...), then call step(state, ...)."
            )
        layout = self.opened.layouts.get(tuple(state.sites))
        if layout is None:
            raise StateError(
                f"`state` has the sites {list(state.sites)}, this step knows {list(self.opened.layouts)}. "
                "Call step.init once with the arguments of the model, also before a state that was saved is used."
            )
        if self._forms.get(tuple(state.sites), _form_of(state)) != _form_of(state):
            raise StateError(f"`state` was made under another policy than {self.policy.name}. Use its own step.")
        return layout

    def _trajectory(self, state: State) -> _Trajectory:
        """What the steps of one trajectory have in common, looked up once: they pass the same timesteps on."""
        known = self._known
        if (
            known is None
            or not isinstance(state, State)
            or known.timesteps is not state.timesteps
            or known.names != tuple(state.sites)
        ):
            layout = self.check_state(state)
            known = _Trajectory(state.timesteps, tuple(state.sites), layout, tuple(state.timesteps.tolist()))
            self._known = known
        return known

    # Compiling and exporting ---------------------------------------------------------------------------------

    def compile(self, *, regional: bool = False, **torch_compile_kwargs) -> CachedStep:  # type: ignore[override]
        """A new step that runs compiled; this one stays as it is.

        One program an action, each a full graph: the host picks. A policy with front blocks has three (probe,
        compute, reuse), one without has two. Nothing recompiles from step to step, from trajectory to trajectory
        or with another number of steps.

        Args:
            regional: compile every distinct class of block once instead and leave the glue eager: a large model
                compiles several times faster this way.
            **torch_compile_kwargs: for torch.compile, e.g. `mode="max-autotune"`. `fullgraph` is on.

        Example:
            >>> import torch, cachekit as ck
            >>> class Model(torch.nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
            ...     def forward(self, x):
            ...         for block in self.blocks:
            ...             x = block(x)
            ...         return x
            >>> step = ck.cache(Model(), ck.step_mask([1, 0, 1])).compile(backend="eager")
            >>> with torch.no_grad():
            ...     state = step.init(3, torch.ones(1, 2, 4))
            ...     for _ in range(3):
            ...         out, state = step(state, torch.ones(1, 2, 4))
            >>> ck.summary(state).computed
            (True, False, True)
        """
        options = {"fullgraph": True, **torch_compile_kwargs}
        programs, block_options = (None, options) if regional else (Programs(options), None)
        made = CachedStep(
            self.opened.original, self.policy, self.structure, programs=programs, block_options=block_options
        )
        made.opened.layouts.update(self.opened.layouts)
        made._forms.update(self._forms)
        return made

    def export(self, path, state: State, /, *args, **kwargs) -> None:
        """Package the step, decision and all, with AOTInductor. See `cachekit.packaging.export`."""
        from cachekit.packaging import export

        export(self, path, state, args, kwargs)

    def extra_repr(self) -> str:
        """The policy, beside the shadow, when printed."""
        return self.policy.name


def _form_of(state: State) -> Any:
    """What kind of state it is: that of another policy is of another form."""
    return _form((state.plan, state.decider, state.reference, next(iter(state.sites.values()))))


def _form(tree: Any) -> Any:
    return (type(tree), *map(_form, tree)) if isinstance(tree, tuple) else None


def _tensors(sums) -> Sums:
    both = torch.stack(tuple(sums)).to(device="cpu", dtype=torch.float64)
    return Sums(both[0], both[1])


def _mark(state: State) -> State:
    """Let the length of the trajectory be dynamic, so that another number of steps is the same graph."""
    for log in (state.timesteps, state.computed, state.signal, *pytree.tree_leaves((state.plan, state.decider))):
        if log.ndim == 1 and len(log) > 1:
            torch._dynamo.maybe_mark_dynamic(log, 0)
    return state
