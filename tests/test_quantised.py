"""Weights of a class of their own, as quantisers make them: computed steps are the quantised model's to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specimens import shallow, shared
from test_containers import POLICIES, STEPS
from tiers import covering
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import cachekit as ck

aten = torch.ops.aten


class Eight(Tensor):
    """A weight of eight bits a number and a scale a row, which a linear layer can take and nothing else."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Eight:
        return Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=scale.dtype, device=numbers.device
        )

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __repr__(self) -> str:
        return "Eight(...)"

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.linear:
            x, weight, bias = (*args, None)[:3]
            return functional.linear(x, weight.numbers.to(x.dtype) * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(func(args[0].numbers), func(args[0].scale))
        raise NotImplementedError(f"{func} on a weight of eight bits")


def quantised(name: str) -> nn.Module:
    """A model of the zoo with such weights in its linear layers."""
    model = shallow(name).model.requires_grad_(False).eval()
    for module in model.modules():
        if type(module) is nn.Linear:
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            numbers = (module.weight / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Eight(numbers, scale), requires_grad=False)
    return model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(step: Any, state: ck.State, name: str) -> tuple[list[Tensor], ck.State]:
    """The outputs of a trajectory, and its last state."""
    outs = []
    for index in range(STEPS):
        (out,), state = step(state, **shared(name).inputs(index), return_dict=False)
        outs.append(out)
    return outs, state


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "policy", "way"),
    [("Flux", "probe", "programs"), *covering(("Wan", "Flux"), [*POLICIES], ("eager", "regional", "programs"))],
)
def test_computed_steps_are_those_of_the_quantised_model(name, policy, way):
    model = quantised(name)
    assert sum(is_traceable_wrapper_subclass(weight) for weight in model.parameters()) > 8
    wanted = [model(**shared(name).inputs(index), return_dict=False)[0] for index in range(STEPS)]
    for made in POLICIES[policy]:
        step = ck.cache(model, made)
        if way != "eager":
            step = step.compile(backend="aot_eager", regional=way == "regional")
        outs, state = run(step, step.init(STEPS, **shared(name).inputs(0), return_dict=False), name)
        pattern = ck.summary(state).computed
        assert all(pattern) == (made is POLICIES[policy][0])
        for out, want, computed in zip(outs, wanted, pattern, strict=True):
            assert torch.equal(out, want) == computed
    assert step.explain(STEPS, **shared(name).inputs(0), return_dict=False).faked


@pytest.mark.compiles
@pytest.mark.parametrize("policy", POLICIES)
def test_one_graph_says_what_works_instead(policy):
    model = quantised("Wan")
    step = ck.cache(model, POLICIES[policy][1])
    state = step.init(STEPS, **shared("Wan").inputs(0), return_dict=False)
    with pytest.raises(Exception, match=r"(?s)'[\w.]+weight' \(Eight\) cannot enter one graph.*step\.compile\(\)"):
        run(torch.compile(step, fullgraph=True, backend="aot_eager"), state, "Wan")


def test_a_model_that_is_quantised_after_an_init_is_another_one():
    model = shallow("Wan").model.requires_grad_(False).eval()
    step = ck.cache(model, POLICIES["mask"][1])
    step.init(STEPS, **shared("Wan").inputs(0), return_dict=False)
    other = quantised("Wan")
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            module.weight = other.get_submodule(path).weight
    outs, _ = run(step, step.init(STEPS, **shared("Wan").inputs(0), return_dict=False), "Wan")
    assert torch.equal(outs[0], other(**shared("Wan").inputs(0), return_dict=False)[0])
    with pytest.raises(Exception, match=r"step\.compile\(\)"):
        state = step.init(STEPS, **shared("Wan").inputs(0), return_dict=False)
        run(torch.compile(step, fullgraph=True, backend="eager"), state, "Wan")
