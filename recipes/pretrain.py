"""Pretrain the tiny hybrid: pack text into token arrays on a CPU, then train for a fixed time on one GPU.

    python recipes/pretrain.py pack --corpus DIR --instructions FILE... --out DIR
    python recipes/pretrain.py train --config recipes/tiny_granite_h.yaml --data DIR --out DIR --seconds 420

Rows are contiguous windows of one token stream in which documents are separated by `<|end_of_text|>`.
State and attention are not reset there: text leaks across documents within a row, which is acceptable in pretraining.

Training runs `FastForward`: transformers' modules and parameters, own scan, convolution and attention.
The checkpoint is a standard one, and the record states how far the two forwards differ on it in fp32.

Dims: B batch, T time, H heads, P head dim, G groups, N state dim.
c chunks, l and s positions in a chunk, r heads of a group, k heads times head dim of a group.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import lzma
import math
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from train_tokenizer import END_OF_TEXT, read_conversations, read_documents
from transformers import (
    AutoTokenizer,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ssmtune.errors import ConfigError, DataError, TrainingFailed, nearest
from ssmtune.records import file_sha256, new_record, write_json

TOKENIZER_PATH = Path(__file__).resolve().parents[1] / "src" / "ssmtune" / "assets" / "tiny-granite-h"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MANIFEST = "manifest.json"
MAX_CURVE_POINTS = 300
LOG_INTERVAL_S = 5.0
EVALUATION_SHARES = (0.25, 0.5, 0.75)
PARITY_WINDOWS = 8
# Compiled and eager bf16 forwards round differently; beyond this the compiled one is not trusted.
MAX_COMPILED_LOSS_DIFFERENCE = 0.02
MAX_COMPILED_NORM_RATIO = 0.05
# What torch.compile raises when tracing, lowering or building a kernel fails; its own exceptions are RuntimeErrors.
COMPILE_ERRORS = (RuntimeError, OSError, ImportError, AssertionError, AttributeError, TypeError, ValueError, KeyError)

TEXT_PROMPTS = (
    "The following example shows how to",
    'def read_rows(path):\n    """Return',
    "CREATE TABLE orders (",
    "The invoice number is",
)
CHAT_PROMPTS = (
    "What does the column created_at of the table invoice hold?",
    "Which columns would a table of customers have?",
    "What is the type of the column total_amount?",
    "Describe the table subscription.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What `train` is told; `model` holds the arguments of `GraniteMoeHybridConfig` apart from token ids."""

    model: dict[str, Any]
    sequence_length: int
    batch_rows: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    decay_share: float
    instruction_share: float
    final_instruction_share: float
    final_share: float
    ssd_chunk: int
    sample_tokens: int
    seed: int


def load_config(path: Path) -> PretrainConfig:
    """Return the config in a YAML file. Raises `ConfigError` for an unknown or missing field."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = [field.name for field in dataclasses.fields(PretrainConfig)]
    for name in data:
        if name not in known:
            raise ConfigError(f"{path}: unknown field {name!r}; {nearest(name, known)}. Remove it or correct its name.")
    for name in known:
        if name not in data:
            raise ConfigError(f"{path}: field {name!r} is missing. Add it: it has no default.")
    return PretrainConfig(**data)


# pack


def pack(*, corpus_path: Path, instruction_paths: list[Path], tokenizer_path: Path, out_path: Path) -> dict[str, Any]:
    """Tokenise corpus and instructions into compressed uint16 arrays under `out_path`; return the manifest.

    The corpus is not packed again when the manifest already there names the same tokenizer and the same corpus files.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    inputs = {path.name: file_sha256(path) for path in sorted(corpus_path.glob("*.txt.xz"))}
    tokenizer_sha256 = file_sha256(tokenizer_path / "tokenizer.json")
    out_path.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(out_path / MANIFEST)
    if manifest.get("corpus_files") != inputs or manifest.get("tokenizer_sha256") != tokenizer_sha256:
        train_paths = sorted(corpus_path.glob("train-*.txt.xz"))
        valid = read_documents(corpus_path / "valid.txt.xz")
        streams = (encode_documents(tokenizer, read_documents(path)) for path in train_paths)
        manifest = {
            "corpus_files": inputs,
            "tokenizer_sha256": tokenizer_sha256,
            "arrays": {
                "corpus": write_tokens(out_path / "corpus.u16.xz", np.concatenate(list(streams))),
                "valid": write_tokens(out_path / "valid.u16.xz", encode_documents(tokenizer, valid)),
            },
            "valid_documents": len(valid),
            "valid_bytes": (valid_bytes := sum(len(document.encode()) for document in valid)),
            "valid_xz_bits_per_byte": xz_bits_per_byte(valid, num_bytes=valid_bytes),
        }
    manifest["instruction_files"] = {path.name: file_sha256(path) for path in instruction_paths}
    manifest["arrays"].pop("instructions", None)
    if instruction_paths:
        conversations = itertools.chain.from_iterable(read_conversations(path) for path in instruction_paths)
        tokens = encode_conversations(tokenizer, list(conversations))
        manifest["arrays"]["instructions"] = write_tokens(out_path / "instructions.u16.xz", tokens)
    write_json(out_path / MANIFEST, manifest)
    return manifest


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Return the tokens of all documents as one uint16 array; every document is followed by the end-of-text token."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return _join(
        itertools.chain(encoding.ids, (end,))
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    )


