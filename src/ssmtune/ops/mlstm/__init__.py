"""xLSTM's matrix memory over whole sequences; one step is a sequence of length one."""

from ssmtune.ops.mlstm.reference import mlstm, mlstm_recurrence

__all__ = ["mlstm", "mlstm_recurrence"]
