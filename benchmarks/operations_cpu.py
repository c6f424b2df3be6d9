"""Recurrent layers on a CPU, on ssmtune's operations beside transformers' own PyTorch code.

python benchmarks/operations_cpu.py --out records/bench/operations-cpu.json

Parity comes first: a layer whose outputs or gradients differ gets no timing. Both sides hold the same weights and run in
one process and one thread, by turns. Times are the process's own CPU time, which a busy machine does not stop for.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GraniteMoeHybridConfig,
    KimiLinearConfig,
    Lfm2Config,
    MambaConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils import logging

from ssmtune.doctor import LIMITS
from ssmtune.families.base import find_family
from ssmtune.models import auto_class
from ssmtune.operations import install_operations
from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.records import new_record, write_json

LABELS = (
    *("Mamba-1", "Mamba-2", "Gated DeltaNet", "Gated DeltaNet, decay per channel"),
    *("RG-LRU", "RWKV-4", "short convolution", "causal convolution"),
)
WIDTH = 256
"""Hidden size; the recurrences are 256 to 512 channels wide."""
TIMED_WIDTH = {"Mamba-1": 32}
"""Where transformers takes part: the time of its backward grows with the square of the length there."""
LENGTHS = (1024, 2048)
LONG = 8192
MAX_REPEATS, SECONDS = 15, 1.0
"""Rounds of both sides per measurement: as many as fit into the seconds, at most so many, and at least 3."""

LIMIT = {"ours": LIMITS[torch.float32], "theirs": 1e-3}
"""Relative root mean square of an fp32 layer's error against the layer on our operations in fp64.

Ours: what `doctor` allows an operation. Theirs: it must be the same function, and a missing term costs 1e-2 and more;
how they round is their own affair.
"""

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A layer on one set of operations: hidden states [1, T, width] to outputs, and its parameters."""

    run: Run
    parameters: Mapping[str, torch.Tensor]


def sizes_around(width: int, **others: Any) -> dict[str, Any]:
    """Sizes of a one-layer model around a recurrent layer; what is not the layer is as small as it can be."""
    return {
        "vocab_size": 32,
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
        **others,
    }


def layer_config(label: str, width: int) -> tuple[str, Any]:
    """Class of the recurrent layer, and the config of a one-layer model around it."""
    linear = {"layer_types": ["linear_attention"]}
    if label == "Mamba-1":
        return "MambaMixer", MambaConfig(vocab_size=32, hidden_size=width, state_size=16, num_hidden_layers=1)
    if label == "Mamba-2":
        heads = {"mamba_n_heads": 2 * width // 64, "mamba_d_head": 64, "mamba_d_state": 64}
        sizes = sizes_around(width, **linear, **heads, num_local_experts=0, num_experts_per_tok=0)
        return "GraniteMoeHybridMambaLayer", GraniteMoeHybridConfig(**sizes)
    if label == "Gated DeltaNet":
        heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
        widths = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
        return "Qwen3NextGatedDeltaNet", Qwen3NextConfig(
            **sizes_around(width, **linear, **heads, **widths, num_experts=0)
        )
    if label == "Gated DeltaNet, decay per channel":
        heads = {"linear_head_dim": 64, "linear_num_heads": 4}
        sizes = sizes_around(width, **linear, **heads, mlp_layer_types=["dense"])
        return "KimiLinearDeltaAttention", KimiLinearConfig(**sizes)
    if label == "RG-LRU":
        return "RecurrentGemmaRecurrentBlock", RecurrentGemmaConfig(**sizes_around(width), block_types=["recurrent"])
    if label == "short convolution":
        return "Lfm2ShortConv", Lfm2Config(**sizes_around(width, layer_types=["conv"]))
    return "RwkvSelfAttention", RwkvConfig(vocab_size=32, hidden_size=width, num_hidden_layers=2, intermediate_size=64)


def layer_sides(label: str, width: int, num_steps: int, dtype: torch.dtype) -> dict[str, Side]:
    """The layer as transformers has it, and a copy with the same weights on ssmtune's operations."""
    if label == "causal convolution":
        return convolution_sides(width, dtype)
    class_name, config = layer_config(label, width)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).to(dtype).train()
    other = deepcopy(model)
    install_operations(other, find_family(config.model_type)[1])
    sides = {}
    for name, owner in (("theirs", model), ("ours", other)):
        module = next(m for m in owner.modules() if type(m).__name__ == class_name)
        run = partial(run_layer, module, *given_arguments(model, class_name, num_steps, dtype))
        sides[name] = Side(run=run, parameters=dict(module.named_parameters()))
    return sides


def convolution_sides(width: int, dtype: torch.dtype) -> dict[str, Side]:
    """The bare causal convolution with its activation, as Mamba-2's layer calls it."""
    torch.manual_seed(0)
    sides = {}
    for name, function in (("theirs", modeling_mamba2.causal_conv1d_fn), ("ours", causal_conv1d)):
        torch.manual_seed(0)
        weight = torch.randn(width, 4).to(dtype).requires_grad_()
        bias = torch.randn(width).to(dtype).requires_grad_()

        def run(x_BTC: torch.Tensor, function: Any = function, weight: Any = weight, bias: Any = bias) -> torch.Tensor:
            out: torch.Tensor = function(x_BTC.transpose(1, 2), weight, bias, activation="silu")
            return out.transpose(1, 2)

        sides[name] = Side(run=run, parameters={"weight": weight, "bias": bias})
    return sides


