"""Exports to plain transformers and PEFT: a process without ssmtune gives the same logits, and nothing is lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import randomise, tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssmtune import adapter_files
from ssmtune.attach import attach, load
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.export import ExportConfig, export, factors, magnitudes
from ssmtune.export.base import target_names
from ssmtune.export.factors import full_row_factors, stack_factors
from ssmtune.export.plain import own_logits
from ssmtune.families.base import get_family
from ssmtune.models import load_model, load_tokenizer
from ssmtune.plan import Site, make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.records import file_sha256
from ssmtune.verify.forward import STEP_TOLERANCE

SAME = STEP_TOLERANCE[torch.float32]
"""Logits of transformers' own recurrence beside ours, in fp32; measured 4e-6 without any adapter."""

ROWS = Recipe(
    name="rows",
    edits=(
        Edit(method="lora", select=("ssm.in.x",), options={"rank": 3, "alpha": 6.0}),
        Edit(method="lora", select=("ssm.in.dt", "ssm.in.B"), options={"rank": 2, "alpha": 3.0}),
        Edit(method="lora", select=("attn.q",), options={"rank": 2, "alpha": 8.0}),
    ),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory with the bundled tokenizer, in bf16 as models come."""
    directory = tmp_path_factory.mktemp("base") / "base"
    model = tiny_model(("granite_hybrid", "dense"))
    torch.manual_seed(0)
    model.resize_token_embeddings(6144, mean_resizing=False)
    model.bfloat16().save_pretrained(directory)
    load_tokenizer("tiny-granite-h").save_pretrained(directory)
    return directory


def _adapter(base: Path, recipe: str | Recipe, directory: Path) -> Path:
    model = load_model(str(base))
    adapted = attach(model, make_plan(model, recipe))
    randomise(adapted)
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def all_core(base: Path) -> Path:
    return _adapter(base, "all+core", base.parent / "all-core")


@pytest.fixture(scope="module")
def rows(base: Path) -> Path:
    return _adapter(base, ROWS, base.parent / "rows")


def _logits_here(model: str, prompts: Any, *, adapter: Path | None = None, dtype: str = "auto") -> list[torch.Tensor]:
    """What the fresh process computes, in this one, which has imported torch already: seconds for each call."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    return own_logits(loaded, prompts)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmtune.export.hf.plain_logits", _logits_here)
    monkeypatch.setattr("ssmtune.export.peft.plain_logits", _logits_here)


def test_hf_loads_without_ssmtune_bit_for_bit(all_core: Path, tmp_path: Path) -> None:
    record = export(ExportConfig(run=str(all_core), to="hf", out=str(tmp_path / "hf"), dtype="float32"))
    assert record["check"]["plain_to_merged"] == {"max": 0.0, "mean": 0.0}
    assert record["check"]["merged_to_adapted"]["max"] < SAME
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(record["files"])


