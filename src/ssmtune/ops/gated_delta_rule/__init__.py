"""The gated delta rule (Gated DeltaNet, and KDA with a decay per key channel) over whole sequences and single steps."""

from ssmtune.ops.gated_delta_rule.reference import gated_delta_rule, gated_delta_rule_recurrence
from ssmtune.ops.gated_delta_rule.step import gated_delta_rule_update

__all__ = ["gated_delta_rule", "gated_delta_rule_recurrence", "gated_delta_rule_update"]
