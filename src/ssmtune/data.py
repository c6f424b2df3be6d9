"""The user's own data: strict reading of JSON lines, and chat-template tokenisation with a mask over the answer.

A file is validated whole before anything is built from it; its first bad line is a `DataError` with the line number.
Heavy libraries are imported where they are used.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from ssmtune.errors import DataError, nearest

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

FORMATS = '{"instruction", "output"} with an optional "input", or {"messages": [{"role", "content"}, ...]}'

TOKENIZE_BATCH = 2048
"""Pairs rendered and tokenised at once: bounds the memory that two copies of the text take."""

Message = dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCompletion:
    """The messages that a model is shown, and the one that it is trained to write."""

    prompt: list[Message]
    completion: list[Message]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenized:
    """`dataset` has the columns `input_ids` and `completion_mask`; `num_dropped` counts sequences too long for it."""

    dataset: datasets.Dataset
    num_dropped: int


def load_pairs(path: Path | str) -> list[PromptCompletion]:
    """Return the rows of a .jsonl or .jsonl.gz file; the first bad line is a `DataError`. Writes nothing."""
    path = Path(path)
    pairs = [_pair(text, where) for where, text in read_lines(path)]
    if not pairs:
        raise DataError(f"{path}: is empty. Expected one JSON object a line: {FORMATS}.")
    return pairs


def load_rows(path: Path | str) -> datasets.Dataset:
    """Return the rows of a .jsonl or .jsonl.gz file as a dataset in memory with the columns `prompt` and `completion`.

    The rows are those of `load_pairs`, errors included.
    The JSON reader of `datasets` is not used: it turns texts that look like dates into time stamps and writes a cache.
    """
    return to_dataset(load_pairs(path))


def to_dataset(pairs: Sequence[PromptCompletion]) -> datasets.Dataset:
    """Return `pairs` as a dataset in memory with the conversational columns `prompt` and `completion`."""
    import datasets

    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"prompt": datasets.List(message), "completion": datasets.List(message)})
    columns = {"prompt": [pair.prompt for pair in pairs], "completion": [pair.completion for pair in pairs]}
    return datasets.Dataset.from_dict(columns, features=features)


def tokenize(
    pairs: Sequence[PromptCompletion],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    overlong: Literal["refuse", "drop"] = "refuse",
) -> Tokenized:
    """Return the token ids of every pair, with `completion_mask` 1 on the answer and its end-of-turn token, else 0.

    The prompt is rendered with the chat template's generation prompt, as in generation.
    It must be a prefix of prompt and answer, in text and in tokens, else training and generation would see different
    prompts: a `DataError`. Line breaks that a template writes after the end of the turn are left out.
    A sequence of more than `max_length` tokens is a `DataError`, or is left out and counted with `overlong="drop"`.
    None is ever cut.
    """
    import datasets

    if tokenizer.chat_template is None:
        raise DataError(
            "tokenizer: has no chat template, so messages cannot be rendered. "
            "Use the tokenizer of an instruct model or set chat_template."
        )
    closing: set[int] = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    num_dropped = 0
    for start in range(0, len(pairs), TOKENIZE_BATCH):
        batch = pairs[start : start + TOKENIZE_BATCH]
        for number, (prompt, whole) in enumerate(_token_ids(batch, tokenizer, start), start + 1):
            _check_tokens(prompt, whole, closing, f"example {number}")
            if len(whole) <= max_length:
                ids.append(whole)
                masks.append([0] * len(prompt) + [1] * (len(whole) - len(prompt)))
            elif overlong == "drop":
                num_dropped += 1
            else:
                raise DataError(
                    f"example {number}: got {len(whole)} tokens; at most {max_length} are allowed. "
                    'Raise max_length, shorten it, or pass overlong="drop".'
                )
    if not ids:
        raise DataError(
            f"data: none of {len(pairs)} examples is left at max_length {max_length}. "
            "Raise max_length or give shorter examples."
        )
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "completion_mask": datasets.List(datasets.Value("int8"))}
    )
    return Tokenized(
        dataset=datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks}, features=features),
        num_dropped=num_dropped,
    )


def _check_tokens(prompt: list[int], whole: list[int], closing: set[int], where: str) -> None:
    """Raise `DataError` unless `prompt` is a proper prefix of `whole` and `whole` ends with one of `closing`."""
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise DataError(
            f"{where}: the tokens of the prompt are no prefix of those of prompt and answer, so no mask can be made. "
            "Use a chat template that ends the generation prompt with a special token or a line break."
        )
    if whole[-1] not in closing:
        raise DataError(
            f"{where}: the chat template ends the answer with token {whole[-1]}, no special token, so a model would "
            "not learn to stop. Let the template end each assistant turn with the end-of-turn token."
        )


def _token_ids(
    pairs: Sequence[PromptCompletion], tokenizer: PreTrainedTokenizerBase, start: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of each prompt and of prompt with answer; the rendered text already holds the special tokens."""
    prompts = cast(
        list[str], tokenizer.apply_chat_template([p.prompt for p in pairs], tokenize=False, add_generation_prompt=True)
    )
    wholes = cast(list[str], tokenizer.apply_chat_template([p.prompt + p.completion for p in pairs], tokenize=False))
    wholes = [_without_trailing_break(text, tokenizer.all_special_tokens) for text in wholes]
    for number, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True), start + 1):
        if not whole.startswith(prompt):
            raise DataError(
                f"example {number}: the chat template renders prompt and answer as {whole[:200]!r}, "
                "which does not start with "
                f"the prompt {prompt[:200]!r}. Use a template that leaves earlier turns as they were."
            )
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    whole_ids = tokenizer(wholes, add_special_tokens=False)["input_ids"]
    yield from zip(cast(list[list[int]], prompt_ids), cast(list[list[int]], whole_ids), strict=True)


