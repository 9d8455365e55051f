"""A structural copy of a model in which sites stand where blocks stood. The model itself is not touched.

Only the modules on the way to a block are copied, and of them only the shell: parameters, buffers and every other
module are the same objects, so a checkpoint loaded, a device moved to or an adapter added reaches both.
"""

from __future__ import annotations

import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from cachekit.running.sites import BlockSite, EarlySite, PartSite, Site
from cachekit.structure.modules import (
    FUSED,
    call_children,
    callable_module,
    methods_of,
    module_at,
    unwrap,
)

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
PATCHED = ("forward", "_old_forward")
"""Instance attributes by which a forward is patched; the second keeps the one before (accelerate does so)."""
COMPILED = "_torchdynamo_orig_callable"
"""The attribute of a compiled function that is the function."""


def block_paths(model: nn.Module, named: Iterable[str] = ()) -> list[str]:
    """Names of the blocks.

    They are what can be called in every outermost list, and those named by hand. A module that is made of several
    modules with children, as a layer of a transformer is and a network of two products is not, is one as well where it
    stands beside the lists and is of the class of one in them, and, where no list holds such modules, among the model's
    own children.
    """
    found: dict[str, nn.Module] = {}
    beside: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str, listed: bool) -> None:
        listed = listed or _is_list(module)
        for name, child in module._modules.items():  # named_children would leave out a block that stands twice
            if child is None:
                continue
            path = f"{prefix}{name}"
            if listed and callable_module(child):
                found[path] = unwrap(child)
            else:
                beside[path] = unwrap(child)
                visit(unwrap(child), f"{path}.", listed)

    visit(model, "", listed=False)
    named = [*named]
    kinds = {type(block) for block in found.values() if _is_deep(block)}
    paths = [*found, *(path for path, module in beside.items() if type(module) in kinds)]
    if not kinds and not named:
        own = [(path, module) for path, module in beside.items() if "." not in path and callable_module(module)]
        paths += [path for path, module in own if _is_deep(module) and not any(p.startswith(f"{path}.") for p in paths)]
    return paths + [name for name in named if name not in paths]


def _is_deep(module: nn.Module) -> bool:
    """Whether it is made of several modules that have children."""
    children = [unwrap(child) for child in module._modules.values() if child is not None]
    return not isinstance(module, nn.Sequential) and sum(bool(child._modules) for child in children) > 1


def _is_list(module: nn.Module) -> bool:
    """Whether it lists blocks: an nn.ModuleList does, any other container where all in it are layers of one kind."""
    if isinstance(module, nn.ModuleList) or not isinstance(module, (nn.Sequential, nn.ModuleDict)):
        return isinstance(module, nn.ModuleList)
    children = [unwrap(child) for child in module._modules.values() if child is not None]
    return len(children) > 1 and len({*map(type, children)}) == 1 and all(map(_is_deep, children))


def early_paths(model: nn.Module, blocks: Iterable[str]) -> list[str]:
    """Names of the modules that a model calls beside its blocks."""
    heads = {path.partition(".")[0] for path in blocks}
    return [
        name
        for name, child in model.named_children()
        if name not in heads and callable_module(child) and not isinstance(child, torch.jit.ScriptModule)
    ]


class Stands(NamedTuple):
    """A shadow, and what stands in it."""

    root: nn.Module
    sites: list[nn.Module]
    blocks: dict[str, nn.Module]  # what the sites of the blocks run: a shell where sites stand in it
    shells: list[tuple[nn.Module, nn.Module]]  # modules on the way to a site, each with its copy


