"""The report of a study that uses everything, of benchmarks, and of input that is none; and the page in a browser."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import browser
import synthetic_study as synthetic
from parsed_page import Page, own
from synthetic_records import evaluate_record, train_record

from ssmtune.cli import main as cli
from ssmtune.errors import RecordError
from ssmtune.records import find_records, write_json
from ssmtune.report import tables, write_report
from ssmtune.report.arms import collect
from ssmtune.report.comparisons import null_band
from ssmtune.report.page import make_sections
from ssmtune.report.paragraph import MAX_LISTED, methods
from ssmtune.report.sources import FIELDS

BENCH = Path(__file__).parent.parent.parent / "records" / "bench"
NUM = 60
"""Examples per evaluation: enough for intervals, and quick."""


@pytest.fixture(scope="module")
def full() -> list[dict[str, Any]]:
    return synthetic.full_study(num_examples=NUM)


@pytest.fixture(scope="module")
def written(full: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page beside its records, with its tables."""
    directory = tmp_path_factory.mktemp("study")
    paths = [write_json(directory / "records" / f"{i:03d}.json", record) for i, record in enumerate(full)]
    write_report(full, directory / "report.html", "Everything", paths=paths, tables=directory / "tables")
    return directory


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(own((written / "report.html").read_text()))


def column(rows: list[list[str]], name: str) -> list[str]:
    return [row[rows[0].index(name)] for row in rows[1:]]


def test_every_link_leads_somewhere(page: Page, written: Path) -> None:
    """On the page, to a file beside it, or to data that the page holds itself."""
    assert len(page.ids) == len(set(page.ids))
    files = 0
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        elif not link.startswith("data:"):
            files += 1
            assert (written / urllib.parse.unquote(link)).is_file(), link
    assert files > 200
    assert page.resources == []


def test_every_figure_has_its_table_and_every_row_its_record(page: Page) -> None:
    assert len(page.figures) > 50
    for title, links in page.figures:
        assert len(links) == 1 and len(page.tables[links[0].removeprefix("#table-")]) > 1, title
    assert page.unlinked == []


def test_panels_are_in_the_order_of_the_study(page: Page) -> None:
    results = [name for name in page.tables if name.startswith("results-")]
    assert results == [f"results-{model}-{task}" for model in synthetic.MODELS for task in synthetic.TRAINED]


def test_transfer_and_forgetting_hold_both_bases(page: Page, full: list[dict[str, Any]]) -> None:
    rows = page.tables["forgetting"]
    assert set(column(rows, "against")) == {"base", "shown"}
    # 4 trained arms on 3 panels of 2 models (mapping is trained on too), each against both bases.
    assert len(rows) - 1 == 4 * 3 * 2 * 2
    study = full[-1]
    wanted = next(
        c for c in study["comparisons"] if c["baseline"] == "shown" and c["task"] == "granite: classification -> rules"
    )
    row = next(r for r in rows if r[:2] == [wanted["task"], "all.core"] and r[3] == "shown")
    assert row[rows[0].index("change")].replace("\N{MINUS SIGN}", "-") == f"{100 * wanted['difference']:+.1f} pp"
    assert row[rows[0].index("verdict")] == wanted["verdict"]
    transferred = page.tables["transfer"]
    assert {(r[2], r[3]) for r in transferred[1:]} == {
        (a, b) for a in synthetic.TRAINED for b in (a, *synthetic.TRANSFER)
    }


def test_scores_on_other_tasks_never_mix(full: list[dict[str, Any]], page: Page) -> None:
    """The score of a panel is the mean over that panel's own evaluations, of that model."""
    found = [
        one["metrics"]["all_fields"]
        for cell in full
        if cell["kind"] == "study_cell"
        and cell["status"] == "done"
        and (cell["config"]["cell"], cell["config"]["model_name"], cell["task"]) == ("all.core", "granite", "mapping")
        for one in cell["transfer"]
        if one["task"] == "rules"
    ]
    row = next(r for r in page.tables["forgetting"] if r[:2] == ["granite: mapping -> rules", "all.core"])
    assert len(found) == 3 and row[2] == f"{100 * np.mean(found):.1f} %"


