"""llama.cpp's own process: python -m ssmtune.export._infer REQUEST.json

llama.cpp ends its process on an internal error. Answers a request's prompts and writes what it found to a safetensors file.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from safetensors.numpy import save_file

from ssmtune.errors import ConfigError, SsmtuneError
from ssmtune.export.engine_gaps import step_over_gelu
from ssmtune.llamacpp import LlamaCpp


def main(request_path: str) -> int:
    """Answer one request. Returns the exit status."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    try:
        lora = Path(request["lora"]) if request["lora"] else None
        with (
            LlamaCpp(
                Path(request["gguf"]), context_tokens=request["context_tokens"], exact_cache=True, lora=lora
            ) as llama,
            step_over_gelu() if request["step_for_gelu"] else nullcontext(),
        ):
            tables = [
                llama.answer(
                    tokens, max_new_tokens=request["num_tokens"], vocab_size=request["vocab_size"], forced=forced
                ).logprobs_NV
                for tokens, forced in zip(request["prompts"], request["forced"], strict=True)
            ]
            facts = {
                "tokens": [llama.tokenize(text) for text in request["texts"]],
                "document": [llama.tokenize(text, add_special=True) for text in request["texts"]],
                "chat": [_render(llama, messages) for messages in request["chats"]],
            }
    except SsmtuneError as error:
        print(error, file=sys.stderr)
        return 1
    save_file({str(i): table for i, table in enumerate(tables)}, request["out"])
    Path(request["facts"]).write_text(json.dumps(facts), encoding="utf-8")
    return 0


def _render(llama: LlamaCpp, messages: list[dict[str, str]]) -> str:
    """The rendered chat, or what llama.cpp says of a template that it cannot run."""
    try:
        return llama.render(messages)
    except ConfigError as error:
        return f"refused: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
