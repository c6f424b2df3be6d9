"""`ssmtune export`: what was trained, in the layout of the one who uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import print_result, quiet_libraries, words


def export(
    run: Annotated[str, typer.Argument(help="A run directory, or an adapter directory.")],
    to: Annotated[str, typer.Option(help="hf, peft, gguf, gguf_lora, ollama, vllm or sglang.")],
    out: Annotated[Path, typer.Option(help="File or directory to write; must not exist.")],
    model: Annotated[str | None, typer.Option(help="The base model, where RUN does not name it.")] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="gguf, ollama: f32, f16 (default), bf16, q8_0 or q4_k_m.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="hf: precision of the weights: float32, bfloat16 or auto.")] = None,
    drop_extras: Annotated[
        bool, typer.Option("--drop-extras", help="peft: leave out what PEFT's format cannot hold.")
    ] = False,
    bake_extras: Annotated[
        Path | None, typer.Option(help="peft: write a new base there that has those tensors in its weights.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Write the result for another program, after checking there that it answers as what was trained.

    Examples: [cyan]ssmtune export runs/first --to gguf --out first.gguf --type q8_0[/cyan] .
    [cyan]ssmtune export runs/first --to peft --out adapter --bake-extras base[/cyan]
    """
    quiet_libraries()
    from ssmtune.config import decode
    from ssmtune.export import ExportConfig
    from ssmtune.export import export as export_stage

    fields = {
        "run": run,
        "to": to,
        "out": str(out),
        "model": model,
        "type": type_,
        "dtype": dtype,
        "drop_extras": drop_extras,
        "bake_extras": None if bake_extras is None else str(bake_extras),
    }
    record = export_stage(decode(ExportConfig, fields, where="ssmtune export"))
    if json_output:
        print_result(record)
        return
    words.print(f"{out}: written in {record['seconds']:.0f} s.")
    for line in record["summary"]:
        words.print(line)
