"""Ollama: the GGUF file and a Modelfile that renders a chat as the tokenizer's template does, and stops where it ends.

Ollama does not run the template in the GGUF file but one in Go's syntax. It is put together from the pieces that the
tokenizer's template puts around each role, and compared with the tokenizer on conversations before it is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.errors import ConfigError
from ssmtune.export.base import ExportConfig, Target, refuse_existing
from ssmtune.export.gguf import export_gguf
from ssmtune.models import load_tokenizer
from ssmtune.records import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class ChatPieces:
    """What a template writes at the start, around the content of each role, and to ask for an answer."""

    start: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    ask: str

    def render(self, chat: Chat) -> str:
        """Return the prompt of a conversation."""
        turns = (self.before[turn["role"]] + turn["content"] + self.after[turn["role"]] for turn in chat)
        return self.start + "".join(turns) + self.ask

    def go_template(self) -> str:
        """Return the same in Go's template syntax, on one line: a break or a trim mark would be part of the prompt."""
        branches = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}' for role in ROLES
        )
        return f"{self.start}{{{{ range .Messages }}}}{{{{ {branches}{{{{ end }}}}{{{{ end }}}}{self.ask}"


CHATS: tuple[Chat, ...] = tuple(
    [{"role": role, "content": f"{role} {i}, said once"} for i, role in enumerate(roles.split())]
    for roles in ("user", "system user", "user assistant user", "system user assistant user assistant user")
)


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces:
    """Return the pieces of the tokenizer's chat template.

    Raises `ConfigError` for a template that does more than put fixed text around each turn: a default system prompt,
    a date, another form of the last turn.
    """

    def render(*roles: str, ask: bool = False) -> list[str]:
        marks = [f"@{i}@" for i in range(len(roles))]
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask))
        parts = []
        for mark in marks:
            part, _, text = text.partition(mark)
            parts.append(part)
        return [*parts, text]

    after_user, after_assistant = render("user")[-1], render("user", "assistant")[-1]
    _, answer, question, _ = render("user", "assistant", "user")
    before_user = question.removeprefix(after_assistant)
    start = render("user")[0].removesuffix(before_user)
    with_system = render("system", "user")
    pieces = ChatPieces(
        start=start,
        before={
            "system": with_system[0].removeprefix(start),
            "user": before_user,
            "assistant": answer.removeprefix(after_user),
        },
        after={
            "system": with_system[1].removesuffix(before_user),
            "user": after_user,
            "assistant": after_assistant,
        },
        ask=render("user", ask=True)[-1].removeprefix(after_user),
    )
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(list(map(dict, chat)), tokenize=False, add_generation_prompt=True)
        if pieces.render(chat) != expected:
            raise ConfigError(
                f"--to ollama: the chat template is more than fixed text around each turn: for "
                f"{[turn['role'] for turn in chat]} it gives {expected!r}, its pieces give {pieces.render(chat)!r}. "
                "Use --to gguf, which keeps the template as it is, and write the Modelfile by hand."
            )
    unsafe = [mark for mark in ('"""', "{{", "}}") if mark in pieces.render(CHATS[-1])]
    if unsafe:
        raise ConfigError(f"--to ollama: the chat template holds {unsafe[0]!r}, which a Modelfile cannot quote.")
    return pieces


def stops(tokenizer: PreTrainedTokenizerBase, pieces: ChatPieces) -> list[str]:
    """Return where an answer is over: the end token, and the special tokens that end a turn or begin the next."""
    special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    found = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    for piece in (pieces.after["assistant"], *(pieces.before[role] for role in ROLES)):
        first = min(((piece.find(token), token) for token in special if token in piece), default=None)
        if first:
            found.append(first[1])
    return list(dict.fromkeys(found))


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf_name: str) -> str:
    """Return the Modelfile for a GGUF file beside it."""
    pieces = chat_pieces(tokenizer)
    bos = str(tokenizer.bos_token or "")
    adds_bos = bool(bos) and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    # Ollama adds the token itself where the tokenizer does, so the template must not write it a second time.
    written = replace(pieces, start=pieces.start.removeprefix(bos)) if adds_bos else pieces
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{written.go_template()}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops(tokenizer, pieces)]
    return "\n".join(lines) + "\n"


def _run(config: ExportConfig) -> dict[str, Any]:
    out = Path(config.out)
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    type_ = config.type or "f16"
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        draft = Path(scratch) / out.name
        facts = export_gguf(config, draft / f"model-{type_}.gguf", type_)
        text = modelfile(load_tokenizer(facts["merged"]["base"]), f"model-{type_}.gguf")
        (draft / "Modelfile").write_text(text, encoding="utf-8")
        draft.rename(out)
    files = facts["files"] | {"Modelfile": file_sha256(out / "Modelfile")}
    return {**facts, "files": files, "modelfile": text, "record_path": str(out / "export.json")}


TARGET = Target(
    writes="a directory with the GGUF file and a Modelfile, for `ollama create`",
    proves="what `--to gguf` proves, and that the Modelfile's template renders conversations as the tokenizer's does",
    options=frozenset({"type"}),
    run=_run,
)
