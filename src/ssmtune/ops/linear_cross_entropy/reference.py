"""The loss of an output head in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmtune.ops.precision import outside_autocast


@outside_autocast
def linear_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy of hidden W^T: logits in the inputs' dtype, the loss in fp32 or wider."""
    logits = F.linear(hidden_ND, weight_VD)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_N, reduction="sum")
