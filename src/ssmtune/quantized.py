"""A base held in 4 bits: in which format, which of its tensors, and the values that their codes stand for.

bitsandbytes keeps such a weight as codes [n / 2, 1] with their scales beside them; everything else here goes by the shape
and the values that it stands for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from ssmtune.config import STRICT, decode
from ssmtune.errors import AttachError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

MARK = "_ssmtune_quantized"
"""Attribute of a model instance that holds its `Quantized`."""

BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own where they are quantised too (double_quant)."""


class QuantizationNote(UserWarning):
    """The base that an adapter is loaded on is not held as the one it was trained on; outputs differ by the quantisation."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantizeConfig:
    """Which projections of the base are held in 4 bits: what `quantize:` holds in a run.yaml.

    `components` are groups ("attention", "mlp"), "recurrent.in" and "recurrent.out" for the recurrent layers' projections
    before and after the recurrence ("recurrent": both), or roles with everything below them ("gdn.out"); `without` takes
    some of these out again. What cannot be in 4 bits stays as it is where a group names it, with the reason on record,
    and is refused where its own role does. `double_quant` quantises the scales as well. A projection with one side
    `narrow` times shorter than the other, or more, is small: it saves little and decides much (step sizes, gates).
    """

    bits: Literal[4] = 4
    format: Literal["nf4"] = "nf4"
    double_quant: bool = True
    components: tuple[str, ...] = ("attention", "recurrent.in", "mlp")
    without: tuple[str, ...] = ()
    narrow: int = pydantic.Field(default=16, ge=2)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a quantised base is: `paths` are its tensors in 4 bits.

    `base_digest` identifies the weights before, `digest` those that are there now. Round-trips through `to_dict`.
    """

    config: QuantizeConfig
    paths: tuple[str, ...]
    base_digest: str
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as an adapter's files hold it."""
        return {
            "config": {**asdict(self.config), "components": list(self.config.components)},
            "paths": list(self.paths),
            "base_digest": self.base_digest,
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quantized:
        """Read it back. Raises `ConfigError` for a field that is missing, unknown or of another type."""
        fields = {"config", "paths", "base_digest", "digest"}
        if not isinstance(data, Mapping) or set(data) != fields or not isinstance(data["paths"], list):
            raise ConfigError(f"quantization: must hold {', '.join(sorted(fields))}")
        return cls(
            config=decode(QuantizeConfig, data["config"], where="quantization"),
            paths=tuple(map(str, data["paths"])),
            base_digest=str(data["base_digest"]),
            digest=str(data["digest"]),
        )

    def describe(self) -> str:
        """In words: bits, format and how many tensors."""
        double = ", scales quantised too" if self.config.double_quant else ""
        return f"{self.config.bits} bits ({self.config.format}{double}; {len(self.paths)} tensors)"


def quantized_of(model: nn.Module) -> Quantized | None:
    """Return what is in 4 bits in a base model, None where nothing is."""
    found: Quantized | None = vars(model).get(MARK)
    return found


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a parameter holds 4-bit codes."""
    return vars(tensor).get("quant_state") is not None


def logical_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the weight that a parameter stands for."""
    return tuple(vars(tensor)["quant_state"].shape if is_quantized(tensor) else tensor.shape)


def logical_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of the weight that a parameter stands for."""
    dtype: torch.dtype = vars(tensor)["quant_state"].dtype if is_quantized(tensor) else tensor.dtype
    return dtype


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a base tensor: the tensor itself, or, [O, I] in the dtype before, what its codes stand for."""
    if not is_quantized(tensor):
        return tensor
    # Here and not at the top, since a base without 4-bit weights needs no bitsandbytes.
    import bitsandbytes as bnb

    values: torch.Tensor = bnb.functional.dequantize_4bit(tensor.data, vars(tensor)["quant_state"])
    return values


def scales_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a quantised parameter holds beside its codes, by bitsandbytes' names, without the tables of levels."""
    state = vars(tensor)["quant_state"]
    scales = {"absmax": state.absmax}
    if state.nested:
        scales |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return scales


def refuse_four_bits(model: nn.Module, what: str) -> None:
    """Raise `AttachError` for a base in 4 bits, into which nothing can be merged."""
    found = quantized_of(model)
    if found is not None:
        raise AttachError(
            f"cannot {what}: this base is held in {found.describe()}, and a change added to 4-bit weights would be rounded "
            "away. Merge into the original weights: 'ssmtune merge RUN --out DIR', or load the adapter on the model "
            "without 'quantize' and merge that."
        )


def note_other_base(trained_on: Quantized | None, found: Quantized | None, adapter: str) -> None:
    """Warn with `QuantizationNote` where an adapter is loaded on a base that is held otherwise than in training."""
    if (None if trained_on is None else trained_on.digest) == (None if found is None else found.digest):
        return
    names = ["full precision" if base is None else base.describe() for base in (trained_on, found)]
    if names[0] == names[1]:
        names[1] += " with other codes (quantised on another device, or other tensors)"
    warnings.warn(
        f"{adapter}: was trained on a base in {names[0]}; this one is in {names[1]}. Outputs differ from those in training "
        "by the quantisation error.",
        QuantizationNote,
        stacklevel=2,
    )


@contextmanager
def other_base_expected() -> Iterator[None]:
    """Run the block without notes: its caller states the difference itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationNote)
        yield
