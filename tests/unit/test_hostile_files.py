"""Files made to do harm: every one is refused with a message, and nothing is written, or allocated for what is not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import randomise, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ssmtune import adapter_files
from ssmtune.adapter_files import OUR_CONFIG, OUR_TENSORS, PEFT_TENSORS
from ssmtune.attach import attach, load
from ssmtune.checkpoint import INDEX, WEIGHTS, inside, read_checkpoint, read_header
from ssmtune.config import parse_json
from ssmtune.errors import AdapterMismatch, ConfigError, PlanMismatch, SsmtuneError
from ssmtune.merge import merge_to
from ssmtune.models import load_model
from ssmtune.plan import make_plan
from ssmtune.records import file_sha256, read_record

DENSE = ("granite_hybrid", "dense")
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Each example writes and reads one small file; the number bounds the whole to a second or two."""


def with_header(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter on it."""
    root = tmp_path_factory.mktemp("source")
    tiny_model(DENSE).save_pretrained(root / "base")
    model = load_model(str(root / "base"))
    adapted = attach(model, make_plan(model, "all+core", rank=2))
    randomise(adapted)
    adapted.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def root(source: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(source, tmp_path / "source"))


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (b"", "header should have 0 bytes, the file has 0"),
        (b"\x08\x00", "the file has 2"),
        (with_header({}, length=1 << 62), "header should have 4,611,686"),
        (with_header(b"[]"), "got list"),
        (with_header(b'{"a": NaN}'), "NaN is no number"),
        (with_header(b'{"a": {}, "a": {}}'), "'a' is given twice"),
        (with_header(b'{"a"'), "not valid JSON"),
        (with_header(b"\xff\xfe{}"), "not valid JSON"),
        (with_header(b'{"a":' + b"[" * 100_000), "not valid JSON"),
        (with_header({"a": []}), "malformed"),
        (with_header({"a": entry(shape=[2.0])}, bytes(8)), "malformed"),
        (with_header({"a": entry(shape=[True, 2])}, bytes(8)), "malformed"),
        (with_header({"a": entry(shape=[-2])}, bytes(8)), "malformed"),
        (with_header({"a": {**entry(), "more": 1}}, bytes(8)), "malformed"),
        (with_header({"a": entry("F31")}, bytes(8)), "dtype 'F31'"),
        (with_header({"a": entry(["F32"])}, bytes(8)), "has dtype"),
        (with_header({"a": entry(shape=[1 << 40, 1 << 20])}, bytes(8)), "needs 4,611,686,018,427,387,904 bytes"),
        (with_header({"a": entry(shape=[3])}, bytes(8)), "needs 12 bytes, the header gives it 8"),
        (with_header({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps another"),
        (with_header({"a": entry(offsets=[8, 16])}, bytes(16)), "leaves a gap"),
        (with_header({"a": entry()}, bytes(7)), "end at byte"),
        (with_header({"a": entry()}, bytes(9)), "end at byte"),
    ],
)
def test_a_header_that_lies(payload: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(payload)
    with pytest.raises(ConfigError, match=match) as caught:
        read_header(tmp_path / WEIGHTS)
    assert str(tmp_path / WEIGHTS) in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(ConfigError, match=match):
        read_checkpoint(tmp_path)


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    """What the refusals above leave: names, shapes and bits are safetensors' own."""
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(5).bfloat16(), "c": torch.arange(4), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    entries = read_checkpoint(tmp_path)
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(entries[name].read(), tensor) and entries[name].torch_dtype == tensor.dtype
        assert torch.equal(torch.cat([*entries[name].blocks(), tensor.new_zeros(0)]), tensor.reshape(-1))
        assert torch.equal(entries[name].every(2, 2), tensor.reshape(-1)[::2][:2])


@FUZZ
@given(data=st.data())
def test_damaged_headers_are_refused_or_read(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes of a good file changed, cut or added anywhere: an error of ours or a file that holds what it says."""
    path = tmp_path / "fuzzed.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5).bfloat16()}, path)
    payload = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(payload)))
        payload[where : where + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(payload)
    try:
        entries = read_header(path)
    except SsmtuneError:
        return
    assert sum(found.num_bytes for found in entries.values()) < len(payload)
    assert all(found.read().numel() == found.num for found in entries.values())


@FUZZ
@given(text=st.text() | st.binary().map(lambda b: b.decode("latin-1")) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
).map(json.dumps))  # fmt: skip
def test_any_text_is_an_object_or_refused(text: str) -> None:
    try:
        value = parse_json(text, where="here")
    except ConfigError as error:
        assert str(error).startswith("here")
    else:
        assert value == json.loads(text)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden", "..", "", "x\x00y"]
)
def test_an_index_that_names_other_places(name: str, root: Path) -> None:
    base = root / "base"
    entries = read_checkpoint(base)
    (base / WEIGHTS).rename(base / "part.safetensors")
    (root / "evil.safetensors").write_bytes((base / "part.safetensors").read_bytes())
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(entries, "part.safetensors")}))
    assert set(read_checkpoint(base)) == set(entries)
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(entries, name)}))
    with pytest.raises(ConfigError, match="expected the plain name of a file beside it"):
        load_model(str(base))


@pytest.mark.parametrize("placed", [None, [], {"a": 3}, {"absent": "part.safetensors"}, {"a": "absent.safetensors"}])
def test_an_index_that_contradicts_its_files(placed: Any, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "part.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "twice.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ConfigError, match="weight_map|is not in it|no such file"):
        read_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "twice.safetensors"}}))
    with pytest.raises(ConfigError, match="'b' is not in it|in another file too"):
        read_checkpoint(tmp_path)


def test_links_are_followed_inside_and_in_a_hub_cache_only(tmp_path: Path) -> None:
    outside, model = tmp_path / "outside.safetensors", tmp_path / "model"
    save_file({"a": torch.ones(2)}, outside)
    model.mkdir()
    (model / WEIGHTS).symlink_to(outside)
    with pytest.raises(ConfigError, match="a link out of the directory"):
        read_checkpoint(model)
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(model / WEIGHTS)
    with pytest.raises(ConfigError):
        read_checkpoint(model)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(outside, blobs / "0123")
    (snapshot / WEIGHTS).symlink_to(blobs / "0123")
    assert set(read_checkpoint(snapshot)) == {"a"}
    assert inside(snapshot, WEIGHTS) == snapshot / WEIGHTS


def test_a_model_directory_with_an_adapter_in_it_is_not_another_model(root: Path) -> None:
    """transformers would leave the directory and load what the adapter's config names."""
    (root / "base" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ConfigError, match="would load the model that is named there"):
        load_model(str(root / "base"))


def vouch(directory: Path, change: Callable[[dict[str, Any]], Any] = lambda facts: None) -> None:
    """Change ssmtune.json and let it vouch for the tensor files as they are, as somebody who attacks would."""
    facts = json.loads((directory / OUR_CONFIG).read_text())
    facts["sha256"] = {name: file_sha256(directory / name) for name in (PEFT_TENSORS, OUR_TENSORS)}
    change(facts)
    (directory / OUR_CONFIG).write_text(json.dumps(facts))


def _rank(facts: dict[str, Any]) -> None:
    """A rank whose factors would need terabytes, with counts that agree."""
    site = next(s for s in facts["plan"]["sites"] if s["method"] == "lora")
    before = site["num_params"]
    site["options"]["rank"] = 1_000_000_000
    site["num_params"] = 1_000_000_000 * sum(site["shape"])
    facts["plan"]["trainable"] += site["num_params"] - before


def _site(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts["plan"]["sites"][0].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_rank, "the files hold"),
        (lambda f: f["plan"]["sites"][0]["options"].update(rank=1_000_000_000), "the plan says"),
        (lambda f: f["plan"]["sites"][0]["options"].update(evil=1), "unknown field 'evil'"),
        (_site(method="../lora"), "does not exist"),
        (_site(path="model.layers.0.__class__"), "which this model does not have"),
        (_site(shape=[1, 1], num_params=6), "the plan says|does not have|add up"),
        (_site(container="shell"), "malformed"),
        (_site(rows=[[0, 1 << 60]]), "does not have"),
        (_site(surprise=1), "unknown field 'surprise'"),
        (lambda f: f["plan"].update(sites={"a": 1}), "malformed"),
        (lambda f: f["plan"].update(model=["a"]), "must be text"),
        (lambda f: f.update(surprise=1), "unknown field 'surprise'"),
        (lambda f: f.update(step=float("inf")), "is no number"),
        (lambda f: f.update(sha256=3), "cannot be read"),
        (lambda f: f.update(discarded=3), "cannot be read"),
        (lambda f: f.update(discarded=[3]), "names '3' as discarded"),
    ],
)
def test_an_adapter_whose_facts_lie(change: Callable[[dict[str, Any]], Any], match: str, root: Path) -> None:
    vouch(root / "adapter", change)
    with pytest.raises((AdapterMismatch, PlanMismatch), match=match):
        load(tiny_model(DENSE), root / "adapter")


