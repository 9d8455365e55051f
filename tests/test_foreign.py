"""What other libraries do to a model (hooks, patches, casts, adapters, compiled blocks) works under a cached step."""

from __future__ import annotations

import copy
import functools
import types

import diffusers
import dit
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from dit import feed
from peft import LoraConfig
from specimens import shared
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import cachekit as ck
from cachekit.diffusers import zoo

MASK = ck.step_mask([1, 0, 1, 0, 0, 1])
STEPS = 4
NAMES = ("Flux", "Wan")


def fresh(name: str = "Flux") -> nn.Module:
    """A copy of a specimen's model."""
    return copy.deepcopy(shared(name).model)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list that leads."""
    return model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks


def take(step: ck.CachedStep, state: ck.State, index: int, name: str = "Flux") -> tuple[Tensor, ck.State]:
    """One step."""
    (out,), state = step(state, **shared(name).inputs(index), return_dict=False)
    return out, state


@torch.no_grad()
def run(model: nn.Module, name: str = "Flux") -> list[Tensor]:
    """Some steps under a cache."""
    step = ck.cache(model, MASK)
    state, outputs = step.init(6, **shared(name).inputs(0)), []
    for index in range(STEPS):
        out, state = take(step, state, index, name)
        outputs.append(out)
    return outputs


@torch.no_grad()
def plain(model: nn.Module, index: int, name: str = "Flux") -> Tensor:
    """The model's own answer."""
    return model(**shared(name).inputs(index), return_dict=False)[0]


expected = functools.cache(lambda name: run(shared(name).model, name))


def check(model: nn.Module, name: str = "Flux") -> None:
    """Under a cache the model does what it does untouched, and computed steps are its own."""
    for index, (out, wanted) in enumerate(zip(run(model, name), expected(name), strict=True)):
        assert torch.equal(out, wanted)
        assert torch.equal(out, plain(model, index, name)) == (index in (0, 2))


def assert_in_no_graph(model: nn.Module, words: str) -> None:
    """Programs and one graph of a Wan are refused with these words; regionally its blocks run as they are."""
    step, given = ck.cache(model, MASK), shared("Wan").inputs(0)
    with pytest.raises(ck.StructureError, match=words):
        step.compile(backend="eager").init(6, **given)
    with pytest.raises(Exception, match=words):
        take(torch.compile(step, fullgraph=True, backend="eager"), step.init(6, **given), 0, "Wan")
    regional = step.compile(regional=True, backend="eager")
    with pytest.warns(UserWarning, match="runs as it is, not compiled"):
        out, _ = take(regional, regional.init(6, **given), 0, "Wan")
    assert torch.equal(out, plain(model, 0, "Wan"))


class Counting(ModelHook):
    """A hook that changes nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_on_the_root(name):
    model, hook = fresh(name), Counting()
    add_hook_to_module(model, hook)
    run(model, name)
    assert hook.calls == STEPS  # init found the structure on a copy
    check(model, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_on_every_module(name):
    model, hooks = fresh(name), {}
    for module in list(model.modules()):
        add_hook_to_module(module, hooks.setdefault(module, Counting()))
    run(model, name)
    assert hooks[model].calls == STEPS
    assert {hooks[block].calls for block in blocks(model)} == {2}  # the steps that compute
    check(model, name)


class Scaling(diffusers.hooks.ModelHook):
    """A hook of diffusers: the first tensor comes out so many times as large, and calls are counted."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls = factor, 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs

    def post_forward(self, module, output):
        first = self.factor * output[0]
        return (first, *output[1:]) if isinstance(output, tuple) else type(output)(sample=first)


class Replacing(Scaling):
    """One that runs the forward itself, as those of caches do."""

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


def hooked(model: nn.Module, *hooks: Scaling) -> diffusers.hooks.HookRegistry:
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
    for n, hook in enumerate(hooks):
        registry.register_hook(hook, f"mine {n}")
    return registry


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_diffusers_on_the_root(name):
    model, hooks = fresh(name), [Scaling(2.0), Scaling(0.25)]
    hooked(model, *hooks)
    for index, (out, wanted) in enumerate(zip(run(model, name), expected(name), strict=True)):
        assert torch.equal(out, 0.5 * wanted)
        assert torch.equal(out, plain(model, index, name)) == (index in (0, 2))
    # By every step, by the model itself, and once by `init`, on shapes alone.
    assert [hook.calls for hook in hooks] == [2 * STEPS + 1] * 2


