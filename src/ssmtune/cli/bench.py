"""`ssmtune bench`: how fast the training step of a model shape is here, beside transformers + PEFT."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ssmtune.cli.output import make_table, print_result, print_table, quiet_libraries, tables, words


def bench(
    model: Annotated[str, typer.Argument(help="Model directory, config .json (random weights), hub id, or bundled.")],
    recipe: Annotated[str, typer.Option(help="Name of a recipe of LoRA and core.")] = "all+core",
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of one optimiser step.", min=2)] = 2048,
    row_length: Annotated[int, typer.Option(help="Tokens of one row.", min=2)] = 512,
    steps: Annotated[int, typer.Option(help="Steps timed in a row, three times per process.", min=1)] = 5,
    repeats: Annotated[int, typer.Option(help="Processes per side, in turn.", min=1)] = 3,
    memory: Annotated[str, typer.Option(help="fast, balanced or small: how much is kept for the backward.")] = "fast",
    quantize: Annotated[
        str | None, typer.Option(help="Hold projections in 4 bits: nf4, or a YAML file with a quantize block.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="Short documents of this mean length: ours packs them, the peer pads them.")
    ] = None,
    peer: Annotated[bool, typer.Option(help="Measure transformers + PEFT too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the record to this file.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Tokens per second, peak memory and time by component of the full training step, same work on both sides.

    Examples: [cyan]ssmtune bench tiny-granite-h[/cyan] .
    [cyan]ssmtune bench config.json --device cuda --tokens-per-step 8192 --row-length 8192[/cyan]
    """
    quiet_libraries()
    from ssmtune.bench import BenchConfig
    from ssmtune.bench import bench as measure
    from ssmtune.config import decode
    from ssmtune.quantize import read_quantize
    from ssmtune.records import write_json

    fields = {
        "model": model,
        "recipe": recipe,
        "rank": rank,
        "device": device,
        "tokens_per_step": tokens_per_step,
        "row_length": row_length,
        "num_steps": steps,
        "repeats": repeats,
        "memory": memory,
        "quantize": None if quantize is None else asdict(read_quantize(quantize)),
        "documents": documents,
        "peer": peer,
    }
    record = measure(decode(BenchConfig, fields, where="the command line"), on_message=words.print)
    if out is not None:
        write_json(out, record)
    if json_output:
        print_result(record)
    else:
        _print_tables(record)
    if record["status"] == "failed":
        raise typer.Exit(1)


def _print_tables(record: dict[str, Any]) -> None:
    shape, config = record["shape"], record["config"]
    title = (
        f"{config['model']}, {config['recipe']}: {shape['parameters']:,} parameters, {shape['trainable']:,} train; "
        f"{shape['tokens'][0]} x {shape['tokens'][1]} tokens, {shape['dtype']}, {record['environment']['device']}"
    )
    if shape["quantization"] is not None:
        held = shape["quantization"]
        title += f"; base {held['bytes_after'] / 2**30:.2f} GiB, {held['bytes_before'] / 2**30:.2f} without 4 bits"
    if config["documents"] is not None:
        title += f"; documents of {config['documents']} tokens in the mean, whose tokens alone count"
    headings = ("side", "tokens/s", "range", "first step", "peak memory")
    table = make_table(title, *headings, numbers=headings[1:])
    for name, side in record["sides"].items():
        if "error" in side:
            table.add_row(name, "did not finish")
            continue
        low, high = side["tokens_per_s_range"]
        memory = f"{side['peak_memory_bytes'] / 2**30:.2f} GiB"
        table.add_row(
            name, f"{side['tokens_per_s']:,.0f}", f"{low:,.0f}-{high:,.0f}", f"{side['first_step_s']:.1f} s", memory
        )
    print_table(table)
    for name, side in record["sides"].items():
        if "error" in side:
            words.print(f"{name}: {side['error']}")
        elif name != "ssmtune":
            tables().print(f"Operations of {name}: {side['operations']}.")
    sides = {name: side for name, side in record["sides"].items() if "error" not in side}
    parts = make_table("Milliseconds a step by component", "component", *sides, numbers=tuple(sides))
    for part in dict.fromkeys(part for side in sides.values() for part in side["components"]):
        parts.add_row(part, *(f"{side['components'].get(part, 0.0) * 1000:,.1f}" for side in sides.values()))
    print_table(parts)
    if record["ratio"] is not None:
        low, high = record["ratio"]["range"]
        tables().print(f"ssmtune is {record['ratio']['median']:.2f} times as fast (repeats: {low:.2f}-{high:.2f}).")
    if record["floor"] is not None:
        floor = record["floor"]
        tables().print(
            f"The frozen matrix products alone take {floor['step_s'] * 1000:,.1f} ms: {floor['share']:.0%} of our step."
        )
    parity = record["parity"]
    if parity["difference"] is not None:
        verdict = "agree" if parity["ok"] else "DISAGREE: the speeds above mean nothing"
        tables().print(
            f"First losses {verdict}: relative difference {parity['difference']:.1e}, limit {parity['limit']:.0e}."
        )
    if parity["from_exact"] is not None:
        away = ", ".join(f"{side} by {apart:.1e}" for side, apart in parity["from_exact"].items())
        tables().print(f"From the loss in fp32 they differ: {away}.")
    dead = record["sides"]["ssmtune"]["dead"]
    if dead:
        tables().print(f"DEAD: {len(dead)} trained tensors of ssmtune did not move, for example {dead[0]}.")
