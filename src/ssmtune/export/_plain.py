"""Logits of a model directory in plain transformers (and PEFT), as somebody without ssmtune computes them.

This text is run by `python -c TEXT REQUEST.json`: nothing of ssmtune is imported, and the end of it makes sure.
"""

import json
import sys
from pathlib import Path


def main(request_path: str) -> None:
    """Write one tensor of logits [T, V] per prompt of the request."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=request["dtype"])
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    model.eval()
    with torch.no_grad():
        logits = {
            str(i): model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float().contiguous()
            for i, prompt in enumerate(request["prompts"])
        }
    save_file(logits, request["out"])
    assert not any(name.partition(".")[0] == "ssmtune" for name in sys.modules), "ssmtune was imported"


main(sys.argv[1])
