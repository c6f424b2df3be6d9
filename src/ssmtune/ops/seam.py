"""Put our operations under one model instance, without touching any class of transformers.

transformers' recurrent layers call module-level functions that they find as globals of their modeling file.
`rebind` gives an instance a copy of its own forward whose globals hold other functions; deleting the instance
attribute restores the class's forward.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ssmtune.errors import AttachError

STATES = ("initial_state", "state_offset", "output_offset", "affix", "additional_scan", "membrane")
"""Names under which a recurrent module holds trained additions to its recurrence."""


@dataclass
class Start:
    """What learned positions before the text leave behind (`ops.affix`): every new sequence starts from it."""

    state: torch.Tensor
    """The recurrence's state after them, without batch."""
    window_CK: torch.Tensor
    """[C, K-1] the last inputs of the convolution."""


@dataclass
class Call:
    """What a recurrent module's current call was given beside its inputs; its operations read it.

    It is filled when the module is called, so that a recomputed layer sees what the first computation saw.
    """

    seq_idx: torch.Tensor | None = None
    """[B, T] number of the document at each step, None for one document per row."""
    padding_mask: torch.Tensor | None = None
    """[B, T'] zero at padding, aligned with the last step; None without padding."""
    cache: Any = None
    """Weak proxy of the cache that the module was given; None without one."""
    layer: int | None = None
    """Index of the layer that the module belongs to, the same at every call; None outside the layers."""
    states: dict[str, Any] = field(default_factory=dict)
    """The module's trained additions to the recurrence, by the names of `STATES`."""
    num_steps: int = 0
    """T, the number of steps that the module was given."""
    hidden_BTD: torch.Tensor | None = None
    """What the module was given, where an addition reads it."""
    start: Start | None = None
    """What a new sequence starts from; None without learned positions, and where a sequence is continued."""
    recorded: dict[str, torch.Tensor] | None = None
    """Where the operations leave the convolution's "window" and the final "state", while learned positions run."""

    def __deepcopy__(self, memo: Any) -> Call:
        """A copied model runs on the same functions, which read this very call."""
        return self

    def edit(self, name: str) -> Any:
        """Return the module of a trained addition, or None where none is attached or it is switched off."""
        edit = self.states.get(name)
        return edit if edit is not None and edit.enabled else None

    def state(self, name: str) -> torch.Tensor | None:
        """Return a trained addition that is one tensor, fp32 and without batch, or None."""
        edit = self.edit(name)
        return None if edit is None else edit()

    def add_offsets(
        self,
        output: torch.Tensor,
        read_out: Callable[[torch.Tensor], torch.Tensor],
        gate: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return `output` with the trained offsets added in fp32, in its dtype; itself where there are none.

        `read_out` reads the state offset as the recurrence reads its state; `gate` scales what is added to an output
        that is gated already.
        """
        state, constant = self.state("state_offset"), self.state("output_offset")
        if state is None and constant is None:
            return output
        added = torch.zeros_like(output, dtype=torch.float32)
        if state is not None:
            added = added + read_out(state)
        if constant is not None:
            added = added + constant
        if gate is not None:
            added = added * gate()
        return (output.float() + added).to(output.dtype)


def replace_methods(module: nn.Module, replacements: Mapping[str, Callable[..., Any]]) -> None:
    """Let `module` use `replacements` in place of its class's methods of the same names.

    Raises `AttachError` when the class has no such method: transformers changed under us.
    """
    missing = sorted(name for name in replacements if not callable(getattr(type(module), name, None)))
    if missing:
        raise AttachError(
            f"{type(module).__name__} of the installed transformers has no method {', '.join(missing)}; "
            "this version moved the operations. Install a version in the range that 'pip show ssmtune' requires."
        )
    for name, function in replacements.items():
        setattr(module, name, function)


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


def restore(module: nn.Module, names: Iterable[str] = ("forward",)) -> None:
    """Undo `rebind` and `replace_methods`: the instance uses its class's own again."""
    for name in names:
        vars(module).pop(name, None)


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
