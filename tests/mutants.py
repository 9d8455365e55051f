"""Bugs made on purpose, each with the law that must notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One line of the package, changed for the worse."""

    file: str  # below cachekit/
    old: str  # occurs once in the file
    new: str
    law: str  # the test that must fail

    @property
    def name(self) -> str:
        """For the list of tests."""
        return f"{self.file.rpartition('/')[2]}-{self.law.partition('::')[2]}"


MUTANTS = (
    # NaN compares false, so this reuses it.
    Mutant(
        "deciders/_drift.py",
        "return reuse == False  # noqa: E712",
        "return (change >= threshold) | (now.signal.denominator == math.inf)",
        "test_deciders.py::test_doubt_computes",
    ),
    # Zero stays below no threshold, but equals one.
    Mutant(
        "deciders/_drift.py",
        "close = change <= threshold if inclusive else change < threshold",
        "close = change <= threshold",
        "test_deciders.py::test_zero_budget_never_reuses",
    ),
    Mutant(
        "deciders/_combine.py",
        "(state.skips >= skips)",
        "(state.skips > skips)",
        "test_deciders.py::test_max_skips_is_never_exceeded",
    ),
    Mutant(
        "deciders/_combine.py",
        "(now.step < steps)",
        "(now.step <= steps)",
        "test_deciders.py::test_warmup_computes_then_says_nothing",
    ),
    Mutant(
        "deciders/_combine.py",
        "(now.timestep < high)",
        "(now.timestep <= high)",
        "test_deciders.py::test_within_reuses_only_inside_the_open_range",
    ),
    Mutant(
        "deciders/_combine.py",
        "verdict = verdict | decider.decide(inner, now)",
        "verdict = verdict & decider.decide(inner, now)",
        "test_deciders.py::test_any_of_computes_iff_one_does_and_tells_all",
    ),
    # The inner decider believes that its own verdict was followed.
    Mutant(
        "deciders/_combine.py",
        "return tuple(decider.update(inner, now, computed) for decider, inner in pairs)",
        "return tuple(decider.update(inner, now, decider.decide(inner, now)) for decider, inner in pairs)",
        "test_deciders.py::test_any_of_computes_iff_one_does_and_tells_all",
    ),
    Mutant(
        "deciders/_decider.py",
        "torch.where(condition, torch.as_tensor(yes, dtype=dtype), torch.as_tensor(no, dtype=dtype))",
        "torch.where(condition, torch.as_tensor(no, dtype=dtype), torch.as_tensor(yes, dtype=dtype))",
        "test_deciders.py::test_numbers_and_tensors_agree",
    ),
    Mutant(
        "deciders/_decider.py",
        "computed = step == 0 or decided(decider, state, now)",
        "computed = decided(decider, state, now)",
        "test_deciders.py::test_plan_is_the_steps_one_by_one",
    ),
    Mutant(
        "deciders/_magnitude.py",
        "error=where(computed, torch.zeros_like(spent.error), spent.error)",
        "error=spent.error",
        "test_deciders.py::test_magnitude_budget_follows_the_rule_of_magcache",
    ),
    Mutant(
        "deciders/_magnitude.py",
        "return now.step < int(retention * now.steps + 0.5)",
        "return now.step <= int(retention * now.steps + 0.5)",
        "test_deciders.py::test_magnitude_budget_follows_the_rule_of_magcache",
    ),
    # A state that turns from a tensor into a number.
    Mutant(
        "deciders/_magnitude.py",
        "skips=where(computed, torch.zeros_like(spent.skips), spent.skips)",
        "skips=where(computed, 0, spent.skips)",
        "test_deciders.py::test_layout_of_the_state_never_changes",
    ),
    Mutant(
        "deciders/_magnitude.py",
        "torch.cat((curve[:1], curve.diff()))",
        "torch.cat((curve[:1] * 0, curve.diff()))",
        "test_deciders.py::test_log_interpolation_conserves_the_product",
    ),
    Mutant(
        "deciders/_interval.py",
        "(now.step - warmup - offset) % every == 0",
        "(now.step - warmup) % every == 0",
        "test_deciders.py::test_composition_computes_iff_a_rule_demands_it",
    ),
    Mutant(
        "deciders/_interval.py",
        "verdict | (now.step >= cooldown_after)",
        "verdict | (now.step > cooldown_after)",
        "test_deciders.py::test_composition_computes_iff_a_rule_demands_it",
    ),
    # The change from a forecast, not from what was computed.
    Mutant(
        "forecasters/_two_point.py",
        "before = forecast(state, (now.step - state.last - 1).clamp(min=0), now) if feedback else state.value",
        "before = forecast(state, (now.step - state.last - 1).clamp(min=0), now)",
        "test_forecasters.py::test_two_points_by_a_number",
    ),
    Mutant(
        "forecasters/_hold.py",
        "predict=lambda state, now: state.value,",
        "predict=lambda state, now: torch.zeros_like(state.value),",
        "test_forecasters.py::test_predict_at_the_step_just_updated_is_the_value",
    ),
    # The factorial is gone.
    Mutant(
        "../cachekit_kernels/reference.py",
        "power = power * offset.to(wide) / i",
        "power = power * offset.to(wide)",
        "test_forecasters.py::test_taylor_is_the_published_sum",
    ),
    # The first value minus nothing is no derivative.
    Mutant(
        "forecasters/_taylor.py",
        "known = state.filled > torch.arange",
        "known = state.filled >= torch.arange",
        "test_forecasters.py::test_exact_on_constants",
    ),
    Mutant(
        "forecasters/_newton.py",
        "offsets = now.step - state.nodes",
        "offsets = now.step - state.nodes.roll(-1)",
        "test_forecasters.py::test_exact_on_lines",
    ),
    # Right on lines, and on curves as long as the spacing is even and the factor is not looked at.
    Mutant(
        "forecasters/_newton.py",
        "now.step - state.nodes[:-1], 0.0",
        "now.step - state.nodes[:1], 0.0",
        "test_forecasters.py::test_newton_is_exact_on_polynomials_of_its_degree",
    ),
    # What is owed is paid once, not at every step of the gap.
    Mutant(
        "forecasters/_newton.py",
        "highest & (offsets[0] == 1)",
        "highest & (offsets[0] >= 1)",
        "test_forecasters.py::test_what_a_gap_was_off_is_repaid_at_the_very_next_step",
    ),
    # Nor are steps counted that were computed.
    Mutant(
        "forecasters/_newton.py",
        "gap = nodes[0] - nodes[1]",
        "gap = nodes[0] - nodes[1] + 1",
        "test_forecasters.py::test_nothing_of_a_polynomial_stays_owed",
    ),
    # A gap is repaid by the next one, not by itself.
    Mutant(
        "planning/replay.py",
        "(gap - 1).clamp(min=0)",
        "gap",
        "test_replaying.py::test_errors_are_those_of_a_live_run",
    ),
    # Two computed steps in a row: the gap before them is not repaid.
    Mutant(
        "planning/planner.py",
        "cost[:, 0] = bare",
        "cost[:, 0] = left",
        "test_planning.py::test_no_plan_is_better",
    ),
    # Any gain of a mean is a gain.
    Mutant(
        "planning/choosing.py",
        "return len(gains) == 1 or not",
        "return True or not",
        "test_choosing.py::test_a_move_that_only_fits_these_samples_is_not_made",
    ),
    # The polynomial through the values is a product.
    Mutant(
        "forecasters/_newton.py",
        "ahead / apart).prod(-1)",
        "ahead / apart).sum(-1)",
        "test_replaying.py::test_weights_are_what_is_predicted",
    ),
    # The reference of a signal is the last computed step, not the one before.
    Mutant(
        "planning/replay.py",
        "sums[step][last])",
        "sums[step][step - 1])",
        "test_replaying.py::test_decisions_are_those_of_a_live_run",
    ),
    # What is left out after the probe is not the whole chain.
    Mutant(
        "running/spans.py",
        "residual - front[stream.key] if stream.key in front else residual",
        "residual",
        "test_recording.py::test_a_trace_holds_what_the_model_computed",
    ),
    # A gap may be as long as is allowed, and no longer.
    Mutant(
        "planning/planner.py",
        "last = min([c + self._longest + 1,",
        "last = min([c + self._longest + 2,",
        "test_planning.py::test_gaps_are_as_long_as_allowed_and_no_longer",
    ),
    # What is left of an error at the end is little where noise is what most of it is of.
    Mutant(
        "planning/trace.py",
        "(((1 - left) * self.spread).square() + left.square()).sqrt()",
        "((left * self.spread).square() + (1 - left).square()).sqrt()",
        "test_planning.py::test_errors_are_carried_as_the_flow_of_normal_data_carries_them",
    ),
    Mutant(
        "planning/planner.py",
        "self._gram, self._sizes = trace.gram(site), trace.reach",
        "self._gram, self._sizes = trace.gram(site), trace.step_sizes",
        "test_planning.py::test_plans_for_carried_errors_are_the_best_for_those",
    ),
    Mutant(
        "planning/choosing.py",
        "return max(may_run,",
        "return min(may_run,",
        "test_choosing.py::test_choosing_takes_the_plan_that_keeps_most",
    ),
    # The shortest even interval is tried that the number of steps allows.
    Mutant(
        "planning/choosing.py",
        "len(range(0, steps, interval)) <= count)",
        "len(range(0, steps, interval)) <= max(count - 1, 1))",
        "test_choosing.py::test_even_intervals_are_among_the_candidates",
    ),
    # What must be computed is not moved, nor is a gap made too long.
    Mutant(
        "planning/choosing.py",
        "return self._forced <= {*nodes} and (",
        "return (",
        "test_choosing.py::test_refining_moves_single_steps_and_keeps_what_is_better",
    ),
    # The most promising first.
    Mutant(
        "planning/choosing.py",
        "key=lambda each: each.error or 0.0)",
        "key=lambda each: -(each.error or 0.0))",
        "test_choosing.py::test_refining_moves_single_steps_and_keeps_what_is_better",
    ),
    # What is better is gone on from.
    Mutant(
        "planning/choosing.py",
        "                best = near",
        "                pass",
        "test_choosing.py::test_refining_moves_single_steps_and_keeps_what_is_better",
    ),
    # No plan is run twice.
    Mutant(
        "planning/choosing.py",
        "if plan.steps not in self._kept:",
        "if True:",
        "test_choosing.py::test_refining_finds_fewer_steps",
    ),
    # Two products are too few for a sketch of what is the same everywhere.
    Mutant(
        "planning/recording.py",
        "(0x45D9F3B,) * 3",
        "(0x45D9F3B, 0x119DE1F3)",
        "test_recording.py::test_a_sketch_of_what_is_the_same_everywhere_is_not_off",
    ),
    # A sample that is equal does not make up for one that is ruined.
    Mutant(
        "planning/choosing.py",
        ".clamp(max=ENOUGH)",
        "",
        "test_choosing.py::test_a_sample_that_is_equal_does_not_hide_one_that_is_ruined",
    ),
    # Two calls of one step share it.
    Mutant(
        "planning/sampler.py",
        "(whole / step.bincount(minlength=len(times)).clamp(min=1))[step]",
        "whole[step]",
        "test_recording.py::test_step_sizes_of_other_clocks",
    ),
    # From nothing left out to most is no rise of an error, and a cliff.
    Mutant(
        "planning/replay.py",
        "return below.computed_steps == below.steps and",
        "return below.computed_steps < below.steps and",
        "test_replaying.py::test_from_nothing_to_nearly_everything_is_a_cliff",
    ),
    # An error counts as far as the sampler goes with it.
    Mutant(
        "planning/planner.py",
        "factors * self._sizes[last + 1 :, None], 1)",
        "factors * self._sizes.mean(), 1)",
        "test_planning.py::test_no_plan_is_better",
    ),
    Mutant(
        "planning/replay.py",
        "summed.index_add_(0, gap, off * sizes[:, None])",
        "summed.index_add_(0, gap, off)",
        "test_replaying.py::test_errors_are_those_of_a_live_run",
    ),
    # A block that reads a tensor of nobody's is not told of others.
    Mutant(
        "structure/alike.py",
        "self.alone &= all(place in given or place in made for place in map(address, inputs))",
        "self.alone &= True",
        "test_alike.py::test_a_block_that_does_more_than_compute_is_no_account_of_others",
    ),
    Mutant(
        "structure/alike.py",
        "if account.sight == sight and account.outside.same():",
        "if account.sight == sight:",
        "test_alike.py::test_a_global_that_has_changed_is_looked_at",
    ),
    Mutant(
        "structure/reach.py",
        "if own and id(code) not in self._functions and",
        "if own and False and",
        "test_alike.py::test_what_blocks_are_told_past_their_arguments_is_noticed",
    ),
    # What decides outside of the model is part of what tells one record from another.
    Mutant(
        "structure/reach.py",
        "else (inside, self._reach.form())",
        "else inside",
        "test_store.py::test_what_the_model_is_told_outside_is_another_form",
    ),
    # A module is what it does: a bare core is not the attention, and an adapter is no feed-forward network.
    Mutant(
        "structure/parts.py",
        "    if activity.core:",
        "    if False:",
        "test_kinds.py::test_modules_are_what_they_do",
    ),
    Mutant(
        "structure/parts.py",
        "self.serial |= bent in origins",
        "self.serial |= multiplied in origins",
        "test_kinds.py::test_modules_are_what_they_do",
    ),
    Mutant(
        "structure/forms.py",
        "found.append((name, kind, value))",
        "found.append((name, kind))",
        "test_alike.py::test_a_block_that_is_not_like_the_others_is_looked_at",
    ),
    Mutant(
        "structure/store.py",
        "if kept is None or kept.form != form:",
        "if kept is None:",
        "test_store.py::test_what_changes_in_an_object_is_seen",
    ),
    Mutant(
        "structure/store.py",
        "if not found.reaches(model):",
        "if True:",
        "test_store.py::test_a_model_is_not_kept_alive",
    ),
)
