"""One decoding step of the gated delta rule in plain PyTorch.

Dimensions: B batch, H value heads, K key width, V value width.
"""

from __future__ import annotations

import torch

from ssmtune.ops.gated_delta_rule.reference import queries_and_keys
from ssmtune.ops.precision import outside_autocast


@outside_autocast
def gated_delta_rule_update(
    state_BHKV: torch.Tensor,
    q_BHK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g: torch.Tensor,
    beta_BH: torch.Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> torch.Tensor:
    """Return the output of one step, [B, H, V], in the dtype of `q_BHK`, and write the new state into `state_BHKV`.

    `g` is [B, H] or [B, H, K]. The arithmetic is fp32 (fp64 for fp64 inputs) and equals one step of `gated_delta_rule`.
    """
    dtype = torch.promote_types(q_BHK.dtype, torch.float32)
    q, k = queries_and_keys(q_BHK.to(dtype), k_BHK.to(dtype), v_BHV.shape[1], scale, qk_l2norm)
    g = g.to(dtype) if g.dim() == 3 else g.to(dtype)[..., None]
    state = state_BHKV.to(dtype) * torch.exp(g)[..., None]
    written = beta_BH.to(dtype)[..., None] * (v_BHV.to(dtype) - (k[..., None, :] @ state).squeeze(-2))
    state = state + k[..., None] * written[..., None, :]
    state_BHKV.copy_(state)
    return (q[..., None, :] @ state).squeeze(-2).to(q_BHK.dtype)
