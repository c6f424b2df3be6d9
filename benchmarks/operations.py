"""Parity, then speed, of the kernels on this GPU: python benchmarks/operations.py --out records/bench/NAME.json

Truth is the reference in fp64. If the parity of an operation fails, nothing gets a timing.
`--only scan delta conv norm mamba1 steps` takes some of them; `mamba_ssm` measures that package's scan for comparison.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from ssmtune.ops.gated_delta_rule import gated_delta_rule
from ssmtune.ops.gated_rms_norm import gated_rms_norm
from ssmtune.ops.mamba1_selective_scan import mamba1_selective_scan, mamba1_state_update
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan
from ssmtune.ops.selective_state_update import selective_state_update
from ssmtune.records import new_record, write_json

Tensors = dict[str, torch.Tensor]

ALLOWANCE = {
    # Over the reference's own error in the same dtype. fp32: sums in another order, and products split in three.
    torch.float32: 1e-5,
    # bf16: products with fp32 operands round them to tf32, 2^-11 each; half of what rounding the result costs.
    torch.bfloat16: 2.0**-9,
}

SCAN_ALLOWANCE = 4 * 2.0**-8
"""In bf16, for Mamba-2's scan and the gated delta rule: their kernels keep states and operands of products in bf16, four
roundings in a row, while the reference's arithmetic is fp32. The errors of mamba_ssm's kernels on the same inputs are
recorded beside, where installed."""


SWITCHES = ((False, False, False), (True, False, True), (True, True, False), (True, True, True))
"""(initial state, packed documents, padding): each kernel variant costs a compilation."""

Cases = list[tuple[str, Tensors, dict[str, Any]]]
"""What a case is called, its tensors, and its options."""


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """fp64 numbers on the GPU."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cuda")


def documents(batch: int, steps: int) -> torch.Tensor:
    """Document numbers [B, T]: single steps, splits at a chunk's edge and inside, another split in each row."""
    numbers = torch.zeros(batch, steps, dtype=torch.int32, device="cuda")
    for row in range(batch):
        for start in (1, 2, 7, 64, 100, 300, 777):
            numbers[row, start + row :] += 1
    return numbers