@pytest.mark.parametrize("taken", [0, 1])
def test_a_hook_of_diffusers_is_taken_off_between_two_steps(taken):
    model, factors = fresh(), (2.0, 0.25)
    registry = hooked(model, *map(Scaling, factors))
    step = ck.cache(model, MASK)
    with torch.no_grad():
        state = step.init(6, **shared("Flux").inputs(0))
        for index, factor in enumerate((0.5, 0.5, factors[1 - taken], factors[1 - taken])):
            if index == 2:
                registry.remove_hook(f"mine {taken}", recurse=False)
            out, state = take(step, state, index)
            assert torch.equal(out, factor * expected("Flux")[index])


@pytest.mark.compiles
@pytest.mark.parametrize("way", ["programs", "regional", "one graph"])
def test_hooks_of_diffusers_on_the_root_compiled(way):
    model = fresh()
    hooked(model, Scaling(2.0), Scaling(0.25))
    step = ck.cache(model, MASK)
    with torch.no_grad():
        if way == "one graph":
            call, init = torch.compile(step, fullgraph=True, backend="eager"), step.init
        else:
            call = step.compile(backend="eager", regional=way == "regional")
            init = call.init
        state = init(6, **shared("Flux").inputs(0))
        for index in range(STEPS):
            out, state = take(call, state, index)
            torch.testing.assert_close(out, 0.5 * expected("Flux")[index])


def test_hooks_of_diffusers_on_blocks():
    model = fresh()
    counting = [Counting() for _ in blocks(model)]
    for block, hook in zip(blocks(model), counting, strict=True):
        hooked(block, Scaling(1.0))
        add_hook_to_module(block, hook)
    check(model)


