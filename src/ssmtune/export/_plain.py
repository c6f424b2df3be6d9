"""Logits of a model directory in plain transformers (and PEFT), as somebody without ssmtune computes them.

This text is run by `python -c TEXT REQUEST.json`: nothing of ssmtune is imported, and the end of it makes sure.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    """Write one tensor of logits [T, V] per prompt of the request, as `<prompt>`.

    Where the directory's loader starts the model, also the tokens generated after the prompt, `<prompt>.generated`, and
    the logits that they were taken from, `<prompt>.steps`.
    """
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
    found: dict[str, Any] = {}
    with torch.no_grad():
        for i, prompt in enumerate(request["prompts"]):
            inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt]), "use_cache": False}
            if request["num_generated"]:
                start: Any = runpy.run_path(str(Path(request["model"]) / "load_start.py"))["start"]
                num = request["num_generated"]
                once = {"max_new_tokens": num, "min_new_tokens": num, "do_sample": False, "num_beams": 1}
                output = model.generate(
                    **start(model, torch.tensor([prompt])), **once, output_logits=True, return_dict_in_generate=True
                )
                found[f"{i}.generated"] = output.sequences[0, -num:].contiguous()
                found[f"{i}.steps"] = torch.cat(output.logits).float()
                inputs = start(model, torch.tensor([prompt]))
            found[str(i)] = model(**inputs).logits[0].float().contiguous()
    save_file(found, request["out"])
    assert not any(name.partition(".")[0] == "ssmtune" for name in sys.modules), "ssmtune was imported"


main(sys.argv[1])
