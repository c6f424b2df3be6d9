"""Which fault is planted where, and what names it: the table in docs/verify.md, held to the tests by test_planted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One fault: the check or stage that names it, the test that plants it, and the families it is planted in."""

    fault: str
    named_by: str
    test: str
    """File below `tests`, two colons, function."""
    families: tuple[str, ...]
    published: bool = False
    """A study or a tool suffered it."""


RECURRENCES = ("mamba", "falcon_h1", "qwen3_5")
HYBRIDS = ("jamba", "falcon_h1", "qwen3_5")
FUSED = ("mamba", "falcon_h1", "granite_hybrid")
GRANITE = ("granite_hybrid",)
EVERY_FAMILY = ("every family",)
EVERY_TASK = ("every task",)

MANY = "faults/test_every_recurrence.py::"
ADAPTER = "faults/test_adapter_faults.py::"
FILES = "faults/test_file_faults.py::"
BITS = "faults/test_four_bit_faults.py::"


def _published(fault: str, named_by: str, test: str, families: tuple[str, ...]) -> Planted:
    return Planted(fault=fault, named_by=named_by, test=test, families=families, published=True)


def _planted(fault: str, named_by: str, test: str, families: tuple[str, ...]) -> Planted:
    return Planted(fault=fault, named_by=named_by, test=test, families=families)


PLANTED = (
    _published(
        "wrong targets: a tutorial's list of names", "coverage", MANY + "test_the_targets_of_tutorials", HYBRIDS
    ),
    _published("the core is lost on saving", "reload", MANY + "test_a_core_that_is_lost_on_saving", RECURRENCES),
    _published(
        "adapter and side file of different steps", "reload", MANY + "test_halves_of_different_steps", RECURRENCES
    ),
    _published(
        "`out_proj` is dead under a fused kernel",
        "liveness",
        MANY + "test_a_fused_kernel_that_swallows_out_proj",
        FUSED,
    ),
    _published(
        "`out_proj` is read past in training, or on the cached step",
        "liveness",
        MANY + "test_an_output_projection_that_a_path_reads_past",
        RECURRENCES,
    ),
    _published("bf16 rounds the steps of `dt_bias` away", "moved", MANY + "test_a_core_in_place_in_bf16", RECURRENCES),
    _published("packed documents leak", "packing", MANY + "test_documents_that_leak", RECURRENCES),
    _published(
        "trained weights are never loaded, since the model was wrapped before",
        "reload",
        MANY + "test_weights_that_are_never_loaded",
        RECURRENCES,
    ),
    _published(
        "a scorer without a stop rule",
        "doctor",
        "unit/test_doctor.py::test_a_scorer_without_a_stop_rule_is_found",
        EVERY_TASK,
    ),
    _published(
        "left padding erodes an initial state",
        "padding",
        MANY + "test_an_initial_state_that_padding_wears_down",
        RECURRENCES,
    ),
    _planted(
        "rows of a fused tensor are off by one",
        "inventory",
        "contracts/test_families.py::test_wrong_row_ranges_are_refused",
        EVERY_FAMILY,
    ),
    _planted(
        "a plan of another model",
        "attach",
        "contracts/test_methods.py::test_plan_of_another_model_is_refused_before_anything_is_touched",
        EVERY_FAMILY,
    ),
    _planted(
        "merging twice", "merge", "contracts/test_methods.py::test_second_use_after_merge_is_refused", EVERY_FAMILY
    ),
    _planted("the scale is applied twice", "merge", MANY + "test_a_scale_that_is_applied_twice", RECURRENCES),
    _planted(
        "a change is rounded before it is added",
        "merge",
        FILES + "test_a_change_that_is_rounded_before_the_sum",
        GRANITE,
    ),
    _planted("a frozen tensor is nudged", "frozen", MANY + "test_a_nudged_frozen_tensor", RECURRENCES),
    _planted("a tie is broken", "frozen", ADAPTER + "test_a_broken_tie_is_named", GRANITE),
    _planted(
        "the convolution's state is off by one",
        "paths_agree",
        MANY + "test_a_convolution_state_that_is_off_by_one",
        RECURRENCES,
    ),
    _planted(
        "a core tensor is missing from the file",
        "reload",
        MANY + "test_a_core_tensor_taken_out_of_the_file",
        RECURRENCES,
    ),
    _planted(
        "plain PEFT loads the directory and drops the core",
        "peft_refuses",
        FILES + "test_a_directory_that_plain_peft_would_load_without_the_core",
        GRANITE,
    ),
    _planted(
        "an adapter is removed after planning", "coverage", ADAPTER + "test_an_adapter_removed_after_planning", GRANITE
    ),
    _planted(
        "a file of the last checkpoint is damaged",
        "resume",
        "faults/test_sound.py::test_a_damaged_checkpoint_is_named",
        GRANITE,
    ),
    _planted(
        "a tensor that is read raw is in 4 bits",
        "four_bits",
        BITS + "test_a_tensor_that_is_read_raw",
        ("mamba", "jamba"),
    ),
    _planted(
        "`out_proj` is left out of 4 bits in silence",
        "four_bits",
        BITS + "test_an_output_projection_that_is_left_out",
        GRANITE,
    ),
    _planted("a 4-bit code or its scale is nudged", "frozen", BITS + "test_a_nudged_code_or_scale", GRANITE),
    _planted(
        "an operation ignores documents or padding",
        "doctor",
        "unit/test_doctor.py::test_an_operation_that_ignores_an_argument_is_found",
        ("mamba2_chunk_scan",),
    ),
    _planted(
        "a gradient is wrong under a right forward",
        "doctor",
        "unit/test_doctor.py::test_a_wrong_gradient_under_a_right_forward_is_found",
        ("mamba2_chunk_scan",),
    ),
)
