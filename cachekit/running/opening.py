"""A model opened for caching: its shadow, and what discovery found in it."""

from __future__ import annotations

import inspect
import sys
import threading
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cachekit.errors import ArgumentError, StructureError
from cachekit.releases import FORGETFUL
from cachekit.running.regions import Regions
from cachekit.running.shadow import (
    HOOKS,
    Fingerprint,
    Follower,
    block_paths,
    compiled_around,
    stands,
)
from cachekit.structure.chains import Chain
from cachekit.structure.forms import Forming
from cachekit.structure.layout import Found, Layout
from cachekit.structure.modules import in_two_minds, module_at, unwrap
from cachekit.structure.parts import Sites, part_paths
from cachekit.structure.placing import lay_out
from cachekit.structure.reach import CALLED, Reach, Standing, modes
from cachekit.structure.record import Record
from cachekit.structure.store import forget, look


class Opened:
    """A model with sites where its blocks stand. The model itself is not changed.

    Attributes:
        original: the model.
        shadow: the copy of its shells that is called in its place.
        blocks: the blocks as a site calls them, compiled one by one if so asked.
        epoch: how often modules were added, removed or replaced.
        generation: how often the shadow was built.
        layouts: every layout found so far, by the names of its sites; a state names its own.
    """

    def __init__(
        self,
        model: nn.Module,
        front: int,
        stated: Sequence[Chain],
        block_options: dict[str, Any] | None = None,
        *,
        sites: Sites = "chain",
        groups: Sequence[str] = (),
        guided: bool = False,
        recorded: Sequence[str] = (),
    ) -> None:
        self.original = unwrap(model)
        self._given = model
        self._told = False
        self.layouts: dict[tuple[str, ...], Layout] = {}
        self._front = front
        self._sites = sites
        self._groups = tuple(groups)
        self._guided = guided
        self._recorded = tuple(recorded)
        self._stated = stated
        self._options = block_options
        self._named = tuple(name for chain in stated for name in _named(self.original, chain))
        self._found: dict[Any, Found] = {}
        self._barred: str | None = None  # why the model can be in no graph that decides inside
        self._standing: Standing | None = None  # the model, when these were found
        self.epoch = self.generation = 0
        self._lock = threading.Lock()
        self._early: set[str] = set()
        self._parts: set[str] = set()
        if (sites == "chain" or front or recorded) and not block_paths(self.original, self._named):
            raise StructureError(
                f"{type(self.original).__name__} has no list of blocks, and no child with children that could be one, "
                f"so there is no chain to cache. Its children: "
                f"{', '.join(name for name, _ in self.original.named_children()) or 'none'}. Name the blocks with "
                'cachekit.Chain, or leave out the model as a whole with sites="output".'
            )
        self._derive()

    def _derive(self) -> None:
        """Begin anew. What was found belongs to the modules it was found on, so it goes."""
        self.epoch += 1
        self._early.clear()
        self._parts.clear()
        self._found.clear()
        self._fingerprint = Fingerprint(self.original)
        # Where the model as a whole is the site, nothing need stand inside.
        whole = self._sites == "output" and not self._front and self._options is None
        self._paths = [] if whole else block_paths(self.original, self._named)
        self._helpers = _helpers([module_at(self.original, path) for path in self._paths])
        self._build()

    def _build(self) -> None:
        """Build the shadow, with all sites known so far."""
        self.generation += 1
        made = stands(self.original, self._paths, self._early, self._parts)
        self.shadow = made.root
        self.blocks: dict[str, Callable[..., Any]] = dict(made.blocks)
        if self._options is not None:
            regions = Regions(self._options)
            inside = {path: any(part.startswith(f"{path}.") for part in self._parts) for path in self.blocks}
            self.blocks = {
                path: regions.block(path, block, module_at(self.original, path), sites=inside[path])
                for path, block in self.blocks.items()
            }
        self._stand_ins = made.sites
        self._refresh = Follower([*made.shells, *((vars(site)["_block"], site) for site in made.sites)])
        # Not those that are compiled by themselves: the compiler enters them, and takes no module under two names.
        children = [(source, *child) for source, _ in made.shells for child in source.named_children()]
        self._children = [(source, name, child) for source, name, child in children if unwrap(child) is child]

    def find(self, args: tuple, kwargs: Mapping[str, Any], device: torch.device | str | None) -> Found:
        """What the forward looks like on these arguments: recorded once for each signature."""
        device = usable(device) if device is not None else _device(self.original, args, kwargs)
        signature = _signature(self.original, args, kwargs, device)
        with self._lock:
            if self._fingerprint.changed() is not None:
                self._derive()
            self._refresh()
            if self._standing is None or not self._standing.same():
                before, self._standing = self._standing, Standing(self.original)
                if before is None or before.form != self._standing.form:
                    self._found.clear()
            if signature is None or signature not in self._found:
                _refuse(self.original)
                self._refuse_layers(device)
                paths = block_paths(self.original, self._named)
                inside = part_paths(self.original, paths, self._sites)
                seen = look(self.original, self._standing.form, paths, inside, args, kwargs, device, signature)
                laid_out = lay_out(
                    seen.record, self._front, self._stated, self._sites, self._groups, self._guided, self._recorded
                )
                self._barred = _uncompilable(self.original) or _wrapped(self.original)
                if laid_out.layout.parts or laid_out.layout.spans:
                    self._barred = self._barred or _forgotten(seen.record)
                if self._paths and not seen.same(laid_out.layout):
                    raise StructureError(_UNLIKE)
                found = self._register(laid_out)
                early, parts = set(found.layout.early), set(found.layout.parts)
                if early - self._early or parts - self._parts:
                    self._early |= early
                    self._parts |= parts
                    self._build()
                if signature is None:
                    return found
                self._found[signature] = found
            return self._found[signature]

    def begin(self) -> None:
        """Before a trajectory: what forwards before it have left on copies of modules is forgotten."""
        with self._lock:
            self._refresh.begin()

    def _refuse_layers(self, device: torch.device) -> None:
        """Refuse layers of PyTorch's that run as one operator and would do something else as their children."""
        inside = self._sites not in ("chain", "output")
        minds = in_two_minds(self.original, device, inside=inside) if self._paths or inside else None
        if minds is not None:
            raise StructureError(
                f"{minds}, so what is found of its children does not hold. Switch that operator off with "
                "torch.backends.mha.set_fastpath_enabled(False), or leave out the model as a whole with "
                'sites="output".'
            )

    def _register(self, found: Found) -> Found:
        """Keep a layout under the names of its sites; another one of the same names gets other names."""
        layout, version = found.layout, 1
        while True:
            known = self.layouts.setdefault(tuple(span.name for span in layout.sites), layout)
            if known is layout or known == layout:
                return found._replace(layout=known)
            version += 1
            layout = found.layout.renamed(f"~{version}")

    def follow(self) -> None:
        """Before a step on the host: take over flags of the model, refuse a module that was replaced.

        Raises:
            StructureError: a module was added, removed or replaced since `init`.
        """
        changed = self._fingerprint.changed()
        if changed is not None:
            raise _replaced(changed)
        self._refresh()

    def forget(self) -> None:
        """Record anew at the next `init`: the model does something else than it did when it was recorded."""
        self._found.clear()
        forget(self.original)

    def tell(self) -> None:
        """Say once what was compiled, and does not run so in a step that is not."""
        if self._told or self._options is not None:
            return
        self._told = True
        sites = [vars(site)["_path"] for site in self._stand_ins]
        names = [path or "the model" for path in compiled_around(self._given, sites)]
        if names:
            warnings.warn(
                f"{names[0]}{f' (and {len(names) - 1} more)' if names[1:] else ''} is compiled by itself, which does "
                "not hold in this step: a step calls its own copies of what lies around a site. Compile the step "
                "instead, with step.compile(), or with compile=True where a pipeline is cached.",
                stacklevel=2,
            )

    def check_compilable(self) -> None:
        """Refuse what no graph can hold."""
        barred = _uncompilable(self.original)
        if barred is not None:
            raise StructureError(barred)

    def standing(self) -> tuple[int, ...]:
        """What tells one set of modules, and of hooks on the model itself, from another."""
        return (self.generation, *(len(vars(self.original)[name]) for name in HOOKS))

    def prepare_trace(self) -> None:
        """The same inside a graph, where it becomes guards."""
        if self._barred is not None:
            raise StructureError(self._barred)
        for parent, name, child in self._children:
            # What lies deeper is shared with the model, and guarded by the compiler itself.
            if getattr(parent, name, None) is not child:
                raise _replaced(name)
        for helper in self._helpers:
            # Two branches that each ask for the signature of one helper fail to trace, unless it was asked before.
            inspect.signature(helper.__call__)


