"""Quantise: hold the frozen projections that a config names in 4 bits. The `quantize` stage.

What is quantised is chosen by role and measured use, and replaced by full names, one projection after the other: no name is
matched by its beginning or end, and nothing is left out without a reason on record.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.component import GROUPS, Component
from ssmtune.config import load_yaml
from ssmtune.errors import AttachError, ConfigError, MissingDependency, PlacementError, nearest
from ssmtune.inventory import Inventory, take_inventory
from ssmtune.models import Dtype, load_model, weightless
from ssmtune.placement import is_below
from ssmtune.probe import Uses, probe
from ssmtune.quantized import BLOCK, MARK, SCALES_BLOCK, QuantizeConfig, Quantized, is_quantized, quantized_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HALVES = ("recurrent.in", "recurrent.out")
OUTPUTS = ("out", "output")
"""Last part of the roles of the projections that follow a recurrence."""
NEVER = {
    "embedding": "embeddings decide every logit",
    "core": "the core is read raw",
    "conv": "a convolution is read raw",
    "norm": "norms are vectors",
    "other": "no method adapts it",
}
FORMATS = {"nf4": QuantizeConfig()}
"""What `--quantize` takes beside a file."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One tensor and what becomes of it: `reason` is why it stays as it is, empty where it is quantised."""

    component: Component
    reason: str
    bytes_before: int
    bytes_after: int


def choose(model: PreTrainedModel, config: QuantizeConfig, *, inventory: Inventory | None = None) -> tuple[Choice, ...]:
    """Return what `config` makes of every tensor of a model, real or on the meta device, which is not changed.

    Raises `PlacementError` for an entry that names nothing (with the nearest), or by its own role what cannot be in 4
    bits, with the reason; and where nothing is quantised.
    """
    inventory = inventory or take_inventory(model)
    uses = probe(model)
    barred = {c.path for entry in config.without for c in _named(inventory, entry, "without")}
    selected: dict[str, str] = {}
    for entry in config.components:
        for component in _named(inventory, entry, "components"):
            reason = _obstacle(model, inventory, component, uses, config)
            if reason and not _is_group(entry):
                raise PlacementError(
                    f"quantize.components {entry!r}: {component.role} in layer {component.layer} ({component.path}) cannot be "
                    f"in {config.bits} bits: {reason}. Take the role out."
                )
            selected[component.path] = reason
    choices = []
    for component in inventory.components:
        reason = selected.get(component.path, NEVER.get(component.group, "not selected"))
        if component.path in barred and component.path in selected:
            reason = "left out by 'without'"
        before = component.num_params * model.get_parameter(component.path).element_size()
        after = before if reason else four_bit_bytes(component.num_params, config)
        choices.append(Choice(component=component, reason=reason, bytes_before=before, bytes_after=after))
    if all(choice.reason for choice in choices):
        reasons = "; ".join(sorted({c.reason for c in choices if c.component.path in selected}))
        raise PlacementError(
            f"quantize: nothing in this {inventory.model_type} is quantised by components {list(config.components)} "
            f"({reasons}). 'ssmtune inspect MODEL --quantize nf4' shows every role."
        )
    return tuple(choices)


def _is_group(entry: str) -> bool:
    return entry in GROUPS or entry in HALVES


def _named(inventory: Inventory, entry: str, field: str) -> list[Component]:
    """Whole tensors that an entry names. Raises `PlacementError` for none, for rows, and for what is never quantised."""
    where = f"quantize.{field} {entry!r}"
    if entry in NEVER:
        raise PlacementError(f"{where}: is never in 4 bits, since {NEVER[entry]}. Take it out.")
    matrices = [c for c in inventory.components if len(c.shape) > 1]
    if entry in HALVES:
        is_out = entry == "recurrent.out"
        return [c for c in matrices if c.group == "recurrent" and is_out == (c.role.rpartition(".")[2] in OUTPUTS)]
    if entry in GROUPS:
        # A group that a model does not have is no mistake: the default names three.
        return [c for c in matrices if c.group == entry]
    found = [c for c in inventory.components if is_below(c.role, entry)]
    found = [c for c in found if c.role == entry or not c.role.endswith(".bias")]
    if not found:
        rows = [c for c in inventory.segments if is_below(c.role, entry)]
        known = sorted({*(c.role for c in matrices if c.group not in NEVER), *GROUPS, *HALVES} - set(NEVER))
        hint = f"names rows of {rows[0].path}; tensors are quantised as a whole" if rows else nearest(entry, known)
        raise PlacementError(f"{where}: no tensor of this {inventory.model_type} has that role; {hint}.")
    return found