def test_families_have_tables_of_their_own_and_chance_a_band(page: Page, full: list[dict[str, Any]]) -> None:
    assert {f"comparisons-{family}" for family in synthetic.FAMILIES} <= set(page.tables)
    rows = page.tables["comparisons-placement"]
    for c in full[-1]["comparisons"]:
        if c["family"] == "placement":
            row = next(r for r in rows if r[:2] == [c["task"], f"{c['arm']} vs {c['baseline']}"])
            assert (row[rows[0].index("at random")] != "") == (c["baseline"] == "random")
            assert row[rows[0].index("verdict")] == c["verdict"]
    equivalent = page.tables["comparisons-core"]
    assert set(column(equivalent, "margin")) == {"5.0 pp"}
    assert "at random" not in equivalent[0]


def test_the_band_of_chance_is_a_prediction_of_one_more_draw() -> None:
    """Counted: of many sets of draws, the band around their mean holds the next one in 95 of 100 cases."""
    generator = np.random.default_rng(0)
    draws = generator.normal(0.3, 0.05, size=(4000, 5))
    held = 0
    for *known, new in draws:
        band = null_band({"is_null": True, "num_draws": 4, "sd_draw": float(np.std(known, ddof=1))})
        assert band is not None
        held += band[0] <= new - np.mean(known) <= band[1]
    # Three standard errors of a share of 0.95 counted 4000 times.
    assert abs(held / 4000 - 0.95) < 0.0104
    assert null_band({"is_null": False, "num_draws": 4, "sd_draw": 1.0}) is None
    assert null_band({"is_null": True, "num_draws": 1, "sd_draw": 0.0}) is None
    assert null_band({}) is None


def test_failures_are_listed_and_counted(page: Page, written: Path) -> None:
    rows = page.tables["failures"]
    status = column(rows, "status")
    # The cell whose verify failed is provisional, and so is the study.
    assert {word: status.count(word) for word in set(status)} == {"failed": 2, "not run": 1, "provisional": 2}
    assert "OutOfMemoryError: tried to allocate 2 GiB" in column(rows, "why")
    html = (written / "report.html").read_text()
    assert re.search(r"Left out of every table of results: .*2 failed", html)
    verified = page.tables["verified"]
    words = {tuple(row[:2]): row[3] for row in verified[1:]}
    assert words["all.core", "granite: classification"] == "2 passed, 1 failed"
    assert words["without", "granite: mapping"] == "evaluates the runs of all.core"
    assert page.tables["checks"][1][:3] == ["failed", "all.core", "survives_export"]


def test_what_is_not_done_enters_no_result(page: Page) -> None:
    over = {tuple(row[:1]): row[3] for row in page.tables["results-falcon-mapping"][1:]}
    assert over["all.core",] == "2 seeds" and over["attention",] == "2 seeds" and over["random",] == "3 seeds, 12 runs"
    # The unsound run's evaluation belongs to a provisional cell.
    over = {tuple(row[:1]): row[3] for row in page.tables["results-granite-classification"][1:]}
    assert over["all.core",] == "2 seeds"


def test_the_methods_paragraph_says_what_the_records_hold(written: Path, full: list[dict[str, Any]]) -> None:
    html = own((written / "report.html").read_text())
    paragraph = unescape(
        re.sub("<[^>]*>", "", html[html.index('id="title-methods"') : html.index('id="title-comparisons"')])
    )
    registration, study = full[0], full[-1]
    for words in (
        "tiny-granite-h and zoo/tiny-falcon-h1 were fine-tuned on classification (outcome exact, size 0.1)",
        "the seeds 0, 1 and 2",
        "random (recipe random, 4 placements drawn at random)",
        "without (the runs of all.core without their core)",
        "shown (not trained, 4 solved examples before each question)",
        "Rates were chosen by validation loss with the seed 100",
        "granite: attention on mapping: 0.003",
        f"{NUM} examples of rules",
        study["method"],
        "within each of 3 declared families of comparisons: placement (16), core (4) and kept (12)",
        f"pre-registration {registration['digest']}, written 2026-11-20T08:00:00+00:00, before the first cell ended",
        "it stated 0.06 as the smallest effect resolved",
    ):
        assert words in paragraph, words
    effects = [m["effect"] for m in study["minimum_detectable_effect"] if m["task"] == "granite: mapping -> rules"]
    assert f"granite: mapping -> rules {100 * min(effects):.1f} pp to {100 * max(effects):.1f} pp" in paragraph


