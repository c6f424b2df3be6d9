"""llama.cpp's own process for answers: python -m ssmtune.export._answer REQUEST.json

Writes one line of JSON to stdout, [number, tokens], as each prompt is answered; they come in the order of completion.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ssmtune.errors import SsmtuneError
from ssmtune.llamacpp import LlamaCpp


def main(request_path: str) -> int:
    """Answer every prompt of a request. Returns the exit status."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    slots, prompts = request["num_slots"], request["prompts"]
    try:
        with (
            LlamaCpp(
                Path(request["gguf"]),
                context_tokens=request["context_tokens"],
                num_slots=slots,
                num_threads=request["num_threads"],
            ) as llama,
            ThreadPoolExecutor(slots) as pool,
        ):
            for text, tokens in zip(request["texts"], prompts, strict=True):
                if llama.tokenize(text) != tokens:
                    print(f"it splits {text[:60]!r} into other tokens than the model's tokenizer", file=sys.stderr)
                    return 1
            futures = {
                pool.submit(until_end, llama, tokens, request["max_new_tokens"], request["end"]): number
                for number, tokens in enumerate(prompts)
            }
            for future in as_completed(futures):
                print(json.dumps([futures[future], future.result()]), flush=True)
    except SsmtuneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def until_end(llama: LlamaCpp, prompt: list[int], max_new_tokens: int, end: int) -> list[int]:
    """Return the continuation up to the token `end` or to `max_new_tokens`, whatever else llama.cpp takes for an end."""
    written: list[int] = []
    while len(written) < max_new_tokens and end not in written:
        written += llama.complete(prompt + written, max_new_tokens=max_new_tokens - len(written))
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
