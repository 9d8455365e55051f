"""No class of diffusers that a method worked on is lost: `docs/coverage.json` says which those are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from specimens import shallow, shared

from cachekit.coverage import table, trial, weights
from cachekit.diffusers import zoo
from cachekit.structure import discovery
from cachekit.structure.leftovers import Surroundings

DOCS = Path(__file__).parents[1] / "docs"
SAVED = json.loads((DOCS / "coverage.json").read_text(encoding="utf-8"))
METHODS = [name for name in trial.METHODS if "guidance" not in name]


@pytest.mark.parametrize("name", (*zoo.NAMES, *zoo.FOREIGN))
def test_nothing_is_lost(name, monkeypatch):
    """Not compiled, which would take half an hour; `make coverage` does that."""
    monkeypatch.setattr(zoo, "specimen", shared)
    now = table.record(trial.cover(name, compiled=False), compiled=False)
    before = {**SAVED, "rows": {name: SAVED["rows"][name]}}
    assert table.lost(before, now) == []
    verdicts = {finding["verdict"] for finding in now["rows"][name]["methods"].values()}
    assert "fails" not in verdicts


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "eager") for name in weights.WEIGHTS),
        *((name, "programs") for name in ("int8 weight-only", "qint8", "Q8_0", "NF4")),  # one of every library
    ],
)
def test_no_way_of_weights_is_lost(name, way, monkeypatch):
    if not weights.installed(name):
        pytest.skip(f"{weights.WEIGHTS[name].package} is not installed")
    monkeypatch.setattr(zoo, "specimen", shallow)
    if way == "programs":  # the other one compiled: test_quantised.py
        monkeypatch.setattr(weights, "POLICIES", ("first_block_cache",))
        if weights.WEIGHTS[name].backend == "inductor":  # half a minute; `make coverage` tries it
            monkeypatch.setitem(weights.WEIGHTS, name, weights.WEIGHTS[name]._replace(backend="eager"))
    [finding] = weights.cover(name, (f"Wan, {way}",))
    assert finding.verdict == SAVED["weights"][name]["methods"][finding.method]["verdict"]
    assert finding.verdict == "works" or way == "programs"


def test_weights_under_which_no_two_steps_are_alike_fail(monkeypatch):
    def prepare(model):
        model.proj_out.register_forward_hook(lambda module, args, out: out + torch.rand_like(out))

    monkeypatch.setitem(weights.WEIGHTS, "float32", weights.Weights("torch", prepare))
    [finding] = weights.cover("float32", ("Wan, eager",))
    assert finding.verdict == "fails" and "computed and is not the uncached one" in finding.reason


def test_weights_that_are_not_installed_are_said_and_not_lost(monkeypatch):
    monkeypatch.setitem(weights.WEIGHTS, "int8 dynamic", weights.Weights("no-such-package", lambda model: None))
    assert weights.cover("int8 dynamic") == []
    now = table.record([], compiled=True, weighed=[trial.Finding("float32", "torch", "Wan, eager", "works")])
    assert now["missing"]["int8 dynamic"] == "no-such-package"
    saved = {**SAVED, "rows": {}, "weights": {"int8 dynamic": SAVED["weights"]["int8 dynamic"]}}
    assert table.lost(saved, now) == []
    assert "- int8 dynamic: no-such-package was not installed" in table.markdown(now)
    monkeypatch.undo()
    assert table.lost(saved, {**now, "missing": {}}) != []


def test_the_saved_table_is_of_all_and_the_page_is_of_it():
    assert SAVED["compiled"] and set(SAVED["rows"]) >= {*zoo.NAMES, *zoo.FOREIGN}
    assert set(SAVED["weights"]) == set(weights.WEIGHTS) and not SAVED["missing"]
    assert {len(row["methods"]) for row in SAVED["weights"].values()} == {len(weights.COLUMNS)}
    assert (DOCS / "coverage.md").read_text(encoding="utf-8") == table.markdown(SAVED)


def test_all_five_methods_work_on_every_class():
    works, classes = zip(*(table.totals(SAVED)[method] for method in METHODS), strict=True)
    assert set(works) == set(classes) and len(set(classes)) == 1


def test_every_transformer_of_diffusers_is_tried_or_has_a_reason():
    assert "no tiny configuration is known yet" not in table.untried().values()


@pytest.mark.compiles
def test_compiled_too():
    """One class; and what the compiler cannot do must be seen."""
    for finding in trial.cover("PixArt", ("first_block_cache", "taylorseer")):
        assert (finding.verdict, finding.reason) == ("works", "")


def broken(finding_of: str, monkeypatch: pytest.MonkeyPatch, **faults) -> str:
    """The verdict and reason of a method on a small class, with faults put into the trial."""
    for name, fault in faults.items():
        monkeypatch.setattr(trial, name, fault)
    [finding] = trial.cover("PixArt", (finding_of,), compiled=False)
    return f"{finding.verdict}: {finding.reason}"


KEPT: dict[str, torch.Tensor] = {}


def keeping(specimen: zoo.Specimen) -> zoo.Specimen:
    """With a table that its forward keeps outside of the model."""

    def added(module, args, kwargs):
        table = KEPT.setdefault("table", torch.zeros(1))
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + table}

    specimen.model.register_forward_pre_hook(added, with_kwargs=True)
    return specimen


@pytest.mark.parametrize("left", [False, True])
def test_what_a_trial_leaves_behind_is_met_by_the_first_real_forward(left, monkeypatch):
    whole = keeping(zoo.specimen("PixArt"))
    monkeypatch.setattr(zoo, "specimen", lambda name: whole)
    KEPT.clear()
    if left:
        monkeypatch.setattr(Surroundings, "restore", lambda self: None)
        monkeypatch.setattr(discovery, "check_gone", lambda made: None)
        assert broken("taylorseer", monkeypatch).startswith("fails: ")
    else:
        assert broken("taylorseer", monkeypatch) == "works: "
    KEPT.clear()


@pytest.mark.slow
def test_each_class_is_tried_in_a_process_of_its_own(monkeypatch):
    """Unless there is one class alone; each begins with nothing imported but what it needs."""
    names = ("PixArt", "AuraFlow")
    found = table.cover_all(names, ("first_block_cache",), compiled=False, jobs=1)
    assert [(finding.specimen, finding.verdict) for finding in found] == [(name, "works") for name in names]


def test_a_method_that_skips_nothing_fails(monkeypatch):
    method = trial.METHODS["taylorseer"]
    monkeypatch.setitem(trial.METHODS, "taylorseer", method._replace(skipping=method.exact))
    assert broken("taylorseer", monkeypatch) == "fails: nothing was skipped"


def test_a_method_that_does_not_compute_every_step_exactly_fails(monkeypatch):
    method = trial.METHODS["taylorseer"]
    monkeypatch.setitem(trial.METHODS, "taylorseer", method._replace(exact=method.skipping))
    assert broken("taylorseer", monkeypatch) == "fails: a computed step is not the uncached one to the bit"


def test_an_output_that_is_not_finite_fails(monkeypatch):
    right = trial.run

    def wrong(call, specimen, init=None):
        outputs, log = right(call, specimen, init)
        return ([*outputs[:-1], [outputs[-1][0] * float("nan")]], log) if not all(log.computed) else (outputs, log)

    assert broken("mag_cache", monkeypatch, run=wrong) == "fails: an output is not finite"


@pytest.mark.compiles
def test_two_graphs_fail(monkeypatch):
    right = trial.run

    def wrong(call, specimen, init=None):
        if init is not None:  # compiled
            right(call, specimen._replace(timesteps=specimen.timesteps), init)
            specimen = specimen._replace(inputs=lambda step: {**specimen_inputs(step), "return_dict": step % 2 == 0})
        return right(call, specimen, init)

    specimen_inputs = zoo.specimen("PixArt").inputs
    monkeypatch.setattr(trial, "run", wrong)
    [finding] = trial.cover("PixArt", ("mag_cache",))
    assert finding.verdict == "fails" and "graphs in 5 steps" in finding.reason