@pytest.mark.parametrize("name", NAMES)
def test_offload_of_every_weight(name):
    model = cpu_offload(fresh(name), execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    step = ck.cache(model, MASK)
    state = step.init(6, **shared(name).inputs(0))
    assert {leaf.device.type for leaf in torch.utils._pytree.tree_leaves(state)} == {"cpu"}
    check(model, name)


@pytest.mark.parametrize("name", NAMES)
def test_offload_of_the_model(name):
    model, hook = cpu_offload_with_hook(fresh(name), execution_device="cpu")
    check(model, name)
    hook.offload()
    check(model, name)


def by_bound_method(module: nn.Module) -> None:
    module.forward = module.forward


def by_partial(module: nn.Module) -> None:
    module.forward = functools.partial(module.forward)


def by_curried_class(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)


def by_closure(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


def by_default(module: nn.Module) -> None:
    module.forward = lambda old=module.forward, **kwargs: old(**kwargs)


def by_keyword_default(module: nn.Module) -> None:
    module.forward = lambda *args, old=module.forward, **kwargs: old(*args, **kwargs)


def by_method(module: nn.Module) -> None:
    old = module.forward

    @functools.wraps(old)
    def forward(self, *args, **kwargs):
        assert forward  # a closure that holds itself
        return old(*args, **kwargs)

    module.forward = types.MethodType(forward, module)


def by_all_of_them(module: nn.Module) -> None:
    for patch in (by_curried_class, by_method, by_partial, by_default, by_closure, by_keyword_default, by_method):
        patch(module)


PATCHES = (
    *(by_bound_method, by_partial, by_curried_class, by_closure, by_default, by_keyword_default, by_method),
    by_all_of_them,
)


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_forward_on_the_root(patch):
    model = fresh()
    patch(model)
    check(model)


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_forward_on_a_block(patch):
    model = fresh()
    patch(blocks(model)[0])
    patch(model.single_transformer_blocks[2])
    check(model)


class Holder:
    """What a patched forward is held by, beside a state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.old, self.calls = model.forward, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.old(*args, **kwargs)


def by_holder(model: nn.Module) -> None:
    model.forward = Holder(model)


@pytest.mark.parametrize("patch", [by_holder, lambda model: hooked(model, Replacing(1.0))], ids=["object", "hook"])
def test_a_forward_that_cannot_be_followed_is_refused(patch):
    """An object with a state of its own is not copied: its state would be another one. What the message names works."""
    model = fresh()
    patch(model)
    with pytest.raises(ck.StructureError, match=r'No block of the model ran.* sites="output"'), torch.no_grad():
        ck.cache(model, MASK).init(6, **shared("Flux").inputs(0))
    step = ck.cache(model, ck.step_mask([1, 0, 1, 0, 0, 1], sites="output"))
    with torch.no_grad():
        out, _ = take(step, step.init(6, **shared("Flux").inputs(0)), 0)
    assert torch.equal(out, expected("Flux")[0])


@torch.no_grad()
@pytest.mark.parametrize("patch", [by_closure, by_method, lambda module: add_hook_to_module(module, Counting())])
def test_a_root_patched_after_cache_is_followed(patch):
    model, calls = fresh(), []
    step = ck.cache(model, MASK)
    state = step.init(6, **shared("Flux").inputs(0))
    out, state = take(step, state, 0)
    assert torch.equal(out, expected("Flux")[0])
    patch(model)
    patched = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or patched(*args, **kwargs)
    for index in (1, 2):
        out, state = take(step, state, index)
        assert torch.equal(out, expected("Flux")[index])
    assert len(calls) == 2
    model.forward = patched
    if hasattr(model, "_hf_hook"):
        remove_hook_from_module(model)
    else:
        del model.forward
    out, state = take(step, state, 3)
    assert torch.equal(out, expected("Flux")[3])
    assert len(calls) == 2


def test_a_compiled_model_is_unwrapped():
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    assert type(ck.cache(compiled, MASK).shadow) is type(model)
    assert ck.cache(compiled, MASK).shadow.proj_out is model.proj_out
    in_place = fresh()
    in_place.compile(backend="eager")
    with pytest.warns(UserWarning, match="the model is compiled by itself") as said:
        found = run(compiled), run(in_place)
    assert len(said) == 2  # once a step
    for one, other, wanted in zip(*found, expected("Flux"), strict=True):
        assert torch.equal(one, wanted)
        assert torch.equal(other, wanted)


@pytest.mark.compiles
@pytest.mark.parametrize("repeated", [False, True])
def test_blocks_compiled_in_place(repeated):
    model, counter = fresh(), CompileCounter()
    if repeated:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
    else:
        for block in blocks(model):
            block.compile(backend=counter)
    plain(model, 0)
    graphs = counter.frame_count
    assert graphs > 0
    for out, wanted in zip(run(model), expected("Flux"), strict=True):
        torch.testing.assert_close(out, wanted)
    assert counter.frame_count == graphs, "a block under a cache is not called as it is without"


@pytest.mark.parametrize("name", NAMES)
def test_layerwise_casting(name):
    model = fresh(name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in model.parameters()}
    outputs = run(model, name)
    for index in (0, 2):
        assert torch.equal(outputs[index], plain(model, index, name))
        assert not torch.equal(outputs[index], expected(name)[index])
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in model.parameters()}


@pytest.mark.compiles
@torch.no_grad()
def test_layerwise_casting_is_in_no_graph():
    model = fresh("Wan")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_in_no_graph(model, r"(?s)`model` has layerwise casting \(blocks\.0.*and use step\.compile\(\)")


@pytest.fixture
def lent(monkeypatch):
    """Weights that are put away are not numbers until they are loaded again, as if they were on another device."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def weights(group: ModuleGroup) -> list[Tensor]:
        inside = [each for module in group.modules for each in (*module.parameters(), *module.buffers())]
        return [each for each in (*inside, *group.parameters, *group.buffers) if each.is_floating_point()]

    def offload(group: ModuleGroup) -> None:
        for each in weights(group):
            kept.setdefault(id(each), (each, each.data.clone()))
            each.data.fill_(torch.nan)

    def onload(group: ModuleGroup) -> None:
        for each in weights(group):
            if id(each) in kept:
                each.data.copy_(kept[id(each)][1])

    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", offload)
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", onload)


GROUPS = {"leaf_level": {}, "block_level": {"num_blocks_per_group": 1}}
POLICIES = {
    "mask": lambda: MASK,
    "probe": lambda: ck.first_block_cache(1e9, max_skips=1),
    "parts": lambda: ck.taylorseer(2, warmup=1),
    "output": lambda: ck.step_mask([1, 0, 1, 0, 0, 1], sites="output"),
}


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_loaded_block_by_block(name, kind, policy, lent):
    def steps(model: nn.Module) -> list[Tensor]:
        step = ck.cache(model, POLICIES[policy]())
        state, outputs = step.init(6, **shared(name).inputs(0), return_dict=False), []
        for index in range(STEPS):
            out, state = take(step, state, index, name)
            outputs.append(out)
        assert not all(ck.summary(state).computed[:STEPS])
        return outputs

    model = fresh(name)
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type=kind, **GROUPS[kind])
    assert any(each.isnan().any() for each in model.parameters())
    for out, wanted in zip(steps(model), steps(fresh(name)), strict=True):
        assert torch.equal(out, wanted)
    assert any(each.isnan().any() for each in model.parameters())  # and put away again


@torch.no_grad()
@pytest.mark.compiles
def test_weights_that_are_loaded_block_by_block_are_in_no_graph(lent):
    model = fresh("Wan")
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert_in_no_graph(model, "no graph can hold the loading of weights. Run the step as it is")


@pytest.mark.parametrize("late", [False, True])
def test_groups_of_several_blocks_are_refused_with_the_reason(late):
    model = fresh()
    step = ck.cache(model, MASK) if late else None
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)
    step = step or ck.cache(model, MASK)
    with pytest.raises(
        ck.StructureError, match=r"`model` is group-offloaded .*fixed order. Use num_blocks_per_group=1"
    ):
        step.init(6, **shared("Flux").inputs(0))


