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
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from cachekit.errors import CacheError, StructureError
from cachekit.frames import RECORD, REPLAY, Frame, check_reached, framed
from cachekit.layout import Layout
from cachekit.numbering import Numbering, Onlooker, address
from cachekit.parts import Watch, kind_of
from cachekit.record import DENOISED, Call, Const, Early, Key, Leaf, Part, Record, TensorSpec, Tree
from cachekit.shadow import PATCHED, early_paths, stands
from cachekit.sites import EarlySite, run_framed

Discovery: TypeAlias = tuple[Record, Callable[[Layout], bool]]

ADDITIONS = {"add", "add_", "sub", "sub_", "addcmul", "addcmul_"}
VIEWS = {
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "cat"),
    *("clone", "_to_copy", "contiguous", "split", "split_with_sizes", "expand", "alias", "detach", "stack", "unbind"),
    *("clamp", "clip", "where"),  # e.g. a clip of float16 overflow at the end of a block
}


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
        early=early,
        outs=outs,
        treespec=treespec,
        read=frozenset(recorder.read),
        written=next((name for name, (tensor, version) in held.items() if _version(tensor) != version), None),
        faked=faked,
    )


def _same(model, paths, layout: Layout, args, kwargs) -> bool:
    """Whether a step that computes everything runs the operators of the model, on the same tensors."""
    made = stands(model, paths, layout.early, layout.parts)
    frame: Frame = {
        "mode": REPLAY,
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
    return {name: (tensor, _version(tensor)) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


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


class Recorder(Onlooker):
    """Follows identity, origin and additions of every tensor through a forward."""

    def __init__(self, inputs: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.early: list[Early] = []
        self._returned: list[list[tuple[Tensor, int]]] = []  # of every early call, its results and their versions
        self.parts: list[Part] = []
        self._makers: dict[int, set[int]] = {}  # memory -> parts whose results lie in it
        self.overwritten: set[int] = set()  # parts whose results something has written to
        self._watch = Watch()
        self._frames = _frames(inputs)
        self._dirty: dict[int, dict[int, int]] = {}  # memory -> tensors that blocks wrote to -> token after that
        self.read: set[int] = set()
        self.depth = 0
        self.flops = 0
        self._tokens = WeakIdKeyDictionary()
        self._labels = WeakIdKeyDictionary()
        self._lineage = WeakIdKeyDictionary()
        self._results: set[int] = set()
        self._memories: dict[int, tuple[StorageWeakRef, int]] = {}
        self._written: dict[int, frozenset[int]] = {}  # storage -> labels of what was written into it
        self._containers: list[Any] = []  # kept alive, so that an id stays one object's
        self._container_tokens: dict[int, int] = {}
        self._count = 0
        self._seen: dict[str, int] = {}
        for n, tensors in enumerate(inputs):
            for tensor in tensors:
                self._labels[tensor] = _set(self._labels, tensor) | {DENOISED - n}

    def token(self, tensor: Tensor) -> int:
        """The same int for the same object."""
        found = self._tokens.get(tensor)
        if found is None:
            self._count += 1
            found = self._tokens[tensor] = self._count
        return found

    def labels(self, tensor: Tensor) -> frozenset[int]:
        """What a tensor was computed from: calls of blocks, and arguments of the model."""
        return _set(self._labels, tensor) | self._written.get(address(tensor), frozenset())

    def _memory(self, tensor: Tensor) -> int:
        """The same int for the same memory, also after an address has been used again."""
        place = address(tensor)
        reference, number = self._memories.get(place, (None, 0))
        if reference is None or reference.expired():
            self._count += 1
            number = self._count
            self._memories[place] = (StorageWeakRef(tensor.untyped_storage()), number)
        return number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **kwargs)
        if not self.depth:
            for tensor in inputs:
                token = self._tokens.get(tensor)
                if token in self._results:
                    self.read.add(token)
                if self._dirty:  # seen through another view of the same memory
                    self.read.update(self._dirty.get(self._memory(tensor), {}).values())
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        labels = frozenset().union(*(self.labels(tensor) for tensor in inputs))
        lineage = self._carried(func, inputs)
        mutable = isinstance(func, OpOverload) and func._schema.is_mutable
        shared = {address(tensor) for tensor in inputs}
        for tensor in outputs:
            self._labels[tensor] = labels
            storage = address(tensor)
            if storage not in shared:
                self._written.pop(storage, None)  # a new tensor at an old address
            elif mutable:
                # A write through a view is seen by whoever reads the rest.
                self._written[storage] = self._written.get(storage, frozenset()) | labels
                self.overwritten |= self._makers.get(self._memory(tensor), set()) if self._makers else set()
            if lineage:
                self._lineage[tensor] = lineage
            elif tensor in self._lineage:
                del self._lineage[tensor]
        count = flop_registry.get(getattr(func, "_overloadpacket", func))
        if count is not None and self.depth:
            self.flops += int(count(*args, **kwargs, out_val=out))
        if self._watch.running:
            name = func._schema.name.rpartition("::")[2] if isinstance(func, OpOverload) else func.name()
            self._watch.operator(name, args, outputs, self.labels, count is not None)
        return out

    def _carried(self, func, inputs) -> frozenset:
        name = func._schema.name.rpartition("::")[2] if isinstance(func, OpOverload) else ""
        if name in ADDITIONS:
            sources = inputs[:1] if name.startswith("addcmul") else inputs
        elif name in VIEWS:
            sources = inputs
        else:
            return frozenset()
        return frozenset().union(*(_set(self._lineage, tensor) for tensor in sources))

    def call(self, site, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a block and write down what went in and out."""
        block = site._run
        if self.depth:
            return block(*args, **kwargs)
        given: dict[Key, Any] = {**dict(enumerate(args)), **kwargs}
        nodes = {key: self.node(value) for key, value in given.items()}
        index, before = len(self.calls), self.flops
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        for key, value in tensors.items():
            self._lineage[value] = frozenset({(index, key)})
        versions = {key: _version(value) for key, value in tensors.items()}
        lengths = {key: len(value) for key, value in given.items() if isinstance(value, (list, dict))}
        held = dict(vars(block))
        self.depth += 1
        try:
            out = block(*args, **kwargs)
        finally:
            self.depth -= 1
        attributes = {name: value for name, value in vars(block).items() if held.get(name) is not value}
        site.__dict__.update(attributes)
        left = {name: self.token(value) for name, value in attributes.items() if isinstance(value, Tensor)}
        self._results.update(left.values())
        mutated = {}
        for key, value in tensors.items():
            if _version(value) != versions[key]:
                self._count += 1
                mutated[key] = self._tokens[value] = self._count
                self._results.add(self._count)
                self._dirty.setdefault(self._memory(value), {})[id(value)] = self._count
        for key, length in lengths.items():
            if len(given[key]) != length:  # what a list collects nobody forecasts
                self._count += 1
                mutated[key] = self._count
                self.read.add(self._count)
        leaves, treespec = pytree.tree_flatten(out)
        lineage = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self._labels[leaf] = self.labels(leaf) | {index}
                self._results.add(self.token(leaf))
                lineage[i] = frozenset(key for n, key in _set(self._lineage, leaf) if n == index)
        path = site._path
        self.calls.append(
            Call(
                path=path,
                nth=self._seen.get(path, 0),
                kind=f"{type(block).__module__}.{type(block).__qualname__}",
                args=nodes,
                treespec=treespec,
                outs=tuple(self.node(leaf) for leaf in leaves),
                lineage=lineage,
                mutated=mutated,
                attributes=left,
                flops=self.flops - before,
            )
        )
        self._seen[path] = self._seen.get(path, 0) + 1
        return out

    def part(self, site, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module inside a block and write down what it does."""
        module, path = site._run, site._path
        given: dict[Key, Any] = {**dict(enumerate(args)), **kwargs}
        nodes = {key: self.node(value) for key, value in given.items()}
        versions = {key: _version(value) for key, value in given.items() if isinstance(value, Tensor)}
        held, block = dict(vars(module)), len(self.calls) if self.depth else -1
        activity = self._watch.enter(given)
        try:
            out = module(*args, **kwargs)
        finally:
            self._watch.leave()
        attributes = {name: value for name, value in vars(module).items() if held.get(name) is not value}
        site.__dict__.update(attributes)
        leaves, treespec = pytree.tree_flatten(out)
        call = Call(
            path=path,
            nth=self._seen.get(path, 0),
            kind=f"{type(module).__module__}.{type(module).__qualname__}",
            args=nodes,
            treespec=treespec,
            outs=tuple(self.node(leaf) for leaf in leaves),
            lineage={},
            mutated={key: 0 for key, version in versions.items() if _version(given[key]) != version},
            attributes=dict.fromkeys(attributes, 0),
            flops=0,
        )
        self._seen[path] = call.nth + 1
        for leaf in call.outs:
            if isinstance(leaf, Leaf):
                self._makers.setdefault(leaf.storage, set()).add(len(self.parts))
        self.parts.append(Part(call, kind_of(activity, path, given, out, self._frames), block, written=False))
        return out

    def beside(self, site, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module that is no block and write down what came out."""
        if self.depth:
            return site._run(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [_version(tensor) for tensor in given]
        out = site._run(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        old = {address(tensor) for tensor in (*given, *site._block.parameters(), *site._block.buffers())}
        fresh = not any(address(tensor) in old for tensor in results)
        pure = fresh and _plain(out) and versions == [_version(tensor) for tensor in given]
        tokens = frozenset(self.token(tensor) for tensor in results)
        self._results |= tokens
        self.early.append(Early(site._path, len(self.calls), tokens, pure))
        self._returned.append([(tensor, _version(tensor)) for tensor in results])
        return out

    def untouched(self) -> list[bool]:
        """For every early call, whether it is pure and its results have not been written to since."""
        same = [all(_version(tensor) == version for tensor, version in results) for results in self._returned]
        return [call.pure and kept for call, kept in zip(self.early, same, strict=True)]

    def node(self, value: Any) -> Any:
        """An argument or result as data."""
        if isinstance(value, Tensor):
            spec = TensorSpec(tuple(value.shape), value.dtype, value.device)
            return Leaf(self.token(value), self._memory(value), spec, self.labels(value))
        leaves, treespec = pytree.tree_flatten(value)
        if treespec.is_leaf():
            return Const(value)
        if id(value) not in self._container_tokens:
            self._containers.append(value)
            self._count += 1
            self._container_tokens[id(value)] = self._count
        return Tree(self._container_tokens[id(value)], treespec, tuple(self.node(leaf) for leaf in leaves))


def _frames(inputs: Sequence[Sequence[Tensor]]) -> tuple[int, ...]:
    """Batch and what may be the number of frames, where the first argument is a video, [B, C, F, H, W] say."""
    first = inputs[0][0] if inputs and inputs[0] else None
    return tuple(first.shape[:3]) if first is not None and first.ndim == 5 else ()


def _plain(value: Any) -> bool:
    """Whether it is made of tensors, None, tuples and lists alone."""
    if type(value) in (tuple, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, Tensor)


def _set(sets: WeakIdKeyDictionary, tensor: Tensor) -> frozenset:
    return sets.get(tensor) or frozenset()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
