"""The Mamba-1 selective scan over whole sequences, and one step of it for decoding."""

from ssmtune.ops.mamba1_selective_scan.reference import mamba1_recurrence, mamba1_selective_scan
from ssmtune.ops.mamba1_selective_scan.step import mamba1_state_update

__all__ = ["mamba1_recurrence", "mamba1_selective_scan", "mamba1_state_update"]