def test_a_task_that_calls_itself_otherwise_stays_where_it_was_trained(full: list[dict[str, Any]]) -> None:
    """A task of somebody's own is asked for by module and name; its evaluations hold the name that it gives itself."""
    renamed = copy.deepcopy(full)
    for record in renamed:
        for evaluation in [record[k] for k in ("evaluate",) if record.get(k)] + list(record.get("transfer") or ()):
            if isinstance(evaluation, dict) and evaluation.get("config", {}).get("task") == "mapping":
                evaluation["task"] = "map"
    assert renamed != full
    before, after = (collect(records) for records in (full, renamed))
    assert list(after.panels) == list(before.panels)
    assert all(arm.evaluations.keys() == after.arms[name].evaluations.keys() for name, arm in before.arms.items())


def test_many_choices_and_panels_are_told_by_their_range(full: list[dict[str, Any]]) -> None:
    study = copy.deepcopy(full[-1])
    study["tuned"] = [
        {"name": f"arm{i}", "task": "mapping", "rates": {"learning_rate": 0.01 if i % 3 else 0.003}, "seed": 0}
        for i in range(MAX_LISTED + 2)
    ]
    effect = study["minimum_detectable_effect"][0]
    study["minimum_detectable_effect"] = [
        {**effect, "task": f"granite: {task}", "effect": size}
        for i in range(MAX_LISTED)
        for task, size in ((f"t{i}", 0.1 + 0.01 * i), (f"t{i} -> u", 0.3))
    ]
    paragraph = str(methods(collect([*full[:-1], study])).words[0])
    assert "chosen: 0.003 (5 times) and 0.01 (9 times), as the table below says" in paragraph
    assert re.search("on the task trained on, (shares 10.0 pp|scores 0.1) to", paragraph)
    assert re.search("on other tasks, (shares 30.0 pp|scores 0.3)[^ ]* ?", paragraph)


def test_rates_that_were_tried_are_listed(page: Page) -> None:
    rows = page.tables["tuning"]
    assert [row[2:] for row in rows[1:]] == [
        ["learning rate 0.001", "0.7", ""],
        ["learning rate 0.003", "0.5", "chosen"],
        ["learning rate 0.1", "diverged", ""],
    ]


def test_a_registration_that_came_late_or_is_another_study_s_is_called_so(
    full: list[dict[str, Any]], tmp_path: Path
) -> None:
    registration, cell, study = full[0], full[1], {**full[-1], "comparisons": full[-1]["comparisons"][:1]}
    late = {**registration, "created": "2027-01-01T00:00:00+00:00"}
    assert "AFTER the first cell ended" in write_report([late, cell, study], tmp_path / "a.html", "a").read_text()
    other = {**registration, "digest": "0123456789abcdef"}
    html = write_report([other, cell, study], tmp_path / "b.html", "b").read_text()
    assert "No pre-registration of this study is among these records." in html


def test_examples_are_counted_in_pairs(page: Page, full: list[dict[str, Any]]) -> None:
    """Against a base: every run with the one base; against draws: every run with every draw of its seed."""
    cells = [c for c in full if c["kind"] == "study_cell" and c["status"] == "done"]
    own_runs, base = (
        [
            c["evaluate"]["scores"]["exact"]
            for c in cells
            if (c["config"]["cell"], c["config"]["model_name"], c["task"]) == (name, "granite", "classification")
        ]
        for name in ("attention", "base")
    )
    won = sum(a > b for run in own_runs for a, b in zip(run, base[0], strict=True))
    rows = page.tables["examples"]
    row = next(r for r in rows if r[:3] == ["granite: classification", "attention", "base"])
    assert row[3] == str(won) and row[6] == str(3 * NUM)
    row = next(r for r in rows if r[:3] == ["granite: classification", "attention", "random"])
    assert row[6] == str(3 * 4 * NUM) and sum(map(int, row[3:6])) == 3 * 4 * NUM


