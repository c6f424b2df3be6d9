"""Synthetic studies of adapters with memory: automata, parity and text, on small frozen bases and from scratch.

    python recipes/study_state_tracking.py [--corpus DIR] --out records/studies/state-tracking.json.gz

Everything is made here: the bases are pretrained on a related task (another automaton; other text), every arm trains for
the same number of steps on the same number of parameters, the rate of each is chosen on a seed that is not reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GraniteMoeHybridConfig, LlamaConfig

from ssmtune.attach import AdaptedModel, attach
from ssmtune.errors import RecordError
from ssmtune.models import auto_class
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.records import environment, new_record, read_record, write_json
from ssmtune.stats import METHOD, Comparison, clipped, holm, mean_interval, paired_difference
from ssmtune.truncate import truncate

FIRST_STATE = 4
"""Token of an automaton's state 0; smaller tokens are its inputs."""
TUNING_SEED = 1000
LENGTHS = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Sizes of everything; the same for every arm."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_steps: int = 200
    text_steps: int = 100
    """Steps of the task text, in place of `num_steps`."""
    pretrain_steps: int = 300
    batch_rows: int = 16
    train_length: int = 64
    test_rows: int = 32
    scored_steps: int = 16
    """Accuracy is that of the last so many steps of a test row."""
    text_rows: int = 8
    text_length: int = 128
    text_bytes: int = 400_000
    width: int = 48
    order: int = 8
    eps: float = 0.1
    """Hankel singular values below this share of the first are truncated."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What trains. `edits` empty: the whole model alone, which only a model from scratch can be."""

    base: str
    scratch: bool = False
    edits: tuple[Edit, ...] = ()
    truncated: bool = False
    """Two thirds of the steps at full order, then truncation, then the rest at a third of the rate."""
    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    """Rates among which one is chosen, on half the steps of a seed that is not reported; three for every arm."""


