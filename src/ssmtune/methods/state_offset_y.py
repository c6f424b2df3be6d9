"""State-offset tuning, y variant: a trained y' is added to the recurrence's output at every step.

Source: Kang et al., "State-offset Tuning", ACL 2025, section 4; for Mamba-2 and Gated DeltaNet the port is ours.
It acts before the gate and the norm.
"""

from __future__ import annotations

from ssmtune.methods._offset import offset_method

METHOD = offset_method(
    "state_offset_y",
    "state.output_offset",
    summary="A constant added to the recurrence's output, before gate and norm.",
    formula="elements of the output (Mamba-1: D_in; Mamba-2: H P; Gated DeltaNet: H_v d_v)",
    overhead="one addition per token",
    adds="a constant to the recurrence's output",
)