def test_a_trained_tensor_that_is_named_as_discarded(root: Path) -> None:
    """It would be at its start in the model that is loaded, and nothing would be missing."""
    tensors = load_file(root / "adapter" / OUR_TENSORS)
    name = next(name for name in sorted(tensors) if name.endswith("A_log"))
    del tensors[name]
    save_file(tensors, root / "adapter" / OUR_TENSORS, metadata={"format": "pt"})
    vouch(root / "adapter", lambda facts: facts.update(discarded=[name]))
    with pytest.raises(
        AdapterMismatch, match=f"names '{re.escape(name)}' as discarded on saving, which the plan keeps"
    ):
        adapter_files.read(root / "adapter")


def test_a_part_of_an_edit_that_is_named_as_discarded(tmp_path: Path) -> None:
    """What only training needs is not in an adapter, and is named there; a factor may not be."""
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "adalora", rank=2))
    adapted.save_pretrained(tmp_path)
    key = adapted.plan.sites[0].key
    assert f"{key}.sensitivity_P" in adapter_files.read(tmp_path).discarded
    tensors = load_file(tmp_path / OUR_TENSORS)
    del tensors[f"{key}.lora_P"]
    save_file(tensors, tmp_path / OUR_TENSORS, metadata={"format": "pt"})
    vouch(tmp_path, lambda facts: facts["discarded"].append(f"{key}.lora_P"))
    with pytest.raises(AdapterMismatch, match=f"names '{re.escape(key)}.lora_P' as discarded"):
        load(tiny_model(DENSE), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [PEFT_TENSORS, OUR_TENSORS])
