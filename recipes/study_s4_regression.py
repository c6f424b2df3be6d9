"""The synthetic study of SDT: a frozen random S4D learns a smaller one's outputs, through LoRA, sparse entries, or both.

Run from the repository root: python recipes/study_s4_regression.py [--out FILE] [--seeds N] [--steps N]

Every seed draws a target of one layer, a frozen model of four layers with twice the states, and the data; all arms of a
seed see the same. Learning rates are chosen per arm on seeds that are not used again. Arms, rates and comparisons are
declared below and copied into the record.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ssmtune.attach import AdaptedModel, attach
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.records import new_record, write_json
from ssmtune.s4d_model import S4DConfig, S4DForCausalLM, register_s4d
from ssmtune.selection import begin_warm_up, choose_after_warm_up, num_warmup_steps, put
from ssmtune.stats import Comparison, holm, mean_interval, paired_difference

RATES = (3e-2, 1e-1, 3e-1)
TUNING_SEEDS = (1000, 1001)
COMPARISONS = (
    ("sdt", "lora"),
    ("sdt", "sdt-random"),
    ("sdt", "sdt-magnitude"),
    ("sdt-random", "lora"),
    ("lora-double", "lora"),
)
SPARSE_RANK, EQUAL_RANK, DOUBLE_RANK = 4, 8, 16


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the problem and of the training."""

    width: int = 16
    outputs: int = 8
    target_layers: int = 1
    target_states: int = 4
    layers: int = 4
    states: int = 8
    sequence: int = 32
    batch: int = 16
    num_steps: int = 400
    warmup_steps: int = 100
    held_out: int = 64
    channel_freeze_ratio: float = 0.5
    state_freeze_ratio: float = 0.5
    seeds: int = 6


def arms(setup: Setup) -> dict[str, tuple[Edit, ...]]:
    """What each arm trains; all but `lora-double` train the same number of parameters."""
    ratios = {"channel_freeze_ratio": setup.channel_freeze_ratio, "state_freeze_ratio": setup.state_freeze_ratio}

    def mixing(rank: int) -> Edit:
        return Edit(method="lora", select=("ssm.out",), options={"rank": rank, "alpha": float(rank), "dropout": 0.0})

    def sparse(selection: str) -> tuple[Edit, ...]:
        options = {**ratios, "selection": selection, "warmup_steps": setup.warmup_steps}
        return Edit(method="sdt", select=("allowed",), options=options), mixing(SPARSE_RANK)

    return {
        "lora": (mixing(EQUAL_RANK),),
        "lora-double": (mixing(DOUBLE_RANK),),
        "sdt": sparse("warmup"),
        "sdt-random": sparse("random"),
        "sdt-magnitude": sparse("magnitude"),
    }


def draw_model(setup: Setup, seed: int, *, layers: int, states: int) -> S4DForCausalLM:
    """A random S4D whose recurrences matter: steps that reach across the sequence, readouts and mixing of order one."""
    register_s4d()
    torch.manual_seed(seed)
    config = S4DConfig(
        vocab_size=setup.outputs,
        hidden_size=setup.width,
        num_hidden_layers=layers,
        state_size=states,
        dt_min=0.01,
        dt_max=0.3,
    )
    model = S4DForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.C.mul_(2)
            layer.mixer.log_A_real.add_(0.3 * torch.randn(layer.mixer.log_A_real.shape, generator=generator))
            weight = layer.mixer.out_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(setup.width))
        head = model.lm_head.weight
        # Target and frozen model read out alike: what differs is the layers.
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(setup.width))
    return model


class Problem:
    """One seed's target and data; the same for every arm."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.seed = setup, seed
        self.target = draw_model(setup, 2 * seed, layers=setup.target_layers, states=setup.target_states)
        self.held_out = self.batch(setup.held_out, -1)
        # In units of the target's own variance: 1 is what predicting its mean costs.
        self.scale = float(self.held_out[1].var())

    def frozen_model(self) -> S4DForCausalLM:
        """The model to adapt, freshly drawn."""
        return draw_model(self.setup, 2 * self.seed + 1, layers=self.setup.layers, states=self.setup.states)

    def batch(self, num: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [num, T, D] and target outputs [num, T, outputs] of a step."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step + 1)
        inputs = torch.randn(num, self.setup.sequence, self.setup.width, generator=generator)
        with torch.no_grad():
            return inputs, self.target(inputs_embeds=inputs, use_cache=False).logits

    def errors(self, model: Any) -> list[float]:
        """Mean squared error of each held-out sequence, in units of the target's variance."""
        inputs, outputs = self.held_out
        with torch.no_grad():
            found = model(inputs_embeds=inputs, use_cache=False).logits
        per_sequence: list[float] = ((found - outputs).square().mean((1, 2)) / self.scale).tolist()
        return per_sequence


