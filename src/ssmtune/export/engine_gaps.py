"""What llama.cpp computes otherwise than transformers whatever a file holds, and transformers made to compute the same.

- GELU (tanh): on a CPU llama.cpp looks it up in a table of half-precision values, by the argument rounded to half.
- The step size dt: transformers keeps it within `time_step_limit` (Nemotron-H: at `time_step_min` or above), llama.cpp
  has no such bounds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ssmtune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

KNOWN = {0x0000: 0.0, 0x3C00: 0.8412, 0xBC00: -0.1588}
"""GELU (tanh) of 0, 1 and -1, by the bits of the argument in half precision, which are the place in the table."""
TABLE_ENDS = 10.0
"""Beyond +-this llama.cpp takes GELU as x and 0, without the table."""


def remove_dt_limits(model: nn.Module) -> bool:
    """Take the bounds of dt off the model's recurrences; return whether there were any."""
    unbounded = (0.0, math.inf)
    bounded = [m for m in model.modules() if tuple(vars(m).get("time_step_limit", unbounded)) != unbounded]
    for module in bounded:
        vars(module)["time_step_limit"] = unbounded
    return bool(bounded)


def replace_gelu(model: nn.Module, *, step: bool) -> bool:
    """Put llama.cpp's table, or a step in its place, where the model has GELU (tanh); return whether it has."""
    import torch
    from torch import nn
    from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

    class Tabulated(nn.Module):
        """GELU with argument and value rounded to half, or 0 and 1 by the argument's sign, within the table's ends."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = x.half().float()
            table = (~half.signbit()).float() if step else nn.functional.gelu(half, approximate="tanh").half().float()
            return torch.where(x <= -TABLE_ENDS, 0.0, torch.where(x >= TABLE_ENDS, x, table))

    kinds = {kind.__name__ for kind in (GELUTanh, NewGELUActivation, FastGELUActivation, Tabulated)}
    found = [(m, name) for m in model.modules() for name, child in m.named_children() if type(child).__name__ in kinds]
    for module, name in found:
        setattr(module, name, Tabulated())
    return bool(found)


@contextmanager
def step_over_gelu() -> Iterator[None]:
    """Overwrite the GELU table of the llama.cpp in this process with a step: 0 for arguments with a sign, 1 for others.

    A rounding error of fp32 moves few values over the step, where it moves many from one entry of a fine table to the
    next; so what is compared is everything but GELU. A model must have been opened, which fills the table.
    Raises `ConfigError` where the library does not show the table.
    """
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None, "the caller has opened it"
    try:
        table = (ctypes.c_uint16 * (1 << 16)).in_dll(ctypes.CDLL(spec.origin), "ggml_table_gelu_f16")
    except ValueError as error:
        raise ConfigError(f"llama.cpp's table of GELU cannot be reached ({error})") from None
    values = np.ctypeslib.as_array(table).view(np.float16)
    before = values.copy()
    if not np.allclose(values[list(KNOWN)], list(KNOWN.values()), atol=1e-3):
        raise ConfigError("llama.cpp's table of GELU is not where its library says")
    values[: 1 << 15], values[1 << 15 :] = 1.0, 0.0
    try:
        yield
    finally:
        values[:] = before