def left_padding(batch: int, steps: int) -> torch.Tensor:
    """Attention mask [B, T] with the first row padded by a third."""
    mask = torch.ones(batch, steps, dtype=torch.long, device="cuda")
    mask[0, : steps // 3] = 0
    return mask


def switched_cases(
    draw: Callable[..., Tensors],
    size: tuple[int, ...],
    always: dict[str, Any],
    from_state: dict[str, Any] | None = None,
) -> Cases:
    """Inputs of an operation over sequences at one size, which begins with batch and steps, for each of `SWITCHES`.

    `always` are options of every case, `from_state` of those with an initial state.
    """
    cases: Cases = []
    for initial, packed, padded in SWITCHES:
        options = always | {"seq_idx": documents(*size[:2])} if packed else dict(always)
        options |= {"padding_mask": left_padding(*size[:2])} if padded else {}
        options |= from_state or {} if initial else {}
        where = f"{size} initial={initial} packed={packed} padded={padded}"
        cases.append((where, draw(*size, initial=initial), options))
    return cases


def scan_case(
    batch: int, steps: int, heads: int, width: int, groups: int, state: int, *, initial: bool = False
) -> Tensors:
    """Inputs of the scan, decays from almost none to almost all of the state."""
    g = torch.Generator(device="cuda").manual_seed(steps)
    tensors = {
        "x_BTHP": normal(g, batch, steps, heads, width),
        "dt_BTH": normal(g, batch, steps, heads),
        "A_H": -torch.exp(torch.linspace(-3, 2, heads, dtype=torch.float64, device="cuda")),
        "B_BTGN": normal(g, batch, steps, groups, state),
        "C_BTGN": normal(g, batch, steps, groups, state),
        "D_H": normal(g, heads),
        "dt_bias_H": normal(g, heads) - 2.0,
    }
    if initial:
        tensors["initial_states_BHPN"] = normal(g, batch, heads, width, state)
    return tensors


FP32_ALWAYS = (
    *("A_H", "D_H", "dt_bias_H", "initial_states_BHPN", "state_BHPN", "g", "initial_state_BHKV"),
    *("A_DN", "D_D", "dt_bias_D", "initial_state_BDN", "state_BDN"),
)
"""Small parameters and states are fp32 in training, whatever the activations are."""


def errors(run: Callable[..., Any], tensors: Tensors, dtype: torch.dtype, **options: Any) -> tuple[Tensors, Tensors]:
    """(kernel, reference) relative RMS errors of outputs and all gradients, on inputs and upstream rounded once."""
    types = {name: torch.float32 if name in FP32_ALWAYS else dtype for name in tensors}
    rounded = {name: value.to(types[name]) for name, value in tensors.items()}

    def outputs_and_gradients(backend: str, exact: bool) -> Tensors:
        leaves = {n: (v.double() if exact else v.clone()).requires_grad_() for n, v in rounded.items()}
        outputs = run(**leaves, backend=backend, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        if not outputs[0].requires_grad:
            return named
        g = torch.Generator(device="cuda").manual_seed(99)
        upstream = [normal(g, *o.shape).to(dtype).to(o.dtype) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return named | {f"grad {n}": v for n, v in zip(leaves, gradients, strict=True)}

    truth = outputs_and_gradients("reference", True)

    def relative(found: Tensors) -> Tensors:
        return {
            n: float((found[n].double() - truth[n]).pow(2).mean().sqrt() / truth[n].pow(2).mean().sqrt()) for n in truth
        }

    return relative(outputs_and_gradients("triton", False)), relative(outputs_and_gradients("reference", False))


def conv_run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The convolution on a slice of a wider tensor, as models call it."""
    return causal_conv1d(x[..., 3:-5].transpose(1, 2), weight, bias, "silu", **options)


SIZES = ((2, 1, 4, 64, 1, 128), (2, 63, 4, 24, 2, 40), (1, 500, 8, 64, 1, 128), (2, 1000, 6, 80, 3, 256))
"""Batch, steps, heads, width, groups, state of the scan's cases; odd lengths, sizes that fill no block."""


def scan_parity(dtype: torch.dtype, size: tuple[int, ...]) -> dict[str, Any]:
    """Worst error of the scan at one size, over documents, padding, limits and initial states."""
    cases = switched_cases(scan_case, size, {"dt_softplus": True}, {"dt_limit": (0.01, 1.5)})
    return worst_error(mamba2_chunk_scan, dtype, cases, SCAN_ALLOWANCE if dtype == torch.bfloat16 else None)


def mamba_ssm_scan(**given: Any) -> Any:
    """mamba_ssm's kernels in place of ours, with our names."""
    if given["backend"] == "reference":
        return mamba2_chunk_scan(**given)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    names = {"D_H": "D", "dt_bias_H": "dt_bias", "initial_states_BHPN": "initial_states"}
    inputs = [given[name] for name in ("x_BTHP", "dt_BTH", "A_H", "B_BTGN", "C_BTGN")]
    others = {names.get(n, n): v for n, v in given.items() if n in (*names, "dt_softplus", "dt_limit", "seq_idx")}
    return mamba_chunk_scan_combined(*inputs, 256, return_final_states=True, **others)


def mamba_ssm_parity(dtype: torch.dtype, size: tuple[int, ...]) -> dict[str, Any]:
    """What mamba_ssm's kernels are off by, and ours on the same inputs, as far as they take them: whole rows from zero."""
    cases = [(str(size), scan_case(*size), {"dt_softplus": True})]
    return worst_error(mamba_ssm_scan, dtype, cases) | {"ours": worst_error(mamba2_chunk_scan, dtype, cases)["error"]}


def conv_parity(dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Worst error of the convolution at one length, on a strided slice, packed, padded, and from a window."""
    cases = []
    for packed, padded, window in product((False, True), repeat=3):
        g = torch.Generator(device="cuda").manual_seed(steps)
        tensors = {"x": normal(g, 2, steps, 108), "weight": normal(g, 100, 4), "bias": normal(g, 100)}
        tensors |= {"initial_state_BCK": normal(g, 2, 100, 3)} if window else {}
        options: dict[str, Any] = {"seq_idx": documents(2, steps)} if packed else {}
        options |= {"padding_mask": left_padding(2, steps)} if padded else {}
        cases.append((f"T={steps} packed={packed} padded={padded} window={window}", tensors, options))
    return worst_error(conv_run, dtype, cases)


def norm_parity(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Worst error of the gated norm at one width, in one group and in two, with and without a gate, on slices."""
    g = torch.Generator(device="cuda").manual_seed(width)
    tensors = {"wide": normal(g, 2, 501, 2 * width + 9), "weight": normal(g, width)}
    switches = product((True, False), (width, width // 2))
    cases = [(f"D={width} gated={a} group={b}", tensors, {"gated": a, "group_size": b}) for a, b in switches]
    return worst_error(norm_run, dtype, cases)


def norm_run(wide: torch.Tensor, weight: torch.Tensor, *, gated: bool, **options: Any) -> torch.Tensor:
    """The norm on slices of a wider tensor, as models call it."""
    width = weight.shape[0]
    gate = wide[..., width : 2 * width] if gated else None
    return gated_rms_norm(wide[..., :width], weight, gate, eps=1e-5, **options)


MAMBA1_SIZES = ((2, 1, 9, 5), (2, 63, 40, 16), (1, 500, 2100, 16), (2, 1000, 96, 24))
"""Batch, steps, channels, state of the cases of Mamba-1's scan; 2,100 channels are several blocks in a program."""


def mamba1_case(
    batch: int, steps: int, channels: int, state: int, *, initial: bool = False, rank: int = 7, margin: int = 3
) -> Tensors:
    """Inputs of Mamba-1's scan, decays from almost none to almost all of the state; by default in rows of odd lengths.

    B and C stand behind `rank` columns of their tensor, x and its gate before `margin` columns of theirs.
    """
    g = torch.Generator(device="cuda").manual_seed(steps)
    rates = torch.linspace(-3, 3, channels * state, dtype=torch.float64, device="cuda")
    tensors = {
        "xz": normal(g, batch, steps, 2 * channels + margin),
        "dt_BDT": normal(g, batch, channels, steps),
        "A_DN": -torch.exp(rates).view(channels, state),
        "BC": normal(g, batch, steps, rank + 2 * state),
        "D_D": normal(g, channels),
        "dt_bias_D": normal(g, channels) - 2.0,
    }
    return tensors | ({"initial_state_BDN": normal(g, batch, channels, state)} if initial else {})


def mamba1_views(xz: torch.Tensor, BC: torch.Tensor, channels: int, state: int) -> Tensors:
    """x, z, B and C as models pass them: transposed slices of wider tensors."""
    return {
        "x_BDT": xz[..., :channels].transpose(1, 2),
        "z_BDT": xz[..., channels : 2 * channels].transpose(1, 2),
        "B_BNT": BC[..., -2 * state : -state].transpose(1, 2),
        "C_BNT": BC[..., -state:].transpose(1, 2),
    }


def mamba1_run(xz: torch.Tensor, BC: torch.Tensor, A_DN: torch.Tensor, **rest: Any) -> Any:
    """Mamba-1's scan on those views."""
    return mamba1_selective_scan(A_DN=A_DN, **mamba1_views(xz, BC, *A_DN.shape), **rest)


DELTA_SIZES = ((2, 1, 2, 4, 128, 128), (2, 63, 4, 4, 20, 24), (1, 500, 1, 3, 64, 96), (2, 1000, 2, 4, 128, 128))
"""Batch, steps, heads of q and k, heads of v, key and value width of the gated delta rule's cases."""


def delta_case(
    batch: int, steps: int, key_heads: int, heads: int, key: int, value: int, *, initial: bool = False
) -> Tensors:
    """Inputs of the gated delta rule, decays from almost none to almost all of the state, beta between 0 and 2."""
    g = torch.Generator(device="cuda").manual_seed(steps)
    tensors = {
        "q_BTHK": normal(g, batch, steps, key_heads, key),
        "k_BTHK": normal(g, batch, steps, key_heads, key),
        "v_BTHV": normal(g, batch, steps, heads, value),
        "g": -torch.exp(1.5 * normal(g, batch, steps, heads) - 2),
        "beta_BTH": 2 * normal(g, batch, steps, heads).sigmoid(),
    }
    return tensors | ({"initial_state_BHKV": normal(g, batch, heads, key, value)} if initial else {})


def delta_parity(dtype: torch.dtype, size: tuple[int, ...]) -> dict[str, Any]:
    """Worst error of the gated delta rule at one size, over documents, padding and initial states."""
    cases = switched_cases(delta_case, size, {"qk_l2norm": True})
    return worst_error(gated_delta_rule, dtype, cases, SCAN_ALLOWANCE if dtype == torch.bfloat16 else None)


def mamba1_parity(dtype: torch.dtype, size: tuple[int, ...]) -> dict[str, Any]:
    """Worst error of Mamba-1's scan at one size, over documents, padding and initial states."""
    return worst_error(mamba1_run, dtype, switched_cases(mamba1_case, size, {"dt_softplus": True}))


def step_case(operation: str, batch: int, *, small: bool = False) -> Tensors:
    """Inputs of a decoding step, by default at the size of a layer of Granite-4.0-H-Micro or Falcon-Mamba-7B."""
    g = torch.Generator(device="cuda").manual_seed(batch)
    if operation == "causal_conv1d_update":
        channels = 100 if small else 4352
        tensors = {"x_BCT": normal(g, batch, channels, 1), "conv_state_BCK": normal(g, batch, channels, 4)}
        return tensors | {"weight_CK": normal(g, channels, 4), "bias_C": normal(g, channels)}
    if operation == "mamba1_state_update":
        channels, state = (100, 5) if small else (8192, 16)
        names = ("x_BD", "dt_BD", "z_BD")
        tensors = {"state_BDN": normal(g, batch, channels, state)} | {n: normal(g, batch, channels) for n in names}
        tensors |= {"A_DN": -normal(g, channels, state).exp(), "D_D": normal(g, channels)}
        tensors |= {name: normal(g, batch, state) for name in ("B_BN", "C_BN")}
        return tensors | {"dt_bias_D": normal(g, channels) - 2.0}
    heads, width, groups, state = (6, 20, 2, 40) if small else (64, 64, 1, 128)
    tensors = {"state_BHPN": normal(g, batch, heads, width, state), "x_BHP": normal(g, batch, heads, width)}
    tensors |= {"dt_BH": normal(g, batch, heads), "A_H": -normal(g, heads).exp(), "D_H": normal(g, heads)}
    tensors |= {name: normal(g, batch, groups, state) for name in ("B_BGN", "C_BGN")}
    return tensors | {"dt_bias_H": normal(g, heads) - 2.0}


STEPS: dict[str, tuple[Callable[..., torch.Tensor], str, dict[str, Any]]] = {
    "causal_conv1d_update": (causal_conv1d_update, "conv_state_BCK", {"activation": "silu"}),
    "mamba1_state_update": (mamba1_state_update, "state_BDN", {"dt_softplus": True}),
    "selective_state_update": (selective_state_update, "state_BHPN", {"dt_softplus": True, "dt_limit": (0.01, 1.5)}),
}
"""Decoding steps: the function, its state's name, its options."""


def step_run(*, operation: str, **tensors: Any) -> Any:
    """A step's output and the state that it leaves behind."""
    function, name, options = STEPS[operation]
    with torch.no_grad():
        state = tensors.pop(name).clone()
        return function(**{name: state}, **tensors, **options), state


def steps_parity(dtype: torch.dtype, operation: str) -> dict[str, Any]:
    """Worst error of a decoding step, at a size that fills no block and at a model's."""
    cases = [
        (f"{operation} batch={batch} small={small}", step_case(operation, batch, small=small), {"operation": operation})
        for batch, small in ((3, True), (2, False))
    ]
    return worst_error(step_run, dtype, cases)


def worst_error(
    run: Callable[..., Any],
    dtype: torch.dtype,
    cases: list[tuple[str, Tensors, dict[str, Any]]],
    allowed: float | None = None,
) -> dict[str, Any]:
    """The tensor of all cases whose error exceeds the reference's most; memory from torch.empty holds NaN meanwhile."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    worst: dict[str, Any] = {"excess": -math.inf}
    for where, tensors, options in cases:
        ours, reference = errors(run, tensors, dtype, **options)
        for tensor, error in ours.items():
            excess = error - reference[tensor]
            # NaN compares false with everything: it must not pass, nor give way to the next tensor.
            excess = math.inf if math.isnan(excess) else excess
            if excess > worst["excess"]:
                worst = {
                    "excess": excess,
                    "error": error,
                    "reference": reference[tensor],
                    "tensor": tensor,
                    "where": where,
                }
    allowed = ALLOWANCE[dtype] if allowed is None else allowed
    return worst | {"allowed": allowed, "ok": bool(worst["excess"] <= allowed), "cases": len(cases)}


MAMBA_SSM_SIZES = ((1, 500, 8, 64, 1, 128), (1, 1000, 8, 64, 1, 128))
JOBS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
    "scan": (scan_parity, SIZES),
    "delta": (delta_parity, DELTA_SIZES),
    "mamba_ssm": (mamba_ssm_parity, MAMBA_SSM_SIZES),
    "conv": (conv_parity, (1, 63, 1000)),
    "norm": (norm_parity, (48, 2048, 4096)),
    "mamba1": (mamba1_parity, MAMBA1_SIZES),
    "steps": (steps_parity, tuple(STEPS)),
}
"""What is compared, and at which sizes."""


def parity(groups: list[str]) -> dict[str, Any]:
    """Worst errors by operation, dtype and size; each in a process of its own, so that kernels compile side by side."""
    with ProcessPoolExecutor(max_workers=14, mp_context=get_context("spawn")) as pool:
        running = {}
        # What compiles longest comes first.
        for group in sorted(groups, key=lambda name: name not in ("mamba1", "scan")):
            compare, sizes = JOBS[group]
            for dtype, size in product(ALLOWANCE, sizes):
                running[f"{group}/{str(dtype).removeprefix('torch.')}/{size}"] = pool.submit(compare, dtype, size)
        results = {}
        for name, future in running.items():
            results[name] = future.result()
            print(name, {k: v if isinstance(v, str) else round(v, 8) for k, v in results[name].items()}, flush=True)
    return results


def step_timings() -> dict[str, Any]:
    """Milliseconds of one decoding step of one sequence in bf16, launches included: many calls in a row, by wall clock."""
    found: dict[str, Any] = {}
    for operation, (function, _, options) in STEPS.items():
        tensors = {
            name: value.to(torch.float32 if name in FP32_ALWAYS else torch.bfloat16)
            for name, value in step_case(operation, 1).items()
        }
        found[operation] = {}
        for backend in ("triton", "reference"):
            seconds = []
            with torch.no_grad():
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                for _ in range(5):
                    torch.cuda.synchronize()
                    start = perf_counter()
                    for _ in range(200):
                        function(**tensors, **options, backend=backend)
                    torch.cuda.synchronize()
                    seconds.append((perf_counter() - start) / 200)
                memory = torch.cuda.max_memory_allocated() - before
            entry = {"forward_ms": 1000 * sorted(seconds)[2], "both_ms": None, "memory_bytes": memory}
            found[operation][backend] = entry
            print(operation, backend, entry, flush=True)
    return found


def mamba1_inputs(steps: int) -> Tensors:
    """A layer of Falcon-Mamba-7B in bf16: 8,192 channels of 16 states, parameters in fp32."""
    tensors = mamba1_case(1, steps, 8192, 16, rank=256, margin=0)
    held = {n: v.to(torch.float32 if n in FP32_ALWAYS else torch.bfloat16) for n, v in tensors.items()}
    return mamba1_views(held.pop("xz"), held.pop("BC"), 8192, 16) | held


def timings(groups: list[str], repeats: int = 10) -> dict[str, Any]:
    """Milliseconds of forward and forward + backward in bf16, kernels by name.

    A layer of Granite-4.0-H-Micro at 8,192 steps; for the gated delta rule one of Qwen3.5-4B, and for Mamba-1 one of
    Falcon-Mamba-7B, at 2,048 steps as well.
    """
    from triton.testing import do_bench

    tensors = scan_case(1, 8192, 64, 64, 1, 128)
    scan_inputs = {n: v.to(torch.float32 if n in FP32_ALWAYS else torch.bfloat16) for n, v in tensors.items()}
    delta = delta_case(1, 8192, 16, 32, 128, 128) if "delta" in groups else {}
    delta_inputs = {n: v.to(torch.float32 if n in FP32_ALWAYS else torch.bfloat16) for n, v in delta.items()}
    wide = torch.randn(1, 8192, 8512, device="cuda", dtype=torch.bfloat16)
    conv_inputs = {
        "x_BCT": wide[..., 4096:8448].transpose(1, 2),
        "weight_CK": torch.randn(4352, 4, device="cuda", dtype=torch.bfloat16),
        "bias_C": torch.randn(4352, device="cuda", dtype=torch.bfloat16),
    }
    norm_inputs = {
        "x": torch.randn(1, 8192, 4096, device="cuda", dtype=torch.bfloat16),
        "gate": wide[..., :4096],
        "weight_D": torch.randn(4096, device="cuda", dtype=torch.bfloat16),
    }
    mamba1 = {steps: mamba1_inputs(steps) for steps in (8192, 2048) if "mamba1" in groups}
    found: dict[str, Any] = {}
    for group, name, run, inputs, trained, options in (
        ("scan", "mamba2_chunk_scan", mamba2_chunk_scan, scan_inputs, tuple(scan_inputs), {"dt_softplus": True}),
        ("delta", "gated_delta_rule", gated_delta_rule, delta_inputs, tuple(delta_inputs), {"qk_l2norm": True}),
        ("conv", "causal_conv1d", causal_conv1d, conv_inputs, ("x_BCT",), {"activation": "silu"}),
        ("norm", "gated_rms_norm", gated_rms_norm, norm_inputs, ("x", "gate"), {"eps": 1e-5}),
        *(
            (
                "mamba1",
                f"mamba1_selective_scan, {steps:,} steps",
                mamba1_selective_scan,
                i,
                tuple(i),
                {"dt_softplus": True},
            )
            for steps, i in mamba1.items()
        ),
    ):
        if group not in groups:
            continue
        found[name] = {}
        for backend in ("triton", "reference"):
            leaves = {n: v.detach().requires_grad_(n in trained) for n, v in inputs.items()}

            def forward(
                leaves: Tensors = leaves, backend: str = backend, run: Any = run, options: Any = options
            ) -> Any:
                out = run(**leaves, backend=backend, **options)
                return out[0] if isinstance(out, tuple) else out

            upstream = torch.randn_like(forward())

            def both(
                forward: Any = forward, upstream: Any = upstream, leaves: Tensors = leaves, trained: Any = trained
            ) -> None:
                torch.autograd.grad(forward(), [leaves[n] for n in trained], upstream)

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            memory = torch.cuda.max_memory_allocated() - before
            entry = {
                "forward_ms": do_bench(forward, rep=50, return_mode="median"),
                "both_ms": do_bench(both, rep=100, return_mode="median"),
                "memory_bytes": memory,
            }
            if backend == "triton":
                with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                    for _ in range(repeats):
                        both()
                    torch.cuda.synchronize()
                entry["kernels_ms"] = {
                    e.key: e.self_device_time_total / 1000 / repeats
                    for e in sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)[:16]
                }
            found[name][backend] = entry
            print(name, backend, entry, flush=True)
    return found


def main() -> int:
    """Run parity, then speed, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(JOBS), default=[name for name in JOBS if name != "mamba_ssm"]
    )
    arguments = parser.parse_args()
    results = parity(arguments.only)
    ok = all(entry["ok"] for name, entry in results.items() if not name.startswith("mamba_ssm"))
    record = new_record(
        "benchmark", config={"benchmark": "operations", "only": arguments.only}, status="done" if ok else "failed"
    )
    record |= {"parity": results, "timings": None}
    if ok:
        record["timings"] = timings(arguments.only) | (step_timings() if "steps" in arguments.only else {})
    write_json(arguments.out, record)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
