"""What share of an adapter's term arrives in the output of a bf16 projection, by the term's size and by where it is added.

    python benchmarks/small_terms.py --out records/bench/small-terms-cpu.json

One projection with random weights and outputs of about 1, an adapter whose term has a given size beside them, and the
same layer without the term. The share that arrives is <with - without, term> / <term, term> over all elements: 1 where
rounding loses nothing in the mean, 0 where the term vanishes, more than 1 where it arrives enlarged. The term itself is
taken in fp64.

plain                PEFT's layer under autocast to bf16, as the plain path runs it; the residual is added to its result
rewritten            the product rounded to bf16, then term and residual added to it in fp32, rounded
term in the product  product and term summed in fp32, rounded; the residual is added to the result
fp32                 the plain one with everything in fp32

The rewritten layers' sum is written out here, as `ops.projection`'s kernel makes it on a GPU: Triton's interpreter, which
could run that kernel on a CPU, rounds to bf16 towards zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from ssmtune.attach import attach
from ssmtune.models import auto_class
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.records import new_record, write_json

NUM_IN, NUM_OUT, RANK, NUM_ROWS = 256, 512, 16, 4096
EXPONENTS = tuple(range(-14, -3))
"""Sizes of the term: powers of two, beside the root mean square of the output. Half a unit in the last place of a bf16
number is between 2^-9 and 2^-8 of it."""

RESIDUALS = (1, 8)
"""Root mean squares of the residual: a model's grows from layer to layer."""

Sides = dict[str, Callable[[], torch.Tensor]]


def make_layer() -> Any:
    """The adapted projection of a small model in bf16, with random weights whose outputs have a root mean square of 1."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=NUM_OUT,
        intermediate_size=NUM_IN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model: Any = auto_class(config).from_config(config, dtype=torch.bfloat16)
    edit = Edit(method="lora", select=("mlp.down",), options={"rank": RANK, "alpha": 1.0 * RANK})
    adapted = attach(model, make_plan(model, Recipe(name="lora", edits=(edit,))), fast="off")
    (site,) = adapted.plan.sites
    layer = adapted.base_model.model.get_submodule(site.path.removesuffix(".weight"))
    torch.nn.init.normal_(layer.get_base_layer().weight, std=NUM_IN**-0.5)
    return layer


def make_sides(layer: Any, x: torch.Tensor, noise: torch.Tensor) -> Sides:
    """The ways to the output, each from the layer's factors as they are when it is called; residuals are `noise` enlarged."""
    weight, A, B = (m.weight for m in (layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]))
    wide = deepcopy(layer).float()

    def plain(residual: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: torch.Tensor = layer(x)
        return residual + found

    def term() -> torch.Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)).float(), B.to(x.dtype).float())

    def rewritten(residual: torch.Tensor) -> torch.Tensor:
        return (F.linear(x, weight).float() + term() + residual.float()).to(x.dtype)

    def in_product(residual: torch.Tensor) -> torch.Tensor:
        return residual + (F.linear(x.float(), weight.float()) + term()).to(x.dtype)

    def fp32() -> torch.Tensor:
        wide.lora_B["default"].weight.copy_(B)
        found: torch.Tensor = wide(x.float())
        return found

    sides: Sides = {}
    for size in (None, *RESIDUALS):
        residual = torch.zeros((), dtype=x.dtype) if size is None else (size * noise).to(x.dtype)
        name = "" if size is None else f", residual of {size}"
        sides |= {
            f"plain{name}": partial(plain, residual),
            f"rewritten{name}": partial(rewritten, residual),
            f"term in the product{name}": partial(in_product, residual),
        }
    return sides | {"fp32": fp32}


def arrival(difference: torch.Tensor, term: torch.Tensor) -> dict[str, float]:
    """Share of the term that is in the difference, its standard error over rows, and the share of elements that changed."""
    along, size = (difference * term).sum(1), term.square().sum(1)
    share = along.sum() / size.sum()
    error = (along - share * size).square().sum().sqrt() / size.sum()
    return {"share": float(share), "standard_error": float(error), "changed": float((difference != 0).double().mean())}


@torch.no_grad()
def measure(num_rows: int, exponents: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """Side -> exponent of the term's size -> what arrives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = make_layer()
        x, noise = torch.randn(num_rows, NUM_IN).bfloat16(), torch.randn(num_rows, NUM_OUT)
        direction = torch.randn(NUM_OUT, RANK)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    sides = make_sides(layer, x, noise)
    B.zero_()
    without = {name: run().double() for name, run in sides.items()}
    size_of_one = (x.double() @ A.double().T @ direction.double().T).square().mean().sqrt()
    size_of_output = without["fp32"].square().mean().sqrt()
    found: dict[str, Any] = {name: {} for name in sides}
    for exponent in exponents:
        B.copy_(direction * float(size_of_output / size_of_one) * 2.0**exponent)
        term = x.double() @ A.double().T @ B.double().T
        for name, run in sides.items():
            found[name][str(exponent)] = arrival(run().double() - without[name], term)
    return {"output_rms": float(size_of_output), "shares": found}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(NUM_ROWS, EXPONENTS)
    for name, shares in found["shares"].items():
        words = (f"2^{exponent} {entry['share']:.3f}" for exponent, entry in shares.items())
        print(f"{name}: {', '.join(words)}")
    config = {"benchmark": "small-terms", "rows": NUM_ROWS, "in": NUM_IN, "out": NUM_OUT, "rank": RANK, "seed": 0}
    write_json(arguments.out, new_record("benchmark", config=config, **found))


if __name__ == "__main__":
    main()
