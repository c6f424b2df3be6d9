"""Merging tensor by tensor: the files of the merged model are those that merging in memory gives, and nothing is half-written."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import Case, logits_of, randomise, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file

from ssmtune.adapter_files import read
from ssmtune.attach import attach, load
from ssmtune.base_stream import StreamedBase
from ssmtune.checkpoint import INDEX, WEIGHTS, Entry
from ssmtune.cli.merge import merge as merge_command
from ssmtune.errors import AdapterMismatch, AttachError, CheckFailed, ConfigError
from ssmtune.merge import effective_tensors, merge_to
from ssmtune.merged_files import PROVENANCE
from ssmtune.models import load_model
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.selection import sparse_edits
from ssmtune.weight_units import CannotStream, Units

DENSE, MOE = ("granite_hybrid", "dense"), ("granite_hybrid", "moe")
# By name, since `ssmtune.merge` is the function as well as its module.
STAGE = import_module("ssmtune.merge")

ROW_MERGE = import_module("ssmtune.row_merge")


def in_memory(*_: Any, **__: Any) -> None:
    raise CannotStream("the test says so")


ROWS = Recipe(
    name="rows",
    edits=(
        Edit(method="lora", select=("ssm.in.x",), options={"rank": 3, "alpha": 6.0}),
        Edit(method="lora", select=("ssm.in.dt", "ssm.in.B"), options={"rank": 2, "alpha": 3.0}),
        Edit(method="partial", select=("norm", "conv")),
        Edit(method="core", select=("core",)),
    ),
)
TIED = Recipe(name="tied", edits=(Edit(method="lora", select=("embedding",), options={"rank": 2}),))


INFINITE = [0.0, float("inf")]
"""What configs of Mamba-2 hold, although it is no JSON."""


def make(root: Path, case: Case, recipe: str | Recipe, *, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A base directory and an adapter that was trained on it."""
    base, adapter = root / "base", root / "adapter"
    tiny_model(case, dtype=dtype).save_pretrained(base)
    model = load_model(str(base))
    adapted = attach(model, make_plan(model, recipe))
    randomise(adapted)
    adapted.save_pretrained(adapter, run_id="run", step=4)
    return base, adapter


def files(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.fixture(autouse=True)
def no_small_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the merge proves about small models is tested on its own below; here the tests compare."""
    monkeypatch.setattr(STAGE, "SMALL_BYTES", 0)


@pytest.mark.parametrize(
    ("case", "recipe", "dtype"),
    [
        (DENSE, "all+core", torch.bfloat16),
        (DENSE, ROWS, torch.float16),
        (MOE, "all+core", torch.bfloat16),
        (("qwen3_next", "moe"), "all", torch.float32),
        (("jamba", "moe"), "all+core", torch.bfloat16),
        (("mamba", "tied"), TIED, torch.bfloat16),
        (("zamba2", "shared"), "all", torch.float32),
        (DENSE, "control:core-discarded", torch.float32),
        (("mamba", "tied"), "control:sdt-random", torch.bfloat16),
        (("mamba", "tied"), "control:sdt-magnitude", torch.float32),
        (DENSE, "control:sdt-magnitude", torch.bfloat16),
        (DENSE, "dora", torch.bfloat16),
        (DENSE, "prodial", torch.bfloat16),
        (DENSE, "full", torch.bfloat16),
        (DENSE, "core-v2", torch.bfloat16),
    ],
    ids=[
        "bf16",
        "rows-fp16",
        "moe-bf16",
        "experts",
        "jamba-bf16",
        "tied",
        "shared",
        "discarded",
        "sdt-random",
        "sdt-magnitude",
        "sdt-rows",
        "dora",
        "prodial",
        "full",
        "core-v2",
    ],
)
def test_the_files_are_those_of_a_merge_in_memory(
    case: Case, recipe: str | Recipe, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Names, shapes, dtypes and every bit; the tensors that nothing edits among them."""
    base, adapter = make(tmp_path, case, recipe, dtype=dtype)
    streamed = merge_to(str(adapter), tmp_path / "streamed", model=str(base))
    assert streamed["in_memory"] == "" and streamed["left_out"] == []
    merged = STAGE.merge(load(load_model(str(base)), adapter))
    merged.save_pretrained(tmp_path / "expected")
    expected, found = files(tmp_path / "expected"), files(tmp_path / "streamed")
    assert list(expected) and set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == (dtype if tensor.is_floating_point() else tensor.dtype), name
        assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(found[name], tensor) for name, tensor in files(base).items())