def lora(model: nn.Module) -> None:
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))


CHANGES = (
    (lora, "transformer_blocks.0.attn.to_q"),
    (lambda model: blocks(model).append(copy.deepcopy(blocks(model)[0])), "transformer_blocks.3"),
    (lambda model: blocks(model).__delitem__(1), "transformer_blocks.1"),
    (lambda model: blocks(model).__setitem__(1, copy.deepcopy(blocks(model)[0])), "transformer_blocks.1"),
    (lambda model: setattr(model, "proj_out", nn.Linear(model.proj_out.in_features, 8)), "proj_out"),
)


@torch.no_grad()
@pytest.mark.parametrize(("change", "changed"), CHANGES)
def test_a_replaced_module_raises_until_the_next_init(change, changed):
    model = fresh()
    step = ck.cache(model, MASK)
    state = step.init(6, **shared("Flux").inputs(0))
    _, state = take(step, state, 0)
    change(model)
    with pytest.raises(
        ck.StructureError,
        match=rf"^{changed} was added, removed or replaced since init\. Make a new state with step\.init",
    ):
        take(step, state, 1)
    state = step.init(6, **shared("Flux").inputs(0))
    for index in range(3):
        out, state = take(step, state, index)
        assert torch.equal(out, plain(model, index)) == (index != 1)
    assert not torch.equal(out, expected("Flux")[2])
    assert step.shadow.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_an_adapter_is_switched_without_a_new_state():
    model = fresh()
    lora(model)
    step = ck.cache(model, MASK)
    state = step.init(6, **shared("Flux").inputs(0))
    with_adapter, _ = take(step, state, 0)
    model.disable_adapters()
    without, _ = take(step, state, 0)
    assert torch.equal(without, expected("Flux")[0])
    assert not torch.equal(without, with_adapter)


class Dropping(nn.Module):
    """Drops features while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.flag = dit.dit(), nn.Dropout(0.5), False

    def forward(self, *args: Tensor) -> Tensor:
        """Denoise."""
        out = self.drop(self.inner(*args))
        return -out if self.flag and self.training else out


@torch.no_grad()
def test_training_mode_and_flags_are_followed():
    model = Dropping()
    model.eval()
    step = ck.cache(model, MASK)
    state = step.init(6, *feed(0))
    assert torch.equal(step(state, *feed(0))[0], model(*feed(0)))
    model.train()
    for model.flag in (False, True):
        torch.manual_seed(0)
        out, _ = step(state, *feed(0))
        torch.manual_seed(0)
        assert torch.equal(out, model(*feed(0)))
        assert bool((out == 0).any())
    assert step.shadow.training
    assert step.shadow.inner.training
    model.eval()
    assert torch.equal(step(state, *feed(0))[0], model(*feed(0)))


def test_gradient_checkpointing_is_followed():
    model = fresh()
    step = ck.cache(model, MASK)
    state = step.init(6, **shared("Flux").inputs(0))
    for switch, wanted in ((model.enable_gradient_checkpointing, True), (model.disable_gradient_checkpointing, False)):
        switch()
        with torch.no_grad():
            out, _ = take(step, state, 0)
        assert step.shadow.gradient_checkpointing == wanted
        assert torch.equal(out, expected("Flux")[0])
    out, _ = take(step, state, 0)
    assert out.requires_grad
    model.enable_gradient_checkpointing()
    with pytest.raises(ck.StructureError, match=r"encoder_hidden_states'.*checkpointing.*torch\.no_grad\(\)"):
        take(step, state, 0)  # a block that is run again for its gradient is not where it was


@pytest.mark.parametrize("name", ["Flux", "Wan", "HunyuanVideo", "Latte"])
def test_a_step_holds_the_weights_of_the_model_under_its_names(name):
    model = shared(name).model
    step = ck.cache(model, MASK)
    assert list(step.shadow.state_dict()) == list(model.state_dict())
    assert {f"shadow.{key}" for key in model.state_dict()} == set(step.state_dict())
    mine, theirs = dict(step.shadow.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[key] is theirs[key] for key in theirs)


@torch.no_grad()
def test_weights_that_are_loaded_or_cast_reach_the_step():
    model, other = fresh(), zoo.specimen("Flux", seed=5).model
    step = ck.cache(model, MASK)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        state = step.init(6, **shared("Flux").inputs(0))
        out, _ = take(step, state, 0)
        assert torch.equal(out, plain(other, 0))
        model.load_state_dict(shared("Flux").model.state_dict(), assign=assign)
        out, _ = take(step, state, 0)
        assert torch.equal(out, expected("Flux")[0])
