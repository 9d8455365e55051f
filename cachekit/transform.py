"""The transform: a model and a policy become a pure step function over an explicit state."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from cachekit.deciders import Moment, Sums
from cachekit.deciders import plan as plan_of
from cachekit.deciders._decider import begin, needs_numbers, ratio, trajectory
from cachekit.errors import ArgumentError, ArgumentTypeError, StateError, StructureError
from cachekit.explain import Explanation, explanation
from cachekit.forecasters import Clock
from cachekit.forecasters._forecaster import check_forecaster
from cachekit.guidance import GUIDANCE, Answered, GuidanceState, unanswered
from cachekit.planning.recording import fresh_record
from cachekit.plans import Plan
from cachekit.policy import Policy
from cachekit.running import eager, graph
from cachekit.running.arithmetic import arithmetic
from cachekit.running.frames import Frame
from cachekit.running.opening import Opened
from cachekit.running.programs import Programs, captures
from cachekit.signals import check_signal
from cachekit.state import State, fresh_log
from cachekit.structure.chains import Chain
from cachekit.structure.layout import ALL, Found, Layout, Output, Span
from cachekit.structure.record import TensorSpec


class _Trajectory(NamedTuple):
    epoch: int  # of the modules it was begun with
    timesteps: Tensor  # of its states, which all hold the same tensor
    names: tuple[str, ...]  # of its sites
    layout: Layout
    times: tuple[float, ...]


def cache(
    model: nn.Module, policy: Policy, structure: Chain | Sequence[Chain] | None = None, *, donate: bool = False
) -> CachedStep:
    """Make a cached step function of a model. The model itself stays untouched.

    Args:
        model: any nn.Module made of nn.ModuleList blocks. Nobody has to edit its forward.
        policy: the caching method, e.g. `first_block_cache(0.1)`.
        structure: the chains of blocks, stated by hand; None finds them in one forward on fake tensors.
        donate: write what is remembered into the memory of the state that is given, which is not to be used again:
            half the memory at the moment a step ends. After an exception in the midst of a step it is lost.

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
    return CachedStep(model, policy, structure, donate=donate)


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
        donate: bool = False,
        programs: Programs | None = None,
        block_options: dict[str, Any] | None = None,
        opened: Opened | None = None,
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
        self.donate = donate
        self.structure = stated
        self.opened = opened or Opened(
            model,
            policy.front,
            stated,
            block_options,
            sites=policy.sites,
            groups=policy.groups,
            guided=policy.guidance is not None,
            recorded=policy.recorded,
        )
        plain = arithmetic(policy)
        self.arithmetic = plain if block_options is None else plain.compiled(block_options)
        # The shadow holds the parameters of the model under their own names.
        self.shadow = self.opened.shadow
        self._programs = programs
        self._compiled_with: dict[str, Any] | None = None
        self._forms: dict[tuple[str, ...], Any] = {}
        self._known: _Trajectory | None = None
        self._tried: set[Any] = set()  # on which forms of values the parts of the policy were tried
        self.branching: str | None = None  # why its decider can be in no graph
        self._begun = WeakIdKeyDictionary()  # timesteps of a trajectory begun here -> epoch of the modules

    def _find(self, args: tuple, kwargs: Mapping[str, Any], device: torch.device | str | None) -> Found:
        if self._programs is not None:
            self.opened.check_compilable()
        if self.policy.guidance is not None and not self.policy.guidance.separate:
            found = self._find_half(args, kwargs, device)
        else:
            found = self.opened.find(args, kwargs, device)
        if self.shadow is not self.opened.shadow:
            self.shadow = self.opened.shadow
        return found

    def _find_half(self, args: tuple, kwargs: Mapping[str, Any], device: torch.device | str | None) -> Found:
        assert self.policy.guidance is not None
        half, named = self.policy.guidance.halves(args, kwargs)[1]
        try:
            return self.opened.find(half, named, device)
        except StructureError as error:
            if error.forward is None:
                raise
            self.opened.find(args, kwargs, device)  # says what is wrong with the arguments themselves, if anything is
            raise StructureError(
                "With batched guidance the model is called, on some steps, with the conditional half of the batch "
                f"alone, and its forward fails on that: {error.forward}. It keeps something of a whole batch from call "
                "to call, or an argument of it has no entry a sample. Use cfg=None: both halves are then computed."
            ) from error

    def train(self, mode: bool = True) -> CachedStep:
        """Set the training mode of the model, with whose modules the step computes."""
        self.opened.original.train(mode)
        return super().train(mode)

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
        self.opened.begin()
        state = self._allocate(found, times)
        self._forms[tuple(state.sites)] = _form_of(state)
        self._begun[state.timesteps] = self.opened.epoch
        return _mark(state)

    def _allocate(self, found: Found, times: Tensor, mode: AbstractContextManager[Any] | None = None) -> State:
        """The state before step 0; what is remembered of the model is made under `mode`."""
        plan, decider = self._fresh(times, found.layout)
        self._try(found, decider)
        weights: Any = self._weights(times, plan) if found.layout.guided is not None else ()
        computed, signal = fresh_log(len(times))
        with mode or nullcontext():
            sites = {
                site.name: self._remembered(site, [_zeros(spec) for spec in specs], len(times))
                for site, specs in zip(found.layout.sites, found.specs, strict=True)
                if site is not found.layout.guided
            }
            if found.layout.guided is not None:
                sites[found.layout.guided.name] = self._guide(_zeros(found.specs[-1][0]), *weights)
            reference = _zeros(found.reference) if found.reference is not None else ()
        return State(
            step=torch.zeros((), dtype=torch.int64),
            timesteps=times,
            plan=plan,
            decider=decider,
            reference=reference,
            sites=sites,
            computed=computed,
            signal=signal,
        )

    def init_like(self, state: State, timesteps: int | Sequence[float] | Tensor | None = None) -> State:
        """A fresh state of the same shapes, for another image: no discovery.

        Args:
            state: any state of this step.
            timesteps: of the new trajectory; None for those of `state`.
        """
        layout = self.check_state(state)
        self.opened.begin()
        times = trajectory(state.timesteps if timesteps is None else timesteps)
        plan, decider = self._fresh(times, layout)
        computed, signal = fresh_log(len(times))
        sites = pytree.tree_map(torch.zeros_like, state.sites)
        if layout.recorded:  # as long as the trajectory
            sites = {
                site.name: self._remembered(site, [each.last for each in state.sites[site.name]], len(times))
                for site in layout.sites
            }
        guided = layout.guided
        if guided is not None:
            (before,) = state.sites[guided.name]
            sites[guided.name] = self._guide(before.low.to(guided.dtypes[0]), *self._weights(times, plan))
        fresh = State(
            step=torch.zeros_like(state.step),
            timesteps=times,
            plan=plan,
            decider=decider,
            reference=pytree.tree_map(torch.zeros_like, state.reference),
            sites=sites,
            computed=computed,
            signal=signal,
        )
        self._begun[fresh.timesteps] = self.opened.epoch
        return _mark(fresh)

    def _remembered(self, site: Span | Output, values: Sequence[Tensor], steps: int) -> tuple[Any, ...]:
        """What a site remembers before step 0, of values like these."""
        if not self.policy.recorded:
            return tuple(self.policy.forecaster.init(value) for value in values)
        main = site.main if isinstance(site, Span) and len(values) > 1 else 0
        return tuple(fresh_record(value, steps, self.policy.sketch, main=n == main) for n, value in enumerate(values))

    def _try(self, found: Found, decider: Any) -> None:
        """Try the parts that users may have written on the forms that they will meet, once a form.

        Args:
            found: of the model.
            decider: state of the decider before step 0.
        """
        policy, forms = self.policy, (found.specs, found.reference)
        if forms in self._tried:
            return
        specs = list(dict.fromkeys(itertools.chain.from_iterable(found.specs)))
        for spec in specs if not policy.recorded else ():
            check_forecaster(policy.forecaster, *spec)
        measured = found.reference or next(iter(specs), None)
        if policy.signal is not None and measured is not None:
            check_signal(policy.signal, *measured)
        if not policy.static:
            self.branching = needs_numbers(policy.deciders[ALL], decider)
        self._tell_lost(found.layout)
        self._tried.add(forms)

    def _tell_lost(self, layout: Layout) -> None:
        """Say which kinds of modules have a decision of their own, and are not in the model."""
        deciders = self.policy.decider
        if not isinstance(deciders, Mapping):
            return
        found = self._groups([layout])
        decides = {id(deciders.get(group)) for group in found}  # of one that is for several kinds, some may be missing
        lost = [group for group, decider in deciders.items() if group not in found and id(decider) not in decides]
        if lost:
            warnings.warn(
                f"`policy` {self.policy.name!r} decides about {', '.join(lost)}, and no block of "
                f"{type(self.opened.original).__name__} has that: it has {', '.join(found)}.",
                stacklevel=4,
            )

    def _fresh(self, times: Tensor, layout: Layout) -> tuple[Any, Any]:
        policy = self.policy
        if not policy.static:
            return (), begin(policy.deciders[ALL], times)
        decider = unanswered() if policy.guidance is not None and policy.guidance.separate else ()
        plans = {group: torch.tensor(plan_of(policy.deciders[group], times)) for group in self._groups([layout])}
        return (plans if policy.grouped else plans[ALL]), decider

    def _groups(self, layouts: Iterable[Layout]) -> list[str]:
        """Whose decisions matter: of a kind that no module of the model is of nobody asks."""
        found = {site.group for layout in layouts for site in layout.sites if isinstance(site, Output)}
        return [group for group in self.policy.deciders if group in found or not self.policy.grouped]

    def _weights(self, times: Tensor, plan: Any) -> tuple[Any, Any]:
        return times.tolist(), plan[GUIDANCE].tolist()

    def _guide(self, cond: Tensor, times: list[float], computed: list[bool]) -> tuple[Any]:
        guidance = self.policy.guidance
        assert guidance is not None
        return (guidance.init(cond, times, computed),)

    def plan(self, timesteps: int | Sequence[float] | Tensor) -> Plan | None:
        """The actions of a trajectory where they are known beforehand, None where they depend on the data.

        Once there has been an `init`, of those kinds of modules alone that the model has.
        """
        if not self.policy.static:
            trajectory(timesteps)
            return None
        groups = self._groups(self.opened.layouts.values()) if self.opened.layouts else [*self.policy.deciders]
        plans = {group: plan_of(self.policy.deciders[group], timesteps) for group in groups}
        return Plan(tuple(map(all, zip(*plans.values(), strict=True))), plans if self.policy.grouped else {})

    def explain(self, timesteps: int | Sequence[float] | Tensor, /, *args, device=None, **kwargs) -> Explanation:
        """What would happen, before anything runs: chains, sites, bytes of state, the plan.

        The state is not allocated, and no weights are needed: the model may be on the `meta` device. The arguments say
        where it would run.
        """
        times = trajectory(timesteps)
        found = self._find(args, kwargs, device)
        with torch.no_grad():
            state = self._allocate(found, times, FakeTensorMode(allow_non_fake_inputs=True))
        return explanation(self, found, state, self.plan(timesteps))

    # Running -------------------------------------------------------------------------------------------------

    def forward(self, state: State, /, *args, **kwargs) -> tuple[Any, State]:
        """One denoising step: exactly what the model returns, and the next state. `state` is not changed, unless it is
        given away (`donate`).

        Raises:
            StateError: the trajectory is over, or the state was made for other shapes, dtypes or devices.
            StructureError: a module was replaced since `init`, or the forward took another way.
        """
        if torch.compiler.is_compiling():
            return graph.run(self, state, args, kwargs)
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
        return eager.run(self, known.layout, state, moment, args, kwargs)

    def uncond(self, state: State, /, *args, **kwargs) -> tuple[Any, State]:
        """The unconditional call of a step, after its conditional one: for `faster_cache(cfg="separate")`.

        Args:
            state: what `step(state, ...)` has just returned for the conditional arguments.
            *args, **kwargs: the unconditional arguments.

        Returns:
            What the model returns for them, or an answer from the conditional output; and the next state.

        Raises:
            ArgumentError: the policy has no unconditional call of its own.
            StateError: no conditional call came before, or the state was made for other shapes.
        """
        guidance = self.policy.guidance
        if guidance is None or not guidance.separate:
            raise ArgumentError(
                f'`uncond` is for policies with a call of its own for the unconditional half, cfg="separate"; '
                f"{self.policy.name} has none. Call step(state, ...)."
            )
        if torch.compiler.is_compiling():
            out, answered, updated = graph.uncond(self, state, args, kwargs)
            return out, _answered(state, answered, updated)
        layout, index = self._trajectory(state).layout, int(state.step) - 1
        self.opened.follow()
        last, full = (int(step) for step in state.decider)
        if index <= last:
            raise StateError(
                "`state` has done no step since its last unconditional call. Call step(state, ...) with the "
                "conditional arguments first, and give uncond the state that it returns."
            )
        plan = state.plan[GUIDANCE].tolist()
        # Where the call of the last full step was left out there is nothing to answer from.
        computed = full < max(step for step in range(index + 1) if plan[step])
        now, run = self.clock(state, state.step - 1), eager.uncond if self._programs is None else self._programs.uncond
        out, updated = run(self, layout, state, {GUIDANCE: plan[index] or computed}, now, args, kwargs)
        done = state.step - 1
        answered = Answered(done, done.clone() if plan[index] or computed else state.decider.full)
        return out, _answered(state, answered, updated)

    def planned(self, state: State, index: int) -> dict[str, bool]:
        """What a static policy does at a step: group of sites -> whether it computes."""
        return {group: bool(plan[index]) for group, plan in self.plans(state).items()}

    def plans(self, state: State) -> dict[str, Tensor]:
        """The plans of a state of a static policy, by group of sites."""
        return state.plan if self.policy.grouped else {ALL: state.plan}

    def verdict(self, state: State, moment: Moment) -> bool:
        """What a policy that looks at a signal does. Step 0 computes: nothing is cached yet."""
        return moment.step == 0 or bool(self.policy.deciders[ALL].decide(state.decider, moment))

    def advance(self, state: State, moment: Moment, computed: bool, updated, residual) -> State:
        """The next state, on the host. Only what changed is new."""
        decider = state.decider
        if not self.policy.static:
            decider = self.policy.deciders[ALL].update(state.decider, moment, computed)
        reference = residual if computed and residual is not None else state.reference
        if self.donate and reference is not state.reference:
            reference = state.reference.copy_(reference)
        # On small models every operator here is felt. A fresh log says "computed" and NaN already.
        signal = ratio(moment.signal)
        return State(
            step=state.step + 1,
            timesteps=state.timesteps,
            plan=state.plan,
            decider=decider,
            reference=reference,
            sites={**state.sites, **updated},
            computed=state.computed if computed else state.computed.index_fill(0, state.step, False),
            signal=state.signal if math.isnan(signal) else state.signal.index_fill(0, state.step, signal),
        )

    def layout(self, names: tuple[str, ...]) -> Layout:
        """The layout whose sites have these names."""
        return self.opened.layouts[names]

    def frame(self, mode: str, layout: Layout, sites, reference, now, carried=None, early=None) -> Frame:
        """All that the sites need during one call."""
        policy = self.policy
        return {
            "mode": mode,
            "layout": layout,
            "local": False,
            "blocks": self.opened.blocks,
            "forecaster": policy.forecaster,
            "arithmetic": self.arithmetic,
            "guidance": policy.guidance,
            "original": self.opened.original,
            "full": False,
            "donate": self.donate and not (self._programs is not None and self._programs.replayed),
            "entered": True,
            "observe": policy.signal is not None and not policy.front,
            "sites": sites,
            "reference": reference,
            "now": now,
            "carried": carried,
            "early": early if early is not None else {},
            "residual": None,
            "tapped": None,
            "compute": {},
            "sums": None,
            "updated": {},
            "counts": {},
            "passed": {},
            "calls": {},
            "handed": {},
        }

    def clock(self, state: State, step: Tensor | None = None) -> Clock | None:
        """The time as forecasters see it, where the cached tensors are."""
        if not self.policy.forecaster.timed and self.policy.guidance is None:
            return None
        device = pytree.tree_leaves(state.sites)[0].device
        step = state.step if step is None else step
        if torch.compiler.is_compiling():
            now = step.to(device=device, dtype=torch.float32, non_blocking=True)
        else:  # a copy would wait for the device
            now = torch.full((), int(step), dtype=torch.float32, device=device)
        return Clock(
            step=now,
            steps=torch.full((), state.timesteps.shape[0], dtype=torch.float32, device=device),
        )

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
            epoch: int = self._begun.get(state.timesteps, self.opened.epoch)  # type: ignore[assignment]  # loaded: go on
            known = _Trajectory(epoch, state.timesteps, tuple(state.sites), layout, tuple(state.timesteps.tolist()))
            self._known = known
        if known.epoch != self.opened.epoch:
            raise StructureError(
                "Modules of the model were added, removed or replaced since this trajectory began. Begin another with "
                "step.init or step.init_like."
            )
        return known

    # Compiling and exporting ---------------------------------------------------------------------------------

    def compile(self, *, regional: bool = False, **torch_compile_kwargs) -> CachedStep:  # type: ignore[override]
        """A new step that runs compiled; this one stays as it is.

        One program an action, each a full graph: the host picks. A policy with front blocks has three (probe,
        compute, reuse), one without has two. Nothing recompiles from step to step, from trajectory to trajectory
        or with another number of steps.

        Args:
            regional: compile every distinct class of block once instead, and the arithmetic of the policy, and leave
                the glue eager: a large model compiles several times faster this way.
            **torch_compile_kwargs: for torch.compile, e.g. `mode="max-autotune"`. `fullgraph` is on. With
                `mode="reduce-overhead"` every program is a CUDA graph, and what outlives a step is copied out of it.

        Raises:
            ArgumentError: CUDA graphs with `regional`.

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
        if regional and captures(options):
            raise ArgumentError(
                "`regional=True` compiles many small graphs, each of which would be captured, and copied into, alone. "
                'For CUDA graphs use step.compile(mode="reduce-overhead"); here mode="max-autotune-no-cudagraphs".'
            )
        programs, block_options = (None, options) if regional else (Programs(options), None)
        made = CachedStep(
            self.opened.original,
            self.policy,
            self.structure,
            donate=self.donate,
            programs=programs,
            block_options=block_options,
            opened=None if regional else self.opened,
        )
        made.opened.layouts.update(self.opened.layouts)
        made._forms.update(self._forms)
        made._compiled_with = {"regional": regional, **torch_compile_kwargs}
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedStep:
        """The same step of a copy of the model, compiled if this one is. Begin with its own `init`."""
        model = copy.deepcopy(self.opened.original, memo)
        made = CachedStep(model, self.policy, self.structure, donate=self.donate)
        if self._compiled_with is not None:
            made = made.compile(**self._compiled_with)
        made.training = self.training
        return memo.setdefault(id(self), made)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentTypeError(
            "A cached step cannot be pickled or copied without its model: its policy holds functions. Save the weights "
            "of the model, and its states with torch.save, and make the step again with cachekit.cache; for a step of "
            "a copy of the model use copy.deepcopy."
        )

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


def _answered(state: State, answered: Answered, updated: dict[str, Any]) -> State:
    kept = {name: getattr(state, name) for name in State._fields if name not in ("decider", "sites")}
    return State(decider=answered, sites={**state.sites, **updated}, **kept)


def _zeros(spec: TensorSpec) -> Tensor:
    return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)


def _mark(state: State) -> State:
    """Let the length of the trajectory be dynamic, so that another number of steps is the same graph."""
    logs = [state.timesteps, state.computed, state.signal, *pytree.tree_leaves((state.plan, state.decider))]
    logs += [kept.weights for site in state.sites.values() for kept in site if isinstance(kept, GuidanceState)]
    for log in logs:
        if log.ndim >= 1 and len(log) > 1:
            torch._dynamo.maybe_mark_dynamic(log, 0)
    return state
