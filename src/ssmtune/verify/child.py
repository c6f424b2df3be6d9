"""The fresh process of check `reload`: python -m ssmtune.verify.child REQUEST.json

Loads the base and the adapter directory, writes the logits with and without the adapter to a safetensors file.
Exits with 1 and one line on stderr when ssmtune refuses to load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request_path: str) -> int:
    """Answer one request. Returns the exit status."""
    import torch
    from safetensors.torch import load_file, save_file

    from ssmtune.attach import load
    from ssmtune.errors import SsmtuneError
    from ssmtune.verify.forward import path_logits

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    ids_BT = load_file(request["input"])["ids"].to(request["device"])
    try:
        adapted = load(_base(request), request["adapter"])
        with torch.no_grad():
            logits = path_logits(adapted, "eval", ids_BT)
            with adapted.disable_adapter():
                base_logits = path_logits(adapted, "eval", ids_BT)
    except SsmtuneError as error:
        print(error, file=sys.stderr)
        return 1
    save_file({"adapted": logits.cpu().contiguous(), "base": base_logits.cpu().contiguous()}, request["output"])
    return 0


def _base(request: dict[str, Any]) -> Any:
    from safetensors.torch import load_file
    from transformers import CONFIG_MAPPING

    from ssmtune.quantize import load_base
    from ssmtune.quantized import Quantized
    from ssmtune.verify.fresh import build_base

    quantized = None if request["quantized"] is None else Quantized.from_dict(request["quantized"])
    if request["base_name"] is not None:
        quantize_config = None if quantized is None else quantized.config
        base = load_base(
            request["base_name"], dtype=request["dtype"], device=request["device"], quantize_config=quantize_config
        )
        base.set_attn_implementation(request["attention"])
        return base
    fields = json.loads(Path(request["config"]).read_text(encoding="utf-8"))
    config = CONFIG_MAPPING[fields["model_type"]].from_json_file(request["config"])
    config._attn_implementation = request["attention"]
    tensors = load_file(request["tensors"], device=request["device"])
    if quantized is not None:
        from ssmtune.four_bit import unpack

        tensors = unpack(tensors, quantized.paths, request["device"])
    return build_base(config, tensors, device=request["device"], quantized=quantized)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
