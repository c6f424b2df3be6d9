"""A micro hybrid with a byte-level tokenizer, a little data, and short runs on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedTokenizerFast

from ssmtune import adapter_files
from ssmtune.config import decode
from ssmtune.train import TrainConfig, train

SPECIAL = ("<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
TEMPLATE = (
    "{%- for m in messages -%}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|start_of_role|>assistant<|end_of_role|>{%- endif -%}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, four special tokens, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end_of_text|>",
        additional_special_tokens=["<|start_of_role|>", "<|end_of_role|>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def micro_config() -> GraniteMoeHybridConfig:
    return GraniteMoeHybridConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        shared_intermediate_size=24,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def save_micro_model(directory: Path) -> Path:
    """A saved model with weights of a size at which documents and tokens matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = GraniteMoeHybridForCausalLM(micro_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif name.endswith("dt_bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) - 2)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_examples(path: Path, *, num: int = 20, seed: int = 0) -> Path:
    """Short instructions with short answers of varying length, one JSON object a line."""
    rng = random.Random(seed)
    words = ("ab", "cde", "fghi", "jk", "lmnop")
    with path.open("w") as stream:
        for _ in range(num):
            asked = [rng.choice(words) for _ in range(rng.randint(1, 4))]
            stream.write(json.dumps({"instruction": " ".join(asked), "output": "".join(w[0] for w in asked)}) + "\n")
    return path


def micro_run(model: Path, examples: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Plain data of a TrainConfig: every step logged, no dropout, no warm-up; evaluated and saved at the end only."""
    optimizer = {"warmup_share": 0.0, "learning_rate": 5e-3, "core_learning_rate": 1e-2} | changes.pop("optimizer", {})
    files = {"train_file": str(examples / "train.jsonl"), "validation_file": str(examples / "validation.jsonl")}
    return {
        "model": str(model),
        "output_dir": str(output),
        "data": files | {"max_length": 160} | changes.pop("data", {}),
        "lora": {"rank": 2, "alpha": 4.0},
        "max_steps": 4,
        "num_evaluations": 1,
        "rows_per_step": 2,
        "optimizer": optimizer,
    } | changes


def train_micro(settings: dict[str, Any]) -> dict[str, Any]:
    """Run `train` on the settings and return its record."""
    return train(decode(TrainConfig, settings, where="test"), on_message=lambda message: None, progress=False)


def trained_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor of an adapter directory, both halves."""
    saved = adapter_files.read(directory)
    return {**saved.peft_tensors, **saved.our_tensors}


def losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["history"]]
