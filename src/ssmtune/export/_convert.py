"""The converter's own process: python -m ssmtune.export._convert REQUEST.json

llama.cpp's converter signals what it cannot do by many kinds of exceptions; in a process of its own each of them is an
exit status and a last line on stderr. Writes the GGUF file, and what it found out, to the paths of the request.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    """Convert one model directory."""
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    directory = Path(request["model"])
    found: dict[str, Any] = {"pre_type": None, "pre_type_by": None}

    hparams = ModelBase.load_hparams(directory, False)
    known = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    def pre_type(self: Any, tokenizer: Any) -> str:
        try:
            name, by = known.get_vocab_base_pre(self, tokenizer), "the converter's table of tokenizers"
        except NotImplementedError:
            if request["pre_type"] is None:
                raise
            name, by = request["pre_type"], "the tokenizer's splitting rule"
        found.update(pre_type=name, pre_type_by=by)
        return str(name)

    # The converter's class with one answer added; its registry holds the original. transformers saves no layers for
    # the prediction of several tokens, which `no_mtp` says.
    answers = {"model_arch": known.model_arch, "get_vocab_base_pre": pre_type, "no_mtp": True}
    if request["partial_rope"]:
        answers["modify_tensors"] = _modify_for_partial_rope(known, **request["partial_rope"])
    if request["head_of_its_own"]:
        answers["generate_extra_tensors"] = _head_from_embeddings
    answers["index_tensors"] = _index_with_known_names(known)
    resolved = type(known.__name__, (known,), answers)
    with torch.inference_mode():
        resolved(directory, types[request["type"]], Path(request["out"])).write()
    found["core_types"] = _core_types(Path(request["out"]))
    Path(request["found"]).write_text(json.dumps(found), encoding="utf-8")


SAVED_AS_EXPERTS = re.compile(r"\.block_sparse_moe\.(gate|up|down)_proj\.")
"""Kimi Linear's layers without experts, as transformers saves them: under the name of those with experts."""


def _index_with_known_names(known: Any) -> Any:
    """The converter's `index_tensors`, with the names that it knows."""

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Any]:
        found = known.index_tensors(self, remote_hf_model_id)
        return {SAVED_AS_EXPERTS.sub(r".mlp.\1_proj.", name): tensor for name, tensor in found.items()}

    return index_tensors


def _head_from_embeddings(self: Any) -> Any:
    """The head of a model that ties it: the converter scales head and embeddings by factors of their own."""
    yield "lm_head.weight", self.model_tensors["model.embed_tokens.weight"]()


def _core_types(path: Path) -> list[str]:
    """The types that A, D and dt are stored in: rounded to 16 bits, what was trained in them would be lost."""
    import gguf

    core = re.compile(r"\.ssm_(a|d|dt\.bias)$")
    return sorted({t.tensor_type.name for t in gguf.GGUFReader(path).tensors if core.search(t.name)})


def _modify_for_partial_rope(known: Any, *, num_heads: int, num_kv_heads: int, rotary_dim: int) -> Any:
    """The converter's `modify_tensors`, given q and k whose rows end up right after what it does to them.

    It interleaves the two halves of each head, for llama.cpp rotates neighbours; where rope turns only the first
    `rotary_dim` rows of a head, only those must be interleaved.
    """

    def modify_tensors(self: Any, data_torch: Any, name: str, bid: int | None) -> Any:
        for suffix, num in (("q_proj.weight", num_heads), ("k_proj.weight", num_kv_heads)):
            if name.endswith(suffix):
                data_torch = interleave_for_partial_rope(data_torch, num, rotary_dim)
        return known.modify_tensors(self, data_torch, name, bid)

    return modify_tensors


def interleave_for_partial_rope(w_OI: Any, num_heads: int, rotary_dim: int) -> Any:
    """Return rows that the converter's interleaving of whole heads turns into heads interleaved up to `rotary_dim`."""
    import torch

    num_out, num_in = w_OI.shape
    head_dim = num_out // num_heads
    heads = w_OI.reshape(num_heads, head_dim, num_in)
    turned = heads[:, :rotary_dim].reshape(num_heads, 2, rotary_dim // 2, num_in).swapaxes(1, 2)
    wanted = torch.cat([turned.reshape(num_heads, rotary_dim, num_in), heads[:, rotary_dim:]], dim=1)
    return wanted.reshape(num_heads, head_dim // 2, 2, num_in).swapaxes(1, 2).reshape(num_out, num_in)


if __name__ == "__main__":
    main(sys.argv[1])