def test_tables_are_saved_as_csv_and_latex(page: Page, written: Path, full: list[dict[str, Any]]) -> None:
    """The page's own links hold the files' bytes, and the values are not rounded."""
    held = [urllib.parse.unquote(link.partition(",")[2]) for link in page.links if link.startswith("data:")]
    files = sorted((written / "tables").iterdir())
    assert len(held) == len(files) == 2 * len(page.tables)
    assert sorted(held) == sorted(path.read_text() for path in files)
    rows = list(csv.DictReader(io.StringIO((written / "tables" / "comparisons-core.csv").read_text())))
    wanted = [c for c in full[-1]["comparisons"] if c["family"] == "core"]
    assert [float(row["difference"]) for row in rows] == [c["difference"] for c in wanted]
    assert [float(row["95 % interval low"]) for row in rows] == [c["low"] for c in wanted]
    latex = (written / "tables" / "comparisons-core.tex").read_text()
    assert latex.count(r" \\") == 1 + len(wanted) and r"\toprule" in latex


def test_a_table_runs_nothing_where_it_is_opened() -> None:
    """Neither in a spreadsheet nor in LaTeX."""
    cells = tables.plain('=HYPERLINK("x")', "50% of a_b & {c}", "\\input{x}", -1.5)
    table = tables.Table("t", "100% ~ x^2", [tables.Column(n) for n in "abcd"], [cells])
    (row,) = csv.DictReader(io.StringIO(table.to_csv()))
    assert row["a"] == '\'=HYPERLINK("x")' and row["d"] == "-1.5"
    latex = table.to_latex()
    assert r"50\% of a\_b \& \{c\}" in latex and r"\textbackslash{}input\{x\}" in latex
    assert r"100\% \textasciitilde{} x\textasciicircum{}2" in latex


def one_repeat() -> dict[str, Any]:
    """A benchmark of one process a side: the first of a record's."""
    record: dict[str, Any] = json.loads((BENCH / "tiny-granite-h-cpu.json").read_text())
    record["config"]["repeats"] = 1
    record["runs"] = {side: runs[:1] for side, runs in record["runs"].items()}
    record["ratio"]["range"] = [record["ratio"]["median"]] * 2
    for side in record["sides"].values():
        side["tokens_per_s_range"] = [side["tokens_per_s"]] * 2
    return record


@pytest.mark.parametrize("fits", [True, False])
def test_a_benchmark_has_its_page(fits: bool, tmp_path: Path) -> None:
    record, name = one_repeat(), "tiny-granite-h-cpu.json"
    if not fits:
        record["sides"]["transformers+peft"] = {
            "error": "process ended with 1: torch.OutOfMemoryError: CUDA out of memory"
        }
        record["runs"]["transformers+peft"] = [record["sides"]["transformers+peft"]]
        record["ratio"] = None
    html = own(write_report([record], tmp_path / "r.html", "r", paths=[BENCH / name]).read_text())
    found = Page(html)
    rows = found.tables["speed"]
    ours = record["sides"]["ssmtune"]
    assert rows[1][:3] == [name.removesuffix(".json"), "ssmtune", f"{ours['tokens_per_s']:,.0f}"]
    assert rows[1][3] == "" and len(record["runs"]["ssmtune"]) == 1
    assert rows[1][-2:] == [f"{ours['peak_memory_bytes'] / 2**30:.1f} GiB", f"{100 * record['floor']['share']:.0f} %"]
    parts = {(row[1], row[2]): row[3] for row in found.tables["speed-components"][1:]}
    for side, facts in record["sides"].items():
        for part, seconds in facts.get("components", {}).items():
            assert parts[part, side] == f"{1000 * seconds:,.1f}"
    assert parts["whole step", "matrix products alone"] == f"{1000 * record['floor']['step_s']:,.1f}"
    assert len(found.figures) == 3 and "headline" not in found.ids
    if "error" in record["sides"]["transformers+peft"]:
        assert "did not finish" in rows[2]
    else:
        # One repeat has no spread, so nothing is called faster.
        assert "one repeat, so no spread is known" in html and ": faster" not in html


