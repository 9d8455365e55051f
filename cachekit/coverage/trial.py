"""Whether a method works on a model: tried, not looked up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.diffusers import zoo
from cachekit.errors import CacheError

STEPS = 5
ALWAYS = (-1.0, 1001.0)
"""A range that holds every timestep."""


class Method(NamedTuple):
    """A method, set to compute every step and set to skip some."""

    exact: Callable[[Any], ck.Policy]  # layout of the output -> policy
    skipping: Callable[[Any], ck.Policy]


def _pyramid(every: int) -> ck.Policy:
    return ck.pyramid_attention_broadcast(
        every, every, every, spatial_range=ALWAYS, temporal_range=ALWAYS, cross_range=ALWAYS
    )


def _faster(attention: int, uncond: int | None = None, layout: Any = "BCFHW") -> ck.Policy:
    if uncond is None:
        return ck.faster_cache(attention, attention_range=ALWAYS, cfg=None)
    return ck.faster_cache(attention, attention_range=ALWAYS, uncond=uncond, uncond_range=ALWAYS, layout=layout)


METHODS: dict[str, Method] = {
    "first_block_cache": Method(lambda _: ck.first_block_cache(0.0), lambda _: ck.first_block_cache(1e9)),
    "mag_cache": Method(
        lambda _: ck.mag_cache([1.0] * STEPS, max_skips=0),
        lambda _: ck.mag_cache([1.0] * STEPS, threshold=1.0, max_skips=2, retention=0.2),
    ),
    "taylorseer": Method(lambda _: ck.taylorseer(1), lambda _: ck.taylorseer(2, warmup=2)),
    "pyramid_attention_broadcast": Method(lambda _: _pyramid(1), lambda _: _pyramid(2)),
    "faster_cache": Method(lambda _: _faster(1), lambda _: _faster(2)),
    "faster_cache, guidance": Method(lambda layout: _faster(1, 1, layout), lambda layout: _faster(1, 2, layout)),
}
"""The five of diffusers' guide; the two halves of FasterCache apart, since a model can allow one and not the other."""


class Finding(NamedTuple):
    """What one method does on one class."""

    specimen: str
    class_name: str
    method: str
    verdict: str  # "works", "refused" or "fails"
    reason: str = ""  # why not; for "works", what is not as good as it could be
    pattern: str = ""  # of the run that skipped: # computed, . left something out


def cover(name: str, methods: tuple[str, ...] = tuple(METHODS), *, compiled: bool = True) -> list[Finding]:
    """Try methods on one specimen.

    A method works where, set to compute every step, it gives what the uncached model gives to the bit; set to skip, it
    skips, the output is finite and another one than the uncached; and `torch.compile(step, fullgraph=True)` makes one
    graph wherever it makes one of the uncached model.

    Args:
        name: of a specimen, one of `zoo.NAMES`.
        methods: names out of `METHODS`.
        compiled: try the compiler too, which takes most of the time. It stops before code is generated.

    Returns:
        One finding a method.

    Raises:
        ValueError: no such specimen.

    Example:
        >>> [finding] = cover("PixArt", ("first_block_cache",), compiled=False)
        >>> finding.verdict, finding.pattern
        ('works', '#....')
    """
    with torch.no_grad(), quiet():
        specimen = zoo.specimen(name)
        _begin(specimen)
        uncached = [tensors(specimen.model(**specimen.inputs(step))) for step in range(STEPS)]
        broken = _broken(specimen, uncached) if compiled else ""
        return [_try(specimen, method, uncached, compiled and not broken, broken) for method in methods]


def _begin(specimen: zoo.Specimen) -> None:
    """Look at the model before it has run: what that leaves behind anywhere, the forwards after it meet."""
    for method in ("first_block_cache", "taylorseer"):
        with suppress(CacheError):  # told by the method's own trial
            ck.cache(specimen.model, METHODS[method].exact(None)).init(STEPS, **specimen.inputs(0))


