"""Inventory: every parameter of a model with its role, claimed once. The `inspect` stage."""

from __future__ import annotations

import itertools
import os.path
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ssmtune.component import BRANCH, Component, layer_of
from ssmtune.errors import UnsupportedModel
from ssmtune.families.base import Claim, Family, Topology, check_config, find_family
from ssmtune.quantized import logical_shape
from ssmtune.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a model is made of.

    `components` are whole tensors, each parameter once; `segments` are their named row ranges; `states` are what can be
    added to the recurrences, under the name of their module; `blocks` are the modules that a branch can run beside.
    `tied` maps a parameter name to the name under which it is claimed.
    """

    family: str
    model_type: str
    topology: Topology
    total: int
    num_layers: int
    components: tuple[Component, ...]
    segments: tuple[Component, ...]
    states: tuple[Component, ...]
    blocks: tuple[Component, ...]
    tied: dict[str, str]

    @property
    def everything(self) -> tuple[Component, ...]:
        """Whole tensors, row ranges, states and blocks, in this order."""
        return (*self.components, *self.segments, *self.states, *self.blocks)

    @property
    def digest(self) -> str:
        """16 hex digits over roles, paths and shapes: a plan made for one inventory fits any model with the same."""
        return digest([self.family, [[c.role, c.path, list(c.shape)] for c in self.components]])

    def to_dict(self) -> dict[str, Any]:
        """The printed form of `inspect --json`."""
        return {
            "family": self.family,
            "model_type": self.model_type,
            "topology": self.topology,
            "total": self.total,
            "num_layers": self.num_layers,
            "unclaimed": [],
            "digest": self.digest,
            "components": [asdict(c) for c in (*self.components, *self.segments)],
            "states": [asdict(c) for c in self.states],
            "blocks": [asdict(c) for c in self.blocks],
            "tied": self.tied,
        }


def take_inventory(model: PreTrainedModel) -> Inventory:
    """Return the inventory of a model, real or on the meta device; the model is not changed.

    Raises `UnsupportedModel` for an unknown architecture, a config attribute that the family does not handle, a
    parameter that no role claims, or row ranges that do not tile their tensor.
    """
    config = model.config
    name, family = find_family(config.model_type)
    check_config(name, family, config)
    text = config.get_text_config()
    components, segments, unclaimed = [], [], []
    for path, parameter in model.named_parameters():
        claims = _matching(family, path, text)
        if len(claims) != 1:
            unclaimed.append(path)
            continue
        claim, layer = claims[0]
        component = Component(
            role=claim.role,
            group=claim.group,
            layer=layer,
            path=path,
            shape=logical_shape(parameter),
            access=claim.access,
        )
        components.append(component)
        segments.extend(_split_rows(component, claim, text))
    if unclaimed:
        listed = ", ".join(unclaimed[:5]) + (", ..." if len(unclaimed) > 5 else "")
        raise UnsupportedModel(
            f"{config.model_type}: {len(unclaimed)} parameters have no role in family {name!r} ({listed}). "
            f"The installed transformers may be newer than the family; extend ssmtune/families/{name}.py."
        )
    return Inventory(
        family=name,
        model_type=config.model_type,
        topology=family.topology,
        total=sum(c.num_params for c in components),
        num_layers=len({c.layer for c in components if c.layer is not None}),
        components=tuple(components),
        segments=tuple(segments),
        states=(*_states(model, family), *_positions(model, family, components)),
        blocks=tuple(_blocks(family, components, text.hidden_size)),
        tied=_tied_names(model),
    )


def _matching(family: Family, path: str, config: Any) -> list[tuple[Claim, int | None]]:
    found = []
    for claim in family.claims:
        pattern = re.escape(claim.path).replace(re.escape("{layer}"), r"(\d+)").replace(re.escape("{block}"), r"\d+")
        match = re.fullmatch(pattern, path)
        if match:
            layer = int(match.group(1)) if match.groups() else None
            if claim.layer_type is None or (layer is not None and config.layer_types[layer] == claim.layer_type):
                found.append((claim, layer))
    return found


def _split_rows(component: Component, claim: Claim, config: Any) -> list[Component]:
    if claim.rows is None:
        return []
    ranges: dict[str, list[tuple[int, int]]] = {}
    first = 0
    for role, num_rows in claim.rows(config):
        ranges.setdefault(role, []).append((first, first + num_rows))
        first += num_rows
    if first != component.shape[0]:
        raise UnsupportedModel(
            f"{component.path}: the row ranges of role {claim.role!r} cover {first} rows, the tensor has "
            f"{component.shape[0]}. The config contradicts the checkpoint, or the family's row arithmetic is wrong."
        )
    suffix = ".bias" if claim.role.endswith(".bias") else ""
    return [
        replace(
            component,
            role=role + suffix,
            shape=(sum(end - start for start, end in parts), *component.shape[1:]),
            rows=tuple(parts),
        )
        for role, parts in ranges.items()
    ]


def _states(model: PreTrainedModel, family: Family) -> list[Component]:
    # Imported here: an inventory is only taken of a model, so torch is there.
    from ssmtune.operations import recurrent_modules

    if family.states is None:
        return []
    names = {module: name for name, module in model.named_modules()}
    found = []
    for module in recurrent_modules(model, family):
        shapes = dict(family.states(module))
        if family.entry_rows is not None:
            ranges = itertools.chain(*family.entry_rows(module).values())
            shapes["affix"] = (sum(end - first for first, end in ranges),)
        for name, shape in shapes.items():
            found.append(
                Component(
                    role=f"state.{name}",
                    group="state",
                    layer=layer_of(names[module]),
                    path=f"{names[module]}.{name}",
                    shape=shape,
                    access="parameter",
                )
            )
    return found


def _positions(model: PreTrainedModel, family: Family, components: list[Component]) -> list[Component]:
    """Where learned positions can go: the embeddings, and the input of every layer that mixes tokens."""
    from ssmtune.virtual_tokens import PREFIX, PROMPT, backbone_of

    if not family.takes_prompt:
        return []
    backbone, shape = backbone_of(model, family), (model.config.get_text_config().hidden_size,)
    mixing = sorted({c.layer for c in components if c.layer is not None and c.group in ("attention", "recurrent")})
    places = [(PROMPT, None, backbone), *((PREFIX, layer, f"{backbone}.layers.{layer}") for layer in mixing)]
    return [
        Component(
            role=f"state.{name}", group="state", layer=layer, path=f"{path}.{name}", shape=shape, access="parameter"
        )
        for name, layer, path in places
    ]


def _blocks(family: Family, components: list[Component], width: int) -> list[Component]:
    """The MLP and attention block of every layer that has one, in model order; one shared by layers comes once."""
    found = []
    for group in ("mlp", "attention"):
        owners: dict[int, list[list[str]]] = {}
        for component in components:
            if component.group == group and component.layer is not None:
                owners.setdefault(component.layer, []).append(component.path.split(".")[:-1])
        role = f"block.{group}"
        for layer, paths in owners.items():
            path = ".".join(os.path.commonprefix(paths))
            if role in family.blocks:
                path = family.blocks[role].format(layer=layer)
                if not any(".".join(parts).startswith(path) for parts in paths):
                    continue
            if path:
                branch = f"{path}.{BRANCH}"
                found.append(
                    Component(role=role, group="block", layer=layer, path=branch, shape=(width,), access="module")
                )
    return sorted(found, key=lambda block: block.layer or 0)


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    first_name: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first_name.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    return tied


def coverage_table(inventory: Inventory, edited_paths: set[str]) -> list[dict[str, Any]]:
    """Return per layer and group how many weight tensors exist and how many of them `edited_paths` adapts.

    Biases and norms are left out of the groups that low-rank methods adapt, so that 100 % is reachable.
    """
    existing: Counter[tuple[int, str]] = Counter()
    adapted: Counter[tuple[int, str]] = Counter()
    for component in inventory.components:
        if component.layer is None or component.role.endswith(".bias") or component.role == "moe.router":
            continue
        key = (component.layer, component.group)
        existing[key] += 1
        adapted[key] += component.path in edited_paths
    return [
        {"layer": layer, "group": group, "sites": num, "adapted": adapted[layer, group]}
        for (layer, group), num in sorted(existing.items())
    ]
