"""Compile what a rewritten layer launches, for a GPU that need not be there: python compile_kernels.py ARCH BYTES

Forward and backward run on a CPU with every launch noted instead of made; each kernel is then compiled with the settings
that the layer chose for a GPU with so many bytes of shared memory. Prints JSON: case -> kernel -> bytes that it shares.
`TRITON_INTERPRET=0` has to be set.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmtune.ops import launch as launching
from ssmtune.ops.gated_delta_rule import triton as delta
from ssmtune.ops.gated_mlp import triton as mlp
from ssmtune.ops.linear_cross_entropy import triton as loss
from ssmtune.ops.mamba2_chunk_scan import triton as scan
from ssmtune.ops.mamba2_mixer import Adapted, Core
from ssmtune.ops.mamba2_mixer import triton as mixer
from ssmtune.ops.projection import LowRank, Normed
from ssmtune.ops.projection import triton as projection

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]

# dtype, rank, heads' width, state, groups, documents: Granite's layer, Nemotron-H's heads, Falcon-H1's states in fp32.
CASES = {
    "bf16": (torch.bfloat16, 16, 64, 128, 1, False),
    "bf16, heads of 80, documents": (torch.bfloat16, 16, 80, 128, 2, True),
    "bf16, rank 256": (torch.bfloat16, 256, 64, 128, 1, False),
    "fp32, rank 32, states of 256": (torch.float32, 32, 64, 256, 1, True),
}
STEPS, WIDTH, INNER, HEADS, VOCABULARY = 70, 128, 256, 2, 512
HOPPER = 90
"""The only GPUs on which the gated delta rule's kernels run."""
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def run_layer(dtype: torch.dtype, rank: int, head: int, state: int, groups: int, documents: bool) -> None:
    """A mixer, an MLP and the loss of a head, forward and backward; their numbers mean nothing."""

    def frozen(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype)

    def low_rank(num_in: int, num_out: int) -> LowRank:
        return LowRank(torch.ones(rank, num_in, requires_grad=True), torch.ones(num_out, rank, requires_grad=True), 2.0)

    inner, norm = HEADS * head, Normed(frozen(WIDTH), 1e-5)
    channels = inner + 2 * groups * state
    wide = inner + channels + HEADS
    x = frozen(1, STEPS, WIDTH).requires_grad_()
    y = mixer.mamba2_mixer(
        x,
        Adapted(norm, frozen(wide, WIDTH), None, low_rank(WIDTH, wide)),
        Core(
            *(torch.ones(HEADS, requires_grad=True) for _ in range(3)),
            frozen(channels, 4),
            frozen(channels),
            groups,
            state,
        ),
        Adapted(Normed(frozen(inner), 1e-5), frozen(WIDTH, inner), None, low_rank(inner, WIDTH)),
        residual=True,
        multiplier=0.5,
        seq_idx=torch.zeros(1, STEPS, dtype=torch.int32) if documents else None,
    )
    y = mlp.gated_mlp(
        y, norm, frozen(2 * INNER, WIDTH), frozen(WIDTH, INNER), low_rank(WIDTH, 2 * INNER), low_rank(INNER, WIDTH), 0.5
    )
    targets = torch.zeros(STEPS, dtype=torch.int64)
    loss.linear_cross_entropy(y.flatten(0, 1), frozen(VOCABULARY, WIDTH), targets).backward()


def run_delta_rule(dtype: torch.dtype, documents: bool) -> None:
    """The gated delta rule at the width of Qwen3.5's heads, forward and backward."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(1, STEPS, *shape, dtype=dtype, requires_grad=True)

    y, _ = delta.gated_delta_rule(
        ones(1, 128),
        ones(1, 128),
        ones(HEADS, 128),
        ones(HEADS),
        ones(HEADS),
        qk_l2norm=True,
        seq_idx=torch.zeros(1, STEPS, dtype=torch.int32) if documents else None,
    )
    y.sum().backward()


def shared_bytes(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> int:
    """Compile one launch as Triton would specialise it."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        value = args[index] if index < len(args) else options[name]
        specialised = name not in (kernel.do_not_specialize or ())
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif index >= len(args) or value is None or (specialised and type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if specialised and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    launch_options = {name: value for name, value in options.items() if name not in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    return int(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch_options).metadata.shared)


def main(arch: int, capacity: int) -> None:
    """Compile every case."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        launches.append((kernel, args, options))

    def exactly(tensor: torch.Tensor) -> bool:
        return tensor.dtype == torch.float32

    def product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.mm(a.float(), b.float()) * factor

    # Wherever they were imported to: on a CPU all products are exact, and none of bf16 has an fp32 result.
    replaced = {
        launching.launch: note,
        projection.multiplies_exactly: exactly,
        projection.fp32_product: product,
        launching.shared_memory: lambda device: capacity,
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("ssmtune.ops")]:
        for name, value in list(vars(module).items()):
            if callable(value) and any(value is original for original in replaced):
                setattr(module, name, replaced[value])
    found: dict[str, dict[str, int]] = {}
    for case, sizes in CASES.items():
        launches.clear()
        run_layer(*sizes)
        if arch == HOPPER:
            run_delta_rule(sizes[0], sizes[-1])
        kernels = {kernel.fn.__name__: (kernel, args, options) for kernel, args, options in launches}
        found[case] = {name: shared_bytes(*one, arch) for name, one in kernels.items()}
    assert scan.shared_memory(torch.device("cpu")) == capacity
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
