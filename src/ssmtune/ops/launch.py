"""Launch Triton kernels with less work on the CPU: a layer launches dozens, and the GPU must not wait for them.

Triton binds and classifies every argument anew at each launch. Here a launch whose arguments are of the same kinds as an
earlier one's goes straight to the kernel that was compiled then.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.compiler.compiler import max_shared_mem
from triton.runtime.jit import JITFunction

MAX_INT32 = 2**31 - 1

_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernel, device, options and kinds of arguments -> what Triton compiled for them."""


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may take: 227 KiB on an H100, 99 on most others, 0 on a CPU."""
    return int(max_shared_mem(device.index)) if device.type == "cuda" else 0


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel[grid](*args, **options)`; constexprs and launch options are given by name, everything else by position."""
    if not isinstance(kernel, JITFunction):
        # Triton's interpreter has nothing to compile.
        kernel[grid](*args, **options)
        return
    kinds = tuple([_kind(arg) for arg in args])
    key = (kernel, torch.cuda.current_device(), kinds, tuple(options.items()))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **options)
        return
    named = [options[name] for name in kernel.arg_names[len(args) :]]
    compiled[(*grid, 1, 1)[:3]](*args, *named)


def _kind(arg: Any) -> Any:
    """What Triton specialises a kernel on: types, alignment to 16, numbers that are 1 or need 64 bits."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if type(arg) is int:
        return arg if arg == 1 else (arg % 16 == 0, arg > MAX_INT32)
    return type(arg)
