"""Put our operations under one model instance, without touching any class of transformers.

transformers' recurrent layers call module-level functions that they find as globals of their modeling file.
`rebind` gives an instance a copy of its own forward whose globals hold other functions; deleting the instance
attribute restores the class's forward.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ssmtune.errors import AttachError


def rebind(module: nn.Module, replacements: Mapping[str, Callable[..., Any]]) -> None:
    """Give `module` its class's forward with `replacements` in place of the functions of the same global names.

    Raises `AttachError` when the forward does not use one of the names: transformers changed under us.
    """
    if "forward" in vars(module):
        raise AttachError(
            f"{type(module).__name__}: its forward was already replaced on this instance. "
            "Detach the first adapter (or reload the model) before attaching another."
        )
    function = type(module).forward
    innermost = _innermost(function)
    missing = sorted(set(replacements) - set(innermost.__code__.co_names))
    if missing:
        raise AttachError(
            f"{type(module).__name__}.forward of the installed transformers does not call {', '.join(missing)}; "
            "this version moved the operations. Install a version in the range that 'pip show ssmtune' requires."
        )
    module.forward = types.MethodType(_with_globals(function, replacements), module)


def restore(module: nn.Module) -> None:
    """Undo `rebind`: the instance uses its class's forward again."""
    vars(module).pop("forward", None)


def _innermost(function: Any) -> types.FunctionType:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function  # type: ignore[no-any-return]


def _with_globals(function: Any, replacements: Mapping[str, Callable[..., Any]]) -> types.FunctionType:
    """Copy `function`, decorators included, so that the innermost one sees `replacements` among its globals."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        names = {**function.__globals__, **replacements}
        closure = function.__closure__
    else:
        names = function.__globals__
        new_inner = _with_globals(inner, replacements)
        closure = tuple(
            types.CellType(new_inner) if cell.cell_contents is inner else cell for cell in function.__closure__ or ()
        )
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
