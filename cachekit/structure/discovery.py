"""One forward, recorded: which blocks were called in which order, and what flowed between them.

The forward runs on fake tensors, on a fake copy of the model: no compute, no memory, and nothing that the model
caches while it runs (rotary tables, say) is left behind on the original. A model whose forward branches on data
cannot run so; then one real forward is recorded instead.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree

from cachekit.errors import CacheError, StructureError
from cachekit.running.frames import RECORD, REPLAY, Frame, check_reached, framed
from cachekit.running.shadow import PATCHED, early_paths, stands
from cachekit.running.sites import EarlySite, run_framed
from cachekit.structure.layout import Layout
from cachekit.structure.numbering import Numbering, version_of
from cachekit.structure.record import Leaf, Record
from cachekit.structure.recorder import Recorder

Discovery: TypeAlias = tuple[Record, Callable[[Layout], bool]]


def discover(
    model: nn.Module, paths: Sequence[str], parts: Sequence[str], args: tuple, kwargs: Mapping[str, Any], device
) -> Discovery:
    """Record the forward of `model(*args, **kwargs)` with the blocks `paths`, and `parts` in or beside them.

    The model is left as it was. Beside the record comes a function that tells of a layout whether a step under it
    computes what the model does; of a model that has to be run for real it is not asked.
    """
    if any(_patched(module) for module in model.modules()):
        # What a patched forward closes over cannot be copied safely.
        return _real(model, paths, parts, args, kwargs)
    try:
        return _fake(model, paths, parts, args, kwargs, device)
    except CacheError:
        raise
    except Exception as fake_error:  # whatever a forward does that fake tensors cannot follow
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise StructureError(
                f"{type(model).__name__} must run once for real, which fake tensors cannot follow "
                f"({type(fake_error).__name__}: {fake_error}), and its weights are on the meta device. Load them "
                "first, or look at a tiny model of the class."
            ) from fake_error
        try:
            return _real(model, paths, parts, args, kwargs)
        except CacheError:
            raise
        except Exception as error:
            raise StructureError(
                f"The model's forward failed on the arguments given to init: {type(error).__name__}: {error}. "
                "Give init the arguments of the first real call."
            ) from (error if type(error) is not type(fake_error) else fake_error)


def _patched(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own that is not a mere wrapper around that of its class."""
    if "forward" not in module.__dict__:
        return False
    return getattr(module.__dict__.get("_old_forward"), "__func__", None) is not type(module).forward