def encode_conversations(tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]) -> np.ndarray:
    """Return the tokens of all conversations in chat format as one uint16 array."""
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    return _join(
        encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    )


def _join(rows: Iterable[Iterable[int]]) -> np.ndarray:
    return np.concatenate([np.fromiter(row, dtype=np.uint16) for row in rows])


def write_tokens(path: Path, tokens: np.ndarray) -> dict[str, Any]:
    """Write a uint16 array as xz, tuned to two-byte units; return its file name, length and sha256."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1, "dict_size": 1 << 26}]
    path.write_bytes(lzma.compress(tokens.astype("<u2").tobytes(), format=lzma.FORMAT_XZ, filters=filters))
    return {"file": path.name, "num_tokens": len(tokens), "sha256": file_sha256(path)}


def read_tokens(folder: Path, entry: dict[str, Any]) -> np.ndarray:
    """Return the array that a manifest entry names. Raises `DataError` when the file is not the one that was packed."""
    path = folder / entry["file"]
    payload = path.read_bytes()
    found = hashlib.sha256(payload).hexdigest()
    if found != entry["sha256"]:
        raise DataError(f"{path}: sha256 is {found}; the manifest says {entry['sha256']}. Run 'pack' again.")
    return np.frombuffer(lzma.decompress(payload), dtype="<u2")


def xz_bits_per_byte(documents: list[str], *, num_bytes: int) -> float:
    """Return xz's (preset 9e) bits per byte of the documents, joined by one zero byte."""
    compressed = lzma.compress("\0".join(documents).encode(), preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(compressed) / num_bytes


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


# model


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> GraniteMoeHybridForCausalLM:
    """Return a freshly initialised model in fp32, with Mamba-2's initialisation of the core and the convolutions.

    Raises `ConfigError` when the vocabulary is smaller than the tokenizer's.
    """
    if config.model["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"model.vocab_size: got {config.model['vocab_size']}; the tokenizer has {len(tokenizer)} tokens."
        )
    torch.manual_seed(config.seed)
    model_config = GraniteMoeHybridConfig(
        **config.model,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GraniteMoeHybridForCausalLM(model_config)
    for layer in model.model.layers:
        if layer.mamba is not None:
            initialise_mixer(layer.mamba)
    return model


@torch.no_grad()
def initialise_mixer(mixer: nn.Module) -> None:
    """Set `dt_bias`, `A_log`, the convolution and, where the mixer has one, `D` in place.

    The step is log-uniform in [1e-3, 1e-1], `A` uniform in [1, 16], `D` one.
    """
    step = torch.empty_like(mixer.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
    mixer.A_log.copy_(torch.empty_like(mixer.A_log).uniform_(1, 16).log())
    if "D" in dict(mixer.named_parameters(recurse=False)):
        mixer.D.fill_(1.0)
    # A depthwise kernel sees `d_conv` inputs only; the deviation of the linear maps would nearly silence it.
    bound = 1 / math.sqrt(mixer.conv1d.weight.shape[-1])
    mixer.conv1d.weight.uniform_(-bound, bound)


def ssd(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, *, chunk: int
) -> Tensor:
    """Return `y` [B, T, H, P] of the scan `h = exp(dt A) h + dt B x`, `y = C h + D x`, starting from a zero state.

    `dt_BTH` is the step after softplus, `A_H` is negative, and H is a multiple of G.
    Decays and sums of them are at least fp32 and so is the result; matrix products run in the dtype of `x_BTHP`.
    """
    batch, length, heads, head_dim = x_BTHP.shape
    groups, state_dim = B_BTGN.shape[2:]
    per_group = heads // groups
    narrow, wide = x_BTHP.dtype, torch.promote_types(x_BTHP.dtype, torch.float32)
    padding = -length % chunk
    if padding:
        # A step of zero neither decays the state nor adds to it.
        x_BTHP, B_BTGN, C_BTGN = (F.pad(v, (0, 0, 0, 0, 0, padding)) for v in (x_BTHP, B_BTGN, C_BTGN))
        dt_BTH = F.pad(dt_BTH, (0, 0, 0, padding))
    chunks = (length + padding) // chunk
    x = x_BTHP.reshape(batch, chunks, chunk, groups, per_group, head_dim)
    B = B_BTGN.reshape(batch, chunks, chunk, groups, state_dim)
    C = C_BTGN.reshape(batch, chunks, chunk, groups, state_dim)
    dt = dt_BTH.to(wide).reshape(batch, chunks, chunk, groups, per_group).permute(0, 1, 3, 4, 2)
    log_decay = (dt * A_H.to(wide).reshape(groups, per_group, 1)).cumsum(-1)

    # Within a chunk: scores are shared by the heads of a group, the decay mask is not.
    scores = torch.einsum("bclgn,bcsgn->bcgls", C, B)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = torch.where(causal, log_decay[..., :, None] - log_decay[..., None, :], -math.inf).exp()
    mixing = (scores.to(wide)[:, :, :, None] * decay * dt[..., None, :]).to(narrow)
    y_within = torch.einsum("bcgrls,bcsgrp->bclgrp", mixing, x)

    # What each chunk adds to the state by its end.
    to_end = ((log_decay[..., -1:] - log_decay).exp() * dt).permute(0, 1, 4, 2, 3)
    added = torch.einsum("bcsgk,bcsgn->bcgkn", (x.to(wide) * to_end[..., None]).to(narrow).flatten(-2), B)

    # The state before each chunk: decayed sums over the chunks before it.
    total = log_decay[..., -1]
    cumulative = total.cumsum(1)
    before = torch.ones(chunks, chunks, dtype=torch.bool, device=x.device).tril(-1)[..., None, None]
    carry = torch.where(before, (cumulative - total)[:, :, None] - cumulative[:, None], -math.inf).exp().to(narrow)
    added = added.reshape(batch, chunks, groups, per_group, head_dim * state_dim)
    state = torch.einsum("bczgr,bzgrk->bcgrk", carry, added)
    state = state.reshape(batch, chunks, groups, per_group * head_dim, state_dim)
    y_before = torch.einsum("bclgn,bcgkn->bclgk", C, state).reshape(x.shape).to(wide)

    y = y_within.to(wide) + y_before * log_decay.exp().permute(0, 1, 4, 2, 3)[..., None]
    y = y + x.to(wide) * D_H.to(wide).reshape(groups, per_group, 1)
    return y.reshape(batch, length + padding, heads, head_dim)[:, :length]


def convolve(conv1d: nn.Conv1d, inputs_BTC: Tensor) -> Tensor:
    """Return the SiLU of a causal depthwise convolution of whole rows, in the dtype of the inputs."""
    # A sum of shifted products fuses into one kernel; a depthwise convolution call does not.
    taps = conv1d.weight[:, 0]
    padded = F.pad(inputs_BTC, (0, 0, taps.shape[-1] - 1, 0))
    mixed = sum(padded[:, k : k + inputs_BTC.shape[1]] * taps[:, k] for k in range(taps.shape[-1]))
    if conv1d.bias is not None:
        mixed = mixed + conv1d.bias
    return F.silu(mixed).to(inputs_BTC.dtype)


def mix_by_scan(mixer: nn.Module, hidden_BTE: Tensor, chunk: int) -> Tensor:
    """Return the output of a Mamba-2 mixer on whole rows: its own parameters, `ssd` instead of its scan."""
    batch, length, _ = hidden_BTE.shape
    projected = mixer.in_proj(hidden_BTE)
    gate, inputs, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    mixed = convolve(mixer.conv1d, inputs)
    group_width = mixer.n_groups * mixer.ssm_state_size
    x, B, C = mixed.split([mixer.intermediate_size, group_width, group_width], dim=-1)
    y = ssd(
        x.reshape(batch, length, mixer.num_heads, mixer.head_dim),
        F.softplus(dt.to(mixer.dt_bias.dtype) + mixer.dt_bias),
        -mixer.A_log.exp(),
        B.reshape(batch, length, mixer.n_groups, mixer.ssm_state_size),
        C.reshape(batch, length, mixer.n_groups, mixer.ssm_state_size),
        mixer.D,
        chunk=chunk,
    )
    return mixer.out_proj(mixer.norm(y.reshape(batch, length, -1), gate))


def mix_by_attention(attention: nn.Module, hidden_BTE: Tensor) -> Tensor:
    """Return the output of a causal attention without positions on whole rows."""
    batch, length, _ = hidden_BTE.shape
    q, k, v = (
        projection(hidden_BTE).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    k, v = (t.repeat_interleave(attention.num_key_value_groups, dim=1) for t in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling)
    return attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


def scan_layer(layer: nn.Module, hidden_BTE: Tensor, chunk: int) -> Tensor:
    """Return the residual stream after a layer whose mixer is a scan."""
    hidden_BTE = (
        hidden_BTE + mix_by_scan(layer.mamba, layer.input_layernorm(hidden_BTE), chunk) * layer.residual_multiplier
    )
    return hidden_BTE + layer.shared_mlp(layer.post_attention_layernorm(hidden_BTE)) * layer.residual_multiplier


def attention_layer(layer: nn.Module, hidden_BTE: Tensor) -> Tensor:
    """Return the residual stream after a layer whose mixer is attention."""
    hidden_BTE = (
        hidden_BTE + mix_by_attention(layer.self_attn, layer.input_layernorm(hidden_BTE)) * layer.residual_multiplier
    )
    return hidden_BTE + layer.shared_mlp(layer.post_attention_layernorm(hidden_BTE)) * layer.residual_multiplier


def head_logits(model: nn.Module, hidden_BTE: Tensor) -> Tensor:
    """Return logits in at least fp32."""
    logits = model.lm_head(model.model.norm(hidden_BTE))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / model.logits_scaling


def head_loss(model: nn.Module, hidden_BTE: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the mean cross entropy in nats."""
    return F.cross_entropy(head_logits(model, hidden_BTE).flatten(0, 1), targets_BT.flatten())


class FastForward:
    """The model's forward on whole rows without cache or padding; parameters stay those of the standard model.

    Each kind of layer is compiled once and serves every layer of that kind, which keeps the compile short.
    """

    def __init__(self, model: GraniteMoeHybridForCausalLM, *, chunk: int, is_compiled: bool) -> None:
        compiled: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if is_compiled else (lambda f: f)
        self.model = model
        self.chunk = chunk
        self.is_compiled = is_compiled
        self.scan_layer = compiled(scan_layer)
        self.attention_layer = compiled(attention_layer)
        self.head_loss = compiled(head_loss)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return the residual stream after the last layer."""
        body = self.model.model
        hidden = body.embed_tokens(ids_BT) * body.embedding_multiplier
        for layer in body.layers:
            is_scan = layer.mamba is not None
            hidden = self.scan_layer(layer, hidden, self.chunk) if is_scan else self.attention_layer(layer, hidden)
        return hidden

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return logits in at least fp32."""
        return head_logits(self.model, self.hidden(ids_BT))

    def loss(self, rows_BT: Tensor) -> Tensor:
        """Return the mean next-token loss of rows of T + 1 tokens."""
        return self.head_loss(self.model, self.hidden(rows_BT[:, :-1]), rows_BT[:, 1:])


# train


class WindowStream:
    """Rows of `length + 1` tokens of one stream: every epoch a new offset and a new order."""

    def __init__(self, tokens: np.ndarray, *, length: int, seed: int, device: torch.device) -> None:
        if len(tokens) < 2 * length + 1:
            raise DataError(
                f"a token stream has {len(tokens)} tokens; rows of {length} need at least {2 * length + 1}."
            )
        # Token ids below 32,768 fit int16, which torch can index on every device.
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)
        self.length = length
        self.steps = torch.arange(length + 1, device=device)
        self.generator = torch.Generator().manual_seed(seed)
        self.starts = torch.empty(0, dtype=torch.long, device=device)
        self.num_rows = 0

    def take(self, num_rows: int) -> Tensor:
        """Return the next rows as int64 [num_rows, length + 1]."""
        while len(self.starts) < num_rows:
            offset = int(torch.randint(self.length, (1,), generator=self.generator))
            starts = torch.arange(offset, len(self.tokens) - self.length, self.length)
            order = torch.randperm(len(starts), generator=self.generator)
            self.starts = torch.cat([self.starts, starts[order].to(self.starts.device)])
        starts, self.starts = self.starts[:num_rows], self.starts[num_rows:]
        self.num_rows += num_rows
        return self.tokens[starts[:, None] + self.steps].long()

    @property
    def epochs(self) -> float:
        """How often the stream has been seen."""
        return self.num_rows * self.length / len(self.tokens)


def learning_rate_factor(*, step: int, share: float, config: PretrainConfig) -> float:
    """Return the factor of the peak learning rate: linear warm-up in steps, constant, linear decay to zero in time."""
    return min(1.0, (step + 1) / config.warmup_steps) * min(1.0, max(0.0, 1.0 - share) / config.decay_share)


def build_optimizer(model: nn.Module, config: PretrainConfig, *, is_fused: bool) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only: no norms, biases, convolution kernels or core tensors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=is_fused)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return bf16 autocast on a GPU, and nothing on a CPU, where smoke runs stay in fp32."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def start_reading(value: Tensor) -> Callable[[], float]:
    """Return a function that waits for a scalar and returns it; on a GPU it ignores work queued later."""
    if not value.is_cuda:
        return value.item
    copied = torch.empty((), dtype=value.dtype, pin_memory=True)
    copied.copy_(value, non_blocking=True)
    is_copied = torch.cuda.Event()
    is_copied.record()

    def read() -> float:
        is_copied.synchronize()
        return copied.item()

    return read


def choose_forward(
    make_forward: Callable[[bool], FastForward], rows_BT: Tensor, *, try_compile: bool
) -> tuple[FastForward, dict[str, Any]]:
    """Return the compiled forward if it builds and agrees with the eager one, else the eager one, and what decided it.

    `make_forward(is_compiled)` builds either.
    """
    eager = make_forward(False)
    if not try_compile:
        return eager, {"used": False, "reason": "not asked for"}
    started = time.perf_counter()
    compiled = make_forward(True)
    try:
        loss, norm = _probe(compiled, rows_BT)
    except COMPILE_ERRORS as error:
        print(
            f"!!! torch.compile FAILED, training runs in EAGER mode and is slow: {type(error).__name__}: {error}",
            flush=True,
        )
        return eager, {"used": False, "reason": f"{type(error).__name__}: {str(error)[:500]}"}
    seconds = time.perf_counter() - started
    eager_loss, eager_norm = _probe(eager, rows_BT)
    facts = {"seconds": seconds, "loss": [loss, eager_loss], "gradient_norm": [norm, eager_norm]}
    print(
        f"compiled in {seconds:.1f} s; loss {loss:.5f} vs eager {eager_loss:.5f}; norm {norm:.5f} vs {eager_norm:.5f}",
        flush=True,
    )
    agrees = abs(loss - eager_loss) < MAX_COMPILED_LOSS_DIFFERENCE
    if not (agrees and abs(norm / eager_norm - 1) < MAX_COMPILED_NORM_RATIO):
        print(
            "!!! the compiled forward DISAGREES with the eager one; training runs in EAGER mode and is slow", flush=True
        )
        return eager, {"used": False, "reason": "disagrees with eager", **facts}
    return compiled, {"used": True, **facts}


def _probe(forward: FastForward, rows_BT: Tensor) -> tuple[float, float]:
    with autocast(rows_BT.device):
        loss = forward.loss(rows_BT)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(forward.model.parameters(), math.inf)
    forward.model.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


@torch.no_grad()
def held_out_nats(forward: FastForward, rows_BT: Tensor, *, batch_rows: int, is_autocast: bool) -> float:
    """Return the summed next-token loss of rows, in nats; rows are independent, no state is carried between them."""
    total = 0.0
    for rows in rows_BT.split(batch_rows):
        with autocast(rows.device) if is_autocast else nullcontext():
            logits = forward.logits(rows[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum", ignore_index=-100).item()
    return total


def held_out_rows(tokens: np.ndarray, *, length: int, end: int, device: torch.device) -> list[Tensor]:
    """Return the full windows [n, length + 1] and the shorter last one [1, k], which score every held-out token once.

    The first document is preceded by the end-of-text token, as every other one is.
    """
    stream = torch.from_numpy(np.concatenate([[end], tokens.astype(np.int64)])).to(device)
    num_full = (len(stream) - 1) // length
    full = (
        stream[: num_full * length + 1].unfold(0, length + 1, length) if num_full else stream.new_empty(0, length + 1)
    )
    # The last token of a window is the first input of the next; a window of one token has nothing to predict.
    return [rows for rows in (full, stream[None, num_full * length :]) if len(rows) and rows.shape[1] > 1]


@torch.no_grad()
def compare_forwards(forward: FastForward, rows_BT: Tensor) -> dict[str, float]:
    """Return how far the fast forward and transformers' own differ on the same rows in fp32: logits and mean loss."""
    fast = forward.logits(rows_BT[:, :-1])
    standard = forward.model(input_ids=rows_BT[:, :-1], use_cache=False).logits
    losses = [F.cross_entropy(v.flatten(0, 1), rows_BT[:, 1:].flatten()).item() for v in (fast, standard)]
    return {
        "num_tokens": rows_BT[:, 1:].numel(),
        "max_logit_difference": (fast - standard).abs().max().item(),
        "max_abs_logit": standard.abs().max().item(),
        "fast_loss": losses[0],
        "standard_loss": losses[1],
    }


def sample_continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, num_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """Return greedy and temperature-0.7 continuations of fixed prompts, by transformers' own generation."""
    chats = [[{"role": "user", "content": text}] for text in CHAT_PROMPTS]
    prompts = [
        *TEXT_PROMPTS,
        *(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats),
    ]
    torch.manual_seed(seed)
    samples = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        for temperature in (0.0, 0.7):
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            )
            output = model.generate(**inputs, max_new_tokens=num_tokens, **sampling)
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
            samples.append({"prompt": prompt, "temperature": temperature, "continuation": text})
    return samples


def shorten_curve(points: list[list[float]], *, max_points: int = MAX_CURVE_POINTS) -> list[list[float]]:
    """Return at most `max_points` points: means over equal runs of the given ones."""
    if len(points) <= max_points:
        return points
    return [part.mean(axis=0).round(5).tolist() for part in np.array_split(np.array(points), max_points)]


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What the training loop leaves behind, apart from the trained weights."""

    curve: list[list[float]] = dataclasses.field(default_factory=list)
    held_out_curve: list[dict[str, float]] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    loop_seconds: float = 0.0
    compile: dict[str, Any] = dataclasses.field(default_factory=dict)


def fit(
    model: GraniteMoeHybridForCausalLM,
    config: PretrainConfig,
    corpus: WindowStream,
    instructions: WindowStream | None,
    *,
    max_seconds: float,
    max_steps: int | None,
    started: float,
    try_compile: bool,
    evaluate: Callable[[], float],
) -> Progress:
    """Train `model` in place until `max_seconds` after `started` or for `max_steps`.

    The schedule follows the share of the budget that is used up.

    Raises `TrainingFailed` when the loss is not finite or no step fits into the budget.
    """
    device = corpus.tokens.device
    optimizer = build_optimizer(model, config, is_fused=device.type == "cuda")
    progress = Progress()
    probe_rows = corpus.tokens[: config.batch_rows * (config.sequence_length + 1)]
    probe_rows = probe_rows[: len(probe_rows) // (config.sequence_length + 1) * (config.sequence_length + 1)]
    forward, progress.compile = choose_forward(
        lambda is_compiled: FastForward(model, chunk=config.ssd_chunk, is_compiled=is_compiled),
        probe_rows.view(-1, config.sequence_length + 1).long(),
        try_compile=try_compile,
    )
    # One step stays in flight: the host prepares the next one while the device works.
    pending: collections.deque[tuple[int, Callable[[], float]]] = collections.deque()
    evaluations = list(EVALUATION_SHARES)
    loop_started = last_log = time.perf_counter()
    evaluation_seconds, tokens_logged = 0.0, 0
    while True:
        now = time.perf_counter()
        share = max((now - started) / max_seconds, progress.num_steps / max_steps if max_steps else 0.0)
        is_last = share >= 1.0
        while len(pending) > (0 if is_last else 1):
            num_tokens, read_loss = pending.popleft()
            loss_value = read_loss()
            if not math.isfinite(loss_value):
                raise TrainingFailed(
                    f"the loss after {num_tokens} tokens is {loss_value}. Lower learning_rate in the config."
                )
            progress.curve.append([num_tokens, loss_value])
        if is_last:
            break
        if now - last_log > LOG_INTERVAL_S and progress.curve:
            speed = (progress.num_tokens - tokens_logged) / (now - last_log)
            loss_value = progress.curve[-1][1]
            print(
                f"{share:6.1%} step {progress.num_steps} loss {loss_value:.4f} {speed / 1e6:.3f} M tokens/s",
                flush=True,
            )
            last_log, tokens_logged = now, progress.num_tokens
        if evaluations and share >= evaluations[0]:
            evaluations.pop(0)
            bits = evaluate()
            progress.held_out_curve.append({"share": share, "num_tokens": progress.num_tokens, "bits_per_byte": bits})
            print(f"{share:6.1%} step {progress.num_steps} held-out bits per byte {bits:.4f} (bf16)", flush=True)
            evaluation_seconds += time.perf_counter() - now
        instruction_share = (
            config.final_instruction_share if share >= 1 - config.final_share else config.instruction_share
        )
        num_instruction_rows = round(config.batch_rows * instruction_share) if instructions is not None else 0
        rows = corpus.take(config.batch_rows - num_instruction_rows)
        if instructions is not None and num_instruction_rows:
            rows = torch.cat([rows, instructions.take(num_instruction_rows)])
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(
                step=progress.num_steps, share=share, config=config
            )
        with autocast(device):
            loss = forward.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.num_steps += 1
        progress.num_tokens += rows[:, 1:].numel()
        pending.append((progress.num_tokens, start_reading(loss.detach())))
    if not progress.num_steps:
        raise TrainingFailed(f"no step was taken: loading and compiling used up {max_seconds:g} s. Raise --seconds.")
    progress.seconds = time.perf_counter() - started
    progress.loop_seconds = time.perf_counter() - loop_started - evaluation_seconds
    return progress


def train(
    config: PretrainConfig,
    *,
    data_path: Path,
    tokenizer_path: Path,
    out_path: Path,
    max_seconds: float,
    max_steps: int | None,
    try_compile: bool,
) -> dict[str, Any]:
    """Pretrain; write checkpoint (bf16), tokenizer files and `pretrain.json` to `out_path`; return the record.

    Held-out bits per byte are those of the written checkpoint in fp32, on non-overlapping windows, no carried context.
    """
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    manifest = _read_manifest(data_path / MANIFEST)
    tokenizer_sha256 = file_sha256(tokenizer_path / "tokenizer.json")
    if manifest.get("tokenizer_sha256") != tokenizer_sha256:
        raise DataError(f"{data_path}: packed with another tokenizer than {tokenizer_path}. Run 'pack' again.")
    arrays = {name: read_tokens(data_path, entry) for name, entry in manifest["arrays"].items()}
    streams = {
        name: WindowStream(arrays[name], length=config.sequence_length, seed=config.seed, device=device)
        for name in ("corpus", "instructions")
        if name in arrays
    }
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    windows = held_out_rows(arrays["valid"], length=config.sequence_length, end=end, device=device)
    to_bits = 1 / math.log(2) / manifest["valid_bytes"]

    model = build_model(config, tokenizer).to(device)
    num_params = sum(p.numel() for p in model.parameters())
    print(
        f"{num_params:,} parameters; tokens: { ({name: len(a) for name, a in arrays.items()}) }; device {device}",
        flush=True,
    )

    def held_out(subject: GraniteMoeHybridForCausalLM, *, is_autocast: bool) -> float:
        forward = FastForward(subject, chunk=config.ssd_chunk, is_compiled=False)
        rows = config.batch_rows
        return to_bits * sum(held_out_nats(forward, w, batch_rows=rows, is_autocast=is_autocast) for w in windows)

    model.train()
    progress = fit(
        model,
        config,
        streams["corpus"],
        streams.get("instructions"),
        max_seconds=max_seconds,
        max_steps=max_steps,
        started=started,
        try_compile=try_compile,
        evaluate=lambda: held_out(model, is_autocast=True),
    )
    out_path.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out_path)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_path / name, out_path / name)

    saved = GraniteMoeHybridForCausalLM.from_pretrained(out_path, dtype=torch.float32).to(device).eval()
    bits = held_out(saved, is_autocast=False)
    print(f"held-out bits per byte {bits:.4f}; xz -9e {manifest['valid_xz_bits_per_byte']:.4f}", flush=True)
    parity_rows = windows[0][:PARITY_WINDOWS]
    parity = compare_forwards(FastForward(saved, chunk=config.ssd_chunk, is_compiled=False), parity_rows)
    print(f"fast forward against transformers' in fp32: {parity}", flush=True)
    record = new_record(
        "pretrain",
        config=dataclasses.asdict(config),
        max_seconds=max_seconds,
        max_steps=max_steps,
        num_params=num_params,
        num_tokens=progress.num_tokens,
        num_steps=progress.num_steps,
        epochs={name: stream.epochs for name, stream in streams.items()},
        seconds=progress.seconds,
        tokens_per_second=progress.num_tokens / progress.loop_seconds,
        compile=progress.compile,
        held_out=held_out_facts(bits, manifest, config, len(arrays["valid"]), progress.held_out_curve),
        parity_fp32=parity,
        loss_curve={"columns": ["num_tokens", "loss"], "points": shorten_curve(progress.curve)},
        samples=sample_continuations(saved, tokenizer, num_tokens=config.sample_tokens, seed=config.seed),
        data=manifest,
        checkpoint_sha256=file_sha256(out_path / "model.safetensors"),
    )
    write_json(out_path / "pretrain.json", record)
    return record


def held_out_facts(
    bits: float, manifest: dict[str, Any], config: PretrainConfig, num_tokens: int, curve: list[Any]
) -> dict[str, Any]:
    """Return what a record says of the held-out text: bits per byte beside xz's, and how they were taken."""
    return {
        "bits_per_byte": bits,
        "xz_bits_per_byte": manifest["valid_xz_bits_per_byte"],
        "num_bytes": manifest["valid_bytes"],
        "num_tokens": num_tokens,
        "windows": f"non-overlapping, {config.sequence_length} tokens, no context carried; checkpoint in fp32",
        "during_training_bf16": curve,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pack text and pretrain the tiny hybrid.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="tokenise text into compressed arrays")
    packing.add_argument("--corpus", type=Path, required=True, help="folder with train-*.txt.xz and valid.txt.xz")
    packing.add_argument("--instructions", type=Path, nargs="*", default=[], help="JSON lines of {'messages': [...]}")
    training = verbs.add_parser("train", help="train for a fixed time and write the checkpoint")
    training.add_argument("--config", type=Path, required=True)
    training.add_argument("--data", type=Path, required=True, help="folder that 'pack' wrote")
    training.add_argument("--seconds", type=float, required=True, help="time budget of loading, compiling and training")
    training.add_argument("--steps", type=int, help="stop after so many steps, if that is sooner")
    training.add_argument("--no-compile", action="store_true", help="run the training forward in eager mode")
    for verb in (packing, training):
        verb.add_argument("--tokenizer", type=Path, default=TOKENIZER_PATH)
        verb.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.verb == "pack":
        manifest = pack(
            corpus_path=args.corpus,
            instruction_paths=args.instructions,
            tokenizer_path=args.tokenizer,
            out_path=args.out,
        )
        print(
            json.dumps({name: manifest[name] for name in ("arrays", "valid_bytes", "valid_xz_bits_per_byte")}, indent=1)
        )
        return
    train(
        load_config(args.config),
        data_path=args.data,
        tokenizer_path=args.tokenizer,
        out_path=args.out,
        max_seconds=args.seconds,
        max_steps=args.steps,
        try_compile=not args.no_compile,
    )


if __name__ == "__main__":
    main()
