"""llama.cpp through the package xllamacpp: tokens, greedy answers and log-probabilities of a GGUF file.

The package runs llama.cpp's server inside this process; it listens on the loopback address, on a free port and behind a
key that only this object knows, because two of its functions (tokens of a text, the chat template) have no other door.
Dimensions: N new tokens, V vocabulary.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ssmtune.errors import ConfigError, MissingDependency

FORCING_BIAS = 1e4
"""Added to a logit, more than any two logits differ by; log-probabilities are taken before it."""

ERRORS_ONLY = 1
"""Of llama.cpp's log, which goes to stderr."""

ANSWER_TIMEOUT_S = 3600
"""For one answer, which waits for a free slot as well."""

INSTALL = "pip install 'ssmtune[gguf]'"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote, whether it ended its turn itself, and log-probabilities [N, V] where asked for.

    A token that llama.cpp left out of its list has log-probability NaN. A step whose token ends within a character has
    no row of its own: llama.cpp holds such a token back.
    """

    text: str
    stopped: bool
    logprobs_NV: np.ndarray[Any, np.dtype[np.float32]]


class LlamaCpp:
    """A GGUF file opened for inference on the CPU; close it, or use it in a `with` block."""

    def __init__(
        self,
        path: Path,
        *,
        context_tokens: int = 4096,
        num_slots: int = 1,
        num_threads: int = 1,
        exact_cache: bool = False,
        lora: Path | None = None,
    ) -> None:
        """Open `path`; each of `num_slots` sequences answered at once has `context_tokens` of room.

        `exact_cache` keeps attention's cache in fp32 and flash attention off: llama.cpp's default cache is fp16, which
        alone moves log-probabilities by about 1e-2. `lora` is an adapter file, applied at scale 1.
        Raises `ConfigError` when llama.cpp cannot load the files.
        """
        try:
            import xllamacpp
        except ModuleNotFoundError:
            raise MissingDependency(f"llama.cpp is not installed: {INSTALL}") from None
        self._key = secrets.token_hex(16)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context_tokens * num_slots
        params.n_parallel = num_slots
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = ERRORS_ONLY
        params.api_keys = [self._key]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        if exact_cache:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ConfigError(
                f"{path}{f' with {lora}' if lora else ''}: llama.cpp cannot load it ({error}). It may be truncated, or of "
                "an architecture that this version of xllamacpp does not know."
            ) from None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the token ids of `text`, special tokens in it read as such; `add_special` adds those of a document."""
        reply = self._post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})
        return [int(token) for token in reply["tokens"]]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that the file's own chat template makes of `messages`.

        Raises `ConfigError` when llama.cpp cannot run the template.
        """
        return str(self._post("/apply-template", {"messages": [dict(m) for m in messages]})["prompt"])

    def answer(
        self, tokens: Sequence[int], *, max_new_tokens: int, vocab_size: int = 0, forced: int | None = None
    ) -> Answer:
        """Return the greedy continuation of `tokens`; the state is computed anew, nothing is kept of earlier prompts.

        With `vocab_size` V the answer holds the model's own log-probabilities of all tokens below V at each step.
        `forced` is a token to write at every step whatever the model prefers.
        May be called from several threads, as many at once as there are slots.
        """
        request = {
            "prompt": list(tokens),
            "n_predict": max_new_tokens,
            "temperature": 0,
            "n_probs": vocab_size,
            "cache_prompt": False,
        }
        if forced is not None:
            request |= {"logit_bias": [[forced, FORCING_BIAS]], "ignore_eos": True}
        reply = self._server.handle_completions(request)
        if "choices" not in reply:
            raise ConfigError(f"llama.cpp refused a prompt of {len(tokens)} tokens: {reply}")
        choice = reply["choices"][0]
        steps = choice["logprobs"]["content"] if vocab_size else []
        table = np.full((len(steps), vocab_size), np.nan, np.float32)
        for row, step in zip(table, steps, strict=True):
            for entry in step["top_logprobs"]:
                # The converter pads vocabularies; the padding is no token of the model.
                if entry["id"] < vocab_size:
                    row[entry["id"]] = entry["logprob"]
        return Answer(text=choice["text"], stopped=choice["finish_reason"] == "stop", logprobs_NV=table)

    def complete(self, tokens: Sequence[int], *, max_new_tokens: int) -> list[int]:
        """Return the tokens of the greedy continuation, the last of them the one that ended it, if one did.

        llama.cpp ends at every token that it knows as an end, not only the tokenizer's end token. The state is computed
        anew. May be called from several threads, as many at once as there are slots.
        """
        request = {
            "prompt": list(tokens),
            "n_predict": max_new_tokens,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        return [int(token) for token in self._post("/completion", request, timeout_s=ANSWER_TIMEOUT_S)["tokens"]]

    def _post(self, path: str, body: Mapping[str, Any], *, timeout_s: float = 60) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        # A proxy of the environment is not asked for the loopback address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout_s) as reply:
                value: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            raise ConfigError(f"llama.cpp refused {path}: {error.read().decode(errors='replace')[:300]}") from None
        return value
