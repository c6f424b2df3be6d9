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
from ssmtune.export.engine_gaps import remove_dt_limits, replace_gelu
from ssmtune.export.judgement import F32_LIMIT, judge
from ssmtune.models import load_model, model_location
from ssmtune.records import write_json

if TYPE_CHECKING:
    import torch

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
    divergence stays below that of `KL_LIMITS`. `same_top` counts the prompts whose first new token is the same.
    `dt_limits` and `gelu_table` hold what is left when transformers computes as llama.cpp does (see `engine_gaps`): bounds
    of dt that log-probabilities depend on are never `ok`; GELU is, where everything else is within `F32_LIMIT`.

    >>> check_gguf(Path("model-f32.gguf"), "merged", type_="f32", prompts=["One, two,"])["same_top"]   # doctest: +SKIP
    1
    """
    from transformers import AutoTokenizer

    reference = load_model(str(model), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_location(str(model)))
    tokens = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    forced = [_plain_token(tokenizer, prompt) for prompt in tokens]
    texts = [*TOKENIZER_TEXTS, *prompts]
    chats = CHATS if tokenizer.chat_template else ()
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
        "step_for_gelu": False,
    }
    found, said = _ask_llamacpp(request)
    assert all(len(table) == num_tokens for table in found), "llama.cpp held a step back"
    expected = _expected(reference, tokens, forced, num_tokens)
    result = {
        "type": type_,
        "prompts": len(found),
        "steps": sum(map(len, found)),
        **_differences(expected, found),
        "same_top": sum(int(a[0].argmax()) == int(b[0].argmax()) for a, b in zip(expected, found, strict=True)),
        **_compare_texts(tokenizer, texts, chats, said),
        "dt_limits": None,
        "gelu_table": None,
    }
    if remove_dt_limits(reference):
        unlimited = _expected(reference, tokens, forced, num_tokens)
        differences = _differences(unlimited, found)
        result["dt_limits"] = {**differences, "max_abs_effect": _differences(unlimited, expected)["max_abs_logprob"]}
    if type_ == "f32" and result["max_abs_logprob"] > F32_LIMIT and replace_gelu(reference, step=False):
        in_table = _differences(_expected(reference, tokens, forced, num_tokens), found)
        replace_gelu(reference, step=True)
        stepped, _ = _ask_llamacpp(request | {"step_for_gelu": True})
        without = _differences(_expected(reference, tokens, forced, num_tokens), stepped)
        result["gelu_table"] = {**in_table, "max_abs_without_gelu": without["max_abs_logprob"]}
    return {**result, **judge(result)}


def _ask_llamacpp(request: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """llama.cpp's log-probabilities [N, V] for each prompt, in a process of its own, and what it makes of the texts."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="ssmtune-gguf-") as scratch:
        out, facts = Path(scratch) / "answers.safetensors", Path(scratch) / "facts.json"
        whole = {**request, "out": str(out), "facts": str(facts)}
        run_child("ssmtune.export._infer", write_json(Path(scratch) / "request.json", whole), "llama.cpp cannot run it")
        arrays = load_file(out)
        return [arrays[str(i)] for i in range(len(arrays))], json.loads(facts.read_text(encoding="utf-8"))


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


def _expected(model: Any, prompts: list[list[int]], forced: list[int], num_tokens: int) -> list[torch.Tensor]:
    """transformers' log-probabilities [N, V] fp64 for each prompt, after it and after each of the forced tokens."""
    import torch

    tables = []
    for prompt, token in zip(prompts, forced, strict=True):
        with torch.no_grad():
            logits_BTV = model(input_ids=torch.tensor([prompt + [token] * (num_tokens - 1)]), use_cache=False).logits
        tables.append(logits_BTV[0, -num_tokens:].double().log_softmax(-1))
    return tables


def _differences(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, float]:
    """Differences over all steps; a log-probability that llama.cpp did not give makes them infinite."""
    errors, divergences = [], []
    for expected_NV, found_NV in zip(expected, found, strict=True):
        error = (found_NV.double() - expected_NV).abs().nan_to_num(math.inf, posinf=math.inf)
        errors.append((float(error.max()), float(error.mean())))
        # llama.cpp's sum over the vocabulary is off by 1e-5; normalised again, so that the divergence is not negative.
        log_ratio_NV = expected_NV - found_NV.double().log_softmax(-1)
        divergences.append(float((expected_NV.exp() * log_ratio_NV).sum(-1).mean()))
    return {
        "max_abs_logprob": max(largest for largest, _ in errors),
        "mean_abs_logprob": mean(average for _, average in errors),
        "mean_kl": mean(divergences),
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