_UNLIKE = (
    "The model returns something else when its blocks run as a step runs them, one after the other when the last of a "
    "chain is called, than when each runs in its turn. Something they share changes in between: an object, a tensor or "
    "an attribute that the model writes to, autocast, or what it asks of a block or of its result. Pass it to the "
    "blocks as an argument that is computed before the first of them, state shorter chains with cachekit.Chain, or use "
    'sites="output".'
)


def _replaced(what: str) -> StructureError:
    return StructureError(
        f"{what} was added, removed or replaced since init. Make a new state with step.init: it takes the change up."
    )


def _signature(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], device) -> Any:
    """What a call looks like, or None where it holds something that cannot be seen: it is like no other."""
    leaves, treespec = pytree.tree_flatten((args, dict(kwargs)))
    forming, reach = Forming(), Reach(CALLED)
    parts: list[Any] = [*map(forming.of, leaves), modes()]
    reach.see(*forming.beyond())
    reach.follow()
    if forming.closed or reach.closed or parts[-1] is None:
        return None
    parts.append(tuple(tensor.dtype for tensor in (*model.parameters(), *model.buffers())))
    return tuple(parts), reach.form(), str(treespec), str(device)


def usable(device: torch.device | str) -> torch.device:
    """The device, if it is there."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, or not on this machine
        reason = str(error).partition("\n")[0]
        raise ArgumentError(
            f"`device` {device!r} cannot be used here: {reason}. Leave it out for the device of the model."
        ) from error


def _device(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.device:
    """Where the model runs: an offloader may keep the weights elsewhere, so an accelerator's input wins."""
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            return leaf.device
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def _wrapped(model: nn.Module) -> str | None:
    """A weight that is a tensor with others inside, as of torchao and quanto, and what can be done."""
    weights = model.named_parameters()
    found = next(((name, weight) for name, weight in weights if is_traceable_wrapper_subclass(weight)), None)
    if found is None:
        return None
    return (
        f"The weight {found[0]!r} ({type(found[1]).__name__}) cannot enter one graph that decides inside: torch.cond "
        "takes none of a class of its own (torch 2.11 to 2.15). Use step.compile(), where the host decides."
    )