def stands(model: nn.Module, blocks: Iterable[str], early: Iterable[str] = (), parts: Iterable[str] = ()) -> Stands:
    """A shadow of a model with a stand-in for each of these modules; parts may stand in blocks and in each other."""
    sites, runs, pairs, blocks = [], {}, [], list(blocks)
    tops: dict[str, nn.Module] = {}  # the outermost ones so far
    inner_first = sorted(dict.fromkeys(parts), key=lambda path: -path.count("."))
    planned = [(path, PartSite) for path in inner_first]
    planned += [(path, BlockSite) for path in blocks] + [(path, EarlySite) for path in early]
    for path, site_class in planned:
        module = module_at(model, path)
        below = {name: tops.pop(name) for name in [*tops] if name == path or name.startswith(f"{path}.")}
        run = below.pop(path, module)
        if below:
            within = {name[len(path) + 1 :]: site for name, site in below.items()}
            run = shadow(unwrap(module), within)
            pairs += shells(unwrap(module), run, within)
        inside = next((len(block) + 1 for block in blocks if path.startswith(f"{block}.")), 0)
        site = tops[path] = stand_in(unwrap(module), site_class, run, path, path[inside:])
        sites.append(site)
        if site_class is BlockSite:
            runs[path] = run
    root = shadow(model, tops)
    return Stands(root, sites, runs, pairs + shells(model, root, tops))


def compiled_around(model: nn.Module, sites: Iterable[str]) -> list[str]:
    """Names of the modules that are compiled by themselves and have sites inside, "" for the model."""
    return [path for path in _around(sites) if _compiled(module_at(model, path))]


def _around(sites: Iterable[str]) -> list[str]:
    """Names of the modules on the way to sites, "" for the model."""
    return ["", *sorted({path[:i] for path in sites for i, letter in enumerate(path) if letter == "."})]


def _compiled(module: nn.Module) -> bool:
    patched = _compiled_function(vars(module).get("forward"))
    return unwrap(module) is not module or module._compiled_call_impl is not None or patched is not None


def _compiled_function(value: Any) -> Any:
    """The function inside a compiled one, None of any other: one for which the compiler is switched off, too."""
    return None if getattr(value, "_torchdynamo_disable", False) else getattr(value, COMPILED, None)


