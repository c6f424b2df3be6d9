"""The pretraining recipe: its scan against the recurrence, its forward against transformers', tokenizer, tiny runs."""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, GraniteMoeHybridForCausalLM, PreTrainedTokenizerFast

from ssmtune.errors import ConfigError, DataError
from ssmtune.records import read_record

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import pretrain  # noqa: E402
import train_tokenizer  # noqa: E402

MICRO_MODEL = {
    "vocab_size": 6144,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "position_embedding_type": "nope",
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "embedding_multiplier": 12.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.125,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Tensors are so small here that threads waiting for each other on a busy machine cost most of the time.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(pretrain.TOKENIZER_PATH)


def scan_step_by_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence as the paper writes it, one position at a time."""
    batch, length, heads, head_dim = x.shape
    B, C = (v.repeat_interleave(heads // v.shape[2], dim=2) for v in (B, C))
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1])
    outputs = []
    for t in range(length):
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + update
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def draw_scan_inputs(length: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    dt = torch.nn.functional.softplus(normal(2, length, 4) - 2)
    inputs = [normal(2, length, 4, 3), dt, -normal(4).exp(), normal(2, length, groups, 5), normal(2, length, groups, 5)]
    return [v.requires_grad_() for v in (*inputs, normal(4))]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 7, 16, 37, 64])
def test_scan_and_its_gradients_equal_the_recurrence(length: int, groups: int) -> None:
    inputs = draw_scan_inputs(length, groups)
    found = pretrain.ssd(*inputs, chunk=16)
    expected = scan_step_by_step(*inputs)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found_gradients = torch.autograd.grad((found * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    # fp64 sums in another order: a few hundred roundings of 1e-16 on values of order one to ten.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    for name, one, other in zip(("x", "dt", "A", "B", "C", "D"), found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_scan_stays_finite_under_strong_decay() -> None:
    x, dt, A, B, C, D = draw_scan_inputs(64, 1)
    inputs = [v.detach().float().requires_grad_() for v in (x, dt + 5, A - 50, B, C, D)]
    output = pretrain.ssd(*inputs, chunk=16)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert all(v.isfinite().all() for v in (output, *gradients))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\n",
        "  leading and trailing \t ",
        "def f(x):\n\n    return {x: 1}  # done\r\n",
        "".join(map(chr, range(256))),
        "na\u00efve \u4f60\u597d \U0001f642\u200d\U0001f600 \u0301 \ufeff\ufffd \U0010ffff",
        "it's we'll I'D 12345,678.90 don\u2019t",
        "<|doc|> <|endoftext|> <|end_of_tex",
    ],
)
def test_every_text_decodes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    alphabet = train_tokenizer.pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert set(alphabet) <= set(tokenizer.get_vocab())


def test_vocabulary_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == train_tokenizer.VOCAB_SIZE
    for token in train_tokenizer.SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.decode(tokenizer(f"a{token}b")["input_ids"], skip_special_tokens=True) == "ab"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end_of_text|>", "<|pad|>")
    assert tokenizer.padding_side == "left"


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Yes. "}]
    question = "<|start_of_role|>user<|end_of_role|> Hi\n<|end_of_text|>\n"
    answer = "<|start_of_role|>assistant<|end_of_role|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{question}{answer}Yes. <|end_of_text|>\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == question + answer
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "Yes. <|end_of_text|>"


def test_training_a_tokenizer_keeps_special_ids_and_size() -> None:
    small = train_tokenizer.build_tokenizer(["the table of tables, the tables of the table"] * 4, vocab_size=270)
    assert len(small) == 270
    assert small.convert_tokens_to_ids(list(train_tokenizer.SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]


def write_config(folder: Path, **changes: object) -> Path:
    data = yaml.safe_load((RECIPES / "tiny_granite_h.yaml").read_text())
    data |= {"model": MICRO_MODEL, "sequence_length": 24, "batch_rows": 4, "warmup_steps": 1, "ssd_chunk": 8}
    data |= {"sample_tokens": 2, "instruction_share": 0.25, **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    documents = [f"Document {i} says that {i} plus {i} is {2 * i}.\n" for i in range(40)]
    for name, part in (("train-00", documents[:20]), ("train-01", documents[20:36]), ("valid", documents[36:])):
        text = train_tokenizer.DOCUMENT_SEPARATOR.join(part)
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A table."}]
    (folder / "instructions.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 20)
    arguments = ["--corpus", str(folder), "--instructions", str(folder / "instructions.jsonl")]
    pretrain.main(["pack", *arguments, "--out", str(folder / "arrays")])
    return folder / "arrays"


def test_packed_arrays_hold_the_text(packed: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    text = tokenizer.decode(pretrain.read_tokens(packed, manifest["arrays"]["valid"]).tolist())
    assert text.count("<|end_of_text|>") == manifest["valid_documents"] == 4
    assert len(text.replace("<|end_of_text|>", "").encode()) == manifest["valid_bytes"]
    assert text.startswith("Document 36 says")
    chat = tokenizer.decode(pretrain.read_tokens(packed, manifest["arrays"]["instructions"]).tolist())
    assert chat.startswith("<|start_of_role|>user<|end_of_role|>What is it?<|end_of_text|>\n<|start_of_role|>assistant")


def test_an_altered_array_is_refused(packed: Path) -> None:
    entry = json.loads((packed / "manifest.json").read_text())["arrays"]["valid"]
    with pytest.raises(DataError, match="Run 'pack' again"):
        pretrain.read_tokens(packed, entry | {"sha256": "0"})


@pytest.mark.parametrize("num_tokens", [3, 20, 23])
def test_held_out_rows_score_every_token_once(num_tokens: int) -> None:
    tokens = torch.arange(1, num_tokens + 1).numpy().astype("uint16")
    windows = pretrain.held_out_rows(tokens, length=5, end=0, device=torch.device("cpu"))
    assert torch.cat([w[:, 1:].flatten() for w in windows]).tolist() == list(range(1, num_tokens + 1))
    assert windows[0][0, 0] == 0


def test_the_schedule_ends_at_zero(tmp_path: Path) -> None:
    config = pretrain.load_config(write_config(tmp_path, warmup_steps=10, decay_share=0.4))
    factors = [pretrain.learning_rate_factor(step=100, share=s, config=config) for s in (0.0, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert pretrain.learning_rate_factor(step=0, share=0.0, config=config) == pytest.approx(0.1)


def test_an_unknown_config_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'learning_rates'.*nearest: 'learning_rate'"):
        pretrain.load_config(write_config(tmp_path, learning_rates=1.0))


def test_fast_forward_equals_transformers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = pretrain.load_config(write_config(tmp_path))
    model = pretrain.build_model(config, tokenizer).double()
    rows = torch.randint(5, 6144, (2, 38), generator=torch.Generator().manual_seed(0))
    fast = pretrain.FastForward(model, chunk=8, is_compiled=False).loss(rows)
    fast_gradients = torch.autograd.grad(fast, list(model.parameters()))
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    standard = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    standard_gradients = torch.autograd.grad(standard, list(model.parameters()))
    # transformers computes norms and the scan in fp32 whatever the dtype of the weights.
    torch.testing.assert_close(fast, standard, rtol=1e-6, atol=1e-6)
    for (name, _), one, other in zip(model.named_parameters(), fast_gradients, standard_gradients, strict=True):
        scale = other.norm().clamp_min(1e-6)
        assert (one - other).norm() / scale < 1e-4, name


def test_a_failed_compile_falls_back_loudly(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(rows: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda *inputs: refuse(inputs[0]))
    model = pretrain.build_model(pretrain.load_config(write_config(tmp_path)), tokenizer)
    rows = torch.randint(5, 6144, (1, 17))
    forward, facts = pretrain.choose_forward(
        lambda is_compiled: pretrain.FastForward(model, chunk=8, is_compiled=is_compiled), rows, try_compile=True
    )
    assert not forward.is_compiled
    assert facts == {"used": False, "reason": "RuntimeError: no compiler"}
    assert "EAGER" in capsys.readouterr().out


def test_a_short_run_writes_a_loadable_checkpoint_and_a_record(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--config", str(write_config(tmp_path)), "--data", str(packed), "--out", str(out)]
    pretrain.main(["train", *arguments, "--seconds", "60", "--steps", "3", "--no-compile"])
    record = read_record(out / "pretrain.json", kind="pretrain")
    assert record["num_steps"] == 3
    assert record["num_tokens"] == 3 * 4 * 24
    assert len(record["loss_curve"]["points"]) == 3
    assert record["parity_fp32"]["max_logit_difference"] < 1e-4
    assert record["held_out"]["bits_per_byte"] > 0
    assert {s["temperature"] for s in record["samples"]} == {0.0, 0.7}
    assert len(record["samples"]) == 16
    assert record["data"]["arrays"]["corpus"]["sha256"]
    assert record["epochs"]["instructions"] > 0
    model = GraniteMoeHybridForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mamba.A_log.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("A table", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    assert (out / "generation_config.json").exists()


def test_training_lowers_the_loss(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--config", str(write_config(tmp_path, sample_tokens=1)), "--data", str(packed), "--out", str(out)]
    pretrain.main(["train", *arguments, "--seconds", "60", "--steps", "25", "--no-compile"])
    losses = [loss for _, loss in read_record(out / "pretrain.json")["loss_curve"]["points"]]
    assert sum(losses[-5:]) / 5 < losses[0] - 1
