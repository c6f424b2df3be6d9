"""The Mamba-2 state-space scan (SSD) over whole sequences."""

from ssmtune.ops.mamba2_chunk_scan.reference import mamba2_chunk_scan, mamba2_recurrence

__all__ = ["mamba2_chunk_scan", "mamba2_recurrence"]