def shadow(model: nn.Module, sites: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the shells on the way to `sites`, with the sites in place and all else shared."""
    shell = _shell(model)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, site in sites.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = site
    for name, inner in below.items():
        if name not in model._modules:  # a method, which runs with the sites of the shell
            site = inner[""]
            vars(vars(site)["_run"])["layer"] = shell
            shell.__dict__[name] = site
        else:
            shell._modules[name] = inner[""] if "" in inner else shadow(unwrap(module_at(model, name)), inner)
    call_children(shell)
    return shell


def shells(model: nn.Module, shell: nn.Module, sites: Mapping[str, nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """The modules on the way to `sites`, each with its copy."""
    return [(unwrap(module_at(model, prefix)), unwrap(module_at(shell, prefix))) for prefix in _around(sites)]


class Follower:
    """Lets the copies follow attributes of the originals: training mode, checkpointing flags, a patched forward."""

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        # The values themselves: an id alone may be that of another object by now.
        self._pairs = [(source, target, _values(_watched(source, target))) for source, target in pairs]
        self._look()

    def _look(self) -> None:
        self._holders = [holder for source, target, _ in self._pairs for holder in _watched(source, target)]
        self._before = _values(self._holders)

    def begin(self) -> None:
        """Before a trajectory: what a forward has left on the copies is forgotten, they are as the originals are."""
        for source, target, _ in self._pairs:
            if isinstance(target, Site):
                take_over(target)
            elif _strayed(source, target):  # a patched forward is as it was: a new one would be compiled anew
                _follow(source, target, _kept(source))

    def __call__(self) -> bool:
        """Take over what has changed; whether anything has."""
        if _same(_values(self._holders), self._before):
            return False
        changed = False
        for n, (source, target, before) in enumerate(self._pairs):
            now = _values(_watched(source, target))
            if not _same(now, before):
                if isinstance(target, Site):
                    take_over(target)
                else:
                    _follow(source, target, _kept(source))
                    _patch(source, target)
                self._pairs[n] = (source, target, now)
                changed = True
        self._look()
        return changed


def _watched(source: nn.Module, target: nn.Module) -> list[dict[str, Any]]:
    """What a copy is to follow: the attributes of its original, and of what a patched forward is held by."""
    patched = () if isinstance(target, Site) else [source.__dict__[name] for name in PATCHED if name in source.__dict__]
    return [source.__dict__, *chain.from_iterable(map(_holders, patched))]


def _values(holders: Iterable[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, holders))]


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _kept(source: nn.Module) -> set[str]:
    """Attributes that a copy of a shell has for itself."""
    return {"_modules", "_compiled_call_impl", FUSED, *methods_of(source), *PATCHED}


def _strayed(source: nn.Module, target: nn.Module) -> bool:
    """Whether a copy has other attributes than its original."""
    kept, theirs, ours = _kept(source), source.__dict__, target.__dict__
    return any(ours.get(name, kept) is not theirs.get(name, kept) for name in {*ours, *theirs} - kept)


def _follow(source: nn.Module, target: nn.Module, kept: Iterable[str]) -> None:
    """Let `target` have the attributes that `source` has, and no others but those of its own that it keeps."""
    for name in [*target.__dict__]:
        if name not in source.__dict__ and name not in kept:
            del target.__dict__[name]
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name not in kept})


def _shell(module: nn.Module) -> nn.Module:
    copy = object.__new__(type(module))  # a class may make something else of a call: FSDP does
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = dict(module._modules)
    # A compiled call would run the original.
    copy.__dict__["_compiled_call_impl"] = None
    _patch(module, copy)
    return copy


def _patch(source: nn.Module, target: nn.Module) -> None:
    """Let the copy run a patched forward of the original, on itself."""
    for name in PATCHED:
        target.__dict__.pop(name, None)
        if name in source.__dict__:
            target.__dict__[name] = rebind(source.__dict__[name], {id(source): target})


def stand_in(block: nn.Module, site_class: type, run: nn.Module, path: str, local: str) -> nn.Module:
    """A module that looks like `block` (class, attributes, parameters, children) and acts as `site_class`.

    Args:
        block: where it stands.
        site_class: what it does.
        run: what runs in its place: the block, a compiled wrapper of it, or a copy of its shell.
        path: name of the block.
        local: the same, from the block around it.
    """
    site = object.__new__(_site_type(type(block), site_class))
    site.__dict__.update(_block=block, _run=run, _path=path, _local=local)
    for name in HOOKS:
        site.__dict__[name] = OrderedDict()
    site.__dict__["_compiled_call_impl"] = None
    take_over(site)
    return site


def take_over(site: nn.Module) -> None:
    """Let a stand-in have the attributes that its block has by now, and the children of what runs in its place: a model
    may call the parts of a block itself.
    """
    kept = (*HOOKS, *PATCHED, "_path", "_local", "_block", "_run", "_compiled_call_impl")
    _follow(site.__dict__["_block"], site, kept)
    run = unwrap(site.__dict__["_run"])
    if run is not site.__dict__["_block"]:
        site.__dict__["_modules"] = run._modules
        call_children(site)


def _site_type(block_class: type, site_class: type) -> type:
    bases = (site_class, block_class)
    for made in type.__subclasses__(block_class):  # Python knows them, and keeps none of them alive
        if made.__bases__ == bases:
            return made
    return type(block_class.__name__, bases, {"__module__": site_class.__module__})


def rebind(value: Any, replace: Mapping[int, Any]) -> Any:
    """`value` with every module that is bound, curried, closed over or a default replaced by its stand-in.

    A patched forward holds the module it was taken from: as a bound method, in a functools.partial, in a closure, in
    a default, or in an object of nothing but functions (the hooks of diffusers), or several of these around one
    another.
    """
    if id(value) in replace:
        return replace[id(value)]
    if isinstance(value, types.MethodType):
        function, bound = rebind(value.__func__, replace), replace.get(id(value.__self__), value.__self__)
        same = function is value.__func__ and bound is value.__self__
        return value if same else types.MethodType(function, bound)
    if isinstance(value, functools.partial):
        # Hooks of diffusers ask for the module itself: by it they know which weights are theirs.
        hooked = next(_holders(value.func), None) is not None
        args = value.args if hooked else tuple(rebind(arg, replace) for arg in value.args)
        keywords = {name: rebind(arg, replace) for name, arg in value.keywords.items()}
        made = functools.partial(rebind(value.func, replace), *args, **keywords)
        made.__dict__.update({name: rebind(item, replace) for name, item in value.__dict__.items()})
        return made
    if isinstance(value, types.FunctionType):
        inside = _compiled_function(value)
        if inside is not None:  # a program that was compiled for the original would not look at what stands elsewhere
            made = rebind(inside, replace)
            return value if made is inside else made
        # A function that reaches itself is followed once.
        return _rebind_function(value, {**replace, id(value): value})
    if _holds_functions(value):
        held = {name: rebind(each, {**replace, id(value): value}) for name, each in vars(value).items()}
        if _same([*held.values()], [*vars(value).values()]):
            return value
        made = object.__new__(type(value))
        made.__dict__.update(held)
        return made
    return value


def _holds_functions(value: Any) -> bool:
    """Whether it is an object with nothing but functions in its attributes: a copy of it is as good."""
    functions = (types.MethodType, types.FunctionType, functools.partial, type(None))
    held = () if isinstance(value, (type, nn.Module, types.ModuleType, *functions)) else getattr(value, "__dict__", ())
    return isinstance(held, dict) and bool(held) and all(isinstance(each, functions) for each in held.values())


def _holders(value: Any) -> Iterator[dict[str, Any]]:
    """The attributes of all objects that hold functions, as deep as `rebind` looks."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, types.MethodType):
            waiting.append(value.__func__)
        elif isinstance(value, functools.partial):
            waiting += (value.func, *value.args, *value.keywords.values(), *vars(value).values())
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # an empty one
                    waiting.append(cell.cell_contents)
        elif _holds_functions(value):
            yield vars(value)
            waiting += vars(value).values()


def _rebind_function(function: types.FunctionType, replace: Mapping[int, Any]) -> types.FunctionType:
    def cell(held: types.CellType) -> types.CellType:
        try:
            content = held.cell_contents
        except ValueError:  # an empty cell
            return held
        made = rebind(content, replace)
        return held if made is content else types.CellType(made)

    cells = [cell(held) for held in function.__closure__ or ()]
    defaults = [rebind(value, replace) for value in function.__defaults__ or ()]
    by_keyword = {name: rebind(value, replace) for name, value in (function.__kwdefaults__ or {}).items()}
    before = (*(function.__closure__ or ()), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if all(one is other for one, other in zip(before, (*cells, *defaults, *by_keyword.values()), strict=True)):
        return function
    code, names, name = function.__code__, function.__globals__, function.__name__
    made = types.FunctionType(code, names, name, tuple(defaults) or None, tuple(cells) or None)
    made.__kwdefaults__ = by_keyword or None
    made.__dict__.update(function.__dict__)
    return made


class Fingerprint:
    """Which module stands where, to notice one that is added, removed or replaced."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        children = [module._modules for module in model.modules()]
        self._parents = [modules for modules in children if modules]
        self._childless = [modules for modules in children if not modules]
        self._paths = {module: path for path, module in model.named_modules()}
        self._before = self._now()

    def _now(self) -> list[Any]:
        modules = [*chain.from_iterable(map(dict.values, self._parents))]
        return [*modules, type(self._model), *map(type, modules)]

    def changed(self) -> str | None:
        """The first module that was added, removed or replaced, or None."""
        if self._now() == self._before and not any(self._childless):
            return None
        now = {module: path for path, module in self._model.named_modules()}
        changed = [path for module, path in now.items() if module not in self._paths]
        changed += [path for module, path in self._paths.items() if module not in now]
        return changed[0] if changed else "a module"
