"""The Modelfile's template says what the tokenizer's says, or is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ssmtune.errors import ConfigError
from ssmtune.export.ollama import CHATS, chat_pieces, modelfile, stops
from ssmtune.models import load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_START = "{{ bos_token }}" + CHATML
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)
LAST_TURN = CHATML.replace("m['content'] +", "(m['content'] | upper if loop.last else m['content']) +")


def _tokenizer(template: str | None = None) -> Any:
    tokenizer = load_tokenizer("tiny-granite-h")
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _run_go(template: str, chat: Any) -> str:
    """What Go's text/template makes of the one form that we write, read from the text itself."""
    head, body, ask = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}\{\{ (if .*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    branches = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else |\Z)', body, re.DOTALL))
    turns = (branches[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in chat)
    return head + "".join(turns) + ask


@pytest.mark.parametrize("template", [None, CHATML, WITH_START])
def test_the_go_template_renders_what_the_tokenizer_renders(template: str | None) -> None:
    tokenizer = _tokenizer(template)
    pieces = chat_pieces(tokenizer)
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(list(map(dict, chat)), tokenize=False, add_generation_prompt=True)
        assert _run_go(pieces.go_template(), chat) == expected


def test_stops_are_where_a_turn_ends_and_the_next_begins() -> None:
    tokenizer = _tokenizer()
    assert stops(tokenizer, chat_pieces(tokenizer)) == ["<|end_of_text|>", "<|start_of_role|>"]


def test_the_modelfile_names_the_file_beside_it() -> None:
    text = modelfile(_tokenizer(), "model-f16.gguf")
    assert text.startswith('FROM ./model-f16.gguf\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith('PARAMETER stop "<|end_of_text|>"\nPARAMETER stop "<|start_of_role|>"\n')


def test_a_start_token_that_ollama_adds_itself_is_not_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert '"""<|end_of_text|>{{ range' in modelfile(_tokenizer(WITH_START), "x.gguf")
    tokenizer = _tokenizer(WITH_START)
    adding = type(
        "Adding", (type(tokenizer),), {"__call__": lambda self, text, **_: {"input_ids": [self.bos_token_id, 9]}}
    )
    tokenizer.__class__ = adding
    assert '"""{{ range' in modelfile(tokenizer, "x.gguf")


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, LAST_TURN])
def test_a_template_that_does_more_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="more than fixed text around each turn"):
        chat_pieces(_tokenizer(template))
