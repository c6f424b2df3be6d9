"""`ssmtune demo`: the whole way in a few minutes, on a CPU, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import make_table, print_result, print_table, quiet_libraries, tables, words


def demo(
    out: Annotated[Path, typer.Option(help="Directory for runs, merged model and report.")] = Path("demo"),
    json_output: Annotated[bool, typer.Option("--json", help="Print the demo's record as JSON.")] = False,
) -> None:
    """Base, V1 (transformer names), V2 (all projections), V4 (and the core): train, verify, merge, evaluate, llama.cpp, report.

    Example: [cyan]ssmtune demo --out demo[/cyan]
    """
    quiet_libraries()
    from ssmtune.demo import run_demo

    record = run_demo(out, on_message=words.print)
    if json_output:
        print_result(record)
    else:
        headings = ("arm", "exact", "contains", "ended its answer", "documents")
        table = make_table("Document classification, held-out documents", *headings, numbers=headings[1:])
        for row in record["rows"]:
            table.add_row(
                row["name"],
                f"{row['metrics']['exact']:.1%}",
                f"{row['metrics']['contains']:.1%}",
                f"{row['stopped']:.1%}",
                str(row["num"]),
            )
        print_table(table)
        checks = record["verify"]["checks"]
        good = sum(check["ok"] for check in checks)
        tables().print(
            f"verify V4: {good} of {len(checks)} checks hold; merged answers equal adapted: "
            f"{record['merged_equals_adapted']}"
        )
        gguf = record["gguf"]
        if gguf is None:
            tables().print("llama.cpp: left out, it is not installed")
        else:
            tables().print(
                f"llama.cpp ({gguf['type']}): the top token of transformers on {gguf['same_top']} of {gguf['prompts']} "
                f"held-out documents, log-probabilities within {gguf['max_abs_logprob']:.1e} nats: {gguf['file']}"
            )
        tables().print(f"Report: {record['report']}   ({record['seconds']:.0f} s)")
    arrived = record["gguf"] is None or record["gguf"]["same"]
    if not record["verify"]["ok"] or not record["merged_equals_adapted"] or not arrived:
        raise typer.Exit(1)
