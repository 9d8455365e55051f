"""Which weights run in which way: quantised by the libraries that people use, in every way to run a step."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cachekit as ck
from cachekit.coverage import trial
from cachekit.coverage.trial import METHODS, STEPS, Finding
from cachekit.diffusers import zoo
from cachekit.errors import CacheError

BACKEND = "aot_eager"
"""Traced as for Inductor, and computed as eagerly: what is compared is compared to the bit."""
TOLERANCE = 1e-3
"""Of the norm, where Inductor itself is asked for."""
MODELS = ("Flux", "Wan")
POLICIES = ("first_block_cache", "taylorseer")
"""A probe of the blocks, and sites inside of them."""


class Weights(NamedTuple):
    """Weights of one form."""

    package: str  # that makes them, on PyPI
    prepare: Callable[[nn.Module], Any]  # changes a model in place
    backend: str = BACKEND


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer of the blocks, with what holds it and under which name. Models ask for the dtype of others."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    for module in [module for each in lists for module in each.modules()]:
        for name, child in [*module.named_children()]:
            if type(child) is nn.Linear and child.in_features % 32 == 0:  # what Q8_0 packs together
                yield module, name, child


def _torchao(config: str, **settings: Any) -> Callable[[nn.Module], Any]:
    def prepare(model: nn.Module) -> None:
        made = import_module("torchao.quantization")
        made.quantize_(model, getattr(made, config)(**settings))

    return prepare


def _quanto(model: nn.Module) -> None:
    quanto = import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def _gguf(model: nn.Module) -> None:
    """As diffusers makes them of a file."""
    gguf, utils = import_module("gguf"), import_module("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0
    for module, name, linear in _linears(model):
        packed = torch.from_numpy(gguf.quantize(linear.weight.detach().numpy(), kind).copy())
        has_bias = linear.bias is not None
        layer = utils.GGUFLinear(linear.in_features, linear.out_features, has_bias, compute_dtype=torch.float32)
        layer.weight, layer.bias = utils.GGUFParameter(packed, quant_type=kind), linear.bias
        setattr(module, name, layer)


def _bitsandbytes(layer: str, **settings: Any) -> Callable[[nn.Module], Any]:
    def prepare(model: nn.Module) -> None:
        kind = getattr(import_module("bitsandbytes.nn"), layer)
        for module, name, linear in _linears(model):
            made = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, **settings)
            made.load_state_dict(linear.state_dict())
            setattr(module, name, made.to("cpu"))  # which is when it packs its weight

    return prepare


def _sdnq(model: nn.Module) -> None:
    import_module("sdnq").sdnq_post_load_quant(model, weights_dtype="int8")


_INT4 = torch.__dict__["int4"]  # of which the type checker has not heard

WEIGHTS: dict[str, Weights] = {
    "float32": Weights("torch", lambda model: None),
    "int8 weight-only": Weights("torchao", _torchao("Int8WeightOnlyConfig")),
    "int8 dynamic": Weights("torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    "int4 weight-only": Weights("torchao", _torchao("IntxWeightOnlyConfig", weight_dtype=_INT4)),
    "float8 weight-only": Weights("torchao", _torchao("Float8WeightOnlyConfig")),
    "qint8": Weights("optimum-quanto", _quanto),
    "Q8_0": Weights("gguf", _gguf, "inductor"),
    "LLM.int8": Weights("bitsandbytes", _bitsandbytes("Linear8bitLt", has_fp16_weights=False)),
    "NF4": Weights("bitsandbytes", _bitsandbytes("LinearNF4", compute_dtype=torch.float32)),
    "SDNQ int8": Weights("sdnq", _sdnq),
    "layerwise casting": Weights(
        "diffusers", lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    ),
}
"""Name -> what makes them. All but the first are quantised, or stored in another dtype than they compute in.

