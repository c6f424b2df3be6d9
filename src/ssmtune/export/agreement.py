"""Does llama.cpp answer from a GGUF file as transformers does from the model that it was made of?

Dimensions: N steps, V vocabulary.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from ssmtune.errors import ConfigError
from ssmtune.export.base import PROMPTS, GgufType
from ssmtune.export.converter import run_child
from ssmtune.models import load_model, model_location
from ssmtune.records import write_json

if TYPE_CHECKING:
    import torch

F32_LIMIT = 1e-3
"""Largest difference of a log-probability in nats. Both compute in fp32, in another order: 4e-5 to 2e-4 is measured."""

KL_LIMIT = 0.1
"""Mean Kullback-Leibler divergence in nats that rounding weights to a type may cost (q8_0: about 1e-3 is measured).

A tensor in the wrong place costs whole nats; how much rounding costs below this is reported, not judged.
"""

NUM_TOKENS = 8
"""Steps per prompt: the first comes from the whole prompt at once, the others from the state, token by token."""

TOKENIZER_TEXTS = (
    "Hello world, it's 12345 o'clock; I'LL be there in 3.14 hours.\n\n\n  two  spaces\tand\ttabs \n",
    "\u00e9l\u00e8ve na\u00efve \u0431\u044b\u0441\u0442\u0440\u043e \u6771\u4eac\u90fd \U0001f680\U0001f9ea !!! ???",
    "    def f(x):\r\n        return {'a': [1, 22, 333, 4444]}  # 1_000_000",
)
CHATS = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
)


def check_gguf(
    gguf: Path,
    model: str | Path,
    *,
    type_: GgufType,
    prompts: Sequence[str] = PROMPTS,
    num_tokens: int = NUM_TOKENS,
    lora: Path | None = None,
) -> dict[str, Any]:
    """Return how a GGUF file answers through llama.cpp beside `model` in transformers, on the same tokens, in fp32.

    `model` is the model directory that the file was made from, or, with an adapter file `lora`, that of base and adapter
    merged; `prompts` are texts as the model reads them, a chat
    already rendered. Log-probabilities of the whole vocabulary are compared after the prompt and after each of
    `num_tokens - 1` further tokens that both are made to write, so that the state carried on is checked as well.

    `ok` is True when tokenizer and log-probabilities agree: within `F32_LIMIT` for f32; for narrower types the mean
    divergence stays below `KL_LIMIT`. `same_top` counts the prompts whose first new token is the same.

    >>> check_gguf(Path("model-f32.gguf"), "merged", type_="f32", prompts=["One, two,"])["same_top"]   # doctest: +SKIP
    1
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    reference = load_model(str(model), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_location(str(model)))
    tokens = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    forced = [_plain_token(tokenizer, prompt) for prompt in tokens]
    texts = [*TOKENIZER_TEXTS, *prompts]
    chats = CHATS if tokenizer.chat_template else ()
    with tempfile.TemporaryDirectory(prefix="ssmtune-gguf-") as scratch:
        request = {
            "gguf": str(gguf),
            "lora": None if lora is None else str(lora),
            "prompts": tokens,
            "forced": forced,
            "texts": texts,
            "chats": chats,
            "num_tokens": num_tokens,
            "vocab_size": reference.config.get_text_config().vocab_size,
            "context_tokens": max(map(len, tokens)) + num_tokens + 8,
            "out": str(Path(scratch) / "answers.safetensors"),
            "facts": str(Path(scratch) / "facts.json"),
        }
        run_child(
            "ssmtune.export._infer", write_json(Path(scratch) / "request.json", request), "llama.cpp cannot run it"
        )
        arrays = load_file(str(request["out"]))
        said = json.loads(Path(str(request["facts"])).read_text(encoding="utf-8"))
    rows = [_compare(reference, prompt, forced[i], arrays[str(i)]) for i, prompt in enumerate(tokens)]
    assert all(row["steps"] == num_tokens for row in rows), "llama.cpp held a step back"
    result = {
        "type": type_,
        "prompts": len(rows),
        "steps": sum(row["steps"] for row in rows),
        "max_abs_logprob": max(row["max_abs"] for row in rows),
        "mean_abs_logprob": mean([row["mean_abs"] for row in rows]),
        "mean_kl": mean([row["kl"] for row in rows]),
        "same_top": sum(row["same_top"] for row in rows),
        **_compare_texts(tokenizer, texts, chats, said),
    }
    return {**result, **_judge(result)}


def _plain_token(tokenizer: Any, prompt: Sequence[int]) -> int:
    """A token of the prompt to write again: llama.cpp reports no step within a character, and stops at some specials."""
    special = set(tokenizer.all_special_ids)
    for token in reversed(prompt):
        text = tokenizer.decode([token])
        if token not in special and text.isascii() and text:
            return token
    raise ConfigError(
        f"the prompt {tokenizer.decode(prompt)[:60]!r} has no plain token. Give one with some English text."
    )


def _compare(model: Any, prompt: list[int], forced: int, found_NV: torch.Tensor) -> dict[str, Any]:
    """Differences at every step; a log-probability that llama.cpp did not give makes them infinite."""
    import torch

    found = found_NV.double()
    with torch.no_grad():
        ids_BT = torch.tensor([prompt + [forced] * (len(found) - 1)])
        expected_NV = model(input_ids=ids_BT, use_cache=False).logits[0, -len(found) :].double().log_softmax(-1)
    error = (found - expected_NV).abs().nan_to_num(math.inf, posinf=math.inf)
    return {
        "steps": len(found),
        "max_abs": float(error.max()),
        "mean_abs": float(error.mean()),
        # llama.cpp's sum over the vocabulary is off by 1e-5; normalised again, so that the divergence is not negative.
        "kl": float((expected_NV.exp() * (expected_NV - found.log_softmax(-1))).sum(-1).mean()),
        "same_top": int(found[0].argmax()) == int(expected_NV[0].argmax()),
    }


def _compare_texts(
    tokenizer: Any, texts: Sequence[str], chats: Sequence[list[dict[str, str]]], said: dict[str, Any]
) -> dict[str, Any]:
    """The texts that llama.cpp splits into other tokens, and whether it renders chats as the tokenizer's template does."""
    ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    documents = [tokenizer(text)["input_ids"] for text in texts]
    wrong = [text for text, a, b in zip(texts, ours, said["tokens"], strict=True) if a != b]
    wrong += [text for text, a, b in zip(texts, documents, said["document"], strict=True) if a != b]
    rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return {"texts_split_differently": wrong, "same_chat": rendered == said["chat"] if chats else None}


def _judge(result: dict[str, Any]) -> dict[str, Any]:
    """Whether the figures pass, and one sentence that names the first that does not."""
    exact = result["type"] == "f32"
    measured, limit = (result["max_abs_logprob"], F32_LIMIT) if exact else (result["mean_kl"], KL_LIMIT)
    what = "largest difference of a log-probability" if exact else "mean divergence"
    if result["texts_split_differently"]:
        text = result["texts_split_differently"][0]
        return {"ok": False, "detail": f"llama.cpp splits {text[:60]!r} into other tokens than the model's tokenizer."}
    # Written this way round, NaN fails.
    ok = bool(measured <= limit)
    detail = f"{what} from transformers: {measured:.2g} nats over {result['steps']} steps (limit {limit:g})"
    return {"ok": ok, "detail": detail}
