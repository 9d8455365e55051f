"""What models look like belongs to the models: recorded once, whatever is cached on them, and kept while they live."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from cachekit.structure.discovery import Discovery

LIMIT = 16
"""How many forwards are kept of a model, each of other arguments: the last ones that were asked for."""


class _Kept(NamedTuple):
    form: Any  # of the model, when they were recorded
    forwards: OrderedDict[Any, Discovery]


_kept = WeakIdKeyDictionary()
_lock = threading.Lock()


def look(
    model: nn.Module,
    form: Any,
    paths: Sequence[str],
    parts: Sequence[str],
    args: tuple,
    kwargs: Mapping[str, Any],
    device: Any,
    signature: Any,
) -> Discovery:
    """What a forward of a model shows: as it is kept of the model, or recorded now.

    Args:
        model: it is not kept alive.
        form: of the model. What was recorded of another form is dropped.
        paths: of its blocks.
        parts: of modules inside the blocks, or beside them.
        args, kwargs, device: of the forward.
        signature: what these look like, or None: then nothing is kept.
    """
    from cachekit.structure.discovery import discover  # not at import: torch's counter of FLOPs loads Triton

    if signature is None:
        return discover(model, paths, parts, args, kwargs, device)
    key = signature, tuple(paths), tuple(parts)
    with _lock:
        kept = _kept.get(model)
        if kept is None or kept.form != form:
            kept = _kept[model] = _Kept(form, OrderedDict())
        if key in kept.forwards and not kept.forwards[key].outdated():
            kept.forwards.move_to_end(key)
            return kept.forwards[key]
    found = discover(model, paths, parts, args, kwargs, device)
    if not found.reaches(model):
        with _lock:
            kept.forwards[key] = found
            while len(kept.forwards) > LIMIT:
                kept.forwards.popitem(last=False)
    return found


def forget(model: nn.Module) -> None:
    """Record anew: the model does something else than it did when it was recorded."""
    with _lock:
        _kept.pop(model, None)