class Reached(Exception):
    """The model has come to its recurrent layer."""


INPUT_NAMES = ("hidden_states", "input_states", "hidden")


def given_arguments(model: nn.Module, class_name: str, num_steps: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Position and keyword arguments, beside the hidden states, that the model hands its recurrent layer."""
    seen: list[tuple[Any, ...]] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[1:], {key: value for key, value in kwargs.items() if key not in INPUT_NAMES}))
        raise Reached

    module = next(m for m in model.modules() if type(m).__name__ == class_name)
    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad(), suppress(Reached):
        model(inputs_embeds=torch.zeros(1, num_steps, model.config.hidden_size, dtype=dtype), use_cache=False)
    hook.remove()
    return seen[0]


def run_layer(module: nn.Module, args: Any, kwargs: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The layer's output; some layers give states beside it."""
    out = module(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def hidden_states(width: int, num_steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers [1, T, width], the same fp32 values in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, num_steps, width, generator=generator).to(dtype).requires_grad_()


def outputs_and_gradients(side: Side, width: int, num_steps: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of every parameter that the layer uses."""
    hidden = hidden_states(width, num_steps, dtype)
    out = side.run(hidden)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    leaves = {"input": hidden, **side.parameters}
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"output": out.detach(), **named}


def parity(label: str, width: int) -> dict[str, Any]:
    """The worst tensor of each side at the shorter length, in fp32 against our operations in fp64."""
    num_steps = LENGTHS[0]
    truth = outputs_and_gradients(
        layer_sides(label, width, num_steps, torch.float64)["ours"], width, num_steps, torch.float64
    )
    found: dict[str, Any] = {"tensors": len(truth)}
    for name, side in layer_sides(label, width, num_steps, torch.float32).items():
        values = outputs_and_gradients(side, width, num_steps, torch.float32)
        assert values.keys() == truth.keys(), (label, values.keys() ^ truth.keys())
        errors = {key: relative_error(values[key], truth[key]) for key in truth}
        worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
        found[name] = {"tensor": worst, "error": errors[worst], "limit": LIMIT[name]}
    found["ok"] = all(found[name]["error"] <= LIMIT[name] for name in LIMIT)
    return found


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the error over the RMS of the truth."""
    return float((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def forward(side: Side, hidden: torch.Tensor) -> None:
    """One pass as in evaluation."""
    with torch.no_grad():
        side.run(hidden)


def both(side: Side, hidden: torch.Tensor) -> None:
    """One pass and its backward, to the input and to every parameter."""
    out = side.run(hidden)
    leaves = [hidden, *side.parameters.values()]
    torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def timing(label: str, width: int, num_steps: int) -> dict[str, Any]:
    """CPU milliseconds of each side, forward and forward + backward: the median, the fastest and the slowest."""
    sides = layer_sides(label, width, num_steps, torch.float32)
    hidden = hidden_states(width, num_steps, torch.float32)
    found: dict[str, Any] = {name: {} for name in sides}
    for what, function in (("forward", forward), ("both", both)):
        times: dict[str, list[float]] = {name: [] for name in sides}
        # The first pass of each allocates; the parity has run the backward, which takes seconds in some of theirs.
        for side in sides.values():
            forward(side, hidden)
        began = time.perf_counter()
        while len(times["ours"]) < 3 or (len(times["ours"]) < MAX_REPEATS and time.perf_counter() - began < SECONDS):
            for name, side in sides.items():
                start = time.process_time()
                function(side, hidden)
                times[name].append(1000 * (time.process_time() - start))
        for name, values in times.items():
            found[name][f"{what}_ms"] = {
                "median": statistics.median(values),
                "fastest": min(values),
                "slowest": max(values),
                "rounds": len(values),
            }
    return found


def peak_memory(label: str, name: str, width: int, num_steps: int) -> dict[str, int]:
    """Bytes of this process at its peak in one forward and backward, and what that is above the state before it."""
    side = layer_sides(label, width, num_steps, torch.float32)[name]
    hidden = hidden_states(width, num_steps, torch.float32)
    before = peak_bytes()
    both(side, hidden)
    return {"process_bytes": peak_bytes(), "added_bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fork, whose peak memory is its own."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> int:
    """Parity, memory, then speed of every layer; the record says how busy the machine was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=LABELS, default=LABELS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    load_before = os.getloadavg()
    layers: dict[str, Any] = {label: {"width": TIMED_WIDTH.get(label, WIDTH)} for label in arguments.only}
    for label, found in layers.items():
        # Memory first: autograd's threads do not survive a fork, and what other layers leave behind would count.
        found["memory"] = {name: in_own_process(peak_memory, label, name, found["width"], LENGTHS[0]) for name in LIMIT}
        found["memory_long"] = in_own_process(peak_memory, label, "ours", WIDTH, LONG)
    for label, found in layers.items():
        found["parity"] = parity(label, found["width"])
        if found["parity"]["ok"]:
            found["speed"] = {str(steps): timing(label, found["width"], steps) for steps in LENGTHS}
        print(label, found, flush=True)
    ok = all(layer["parity"]["ok"] for layer in layers.values())
    config = {
        "benchmark": "operations_cpu",
        "long_width": WIDTH,
        "lengths": LENGTHS,
        "long": LONG,
        "dtype": "float32",
        "clock": "process",
    }
    record = new_record("benchmark", config=config, status="done" if ok else "failed", layers=layers)
    record |= {"load_average": {"before": load_before, "after": os.getloadavg()}}
    write_json(arguments.out, record)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
