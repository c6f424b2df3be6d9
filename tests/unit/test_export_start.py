"""Exports of what acts where a sequence starts: plain transformers, its cache and a short loader give the adapted model."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import Case, logits_of, randomise, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from tolerances import largest_difference
from transformers import AutoModelForCausalLM

from ssmtune.attach import attach, load
from ssmtune.errors import AttachError, CheckFailed, ConfigError
from ssmtune.export import ExportConfig, export
from ssmtune.export.plain import Started, own_logits
from ssmtune.methods.base import get_method, method_names
from ssmtune.models import load_model, load_tokenizer
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.verify.forward import STEP_TOLERANCE

LIMIT = STEP_TOLERANCE[torch.float32]
WITH_STATES = tuple(
    (case, recipe)
    for case in (("granite_hybrid", "dense"), ("falcon_h1", "odd"), ("mamba2", "tied"), ("qwen3_next", "odd"))
    for recipe in ("initial-state", "affix")
)
ONE_BY_ONE = ((("mamba", "biases"), "initial-state"), (("jamba", "dense"), "affix"))
WITH_TOKENS = ((("granite_hybrid", "dense"), "prompt"), (("llama", "dense"), "prefix"))
EVERY = (*WITH_STATES, *ONE_BY_ONE, *WITH_TOKENS)
IDS = ["-".join((*case, recipe)) for case, recipe in EVERY]
NUM_NEW = 3


def started_here(model: str, prompts: Sequence[Sequence[int]], *, dtype: str = "auto") -> Started:
    """What the fresh process computes, in this one, which has imported torch already: seconds for each call."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    start = runpy.run_path(str(Path(model) / "load_start.py"))["start"]
    found = Started(prompts=[], generated=[], steps=[])
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            found.prompts.append(loaded(**start(loaded, ids)).logits[0].float())
            output = loaded.generate(
                **start(loaded, ids),
                max_new_tokens=NUM_NEW,
                min_new_tokens=NUM_NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found.generated.append(output.sequences[0, -NUM_NEW:].tolist())
            found.steps.append(torch.cat(output.logits).float())
    return found


def stay_here(patch: pytest.MonkeyPatch) -> None:
    """Short prompts of any vocabulary, no process for each export."""
    patch.setattr("ssmtune.export.cache_start.plain_started", started_here)
    patch.setattr("ssmtune.export.hf.prompt_tokens", lambda model: [[5, 9, 4, 17, 6], [8, 3]])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_here(monkeypatch)


def adapter(case: Case, recipe: str | Recipe, directory: Path) -> ExportConfig:
    """A base model and an adapter of it that does something; how to export it."""
    tiny_model(case).save_pretrained(directory / "base")
    base = load_model(str(directory / "base"))
    adapted = attach(base, make_plan(base, recipe))
    randomise(adapted, scale=0.5)
    adapted.save_pretrained(directory / "adapter")
    return ExportConfig(run=str(directory / "adapter"), to="hf", out=str(directory / "hf"))


def adapted_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the adapted model in ssmtune."""
    return logits_of(load(load_model(str(directory / "base")), directory / "adapter"), tokens, use_cache=False)


FRESH = """
import sys
sys.modules["ssmtune"] = None
import importlib, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
out = {}
with torch.no_grad():
    for i, directory in enumerate(sys.argv[2:]):
        sys.path.insert(0, directory)
        start = importlib.import_module("load_start").start
        del sys.modules["load_start"], sys.path[0]
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokens = load_file(directory + "/../tokens.safetensors")["tokens"]
        out[f"{i}.logits"] = model(**start(model, tokens)).logits
        out[f"{i}.without"] = model(tokens).logits
        model.generation_config.eos_token_id = None
        out[f"{i}.generated"] = model.generate(**start(model, tokens), max_new_tokens=3, do_sample=False)
save_file({name: value.contiguous() for name, value in out.items()}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Each case exported, and what one process that cannot import ssmtune makes of two rows of tokens, by id."""
    root = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        stay_here(patch)
        for name, (case, recipe) in zip(IDS, EVERY, strict=True):
            (root / name).mkdir()
            record = export(adapter(case, recipe, root / name))
            assert record["check"]["one_by_one"] is ((case, recipe) in ONE_BY_ONE)
            save_file({"tokens": tiny_tokens(case, 2, 6)}, root / name / "tokens.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(root / "out"), *(str(root / i / "hf") for i in IDS)]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    found = load_file(root / "out")
    kinds = ("logits", "without", "generated")
    return {name: (root / name, {kind: found[f"{i}.{kind}"] for kind in kinds}) for i, name in enumerate(IDS)}


@pytest.mark.parametrize("name", IDS)
def test_a_process_without_ssmtune_gives_the_adapted_model(
    fresh: dict[str, tuple[Path, dict[str, torch.Tensor]]], name: str
) -> None:
    """Logits of the prompt (of its last token where the loader reads the others), and the tokens generated after it."""
    directory, found = fresh[name]
    tokens = load_file(directory / "tokens.safetensors")["tokens"]
    expected = adapted_logits(directory, tokens)
    num_left = found["logits"].shape[1]
    assert num_left == (1 if EVERY[IDS.index(name)] in ONE_BY_ONE else tokens.shape[1])
    assert largest_difference(found["logits"], expected[:, -num_left:]) <= LIMIT
    assert largest_difference(found["without"], expected) > 100 * LIMIT
    whole = torch.cat([tokens[:, :-num_left], found["generated"]], dim=1)
    chosen = adapted_logits(directory, whole)[:, tokens.shape[1] - 1 : -1].argmax(dim=-1)
    assert torch.equal(chosen, whole[:, tokens.shape[1] :])


def test_ssmtune_does_not_take_the_weights_alone_for_the_model(
    fresh: dict[str, tuple[Path, dict[str, torch.Tensor]]],
) -> None:
    with pytest.raises(ConfigError, match="what its sequences start from, which no weight holds"):
        load_model(str(fresh["mamba2-tied-affix"][0] / "hf"))


def test_padding_is_refused_by_the_loader(fresh: dict[str, tuple[Path, dict[str, torch.Tensor]]]) -> None:
    """Plain transformers lets a state decay over padding, and says nothing."""
    directory = fresh["granite_hybrid-dense-initial-state"][0] / "hf"
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    start = runpy.run_path(str(directory / "load_start.py"))["start"]
    tokens, mask = torch.tensor([[0, 0, 5, 9], [3, 8, 4, 7]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding would wear off"):
        start(model, tokens, mask)
    inputs = start(model, tokens)
    expected = logits_of(
        model, tokens[:1, 2:], **{k: v for k, v in start(model, tokens[:1, 2:]).items() if k != "input_ids"}
    )
    found = logits_of(model, tokens, past_key_values=inputs["past_key_values"], attention_mask=mask)
    assert largest_difference(found[:1, 2:], expected) > 100 * LIMIT


@pytest.mark.parametrize("name", ["mamba-biases-initial-state", "granite_hybrid-dense-affix"])
def test_beams_start_as_the_adapted_models_do(
    fresh: dict[str, tuple[Path, dict[str, torch.Tensor]]], name: str
) -> None:
    """Each has a row of the cache, also where the loader reads the prompt itself."""
    directory = fresh[name][0]
    model = AutoModelForCausalLM.from_pretrained(directory / "hf").eval()
    adapted = load(load_model(str(directory / "base")), directory / "adapter")
    start = runpy.run_path(str(directory / "hf" / "load_start.py"))["start"]
    tokens = tiny_tokens(EVERY[IDS.index(name)][0], 4, 3)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    for each in (model, adapted.get_base_model()):
        each.generation_config.eos_token_id = None
    expected = adapted.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)[:, 3:]
    found = model.generate(**start(model, tokens, num_beams=3), **options)[:, -3:]
    assert torch.equal(found, expected)
    alone = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)[:, 3:]
    assert not torch.equal(alone, expected)


def _damaged(change: Any) -> Any:
    def run(model: str, *arguments: Any, **options: Any) -> Started:
        path = Path(model) / "start.safetensors"
        if "ONE_BY_ONE = False" in (Path(model) / "load_start.py").read_text(encoding="utf-8"):
            save_file({name: change(name, value) for name, value in load_file(path).items()}, path)
        return started_here(model, *arguments, **options)

    return run


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ("initial-state", lambda name, value: torch.zeros_like(value) if name == "0.state" else value),
        ("initial-state", lambda name, value: value.flip(0).contiguous() if name == "2.state" else value),
        ("affix", lambda name, value: value.roll(1, -1) if name == "0.window" else value),
        ("prompt", lambda name, value: value.flip(-2).contiguous() if name.endswith(".values") else value),
    ],
    ids=["state of zeros", "heads in another order", "window off by one", "values in another order"],
)
def test_a_start_that_arrives_otherwise_is_not_left_behind(
    recipe: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssmtune.export.cache_start.plain_started", _damaged(change))
    config = adapter(("granite_hybrid", "dense"), recipe, tmp_path)
    with pytest.raises(CheckFailed, match="not written.*with a prompt in one call.*one token at a time"):
        export(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_beside_weights_in_bfloat16_from_a_fresh_process(tmp_path: Path) -> None:
    """Factors in the weights, a start in the cache; the record has what rounding did, the model card how to use it."""
    directory = tmp_path / "base"
    model = tiny_model(("granite_hybrid", "dense"))
    # Rounding can be large where a norm divides by next to nothing: not at these weights, new rows and factors included.
    torch.manual_seed(0)
    model.resize_token_embeddings(6144, mean_resizing=False)
    model.bfloat16().save_pretrained(directory)
    load_tokenizer("tiny-granite-h").save_pretrained(directory)
    base = load_model(str(directory))
    both = Recipe(
        name="both",
        edits=(
            Edit(method="lora", select=("attn.q", "ssm.in"), options={"rank": 2}),
            Edit(method="affix", select=("state.affix",), options={"num_tokens": 2}),
        ),
    )
    adapted = attach(base, make_plan(base, both))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    record = export(ExportConfig(run=str(tmp_path / "adapter"), to="hf", out=str(tmp_path / "hf")))
    check = record["check"]
    assert check["prompts_to_expected"]["max"] <= LIMIT and check["generated_to_expected"]["max"] <= LIMIT
    assert check["merged_to_adapted"]["max"] > LIMIT
    assert {"load_start.py", "start.safetensors", "tokenizer.json"} <= set(record["files"])
    assert "load_start import start" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "hf" / "start.safetensors").values())
    # As users load it, in the dtype of the file: as far as rounding moves it, and no further.
    prompts = [[5, 9, 4, 17, 6]]
    (rounded,) = started_here(str(tmp_path / "hf"), prompts).prompts
    (expected,) = own_logits(load(load_model(str(directory)), tmp_path / "adapter"), prompts)
    (without,) = own_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), prompts)
    assert largest_difference(rounded, expected) < 0.2 * largest_difference(without, expected)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("state-offset-h", "'state_offset_h' adds what each C reads of a constant state to the output"),
        ("state-offset-y", "'state_offset_y' adds a constant to the recurrence's output"),
        ("hankel", "'hankel' runs a module beside a block, with a memory that no cache of transformers keeps"),
        ("memba", "'memba' moves the gate by membranes"),
    ],
)
def test_what_acts_at_every_token_is_refused_by_name(recipe: str, words: str, tmp_path: Path) -> None:
    config = adapter(("granite_hybrid", "dense"), recipe, tmp_path)
    with pytest.raises(ConfigError, match=f"neither in a weight nor in a cache: {words}.*ssmtune.load"):
        export(config)
    assert not (tmp_path / "hf").exists()


def test_every_method_says_where_plain_transformers_can_hold_it() -> None:
    """In a weight, in what a sequence starts from, in a larger state, or why nowhere."""
    for name in method_names():
        method = get_method(name)
        held = method.mergeable or method.acts_at_start or name == "additional_scan"
        assert held is not bool(method.at_every_token), name


def test_a_start_beside_an_additional_scan_is_refused(tmp_path: Path) -> None:
    both = Recipe(
        name="both",
        edits=(
            Edit(method="additional_scan", select=("state.additional_scan",)),
            Edit(method="initial_state", select=("state.initial_state",)),
        ),
    )
    with pytest.raises(ConfigError, match="initial_state beside an additional scan"):
        export(adapter(("granite_hybrid", "dense"), both, tmp_path))


def test_a_cache_of_another_kind_is_refused(tmp_path: Path, in_process: None) -> None:
    with pytest.raises(AttachError, match="xlstm model keeps its states in a cache of its own kind"):
        export(adapter(("xlstm", "dense"), "initial-state", tmp_path))
    assert not (tmp_path / "hf").exists()


def test_steps_that_transformers_computes_otherwise_are_seen(tmp_path: Path, in_process: None) -> None:
    """A floor of dt that its scan keeps and its single step does not: right for prompts, and not for what is generated."""
    with pytest.raises(
        CheckFailed,
        match=r"one call: logits of the prompt differ by \S+e-0\S+ of the largest, of gen\S+ tokens by 0\.0",
    ):
        export(adapter(("zamba2", "odd"), "initial-state", tmp_path))
    assert not (tmp_path / "hf").exists()