The class of a weight of GGUF spreads to what is computed of it where a graph is run operator by operator, down to sums
that it cannot be of (diffusers 0.42.1): there Inductor itself is asked for.
"""


WAYS: dict[str, Callable[[ck.CachedStep, str], Any]] = {
    "eager": lambda step, backend: step,
    "programs": lambda step, backend: step.compile(backend=backend),
    "regional": lambda step, backend: step.compile(backend=backend, regional=True),
    "one graph": lambda step, backend: torch.compile(step, fullgraph=True, backend=backend),
}
"""Way to run -> what is called at a step."""

COLUMNS = tuple(f"{model}, {way}" for model in MODELS for way in WAYS)


def installed(name: str) -> str:
    """The version of the package that makes these weights; empty if it is not installed."""
    try:
        return version(WEIGHTS[name].package)
    except PackageNotFoundError:
        return ""


def quantised(name: str, model: nn.Module) -> nn.Module:
    """A copy of a model with such weights, in eval mode and without gradients.

    Args:
        name: one of `WEIGHTS`, of a package that is installed.
        model: stays as it is.

    Example:
        >>> quantised("float32", nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    made = copy.deepcopy(model).requires_grad_(False).eval()
    WEIGHTS[name].prepare(made)
    return made.eval()


def cover(name: str, columns: tuple[str, ...] = COLUMNS) -> list[Finding]:
    """Try one form of weights in every way to run.

    A way works where some steps are skipped, the computed ones give what the same model gives without a cache, to the
    bit, and the others are finite and other ones.

    Args:
        name: one of `WEIGHTS`.
        columns: which models and ways, out of `COLUMNS`.

    Returns:
        One finding a column; none if the package is not installed.

    Example:
        >>> [finding] = cover("float32", ("Wan, eager",))
        >>> finding.verdict
        'works'
    """
    if not installed(name):
        return []
    findings = []
    with torch.no_grad(), trial.quiet():
        for model in MODELS:
            wanted = [way for way in WAYS if f"{model}, {way}" in columns]
            if not wanted:
                continue
            specimen = zoo.specimen(model)
            specimen = specimen._replace(model=quantised(name, specimen.model))
            uncached = [trial.tensors(specimen.model(**specimen.inputs(step))) for step in range(STEPS)]
            for way in wanted:
                verdict, reason = _try(specimen, way, uncached, WEIGHTS[name].backend)
                made = f"{name} ({WEIGHTS[name].package} {installed(name)})"
                findings.append(Finding(name, made, f"{model}, {way}", verdict, reason))
    return findings


def _try(specimen: zoo.Specimen, way: str, uncached: list[list[Tensor]], backend: str) -> tuple[str, str]:
    alike, note = trial.same if backend == BACKEND or way == "eager" else _close, ""
    for policy in POLICIES:
        torch._dynamo.reset()
        try:
            step = ck.cache(specimen.model, METHODS[policy].skipping(None))
            call = WAYS[way](step, backend)
            init = call.init if isinstance(call, ck.CachedStep) else step.init
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                flaw = trial.flaw(*trial.run(call, specimen, init), uncached, alike)
            uncompiled = (str(each.message) for each in said if "not compiled" in str(each.message))
            note = next((text.partition(":")[0] for text in uncompiled), note)
        except Exception as error:  # whatever it is, it belongs in the table and must not end the others
            refused = _refusal(error)
            if not refused and way in ("programs", "one graph"):
                refused = _broken(specimen, backend)
            return ("refused", refused) if refused else ("fails", f"{policy}: {trial.first_line(error)}")
        if flaw:
            return "fails", f"{policy}: {flaw}"
    return "works", note


def _close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all((a - b).norm() <= TOLERANCE * b.norm() for a, b in zip(ours, theirs, strict=True))


def _broken(specimen: zoo.Specimen, backend: str) -> str:
    """Why the uncached model is no graph, if it is none."""
    torch._dynamo.reset()
    try:
        torch.compile(specimen.model, fullgraph=True, backend=backend)(**specimen.inputs(0))
    except Exception as error:
        return f"the uncached model cannot be compiled either: {trial.first_line(error)}"
    return ""


def _refusal(error: Exception) -> str:
    """What cachekit said, if it did; in a graph the compiler quotes it."""
    said = " ".join(str(error).split())
    quoted = re.search(r"raised exception StructureError\(([\"'])(.*?)\1\)", said)
    return said if isinstance(error, CacheError) else quoted[2] if quoted else ""
