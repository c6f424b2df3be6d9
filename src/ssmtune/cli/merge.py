"""`ssmtune merge`: a plain model with the adapter in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from ssmtune.cli.output import make_table, print_result, print_table, quiet_libraries, split_list, words
from ssmtune.errors import ConfigError, nearest


def merge(
    run: Annotated[str, typer.Argument(help="A run directory, or an adapter directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write the merged model to; must not exist.")],
    model: Annotated[str | None, typer.Option(help="The base model, where RUN is an adapter directory.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the written weights: float32, bfloat16 or auto.")] = "auto",
    restore: Annotated[
        str, typer.Option(help="Roles whose edits are given up, separated by commas: attn.q,attn.k.")
    ] = "",
    core_float32: Annotated[
        bool, typer.Option("--core-float32", help="Keep A_log, D and dt_bias in fp32 in the file.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was merged as JSON.")] = False,
) -> None:
    """Write the merged model, with tokenizer, and say how much of each role's change survives its precision.

    The base is read and written one tensor at a time, so a model larger than the memory can be merged.

    Examples: [cyan]ssmtune merge runs/first --out merged[/cyan] .
    [cyan]ssmtune merge adapter --model base --out merged --dtype float32 --json[/cyan]
    """
    quiet_libraries()
    from ssmtune.merge import merge_to
    from ssmtune.models import Dtype

    if dtype not in get_args(Dtype):
        raise ConfigError(f"--dtype {dtype!r}: {nearest(dtype, get_args(Dtype))}.")
    result = merge_to(
        run,
        out,
        model=model,
        dtype=cast(Dtype, dtype),
        restore=split_list(restore),
        core_float32=core_float32,
        on_message=words.print,
        progress=not json_output,
    )
    if json_output:
        print_result(result)
        return
    headings = ("role", "tensors", "changed", "still changed after rounding", "largest change")
    table = make_table(f"{out}: merged, {result['dtype']}", *headings, numbers=headings[1:])
    for row in result["survival"]:
        table.add_row(
            row["role"],
            str(row["tensors"]),
            f"{row['changed']:.1%}",
            f"{row['survives']:.1%}",
            f"{row['max_abs_delta']:.2e}",
        )
    print_table(table)
    worst = max(result["rounding"], key=lambda row: row["max"], default=None)
    if worst is not None:
        words.print(
            f"Rounding moved stored values from the exact ones by at most {worst['max']:.2e} ({worst['path']}, on average "
            f"{worst['mean']:.2e} there)."
        )
    if result["prompts"] is not None:
        words.print(
            f"Beside the adapted model, logits differ by at most {result['prompts']['max']:.2e} of the largest."
        )
    if "quantization" in result:
        trained_on, prompts = result["quantization"]["trained_on"], result["quantization"]["prompts"]
        measured = "not measured at this size" if prompts is None else f"{prompts['mean']:.2e} on average"
        words.print(
            f"Trained on the base in {trained_on}, merged into the original weights. Difference of logits to the model as it "
            f"was trained, relative to the largest: {measured}."
        )
    if result["left_out"]:
        words.print(f"Left out, since the model has no use for them: {', '.join(result['left_out'][:5])}.")
    words.print("Load it with transformers.AutoModelForCausalLM.from_pretrained; ssmtune is not needed for that.")
