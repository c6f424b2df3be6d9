"""The matched sisters: their fast forward against transformers', equal sizes, one number of steps, a tiny run."""

from __future__ import annotations

import dataclasses
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import OP_FP64, relative_rms
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ssmtune.errors import ConfigError, TrainingFailed
from ssmtune.models import load_model
from ssmtune.ops.gated_delta_rule import gated_delta_rule_recurrence
from ssmtune.records import read_record

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import matched_forward  # noqa: E402
import pretrain  # noqa: E402
import pretrain_matched  # noqa: E402

SISTERS = pretrain_matched.load_sisters(pretrain_matched.SISTERS_PATH)
MICRO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "intermediate_size": 24,
    "shared_intermediate_size": 24,
    "head_dim": 8,
    "attention_multiplier": 8**-0.5,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


def micro(name: str) -> pretrain.PretrainConfig:
    """The sister's config at a small size: `MICRO` in place of what it has."""
    model = SISTERS[name].model
    small = {key: value for key, value in MICRO.items() if key in model}
    return dataclasses.replace(
        SISTERS[name],
        model=model | small,
        sequence_length=24,
        batch_rows=4,
        warmup_steps=1,
        ssd_chunk=8,
        sample_tokens=2,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(pretrain.TOKENIZER_PATH)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_the_inverse_of_a_triangle(size: int) -> None:
    strict = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1) / 4
    found = matched_forward.unit_lower_inverse(strict)
    assert relative_rms(found, torch.linalg.inv(torch.eye(size, dtype=torch.float64) + strict)) <= OP_FP64


@pytest.mark.parametrize("length", [1, 16, 37])
def test_the_delta_rule_and_its_gradients_equal_the_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, length, 3, *shape, dtype=torch.float64, generator=generator)

    inputs = [normal(4), normal(4), normal(5), -(normal() - 1).exp(), normal().sigmoid()]
    inputs = [value.requires_grad_() for value in inputs]
    found = matched_forward.delta_rule(*inputs, chunk=16)
    expected, _ = gated_delta_rule_recurrence(*inputs, qk_l2norm=True)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    assert relative_rms(found.detach(), expected.detach()) <= OP_FP64
    gradients = (torch.autograd.grad((o * weights).sum(), inputs) for o in (found, expected))
    for one, other in zip(*gradients, strict=True):
        # `relative_rms` is absolute where the truth is zero: one step has no decay to differentiate.
        assert relative_rms(one, other) <= OP_FP64


