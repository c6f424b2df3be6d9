"""The whole way on the bundled model: base, V1, V2 and V4 of the Granite study on a small task, checked and reported."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmtune.config import decode
from ssmtune.errors import ConfigError, MissingDependency, PlacementError
from ssmtune.evaluate import Engine, EvaluateConfig, evaluate
from ssmtune.evaluate_llamacpp import require_llamacpp
from ssmtune.export.agreement import check_gguf
from ssmtune.export.base import GgufType
from ssmtune.export.converter import convert
from ssmtune.merge import merge_to
from ssmtune.models import empty_model, load_tokenizer
from ssmtune.plan import make_plan
from ssmtune.records import file_sha256, find_records, new_record, write_json
from ssmtune.report import write_report
from ssmtune.tasks.base import messages, split
from ssmtune.train import TrainConfig, train
from ssmtune.training_data import task_examples
from ssmtune.verify import verify

MODEL = "tiny-granite-h"
TASK = "classification"
SIZE = 0.01
"""About 240 documents of 24 kinds: minutes on two cores, and enough to learn."""

ARMS = {
    "V1": "transformer-names",
    "V2": "all",
    "V4": "all+core",
}
MARKER = "demo.json"
GGUF_TYPE: GgufType = "f32"
"""Nothing is rounded, so that llama.cpp must give the log-probabilities of transformers."""


def run_demo(out: Path, *, on_message: Callable[[str], None] = print, progress: bool = True) -> dict[str, Any]:
    """Run the demo below `out` and return its record; `out/report.html` is the page to look at.

    An earlier demo there is replaced; any other directory that is not empty is refused with `ConfigError`.
    """
    _make_room(out)
    started = time.time()
    record = new_record("demo", config={"model": MODEL, "task": TASK, "size": SIZE}, status="aborted")
    write_json(out / MARKER, record)
    try:
        make_plan(empty_model(MODEL), ARMS["V1"])
    except PlacementError as error:
        on_message(f"The target list of transformer tutorials, as it would be used here:\n{error}\n")
        on_message("V1 goes on with it all the same, to show what that costs.\n")

    records = [_evaluate("base", None, out, progress)]
    for name, recipe in ARMS.items():
        on_message(f"{name}: recipe {recipe}")
        trained = train(_train_config(name, recipe, out), on_message=on_message, progress=progress)
        records.append(_evaluate(name, out / name / "adapter", out, progress))
        on_message(f"{name}: {trained['plan']['trainable']:,} parameters trained\n")

    on_message("V4: verify")
    report = verify(str(out / "V4"))
    merged = out / "merged"
    merge_to(str(out / "V4"), merged, dtype="float32")
    records.append(_evaluate("V4 merged", None, out, progress, model=str(merged)))
    same = records[-1]["scores"] == records[-2]["scores"]
    gguf = export_demo(merged, out, on_message)
    if gguf is not None:
        name = f"V4 in llama.cpp, {GGUF_TYPE}"
        records.append(_evaluate(name, None, out, progress, model=str(merged), engine="llamacpp", gguf=gguf["file"]))
    found = {p: r for p, r in find_records(out).items() if r["kind"] != "demo" and r.get("name") != "V4 merged"}
    page = write_report(
        found.values(),
        out / "report.html",
        "ssmtune demo: document classification on tiny-granite-h",
        paths=list(found),
    )
    record |= {
        "status": "done",
        "rows": [
            {"name": r["name"], "metrics": r["metrics"], "num": len(r["example_ids"]), "stopped": r["stopped_rate"]}
            for r in records
        ],
        "verify": report.to_dict(),
        "merged_equals_adapted": same,
        "gguf": gguf,
        "report": str(page),
        "seconds": time.time() - started,
    }
    write_json(out / MARKER, record)
    return record


def export_demo(merged: Path, out: Path, on_message: Callable[[str], None]) -> dict[str, Any] | None:
    """Take the merged model to llama.cpp as a GGUF file and compare it there on the held-out documents.

    Returns the comparison and its `file`; None, after saying so, where llama.cpp is not installed.
    """
    try:
        require_llamacpp()
    except MissingDependency as error:
        on_message(f"Left out: the tuned model as a GGUF file, answering in llama.cpp. {error}\n")
        return None
    started = time.time()
    path = out / f"V4-{GGUF_TYPE}.gguf"
    on_message(f"V4: to llama.cpp, as {path}")
    converted = convert(merged, path, GGUF_TYPE)
    tokenizer = load_tokenizer(str(merged))
    prompts = [
        str(tokenizer.apply_chat_template(messages(example)[0], tokenize=False, add_generation_prompt=True))
        for example in split(task_examples(TASK, SIZE)).test
    ]
    check = check_gguf(path, str(merged), type_=GGUF_TYPE, prompts=prompts, num_tokens=1)
    record = new_record(
        "export",
        config={"model": MODEL, "to": "gguf", "type": GGUF_TYPE},
        name="V4",
        files={path.name: file_sha256(path)},
        converter=converted,
        check=check,
        seconds=time.time() - started,
    )
    write_json(path.with_suffix(".export.json"), record)
    return {**check, "file": str(path), "same": check["ok"] and check["same_top"] == check["prompts"]}


def _make_room(out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / MARKER).is_file():
        raise ConfigError(f"{out}: is not empty and holds no earlier demo. Choose another directory with --out.")
    shutil.rmtree(out)


def _train_config(name: str, recipe: str, out: Path) -> TrainConfig:
    fields = {
        "model": MODEL,
        "output_dir": str(out / name),
        "name": name,
        "recipe": recipe,
        "allow_unmatched": name == "V1",
        "data": {"task": TASK, "size": SIZE, "max_length": 768},
        "optimizer": {"learning_rate": 3e-3, "core_learning_rate": 3e-3},
        "rows_per_step": 2,
        "num_epochs": 2,
        "num_evaluations": 2,
    }
    return decode(TrainConfig, fields, where="the demo's settings")


def _evaluate(
    name: str,
    adapter: Path | None,
    out: Path,
    progress: bool,
    *,
    model: str = MODEL,
    engine: Engine = "transformers",
    gguf: str | None = None,
) -> dict[str, Any]:
    config = EvaluateConfig(
        model=model,
        task=TASK,
        size=SIZE,
        adapter=None if adapter is None else str(adapter),
        name=name,
        engine=engine,
        gguf=gguf,
    )
    record = evaluate(config, progress=progress)
    write_json(out / f"evaluate-{name.replace(', ', '-').replace(' ', '-')}.json", record)
    return record
