"""Entry point of `ssmtune`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import sys

import typer

from ssmtune.cli import (
    adapters,
    bench,
    demo,
    diff,
    doctor,
    evaluate,
    export,
    inspect_model,
    merge,
    methods,
    plan,
    report,
    study,
    tasks,
    train,
    verify,
)
from ssmtune.errors import CheckFailed, SsmtuneError

app = typer.Typer(
    name="ssmtune",
    help="Parameter-efficient fine-tuning of state-space and hybrid language models, with proof of what was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo")(demo.demo)
app.command("inspect")(inspect_model.inspect)
app.command("methods")(methods.methods)
app.command("tasks")(tasks.tasks)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("verify")(verify.verify)
app.command("evaluate")(evaluate.evaluate)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("adapters")(adapters.adapters)
app.command("diff")(diff.diff)
app.command("study")(study.study)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)


def main() -> None:
    """Run the command; every expected failure is one message on stderr and exit code 2 (1 for a failed check)."""
    try:
        app()
    except CheckFailed as error:
        _fail(error, 1)
    except SsmtuneError as error:
        _fail(error, 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        _fail(error, 2)


def _fail(error: BaseException, code: int) -> None:
    print(f"ssmtune: {error}", file=sys.stderr)
    raise SystemExit(code)