def fit(adapted: AdaptedModel, problem: Problem, *, rate: float, num_steps: int, decay: bool, first: int = 0) -> None:
    """Train in place with Adam on fresh data; batches are numbered from `first`."""
    optimizer = torch.optim.AdamW(adapted.trained_parameters().values(), lr=rate, weight_decay=0.0, fused=True)
    adapted.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.5 * (1 + math.cos(math.pi * step / num_steps)) if decay else 1.0)
        inputs, outputs = problem.batch(problem.setup.batch, first + step)
        loss = F.mse_loss(adapted(inputs_embeds=inputs, use_cache=False).logits, outputs) / problem.scale
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.trained_parameters().values(), 1.0)
        optimizer.step()
    adapted.eval()


def train_arm(problem: Problem, edits: tuple[Edit, ...], rate: float) -> tuple[AdaptedModel, list[float]]:
    """Return the trained model and its held-out errors. A warm-up uses batches of its own, and all but its choice is dropped."""
    setup = problem.setup
    model = problem.frozen_model()
    edits = tuple(
        Edit(
            method=e.method,
            select=e.select,
            options={**e.options, "seed": problem.seed} if e.method == "sdt" else e.options,
        )
        for e in edits
    )
    plan = make_plan(model, Recipe(name="arm", edits=edits))
    torch.manual_seed(problem.seed)
    adapted = attach(model, plan)
    num_warmup = num_warmup_steps(plan, adapted.edits)
    if num_warmup:
        begin_warm_up(plan, adapted.edits)
        adapted.require_gradients()
        fit(adapted, problem, rate=rate, num_steps=num_warmup, decay=False, first=setup.num_steps)
        chosen = choose_after_warm_up(plan, adapted.edits)
        base = adapted.detach()
        torch.manual_seed(problem.seed)
        adapted = attach(base, plan)
        put(adapted.edits, chosen)
    fit(adapted, problem, rate=rate, num_steps=setup.num_steps, decay=True)
    return adapted, problem.errors(adapted)


def log_mean(errors: list[float]) -> float:
    """log10 of the mean error; a run that diverged counts as an error of 10^6."""
    mean = float(np.mean(errors))
    return math.log10(mean) if math.isfinite(mean) else 6.0


def run_study(setup: Setup) -> dict[str, Any]:
    """Choose a rate per arm, run every arm on every seed, and compare as declared."""
    tuning = [Problem(setup, seed) for seed in TUNING_SEEDS]
    problems = [Problem(setup, seed) for seed in range(1, setup.seeds + 1)]
    found: dict[str, Any] = {}
    errors: dict[str, np.ndarray[Any, Any]] = {}
    for name, edits in arms(setup).items():
        scores = {
            rate: float(np.mean([log_mean(train_arm(problem, edits, rate)[1]) for problem in tuning])) for rate in RATES
        }
        rate = min(scores, key=lambda rate: scores[rate])
        runs = [train_arm(problem, edits, rate) for problem in problems]
        errors[name] = np.log10(np.array([run[1] for run in runs]))
        plan = runs[0][0].plan
        found[name] = {
            "trained": plan.trainable,
            "by_method": {m: sum(s.num_params for s in plan.sites if s.method == m) for m in ("sdt", "lora")},
            "rates": {f"{rate:g}": score for rate, score in scores.items()},
            "rate": rate,
            "log10_error": errors[name].tolist(),
            "mean": mean_interval([float(row.mean()) for row in errors[name]]).to_dict(),
        }
        print(f"{name}: rate {rate:g}, log10 error {found[name]['mean']['mean']:.2f}", flush=True)
    frozen = [float(np.log10(problem.errors(problem.frozen_model())).mean()) for problem in problems]
    results = [paired_difference(errors[arm], errors[baseline], seed=0) for arm, baseline in COMPARISONS]
    comparisons = [
        Comparison(
            arm=arm, baseline=baseline, task="regression", metric="log10 error", result=result, p_holm=p
        ).to_dict()
        for (arm, baseline), result, p in zip(COMPARISONS, results, holm([r.p for r in results]), strict=True)
    ]
    return {"arms": found, "frozen": mean_interval(frozen).to_dict(), "comparisons": comparisons}


def main() -> None:
    """Run the study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("records/studies/s4-regression.json.gz"))
    parser.add_argument("--seeds", type=int, default=Setup.seeds)
    parser.add_argument("--steps", type=int, default=Setup.num_steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setup = Setup(seeds=arguments.seeds, num_steps=arguments.steps)
    started = time.time()
    declared = {"comparisons": COMPARISONS, "rates": RATES, "tuning_seeds": TUNING_SEEDS}
    # Before the run: it says which code runs, and under which declaration.
    record = new_record("synthetic", config={**asdict(setup), **declared})
    if record["environment"]["dirty"]:
        record["status"] = "provisional"
    result = run_study(setup)
    cpu = time.process_time()
    write_json(arguments.out, {**record, **result, "seconds": time.time() - started, "cpu_seconds": cpu})


if __name__ == "__main__":
    main()
