"""RWKV-4's weighted key-value average over whole sequences; one step is a sequence of length one."""

from ssmtune.ops.rwkv_wkv.reference import rwkv_wkv, rwkv_wkv_recurrence

__all__ = ["rwkv_wkv", "rwkv_wkv_recurrence"]
