"""The user's own data: every bad line is an error with its number, and the mask covers exactly the answer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ssmtune.data import PromptCompletion, load_pairs, load_rows, tokenize
from ssmtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GOOD = '{"instruction": "Add.", "input": "1 2", "output": "3"}'
CHAT = (
    '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, '
    '{"role": "assistant", "content": "Yo"}]}'
)
PAIR = PromptCompletion(
    prompt=[{"role": "user", "content": "Add.\n\n1 2"}], completion=[{"role": "assistant", "content": "3"}]
)

TEMPLATE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def write(directory: Path, *lines: str | bytes, name: str = "data.jsonl") -> Path:
    path = directory / name
    payload = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(payload) if name.endswith(".gz") else payload)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEMPLATE)


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|end_of_text|>",
        additional_special_tokens=["<|start_of_role|>", "<|end_of_role|>"],
    )
    made.chat_template = template
    return made


# Reading


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_rows_of_both_forms_are_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, GOOD, CHAT, '{"instruction": "Say 2020-01-01", "output": "2020-01-01", "id": 7}', name=name)
    pairs = load_pairs(path)
    assert pairs[0] == PAIR
    assert [m["role"] for m in pairs[1].prompt] == ["system", "user"]
    assert pairs[2].prompt[0]["content"] == "Say 2020-01-01" and pairs[2].completion[0]["content"] == "2020-01-01"
    rows = load_rows(path)
    assert rows[0] == {"prompt": PAIR.prompt, "completion": PAIR.completion}
    assert rows[2]["completion"][0]["content"] == "2020-01-01"
    assert list(tmp_path.iterdir()) == [path]


BAD = [
    ("{not json", r"not JSON"),
    ("", r"is empty; expected a JSON object"),
    ("[1, 2]", r"got a list; expected a JSON object"),
    ("null", r"got null"),
    ("[" * 100_000, r"not JSON"),
    ('{"output": "3"}', r"field 'instruction' is missing; got the fields 'output'"),
    ('{"instruction": "a", "response": "3"}', r"field 'output' is missing"),
    ("{}", r"got no fields"),
    ('{"instruction": 5, "output": "3"}', r"field 'instruction': got a number; expected a string"),
    ('{"instruction": "a", "input": ["b"], "output": "3"}', r"field 'input': got a list"),
    ('{"instruction": "a", "output": {"x": 1}}', r"field 'output': got an object"),
    ('{"instruction": "a", "output": null}', r"field 'output': got null"),
    ('{"instruction": "a", "output": "  "}', r"field 'output' is empty"),
    ('{"instruction": "a", "output": "\\ud800"}', r"unpaired surrogate"),
    ('{"messages": [], "output": "3"}', r"got both 'messages' and"),
    ('{"messages": {}}', r"field 'messages': got an object"),
    ('{"messages": []}', r"got 0 message"),
    ('{"messages": ["hi", "yo"]}', r"messages\[0\]: got a string"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\]: field 'content' is missing"),
    ('{"messages": [{"role": "user", "content": 1}]}', r"messages\[0\]: field 'content': got a number"),
    ('{"messages": [{"role": "asistant", "content": "a"}]}', r"got role 'asistant'; nearest: 'assistant'"),
    ('{"messages": [{"role": "assistant", "content": "a"}, '
     '{"role": "user", "content": "a"}]}', r"last message has role 'user'"),
    ('{"messages": [{"role": "system", "content": "a"}, '
     '{"role": "assistant", "content": "a"}]}', r"before the last has role 'system'"),
    (b'{"instruction": "caf\xe9", "output": "3"}', r"got byte 0xe9, which is not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str, name: str) -> None:
    path = write(tmp_path, GOOD, CHAT, line, GOOD, name=name)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_late_system_message_is_refused(tmp_path: Path) -> None:
    row = json.loads(CHAT)
    row["messages"].insert(0, {"role": "user", "content": "first"})
    with pytest.raises(DataError, match=r"line 1: got a system message after the first"):
        load_pairs(write(tmp_path, json.dumps(row)))


def test_a_truncated_gzip_is_named_with_the_line(tmp_path: Path) -> None:
    path = write(
        tmp_path, *(json.dumps({"instruction": f"{i * 7919}", "output": "x"}) for i in range(2000)), name="d.jsonl.gz"
    )
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"d\.jsonl\.gz, line \d+: the gzip stream ends early"):
        load_pairs(path)


def test_plain_text_named_gz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_text(GOOD)
    with pytest.raises(DataError, match=r"line 1: not valid gzip"):
        load_pairs(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is empty"):
        load_pairs(write(tmp_path, name=name))


def test_a_missing_file_a_folder_and_an_unknown_ending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"unknown kind"):
        load_pairs(tmp_path / "data.csv")
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot be read"):
        load_pairs(tmp_path / "dir.jsonl")


# Tokenising


def test_mask_covers_the_answer_and_its_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    row = tokenize([PAIR], tokenizer, 200).dataset[0]
    learnt = [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
    shown = [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if not m]
    assert tokenizer.decode(learnt) == "3<|end_of_text|>"
    assert tokenizer.decode(shown).endswith("<|start_of_role|>assistant<|end_of_role|>")
    # Exactly what generation is given.
    assert shown == tokenizer.apply_chat_template(PAIR.prompt, add_generation_prompt=True)["input_ids"]


def test_long_examples_are_refused_or_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    long = PromptCompletion(prompt=PAIR.prompt, completion=[{"role": "assistant", "content": "x" * 500}])
    with pytest.raises(DataError, match=r"example 2: got 5\d\d tokens; at most 100"):
        tokenize([PAIR, long], tokenizer, 100)
    result = tokenize([PAIR, long, PAIR], tokenizer, 100, overlong="drop")
    assert (len(result.dataset), result.num_dropped) == (2, 1)
    with pytest.raises(DataError, match=r"none of 1 examples is left"):
        tokenize([long], tokenizer, 100, overlong="drop")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template"),
        (TEMPLATE.replace("{% for", "{{ messages | length }}{% for"), r"does not start with the prompt"),
        (TEMPLATE.replace("<|end_of_text|>\n", " "), r"not learn to stop"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize([PAIR], make_tokenizer(template), 100)