def arms(order: int) -> dict[str, Arm]:
    """Every arm by name; adapters of one base have counts within a few per cent of each other."""

    def branch(method: str, **options: Any) -> tuple[Edit, ...]:
        return (Edit(method=method, select=("block.mlp",), options={"order": order, **options}),)

    def lora(rank: int, *roles: str) -> tuple[Edit, ...]:
        return (Edit(method="lora", select=roles, options={"rank": rank, "alpha": 2.0 * rank, "dropout": 0.0}),)

    slow, fast = (1e-3, 3e-3, 1e-2), (3e-2, 1e-1, 3e-1)
    hankel, complex_hankel = branch("hankel"), branch("hankel", complex_modes=True)
    state = (Edit(method="initial_state", select=("state.initial_state",)),)
    return {
        "lora": Arm(base="transformer", edits=lora(order // 2, "attn.q", "attn.v")),
        "parallel": Arm(base="transformer", edits=branch("parallel"), rates=fast),
        "hankel": Arm(base="transformer", edits=hankel, rates=fast),
        "hankel-complex": Arm(base="transformer", edits=complex_hankel, rates=fast),
        "hankel-truncated": Arm(base="transformer", edits=hankel, rates=fast, truncated=True),
        "scratch": Arm(base="transformer", scratch=True, rates=slow),
        "scratch+hankel": Arm(base="transformer", scratch=True, edits=hankel, rates=slow),
        "scratch+hankel-truncated": Arm(base="transformer", scratch=True, edits=hankel, rates=slow, truncated=True),
        "recurrent:lora": Arm(base="recurrent", edits=lora(3 * order // 4, "ssm.in")),
        "recurrent:initial-state": Arm(base="recurrent", edits=state),
    }


COMPARISONS = (
    ("hankel", "lora"),
    ("hankel", "parallel"),
    ("hankel-complex", "hankel"),
    ("hankel-truncated", "hankel"),
    ("scratch+hankel", "scratch"),
    ("scratch+hankel-truncated", "scratch+hankel"),
    ("recurrent:initial-state", "recurrent:lora"),
)
"""Declared before any run, at every length of every task."""


def make_model(base: str, vocabulary: int, width: int) -> Any:
    """A fresh model of two layers: a transformer, or a Mamba-2 layer under an attention layer, each with an MLP."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 1024,
    }
    config: Any
    if base == "transformer":
        config = LlamaConfig(**common, intermediate_size=2 * width)
    else:
        config = GraniteMoeHybridConfig(
            **common,
            intermediate_size=2 * width,
            shared_intermediate_size=2 * width,
            num_local_experts=0,
            layer_types=["mamba", "attention"],
            mamba_n_heads=4,
            mamba_d_head=width // 2,
            mamba_d_state=16,
            mamba_chunk_size=32,
            position_embedding_type="rope",
            embedding_multiplier=1.0,
        )
    return auto_class(config).from_config(config, dtype=torch.float32)


@dataclass(frozen=True)
class Automaton:
    """Next states [states, inputs]; state 0 is where it starts."""

    table: torch.Tensor

    def batch(self, generator: torch.Generator, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random inputs [rows, length], and the token of the state after each."""
        inputs = torch.randint(self.table.shape[1], (rows, length), generator=generator)
        state, states = torch.zeros(rows, dtype=torch.long), []
        for step in range(length):
            state = self.table[state, inputs[:, step]]
            states.append(state)
        return inputs, FIRST_STATE + torch.stack(states, 1)


def random_automaton(seed: int) -> Automaton:
    """Four states and three inputs: one permutes all states in a cycle, two map them at random, not all to one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(4, generator=generator)
    cycle = torch.empty(4, dtype=torch.long)
    cycle[order] = order.roll(-1)
    columns = [cycle]
    while len(columns) < 3:
        column = torch.randint(4, (4,), generator=generator)
        if len(column.unique()) > 1:
            columns.append(column)
    return Automaton(torch.stack(columns, 1))


PARITY = Automaton(torch.tensor([[0, 1], [1, 0]]))

Batches = Callable[[torch.Generator, int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Text:
    """Bytes; a batch is windows of them and the bytes that follow each."""

    tokens: torch.Tensor

    def batch(self, generator: torch.Generator, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows [rows, length] at random places, and the next bytes."""
        first = torch.randint(len(self.tokens) - length - 1, (rows, 1), generator=generator)
        window = self.tokens[first + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:]


def read_bytes(path: Path, size: int) -> torch.Tensor:
    """The first `size` bytes of a compressed text, int64."""
    with lzma.open(path) as file:
        return torch.tensor(list(file.read(size)))


@dataclass(frozen=True)
class Task:
    """What the base learned before, what each seed's arms learn, and how they are scored."""

    vocabulary: int
    before: Batches
    learned: Callable[[int], Batches]
    tested: Callable[[int], Batches]
    rows: int
    length: int
    test_lengths: tuple[int, ...]
    metric: str


def tasks(config: StudyConfig, corpus: Path | None) -> dict[str, Task]:
    """DFA and parity; and, where a corpus is given, text of two parts of it."""

    def automata(learned: Callable[[int], Batches]) -> Task:
        before = random_automaton(10_000).batch
        rows, length = config.batch_rows, config.train_length
        return Task(8, before, learned, learned, rows, length, LENGTHS, "accuracy")

    given = {
        "dfa": automata(lambda seed: random_automaton(seed).batch),
        "parity": automata(lambda seed: PARITY.batch),
    }
    if corpus is not None:
        first, last, valid = (
            Text(read_bytes(corpus / f"{name}.txt.xz", config.text_bytes)) for name in ("train-00", "train-06", "valid")
        )
        lengths = (config.text_length, 4 * config.text_length)
        given["text"] = Task(
            256,
            first.batch,
            lambda seed: last.batch,
            lambda seed: valid.batch,
            config.text_rows,
            config.text_length,
            lengths,
            "bits per byte",
        )
    return given


def fit(model: Any, batches: Batches, task: Task, *, num_steps: int, rate: float, seed: int) -> float:
    """Train what requires gradients with AdamW on a cosine; return the mean loss of the last tenth of the steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warmup = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
    )
    generator, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for _ in range(num_steps):
        loss = loss_of(model, *batches(generator, task.rows, task.length)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, num_steps // 10) :]
    return sum(last) / len(last)


def loss_of(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each label, [rows, length]."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@torch.no_grad()
def score(model: Any, task: Task, batches: Batches, config: StudyConfig, length: int) -> list[float]:
    """One number for each test row, the same rows for every arm and seed: accuracy of its last steps, or bits per byte."""
    model.eval()
    inputs, labels = batches(torch.Generator().manual_seed(77), config.test_rows, length)
    found: list[float] = []
    for rows, wanted in zip(inputs.split(16), labels.split(16), strict=True):
        if task.metric == "accuracy":
            logits = model(input_ids=rows, use_cache=False).logits[:, -config.scored_steps :]
            found += (logits.argmax(-1) == wanted[:, -config.scored_steps :]).float().mean(1).tolist()
        else:
            found += (loss_of(model, rows, wanted).mean(1) / math.log(2)).tolist()
    return found


def train_arm(
    arm: Arm, state: dict[str, torch.Tensor], task: Task, config: StudyConfig, *, seed: int, rate: float, num_steps: int
) -> tuple[Any, dict[str, Any]]:
    """Return the trained model of an arm, and its trained parameters, last loss and orders after truncation."""
    torch.manual_seed(seed)
    model: Any = make_model(arm.base, task.vocabulary, config.width)
    if not arm.scratch:
        model.load_state_dict(state)
    if arm.edits:
        model = attach(model, make_plan(model, Recipe(name="study", edits=arm.edits)))
    facts: dict[str, Any] = {}
    batches = task.learned(seed)
    first = 2 * num_steps // 3 if arm.truncated else num_steps
    _free(model, arm)
    facts["loss"] = fit(model, batches, task, num_steps=first, rate=rate, seed=seed)
    if arm.truncated:
        assert isinstance(model, AdaptedModel)
        model = truncate(model, eps=config.eps)
        facts["orders"] = [site.options["order"] for site in model.plan.sites]
        _free(model, arm)
        facts["loss"] = fit(model, batches, task, num_steps=num_steps - first, rate=rate / 3, seed=seed + 1)
    facts["num_trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, facts


def _free(model: Any, arm: Arm) -> None:
    if arm.scratch:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


Bases = dict[tuple[str, int], tuple[dict[str, torch.Tensor], float]]
"""Weights and last loss of each pretrained base, by kind and vocabulary; automata and parity share theirs."""


def pretrained(bases: Bases, base: str, task: Task, config: StudyConfig) -> tuple[dict[str, torch.Tensor], float]:
    """Return a base that has learned the task's `before`, trained on the first use."""
    key = (base, task.vocabulary)
    if key not in bases:
        torch.manual_seed(TUNING_SEED)
        model = make_model(base, task.vocabulary, config.width)
        loss = fit(model, task.before, task, num_steps=config.pretrain_steps, rate=3e-3, seed=TUNING_SEED)
        bases[key] = {name: value.clone() for name, value in model.state_dict().items()}, loss
    return bases[key]


def run_task(
    name: str, task: Task, config: StudyConfig, chosen: dict[str, Arm], bases: Bases
) -> Iterator[dict[str, Any]]:
    """Score the bases of a task, choose each arm's rate, and train and score every arm and seed; yield one cell each."""
    for base in dict.fromkeys(arm.base for arm in chosen.values()):
        state, loss = pretrained(bases, base, task, config)
        model = make_model(base, task.vocabulary, config.width)
        model.load_state_dict(state)
        for seed in config.seeds:
            rows = {str(t): score(model, task, task.tested(seed), config, t) for t in task.test_lengths}
            yield {"task": name, "arm": f"base:{base}", "seed": seed, "scores": rows, "loss": loss, "num_trained": 0}
    tunings: dict[str, dict[float, float]] = {}
    for label, arm in chosen.items():
        state, _ = pretrained(bases, arm.base, task, config)
        # A truncated arm takes the rate of its full order.
        whole = label.removesuffix("-truncated")
        if whole not in tunings:
            half, full = config.num_steps // 2, dataclasses.replace(arm, truncated=False)
            tunings[whole] = {
                rate: train_arm(full, state, task, config, seed=TUNING_SEED, rate=rate, num_steps=half)[1]["loss"]
                for rate in arm.rates
            }
        tuning = tunings[whole]
        rate = min(tuning, key=lambda r: tuning[r])
        for seed in config.seeds:
            started = time.process_time()
            model, facts = train_arm(arm, state, task, config, seed=seed, rate=rate, num_steps=config.num_steps)
            rows = {str(t): score(model, task, task.tested(seed), config, t) for t in task.test_lengths}
            cell = {"task": name, "arm": label, "seed": seed, "rate": rate, "scores": rows, **facts}
            yield cell | {"tuning": {f"{r:g}": x for r, x in tuning.items()}, "cpu_s": time.process_time() - started}
        means = {t: round(float(np.mean(v)), 3) for t, v in rows.items()}
        print(f"{name}: {label} rate {rate}, last seed {means}, loss {facts['loss']:.3f}", flush=True)


def summarise(cells: list[dict[str, Any]], given: dict[str, Task]) -> dict[str, Any]:
    """Means over seeds with intervals, and the declared comparisons with p adjusted over all of them (Holm)."""
    table: dict[tuple[str, str, str], list[list[float]]] = {}
    for cell in cells:
        for length, rows in cell["scores"].items():
            table.setdefault((cell["task"], cell["arm"], length), []).append(rows)
    means = []
    for (task, arm, length), rows in table.items():
        interval = mean_interval([float(np.mean(r)) for r in rows])
        interval = clipped(interval) if given[task].metric == "accuracy" else interval
        means.append({"task": task, "arm": arm, "length": length, **interval.to_dict()})
    compared = []
    for (task, arm, length), rows in table.items():
        for one, other in COMPARISONS:
            if arm == one and (task, other, length) in table:
                result = paired_difference(rows, table[task, other, length], seed=0)
                compared.append(
                    Comparison(
                        arm=one, baseline=other, task=f"{task} {length}", metric=given[task].metric, result=result
                    )
                )
    adjusted = holm([c.result.p for c in compared])
    compared = [dataclasses.replace(c, p_holm=p) for c, p in zip(compared, adjusted, strict=True)]
    return {"means": means, "comparisons": [c.to_dict() for c in compared]}


def kept(paths: list[Path], config: dict[str, Any], arms: list[str]) -> list[dict[str, Any]]:
    """Read records of other tasks of the same study; raises RecordError where one has other sizes, arms or sources."""
    records = [read_record(path, kind="synthetic") for path in paths]
    sources = environment()
    for path, record in zip(paths, records, strict=True):
        # As the record has it: JSON knows no tuples.
        same = {**json.loads(json.dumps(config)), "arms": arms}
        found = {key: value for key, value in record["config"].items() if key != "tasks"}
        if found != same or record["environment"]["code"] != sources["code"]:
            raise RecordError(
                f"{path}: its sizes, arms or sources are not those of this run; "
                "expected a record of the same study. Run its tasks again."
            )
        if record["environment"]["dirty"]:
            raise RecordError(f"{path}: run from a tree with changes; expected a clean one. Run its tasks again.")
    return records


def main() -> None:
    """Run the study and write its record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="folder with train-*.txt.xz and valid.txt.xz, for the task text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=["dfa", "parity"])
    parser.add_argument("--arms", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=StudyConfig.num_steps)
    parser.add_argument("--text-steps", type=int, default=StudyConfig.text_steps)
    parser.add_argument("--keep", nargs="*", type=Path, default=[], help="records of other tasks to put in this one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = tuple(range(arguments.seeds))
    config = StudyConfig(seeds=seeds, num_steps=arguments.steps, text_steps=arguments.text_steps)
    started = time.time()
    given = tasks(config, arguments.corpus)
    unknown = sorted(set(arguments.tasks) - set(given))
    if unknown:
        parser.error(f"no task {', '.join(unknown)}; got {', '.join(given)} (text needs --corpus)")
    chosen = {n: arm for n, arm in arms(config.order).items() if arguments.arms is None or n in arguments.arms}
    records = kept(arguments.keep, dataclasses.asdict(config), list(chosen))
    cells: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    bases: Bases = {}
    for name in arguments.tasks:
        found = [record for record in records if name in record["config"]["tasks"]]
        if found:
            cells += [cell for cell in found[0]["cells"] if cell["task"] == name]
            commit = found[0]["environment"]["commit"]
        else:
            steps = config.text_steps if name == "text" else config.num_steps
            cells += run_task(name, given[name], dataclasses.replace(config, num_steps=steps), chosen, bases)
            commit = environment()["commit"]
        parts.append({"task": name, "commit": commit})
        # Whole after every task: a study that is stopped keeps those that were run.
        done = [part["task"] for part in parts]
        record = new_record(
            "synthetic",
            config=dataclasses.asdict(config) | {"tasks": done, "arms": list(chosen)},
            declared=[list(pair) for pair in COMPARISONS],
            metrics={task: given[task].metric for task in done},
            method=METHOD,
            parts=parts,
            cells=cells,
            seconds=time.time() - started,
            cpu_seconds=sum(cell.get("cpu_s", 0.0) for cell in cells),
            **summarise(cells, given),
        )
        write_json(arguments.out, record)
        print(f"{arguments.out}: {len(cells)} cells in {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
