"""The kernels of the rewritten layers compile for GPUs that are not here, and fit into what these share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which is built for Linux only")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = {
    "entering_kernel",
    "leaving_kernel",
    "through_states_kernel",
    "scores_back_kernel",
    "output_kernel",
    "inputs_kernel",
    "rolling_conv_kernel",
    "rolling_conv_back_kernel",
    "gate_kernel",
    "gate_back_kernel",
    "add_low_rank_kernel",
    "norm_kernel",
    "norm_back_kernel",
    "loss_kernel",
}

DELTA_KERNELS = {
    "delta_couplings_kernel",
    "delta_entering_kernel",
    "delta_output_kernel",
    "delta_reads_kernel",
    "delta_leaving_kernel",
    "delta_reads_back_kernel",
    "delta_couplings_back_kernel",
}


@pytest.mark.parametrize(
    ("arch", "capacity", "expected"), [(89, 99 * 1024, KERNELS), (90, 227 * 1024, KERNELS | DELTA_KERNELS)]
)
def test_kernels_fit_into_shared_memory(arch: int, capacity: int, expected: set[str], tmp_path: Path) -> None:
    """Of a card as most people have it, and of the one that the settings were measured on."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(arch), str(capacity)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 and all(set(kernels) >= expected for kernels in found.values())
    for case, kernels in found.items():
        for kernel, size in kernels.items():
            assert size <= capacity, f"{case}: {kernel} shares {size} bytes"
