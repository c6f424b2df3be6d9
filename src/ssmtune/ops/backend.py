"""Which implementation of an operation runs, and why: Triton kernels on NVIDIA GPUs, the PyTorch reference elsewhere."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from ssmtune.errors import ConfigError

Backend = Literal["auto", "reference", "triton"]
Name = Literal["reference", "triton"]

SWITCH = "SSMTUNE_OPS"
"""Environment variable: "reference" keeps every operation on plain PyTorch, to compare or to rule kernels out."""

OPERATIONS = (
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_delta_rule",
    "gated_mlp",
    "gated_rms_norm",
    "linear_cross_entropy",
    "mamba1_selective_scan",
    "mamba1_state_update",
    "mamba2_chunk_scan",
    "mamba2_conv_scan",
    "mamba2_mixer",
    "projection",
    "selective_state_update",
)
"""Operations that have kernels."""

FIRST_VERSION = (3, 4)
"""The oldest Triton that the kernels are written for; the versions they were measured with are in records/bench."""

_UNTRIED = "its kernels have been tried with Triton 3.6 only"

KNOWN_BAD: dict[str, tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...]] = {
    # On Hopper GPUs compilers from 3.4 on have given kernels of chunks wrong gradients (fla-org/flash-linear-attention
    # #640, #984) and illegal memory accesses (triton-lang/triton #10486, #11366): a version that was not compared counts.
    "gated_delta_rule": (((0,), (3, 6), _UNTRIED), ((3, 7), (99,), _UNTRIED)),
}
"""Operation -> (first version, first good version, what is wrong), on GPUs; the interpreter compiles nothing."""

log = logging.getLogger("ssmtune.ops")


@dataclass(frozen=True)
class Choice:
    """The implementation of one call and the reason for it."""

    name: Name
    reason: str


def choose(operation: str, tensor: torch.Tensor, backend: Backend = "auto", refusal: str | None = None) -> Choice:
    """Return what runs `operation` on `tensor`; `refusal` is why its kernels cannot serve this call, if they cannot.

    Raises `ConfigError` with the reason when "triton" is asked for by name and cannot run.
    """
    if backend == "reference":
        return Choice("reference", "asked for")
    problem = refusal or _problem(operation, tensor.device.type, asked=backend == "triton")
    if problem is None:
        return Choice("triton", f"Triton {_version()} on {tensor.device.type}")
    if backend == "triton":
        raise ConfigError(
            f"{operation}: backend 'triton' cannot run here: {problem}. Use backend='auto' or 'reference'."
        )
    if tensor.is_cuda:
        _warn_once(operation, problem)
    return Choice("reference", problem)


def gradient_refusal(*tensors: torch.Tensor | None) -> str | None:
    """Why the kernel of a decoding step, which has no backward pass, cannot serve a call with these tensors, or None."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "gradients are asked for; the kernel of a single step has none"
    return None


def backends(device: str) -> dict[str, Choice]:
    """Return what each operation with kernels would run on `device` ("cpu", "cuda"), and why."""
    found = {}
    for operation in OPERATIONS:
        problem = _problem(operation, torch.device(device).type, asked=False)
        name: Name = "triton" if problem is None else "reference"
        found[operation] = Choice(name, problem or f"Triton {_version()} on {device}")
    return found


def _problem(operation: str, device_type: str, *, asked: bool) -> str | None:
    """Why kernels cannot run on a device, or None."""
    if os.environ.get(SWITCH) == "reference" and not asked:
        return f"{SWITCH}=reference"
    numbers = _version_numbers()
    if numbers is None:
        return "Triton is not installed"
    if numbers < FIRST_VERSION:
        return f"Triton {_version()} is older than {'.'.join(map(str, FIRST_VERSION))}"
    # On a CPU the kernels run in Triton's interpreter, for tests: only where both are asked for.
    if device_type != "cuda" and not (asked and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"runs on {device_type}"
    for first, good, wrong in KNOWN_BAD.get(operation, ()) if device_type == "cuda" else ():
        if first <= numbers < good:
            return f"Triton {_version()}: {wrong}"
    if device_type == "cuda" and torch.version.hip is not None:
        return "the kernels are tested on NVIDIA GPUs only"
    return None


@lru_cache(maxsize=1)
def _version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _version_numbers() -> tuple[int, ...] | None:
    """Kept: every call of every operation asks."""
    version = _version()
    return None if version is None else tuple(int(part) for part in version.split("+")[0].split(".")[:3])


@lru_cache(maxsize=64)
def _warn_once(operation: str, problem: str) -> None:
    log.warning("%s runs on the PyTorch reference, which is slow on a GPU: %s.", operation, problem)