@pytest.mark.parametrize(
    ("recipe", "roles"),
    [("control:sdt-random", ("ssm.A_log", "ssm.in.dt")), ("dora", ("ssm.out",)), (ROWS, ("ssm.in.dt",))],
)
def test_what_is_restored_is_the_bases_in_both(recipe: str | Recipe, roles: tuple[str, ...], tmp_path: Path) -> None:
    """Whole tensors, and rows of one whose other rows stay merged."""
    base, adapter = make(tmp_path, DENSE, recipe, dtype=torch.bfloat16)
    assert merge_to(str(adapter), tmp_path / "out", model=str(base), restore=roles)["in_memory"] == ""
    expected = STAGE.merge(load(load_model(str(base)), adapter), restore=roles).state_dict()
    found = load_model(str(tmp_path / "out")).state_dict()
    whole = STAGE.merge(load(load_model(str(base)), adapter)).state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("recipe", ["control:sdt-random", "control:sdt-magnitude"])
def test_entries_chosen_in_training_arrive_where_there_are_no_weights(recipe: str, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, DENSE, recipe)
    trained = sparse_edits(load(load_model(str(base)), adapter).edits)
    found = sparse_edits(StreamedBase(str(base), read(adapter)).adapted().edits)
    assert found and set(found) == set(trained)
    for key, edit in found.items():
        assert edit.stage == "chosen" and not any(t.is_meta for t in (edit.delta, edit.index, edit.positions)), key
        assert torch.equal(edit.index, trained[key].index) and torch.equal(edit.positions, trained[key].positions), key
    stored = files(adapter)
    assert any(name.endswith(".index") for name in stored)
    # They follow from the entries and the rows; a file that held them could send the deltas elsewhere.
    assert not any(name.endswith(".positions") for name in stored)


def test_experts_lie_one_by_one_in_the_files(tmp_path: Path) -> None:
    """Otherwise the cases above would not show that transformers' conversion is followed."""
    base, adapter = make(tmp_path, ("qwen3_next", "moe"), "all")
    merge_to(str(adapter), tmp_path / "out", model=str(base))
    assert any(".experts.0." in name for name in files(tmp_path / "out"))
    assert not any(".experts.0." in name for name, _ in load_model(str(base)).named_parameters())


def test_shards_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make(tmp_path, DENSE, "all+core")
    whole = merge_to(str(adapter), tmp_path / "whole", model=str(base))
    load_model(str(base)).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    (base / WEIGHTS).unlink()
    for path in (tmp_path / "sharded").glob("model*"):
        shutil.copy(path, base)
    monkeypatch.setattr(import_module("ssmtune.base_stream"), "SHARD_BYTES", 30_000)
    merge_to(str(adapter), tmp_path / "out", model=str(base))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == len(set(index["weight_map"].values())) > 2
    expected, found = files(tmp_path / "whole"), files(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()) and set(found) == set(expected)
    model = load_model(str(tmp_path / "out"))
    assert whole["merged_digest"] == json.loads((tmp_path / "out" / PROVENANCE).read_text())["merged_digest"]
    assert torch.equal(
        logits_of(model.eval(), tiny_tokens(DENSE, 1, 9)),
        logits_of(load_model(str(tmp_path / "whole")).eval(), tiny_tokens(DENSE, 1, 9)),
    )