def test_hf_that_arrives_otherwise_is_not_left_behind(
    all_core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what plain transformers would load lost one tensor's change on the way."""

    def damaged(model: str, *arguments: Any) -> list[torch.Tensor]:
        path = Path(model) / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.0.mamba.D"] = torch.ones_like(tensors["model.layers.0.mamba.D"])
        save_file(tensors, path, metadata={"format": "pt"})
        return _logits_here(model, *arguments)

    monkeypatch.setattr("ssmtune.export.hf.plain_logits", damaged)
    with pytest.raises(CheckFailed, match="not written"):
        export(ExportConfig(run=str(all_core), to="hf", out=str(tmp_path / "hf")))
    assert list(tmp_path.iterdir()) == []


def test_peft_refuses_to_lose_the_core(all_core: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ssm\.A_log, ssm\.D, ssm\.dt_bias.*--bake-extras.*--drop-extras"):
        export(ExportConfig(run=str(all_core), to="peft", out=str(tmp_path / "peft")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("in_process")
def test_dropped_extras_are_recorded_and_what_they_cost(all_core: Path, tmp_path: Path) -> None:
    record = export(ExportConfig(run=str(all_core), to="peft", out=str(tmp_path / "peft"), drop_extras=True))
    assert len(record["dropped"]) == 6
    assert record["check"]["plain_to_expected"]["max"] < SAME
    assert record["check"]["export_to_trained"]["max"] > 1e-3
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


@pytest.mark.usefixtures("in_process")
def test_baked_extras_lose_nothing(all_core: Path, tmp_path: Path) -> None:
    out, baked = tmp_path / "peft", tmp_path / "base"
    record = export(ExportConfig(run=str(all_core), to="peft", out=str(out), bake_extras=str(baked)))
    assert record["check"]["export_to_trained"]["max"] < SAME
    tensors = load_file(baked / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert kinds["model.layers.0.mamba.A_log"] == torch.float32
    assert kinds["model.layers.0.mamba.in_proj.weight"] == torch.bfloat16
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(baked.resolve())


def test_row_edits_become_full_row_factors(rows: Path, tmp_path: Path) -> None:
    """Three edits of one tensor, of two scales, and PEFT's own layers: all in stock PEFT, with equal logits."""
    record = export(ExportConfig(run=str(rows), to="peft", out=str(tmp_path / "peft")))
    assert record["check"]["export_to_trained"]["max"] < SAME
    assert record["dropped"] == record["baked"] == []
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.mamba.in_proj"
    assert tensors[f"{module}.lora_A.weight"].shape == (7, 32)
    assert tensors[f"{module}.lora_B.weight"].shape == (2 * 64 + 2 * 16 + 8, 7)


@pytest.mark.usefixtures("in_process")
def test_a_row_edit_in_the_wrong_rows_is_seen(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(site: Site, A: torch.Tensor, B: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = full_row_factors(site, A, B, num_rows)
        return A, B.roll(1, dims=0)

    monkeypatch.setattr(factors, "full_row_factors", shifted)
    with pytest.raises(CheckFailed, match="not written"):
        export(ExportConfig(run=str(rows), to="peft", out=str(tmp_path / "peft")))
    assert list(tmp_path.iterdir()) == []


def test_full_row_factors_fill_interleaved_ranges() -> None:
    site = Site(
        role="gdn.in.q",
        group="recurrent",
        layer=0,
        path="in_proj.weight",
        rows=((1, 3), (5, 6)),
        shape=(3, 4),
        method="lora",
        container="tensor",
        options={"rank": 2, "alpha": 2.0},
        num_params=14,
    )
    A, B = torch.randn(2, 4), torch.randn(3, 2)
    full_A, full_B = full_row_factors(site, A, B, 7)
    expected = torch.zeros(7, 4)
    expected[[1, 2, 5]] = B @ A
    assert torch.equal(full_B @ full_A, expected)


def test_stacked_factors_are_the_sum_of_their_changes() -> None:
    parts = [(torch.randn(r, 5), torch.randn(6, r), alpha) for r, alpha in ((2, 4.0), (3, 3.0))]
    A, B, alpha = stack_factors(parts)
    expected = sum((a / A_.shape[0]) * (B_ @ A_) for A_, B_, a in parts)
    assert torch.allclose(alpha / A.shape[0] * (B @ A), torch.as_tensor(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "pefd"}, "nearest: 'peft'"),
        ({"to": "hf", "type": "f32"}, "--to hf does not read --type"),
        ({"to": "peft", "drop_extras": True, "bake_extras": "x"}, "exclude each other"),
    ],
)
def test_wrong_requests_are_refused(options: dict[str, object], words: str, all_core: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        export(ExportConfig(run=str(all_core), out=str(tmp_path / "x"), **options))  # type: ignore[arg-type]


def test_nothing_is_overwritten(all_core: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").mkdir()
    for to in target_names():
        with pytest.raises(ConfigError, match="exists already"):
            export(ExportConfig(run=str(all_core), to=to, out=str(tmp_path / "x.gguf")))


def test_an_adapter_without_low_rank_factors_is_no_peft_adapter(base: Path, tmp_path: Path) -> None:
    core = _adapter(base, "core", tmp_path / "core")
    with pytest.raises(ConfigError, match="nothing that a PEFT layer could apply"):
        export(ExportConfig(run=str(core), to="peft", out=str(tmp_path / "peft")))


@pytest.mark.usefixtures("in_process")
def test_an_exported_peft_directory_is_not_taken_for_ours(rows: Path, base: Path, tmp_path: Path) -> None:
    """It has no plan and no digests, so loading it as ours says so instead of guessing."""
    export(ExportConfig(run=str(rows), to="peft", out=str(tmp_path / "peft")))
    with pytest.raises(adapter_files.AdapterMismatch, match=r"ssmtune\.json"):
        load(load_model(str(base)), tmp_path / "peft")


@pytest.mark.usefixtures("in_process")
def test_engines_get_one_rank_and_no_module_that_they_would_drop(rows: Path, all_core: Path, tmp_path: Path) -> None:
    """vLLM reads no rank_pattern: with one rank and alpha = rank everywhere there is none to miss."""
    record = export(ExportConfig(run=str(rows), to="vllm", out=str(tmp_path / "vllm")))
    assert record["check"]["export_to_trained"]["max"] < SAME
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (7, 7.0, {}, {})
    with pytest.raises(ConfigError, match="sglang applies no LoRA to in_proj of 'granitemoehybrid'"):
        export(ExportConfig(run=str(rows), to="sglang", out=str(tmp_path / "sglang")))
    with pytest.raises(ConfigError, match=r"ssm\.A_log.*would be lost"):
        export(ExportConfig(run=str(all_core), to="vllm", out=str(tmp_path / "core")))
    assert [p.name for p in tmp_path.iterdir()] == ["vllm"]


def test_modules_that_stock_peft_refuses_are_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mamba-2's out_proj trains under ssmtune; stock PEFT would raise on it, so it is baked or dropped, not written."""
    directory = tmp_path / "mamba2"
    case = ("mamba2", sorted(get_family("mamba2").tiny_configs())[0])
    model = tiny_model(case)
    model.resize_token_embeddings(6144, mean_resizing=False)
    model.save_pretrained(directory)
    load_tokenizer("tiny-granite-h").save_pretrained(directory)
    both = Recipe(name="both", edits=(Edit(method="lora", select=("ssm.in", "ssm.out"), options={"rank": 2}),))
    adapter = _adapter(directory, both, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"\(ssm\.out\) do not fit"):
        export(ExportConfig(run=str(adapter), to="peft", out=str(tmp_path / "peft")))
    monkeypatch.setattr("ssmtune.export.peft.plain_logits", _logits_here)
    out, baked = tmp_path / "peft", tmp_path / "baked"
    record = export(ExportConfig(run=str(adapter), to="peft", out=str(out), bake_extras=str(baked)))
    assert record["check"]["export_to_trained"]["max"] < SAME
    record = export(ExportConfig(run=str(adapter), to="peft", out=str(tmp_path / "less"), drop_extras=True))
    assert record["check"]["plain_to_expected"]["max"] < SAME < record["check"]["export_to_trained"]["max"]


def test_hf_holds_an_additional_scan_as_a_larger_state(base: Path, in_process: None, tmp_path: Path) -> None:
    scan = Recipe(name="scan", edits=(Edit(method="additional_scan", select=("state.additional_scan",)),))
    directory = _adapter(base, scan, tmp_path / "adapter")
    record = export(ExportConfig(run=str(directory), to="hf", out=str(tmp_path / "hf"), dtype="float32"))
    assert record["check"]["merged_to_adapted"]["max"] < SAME
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))
    assert config["mamba_d_state"] == load_model(str(base)).config.mamba_d_state + 8


def test_pissa_arrives_as_factors_of_twice_the_rank(base: Path, tmp_path: Path, in_process: None) -> None:
    """The start that is subtracted becomes further rows and columns; the base stays as it is."""
    options = {"rank": 3, "alpha": 6.0, "init": "pissa", "scaling": "rs"}
    recipe = Recipe(name="pissa", edits=(Edit(method="lora", select=("attn.q", "ssm.in.x"), options=options),))
    run = _adapter(base, recipe, tmp_path / "pissa")
    record = export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))
    assert record["check"]["ok"] and record["check"]["export_to_trained"]["max"] < SAME
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["init_lora_weights"] is True and not config["use_rslora"]


def _allocated(run: Path, prune: tuple[str, ...]) -> None:
    """Put lambdas into a saved AdaLoRA adapter as an allocation leaves them: half of each pruned, at `prune` all."""
    path = run / "ssmtune.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith("lora_lambda"):
            value[1::2] = 0
            if name.startswith(prune):
                value.zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    facts = json.loads((run / "ssmtune.json").read_text())
    facts["sha256"][path.name] = file_sha256(path)
    (run / "ssmtune.json").write_text(json.dumps(facts))


ADALORA = Recipe(
    name="adalora",
    edits=(
        Edit(method="adalora", select=("ssm.in.x", "ssm.in.dt"), options={"rank": 4, "alpha": 6.0}),
        Edit(method="adalora", select=("attn.q", "attn.v"), options={"rank": 3, "alpha": 9.0}),
    ),
)


def test_adalora_arrives_as_factors_of_the_ranks_that_are_left(base: Path, tmp_path: Path, in_process: None) -> None:
    """Of two sites of one tensor, of one without a triplet left, and of another initial rank; also for an engine."""
    run = _adapter(base, ADALORA, tmp_path / "adalora")
    _allocated(run, ("model.layers.1.self_attn.v_proj",))
    record = export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))
    assert record["check"]["export_to_trained"]["max"] < SAME
    assert max(own_logits_apart(base, run)) > 100 * SAME
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ranks = {name.split(".")[-3]: tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {"in_proj": 2 + 2, "q_proj": 2, "v_proj": 1}
    record = export(ExportConfig(run=str(run), to="vllm", out=str(tmp_path / "vllm")))
    assert record["check"]["export_to_trained"]["max"] < SAME


def own_logits_apart(base: Path, run: Path) -> list[float]:
    """How far the adapter moves the logits of each of two prompts."""
    prompts = [[5, 9, 4, 17], [300, 2, 8]]
    expected = own_logits(load_model(str(base)), prompts)
    found = own_logits(load(load_model(str(base)), run), prompts)
    return [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]


def test_a_triplet_of_the_wrong_weight_is_seen(
    base: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the scale of the rank that is left, not of the initial one."""
    run = _adapter(base, ADALORA, tmp_path / "adalora")
    _allocated(run, ())
    monkeypatch.setattr(factors, "alpha_for", lambda site, A: float(site.options["alpha"]))
    with pytest.raises(CheckFailed, match="not written"):
        export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))


DORA = {
    "projections": Recipe(name="dora", edits=(Edit(method="dora", select=("attn.q", "ssm.in"), options={"rank": 3}),)),
    "rows beside factors": Recipe(
        name="rows",
        edits=(
            Edit(method="dora", select=("ssm.in.x",), options={"rank": 3, "alpha": 6.0}),
            Edit(method="lora", select=("ssm.in.B",), options={"rank": 2, "alpha": 3.0}),
            Edit(method="adalora", select=("attn.v",), options={"rank": 2}),
        ),
    ),
}


@pytest.mark.parametrize("name", DORA)
def test_dora_loads_in_stock_peft(base: Path, tmp_path: Path, in_process: None, name: str) -> None:
    """PEFT's own layers as they are; rows with magnitudes for the whole tensor, and plain factors in the same adapter."""
    run = _adapter(base, DORA[name], tmp_path / "dora")
    record = export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))
    assert record["check"]["export_to_trained"]["max"] < SAME
    assert max(own_logits_apart(base, run)) > 100 * SAME
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["use_dora"] is True and config["peft_type"] == "LORA"
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    magnitudes = {name.split(".")[-2]: tensor.shape for name, tensor in tensors.items() if "magnitude" in name}
    assert magnitudes["in_proj"] == (2 * 64 + 2 * 16 + 8,)


def test_dora_beside_a_core_needs_a_new_base(base: Path, tmp_path: Path, in_process: None) -> None:
    both = Recipe(name="both", edits=(*DORA["projections"].edits, Edit(method="core", select=("ssm.dt_bias",))))
    run = _adapter(base, both, tmp_path / "dora")
    with pytest.raises(ConfigError, match=r"ssm\.dt_bias.*--bake-extras"):
        export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))
    out, baked = tmp_path / "peft", tmp_path / "baked"
    record = export(ExportConfig(run=str(run), to="peft", out=str(out), bake_extras=str(baked)))
    assert record["check"]["export_to_trained"]["max"] < SAME


