"""Prompt tuning: learned embeddings before the first token of every text.

Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, section 2; for SSMs Galim et
al., ICML 2025. In a hybrid they act through attention and through the recurrent state.
"""

from __future__ import annotations

from ssmtune.methods._virtual import positions_method

METHOD = positions_method(
    "prompt",
    summary="Embeddings of M learned tokens before every text.",
    formula="M d for M tokens",
    source="Lester et al. 2021, section 2; Galim et al. 2025",
    needs="A prompt goes into the backbone's embeddings; RWKV, RecurrentGemma, S4D, xLSTM and multimodal models are not served.",
)