def test_no_more_than_one_unit_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The in-memory loader is gone, and what was read of one unit is freed before the next but one is read."""
    base, adapter = make(tmp_path, MOE, "all+core")
    monkeypatch.setattr(STAGE, "load_model", lambda *_, **__: pytest.fail("the whole model was loaded"))
    read, seen = Units.read, []

    def watched(self: Units, *arguments: Any) -> dict[str, torch.Tensor]:
        assert not any(ref() is not None for refs in seen[:-1] for ref in refs), "an earlier unit is still held"
        tensors = read(self, *arguments)
        seen.append([weakref.ref(tensor) for tensor in tensors.values()])
        return tensors

    monkeypatch.setattr(Units, "read", watched)
    assert merge_to(str(adapter), tmp_path / "out", model=str(base))["in_memory"] == "" and len(seen) > 5


@pytest.mark.parametrize("recipe", ["all+core", "dora"])
def test_matrices_are_merged_some_rows_at_a_time(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows, of which a thread takes four: every bit and every count as of merging in memory."""
    base, adapter = make(tmp_path, DENSE, recipe, dtype=torch.bfloat16)
    monkeypatch.setattr(ROW_MERGE, "BLOCK", 64)
    monkeypatch.setattr(ROW_MERGE, "PART", 256)
    read, sizes = Entry.read, []

    def watched(entry: Entry) -> torch.Tensor:
        sizes.append(entry.num)
        return read(entry)

    monkeypatch.setattr(Entry, "read", watched)
    found = merge_to(str(adapter), tmp_path / "streamed", model=str(base), restore=["ssm.out"])
    assert sizes.count(256) > 50
    monkeypatch.setattr(STAGE, "_stream", in_memory)
    expected = merge_to(
        str(adapter), tmp_path / "expected", model=str(base), restore=["ssm.out"], on_message=lambda _: None
    )
    assert expected["in_memory"] == "the test says so"
    tensors = files(tmp_path / "expected")
    assert all(torch.equal(found, tensors[name]) for name, found in files(tmp_path / "streamed").items())
    assert found["merged_digest"] == expected["merged_digest"] and found["survival"] == expected["survival"]
    others = {row["path"]: row for row in expected["rounding"]}
    for row in found["rounding"]:
        other = others[row["path"]]
        assert row["max"] == other["max"] and row["mean"] == pytest.approx(other["mean"], rel=1e-6)


def test_a_conversion_whose_way_back_changes_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in transformers' way back: seen when what was cut is put together again, and merged in memory."""
    base, adapter = make(tmp_path, ("qwen3_next", "moe"), "all")
    revert = Units._revert

    def shuffled(self: Units, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t if t.is_meta else t.flip(0) for name, t in revert(self, tensors).items()}

    monkeypatch.setattr(Units, "_revert", shuffled)
    messages: list[str] = []
    merge_to(str(adapter), tmp_path / "out", model=str(base), on_message=messages.append)
    assert len(messages) == 1 and "conversion of" in messages[0] and "gives other values" in messages[0]
    expected = STAGE.merge(load(load_model(str(base)), adapter)).state_dict()
    found = load_model(str(tmp_path / "out")).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("core_float32", [False, True])
