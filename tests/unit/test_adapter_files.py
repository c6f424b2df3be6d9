"""Every kind of damage to an adapter directory is refused and named, before the base model is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import logits_of, randomise, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file

from ssmtune import adapter_files
from ssmtune.adapter_files import FILES, OUR_CONFIG, OUR_TENSORS, PEFT_CONFIG, PEFT_TENSORS
from ssmtune.attach import attach, load
from ssmtune.errors import AdapterMismatch
from ssmtune.plan import make_plan
from ssmtune.records import file_sha256

DENSE = ("granite_hybrid", "dense")


def make_adapted(seed: int = 1) -> Any:
    torch.manual_seed(0)
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core", rank=3))
    randomise(adapted, seed=seed)
    return adapted.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two directories of one run: step-1 and step-2."""
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        make_adapted(step).save_pretrained(root / f"step-{step}", step=step, run_id="run")
    return root


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of step 1 to damage."""
    return Path(shutil.copytree(saved / "step-1", tmp_path / "adapter"))


def refused(directory: Path, match: str) -> None:
    """`load` raises, names the directory, and leaves the base as if nothing had been tried."""
    model = tiny_model(DENSE)
    before = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    with pytest.raises(AdapterMismatch, match=match) as caught:
        load(model, directory)
    assert str(directory) in str(caught.value)
    assert [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()] == before
    tokens = tiny_tokens(DENSE, 1, 5)
    assert torch.equal(logits_of(model, tokens), logits_of(tiny_model(DENSE), tokens))


def edit_facts(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((directory / OUR_CONFIG).read_text())
    change(facts)
    (directory / OUR_CONFIG).write_text(json.dumps(facts))


def vouch(directory: Path) -> None:
    """Make ssmtune.json agree with the tensor files, as someone who edits them on purpose would."""
    edit_facts(
        directory, lambda f: f["sha256"].update({n: file_sha256(directory / n) for n in (PEFT_TENSORS, OUR_TENSORS)})
    )


def test_directory_holds_the_four_files_and_round_trips(saved: Path) -> None:
    assert sorted(p.name for p in (saved / "step-1").iterdir()) == sorted(FILES)
    read = adapter_files.read(saved / "step-1")
    assert (read.step, read.run_id) == (1, "run")
    assert read.plan == make_adapted().plan
    tokens = tiny_tokens(DENSE, 2, 9)
    assert torch.equal(logits_of(load(tiny_model(DENSE), saved / "step-1"), tokens), logits_of(make_adapted(1), tokens))


def test_trained_tensors_are_stored_in_fp32(saved: Path) -> None:
    for name in (PEFT_TENSORS, OUR_TENSORS):
        assert {t.dtype for t in load_file(saved / "step-1" / name).values()} == {torch.float32}, name


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name: str, directory: Path) -> None:
    (directory / name).unlink()
    refused(directory, f"{name} missing")


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "missing")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", [PEFT_TENSORS, OUR_TENSORS, OUR_CONFIG])
def test_truncated_file(name: str, share: float, directory: Path) -> None:
    payload = (directory / name).read_bytes()
    (directory / name).write_bytes(payload[: int(share * len(payload))])
    refused(directory, name)


@pytest.mark.parametrize("name", [PEFT_TENSORS, OUR_TENSORS])
def test_one_flipped_bit(name: str, directory: Path) -> None:
    payload = bytearray((directory / name).read_bytes())
    payload[-3] ^= 1
    (directory / name).write_bytes(bytes(payload))
    refused(directory, "is not the file that ssmtune.json")


@pytest.mark.parametrize("name", [PEFT_TENSORS, OUR_TENSORS, OUR_CONFIG])
def test_half_of_another_step(name: str, directory: Path, saved: Path) -> None:
    """The failure of a published study: adapter and core of different steps, each whole and of the right shape."""
    shutil.copy(saved / "step-2" / name, directory / name)
    refused(directory, "different steps or runs")


def test_swapped_halves(directory: Path) -> None:
    kept = (directory / PEFT_TENSORS).read_bytes()
    (directory / PEFT_TENSORS).write_bytes((directory / OUR_TENSORS).read_bytes())
    (directory / OUR_TENSORS).write_bytes(kept)
    refused(directory, "is not the file")
    vouch(directory)
    refused(directory, "tensors of the plan are missing")


@pytest.mark.parametrize("name", [PEFT_TENSORS, OUR_TENSORS])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(sorted(t)[0]), "1 tensors of the plan are missing"),
        (lambda t: t.update(surprise=torch.zeros(2)), "1 are not in the plan"),
        (lambda t: t.update({sorted(t)[0]: torch.zeros(2, 2)}), r"has shape \(2, 2\), the plan says"),
    ],
    ids=["removed", "added", "reshaped"],
)
def test_altered_keys_and_shapes(name: str, change: Callable[[Any], Any], match: str, directory: Path) -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, metadata={"format": "pt"})
    vouch(directory)
    refused(directory, match)


def test_non_finite_values_are_refused(directory: Path) -> None:
    tensors = load_file(directory / OUR_TENSORS)
    tensors[sorted(tensors)[0]][0] = float("nan")
    save_file(tensors, directory / OUR_TENSORS, metadata={"format": "pt"})
    refused(directory, "is not the file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.pop("plan"), "cannot be read"),
        (lambda f: f.pop("sha256"), "cannot be read"),
        (lambda f: f.update(sha256=[[None, None]]), "sha256 is a list, not a digest for each file"),
        (lambda f: f.update(step="three"), "cannot be read"),
        (lambda f: f.update(format=99), "adapter format 99; this ssmtune reads 1"),
        (lambda f: f["plan"].update(trainable=1), "trainable parameters, its sites add up to"),
        (lambda f: f["plan"]["sites"][0].pop("path"), "missing or malformed"),
        (lambda f: f["sha256"].update({"../../secret": "0"}), "secret"),
        (lambda f: f["sha256"].pop(OUR_TENSORS), OUR_TENSORS),
    ],
    ids=[
        *("no-plan", "no-digests", "listed-digests", "bad-step", "newer-format"),
        *("counts", "bad-site", "foreign-path", "one-digest"),
    ],
)
def test_altered_facts(change: Callable[[dict[str, Any]], Any], match: str, directory: Path) -> None:
    edit_facts(directory, change)
    refused(directory, match)


def test_facts_that_are_no_object(directory: Path) -> None:
    for text in ("[]", "null", "3", "\xff"):
        (directory / OUR_CONFIG).write_text(text, encoding="latin-1")
        refused(directory, "cannot be read")


def test_other_base_is_refused_by_its_digest(directory: Path) -> None:
    model = tiny_model(DENSE)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    before = sorted(vars(model))
    with pytest.raises(AdapterMismatch, match="base digest .* the model given has digest"):
        load(model, directory)
    assert sorted(vars(model)) == before
    with pytest.raises(AdapterMismatch, match="base digest"):
        load(tiny_model(("granite_hybrid", "odd")), directory)


def test_base_in_another_precision_is_another_base(directory: Path) -> None:
    with pytest.raises(AdapterMismatch, match="in the same precision"):
        load(tiny_model(DENSE, dtype=torch.bfloat16), directory)


@pytest.mark.parametrize("fail_at", range(4))
def test_failure_while_writing_leaves_nothing_that_loads(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails at any of the four files: the directory is refused, whether it was new or held step 1."""
    original = Path.replace
    for older in (False, True):
        directory = tmp_path / f"older-{older}"
        if older:
            make_adapted(1).save_pretrained(directory, step=1, run_id="run")
        calls = []

        def replace(source: Path, target: Any, calls: list[Any] = calls) -> Path:
            calls.append(target)
            if len(calls) == fail_at + 1:
                raise OSError(28, "No space left on device")
            return original(source, target)

        monkeypatch.setattr(Path, "replace", replace)
        with pytest.raises(OSError, match="No space"):
            make_adapted(2).save_pretrained(directory, step=2, run_id="run")
        monkeypatch.undo()
        refused(directory, "missing")
        assert not [p for p in directory.iterdir() if p.name.startswith(".")], "a temporary file is left behind"
        make_adapted(2).save_pretrained(directory, step=2, run_id="run")
        assert adapter_files.read(directory).step == 2


def test_directory_with_extras_says_so_in_the_peft_config(saved: Path, tmp_path: Path) -> None:
    facts = json.loads((saved / "step-1" / PEFT_CONFIG).read_text())
    assert facts["peft_type"].startswith("SSMTUNE") and "A_log, D, dt_bias" in facts["peft_type"]
    plain = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all", rank=3))
    plain.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert facts["peft_type"] == "LORA" and facts["inference_mode"] is True
    assert set(load_file(tmp_path / OUR_TENSORS)) == set()


def test_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_adapted(1).save_pretrained(tmp_path / name, step=3, run_id="run")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_saving_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with the name of a hub repository is no reason to look there."""
    import socket

    model = tiny_model(DENSE)
    model.config.name_or_path = "owner/name"
    model.name_or_path = "owner/name"
    adapted = attach(model, make_plan(model, "all+core"))

    asked: list[Any] = []

    def connect(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    adapted.save_pretrained(tmp_path)
    twin = tiny_model(DENSE)
    twin.config.name_or_path = "owner/name"
    twin.name_or_path = "owner/name"
    load(twin, tmp_path)
    assert not asked, asked
