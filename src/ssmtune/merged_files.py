"""What lies beside the weights of a merged model: config, tokenizer, model card, and where all of it came from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.config import read_json
from ssmtune.errors import AdapterMismatch, AttachError
from ssmtune.records import write_json

if TYPE_CHECKING:
    from ssmtune.plan import Plan

PROVENANCE = "ssmtune_merge.json"

BESIDE = re.compile(
    r"generation_config\.json|tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|.*\.model|chat_template\.(jinja|json)|(pre)?processor_config\.json|.*preprocessor_config\.json|LICEN[CS]E.*|NOTICE.*",
    re.IGNORECASE,
)
"""Files of a model directory that stay true when its weights change; no code is among them."""


def copy_beside(base: Path, draft: Path) -> None:
    """Copy tokenizer, generation config and licences of the model directory `base` to `draft`, as they are."""
    for path in sorted(base.iterdir()):
        if BESIDE.fullmatch(path.name) and path.is_file():
            shutil.copyfile(path, draft / path.name)


def write_config(base: Path, draft: Path, dtype: str) -> None:
    """Write the config of the model directory `base` to `draft`, with the dtype of the merged weights."""
    fields = _with_dtype(read_json(base / "config.json", infinite=True), dtype) | {"dtype": dtype}
    # Not `write_json`: an infinite `time_step_limit` is no JSON, and still what such configs hold.
    (draft / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")


def _with_dtype(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`fields` with every dtype in it, also of the configs inside a multimodal one, replaced."""
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "torch_dtype":
            name = "dtype"  # noqa: PLW2901
        named = name == "dtype" and isinstance(value, str)
        changed[name] = dtype if named else _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def refuse_merged(base: Path, adapter: Mapping[str, str]) -> None:
    """Raise `AdapterMismatch` when the model directory `base` came from a merge of the adapter with these file digests."""
    if (base / PROVENANCE).is_file() and read_json(base / PROVENANCE).get("adapter_sha256") == dict(adapter):
        raise AdapterMismatch(
            f"{base}: this adapter is merged into it already ({PROVENANCE}); merging again would add every change twice. "
            "Merge into the model that the adapter was trained on."
        )


def write_provenance(draft: Path, result: Mapping[str, Any]) -> None:
    """Write what was merged, for programs (`ssmtune_merge.json`) and for readers (the model card, `README.md`)."""
    write_json(draft / PROVENANCE, dict(result))
    (draft / "README.md").write_text(_model_card(result), encoding="utf-8")


def _model_card(result: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {row['role']} | {row['tensors']} | {row['changed']:.1%} | {row['survives']:.1%} |"
        for row in result["survival"]
    )
    restored = f"Restored to the base's values: {', '.join(result['restored'])}.\n\n" if result["restored"] else ""
    core = " The core (`A_log`, `D`, `dt_bias`) is fp32 in the file." if result["core_float32"] else ""
    quantized = result.get("quantization")
    if quantized is not None:
        core += f" Trained on the base in {quantized['trained_on']}, merged into the original weights."
    adapter = "\n".join(f"- `{name}`: sha256 {value}" for name, value in result["adapter_sha256"].items())
    return (
        f"# Merged model\n\n"
        f"Base `{result['base']}` (digest {result['base_digest']}), adapter of run `{result['run_id']}`, step "
        f"{result['step']}, recipe `{result['recipe']}`, merged by ssmtune in fp32 and "
        f"rounded once to {result['dtype']}.{core}\n\n"
        f"{restored}Adapter:\n\n{adapter}\n\n"
        f"| role | tensors | elements changed | still changed after rounding |\n|---|---:|---:|---:|\n{rows}\n"
    )


def refuse_unmergeable(plan: Plan) -> None:
    """Raise `AttachError` for a plan with a method whose effect no weight can hold."""
    lasting = sorted({site.method for site in plan.unmergeable})
    if lasting:
        raise AttachError(
            f"cannot merge: method {', '.join(lasting)} adds what no tensor of the base can hold, so a merged model would "
            "drop it. Use the adapter with ssmtune.load(base, directory). 'ssmtune export --to hf' makes an additional scan a "
            "model with more states (ssmtune.widen.widen), and puts what acts where a sequence starts into its cache."
        )