def test_dtype_and_core_of_the_files(core_float32: bool, tmp_path: Path) -> None:
    """From a bf16 base: fp32 files hold the exact sums; a core in fp32 is exact in a bf16 file."""
    base, adapter = make(tmp_path, DENSE, "all+core", dtype=torch.bfloat16)
    exact = effective_tensors(load(load_model(str(base)), adapter))
    wide = merge_to(str(adapter), tmp_path / "wide", model=str(base), dtype="float32")
    found = files(tmp_path / "wide")
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert all(torch.equal(found[path], value) for path, value in exact.items())
    assert {row["max"] for row in wide["rounding"]} == {0.0}
    assert {row["survives"] for row in wide["survival"]} == {1.0}
    narrow = merge_to(str(adapter), tmp_path / "narrow", model=str(base), core_float32=core_float32)
    found = files(tmp_path / "narrow")
    core = {name for name in exact if name.endswith(("A_log", ".D", "dt_bias"))}
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if core_float32 and name in core else torch.bfloat16), name
    assert all(torch.equal(found[path], exact[path].to(found[path].dtype)) for path in exact)
    for row in narrow["rounding"]:
        error = (found[row["path"]].float() - exact[row["path"]]).abs()
        # The mean is summed in fp64 there.
        assert row["max"] == float(error.max()) and row["mean"] == pytest.approx(float(error.double().mean()))
        assert (row["max"] == 0) == (core_float32 and row["path"] in core)
    # transformers gives every tensor the config's dtype, so that both files are the same model to it.
    assert {p.dtype for p in load_model(str(tmp_path / "narrow")).parameters()} == {torch.bfloat16}


def test_an_adapter_of_a_rounded_base(tmp_path: Path) -> None:
    """Trained on an fp32 checkpoint that was loaded in bf16: merged into those rounded weights, and into no others."""
    base, _ = make(tmp_path, DENSE, "all+core")
    model = load_model(str(base), dtype="bfloat16")
    adapted = attach(model, make_plan(model, "all+core"))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "rounded")
    exact = effective_tensors(adapted)
    result = merge_to(str(tmp_path / "rounded"), tmp_path / "out", model=str(base))
    assert result["dtype"] == "bfloat16"
    found = files(tmp_path / "out")
    assert all(torch.equal(found[path], value.bfloat16()) for path, value in exact.items())


def test_another_base_and_a_second_merge_are_refused(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, DENSE, "core")
    merge_to(str(adapter), tmp_path / "once", model=str(base))
    with pytest.raises(AdapterMismatch, match="merged into it already"):
        merge_to(str(adapter), tmp_path / "twice", model=str(tmp_path / "once"))
    (tmp_path / "once" / PROVENANCE).unlink()
    with pytest.raises(AdapterMismatch, match="the model given has digest"):
        merge_to(str(adapter), tmp_path / "twice", model=str(tmp_path / "once"))
    tensors = files(base)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterMismatch, match="the model given has digest"):
        merge_to(str(adapter), tmp_path / "twice", model=str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "once"]


def test_states_are_refused(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, DENSE, "initial-state")
    with pytest.raises(AttachError, match="no tensor of the base can hold"):
        merge_to(str(adapter), tmp_path / "out", model=str(base))


def _double(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.final_layernorm.weight"] = tensors["model.final_layernorm.weight"].double()


def _two_embeddings(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_double, "has dtype F64"), (_two_embeddings, "tied in the model and differ")],
    ids=["dtype", "untied"],
)
def test_what_cannot_be_streamed_is_merged_in_memory_and_says_so(
    change: Callable[[Mapping[str, torch.Tensor]], None], reason: str, tmp_path: Path
) -> None:
    case = ("bamba", "tied")
    base, _ = make(tmp_path, case, "core")
    tensors = files(base)
    change(tensors)
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    model = load_model(str(base))
    adapted = attach(model, make_plan(model, "core"))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    messages: list[str] = []
    result = merge_to(str(tmp_path / "adapter"), tmp_path / "out", model=str(base), on_message=messages.append)
    assert len(messages) == 1 and reason in messages[0] and reason in result["in_memory"]
    expected = STAGE.merge(load(load_model(str(base)), tmp_path / "adapter")).state_dict()
    found = load_model(str(tmp_path / "out")).state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_base_with_a_tensor_too_many_or_too_few(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, DENSE, "core")
    tensors = files(base)
    save_file({**tensors, "mtp.head.weight": torch.ones(3)}, base / WEIGHTS, metadata={"format": "pt"})
    result = merge_to(str(adapter), tmp_path / "more", model=str(base))
    assert result["left_out"] == ["mtp.head.weight"] and "mtp.head.weight" not in files(tmp_path / "more")
    del tensors["model.layers.0.mamba.D"]
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing in its weights \(model.layers.0.mamba.D\)"):
        merge_to(str(adapter), tmp_path / "fewer", model=str(base), on_message=lambda _: None)
    assert not (tmp_path / "fewer").exists()


