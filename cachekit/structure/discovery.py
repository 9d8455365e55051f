"""One forward, recorded: which blocks were called in which order, and what flowed between them.

The forward runs on fake tensors, on a fake copy of the model: no compute, no memory, and nothing that the model
caches while it runs (rotary tables, say) is left behind on the original. A model whose forward branches on data
cannot run so; then one real forward is recorded instead.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from cachekit.errors import CacheError, StructureError
from cachekit.running.frames import RECORD, REPLAY, Frame, check_reached, framed
from cachekit.running.shadow import PATCHED, early_paths, stands
from cachekit.running.sites import EarlySite, run_framed
from cachekit.structure.alike import Account, Accounts, own_tensors
from cachekit.structure.forms import PLAIN, attributes_only, tensors_in
from cachekit.structure.layout import Layout
from cachekit.structure.leftovers import Surroundings, check_gone
from cachekit.structure.modules import module_at, unfused, unwrap
from cachekit.structure.numbering import Numbering, version_of
from cachekit.structure.reach import settled
from cachekit.structure.record import Leaf, Record
from cachekit.structure.recorder import Recorder, by_key


class Discovery:
    """What one forward of a model has shown.

    Attributes:
        record: the forward, as data.
    """

    def __init__(self, record: Record, twin: Twin | None, closed: Iterable[type]) -> None:
        self.record = record
        self._closed = closed
        self._twin = twin  # None of a model that had to be run for real
        self._known: list[tuple[Any, bool]] = []
        self._lock = threading.Lock()  # a copy runs once at a time

    def same(self, layout: Layout) -> bool:
        """Whether a step under this layout computes what the model does: not asked of one that was run for real."""
        if self._twin is None:
            return True
        asked = layout.spans, layout.roles, layout.early, [*layout.parts]
        with self._lock:
            for known, answer in self._known:
                if known == asked:
                    return answer
            self._known.append((asked, self._twin.same(layout)))
            return self._known[-1][1]

    def outdated(self) -> bool:
        """Whether a class that it could not look into has been made known to torch.utils._pytree since."""
        return any(kind in pytree.SUPPORTED_NODES for kind in self._closed)

    def reaches(self, model: nn.Module) -> bool:
        """Whether it holds on to the model, or may."""
        return _reaches([self.record, self._twin], {id(module) for module in model.modules()})


def discover(
    model: nn.Module, paths: Sequence[str], parts: Sequence[str], args: tuple, kwargs: Mapping[str, Any], device
) -> Discovery:
    """Record the forward of `model(*args, **kwargs)` with the blocks `paths`, and `parts` in or beside them.

    The model is left as it was.
    """
    patched = next((name for name, module in model.named_modules() if _patched(module)), None)
    if patched is not None:
        # What a patched forward closes over cannot be copied safely.
        reason = f"the forward of {f'{patched!r}' if patched else 'the model'} is patched"
        return _real(model, paths, parts, args, kwargs, reason)
    try:
        twin = Twin(model, paths, parts, args, kwargs, device)
        return Discovery(twin.record(), twin, twin.closed)
    except CacheError:
        raise
    except Exception as fake_error:  # whatever a forward does that fake tensors cannot follow
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise StructureError(
                f"{type(model).__name__} must run once for real, which fake tensors cannot follow "
                f"({type(fake_error).__name__}: {fake_error}), and its weights are on the meta device. Load them "
                "first, or look at a tiny model of the class."
            ) from fake_error
        reason = f"{type(fake_error).__name__} on fake tensors: {next(iter(str(fake_error).splitlines()), '')}"
        if isinstance(fake_error, (DataDependentOutputException, DynamicOutputShapeException)):
            reason = f"it branches on data: {fake_error}"
        try:
            return _real(model, paths, parts, args, kwargs, reason)
        except CacheError:
            raise
        except Exception as error:
            failed = StructureError(
                f"The model's forward failed on the arguments given to init: {type(error).__name__}: {error}. "
                "Give init the arguments of the first real call."
            )
            failed.forward = f"{type(error).__name__}: {error}"
            raise failed from (error if type(error) is not type(fake_error) else fake_error)


class _Uncompiled:
    """Meanwhile nothing runs compiled: the first of several threads says so, and the last one takes it back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