@pytest.mark.parametrize(
    ("spread", "word"), [((0.9, 1.2), "no difference"), ((1.1, 1.3), "faster"), ((0.7, 0.9), "slower")]
)
def test_a_ratio_is_called_what_all_repeats_say(spread: tuple[float, float], word: str, tmp_path: Path) -> None:
    record = one_repeat()
    record["ratio"] = {"median": sum(spread) / 2, "range": list(spread)}
    record["sides"]["transformers+peft"]["operations"] = "mamba_ssm 9.9"
    html = write_report([record], tmp_path / "r.html", "r").read_text()
    assert f"over repeats: {word})" in html
    assert "transformers+peft ran on mamba_ssm 9.9" in html


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `ssmtune report ARGUMENTS` and gives the exit code and stderr."""

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ssmtune", "report", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), capsys.readouterr().err.replace("\n", " ")

    return command


def _bad(directory: Path, name: str) -> Path:
    """A place that holds no record to report, or a broken one beside a whole one."""
    record = evaluate_record("V2", "rules", 0, num_examples=20)
    whole = json.dumps(record, indent=1)
    directory.mkdir()
    made = {
        "empty": lambda: None,
        "foreign": lambda: (directory / "package.json").write_text('{"name": "left-pad"}'),
        "kind": lambda: (directory / "pod.json").write_text('{"kind": "Pod", "status": {}}'),
        "truncated": lambda: (directory / "cell.json").write_text(whole[: len(whole) // 2]),
        "packed": lambda: (directory / "cell.json.gz").write_bytes(gzip.compress(whole.encode())[:-40]),
        "field": lambda: write_json(directory / "cell.json", {**record, "scores": None}),
        "single": lambda: (directory / "cell.json").write_text("[1, 2]"),
    }
    made[name]()
    if name in ("truncated", "packed", "field"):
        write_json(directory / "whole.json", record)
    return directory / "cell.json" if name == "single" else directory


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", ["holds no record", "Train, evaluate or run a study"]),
        ("foreign", ["holds no record (1 other JSON files", "package.json", "no 'kind' field"]),
        ("kind", ["pod.json", "'Pod'"]),
        ("truncated", ["cell.json", "not a readable record", "truncated"]),
        ("packed", ["cell.json.gz", "not a readable record", "truncated"]),
        ("field", ["cell.json", "'scores'", "expected dict"]),
        ("single", ["cell.json", "not a record of ssmtune"]),
    ],
)
def test_bad_input_is_one_message_and_no_page(name: str, words: list[str], tmp_path: Path, run: Run) -> None:
    place = _bad(tmp_path / "given", name)
    code, err = run(str(place), "--out", str(tmp_path / "page.html"), "--tables", str(tmp_path / "tables"))
    assert code == 2 and "Traceback" not in err
    assert all(word in re.sub(r"\s+", " ", err) for word in words), err
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "tables").exists()


def test_other_json_beside_records_is_passed_over(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", train_record("V2", "rules", 0))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "rank": NaN}')
    (tmp_path / "broken.json").write_text('{"peft_type": ')
    assert list(find_records(tmp_path)) == [tmp_path / "run.json"]


def test_a_page_and_its_tables_from_the_command_line(tmp_path: Path, run: Run) -> None:
    write_json(tmp_path / "records" / "a.json", evaluate_record("V2", "rules", 0, num_examples=20))
    code, err = run(str(tmp_path / "records" / "a.json"), "--tables", str(tmp_path / "tables"))
    assert code == 0 and "1 records" in err
    assert {path.name for path in (tmp_path / "records").iterdir()} == {"a.json", "a.html"}
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        f"{name}.{suffix}" for name in ("results-rules", "accuracy") for suffix in ("csv", "tex")
    }


@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_a_record_without_a_field_is_named_or_shown(kind: str, full: list[dict[str, Any]]) -> None:
    """Whatever field of a record is missing, the answer is a page or a message that names the field."""
    given = {r["kind"]: r for r in [*full, full[4]["evaluate"]]}
    given["study"] = {**given["study"], "comparisons": given["study"]["comparisons"][:1]}
    given["verify"] = {**given["evaluate"], "kind": "verify", "ok": True, "checks": [], "config": {"run": "x"}}
    refused = []
    for field in sorted(set(given[kind]) - {"kind"}):
        record = {name: value for name, value in given[kind].items() if name != field}
        try:
            make_sections(collect([record], ["x.json"]))
        except RecordError as error:
            assert f"field '{field}'" in str(error) and "x.json" in str(error)
            refused.append(field)
    assert set(refused) >= set(FIELDS[kind])


needs_browser = pytest.mark.skipif(
    browser.find_browser() is None, reason="needs Chromium, which draws the page; its structure is tested without"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    program = browser.find_browser()
    assert program is not None
    with browser.running(program) as started:
        yield started


@pytest.fixture(scope="module")
def laptop(written: Path, chromium: browser.Browser) -> browser.Browser:
    """The page at the width of a laptop; drawing it anew for each test would take longer than all of them."""
    chromium.open(written / "report.html", width=1280)
    return chromium


NARROW_TEXT = """
[...document.querySelectorAll('.js-plotly-plot')].filter(plot => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].some(text => {
    const own = text.getBoundingClientRect();
    return own.width > 0 && (own.left < box.left - 1 || own.right > box.right + 1);
  });
}).map(plot => plot.closest('figure').getAttribute('aria-label'))
"""
"""Figures with text beyond their edges."""

FAINT = """
(() => {
  const light = c => c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const page = light(parse(getComputedStyle(document.body).backgroundColor).slice(0, 3));
  const faint = new Set();
  for (const text of document.querySelectorAll('.js-plotly-plot text, p, td, th, a, h1, h2, h3, figcaption')) {
    if (!text.textContent.trim() || text.closest('.heatmaplayer, .hm-label, .badge, details')) continue;
    const style = getComputedStyle(text);
    if (text.closest('svg') && /heatmap/.test(text.parentElement.getAttribute('class') || '')) continue;
    const own = light(parse(text.closest('svg') ? style.fill : style.color).slice(0, 3));
    const ratio = (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05);
    if (ratio < 3) faint.add(text.textContent.trim().slice(0, 40));
  }
  return [...faint];
})()
"""
"""Text whose contrast with the page is below 3 to 1."""


@needs_browser
def test_the_page_is_used_with_the_keyboard(laptop: browser.Browser) -> None:
    """The skip link comes first and works, then the table of contents; what has the focus is seen to have it."""
    focused = "document.activeElement.textContent.trim().slice(0, 30)"
    laptop.press("Tab")
    assert laptop.ask(focused) == "Skip to the results"
    assert laptop.ask("document.activeElement.getBoundingClientRect().left") >= 0
    laptop.press("Tab")
    assert laptop.ask(focused) == "Results"
    assert laptop.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    laptop.press("Tab")
    laptop.press("Enter")
    assert laptop.ask("location.hash") == "#methods"


@needs_browser
def test_a_number_opens_the_list_that_holds_its_records(laptop: browser.Browser) -> None:
    laptop.ask("document.querySelector('#table-results-granite-mapping tbody tr:nth-child(3) a').click()")
    # The event that opens the list comes after the click.
    laptop.ask("new Promise(done => setTimeout(done, 50))")
    assert laptop.ask("document.querySelector(':target').getBoundingClientRect().height") > 0
    assert laptop.ask("document.querySelector(':target').textContent").startswith("evaluate granite attention mapping")


@needs_browser
def test_examples_are_filtered(laptop: browser.Browser) -> None:
    """By task at first; by two arms and who won, of which only their answers are left."""
    visible = "[...document.querySelectorAll('details.sample')].filter(s => !s.hidden)"
    assert laptop.ask(f"{visible}.every(s => s.dataset.task === 'granite: classification')")
    laptop.ask(
        "(() => { const f = document.querySelector('form.filter'); f.arm.value = 'attention'; f.other.value = 'base';"
        "f.outcome.value = 'won'; f.dispatchEvent(new Event('input')); })()"
    )
    answers = "[...s.querySelectorAll('.answer:not([hidden])')].map(a => [a.dataset.arm, a.dataset.score])"
    scores = laptop.ask(f"{visible}.map(s => {answers})")
    assert scores and all(dict(pair) == {"base": "0.0", "attention": "1.0"} for pair in scores)


@needs_browser
def test_the_page_fits_and_can_be_read(written: Path, laptop: browser.Browser) -> None:
    """On a laptop and a phone, light and dark: nothing too wide, cut off or faint, no error, nothing fetched."""
    assert laptop.ask("document.documentElement.scrollWidth") == 1280
    # Each figure is drawn in three layers.
    assert laptop.ask("document.querySelectorAll('.js-plotly-plot svg.main-svg').length") > 100
    assert laptop.ask(NARROW_TEXT) == []
    for scheme in ("light", "dark"):
        laptop.media(scheme)
        assert laptop.ask(FAINT) == [], scheme
    laptop.open(written / "report.html", width=420)
    assert laptop.ask("document.documentElement.scrollWidth") == 420
    assert laptop.ask(NARROW_TEXT) == []
    assert laptop.messages == []
    fetched = {url for url in laptop.requests if not url.startswith("data:")}
    assert fetched == {(written / "report.html").resolve().as_uri()}
