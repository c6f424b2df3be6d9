"""Inventory: every parameter of a model with its role, claimed once. The `inspect` stage."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ssmtune.errors import UnsupportedModel
from ssmtune.families.base import Access, Claim, Family, Group, Topology, check_config, find_family
from ssmtune.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Component:
    """A tensor, or a row range of one, with a role. `rows` is [first, end) or None for the whole tensor."""

    role: str
    group: Group
    layer: int | None
    path: str
    shape: tuple[int, ...]
    access: Access
    rows: tuple[int, int] | None = None

    @property
    def num_params(self) -> int:
        """Number of elements of the component."""
        size = 1
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a model is made of.

    `components` are whole tensors, each parameter once; `segments` are their named row ranges.
    `tied` maps a parameter name to the name under which it is claimed.
    """

    family: str
    model_type: str
    topology: Topology
    total: int
    num_layers: int
    components: tuple[Component, ...]
    segments: tuple[Component, ...]
    tied: dict[str, str]

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
    components, segments, unclaimed = [], [], []
    for path, parameter in model.named_parameters():
        claims = _matching(family, path)
        if len(claims) != 1:
            unclaimed.append(path)
            continue
        claim, layer = claims[0]
        component = Component(
            role=claim.role,
            group=claim.group,
            layer=layer,
            path=path,
            shape=tuple(parameter.shape),
            access=claim.access,
        )
        components.append(component)
        segments.extend(_split_rows(component, claim, config))
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
        tied=_tied_names(model),
    )


def _matching(family: Family, path: str) -> list[tuple[Claim, int | None]]:
    found = []
    for claim in family.claims:
        pattern = re.escape(claim.path).replace(re.escape("{layer}"), r"(\d+)")
        match = re.fullmatch(pattern, path)
        if match:
            found.append((claim, int(match.group(1)) if match.groups() else None))
    return found


def _split_rows(component: Component, claim: Claim, config: Any) -> list[Component]:
    if claim.rows is None:
        return []
    parts, first = [], 0
    suffix = ".bias" if claim.role.endswith(".bias") else ""
    for role, num_rows in claim.rows(config):
        parts.append(
            Component(
                role=role + suffix,
                group=component.group,
                layer=component.layer,
                path=component.path,
                shape=(num_rows, *component.shape[1:]),
                access=component.access,
                rows=(first, first + num_rows),
            )
        )
        first += num_rows
    if first != component.shape[0]:
        raise UnsupportedModel(
            f"{component.path}: the row ranges of role {claim.role!r} cover {first} rows, the tensor has "
            f"{component.shape[0]}. The config contradicts the checkpoint, or the family's row arithmetic is wrong."
        )
    return parts


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