_UNCOMPILED = _Uncompiled()


def _patched(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own that is not a mere wrapper around that of its class."""
    if "forward" not in module.__dict__ or unwrap(module) is not module:
        return False
    return getattr(module.__dict__.get("_old_forward"), "__func__", None) is not type(module).forward


class Twin:
    """A fake copy of a model, and of the arguments of one call.

    Attributes:
        closed: classes of objects that its forward hands on, into which nothing looks.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        parts: Sequence[str],
        args: tuple,
        kwargs: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._mode = mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._paths, self._parts = paths, parts
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
            self._model: nn.Module = _copied(model, memo)
            self._call = _replaced(lambda value: mode.from_tensor(value, static_shapes=True), args, kwargs, memo)
        for module in [*self._model.modules()]:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = unwrap(child)
            # A hook that moves weights between devices has nothing to move here.
            for name in PATCHED:
                module.__dict__.pop(name, None)
        self._given = [*tensors_in(self._call), *self._model.parameters(), *self._model.buffers()]
        self._accounts = Accounts(parts)
        self._numbers: dict[bool, list[int]] = {}
        self._made: list[Callable[[], Tensor | None]] = []
        self.closed: Iterable[type] = ()

    def record(self) -> Record:
        """Its forward, recorded."""
        with self._mode, self._alone(Surroundings(self._model)):
            paths, parts = self._paths, self._parts
            found, self.closed = _record(self._model, paths, parts, *self._fresh(), self._accounts, self._made)
        self._check_gone()
        return found

    def same(self, layout: Layout) -> bool:
        """Whether a step that computes everything runs the operators of the model, on the same tensors."""
        inside = tuple(f"{path}." for path in self._paths)
        if not layout.spans and self._accounts.whole and all(part.startswith(inside) for part in layout.parts):
            return True  # every block runs in its turn, and with sites inside does what it does without
        # What is told of blocks that are alike is not held against the model before the model has been asked in full.
        around = Surroundings(self._model)
        for told in (True, False):
            as_a_step = self._as_a_step(layout, told, around)
            self._check_gone()
            as_it_is = self._as_it_is(told, around)
            self._check_gone()
            if as_a_step == as_it_is:
                return True
        return False

    def _fresh(self) -> tuple[tuple, dict[str, Any]]:
        """The arguments, with objects that no run has written to."""
        args, kwargs = self._call
        return _replaced(lambda value: value, args, kwargs, {id(tensor): tensor for tensor in self._given})

    def _check_gone(self) -> None:
        given = {id(tensor) for tensor in self._given}  # what is written to is returned, too
        made = [each for each in self._made if id(each()) not in given]
        self._made.clear()
        check_gone(made)

    def _numbering(self) -> Numbering:
        numbering = Numbering(self._given)
        numbering.made = self._made
        return numbering

    def _as_a_step(self, layout: Layout, told: bool, around: Surroundings) -> list[int]:
        numbering = self._numbering()
        made = stands(self._model, self._paths, layout.early, layout.parts)
        frame: Frame = {
            "mode": REPLAY,
            "local": False,
            "layout": layout._replace(output=None, guided=None),
            "blocks": made.blocks,
            "entered": True,
            **{name: {} for name in ("early", "counts", "passed", "calls", "handed")},
        }

        def passed(account: Account, path: str) -> None:
            for part in account.parts:
                name = path + part.call.path[len(account.path) :]
                frame["passed"][name] = frame["passed"].get(name, 0) + 1

        if told:
            frame["blocks"] = {
                path: self._teller(numbering, path, block, passed) for path, block in made.blocks.items()
            }
        args, kwargs = self._fresh()
        found = self._numbers_of(numbering, around, lambda: run_framed(frame, made.root, args, kwargs))
        check_reached(frame)
        frame.clear()  # what tells holds on to it
        return found

    def _as_it_is(self, told: bool, around: Surroundings) -> list[int]:
        if told not in self._numbers:
            numbering, (args, kwargs) = self._numbering(), self._fresh()

            def run() -> Any:
                with self._telling(numbering) if told else nullcontext():
                    return self._model(*args, **kwargs)

            self._numbers[told] = self._numbers_of(numbering, around, run)
        return self._numbers[told]

    def _numbers_of(self, numbering: Numbering, around: Surroundings, run: Callable[[], Any]) -> list[int]:
        with self._mode, self._alone(around), torch.inference_mode(False), torch.no_grad(), numbering:
            out = run()
        return [numbering.number(leaf) for leaf in (*pytree.tree_leaves(out), *self._given)]

    @contextmanager
    def _alone(self, around: Surroundings) -> Iterator[None]:
        """Every run begins with the same attributes, and leaves nothing outside: what the model keeps would else be
        there already, or stay there.
        """
        held = [held for module in self._model.modules() for held in (vars(module), module._buffers)]
        before = [dict(each) for each in held]
        try:
            with _UNCOMPILED, unfused(self._model):  # what is compiled for real tensors runs on no others
                yield
        finally:
            for each, items in zip(held, before, strict=True):
                each.clear()
                each.update(items)
            around.restore()

    def _teller(
        self, numbering: Numbering, path: str, run: Callable[..., Any], passed: Callable[[Account, str], None]
    ) -> Callable[..., Any]:
        """A block that is not run where another one is known to do the same."""
        block = module_at(self._model, path)

        def tell(*args, **kwargs) -> Any:
            account = self._accounts.find(block, self._accounts.sight(block, path, args, kwargs))
            if account is None:
                return run(*args, **kwargs)
            passed(account, path)
            return numbering.told(account, own_tensors(block), args, kwargs)

        return tell

    @contextmanager
    def _telling(self, numbering: Numbering) -> Iterator[None]:
        """Meanwhile the blocks of the copy itself are such blocks."""
        told: dict[str, nn.Module] = {}
        for path in self._paths:
            block = module_at(self._model, path)
            if "forward" in vars(block) or isinstance(block, torch.jit.ScriptModule):
                continue
            told[path] = block

        def forward(path: str, block: nn.Module) -> Callable[..., Any]:
            tell = self._teller(numbering, path, functools.partial(type(block).forward, block), lambda *_: None)

            def asked(*args, **kwargs) -> Any:
                del block.__dict__["forward"]
                try:
                    return tell(*args, **kwargs)
                finally:
                    block.__dict__["forward"] = asked

            return asked

        try:
            for path, block in told.items():
                block.__dict__["forward"] = forward(path, block)
            yield
        finally:
            for block in told.values():
                block.__dict__.pop("forward", None)


def _reaches(roots: Sequence[Any], wanted: set[int]) -> bool:
    """Whether any of these objects is held by the roots, but for what modules of Python hold."""
    skipped = {id(vars(module)) for module in [*sys.modules.values()] if isinstance(module, types.ModuleType)}
    seen: set[int] = set()
    layer: list[Any] = [*roots]
    while layer:
        layer = [
            each
            for each in gc.get_referents(*layer)
            if id(each) not in seen
            and id(each) not in skipped
            and not isinstance(each, types.ModuleType)
            and not (isinstance(each, type) and settled(each.__module__))
            and not seen.add(id(each))
        ]
        if not wanted.isdisjoint(map(id, layer)):
            return True
    return False


def _real(model, paths, parts, args, kwargs, reason: str) -> Discovery:
    # On copies: a forward may write to what it is given, and autograd may not follow what inference mode has made.
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied_args, copied_kwargs = _replaced(lambda value: value.detach().clone(), args, kwargs, memo)
    with _UNCOMPILED:
        found, closed = _record(model, paths, parts, copied_args, copied_kwargs, None, [])
        return Discovery(found._replace(real=reason), None, closed)


def _replaced(
    make: Callable[[Tensor], Tensor], args: tuple, kwargs: Mapping[str, Any], memo: dict[int, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments with other tensors, the same one wherever it was the same, and with copies of objects.

    Args:
        make: another tensor for one.
        args, kwargs: the arguments.
        memo: id -> what stands for the object; what is made is added.
    """
    leaves, treespec = pytree.tree_flatten((args, dict(kwargs)))
    with torch.inference_mode(False):
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) not in memo:
                memo[id(tensor)] = make(tensor)
        return pytree.tree_unflatten([_copied(leaf, memo) for leaf in leaves], treespec)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, in which what cannot be copied (a lock, a generator, a handle, an operator) is what it is."""
    if id(value) in memo or isinstance(value, PLAIN):
        return memo.get(id(value), value)
    made = dict(memo)  # what a copy has made when it fails is half made
    try:
        found = copy.deepcopy(value, made)
    except Exception:  # whatever an object in it says to being copied
        return _copied_in_part(value, memo)
    memo.update(made)
    return found


def _copied_in_part(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is tuple:
        return tuple(_copied(each, memo) for each in value)
    if kind is list:
        found = memo[id(value)] = []
        found += (_copied(each, memo) for each in value)
    elif kind is dict:
        found = memo[id(value)] = {}
        found.update((key, _copied(each, memo)) for key, each in value.items())
    elif attributes_only(kind) and _copied_by_attributes(kind):
        found = memo[id(value)] = object.__new__(kind)
        vars(found).update((name, _copied(each, memo)) for name, each in vars(value).items())
    else:
        found = memo[id(value)] = value
    return found


def _copied_by_attributes(kind: type) -> bool:
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    return plain and not hasattr(kind, "__deepcopy__")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()) if tensor.layout is torch.strided else tuple(torch.empty(tensor.shape).stride())


def _record(
    model, paths, parts, args, kwargs, accounts: Accounts | None, made: list[Callable[[], Tensor | None]]
) -> tuple[Record, Iterable[type]]:
    beside = early_paths(model, paths)
    twin = stands(model, paths, beside, parts)
    sites = {site._path: site for site in twin.sites if isinstance(site, EarlySite)}
    recorder = Recorder(_inputs(model, args, kwargs), accounts)
    recorder.made = made
    held = _held(model, args, kwargs)
    before = {path: _attributes(model, sites, path) for path in beside}
    given = {key: recorder.node(value) for key, value in by_key({**dict(enumerate(args)), **kwargs}).items()}
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
    found = Record(
        calls=tuple(recorder.calls),
        parts=tuple(
            part._replace(written=number in recorder.overwritten) for number, part in enumerate(recorder.parts)
        ),
        given=given,
        early=early,
        outs=outs,
        treespec=treespec,
        read=frozenset(recorder.read),
        strange={kind: tuple(names) for kind, names in recorder.strange.items()},
        written=next((name for name, (tensor, version) in held.items() if version_of(tensor) != version), None),
        kept=recorder.kept,
        real=None,
    )
    return found, recorder.closed


def _held(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, tuple[Tensor, int]]:
    """The tensors that outlive a call, each with its version."""
    given = {f"argument {name!r}": value for name, value in (*enumerate(args), *kwargs.items())}
    tensors = {name: leaf for name, value in given.items() for leaf in pytree.tree_leaves(value)}
    tensors.update({f"buffer {name!r}": buffer for name, buffer in model.named_buffers()})
    return {name: (tensor, version_of(tensor)) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _attributes(model: nn.Module, sites: Mapping[str, nn.Module], path: str) -> list[tuple[str, int]]:
    """What a module and its stand-in hold, by identity."""
    holders = (module_at(model, path), sites[path])
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