def _obstacle(
    model: PreTrainedModel, inventory: Inventory, component: Component, uses: Uses, config: QuantizeConfig
) -> str:
    """Why a tensor cannot be in 4 bits, or the empty string."""
    from torch import nn

    if component.group in NEVER:
        return NEVER[component.group]
    if component.role == "moe.router":
        return "a router is small and decides which experts run"
    if component.role.endswith(".bias"):
        return "it is a bias"
    if len(component.shape) == 3 and component.group == "mlp":
        return "packed experts are one tensor of three dimensions, no linear layers"
    raw = [path for path, use in uses.of(component.path).items() if use != "CALL"]
    if raw:
        return f"its values are read past its module on path {raw[0]}, which would read codes"
    if len(component.shape) != 2 or type(model.get_submodule(component.path.removesuffix(".weight"))) is not nn.Linear:
        return "its module is no plain linear layer"
    if component.path in inventory.tied.values():
        return "several modules share it"
    if max(component.shape) >= config.narrow * min(component.shape):
        return f"small: one side is {config.narrow} times shorter, or more"
    return ""


def four_bit_bytes(num_params: int, config: QuantizeConfig) -> int:
    """Return the bytes of a tensor's codes and scales; tables of levels (64 bytes a tensor, 1 KiB for all) are not counted.

    >>> four_bit_bytes(64 * 256, QuantizeConfig()), four_bit_bytes(64 * 256, QuantizeConfig(double_quant=False))
    (8456, 9216)
    """
    num_scales = math.ceil(num_params / BLOCK)
    scales = num_scales + 4 * math.ceil(num_scales / SCALES_BLOCK) + 4 if config.double_quant else 4 * num_scales
    return math.ceil(num_params / 2) + scales