def _try(specimen: zoo.Specimen, method: str, uncached: list[list[Tensor]], compiled: bool, broken: str) -> Finding:
    kind = type(specimen.model).__name__
    layout = _layout(uncached[0][0])
    pattern = ""
    try:
        outputs, log = run(ck.cache(specimen.model, METHODS[method].exact(layout)), specimen)
        if not all(same(ours, theirs) for ours, theirs in zip(outputs, uncached, strict=True)):
            return Finding(specimen.name, kind, method, "fails", "a computed step is not the uncached one to the bit")
        step = ck.cache(specimen.model, METHODS[method].skipping(layout))
        outputs, log = run(step, specimen)
        pattern = "".join("#" if computed else "." for computed in log.computed)
        why = flaw(outputs, log, uncached)
        if not why and compiled:
            why = _compiled_flaw(step, specimen, outputs)
    except CacheError as error:
        return Finding(specimen.name, kind, method, "refused", " ".join(str(error).split()))
    except Exception as error:  # whatever it is, it belongs in the table and must not end the others
        return Finding(specimen.name, kind, method, "fails", first_line(error), pattern)
    if why:
        return Finding(specimen.name, kind, method, "fails", why, pattern)
    note = f"the uncached model is no single graph either: {broken}" if broken else ""
    return Finding(specimen.name, kind, method, "works", note, pattern)


def flaw(
    outputs: list[list[Tensor]], log: ck.Summary, uncached: list[list[Tensor]], alike: Callable[..., bool] | None = None
) -> str:
    """What is wrong with a run that skipped, empty if nothing is; `alike` compares two steps, `same` if it is None."""
    if all(log.computed):
        return "nothing was skipped"
    if not all(tensor.isfinite().all() for step in outputs for tensor in step):
        return "an output is not finite"
    for step, computed in enumerate(log.computed):
        if (alike or same)(outputs[step], uncached[step]) != computed:
            return f"step {step} was {'computed and is not' if computed else 'skipped and is'} the uncached one"
    return ""


def _compiled_flaw(step: ck.CachedStep, specimen: zoo.Specimen, wanted: list[list[Tensor]]) -> str:
    graphs = _Graphs()
    torch._dynamo.reset()
    try:
        outputs, _ = run(torch.compile(step, fullgraph=True, backend=graphs), specimen, init=step.init)
    except Exception as error:
        return f"torch.compile(step, fullgraph=True): {first_line(error)}"
    if graphs.made != 1:
        return f"torch.compile(step, fullgraph=True) made {graphs.made} graphs in {STEPS} steps"
    for ours, theirs in zip(outputs, wanted, strict=True):
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs, strict=True)):
            return "the compiled step gives something else"
    return ""


def _broken(specimen: zoo.Specimen, uncached: list[list[Tensor]]) -> str:
    """Why the uncached model is not one graph for all steps; empty if it is."""
    graphs = _Graphs()
    torch._dynamo.reset()
    call = torch.compile(specimen.model, fullgraph=True, backend=graphs)
    try:
        for step in range(STEPS):
            call(**specimen.inputs(step))
    except Exception as error:
        return first_line(error)
    return "" if graphs.made == 1 else f"{graphs.made} graphs in {STEPS} steps"


class _Graphs:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.made += 1
        return graph.forward


def run(call: Any, specimen: zoo.Specimen, init: Any = None) -> tuple[list[list[Tensor]], ck.Summary]:
    """A trajectory: the tensors of every step, and what the last state tells; without `init`, that of `call`."""
    times = [float(time) for time in specimen.timesteps[:STEPS]]
    state, outputs = (init or call.init)(times, **specimen.inputs(0)), []
    for step in range(STEPS):
        out, state = call(state, **specimen.inputs(step))
        outputs.append(tensors(out))
    return outputs, ck.summary(state)


def tensors(out: Any) -> list[Tensor]:
    """The tensors that a model returns, in order."""
    plain = out.to_tuple() if hasattr(out, "to_tuple") else out
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two steps agree to the bit."""
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _layout(output: Tensor) -> Any:
    """How the output of a specimen is laid out, as guidance wants to know it: tokens are 4 a row."""
    if output.ndim == 3 and output.shape[1] % 4 == 0:
        return ck.Tokens(1, output.shape[1] // 4, 4)
    return {4: "BCHW", 5: "BCFHW"}.get(output.ndim, "BCFHW")


def first_line(error: Exception) -> str:
    """An error in short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what models say of themselves, and on one thread: at this size a second one only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