def _without_trailing_break(text: str, special: Sequence[str]) -> str:
    stripped = text.rstrip()
    return stripped if stripped.endswith(tuple(special)) else text


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("FILE, line N", text) of every line of a .jsonl or .jsonl.gz file, decoded; what is unreadable is a `DataError`."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{path}: got a file of unknown kind; expected a name ending in .jsonl or .jsonl.gz.")
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                where = f"{path}, line {number}"
                try:
                    yield where, line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{where}: got byte 0x{line[error.start]:02x}, which is not UTF-8. Save the file as UTF-8."
                    ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the path.") from None
    except EOFError:
        raise DataError(
            f"{path}, line {number + 1}: the gzip stream ends early, so the file is truncated. "
            "Copy or compress it again."
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}, line {number + 1}: not valid gzip ({error}). Compress it again, "
            "or name it .jsonl if it is plain text."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check that it is a file and its permissions."
        ) from None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _pair(text: str, where: str) -> PromptCompletion:
    """Return one line as messages; `where` starts every error."""
    row = read_object(text, where)
    if "messages" in row and ("instruction" in row or "output" in row):
        raise DataError(
            f"{where}: got both 'messages' and 'instruction' or 'output'; expected one of the two. Remove one."
        )
    if "messages" in row:
        return _conversation(row["messages"], where)
    for field in ("instruction", "output"):
        if field not in row:
            raise DataError(f"{where}: field '{field}' is missing; got {_names(row)}. Expected {FORMATS}.")
    instruction = _text(row, "instruction", where)
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise DataError(f"{where}: field 'input': got {_type(context)}; expected a string, or no such field.")
    content = f"{instruction}\n\n{context}" if context else instruction
    return PromptCompletion(
        prompt=[{"role": "user", "content": content}],
        completion=[{"role": "assistant", "content": _text(row, "output", where)}],
    )


def read_object(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object of one line; `where` starts every `DataError`."""
    if not text.strip():
        raise DataError(f"{where}: is empty; expected a JSON object. Remove the line.")
    try:
        row = json.loads(text)
        # An escaped half of a surrogate pair is valid JSON but no text that a tokenizer can read.
        text.encode() if "\\ud" not in text.lower() else json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: holds an unpaired surrogate escape (\\ud8..); expected valid Unicode text. "
            "Write the character itself."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: got {_excerpt(text)}, which is not JSON ({error}). Expected one JSON object a line."
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {_type(row)}; expected a JSON object: {FORMATS}.")
    return row


def _conversation(messages: Any, where: str) -> PromptCompletion:
    if not isinstance(messages, list):
        raise DataError(f"{where}: field 'messages': got {_type(messages)}; expected a list of messages.")
    checked = [_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages)]
    if len(checked) < 2:
        raise DataError(
            f"{where}: field 'messages': got {len(checked)} message(s); "
            "expected at least a user message and an assistant message."
        )
    if checked[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message has role {checked[-1]['role']!r}; expected 'assistant', "
            "whose content is what is learnt."
        )
    if checked[-2]["role"] != "user":
        raise DataError(
            f"{where}: the message before the last has role {checked[-2]['role']!r}; expected 'user', "
            "the question being answered."
        )
    if any(message["role"] == "system" for message in checked[1:]):
        raise DataError(
            f"{where}: got a system message after the first message; expected it first. Move it to the front."
        )
    return PromptCompletion(prompt=checked[:-1], completion=checked[-1:])


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where}: got {_type(message)}; expected an object with 'role' and 'content'.")
    for field in ("role", "content"):
        if field not in message:
            raise DataError(
                f"{where}: field '{field}' is missing; got {_names(message)}. Expected 'role' and 'content'."
            )
    role = _text(message, "role", where)
    if role not in ROLES:
        raise DataError(f"{where}: got role {role!r}; {nearest(role, ROLES)}. Rename it.")
    return {"role": role, "content": _text(message, "content", where)}


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{field}': got {_type(value)}; expected a string.")
    if not value.strip():
        raise DataError(f"{where}: field '{field}' is empty; expected text. Fill it in or remove the line.")
    return value


def _names(row: dict[str, Any]) -> str:
    return "the fields " + ", ".join(repr(name) for name in row) if row else "no fields"


def _type(value: Any) -> str:
    return {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }.get(type(value), "null")


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
