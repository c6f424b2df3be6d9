"""The command line: what `--help` costs, the promised options, JSON on stdout, one-line errors and exit codes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from contracts.tiny import CASES, Case, tiny_config, tiny_inventory, tiny_model

from ssmtune.cli import main as cli
from ssmtune.families.base import family_names, get_family
from ssmtune.methods.base import method_names

GRANITE = Path(__file__).parents[2] / "benchmarks/shapes/granite-4.0-h-micro.json"

OPTIONS = {
    "demo": {"out", "json_output"},
    "inspect": {"model", "quantize", "json_output"},
    "methods": {"json_output"},
    "tasks": {"data", "json_output"},
    "plan": {
        "model",
        "recipe",
        "rank",
        "alpha",
        "scaling",
        "init",
        "budget",
        "without",
        "seed",
        "allow_unmatched",
        "json_output",
    },
    "train": {"run_yaml", "verify", "json_output"},
    "verify": {"run", "json_output"},
    "evaluate": {
        "run",
        "task",
        "size",
        "data",
        "num_examples",
        "batch_examples",
        "base",
        "shots",
        "allow_execution",
        "harness",
        "harness_tasks",
        "engine",
        "type_",
        "gguf",
        "json_output",
    },
    "merge": {"run", "out", "model", "dtype", "restore", "core_float32", "json_output"},
    "export": {"run", "to", "out", "model", "type_", "dtype", "drop_extras", "bake_extras", "json_output"},
    "adapters": {"directories", "json_output"},
    "diff": {"a", "b", "rows", "json_output"},
    "study": {
        "study_yaml",
        "devices",
        "engine",
        "address",
        "estimate",
        "calibrate",
        "dry_run",
        "json_output",
    },
    "report": {"directory", "out", "title", "tables"},
    "doctor": {"leak", "device", "json_output"},
    "bench": {
        "model",
        "recipe",
        "rank",
        "device",
        "tokens_per_step",
        "row_length",
        "steps",
        "repeats",
        "memory",
        "quantize",
        "documents",
        "peer",
        "out",
        "json_output",
    },
}
"""A command line is a promise: an option appears here when it is added, and leaves with a note in changes/."""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `ssmtune ARGUMENTS` in this process and gives exit code, stdout and stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssmtune", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err

    return command


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; sys.argv=['ssmtune','--help']\n"
        "from ssmtune.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'plotly') if m in sys.modules]\n"
        "sys.exit('imported: ' + ' '.join(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "inspect" in result.stdout


def test_commands_and_options_are_the_promised_ones() -> None:
    import typer

    group = typer.main.get_command(cli.app)
    found = {name: {p.name for p in command.params} for name, command in group.commands.items()}  # type: ignore[attr-defined]
    assert found == OPTIONS


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_every_command_explains_itself(command: str, run: Run) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "xample" in out or "run.yaml" in out


@pytest.mark.parametrize(
    ("recipe", "trainable"), [("attention", 851_968), ("all", 28_823_552), ("all+core", 28_830_464)]
)
def test_plan_gives_the_published_counts_of_granite(recipe: str, trainable: int, run: Run) -> None:
    code, out, _ = run("plan", str(GRANITE), "--recipe", recipe, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["trainable"] == trainable
    assert plan["total"] == 3_191_396_096
    assert set(plan) >= {"model", "recipe", "total", "trainable", "groups", "sites"}
    assert set(plan["sites"][0]) >= {"role", "layer", "path", "rows", "shape", "method", "num_params"}


def test_inspect_prints_the_contract(run: Run) -> None:
    code, out, _ = run("inspect", "tiny-granite-h", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["family"] == "granite_hybrid"
    assert result["unclaimed"] == []
    assert result["total"] == 6_268_528
    assert {component["role"] for component in result["components"]} >= {"ssm.in", "ssm.in.dt", "ssm.A_log", "attn.q"}


def test_inspect_counts_bytes_in_four_bits_from_a_config_alone(run: Run) -> None:
    code, out, _ = run("inspect", str(GRANITE), "--quantize", "nf4", "--json")
    found = json.loads(out)["quantize"]
    roles = {row["role"]: row for row in found["roles"]}
    assert code == 0
    assert roles["ssm.in"]["quantized"] and not roles["ssm.out"]["quantized"]
    # Two bytes before; half a byte and a 64th of a scale's byte after, which has 4 / 256 bytes of its own.
    share = roles["ssm.in"]["bytes_after"] / roles["ssm.in"]["bytes_before"]
    assert share == pytest.approx((0.5 + (1 + 4 / 256) / 64) / 2, rel=1e-5)
    assert found["bytes_before"] == sum(row["bytes_before"] for row in found["roles"]) == 2 * 3_191_396_096
    code, out, _ = run("inspect", str(GRANITE), "--quantize", "nf4")
    assert code == 0 and "323.75" in out and "not selected" in out
    code, _, err = run("inspect", "tiny-granite-h", "--quantize", "fp4")
    assert code == 2 and "nearest: 'nf4'" in err


FIRST_CASES = [next(case for case in CASES if case[0] == family) for family in family_names()]


@pytest.mark.parametrize("case", FIRST_CASES, ids="-".join)
def test_inspect_tells_the_use_of_every_tensor_from_a_config_alone(case: Case, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "config.json"
    tiny_config(case).to_json_file(str(path), use_diff=False)
    code, out, _ = run("inspect", str(path), "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["family"], result["total"]) == (case[0], tiny_inventory(case).total)
    for component in result["components"]:
        assert list(component["uses"]) == ["train", "eval", "prefill", "decode"]
        assert set(component["uses"].values()) <= (
            {"CALL", "READ"} if component["group"] != "other" else {"NONE", "CALL"}
        )
    assert not list(tmp_path.glob("*.safetensors"))


def test_methods_says_everything_of_every_method(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("methods", "--json")
    rows = json.loads(out)["methods"]
    assert code == 0 and [row["name"] for row in rows] == list(method_names())
    code, out, _ = run("methods")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for row in rows:
        facts = (row["formula"], f"overhead: {row['overhead']}", row["source"], f"{row['name']} {row['trains']}")
        assert all(" ".join(fact.split()) in words for fact in facts), row["name"]
    assert "all but gemma, lfm2, llama, mistral, qwen3, xlstm" in words


@pytest.mark.parametrize("columns", ["80", "120"])
def test_tables_for_people_fit_the_terminal(columns: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run("inspect", str(GRANITE))
    assert code == 0
    assert max(map(len, out.splitlines())) <= int(columns)
    assert re.search(r"ssm\.A_log +36 of 40 +2,304 +64 +READ", out)
    assert re.search(r"ssm\.out +36 of 40 +301,989,888 +2048x4096 +CALL", out)
    # Coverage: tensors, parameters, their share, and the layers that have them.
    assert re.search(r"attention +16 +41,943,040 +1\.31% +5, 15, 25, 35", out)
    code, out, _ = run("plan", str(GRANITE), "--recipe", "attention")
    assert code == 0
    assert "recipe attention: 851,968 of 3,191,396,096 train (0.027%)" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= int(columns)
    assert "attention 16 of 16" in out and "recurrent 0 of 72" in " ".join(out.split())


LEAKING: tuple[Case, ...] = (("mamba", "tied"), ("jamba", "dense"), ("lfm2", "dense"), ("granite_hybrid", "dense"))


@pytest.mark.parametrize("case", LEAKING, ids="-".join)
def test_doctor_names_a_leak_and_fails(case: Case, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: nothing keeps the documents of a packed row apart. Sound, the model passes and its stock form leaks."""
    # The operations have tests of their own.
    monkeypatch.setattr("ssmtune.doctor.all_cases", list)
    monkeypatch.setenv("COLUMNS", "80")
    tiny_model(case).save_pretrained(tmp_path)
    code, out, _ = run("doctor", "--leak", str(tmp_path))
    assert code == 0, out
    assert "The model as transformers runs it leaks" in " ".join(out.split())

    leaking = dataclasses.replace(get_family(case[0]), prepare_packed=None)
    monkeypatch.setattr("ssmtune.doctor.find_family", lambda model_type: (case[0], leaking))
    code, out, _ = run("doctor", "--leak", str(tmp_path))
    assert code == 1
    assert "FAILED" in out
    assert re.search(
        r"packing: path \w+, document \d of 3, token \d+; with ssmtune's operations", " ".join(out.split())
    )
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run("doctor", "--leak", str(tmp_path), "--json")
    check = json.loads(out)["checks"][-1]
    assert code == 1
    assert (check["name"], check["ok"]) == ("packing", False)
    assert check["measured"] > 100 * check["limit"] and "document" in check["where"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "tiny-granite-h", "--recipe", "all+cor"], ["all+cor", "nearest", "'all+core'"]),
        (["plan", "tiny-granite-h", "--recipe", "transformer-names"], ["gate_proj", "recurrent", "--allow-unmatched"]),
        (["plan", "tiny-granite-h", "--budget", "100"], ["budget 100", "smallest plan", "at least"]),
        (["plan", "tiny-granite-h", "--recipe", "core", "--budget", "9999"], ["budget 9,999", "core", "fixed size"]),
        (["plan", "tiny-granite-h", "--without", "attn.qq"], ["attn.qq", "'attn.q'"]),
        (["plan", "no-such-model"], ["no-such-model", "no such file"]),
        (["evaluate", "tiny-granite-h", "--task", "clasification"], ["clasification", "classification"]),
        (["verify", "nowhere"], ["nowhere"]),
        (["merge", "nowhere", "--out", "merged"], ["nowhere"]),
        (["export", "nowhere", "--to", "gguf", "--out", "x.gguf"], ["nowhere"]),
        (["export", "nowhere", "--to", "gguff", "--out", "x"], ["gguff", "'gguf'"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["report", "nowhere"], ["nowhere"]),
        (["adapters", "nowhere"], ["nowhere", "no adapter directory"]),
        (["diff", "nowhere", "elsewhere"], ["nowhere"]),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_2(arguments: list[str], words: list[str], run: Run) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_unknown_keys_of_a_run_name_the_nearest(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny-granite-h\noutput_dir: x\ndata: {task: rules}\nnum_epoch: 1\n", encoding="utf-8")
    code, _, err = run("train", str(path))
    assert code == 2
    assert "num_epoch" in err
    assert "'num_epochs'" in err


def test_a_truncated_config_is_named(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "config.json"
    path.write_text(GRANITE.read_text(encoding="utf-8")[:200], encoding="utf-8")
    code, _, err = run("plan", str(path))
    assert code == 2
    assert "config.json" in err


def test_a_run_is_not_tested_on_a_split_that_holds_its_training_examples(tmp_path: Path, run: Run) -> None:
    record = {
        "kind": "train",
        "config": {"model": "tiny-granite-h", "data": {"task": "rules", "size": 0.02}},
        "name": "x",
    }
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    code, _, err = run("evaluate", str(tmp_path), "--size", "0.5")
    assert code == 2
    assert "training examples" in err


def test_the_committed_study_has_a_report(tmp_path: Path, run: Run) -> None:
    study = Path(__file__).parent.parent.parent / "records" / "studies" / "granite"
    page = tmp_path / "report.html"
    code, _, err = run("report", str(study), "--out", str(page))
    assert code == 0, err
    assert "V4.joint.clip" in page.read_text(encoding="utf-8")
