"""Keep an operation's arithmetic in the precision it chose, also where the caller runs under autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` running with autocast off: a bf16 decay would be wrong by whole percents over a long document."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return run


def multiplies_exactly(tensor: torch.Tensor) -> bool:
    """Return whether kernels keep fp32 precision in products with `tensor`: fp32 does, and Triton's interpreter, which is
    what runs on a CPU, multiplies fp32 only."""
    return tensor.dtype == torch.float32 or not tensor.is_cuda
