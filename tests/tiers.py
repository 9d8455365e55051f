"""Which tests `make test` leaves to `make test-slow`: a law on one more class, compiled once more, or a whole document.

No law is left out of the first: each keeps the parameters that `FAST` names, chosen by kind. `test_tiers.py` holds this
against what is collected.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Sequence

CLASSES = {
    "Flux": "joint blocks, then single ones",
    "SD3": "joint blocks, the last of another kind",
    "QwenImage": "two streams by keyword",
    "PixArt": "self- and cross-attention on an image",
    "Wan": "the same on a video",
    "Latte": "blocks in space and in time, in turn",
    "Lumina2": "refiners; it branches on data",
    "HunyuanVideo": "a text refiner that must not be merged",
    "WanVACE": "hints added between blocks",
    "StableAudio": "sound",
}
"""The classes of diffusers that stand for the others, and for what."""

_ONE_OF_TEN = rf"^({'|'.join(CLASSES)})$"

_ONE_A_KIND_OF_FILE = "|".join(
    rf"^{name}\.py-test_{law}"
    for name, law in (
        ("_drift", "doubt"),
        ("_newton", "what_a_gap"),
        ("planner", "no_plan_is_better0"),
        ("replay", "decisions"),
        ("alike", "a_global"),
        ("store", "what_changes"),
    )
)

FAST: dict[str, str] = {
    "test_coverage.py::test_nothing_is_lost": rf"{_ONE_OF_TEN}|^(F5DiT|XTransformers)$",
    "test_coverage.py::test_no_way_of_weights_is_lost": r"^int8 weight.*-eager$",
    "test_exactness.py": _ONE_OF_TEN,
    "test_output.py::test_every_class_of_the_zoo": _ONE_OF_TEN,
    "test_module_parity.py::test_all_attention_that_diffusers_knows_is_found": _ONE_OF_TEN,
    "test_cli.py::test_a_class_takes_the_inputs_that_are_known_of_it": r"^(PixArt|Lumina2)",
    "test_compiled.py::test_one_graph_for_every_step_trajectory_and_length": r"^Wan-",
    "test_compiled.py::test_one_program_an_action": r"^Wan-",
    "test_compiled.py::test_inductor_equals_eager": r"^DiT-programs$",
    "test_compiled.py::test_another_sequence_length_costs_one_more_graph_at_most": r"^DiT-programs$",
    "test_compiled.py": r"Flux|^(programs|first_block_cache)?$",
    "test_grid.py::test_a_state_that_is_given_away_is_written_to": r"^(chain-drift|output-interval)-",
    "test_grid.py::test_what_others_write_to_compiled": r"^attention$",
    "test_guidance.py::test_two_calls_compiled": r"^programs$",
    "test_modules_compiled.py::test_nothing_compiles_twice": r"^Wan-pyramid_attention_broadcast-programs$",
    "test_modules_compiled.py::test_regional": r"^taylorseer$",
    "test_docs.py::test_every_block_of_a_page_runs": r"api/|your-own-dit",
    "test_docs.py::test_every_block_of_a_docstring_runs": r"cached$",
    "test_mutants.py::test_mutant_is_killed": _ONE_A_KIND_OF_FILE,
    "test_pipeline_calls.py::test_the_next_image_is_that_of_a_fresh_pipeline": r"^a call-[ft]|^an exc|resolution-f",
    "test_pipeline_calls.py::test_a_copy_of_a_pipeline_is_not_cached_and_runs_its_own_transformer": r"^(copy|pickle)$",
    "test_pipeline_calls.py::test_a_call_of_another_kind_is_that_of_a_fresh_pipeline": r"^(batch|height)$",
    "test_pipeline_calls.py::test_nothing_is_left": r"wan_two$",
    "test_pipeline_calls.py::test_image_to_image_has_the_steps_that_are_left": r"^flux",
    "test_schedules.py::test_every_scheduler_is_on_the_page_and_goes_well": (
        "^(CMSt|CogVideoXDPM|DDIMInv|EDME|FlowMatchE|FlowMatchH|IP|KDPM2D|MiniMax|PNDM|SCM|UniPC|VQ)"
    ),
    "test_pipeline_guidance.py::test_the_halves_of_a_guider_are_halves": r"^CFG$|stops$",
    "test_pipeline_features.py::test_a_pipeline_with": r"^(torch.compile|model offload|LoRA)-wan$",
    "test_pipeline_features.py::test_a_picture_that_steers": r"control$",
    "test_pipeline_features.py::test_compiled_steps_are_kept_from_call_to_call": r"^flux-programs$",
    "test_pipeline_configs.py::test_every_field_is_that_of_the_hooks": r"^(threshold|mag|no type|identifiers|faster)$",
    "test_replaying.py::test_errors_are_those_of_a_live_run": r"^(hold|newton 1 repaid|taylor 2|two-point|feedback)$",
    "test_output.py::test_every_way_to_run_is_the_same": r"^budget-newton 2$",
    "test_parity.py::test_first_block_cache_is_that_of_diffusers": r"^(Flux|Wan|PixArt)",
    "test_parity.py::test_mag_cache_is_that_of_diffusers": r"^(Flux|SD3|Wan)-",
    "test_parity.py::test_mag_cache_is_that_of_diffusers_on_classes_beyond_the_required": r"^(DiT|WanI2V|Kandinsky5)$",
    "test_module_parity.py::test_pyramid_attention_broadcast": r"^(Latte|Wan)-\(2, ",
    "test_module_parity.py::test_faster_cache_with_both_halves": r"-2-5$",
    "test_module_parity.py::test_faster_cache_without_guidance": r"^(Flux|QwenImage)-2$",
    "test_module_parity.py::test_taylorseer": r"^(Flux|SD3)-[12]-torch.float32$|^QwenImage-1-torch.bfloat16$",
    "test_forecasters.py::test_compiled_agrees_and_never_recompiles": r"-eager$",
    "test_foreign.py::test_a_hook_on_the_root": r"^Wan$",
    "test_forecasters.py::test_nothing_of_a_polynomial_stays_owed": r"^2$",
    "test_modules.py::test_another_shape_is_refused_where_nothing_is_computed": r"eager$|^attention-",
    "test_kinds.py::test_every_method_finds_them_and_computes_what_the_model_does": r"plain$|^unknown-|^torch's-four",
    "test_tuning.py::test_a_pipeline_is_recorded_and_its_plan_runs": r"^wan",
    "test_alike.py::test_the_record_of_a_class_of_diffusers_is_that_of_looking_at_every_block": r"^(Flux|Wan)$",
    "test_recording.py::test_every_way_to_run_records_the_same": r"^(plain-one|two-programs-True|plain-reg|two-reg)",
    "test_work.py::test_work_of_a_mask": r"^(mlp|output)-",
    "test_wrapped.py::test_in_one_graph_it_is_entered": r"^the (blocks|head)-parts$",
    "test_work.py::test_one_forward_of_every_action_tells_of_the_whole_run": r"^first_block_cache",
    "test_replayed.py::test_what_outlives_a_step_lies_where_no_replay_writes": r"^first\w+-True$",
    "test_regional.py::test_inductor_equals_eager": r"^pyramid_attention_broadcast$",
    "test_regional.py::test_a_hook_is_called_wherever_it_is": r"^True-blocks.0-chain|^True-blocks.2.ff.0-attention",
    "test_regional.py::test_every_cell_is_that_of_the_step_itself": r"^drift-\w+-hold$|^interval-.*newton 2$",
    "test_waiting.py::test_what_a_block_writes_draws_or_asks_of_others_stays_in_its_order": r"^[cdimnor].*first",
    "test_waiting.py::test_the_text_half_of_the_probe_is_computed_where_the_rest_is": r"^Flux$",
    "test_pipelines.py::test_streams_without_names_are_told_apart": r"^kandinsky-(first|pyramid)|^latte-first",
    "test_structure.py::test_compiled_skips_are_those_of_a_cache_by_hand": r"^(swapped|skips)-",
    "test_foreign.py::test_a_replaced_module_raises_until_the_next_init": r"^lora|1_0$",
    "test_foreign.py::test_weights_that_are_loaded_block_by_block": r"^Flux-block_level-(mask|parts)|Wan-leaf\w+-probe",
    "test_modular.py::test_it_is_cached_as_a_classic_one": r"^(flux|wan_two)$",
    "test_modular.py::test_the_unconditional_half_is_left_out_whatever_the_guider": r"^CFG$",
    "test_pipeline_configs.py::test_attention_is_left_out_where_the_hooks_leave_it_out": r"^kinds0-(Flux|Wan|Lumina2)$",
    "test_foreign.py::test_hooks_of_diffusers_on_the_root_compiled": r"^programs$",
    "test_foreign.py::test_a_patched_forward_on_the_root": r"by_(method|closure)$",
    "test_foreign.py::test_a_patched_forward_on_a_block": r"by_(method|closure|partial)$",
    "test_foreign.py::test_offload_of_the_model": r"^Wan$",
    "test_foreign.py::test_offload_of_every_weight": r"^Flux$",
    "test_foreign.py::test_a_hook_on_every_module": r"^Wan$",
    "test_foreign.py::test_blocks_compiled_in_place": r"^False$",
    "test_pipeline_calls.py::test_mag_cache_in_two_steps": r"^wan",
    "test_pipelines.py::test_first_block_cache": r"^(flux_guided|qwen|wan_two|ltx)$",
    "test_pipelines.py::test_mag_cache": r"^(flux|qwen|wan|ltx)$",
    "test_pipelines.py::test_classes_on_which_the_hooks_fail": r"^(sd3|latte)-(mag|first)|^kandinsky-pyramid",
    "test_pipelines.py::test_faster_cache": r"^(flux|cogvideox|latte)$",
    "test_state.py::test_an_exception_in_a_step_leaves_the_state_valid": r"^two|-(first_block|mag)$",
    "test_state.py::test_modes_dtypes_and_batches": r"^1-no_grad|^3-enable_grad|inference_mode-dtype1$",
    "test_regional.py::test_blocks_of_one_kind_are_two_programs_however_many_they_are": r"^attention.mlp$",
    "test_cli.py::test_without_the_extra_it_says_what_to_install": r"arguments[01]$",
    "test_structure.py::test_what_the_probe_has_embedded_is_not_embedded_again": r"^(pure|in place|cached|scale)-",
    "test_store.py::test_a_model_is_not_kept_alive": r"^(nothing|closure|hook)-",
    "test_errors.py::test_tensors_that_changed_since_init": r"^0-step|eagerly$",
    "test_errors.py::test_a_signal_that_is_nan_computes": r"^(eager|graph)$",
    "test_parity.py::test_first_block_cache_runs_where_the_hooks_fail": r"^(Flux2|SD3|Lumina2)$",
    "test_guidance.py::test_an_unconditional_call_with_nothing_to_answer_from_computes": r"^(eager|one graph)$",
    "test_native_layers.py::test_every_method_works_and_computes_what_the_model_does": r"^[EMD]\w+-.*-eval$",
    "test_native_layers.py::test_compiled_it_is_the_same": r"^EncoderLayer-programs$",
    "test_wrapped.py::test_in_programs_it_is_compiled_again": r"^the blocks-wrapped-parts|^the model-(wrapped|in)",
    "test_containers.py::test_every_policy_works_or_says_what_does": r"-probe$|^(pairs|parts|one|long).*-parts$",
    "test_containers.py::test_one_graph_of_blocks_that_keep_something_is_right_or_says_why_not": r"^an attr|^a list$",
    "test_containers.py::test_compiled_it_is_the_same": r"^seq.*-mask-prog|nested-probe-one|^val.*-probe-prog",
    "test_quantised.py::test_computed_steps_are_those_of_the_quantised_model": r"^Wan-\w+-eager$|^Wan-probe-programs$",
    "test_quantised.py::test_one_graph_says_what_works_instead": r"^probe$",
    "test_kernels_compiled.py": r"sums_kernel|^2$|^$",
}
"""Test, or file -> a pattern of the parameters with which it is run at once; the rest is slow."""

_OF_THE_DEMO = tuple(
    f"test_demo.py::test_{test}"
    for test in (
        "every_file_is_there",
        "rows_are_what_was_planned",
        "scores_are_consistent",
        "no_two_rows_are_the_same_plan",
        "a_chosen_plan_that_is_the_planned_one_is_left_out",
        "the_report_says_which_speedups_it_shows",
        "results_say_how_they_came_about",
        "the_report_stands_alone_and_holds_every_row",
    )
)

SLOW: dict[str, str] = {
    "test_cli.py::test_explain_of_a_model_of_real_size_computes_nothing": "a model of billions of parameters, on meta",
    "test_bench.py::test_the_kernel_benchmark_runs_dry_and_writes_every_row": "all rows of a benchmark",
    "test_bench.py::test_the_gpu_benchmark_runs_dry_and_writes_every_row": "all rows of a benchmark",
    "test_compiled.py::test_export_runs_in_a_process_that_knows_only_torch": "AOTInductor",
    "test_coverage.py::test_each_class_is_tried_in_a_process_of_its_own": "two processes that begin anew",
    "test_modules_compiled.py::test_inductor_equals_eager": "Inductor, on models of many sites",
    "test_modules_compiled.py::test_one_graph_of_inductor_equals_eager": "Inductor, on models of many sites",
    **dict.fromkeys(_OF_THE_DEMO, "a run of the demo"),
    "test_docs.py::test_the_pictures_are_those_that_the_code_of_today_draws": "all pictures",
    "test_docs.py::test_the_site_builds_without_a_warning_and_fetches_nothing": "a whole document",
    "test_docs.py::test_a_site_with_a_fault_does_not_build": "a whole document",
}
"""Tests that are slow as a whole, and why."""


OF_ONE_CLASS = (
    "test_coverage.py::test_nothing_is_lost",
    "test_exactness.py",
    "test_module_parity.py::test_all_attention_that_diffusers_knows_is_found",
    "test_output.py::test_every_class_of_the_zoo",
)
"""Tests, or files, of one class of diffusers each: run side by side they record it once."""


def order(tests: Sequence[tuple[str, str, str]]) -> list[int]:
    """The order in which to run tests, each a file, a test and its parameters: those of one class together."""
    first: dict[str, int] = {}
    places = []
    for at, (file, test, name) in enumerate(tests):
        together = file in OF_ONE_CLASS or f"{file}::{test}" in OF_ONE_CLASS
        places.append(first.setdefault(name, at) if together else at)
    return sorted(range(len(tests)), key=places.__getitem__)


def is_slow(file: str, test: str, parameters: str) -> bool:
    """Whether a test with these parameters, as pytest writes them in brackets, is left to the slow tier."""
    if f"{file}::{test}" in SLOW:
        return True
    pattern = FAST.get(f"{file}::{test}", FAST.get(file))
    return pattern is not None and re.search(pattern, parameters) is None


def covering(*axes: Sequence[Hashable], strength: int = 2, without: Sequence[tuple[int, ...]] = ()) -> list[tuple]:
    """Few combinations among which all values of any `strength` axes meet, in a fixed order.

    Args:
        *axes: the values of each.
        strength: of how many axes all values meet.
        without: sets of so many axes, in order, whose values need not meet.
    """
    places = [each for each in itertools.combinations(range(len(axes)), strength) if each not in without]

    def met(row: tuple) -> set[tuple]:
        return {(place, tuple(row[axis] for axis in place)) for place in places}

    rows = [*itertools.product(*axes)]
    left = set().union(*map(met, rows))
    chosen: list[tuple] = []
    while left:
        best = max(rows, key=lambda row: len(met(row) & left))
        chosen.append(best)
        left -= met(best)
    return chosen


def parameters(name: str) -> str:
    """What stands in the brackets of a test's name."""
    return name.partition("[")[2].removesuffix("]")