def bytes_table(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Return one row per role and reason: tensors, parameters, bytes before and after, in model order."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for choice in choices:
        c = choice.component
        start = {"group": c.group, "role": c.role, "tensors": 0, "parameters": 0, "bytes_before": 0, "bytes_after": 0}
        row = rows.setdefault(
            (c.role, choice.reason), {**start, "quantized": not choice.reason, "reason": choice.reason}
        )
        row["tensors"] += 1
        row["parameters"] += c.num_params
        row["bytes_before"] += choice.bytes_before
        row["bytes_after"] += choice.bytes_after
    return list(rows.values())


def summary(choices: Sequence[Choice], config: QuantizeConfig) -> dict[str, Any]:
    """Return what a record and `inspect --quantize --json` say: the config, bytes in all and by role, with reasons."""
    rows = bytes_table(choices)
    return {
        "config": asdict(config),
        "bytes_before": sum(row["bytes_before"] for row in rows),
        "bytes_after": sum(row["bytes_after"] for row in rows),
        "parameters": sum(row["parameters"] for row in rows if row["quantized"]),
        "roles": rows,
    }


def quantization_facts(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return what a record keeps of a base in 4 bits: `summary` beside its own precision, and the digest; None for others."""
    found = quantized_of(model)
    if found is None:
        return None
    choices = choose(weightless(model.config, dtype=model.dtype), found.config)
    return {**summary(choices, found.config), "digest": found.digest}


def read_quantize(value: str) -> QuantizeConfig:
    """Return the config that `--quantize` names: a format, or a YAML file with the fields of a `quantize` block."""
    if value in FORMATS:
        return FORMATS[value]
    if value.endswith((".yaml", ".yml", ".json")) or Path(value).is_file():
        return load_yaml(QuantizeConfig, value)
    raise ConfigError(f"--quantize {value!r}: {nearest(value, FORMATS)}, or a YAML file with the fields of 'quantize'.")


def require_bitsandbytes() -> None:
    """Raise `MissingDependency` with the install command where bitsandbytes is not there."""
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        raise MissingDependency(
            "quantize needs bitsandbytes: pip install 'ssmtune[quant]' (or pip install bitsandbytes)."
        ) from None


def quantize(
    model: PreTrainedModel, config: QuantizeConfig, *, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Hold the chosen projections of a plain model in 4 bits, in place, and return the model.

    With `device` the model moves there, one projection after the other, so that the whole of it in full precision never
    lies there. Its config stays as it was. `Quantized` (`quantized_of`) says what was done.
    Raises `MissingDependency`, `PlacementError` as `choose` does, `AttachError` for adapters or 4 bits that are there.
    """
    import torch
    from torch import nn

    require_bitsandbytes()
    # Here and not at the top, since it needs bitsandbytes.
    from ssmtune.four_bit import quantize_linear

    if quantized_of(model) is not None or "peft_config" in vars(model) or "_ssmtune_adapted" in vars(model):
        raise AttachError("quantize takes a plain model: this one is in 4 bits already, or carries adapters.")
    paths = tuple(choice.component.path for choice in choose(model, config) if not choice.reason)
    # Imported here: a run's config is read, and help printed, without torch.
    from ssmtune.base_digest import base_digest, weights_digest

    digest = base_digest(model)
    target = torch.device(device) if device is not None else model.device
    for path in paths:
        name = path.removesuffix(".weight")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, quantize_linear(linear, config, target))
    if device is not None:
        model.to(target)
    vars(model)[MARK] = Quantized(config=config, paths=paths, base_digest=digest, digest=weights_digest(model))
    return model


def four_bit_faults(model: PreTrainedModel) -> dict[str, str]:
    """Return what is wrong with the tensors in 4 bits of a base, by name: too many, too few, or read past their module.

    Compared are what is there, what `quantize` recorded, and what its config makes of this architecture.
    """
    from ssmtune.base_tensors import base_name

    there = {base_name(name) for name, parameter in model.named_parameters() if is_quantized(parameter)}
    found = quantized_of(model)
    if found is None:
        return dict.fromkeys(sorted(there), "is in 4 bits, and not by ssmtune")
    choices = {c.component.path: c for c in choose(weightless(model.config), found.config)}
    faults = {}
    for path in sorted(there | set(found.paths) | {path for path, choice in choices.items() if not choice.reason}):
        choice = choices.get(path)
        reason = "there is no such tensor" if choice is None else choice.reason
        if path in there and reason:
            faults[path] = f"is in 4 bits, although {reason}"
        elif not reason and path not in there:
            faults[path] = "is not in 4 bits, although the config chooses it"
        elif (path in there) != (path in found.paths):
            faults[path] = "is not as it was recorded when the base was quantised"
    return faults


def refuse_wrong_four_bits(model: PreTrainedModel) -> None:
    """Raise `AttachError` naming the tensors of a base that are in 4 bits and should not be, or the reverse."""
    for path, fault in four_bit_faults(model).items():
        raise AttachError(
            f"{path}: {fault}. Load the original model and give ssmtune.quantize.quantize what to hold in 4 bits."
        )


def load_base(
    name: str, *, dtype: Dtype = "auto", device: str | None = None, quantize_config: QuantizeConfig | None = None
) -> PreTrainedModel:
    """Return MODEL with its weights, as `load_model` does, with what `quantize_config` names in 4 bits.

    The weights are read into the memory of the CPU and reach `device` quantised. Raises as `load_model` and `quantize` do.
    """
    if quantize_config is None:
        return load_model(name, dtype=dtype, device=device)
    require_bitsandbytes()
    return quantize(load_model(name, dtype=dtype), quantize_config, device=device)


def recorded_config(settings: Mapping[str, Any]) -> QuantizeConfig | None:
    """Return the quantize block of a run's recorded config; None where it has none."""
    from ssmtune.config import decode

    block = settings.get("quantize")
    return None if block is None else decode(QuantizeConfig, block, where="the run's record, quantize")
