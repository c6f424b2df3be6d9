"""The real-gated linear recurrent unit of Griffin over whole sequences; one step is a sequence of length one."""

from ssmtune.ops.rg_lru.reference import rg_lru, rg_lru_recurrence

__all__ = ["rg_lru", "rg_lru_recurrence"]
