"""`ssmtune verify`: every check, on the saved files of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ssmtune.cli.output import print_checks, print_result, quiet_libraries

if TYPE_CHECKING:
    from ssmtune.verify import VerifyReport


def verify(
    run: Annotated[str, typer.Argument(help="A run directory.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove what a run trained: coverage, live adapters, agreeing paths, exact reload, merge, packing, padding.

    Example: [cyan]ssmtune verify runs/first[/cyan]
    """
    quiet_libraries()
    report = verify_and_report(run, show=not json_output)
    if json_output:
        print_result(report.to_dict())
    if not report.ok:
        raise typer.Exit(1)


def verify_and_report(run: str, *, show: bool = True) -> VerifyReport:
    """Verify a run directory and print the table of checks."""
    from ssmtune.verify import verify as verify_stage

    report = verify_stage(run)
    if show:
        print_checks(f"verify {run}: {'all checks hold' if report.ok else 'FAILED'}", report.checks.values())
    return report