def _fake(model, paths, parts, args, kwargs, device) -> Discovery:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in memo or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            continue
        with mode:
            # On the device it runs on, wherever an offloader keeps it meanwhile.
            fake = torch.empty_strided(tuple(tensor.shape), _strides(tensor), dtype=tensor.dtype, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    with FakeCopyMode(mode):
        twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        # A hook that moves weights between devices has nothing to move here.
        for name in PATCHED:
            module.__dict__.pop(name, None)
    fake_args, fake_kwargs = _replaced(lambda value: mode.from_tensor(value, static_shapes=True), args, kwargs)
    with mode:
        record = _record(twin, paths, parts, fake_args, fake_kwargs, faked=True)

    def same(layout: Layout) -> bool:
        with mode:
            return _same(twin, paths, layout, fake_args, fake_kwargs)

    return record, same


def _real(model, paths, parts, args, kwargs) -> Discovery:
    # On copies: a forward may write to what it is given, and autograd may not follow what inference mode has made.
    copied_args, copied_kwargs = _replaced(lambda value: value.detach().clone(), args, kwargs)
    return _record(model, paths, parts, copied_args, copied_kwargs, faked=False), lambda layout: True


def _replaced(make: Callable[[Tensor], Tensor], args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with other tensors, the same one wherever it was the same."""
    made: dict[int, Tensor] = {}

    def replace(value):
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = make(value)
        return made[id(value)]

    with torch.inference_mode(False):
        return pytree.tree_map(replace, (args, dict(kwargs)))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()) if tensor.layout is torch.strided else tuple(torch.empty(tensor.shape).stride())


def _record(model, paths, parts, args, kwargs, *, faked: bool) -> Record:
    beside = early_paths(model, paths)
    twin = stands(model, paths, beside, parts)
    sites = {site._path: site for site in twin.sites if isinstance(site, EarlySite)}
    recorder = Recorder(_inputs(model, args, kwargs))
    held = _held(model, args, kwargs)
    before = {path: _attributes(model, sites, path) for path in beside}
    given = {key: recorder.node(value) for key, value in (*enumerate(args), *kwargs.items())}
    with torch.inference_mode(False), torch.no_grad(), recorder, framed({"mode": RECORD, "recorder": recorder}):
        out = twin.root(*args, **kwargs)
    leaves, treespec = pytree.tree_flatten(out)
    outs = tuple(recorder.node(leaf) for leaf in leaves)
    untouched = {path for path in beside if _attributes(model, sites, path) == before[path]}
    early = tuple(
        call._replace(pure=pure and call.path in untouched)
        for call, pure in zip(recorder.early, recorder.untouched(), strict=True)
    )
    recorder.read |= {leaf.token for leaf in outs if isinstance(leaf, Leaf)}
    return Record(
        calls=tuple(recorder.calls),
        parts=tuple(
            part._replace(written=number in recorder.overwritten) for number, part in enumerate(recorder.parts)
        ),
        given=given,
        early=early,
        outs=outs,
        treespec=treespec,
        read=frozenset(recorder.read),
        written=next((name for name, (tensor, version) in held.items() if version_of(tensor) != version), None),
        faked=faked,
    )


def _same(model, paths, layout: Layout, args, kwargs) -> bool:
    """Whether a step that computes everything runs the operators of the model, on the same tensors."""
    made = stands(model, paths, layout.early, layout.parts)
    frame: Frame = {
        "mode": REPLAY,
        "local": False,
        "layout": layout._replace(output=None, guided=None),
        "blocks": made.blocks,
        "entered": True,
        **{name: {} for name in ("early", "counts", "passed", "calls", "handed")},
    }
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    given += [*model.parameters(), *model.buffers()]
    numbering, found = Numbering(given), []
    # The model itself comes second: attributes that it sets on its blocks would else be there already.
    for run in (lambda: run_framed(frame, made.root, args, kwargs), lambda: model(*args, **kwargs)):
        numbering.restart()
        with torch.inference_mode(False), torch.no_grad(), numbering:
            out = run()
        found.append([numbering.number(leaf) for leaf in (*pytree.tree_leaves(out), *given)])
    check_reached(frame)
    return found[0] == found[1]


def _held(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, tuple[Tensor, int]]:
    """The tensors that outlive a call, each with its version."""
    given = {f"argument {name!r}": value for name, value in (*enumerate(args), *kwargs.items())}
    tensors = {name: leaf for name, value in given.items() for leaf in pytree.tree_leaves(value)}
    tensors.update({f"buffer {name!r}": buffer for name, buffer in model.named_buffers()})
    return {name: (tensor, version_of(tensor)) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _attributes(model: nn.Module, sites: Mapping[str, nn.Module], path: str) -> list[tuple[str, int]]:
    """What a module and its stand-in hold, by identity."""
    holders = (model.get_submodule(path), sites[path])
    return [(name, id(value)) for holder in holders for name, value in vars(holder).items()]


def _inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[list[Tensor]]:
    """The tensors of each argument, first those of the forward's first: by convention what is being denoised."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {
        name: [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)] for name, value in given.items()
    }
    names = [name for name in tensors if tensors[name]]
    if not args:
        for forward in (type(model).forward, model.forward):
            parameters = [name for name in inspect.signature(forward).parameters if name != "self"]
            if parameters and parameters[0] in names:
                names.remove(parameters[0])
                names.insert(0, parameters[0])
    return [tensors[name] for name in names]
