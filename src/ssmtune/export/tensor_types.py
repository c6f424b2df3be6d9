"""Which type Q4_K_M gives each tensor of a GGUF file.

Source: `llama_tensor_get_type` of llama.cpp (src/llama-quant.cpp, September 2026), without its exceptions for Falcon and
for models of 70B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

Type = GGMLQuantizationType

VALUES = re.compile(r"attn_(v|qkv|kv_b)\.weight")
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ssm_conv1d|shortconv\.conv\.weight|time_mix_(first|[wva][012]|g[12]|decay_w[12])"
    r"\.weight|time_mix_lerp_fused\.weight"
)
"""Matrices that llama.cpp never quantises: norms, routers, convolutions, RWKV's small factors."""
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""For rows that blocks of 256 do not divide; rows that blocks of 32 do not divide either become F16."""


def q4_k_m_types(
    shapes: Mapping[str, Sequence[int]], *, num_layers: int, num_experts: int
) -> dict[str, tuple[Type, Type]]:
    """Return for each tensor that Q4_K_M quantises the type that the rule wants and the one that its rows allow.

    `shapes` are in ggml's order, the length of a row first. Tensors that are not named stay as they are.
    """

    def more_bits(i: int, num: int) -> bool:
        return i < num // 8 or i >= 7 * num // 8 or (i - num // 8) % 3 == 2

    num_values = sum(1 for name in shapes if VALUES.search(name))
    i_values = i_down = 0
    types = {}
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):
        row, *others = shapes[name]
        if math.prod(others) == 1 or not name.endswith("weight") or KEPT.search(name):
            continue
        wanted = Type.Q4_K
        if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shapes):
            wanted = Type.Q6_K
        elif VALUES.search(name):
            wanted = Type.Q8_0 if num_experts == 8 else Type.Q6_K if more_bits(i_values, num_values) else Type.Q4_K
            i_values += 1
        elif "attn_k.weight" in name and num_experts == 8:
            wanted = Type.Q8_0
        elif "attn_output.weight" in name and num_experts == 8:
            wanted = Type.Q5_K
        elif "ffn_down" in name:
            # Some layers have no MLP: without experts the tensors are counted, with them the layers.
            wanted = Type.Q6_K if more_bits(_layer(name) if num_experts > 1 else i_down, num_layers) else Type.Q4_K
            i_down += 1
        types[name] = (wanted, _fitting(wanted, row))
    return types


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _fitting(wanted: Type, row: int) -> Type:
    for type_ in (wanted, FALLBACKS.get(wanted, Type.F16)):
        if row % GGML_QUANT_SIZES[type_][0] == 0:
            return type_
    return Type.F16