@pytest.mark.parametrize("fault", ["full disk", "no room", "flipped", "killed"])
def test_nothing_is_left_when_writing_fails(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make(tmp_path, DENSE, "core")
    writer = import_module("ssmtune.checkpoint").ShardWriter
    write, calls = writer.write, []

    def failing(self: Any, name: str, values: torch.Tensor, start: int = 0) -> None:
        calls.append(name)
        if fault == "killed" and len(calls) == 5:
            raise KeyboardInterrupt
        write(self, name, values + 1 if fault == "flipped" and len(calls) == 5 else values, start)

    expected: tuple[type[BaseException], str] = (KeyboardInterrupt, "^$")
    if fault == "full disk":
        pwrite = import_module("os").pwrite

        def full(descriptor: int, data: Any, position: int) -> int:
            if position > 20_000:
                raise OSError(28, "No space left on device")
            return int(pwrite(descriptor, data, position))

        monkeypatch.setattr("ssmtune.checkpoint.os.pwrite", full)
        expected = OSError, r"No space left on device: .*model\.safetensors"
    elif fault == "no room":
        monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        expected = ConfigError, "the merged weights need .* free"
    else:
        monkeypatch.setattr(writer, "write", failing)
        if fault == "flipped":
            expected = CheckFailed, "have digest"
    with pytest.raises(expected[0], match=expected[1]):
        merge_to(str(adapter), tmp_path / "out", model=str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_small_model_is_compared_with_the_adapted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the stream adds something else than merging in memory does."""
    base, adapter = make(tmp_path, DENSE, "all+core")
    monkeypatch.setattr(STAGE, "SMALL_BYTES", 1 << 28)
    result = merge_to(str(adapter), tmp_path / "out", model=str(base))
    assert result["prompts"]["num"] == 2 and 0 < result["prompts"]["mean"] < result["prompts"]["max"]
    # fp32 in another order of summation: the adapted model adds LoRA's branch to the activations.
    assert result["prompts"]["max"] < 1e-5
    exact, weightless = STAGE._effective, []

    def wrong(adapted: Any, path: str) -> torch.Tensor:
        streamed = any(parameter.is_meta for parameter in adapted.parameters())
        weightless.append(streamed)
        value: torch.Tensor = exact(adapted, path)
        return value * (1.01 if streamed and path.endswith("dt_bias") else 1.0)

    monkeypatch.setattr(STAGE, "_effective", wrong)
    with pytest.raises(CheckFailed, match="dt_bias: the tensor that was written is not the one"):
        merge_to(str(adapter), tmp_path / "wrong", model=str(base))
    assert True in weightless and not (tmp_path / "wrong").exists()


def test_the_directory_is_a_model_and_says_where_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make(tmp_path, DENSE, "all+core")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({"torch_dtype": fields.pop("dtype"), **fields, "time_step_limit": INFINITE})
    )
    (base / "tokenizer.json").write_text("{}")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    merge_command(
        str(adapter), tmp_path / "out", model=str(base), dtype="bfloat16", core_float32=True, json_output=False
    )
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        PROVENANCE,
        "tokenizer.json",
    ]
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and written == {**fields, "dtype": "bfloat16", "time_step_limit": INFINITE}
    card = (out / "README.md").read_text()
    facts = json.loads((out / PROVENANCE).read_text())
    assert facts["base_digest"] in card and "run `run`, step 4" in card and "core (`A_log`" in card
    assert all(digest in card for digest in facts["adapter_sha256"].values())
    assert "Rounding moved stored values" in capsys.readouterr().err