def test_a_magnitude_in_the_wrong_row_is_seen(
    base: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = magnitudes.saved_magnitude

    def rolled(*arguments: Any) -> torch.Tensor | None:
        magnitude = found(*arguments)
        return None if magnitude is None else magnitude.roll(1)

    monkeypatch.setattr(magnitudes, "saved_magnitude", rolled)
    run = _adapter(base, DORA["projections"], tmp_path / "dora")
    with pytest.raises(CheckFailed, match="not written"):
        export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))


def test_dora_on_raw_tensors_is_an_extra(tmp_path: Path, in_process: None) -> None:
    """Mamba-1's dt_proj is read past its module, and stock PEFT refuses out_proj: both are baked, or given up as a whole."""
    directory = tmp_path / "base"
    model = tiny_model(("mamba", "biases"))
    model.resize_token_embeddings(6144, mean_resizing=False)
    model.save_pretrained(directory)
    load_tokenizer("tiny-granite-h").save_pretrained(directory)
    run = _adapter(
        directory,
        Recipe(name="r", edits=(Edit(method="dora", select=("recurrent",), options={"rank": 2}),)),
        tmp_path / "dora",
    )
    with pytest.raises(ConfigError, match=r"ssm\.dt_proj, ssm\.out.* do not fit into PEFT's format"):
        export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))
    out, baked = tmp_path / "peft", tmp_path / "baked"
    record = export(ExportConfig(run=str(run), to="peft", out=str(out), bake_extras=str(baked)))
    assert record["check"]["export_to_trained"]["max"] < SAME
    record = export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "less"), drop_extras=True))
    assert record["check"]["plain_to_expected"]["max"] < SAME < record["check"]["export_to_trained"]["max"]


