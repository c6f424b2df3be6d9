"""The report page: one self-contained HTML file, the same bytes for the same records."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import markupsafe
import plotly.offline

from ssmtune import records
from ssmtune.report import (
    checks,
    comparisons,
    examples,
    paragraph,
    provenance,
    results,
    speed,
    training,
    transfer,
)
from ssmtune.report.arms import Collection, base_comparisons, collect
from ssmtune.report.sections import Figures, Section
from ssmtune.report.sources import Record
from ssmtune.report.tables import write_tables

ALWAYS = ("headline", "methods", "accuracy", "budget", "loss", "coverage", "core", "verify", "failures", "samples")
"""Sections that say so where there is nothing to show; the others are left out."""


def write_report(
    given: Iterable[Record],
    out: Path,
    title: str,
    *,
    paths: Sequence[Path] = (),
    tables: Path | None = None,
) -> Path:
    """Write the report of `given` records to `out` and return its path; nothing but the records decides its bytes.

    `paths` are the records' files, which the page then links to. With `tables`, every table is written into that
    directory as CSV and LaTeX too. Raises `RecordError` when a record lacks what the page reads.
    """
    out = Path(out)
    collection = collect(given, [_link(path, out) for path in paths])
    sections = make_sections(collection)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        arms=list(collection.arms.values()),
        environment=provenance.environment(collection),
        groups=provenance.groups(collection),
        facts=provenance.facts,
        num_records=len(collection.sources),
        plotly_js=markupsafe.Markup(plotly.offline.get_plotlyjs()),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write_bytes(out, page.encode())
    if tables is not None:
        write_tables((t for section in sections for t in (*section.tables, *section.numbers)), tables)
    return out


def make_sections(collection: Collection) -> list[Section]:
    """Return the sections of the page in the order in which they are read; of benchmarks alone, only theirs."""
    figures = Figures()
    speeds = speed.speed(collection, figures)
    alone = bool(collection.of("benchmark")) and not collection.of("train", "evaluate", "study", "study_cell", "verify")
    if alone:
        return [speeds, checks.failures(collection)]
    base, shown = collection.base(), collection.base(few_shot=True)
    compared = {arm.name: base_comparisons(collection, arm) for arm in (base, shown) if arm is not None}
    to_base = compared[base.name] if base is not None else {}
    made = [
        results.headline(collection, to_base),
        paragraph.methods(collection),
        comparisons.comparisons(collection, figures),
        results.accuracy(collection, figures),
        results.budget(collection, figures),
        transfer.transfer(collection, to_base, figures),
        transfer.forgetting(collection, compared, figures),
        training.losses(collection, figures),
        training.coverage(collection, figures),
        training.core(collection, figures),
        training.gates(collection, figures),
        checks.verify(collection),
        checks.failures(collection),
        checks.exports(collection),
        speeds,
        examples.examples(collection),
    ]
    return [section for section in made if section.name in ALWAYS or not section.is_empty]


def _link(path: Path, out: Path) -> str:
    """Where a record's file lies as seen from the page, as an address."""
    return urllib.parse.quote(Path(os.path.relpath(path, out.parent)).as_posix())
