"""One step of the Mamba-2 recurrence, for decoding."""

from ssmtune.ops.selective_state_update.reference import selective_state_update

__all__ = ["selective_state_update"]
