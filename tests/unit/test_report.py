"""The report: the same bytes for the same records, nothing fetched, everything escaped, nothing missing."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import synthetic_records as synthetic
from parsed_page import Page, own

from ssmtune import config as decoding
from ssmtune import records, study
from ssmtune.errors import ConfigError
from ssmtune.report import plots, study_markdown, text, update_generated, write_report

SECTIONS = "headline methods accuracy budget loss coverage core verify failures samples provenance".split()


@pytest.fixture(scope="module")
def study_record() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "environment", lambda: synthetic.ENVIRONMENT)
        config = decoding.decode(study.StudyConfig, synthetic.study_mapping("unused"), where="study.yaml")
        cells = []
        for cell in study.expand(config):
            facts = {"status": "done", "error": None, **synthetic.fake_cell(cell.spec)}
            cells.append({"kind": "study_cell", "digest": cell.digest, "name": cell.spec.cell, **facts})
        return study.analyse(cells, config)


@pytest.fixture(scope="module")
def page(study_record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert write_report([*synthetic.run_records(), study_record], out, "A title & more") == out
    return out.read_text()


def test_same_records_same_bytes(page: str, study_record: dict[str, Any], tmp_path: Path) -> None:
    again = copy.deepcopy([*synthetic.run_records(), study_record])
    assert write_report(again, tmp_path / "again.html", "A title & more").read_text() == page


def test_every_section_is_there_and_every_link_leads_somewhere(page: str) -> None:
    parsed = Page(own(page))
    assert {*SECTIONS, "comparisons"} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link.startswith("data:") or (link[:1] == "#" and link[1:] in parsed.ids) for link in parsed.links)
    # 3 forest, 6 accuracy, 3 budget, 3 loss, 3 coverage and 6 core plots.
    assert sum(i.startswith("plot-") for i in parsed.ids) == 24
    # Every section that is not empty says how to read it.
    assert own(page).count("How to read this.") == 10


def test_every_figure_has_a_table_of_its_numbers(page: str) -> None:
    parsed = Page(own(page))
    assert len(parsed.figures) == 24
    for title, links in parsed.figures:
        twins = [parsed.tables[link.removeprefix("#table-")] for link in links]
        assert len(twins) == 1 and len(twins[0]) > 1, title
    assert all(len({len(row) for row in rows}) == 1 for rows in parsed.tables.values())


def test_gates_of_branches_have_a_section_of_their_own(tmp_path: Path) -> None:
    """One line per arm and block, through the mean over runs in each layer."""
    rows = [[{"layer": n, "block": "mlp", "mean_abs": size * (n + 1)} for n in range(3)] for size in (0.1, 0.3)]
    given = [{**synthetic.train_record("V2", "rules", seed), "gates": gates} for seed, gates in enumerate(rows)]
    html = own(write_report(given, tmp_path / "r.html", "r").read_text())
    section = html[html.index('<section id="gates"') : html.index('<section id="verify"')]
    assert section.count('id="plot-') == 1 and "mlp: gate" in section and "mean |gate|" in section
    style = plots.Style(name="V2", colour="#0000ff", symbol="circle")
    figure = plots.sizes_by_layer({"V2": [(0, 0.2), (1, 0.4)]}, {"V2": style}, axis="mean |gate|")
    assert list(figure.data[0].x) == [0, 1] and list(figure.data[0].y) == [0.2, 0.4]
    assert figure.layout.yaxis.range[0] == 0 and figure.layout.yaxis.range[1] > 0.4
    assert '<section id="gates"' not in write_report([given[0] | {"gates": []}], tmp_path / "n.html", "n").read_text()


def test_nothing_is_fetched(page: str) -> None:
    parsed = Page(own(page))
    assert parsed.resources == []
    assert not re.search(r"https?://|@import|url\(", own(page))


def test_markup_in_completions_is_escaped(page: str) -> None:
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<title>A title &amp; more</title>" in page


def test_markup_in_names_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(2)</script>"
    record = {**synthetic.train_record("V4", "rules", 0), "name": evil}
    html = write_report([record], tmp_path / "r.html", evil).read_text()
    assert "<script>alert(2)" not in html


def test_numbers_of_the_headline(page: str, study_record: dict[str, Any]) -> None:
    table = next(t for t in study_record["tasks"] if t["task"] == "classification")
    value = next(a for a in table["arms"] if a["name"] == "V4")["metrics"]["exact"]["mean"]
    assert f">{100 * value:.1f} %</a>" in page
    assert "356,592 (4.2 %)" in page
    assert "no difference" in page and "failed" in page and "model.layers.3.mamba.dt_bias" in page


@pytest.mark.parametrize("status", ["failed", "provisional"])
def test_records_that_are_not_done_enter_no_table(status: str, tmp_path: Path) -> None:
    given = [
        {**r, "status": status} if r["name"] == "V4" else r for r in synthetic.run_records(seeds=(0,), num_examples=40)
    ]
    html = own(write_report(given, tmp_path / "r.html", "r").read_text())
    tables = Page(html).tables
    results = [row for name, rows in tables.items() if name.startswith("results-") for row in rows]
    assert results and not any("V4" in cell for row in results for cell in row)
    assert [row[3:5] for row in tables["failures"] if row[:3] == ["evaluate", "V4", "rules"]] == [["0", status]]
    assert len(tables["failures"]) == 1 + 6


def _only(kind: str, name: str) -> list[dict[str, Any]]:
    return [r for r in synthetic.run_records(seeds=(0,), num_examples=40) if r["kind"] == kind and r["name"] == name]


def _bare() -> list[dict[str, Any]]:
    trained = synthetic.train_record("V2", "rules", 0)
    empty = {"history": [], "eval_history": [], "core": None, "verify": None}
    return [{**trained, **empty}]


@pytest.mark.parametrize(
    "given",
    [[], _only("evaluate", "base"), _only("train", "V4"), _only("evaluate", "V4"), _bare()],
    ids=["nothing", "base-only", "train-only", "evaluate-only", "bare"],
)
def test_missing_parts_leave_a_page_that_says_so(given: list[dict[str, Any]], tmp_path: Path) -> None:
    html = own(write_report(given, tmp_path / "r.html", "r").read_text())
    assert set(SECTIONS) <= set(Page(html).ids)
    assert 'class="empty"' in html


def test_study_cells_are_opened_and_doubles_count_once(tmp_path: Path) -> None:
    single = synthetic.run_records(arms=("base", "V4"), seeds=(0,), num_examples=40)
    cells = []
    for trained, evaluated in zip([r for r in single if r["kind"] == "train"], _done(single, "V4"), strict=True):
        facts = {"name": "V4", "train": trained, "evaluate": evaluated, "status": "done"}
        cells.append({"kind": "study_cell", "config": {}, "environment": synthetic.ENVIRONMENT, **facts})
    one = write_report(single, tmp_path / "a.html", "r").read_bytes()
    both = write_report([*single, *cells], tmp_path / "b.html", "r").read_bytes()
    assert one == both


def _done(given: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [r for r in given if r["kind"] == "evaluate" and r["name"] == name]


def test_failed_cell_is_listed(tmp_path: Path) -> None:
    failed = {"kind": "study_cell", "config": {"task": "rules", "seed": 1}, "environment": synthetic.ENVIRONMENT}
    failed |= {"name": "V9", "status": "failed", "error": "out of <memory>", "created": "2026-11-20"}
    html = write_report([failed], tmp_path / "r.html", "r").read_text()
    assert ["study cell", "V9", "rules", "1", "failed", "out of <memory>"] in Page(own(html)).tables["failures"]
    assert "1 failed" in html and "out of &lt;memory&gt;" in html


def test_colours_belong_to_arms() -> None:
    styles = plots.arm_styles(["base", "V1", "V2"], ["base"])
    assert styles["base"].colour == plots.BASE_COLOUR
    assert plots.arm_styles(["V1", "V2"], [])["V2"].colour == styles["V2"].colour
    assert len({s.symbol for s in styles.values()}) == len({s.glyph for s in styles.values()}) == 3


def test_numbers_are_written_sensibly() -> None:
    assert text.difference_text(-0.0123, percent=True) == "\N{MINUS SIGN}1.2 pp"
    assert text.interval_text(-0.01, 0.02, percent=True, signed=True) == "[\N{MINUS SIGN}1.0, +2.0]"
    assert text.difference_text(-0.0004, percent=True) == "0.0 pp"
    assert text.interval_text(-0.0004, 0.01, percent=True, signed=True) == "[0.0, +1.0]"
    assert [text.number_text(v) for v in (3.14159, 2.4e-6, 12345, 0, None)] == ["3.14", "2.4e-6", "12,345", "0", ""]
    assert [text.p_text(v) for v in (0.0002, 0.0577, None)] == ["< 0.001", "0.058", ""]


def test_markdown_tables_and_their_place(study_record: dict[str, Any], tmp_path: Path) -> None:
    body = study_markdown(study_record)
    assert "| V4 vs V2 |" in body and "no difference" in body and "48 of 48 cells are done" in body
    widths = {line.count("|") for line in body.split("### Comparisons")[1].splitlines() if line.startswith("|")}
    assert len(widths) == 1
    path = tmp_path / "study.md"
    path.write_text("# Kept\n\n<!-- generated:begin results -->\nold\n<!-- generated:end results -->\n\nKept too.\n")
    update_generated(path, "results", body)
    once = path.read_text()
    assert once.startswith("# Kept") and once.endswith("Kept too.\n") and "old" not in once and body.strip() in once
    assert update_generated(path, "results", body).read_text() == once
    with pytest.raises(ConfigError, match="generated:begin other"):
        update_generated(path, "other", body)


def test_a_run_and_its_verify_record_count_once(tmp_path: Path) -> None:
    """The record of `verify` stands beside the run's, which holds the same report; alone it is shown as well."""
    run = synthetic.train_record("V4", "rules", 3)
    facts = {"created": "", "config": {"run": run["run_id"]}, "environment": synthetic.ENVIRONMENT}
    verified = {"kind": "verify", "status": "failed", "run_id": run["run_id"], **facts, **run["verify"]}
    for given in ([run, verified], [{**run, "verify": None}, verified], [verified]):
        tables = Page(own(write_report(given, tmp_path / "r.html", "r").read_text())).tables
        assert [row[3] for row in tables["checks"][1:]] == ["0 of 1"] + 5 * ["1 of 1"]
        assert [row[2:4] for row in tables["verified"][1:]] == [["1", "1 failed"]]
        assert tables["failures"][-1][-1] == "verify: survives_export failed"
