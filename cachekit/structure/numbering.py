"""Whether two forwards compute the same, without computing: every tensor gets a number that says how it came about.

Two tensors have equal numbers when the same operators made them from the same tensors in the same way. So a forward in
which blocks run later than they were called is the forward of the model where what it returns has the same numbers,
whatever the blocks share and whatever happens between them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

if TYPE_CHECKING:
    from cachekit.structure.alike import Account

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


DEVICE = torch.ops.prim.device.default
"""More than half of all operators: PyTorch asks a fake tensor for its device many times, and nothing comes of it."""


class Onlooker(TorchDispatchMode):
    """Sees every operator of a forward and changes nothing.

    Attributes:
        made: the fake tensors that operators have made.
    """

    supports_higher_order_operators = True
    _silent = False

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[[], Tensor | None]] = []

    def _ran(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What an operator returns, and the tensors in it; that they were made is noted."""
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in leaves_of(out) if isinstance(leaf, Tensor)]
        self.made += [weakref.ref(tensor) for tensor in tensors if isinstance(tensor, FakeTensor)]
        return out, tensors

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What runs meanwhile is no part of the forward."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled pieces of a model run under this mode as they run without it."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """And are one operator each to it."""
        return True


class Numbering(Onlooker):
    """Numbers every tensor of a forward that runs under it."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._given = list(given)
        self._contents: dict[int, tuple[StorageWeakRef, int]] = {}
        self.restart()

    def restart(self) -> None:
        """What the forward is given is as it was, also where it was written to."""
        for number, tensor in enumerate(self._given):
            self._keep(tensor, hash(("given", number)))

    def number(self, value: Any) -> int:
        """Of a tensor, or of whatever else is an argument."""
        if isinstance(value, Tensor):
            view = (tuple(value.shape), tuple(value.stride()), value.storage_offset(), value.dtype)
            return hash((self._content(value), view, value.is_conj(), value.is_neg()))
        return hash((type(value), repr(value))) if isinstance(value, PLAIN) else hash(type(value).__name__)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is DEVICE:
            return device_of(args[0])
        if self._silent:
            return self._ran(func, args, kwargs)[0]
        leaves = leaves_of(*args, *kwargs.values())
        made = hash((func, *map(self.number, leaves)))
        given = {address(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        out, tensors = self._ran(func, args, kwargs)
        for place, tensor in enumerate(written(func, args, kwargs)):
            self._keep(tensor, hash((made, "written", place)))
        for place, tensor in enumerate(tensors):
            if address(tensor) not in given:
                self._keep(tensor, hash((made, place)))
        return out

    def told(self, account: Account, own: Iterable[Tensor], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """What a block returns that does what another one did: one operator of its own tensors and the arguments."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        made = hash((account.path, *map(self.number, tensors), *map(self.number, own)))
        with self.unseen():
            leaves = account.make(tensors)
        for result, leaf in zip(account.results, leaves, strict=True):
            if isinstance(leaf, Tensor) and result.argument < 0:
                self._keep(leaf, hash((made, result.memory)))
        return pytree.tree_unflatten(leaves, account.treespec)

    def _content(self, tensor: Tensor) -> int:
        reference, content = self._contents.get(address(tensor), (None, 0))
        if reference is None or reference.expired():
            content = hash((tensor.dtype, tuple(tensor.shape), _values(tensor)))
        return content

    def _keep(self, tensor: Tensor, content: int) -> None:
        self._contents[address(tensor)] = (StorageWeakRef(tensor.untyped_storage()), content)


def _values(tensor: Tensor) -> str | None:
    """Of a constant that the forward makes, where they are few and known: they tell it from others."""
    constant = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    if type(constant) is not Tensor or constant.device.type != "cpu" or constant.numel() > 64:
        return None
    with _disable_current_modes():
        try:
            return str(constant.tolist())
        except RuntimeError:  # it has no memory either
            return None


def leaves_of(*values: Any) -> list[Any]:
    """The leaves of what an operator takes or returns: mostly these are the leaves."""
    found = []
    for value in values:
        if isinstance(value, (list, tuple, dict)):
            found += pytree.tree_leaves(value)
        else:
            found.append(value)
    return found


def address(tensor: Tensor) -> int:
    """Of the memory of a tensor: equal for tensors that share it, while they live."""
    return tensor.untyped_storage()._cdata


def device_of(tensor: Tensor) -> torch.device:
    """What the operator for it gives."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else DEVICE(tensor)


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; what inference mode has made does not count."""
    return 0 if tensor.is_inference() else tensor._version


def written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    if not isinstance(func, OpOverload) or not func._schema.is_mutable:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found
