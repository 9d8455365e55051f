"""The caller decides, at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from cachekit import deciders, forecasters
from cachekit.errors import ArgumentError, ArgumentTypeError, StateError
from cachekit.forecasters import Forecaster
from cachekit.methods._first_block import check_forecaster
from cachekit.policy import Policy
from cachekit.state import State
from cachekit.structure.parts import Sites


def by_hand(*, forecaster: Forecaster | None = None, sites: Sites = "chain") -> Policy:
    """Compute every step, unless `decide` said otherwise of it: the decision comes from outside.

    Args:
        forecaster: what to return instead of computing; None repeats the last value.
        sites: what is left out, as for `Policy`.

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
        >>> step = ck.cache(Model(), ck.by_hand())
        >>> with torch.no_grad():
        ...     state = step.init(4, torch.ones(1, 2, 4))
        ...     for battery_is_low in (False, False, True, False):
        ...         state = ck.decide(state, compute=not battery_is_low)
        ...         out, state = step(state, torch.ones(1, 2, 4))
        >>> ck.summary(state).computed
        (True, True, False, True)
    """
    check_forecaster(forecaster)
    forecaster = forecaster or forecasters.hold()
    return Policy(
        name=f"by_hand({forecaster.name}{', output' if sites == 'output' else ''})",
        decider=deciders.always()._replace(name="by hand: compute unless told otherwise"),
        forecaster=forecaster,
        sites=sites,
    )


def decide(state: State, compute: bool | Tensor) -> State:
    """The same state, with a decision on the step that comes next. A plan that is known beforehand can be overruled so.

    Step 0 computes whatever is decided: nothing is cached yet.

    Args:
        state: of a policy whose decisions are known beforehand: `by_hand`, or e.g. `step_mask`, `planned`,
            `mag_cache`, `taylorseer`. It stays as it is.
        compute: True to compute the next step; inside a graph a 0-d tensor of bool.

    Raises:
        ArgumentTypeError: `state` is no state, `compute` no bool.
        ArgumentError: the policy of the state decides by a signal, or by kind of module.
        StateError: the trajectory is over.
    """
    if not isinstance(state, State):
        raise ArgumentTypeError(f"`state` must be a cachekit State, got {type(state).__name__}. step.init makes one.")
    tensor = isinstance(compute, Tensor) and compute.dtype == torch.bool and compute.ndim == 0
    if not tensor and not isinstance(compute, bool):
        raise ArgumentTypeError(f"`compute` must be a bool, or a 0-d tensor of bool, got {compute!r}.")
    if not isinstance(state.plan, Tensor):
        raise ArgumentError(
            "`state` has no plan that could be overruled: its policy decides by a signal, or for each kind of module "
            "by itself. Use cachekit.by_hand()."
        )
    if not torch.compiler.is_compiling() and int(state.step) >= len(state.plan):
        raise StateError(f"`state` has done all {len(state.plan)} of its timesteps, so there is nothing to decide.")
    verdict = torch.as_tensor(compute, device=state.plan.device) | (state.step == 0)
    return state._replace(plan=state.plan.index_put((state.step.reshape(1),), verdict.reshape(1)))
