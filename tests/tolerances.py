"""Every tolerance of the test suite, with its reason. Nothing is read from the environment or loosened."""

from __future__ import annotations

import math

import torch

FP32_EPS = torch.finfo(torch.float32).eps

# Relative RMS error of an fp32 operation on up to 131 steps against fp64. A sum of n products of size 1 is off by about
# sqrt(n) * eps; the cumulative log decay enters an exponential, which costs another factor of its size (up to ~40).
OP_FP32 = 2e-5

# What our fp32 operation may be worse than transformers' fp32 version of it, in relative RMS against fp64: both round,
# at different places, and a tensor that one of them happens to get exactly right must not fail the other.
OP_OVER_PEER = 2e-6

# fp64 against fp64 in another order of summation: 131 steps * 2.2e-16, times the amplification of the exponential.
OP_FP64 = 1e-12

# bf16 has 8 bits: rounding an output once costs half a unit of 2^-8 of it, 0.2 %, never more.
BF16_ROUND_ONCE = 2.0**-8

# Logits of order 1 of a 3-layer fp32 model computed in another order (token by token, packed, padded): each layer
# contributes a few eps of its activations' size (up to ~10); 1e-5 leaves no room for a missed token or document.
LOGITS_FP32 = 1e-5

# What the above becomes where a model amplifies: this many times what one rounding of its embeddings does to the logits
# (`contracts.tiny.rounding_effect`), at most AMPLIFIED. Over all families and several processors the order of a sum was
# worth 0.1 to 1.6 of that effect; a missed token or document is worth thousands.
ROUNDINGS = 4
AMPLIFIED = 1e-4

# Logits of a merged model: the weight is rounded once to fp32 and the products are summed in another order.
LOGITS_MERGED = 2e-5

# Logits against a family's forward in transformers, where that computes less exactly than ours, beside the bounds above.
# Its RG-LRU forms 1 - a^2 from a rounded a, which cancels where a gate is nearly closed: up to 4.5e-5 were seen against
# ours, which agrees with itself to 2e-6.
PLAIN_FORWARD = {"recurrent_gemma": 2e-4}

# Losses and weights of two equal runs that sum their gradients in another order (accumulated, packed): relative.
# Adam divides by the root of the second moment, so a relative difference in a gradient passes through undamped.
RUN_LOSS = 1e-5

# Weights after a few AdamW steps: an element whose gradient is rounding noise moves by up to lr in either direction, so
# single elements may differ by a few lr; the mean over a tensor may not.
RUN_WEIGHTS_MEAN = 1e-2

# Gradients of two rows at once and of one after the other: the same products, summed in another order, relative to the
# largest and to the mean element; the core's, which nearly cancel, lose another digit.
GRADIENTS_FP32 = 1e-5

# bf16 autocast rounds every weight, as one random step of bf16 in each weight does, and the activations beside them: the
# gradient goes as far, times a small number (measured: 1 for most tensors, at most 3.3).
BF16_STEPS = 5


def relative_rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the error over the RMS of the truth, in fp64; absolute where the truth is zero, infinite where NaN was found.

    A maximum over several would lose a NaN that is not the first of them.
    """
    truth = truth.double()
    if bool(found.isnan().any()):
        return math.inf
    error = (found.double() - truth).pow(2).mean().sqrt()
    size = truth.pow(2).mean().sqrt()
    return float(error / size) if size > 0 else float(error)


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |difference| over the larger of 1 and the largest |expected|."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert bool(torch.isfinite(found).all()), "the compared values are not finite"
    return float((found.double() - expected.double()).abs().max() / max(1.0, float(expected.abs().max())))