def _forgotten(record: Record) -> str | None:
    """What a block leaves on an object, which a graph with conditions would forget, and what can be done."""
    if record.kept is None or not FORGETFUL:
        return None
    return (
        f"{record.kept}, and inside one graph torch {torch.__version__} gives every condition what the object held at "
        "first, so the numbers would be wrong. Use step.compile(), where the host decides, or torch 2.11 or 2.15."
    )


def _helpers(blocks: Sequence[nn.Module]) -> tuple[Any, ...]:
    """One object of every class that modules of the blocks keep and call without its being a module.

    Not of PyTorch's own, such as those that a compiled module keeps: nobody asks for their signature, and Dynamo
    follows none of their calls.
    """
    found: dict[type, Any] = {}
    for block in blocks:
        for module in block.modules():
            for value in vars(module).values():
                if not isinstance(value, (type, types.FunctionType, types.MethodType)) and callable(type(value)):
                    found.setdefault(type(value), value)
    return tuple(
        value
        for kind, value in found.items()
        if isinstance(kind.__call__, types.FunctionType) and kind.__module__.partition(".")[0] != "torch"
    )


def _named(model: nn.Module, chain: Chain) -> list[str]:
    """The blocks of a chain stated by hand: those it lists, or the children of the container it names."""
    names = [chain.blocks] if isinstance(chain.blocks, str) else list(chain.blocks)
    for name in names:
        try:
            module = unwrap(module_at(model, name))
        except AttributeError as error:
            raise ArgumentError(
                f"`structure` names the block {name!r}, which {type(model).__name__} does not have. Its children: "
                f"{', '.join(child for child, _ in model.named_children()) or 'none'}."
            ) from error
        if isinstance(chain.blocks, str) and isinstance(module, (nn.ModuleList, nn.Sequential)):
            return [f"{name}.{child}" for child, _ in module.named_children()]
    return names


def _refuse(model: nn.Module) -> None:
    """Ask the integration with diffusers, where that library is in use, whether something stands in the way."""
    if "diffusers" in sys.modules:
        from cachekit.diffusers.compat import refuse

        refuse(model)


def _uncompilable(model: nn.Module) -> str | None:
    """The same of what no graph can hold, and what can be done."""
    if "diffusers" not in sys.modules:
        return None
    from cachekit.diffusers.compat import uncompilable

    return uncompilable(model)