@pytest.mark.parametrize("to", ["vllm", "gguf_lora"])
def test_programs_without_magnitudes_refuse_dora(base: Path, tmp_path: Path, to: str) -> None:
    run = _adapter(base, DORA["projections"], tmp_path / "dora")
    with pytest.raises(
        ConfigError, match=r"have magnitudes of their rows, trained by 'dora'; .* applies A and B alone"
    ):
        export(ExportConfig(run=str(run), to=to, out=str(tmp_path / "out")))


def test_rows_that_a_magnitude_cannot_stand_for_are_refused(base: Path, tmp_path: Path, in_process: None) -> None:
    """Rows of the same tensor that only a new base could hold, and rows of zeros, by whose norm PEFT would divide."""
    rows = Edit(method="dora", select=("ssm.in.x",), options={"rank": 2})
    beside = Recipe(name="beside", edits=(rows, Edit(method="prodial", select=("ssm.in.dt",), options={"rank": 2})))
    run = _adapter(base, beside, tmp_path / "beside")
    config = ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft"), bake_extras=str(tmp_path / "baked"))
    with pytest.raises(
        ConfigError, match=r"in_proj\.weight: PEFT's DoRA holds a magnitude for every row.* ssm\.in\.dt of"
    ):
        export(config)
    model = load_model(str(base))
    with torch.no_grad():
        model.get_parameter("model.layers.0.mamba.in_proj.weight")[-2:] = 0
    model.save_pretrained(tmp_path / "zeros")
    load_tokenizer(str(base)).save_pretrained(tmp_path / "zeros")
    run = _adapter(tmp_path / "zeros", Recipe(name="rows", edits=(rows,)), tmp_path / "rows")
    with pytest.raises(ConfigError, match=r"in_proj\.weight: 2 of its rows are zero with what was trained"):
        export(ExportConfig(run=str(run), to="peft", out=str(tmp_path / "peft")))
    assert not (tmp_path / "peft").exists() and not (tmp_path / "baked").exists()
