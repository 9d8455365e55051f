"""The fast tier loses no law: what it leaves to the slow one is more of the same, or named with a reason."""

from __future__ import annotations

import itertools

import pytest
import tiers
from hypothesis import given
from hypothesis import strategies as st

from cachekit.diffusers import zoo


def law(item: pytest.Item) -> str:
    """File and test, without parameters."""
    return f"{item.path.name}::{getattr(item, 'originalname', None) or item.name}"


def test_every_law_has_a_representative_in_the_fast_tier(collected):
    fast = {law(item) for item in collected if not item.get_closest_marker("slow")}
    slow = {law(item) for item in collected if item.get_closest_marker("slow")}
    assert slow - fast <= set(tiers.SLOW)


def test_every_rule_is_of_a_test_that_there_is(collected):
    names = {law(item) for item in collected} | {item.path.name for item in collected}
    files = {item.path.name for item in collected}
    for rule in (*tiers.FAST, *tiers.SLOW):
        assert rule in names or rule.partition("::")[0] not in files, f"{rule} is no test: mend tests/tiers.py"


def test_the_classes_that_stand_for_the_others_are_in_the_zoo():
    assert set(tiers.CLASSES) <= set(zoo.NAMES) and len(tiers.CLASSES) == 10


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.integers(1, 3), st.data())
def test_in_a_covering_all_values_of_so_many_axes_meet(sizes, strength, data):
    axes = [range(size) for size in sizes]
    places = [*itertools.combinations(range(len(axes)), strength)]
    without = data.draw(st.sets(st.sampled_from(places))) if places else set()
    rows = tiers.covering(*axes, strength=strength, without=[*without])
    for place in {*places} - without:
        assert {tuple(row[axis] for axis in place) for row in rows} == {*itertools.product(*(axes[n] for n in place))}
    assert len(rows) == len(set(rows)) <= len([*itertools.product(*axes)])


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("test_exactness.py::test_threshold_0_is_the_uncached_model[Flux]", False),
        ("test_exactness.py::test_threshold_0_is_the_uncached_model[Flux2]", True),
        ("test_docs.py::test_a_site_with_a_fault_does_not_build", True),
        ("test_deciders.py::test_doubt_computes", False),
    ],
)
def test_a_rule_is_of_a_test_before_it_is_of_a_file(name, slow):
    test, given_ = name.partition("[")[0], tiers.parameters(name)
    assert tiers.is_slow(*test.split("::"), given_) == slow


@given(
    st.lists(st.tuples(st.sampled_from(["test_exactness.py", "test_grid.py"]), st.just("t"), st.sampled_from("abc")))
)
def test_tests_of_one_class_run_side_by_side_and_the_others_in_their_order(tests):
    ordered = tiers.order(tests)
    assert sorted(ordered) == [*range(len(tests))]
    names = [name for name, _ in itertools.groupby(tests[at][2] for at in ordered if "exact" in tests[at][0])]
    assert len(names) == len(set(names))
    others = [at for at in ordered if "grid" in tests[at][0]]
    assert others == sorted(others)
