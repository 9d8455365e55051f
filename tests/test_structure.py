"""What discovery makes of a model, and that the cache it builds is the one a person would write for it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable

import dit
import pytest
import torch
from dit import FLOWS, Reference, feed
from torch import Tensor, nn

import cachekit as ck
from cachekit.running.shadow import block_paths
from cachekit.structure.discovery import discover
from cachekit.structure.layout import Found
from cachekit.structure.placing import lay_out

STEPS = 7
MASK = (1, 0, 1, 0, 0, 1, 0)
ALL = "blocks.0..blocks.3"
BOTH, IMAGE = ((0, 0), (1, 1)), ((0, 0),)  # streams, as (output, argument)
DISCOVERED = tuple(flow for flow in FLOWS if flow != "ambiguous")


def found(model: nn.Module, front: int = 0, structure: tuple[ck.Chain, ...] = (), inputs: tuple | None = None) -> Found:
    """What discovery says of a model."""
    seen = discover(model, block_paths(model), (), inputs or feed(0), {}, torch.device("cpu"))
    return lay_out(seen.record, front, structure)


def first_block(mask: tuple[int, ...] = MASK) -> ck.Policy:
    """FirstBlockCache that skips where it is told to."""
    policy = ck.first_block_cache(0.1)
    return ck.Policy(policy.name, ck.deciders.mask(mask), policy.forecaster, policy.signal, policy.front)


@torch.no_grad()
def run(step: ck.CachedStep, init: Callable | None = None) -> tuple[list[Tensor], ck.State]:
    """The outputs of a trajectory, and its last state."""
    state, outputs = (init or step.init)(STEPS, *feed(0)), []
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        outputs.append(out)
    return outputs, state


@torch.no_grad()
def check(step: ck.CachedStep, reference: Reference, init: Callable | None = None) -> None:
    """A trajectory is that of the hand-written cache, and its skips matter."""
    outputs, state = run(step, init)
    computed = ck.summary(state).computed
    assert False in computed[1:]
    for index, out in enumerate(outputs):
        torch.testing.assert_close(out, reference(computed[index], *feed(index)), atol=1e-6, rtol=1e-6)
        exact = torch.equal(out, reference.original(*feed(index)))
        assert exact == computed[index], "a skip that changes nothing shows nothing"


# flow -> chains, leader, streams of every site without a front, sites with a front of one block
STRUCTURES = {
    "plain": ([ALL], 0, [IMAGE], ["blocks.1..blocks.3"]),
    "cross": ([ALL], 0, [IMAGE], ["blocks.1..blocks.3"]),
    "swapped": ([ALL], 0, [((1, "x"),)], ["blocks.1..blocks.3"]),
    "one": (["blocks.0"], 0, [IMAGE], None),
    "glue": (["blocks.0..blocks.1", "blocks.2..blocks.3"], 0, [BOTH, IMAGE], ["blocks.1", "blocks.2..blocks.3"]),
    "read": (["blocks.0..blocks.1", "blocks.2..blocks.3"], 0, [BOTH, IMAGE], ["blocks.1", "blocks.2..blocks.3"]),
    "interleaved": (
        [f"{name}.{i}" for i in range(4) for name in ("blocks", "temporal")],
        0,
        [BOTH] * 7 + [IMAGE],
        [f"{name}.{i}" for i in range(4) for name in ("blocks", "temporal")][1:],
    ),
    "zipped": (["blocks.0..temporal.3"], 0, [IMAGE], ["temporal.0..temporal.3"]),
    "two": ([ALL, "single.0..single.3"], 0, [BOTH, IMAGE], ["blocks.1..blocks.3", "single.0..single.3"]),
    "twice": ([ALL], 0, [IMAGE], ["blocks.0..blocks.3#1"]),
    "skips": ([ALL], 0, [IMAGE], ["blocks.1..blocks.3"]),
    "refined": (["refiner.0..refiner.1", ALL], 1, [IMAGE], ["blocks.1..blocks.3"]),
    "inplace": ([ALL], 0, [IMAGE], ["blocks.1..blocks.3"]),
    "narrow": ([ALL], 0, [IMAGE], ["blocks.1..blocks.3"]),
    "branching": ([ALL], 0, [IMAGE], ["blocks.1..blocks.3"]),
}


@pytest.mark.parametrize("flow", DISCOVERED)
def test_chains_leader_streams_and_sites(flow):
    chains, leader, streams, behind_front = STRUCTURES[flow]
    model = dit.shared(flow)
    seen = found(model)
    assert list(seen.chains) == chains
    assert seen.leader == chains[leader]
    assert [span.name for span in seen.layout.sites] == chains[leader:]
    assert [tuple((stream.leaf, stream.key) for stream in span.streams) for span in seen.layout.sites] == streams
    assert all(span.streams[span.main].key in (0, "x") for span in seen.layout.sites)
    assert (seen.real is None) == (flow != "branching")
    state = ck.cache(model, ck.step_mask(MASK)).init(STEPS, *feed(0))
    assert list(state.sites) == chains[leader:]
    if behind_front is not None:
        seen = found(model, front=1)
        assert [span.name for span in seen.layout.sites] == behind_front
        assert [span.paths for span in seen.layout.spans if span.front] == [(chains[leader].partition("..")[0],)]


def policies(flow: str, *, skipping: bool) -> list[ck.Policy]:
    """Every method, where nothing is skipped and where much is."""
    chosen = [ck.mag_cache([1.0] * STEPS, retention=0, max_skips=2 if skipping else 0)]
    chosen.append(ck.step_mask(MASK if skipping else [1] * STEPS))
    if flow != "one":
        chosen.append(ck.first_block_cache(math.inf, max_skips=2) if skipping else ck.first_block_cache(0.0))
        chosen.append(first_block(MASK if skipping else (1,) * STEPS))
    return chosen


@pytest.mark.parametrize("flow", DISCOVERED)
def test_a_cache_that_never_skips_is_exact(flow):
    model = dit.shared(flow)
    for policy in policies(flow, skipping=False):
        outputs, state = run(ck.cache(model, policy))
        assert all(ck.summary(state).computed)
        for index, out in enumerate(outputs):
            with torch.no_grad():
                assert torch.equal(out, model(*feed(index))), policy.name


@pytest.mark.parametrize("flow", DISCOVERED)
def test_skips_are_those_of_a_cache_by_hand(flow):
    model = dit.shared(flow)
    leader = STRUCTURES[flow][1]
    for policy in policies(flow, skipping=True):
        check(ck.cache(model, policy), Reference(model, policy.front, leader))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("flow", "whole", "front"),
    [
        ("swapped", False, 1),
        ("twice", True, 0),
        ("skips", True, 1),
        ("inplace", False, 0),
        ("inplace", True, 1),
        ("narrow", True, 0),
        ("interleaved", False, 0),
    ],
)
def test_compiled_skips_are_those_of_a_cache_by_hand(flow, whole, front):
    model = dit.dit(flow, depth=2)
    step = ck.cache(model, first_block() if front else ck.step_mask(MASK))
    compiled = torch.compile(step, fullgraph=True, backend="eager") if whole else step.compile(backend="eager")
    check(compiled, Reference(model, front), init=step.init if whole else compiled.init)


@torch.no_grad()
def test_the_first_block_is_measured_against_the_last_computed_step():
    model = dit.dit(depth=2)
    _, state = run(ck.cache(model, ck.first_block_cache(0.15)))
    log, reference, inputs = ck.summary(state), torch.zeros(1), []
    handle = model.blocks[0].register_forward_hook(lambda block, args, out: inputs.append(out[0] - args[0]))
    for index in range(STEPS):
        model(*feed(index))
        moved, size = (inputs[index] - reference).abs().sum(), reference.abs().sum()
        change = (moved / size).item()
        assert log.signal[index] == pytest.approx(change, rel=1e-5)
        assert log.computed[index] == (not change < 0.15)
        reference = inputs[index] if log.computed[index] else reference
    handle.remove()
    assert 1 < sum(log.computed) < STEPS - 1


def test_a_refiner_is_told_apart_from_the_main_list():
    step = ck.cache(dit.dit("refined"), ck.first_block_cache(0.1))
    lines = str(step.explain(STEPS, *feed(0))).splitlines()
    assert lines[2].startswith("leading chain: blocks.0..blocks.3 (")
    assert "refiner before it refines one input alone" in lines[2]
    assert "always runs: refiner.0..refiner.1: runs before the leading chain" in lines


def test_a_block_behind_the_front_is_needed():
    model = dit.dit("one")
    step = ck.cache(model, ck.first_block_cache(0.1))
    with pytest.raises(ck.StructureError, match=r"blocks\.0 is the only chain.*mag_cache or step_mask"):
        step.init(STEPS, *feed(0))
    for policy in (ck.step_mask(MASK), ck.mag_cache([1.0] * STEPS, retention=0, max_skips=2)):
        check(ck.cache(model, policy), Reference(model))
    policy = ck.Policy("three", ck.deciders.drift(0.1), ck.forecasters.hold(), ck.signals.change, front=3)
    step = ck.cache(dit.dit(depth=2), policy)
    with pytest.raises(ck.StructureError, match=r"`front` is 3.*blocks\.0\.\.blocks\.1 has 2 blocks"):
        step.init(STEPS, *feed(0))


def test_ambiguous_streams_are_refused_until_they_are_stated():
    model = dit.dit("ambiguous")
    step = ck.cache(model, ck.step_mask(MASK))
    with pytest.raises(
        ck.StructureError,
        match=r"no block is known to continue .*state it: cachekit\.Chain\('blocks\.0', {0: 0}\), and so on",
    ):
        step.init(STEPS, *feed(0))
    chains = [ck.Chain([f"blocks.{i}"], {0: 0}) for i in range(4)]
    check(ck.cache(model, ck.step_mask(MASK), chains), Reference(model))


@pytest.mark.parametrize(
    ("flow", "chains"),
    [
        ("cross", [ck.Chain("blocks", {0: 0})]),
        ("plain", [ck.Chain("blocks", {0: 0, 1: 1})]),
        ("swapped", [ck.Chain("blocks", {1: "x", 0: "text"})]),
        ("twice", [ck.Chain("blocks", {0: 0, 1: 1})]),
        ("glue", [ck.Chain([f"blocks.{i}" for i in pair], {0: 0, 1: 1}) for pair in ((0, 1), (2, 3))]),
        ("two", [ck.Chain("blocks", {0: 0, 1: 1}), ck.Chain("single", {0: 0})]),
        ("zipped", [ck.Chain([f"{name}.{i}" for i in range(4) for name in ("blocks", "temporal")], {0: 0, 1: 1})]),
    ],
)
def test_a_structure_stated_by_hand_is_the_one_found(flow, chains):
    model = dit.dit(flow)
    for policy in (ck.step_mask(MASK), first_block()):
        by_hand, _ = run(ck.cache(model, policy, chains))
        by_itself, _ = run(ck.cache(model, policy))
        for one, other in zip(by_hand, by_itself, strict=True):
            assert torch.equal(one, other)


def test_blocks_that_write_to_their_arguments_leave_the_right_residual():
    model = dit.dit("inplace")
    reference = Reference(model)
    _, state = run(ck.cache(model, ck.step_mask(MASK)))
    with torch.no_grad():
        for index in range(STEPS):
            reference(bool(MASK[index]), *feed(index))
    (streams,) = state.sites.values()
    torch.testing.assert_close(streams[0].value, reference.added[0][0], atol=1e-6, rtol=1e-6)


class Writes(nn.Module):
    """Branches on data, and its blocks write to the very argument of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Writer() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Denoise."""
        if t.sum() > 1e9:
            x = 2 * x
        for block in self.blocks:
            x = block(x)
        return x


class Writer(nn.Module):
    """Adds to its argument in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(dit.CHANNELS, dit.CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """The argument itself."""
        x += 0.1 * self.mix(x)
        return x


class Keeps(nn.Module):
    """Reads a tensor again after its blocks have written to it."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.kept, self.blocks = kept, nn.ModuleList((Noter if kept == "note" else Writer)() for _ in range(4))
        self.embed = nn.Linear(dit.CHANNELS, dit.CHANNELS)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Denoise."""
        kept = x = self.embed(x)
        note = torch.zeros(1)
        for block in self.blocks:
            x = block(x, note) if self.kept == "note" else block(x)
        return x * (1 + note) if self.kept == "note" else x + 2 * kept


class Noter(Writer):
    """Writes something into another argument that no residual can bring back."""

    def forward(self, x: Tensor, note: Tensor) -> Tensor:
        """A new tensor."""
        note += x.mean()
        return x + 0.1 * self.mix(x)


@pytest.mark.compiles
@pytest.mark.parametrize("way", ["eager", "one graph", "programs"])
@pytest.mark.parametrize("policy", [ck.step_mask(MASK), first_block()], ids=["mask", "probe"])
def test_a_tensor_that_blocks_write_to_is_written_to_by_a_reuse_too(policy, way):
    model = Keeps("x")
    step = ck.cache(model, policy)
    step = step.compile(backend="aot_eager") if way == "programs" else step
    call = torch.compile(step, fullgraph=True, backend="aot_eager") if way == "one graph" else step
    first = policy.front
    with torch.no_grad():
        state = step.init(STEPS, *feed(0))
        for index in range(STEPS):
            out, state = call(state, *feed(index))
            base = model.embed(feed(index)[0])
            for block in model.blocks[:first]:
                base = block(base)
            if MASK[index]:
                ran = base.clone()
                for block in model.blocks[first:]:
                    ran = block(ran)
                residual = ran - base
            torch.testing.assert_close(out, 3 * (base + residual), atol=1e-6, rtol=1e-6)


def test_blocks_that_write_to_what_no_forecast_brings_back_are_refused():
    step = ck.cache(Keeps("note"), ck.step_mask(MASK))
    with pytest.raises(ck.StructureError, match=r"blocks\.\d .*Noter.* writes to its argument 1, which is read later"):
        step.init(STEPS, *feed(0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_branches_on_data_is_discovered_by_a_real_forward(mode):
    with mode():
        inputs = feed(0)
        step = ck.cache(Writes(), ck.step_mask(MASK))
        assert "found by one real forward (it branches on data: " in str(step.explain(STEPS, *inputs))
        assert list(step.init(STEPS, *inputs).sites) == ["blocks.0..blocks.2"]
        for value, fresh in zip(inputs, feed(0), strict=True):
            assert torch.equal(value, fresh), "init wrote to its arguments"


@torch.library.custom_op("cachekit_tests::unheard_of", mutates_args=())
def unheard_of(x: torch.Tensor) -> torch.Tensor:
    """An operator that says nothing of fake tensors."""
    return 2 * x


class Unheard(nn.Module):
    """A model with such an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x):
        """New tokens."""
        x = unheard_of(x)
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nn.Linear):
    """A block."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x):
        """With something added."""
        return x + torch.tanh(super().forward(x))


def test_why_a_real_forward_was_needed_is_the_true_reason():
    x = torch.ones(2, 5, 8)
    model = Unheard()
    step = ck.cache(model, ck.step_mask(MASK))
    assert re.search(r"one real forward \(.* on fake tensors: .*unheard_of", str(step.explain(STEPS, x)))
    with torch.no_grad():
        assert torch.equal(step(step.init(STEPS, x), x)[0], model(x))
    patched = Unheard()
    forward = patched.blocks[1].forward
    patched.blocks[1].forward = lambda x: 2 * forward(x)
    told = str(ck.cache(patched, ck.step_mask(MASK)).explain(STEPS, x))
    assert "one real forward (the forward of 'blocks.1' is patched)" in told


class Listed(nn.Module):
    """Blocks kept in other ways than in one list of nn.ModuleList, or one of them several times."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        block = nn.Sequential(nn.Linear(dit.CHANNELS, dit.CHANNELS), nn.Tanh())
        blocks = [copy.deepcopy(block) for _ in range(3)]
        self.blocks = {
            "tied": lambda: nn.ModuleList([block] * 3),
            "nested": lambda: nn.ModuleList(nn.ModuleList([one, copy.deepcopy(block)]) for one in blocks),
            "sequential": lambda: nn.Sequential(*blocks),
            "named": lambda: nn.ModuleDict({"abc"[i]: one for i, one in enumerate(blocks)}),
        }[kind]()

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Denoise."""
        if self.kind == "nested":
            for first, second in self.blocks:
                x = second(first(x))
            return x
        for block in self.blocks.values() if self.kind == "named" else self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "chain", "site"),
    [
        ("tied", None, "blocks.0..blocks.2"),
        ("nested", None, "blocks.0.0..blocks.2.1"),
        ("sequential", ck.Chain([f"blocks.{i}" for i in "012"], {0: 0}), "blocks.0..blocks.2"),
        ("named", ck.Chain([f"blocks.{i}" for i in "abc"], {0: 0}), "blocks.a..blocks.c"),
    ],
)
def test_blocks_are_found_however_they_are_kept(kind, chain, site):
    model = Listed(kind)
    outputs, state = run(ck.cache(model, ck.step_mask(MASK), chain))
    assert list(state.sites) == [site]
    residual = None
    with torch.no_grad():
        for index, out in enumerate(outputs):
            if MASK[index]:
                residual = model(*feed(index)) - feed(index)[0]
            torch.testing.assert_close(out, feed(index)[0] + residual, atol=1e-6, rtol=1e-6)


def test_an_inner_model_and_a_second_name_for_its_blocks_are_one_chain():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dit.dit()
            self.same = self.inner.blocks

        def forward(self, *args: Tensor) -> Tensor:
            return self.inner(*args)

    model = Wrapper()
    outputs, state = run(ck.cache(model, ck.step_mask(MASK)))
    assert list(state.sites) == ["inner.blocks.0..inner.blocks.3"]
    expected, _ = run(ck.cache(model.inner, ck.step_mask(MASK)))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("flow", ["plain", "branching"])
def test_the_model_is_left_as_it_was(flow):
    model = dit.dit(flow)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = {name: set(module.__dict__) for name, module in modules.items()}
    before = copy.deepcopy(model.state_dict())
    step = ck.cache(model, ck.first_block_cache(0.1))
    str(step.explain(STEPS, *feed(0)))
    run(step)
    assert dict(model.named_modules()) == modules
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert keys == {name: set(module.__dict__) for name, module in modules.items()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Timed(nn.Module):
    """A block that reads an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(dit.CHANNELS, dit.CHANNELS)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """A new tensor."""
        return x + torch.tanh(self.mix(x * emb))


class Scaled(nn.Linear):
    """A linear map whose scale its owner sets."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """The scaled map."""
        return super().forward(x) * self.scale


class Embeds(nn.Module):
    """Modules beside the blocks, whose results are read before and after them, or written to, in several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, None
        self.embed, self.time = Scaled(dit.CHANNELS, dit.CHANNELS), nn.Linear(1, dit.CHANNELS)
        self.act, self.drop = nn.ReLU(inplace=kind == "in place"), nn.Dropout(0.5)
        self.head = nn.Linear(dit.CHANNELS, dit.CHANNELS)
        self.blocks = nn.ModuleList(Timed() for _ in range(4))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Denoise."""
        if self.kind == "input":
            t *= 2
        if self.kind == "scale":
            self.embed.scale = float(x.shape[1])
        emb = self.time(t.reshape(-1, 1)[:1].float())
        x = self.embed(x)
        skip = 0.0
        if self.kind == "written":
            skip = 2 * emb
            emb += 1
        elif self.kind == "in place":
            self.act(emb)
        elif self.kind == "alias":
            skip = self.drop(x)
            x += 1.0
        elif self.kind == "cached":
            if self.table is None:
                self.table = self.act(torch.ones(1, dit.CHANNELS))
            skip = self.act(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.head((self.act(x) if self.kind == "cached" else x) * emb + skip)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("kind", "again"),
    [("pure", []), ("written", ["time"]), ("in place", ["time"]), ("alias", []), ("cached", []), ("scale", ["embed"])],
)
def test_what_the_probe_has_embedded_is_not_embedded_again(kind, again):
    graphs = []

    def collect(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op == "placeholder"])
        return graph

    torch.manual_seed(0)
    model = Embeds(kind).eval()
    step = ck.cache(model, first_block())
    wanted, _ = run(step)
    outputs, state = run(step.compile(backend=collect))
    for index, (one, other) in enumerate(zip(wanted, outputs, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        if MASK[index]:
            torch.testing.assert_close(one, copy.deepcopy(model)(*feed(index)), atol=1e-6, rtol=1e-6)
    assert {True, False} == set(ck.summary(state).computed)
    if kind != "cached":  # whose first step goes another way
        assert len(graphs) == 3
        for names in graphs[1:]:
            assert any("time" in name and "weight" in name for name in names) == ("time" in again)


@pytest.mark.compiles
def test_a_forward_that_writes_to_its_argument_is_not_run_twice():
    step = ck.cache(Embeds("input"), first_block())
    compiled = step.compile(backend="eager")
    with torch.no_grad():
        state = compiled.init(STEPS, *feed(0))
        with pytest.raises(ck.StructureError, match=r"writes to its argument 1 in place.*fullgraph=True"):
            compiled(state, *feed(0))
    run(step)
    run(ck.cache(Embeds("input"), ck.step_mask(MASK)).compile(backend="eager"))


def test_attributes_of_stand_ins_are_those_of_the_modules():
    model = Embeds("pure").eval()
    step = ck.cache(model, first_block())
    run(step)
    model.embed.scale = 3.0
    outputs, _ = run(step)
    torch.testing.assert_close(outputs[0], model(*feed(0)))


class Views(nn.Module):
    """Blocks that write to views of one tensor, collect what they do in a list, or stand after a list of layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([nn.Linear(dit.CHANNELS, 8), nn.GELU(), nn.Linear(8, dit.CHANNELS)])
        self.blocks = nn.ModuleList((Both if kind == "views" else Collects)() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Denoise."""
        for layer in self.layers:
            x = layer(x)
        if self.kind == "views":
            left, right = x[:, :2], x[:, 2:]
            for block in self.blocks:
                left, right = block(left, right)
            return x + left.mean()
        if self.kind == "attribute":
            for block in self.blocks:
                x = block(x, None)
            return x + sum(block.added for block in self.blocks)
        seen: list[Tensor] = []
        for block in self.blocks:
            x = block(x, seen if self.kind == "list" else None)
        return x + sum(seen)


class Both(Writer):
    """Adds to both of its arguments in place."""

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments themselves."""
        left += 0.1 * self.mix(left)
        right += 0.1 * self.mix(right)
        return left, right


class Collects(Writer):
    """Appends what it adds to a list."""

    def forward(self, x: Tensor, seen: list | None) -> Tensor:
        """A new tensor."""
        self.added = 0.1 * self.mix(x)
        if seen is not None:
            seen.append(self.added)
        return x + self.added


@pytest.mark.parametrize(("kind", "what"), [("list", "argument 1"), ("attribute", "attribute 'added'")])
def test_what_blocks_leave_behind_and_the_model_reads_is_refused(kind, what):
    step = ck.cache(Views(kind), ck.step_mask(MASK))
    with pytest.raises(ck.StructureError, match=rf"writes to its {what}, which is read later"):
        step.init(STEPS, *feed(0))


@pytest.mark.compiles
@pytest.mark.parametrize("way", ["eager", "one graph", "programs"])
def test_a_tensor_is_written_to_through_its_views(way):
    model = Views("views")
    step = ck.cache(model, ck.step_mask(MASK))
    step = step.compile(backend="eager") if way == "programs" else step
    call = torch.compile(step, fullgraph=True, backend="eager") if way == "one graph" else step
    with torch.no_grad():
        state = step.init(STEPS, *feed(0))
        for index in range(STEPS):
            out, state = call(state, *feed(index))
            base = feed(index)[0]
            for layer in model.layers:
                base = layer(base)
            if MASK[index]:
                left, right = base[:, :2].clone(), base[:, 2:].clone()
                for block in model.blocks:
                    left, right = block(left, right)
                residual = torch.cat((left, right), 1) - base
            after = base + residual
            torch.testing.assert_close(out, after + after[:, :2].mean(), atol=1e-6, rtol=1e-6)


def test_a_list_of_layers_before_the_blocks_is_no_chain():
    step = ck.cache(Views("layers"), ck.step_mask(MASK))
    assert list(step.init(STEPS, *feed(0)).sites) == ["blocks.0..blocks.2"]


class Attends(nn.Module):
    """One product with weights, and one attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        heads = self.lin(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return x + nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_attention_is_weighed_in_every_release():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Attends() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Model().eval(), torch.randn(2, 6, 8)
    record = discover(model, block_paths(model), (), (x,), {}, torch.device("cpu")).record
    product, attention = 2 * (2 * 6) * 8 * 8, 2 * (2 * 2) * (6 * 6 * 4) * 2
    assert [call.flops for call in record.calls] == [product + attention] * 3
