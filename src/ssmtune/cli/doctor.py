"""`ssmtune doctor`: are the operations right on this machine?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ssmtune.cli.output import print_checks, print_result, quiet_libraries, tables


def doctor(
    leak: Annotated[str | None, typer.Option(help="Also test whether packed documents leak in this model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one by default.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare every operation, forward and all gradients, with an fp64 recurrence on this machine; try every scorer.

    Examples: [cyan]ssmtune doctor[/cyan] . [cyan]ssmtune doctor --leak tiny-granite-h[/cyan]
    """
    quiet_libraries()
    from ssmtune.doctor import examine, leak_test
    from ssmtune.models import load_model

    report = examine(device)
    checks = list(report.checks.values())
    if leak is not None:
        checks.append(leak_test(load_model(leak, dtype="float32")))
    ok = all(check.ok for check in checks)
    if json_output:
        print_result({**report.to_dict(), "ok": ok, "checks": [check.to_dict() for check in checks]})
    else:
        print_checks(f"doctor: {'operations and scorers are right here' if ok else 'FAILED'}", checks)
        if leak is not None and checks[-1].ok:
            tables().print(f"packing: {checks[-1].detail}")
        tables().print("  ".join(f"{name} {version}" for name, version in report.versions.items()))
        for line in report.untried:
            tables().print(f"not tried: {escape(line)}", highlight=False)
        for pair in report.known_bad:
            tables().print(f"[yellow]known bad here: {pair.name} on {pair.gpu}: {pair.reason} ({pair.source})[/yellow]")
    if not ok:
        raise typer.Exit(1)