def test_values_that_are_not_finite(name: str, value: float, root: Path) -> None:
    tensors = load_file(root / "adapter" / name)
    key = sorted(tensors)[0]
    tensors[key].view(-1)[0] = value
    save_file(tensors, root / "adapter" / name, metadata={"format": "pt"})
    vouch(root / "adapter")
    with pytest.raises(AdapterMismatch, match=f"{key} holds values that are not finite"):
        adapter_files.read(root / "adapter")


@pytest.mark.parametrize("name", [OUR_CONFIG, OUR_TENSORS, PEFT_TENSORS])
def test_an_adapter_that_links_elsewhere(name: str, root: Path) -> None:
    path = root / "adapter" / name
    path.rename(root / "elsewhere")
    path.symlink_to(root / "elsewhere")
    with pytest.raises(AdapterMismatch, match="a link out of the directory"):
        adapter_files.read(root / "adapter")


FACTS_OF_A_PLAN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_any_value_in_the_facts_is_refused_or_harmless(data: st.DataObject, source: Path, tmp_path: Path) -> None:
    """One value anywhere in ssmtune.json replaced by another: an error of ours, or the adapter as it was saved."""
    directory = tmp_path / "adapter"
    if not directory.exists():
        shutil.copytree(source / "adapter", directory)
    facts = json.loads((source / "adapter" / OUR_CONFIG).read_text())
    here: Any = facts
    while True:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[key], (dict, list)) and here[key] and data.draw(st.booleans()):
            here = here[key]
        else:
            break
    here[key] = data.draw(FACTS_OF_A_PLAN)
    (directory / OUR_CONFIG).write_text(json.dumps(facts))
    try:
        saved = adapter_files.read(directory)
    except SsmtuneError as error:
        assert str(directory) in str(error)
        return
    assert {site.key for site in saved.plan.sites} and saved.peft_tensors


def test_a_hostile_base_leaves_nothing_behind(root: Path, tmp_path: Path) -> None:
    """The whole way through `merge`: refused, with nothing written beside or outside of the target."""
    # Clones: those of the file itself lie in its memory map, and the file is about to become shorter.
    tensors = {name: tensor.clone() for name, tensor in load_file(root / "base" / WEIGHTS).items()}
    payload = (root / "base" / WEIGHTS).read_bytes()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for damaged in (payload[:-5], payload[:100], with_header({"a": entry(shape=[1 << 50])}, bytes(8))):
        (root / "base" / WEIGHTS).write_bytes(damaged)
        with pytest.raises(SsmtuneError):
            merge_to(str(root / "adapter"), tmp_path / "out", model=str(root / "base"), on_message=lambda _: None)
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    bad = dict(tensors)
    bad["model.norm.weight"] = bad["model.norm.weight"][:-1].clone()
    save_file(bad, root / "base" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SsmtuneError, match="mismatched"):
        merge_to(str(root / "adapter"), tmp_path / "out", model=str(root / "base"), on_message=lambda _: None)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_records_and_configs_that_lie(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.json").write_text('{"kind": "train", "loss": NaN}')
    with pytest.raises(SsmtuneError, match="NaN is no number"):
        read_record(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"kind": "train", "kind": "verify"}')
    with pytest.raises(SsmtuneError, match="given twice"):
        read_record(tmp_path / "r.json")
    monkeypatch.setattr("ssmtune.records.MAX_RECORD_BYTES", 1000)
    import gzip

    (tmp_path / "r.json.gz").write_bytes(gzip.compress(b"[" * 5000))
    with pytest.raises(SsmtuneError, match="more than 1,000 bytes"):
        read_record(tmp_path / "r.json.gz")
    config = root / "base" / "config.json"
    config.write_text(config.read_text().replace("{", '{"model_type": "llama",', 1))
    with pytest.raises(ConfigError, match="'model_type' is given twice"):
        load_model(str(root / "base"))
    assert os.listdir(root / "base")  # noqa: PTH208
