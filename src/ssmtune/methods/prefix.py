"""Prefix-tuning: learned inputs of every layer at M positions before the text.

Source: Li and Liang, "Prefix-Tuning", ACL 2021, section 4, which learns keys and values; here, as Galim et al. (ICML 2025)
define it for SSMs, each layer learns M positions of its own input, from which attention makes keys and values and a recurrence
its initial state. Without a projection.
"""

from __future__ import annotations

from ssmtune.methods._virtual import positions_method

METHOD = positions_method(
    "prefix",
    summary="Inputs of every layer at M learned positions before every text.",
    formula="M d per layer that mixes tokens, for M positions",
    source="Li and Liang 2021, section 4; Galim et al. 2025",
    needs="A prefix goes into the layers' inputs; RWKV, RecurrentGemma, S4D, xLSTM and multimodal models are not served.",
)
