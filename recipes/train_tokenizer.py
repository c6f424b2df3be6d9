"""Train the tokenizer of the tiny hybrid: byte-level BPE with Granite 4's special tokens and chat format.

    python recipes/train_tokenizer.py --corpus data/corpus --shards 2 --out src/ssmtune/assets/tiny-granite-h \
        [--schemas data/schemas/schemas.jsonl.gz] [--instructions instructions.jsonl ...]

Documents of the corpus are separated by a line holding only `<|doc|>`.
Instruction files hold JSON lines `{"messages": [...]}`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 6144
DOCUMENT_SEPARATOR = "\n<|doc|>\n"
PAD = "<|pad|>"
END_OF_TEXT = "<|end_of_text|>"
START_OF_ROLE = "<|start_of_role|>"
END_OF_ROLE = "<|end_of_role|>"
UNKNOWN = "<|unk|>"
SPECIAL_TOKENS = (PAD, END_OF_TEXT, START_OF_ROLE, END_OF_ROLE, UNKNOWN)

# The assistant's words and the token that ends them lie between generation marks, so that a trainer can mask the rest.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end_of_text|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end_of_text|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}"
)


def read_documents(path: Path) -> list[str]:
    """Return the documents of one corpus file (`.txt.xz`), without their separators and without empty ones."""
    with lzma.open(path, "rt", encoding="utf-8", newline="") as stream:
        return [document for document in stream.read().split(DOCUMENT_SEPARATOR) if document.strip()]


def read_conversations(path: Path) -> list[list[dict[str, str]]]:
    """Return the message lists of a JSON-lines file (plain or `.gz`) of `{"messages": [{"role", "content"}, ...]}`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line)["messages"] for line in stream if line.strip()]


def read_schema_texts(path: Path) -> Iterator[str]:
    """Yield one line per column of a schema file (`.jsonl.gz`): its names, type and description."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            schema = json.loads(line)
            yield f"{schema['name']} {schema['domain']}"
            for column in schema["columns"]:
                yield f"{column['column']} {column['original']} {column['type']}: {column.get('description') or ''}"


def build_tokenizer(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on `texts`; its vocabulary has exactly `vocab_size` entries if the texts allow it.

    All 256 bytes are in the vocabulary and nothing is normalised, so every text decodes back to itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=[START_OF_ROLE, END_OF_ROLE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def collect_texts(args: argparse.Namespace) -> Iterator[str]:
    """Yield the training texts that the command line names: corpus shards, schema columns, instruction messages."""
    for path in sorted(args.corpus.glob("train-*.txt.xz"))[: args.shards]:
        yield from read_documents(path)
    if args.schemas is not None:
        yield from read_schema_texts(args.schemas)
    for path in args.instructions:
        for messages in read_conversations(path):
            yield from (message["content"] for message in messages)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the tokenizer of the tiny hybrid.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train-*.txt.xz")
    parser.add_argument("--shards", type=int, default=2, help="number of corpus shards to train on")
    parser.add_argument("--schemas", type=Path, help="schemas.jsonl.gz, whose column names and descriptions are added")
    parser.add_argument("--instructions", type=Path, nargs="*", default=[], help="JSON lines of {'messages': [...]}")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer's files")
    args = parser.parse_args(argv)
    tokenizer = build_tokenizer(collect_texts(args), vocab_size=args.vocab_size)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
