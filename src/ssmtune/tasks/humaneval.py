"""HumanEval (Chen et al. 2021): a Python function from its signature and docstring, judged by running its unit tests.

What a model writes is executed, so an evaluation of this task has to be asked for with `--allow-execution`; it runs in
the sandbox of `_sandbox`, with the standard library only. `pass@1` is of one greedy answer.
"""

from __future__ import annotations

import re

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._sandbox import run_python
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import SourcedExample

MAX_SECONDS = 5.0

END_OF_BODY = re.compile(r"\n(?=[^\s#)\]}])")
"""Where the body of a function is over: a line that starts at the margin and is no comment."""

ADD = (
    'def add_all(values: list) -> int:\n    """Return the sum of all values.\n    >>> add_all([1, 2])\n    3\n    """\n'
)
TWICE = 'def twice(text: str) -> str:\n    """Return the text two times.\n    >>> twice("ab")\n    \'abab\'\n    """\n'


def read_program(text: str, example: SourcedExample) -> str:
    """Return the module that an answer makes: its first fenced block or all of it, behind the prompt unless it defines the
    function itself; a body that goes on below the prompt ends at the first line at the margin."""
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL | re.IGNORECASE)
    code = fenced.group(1) if fenced else text
    name = re.escape(example.facts["entry_point"])
    if re.search(rf"^(?:async )?def {name}\b", code, re.MULTILINE):
        # The prompt's imports and other functions may be needed; its own unfinished function is replaced.
        return f"{example.input}    pass\n\n{code}"
    body = code.strip("\n")
    if body and not body.startswith((" ", "\t")):
        body = "    " + body
    return example.input + END_OF_BODY.split(body, maxsplit=1)[0]


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return whether every unit test passes, and whether the program can be compiled."""
    program = read_program(text, example)
    try:
        compile(program, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"pass@1": 0.0, "compiles": 0.0}
    tests = f"{program}\n\n{example.facts['test']}\n\ncheck({example.facts['entry_point']})\n"
    return {"pass@1": float(run_python(tests, max_seconds=MAX_SECONDS).status == "done"), "compiles": 1.0}


def row_of(found: Row) -> Row:
    """Return a row of ours."""
    return {
        "id": found["task_id"],
        "input": found["prompt"],
        "target": found["canonical_solution"],
        "entry_point": found["entry_point"],
        "test": found["test"],
    }


TASK = SourcedTask(
    name="humaneval",
    version=1,
    kind="code",
    instruction="Complete this Python function. Answer with code only.",
    folder="code_humaneval",
    licence="MIT",
    restriction="for evaluation only",
    samples=(
        {
            "input": ADD,
            "target": "    return sum(values)\n",
            "entry_point": "add_all",
            "test": "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n",
        },
        {
            "input": TWICE,
            "target": "    return text * 2\n",
            "entry_point": "twice",
            "test": "def check(f):\n    assert f('ab') == 'abab'\n",
        },
    ),
    primary="pass@1",
    metrics=("pass@1", "compiles"),
    chance=0.0,
    max_new_tokens=512,
    scorer=score,
    trained=False,
    executes=True,
    hub=Hub(path="openai/openai_humaneval", splits={"test": "test"}, row=row_of),
)