@pytest.mark.parametrize("name", SISTERS)
def test_fast_forward_equals_transformers(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = pretrain_matched.build_sister(micro(name), tokenizer).double()
    rows = torch.randint(5, 6144, (2, 38), generator=torch.Generator().manual_seed(0))
    fast = matched_forward.MatchedForward(model, chunk=8, is_compiled=False).loss(rows)
    fast_gradients = torch.autograd.grad(fast, list(model.parameters()))
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    standard = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    standard_gradients = torch.autograd.grad(standard, list(model.parameters()))
    # transformers computes norms and recurrences in fp32 whatever the dtype of the weights.
    torch.testing.assert_close(fast, standard, rtol=1e-6, atol=1e-6)
    for (path, _), one, other in zip(model.named_parameters(), fast_gradients, standard_gradients, strict=True):
        assert (one - other).norm() / other.norm().clamp_min(1e-6) < 1e-4, path


def test_sisters_are_of_one_size(tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.device("meta"):
        models = {name: pretrain_matched.build_sister(config, tokenizer) for name, config in SISTERS.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert len({getattr(model.config, field) for model in models.values()}) == 1, field


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba2-sequential", {"residual_multiplier": 0.5}, r"residual_multiplier: got 0\.5"),
        ("mamba2-parallel", {"ssm_multipliers": [1.0, 1.0, 2.0, 1.0, 1.0]}, "ssm_multipliers: got"),
        ("delta-parallel", {"linear_num_value_heads": 4}, r"linear_num_value_heads: got \(2, 4\)"),
        ("delta-sequential", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "partial_rotary_factor"),
    ],
)
def test_what_the_fast_forward_leaves_out_is_refused(
    name: str, changes: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = micro(name)
    model = pretrain_matched.build_sister(dataclasses.replace(config, model=config.model | changes), tokenizer)
    with pytest.raises(ConfigError, match=message):
        matched_forward.MatchedForward(model, chunk=8, is_compiled=False)


def test_all_take_the_steps_of_the_slowest() -> None:
    speeds = {"quick": 0.01, "slow": 0.1}
    assert pretrain_matched.agreed_steps(2400, speeds, max_seconds=170, warmup_steps=200) == 1700
    assert pretrain_matched.agreed_steps(1000, speeds, max_seconds=170, warmup_steps=200) == 1000
    assert pretrain_matched.agreed_steps(2400, speeds, max_seconds=1, warmup_steps=200) == 480


def test_sisters_wait_for_each_other_but_not_for_a_failed_one(tmp_path: Path) -> None:
    def sister(name: str, timeout_s: float) -> pretrain_matched.Agreement:
        return pretrain_matched.Agreement(folder=tmp_path, name=name, names=("a", "b", "c"), timeout_s=timeout_s)

    assert sister("a", 0.0).gather("speed", 1.0) == {"a": 1.0}
    (tmp_path / "c.failed").write_text("1")
    assert sister("b", 60.0).gather("speed", 2.0) == {"a": 1.0, "b": 2.0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for name, numbers in (("train-00", range(40)), ("valid", range(40, 44))):
        text = "\n<|doc|>\n".join(f"Document {i} says that {i} plus {i} is {2 * i}.\n" for i in numbers)
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A table."}]
    (folder / "instructions.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 20)
    arguments = ["--corpus", str(folder), "--instructions", str(folder / "instructions.jsonl")]
    pretrain.main(["pack", *arguments, "--out", str(folder / "arrays")])
    return folder / "arrays"


def run(name: str, packed: Path, out: Path, *, num_steps: int, max_seconds: float | None = None) -> dict[str, Any]:
    agreement = pretrain_matched.Agreement(folder=out / "agree", name=name, names=(name,))
    return pretrain_matched.train(
        name,
        micro(name),
        data_path=packed,
        tokenizer_path=pretrain.TOKENIZER_PATH,
        out_path=out,
        num_steps=num_steps,
        max_seconds=max_seconds,
        agreement=None if max_seconds is None else agreement,
        try_compile=False,
    )


def test_a_short_run_writes_a_loadable_checkpoint_and_a_record(packed: Path, tmp_path: Path) -> None:
    run("delta-parallel", packed, tmp_path, num_steps=3)
    record = read_record(tmp_path / "pretrain.json", kind="pretrain")
    assert (record["status"], record["num_steps"], record["num_tokens"]) == ("done", 3, 3 * 4 * 24)
    assert record["parity_fp32"]["max_logit_difference"] < 1e-4
    assert len(record["loss_curve"]["points"]) == 3
    assert len(record["samples"]) == 16
    model = load_model(str(tmp_path))
    assert (model.config.model_type, model.dtype) == ("parallel_gated_delta", torch.bfloat16)


def test_sisters_see_the_same_rows(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("transformer", "mamba2-parallel"):
        loss = matched_forward.MatchedForward.loss

        def note(self: Any, rows: torch.Tensor, name: str = name, loss: Any = loss) -> torch.Tensor:
            seen.setdefault(name, []).append(rows.clone())
            return loss(self, rows)

        with monkeypatch.context() as patch:
            patch.setattr(matched_forward.MatchedForward, "loss", note)
            run(name, packed, tmp_path / name, num_steps=2)
    one, other = seen.values()
    assert len(one) == 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_out_of_time_is_stopped_and_says_so(packed: Path, tmp_path: Path) -> None:
    record = run("transformer", packed, tmp_path, num_steps=400, max_seconds=1e-3)
    assert record["status"] == "aborted"
    assert record["num_steps"] < 5


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(TrainingFailed, match="loss of step 0 is nan"):
        pretrain_matched._note_loss(pretrain_matched.Progress(num_steps=1), float("nan"))
