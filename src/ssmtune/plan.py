"""Plan: the explicit list of edits, made from an inventory and a recipe. The `plan` stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pydantic

from ssmtune.budget import Budget, Chosen, fit_budget
from ssmtune.component import BRANCH, Component
from ssmtune.config import decode
from ssmtune.errors import PlacementError, PlanMismatch
from ssmtune.inventory import Inventory, take_inventory
from ssmtune.methods.base import Container, Method, get_method
from ssmtune.placement import named_recipe, select_components, touches
from ssmtune.probe import Uses, probe
from ssmtune.recipe import Recipe
from ssmtune.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Site:
    """One component being edited: which tensor, by which method, with which options, at what cost."""

    role: str
    group: str
    layer: int | None
    path: str
    rows: tuple[tuple[int, int], ...] | None
    shape: tuple[int, ...]
    method: str
    container: Container
    options: Mapping[str, Any]
    num_params: int

    @property
    def is_added(self) -> bool:
        """Whether the site adds a module of its own and changes no tensor of the base."""
        return self.container in ("state", "branch")

    @property
    def key(self) -> str:
        """Name of the site, unique in a plan: its tensor, and its rows where it is not all of them.

        >>> Site(role="ssm.in.x", group="recurrent", layer=0, path="in_proj.weight", rows=((4, 8),), shape=(4, 2),
        ...      method="lora", container="tensor", options={}, num_params=0).key
        'in_proj.weight[4:8]'
        """
        if self.rows is None:
            return self.path
        return f"{self.path}[{','.join(f'{first}:{end}' for first, end in self.rows)}]"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The edits of one recipe on one model. Round-trips through `to_dict` and `from_dict`."""

    model: str
    inventory_digest: str
    recipe: str
    total: int
    sites: tuple[Site, ...]
    budget: Budget | None = None
    """What the plan was fitted to; None where its sizes were given."""

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(site.num_params for site in self.sites)

    @property
    def unmergeable(self) -> tuple[Site, ...]:
        """The sites whose method trains what no tensor of the base can hold."""
        return tuple(site for site in self.sites if not get_method(site.method).mergeable)

    @property
    def groups(self) -> dict[str, int]:
        """Trained parameters by group."""
        counts: Counter[str] = Counter()
        for site in self.sites:
            counts[site.group] += site.num_params
        return dict(counts)

    @property
    def digest(self) -> str:
        """16 hex digits over sites and options."""
        return digest([self.inventory_digest, [asdict(site) for site in self.sites]])

    def to_dict(self) -> dict[str, Any]:
        """The printed form of `plan --json`; `from_dict` reads it back."""
        return {
            "model": self.model,
            "inventory_digest": self.inventory_digest,
            "recipe": self.recipe,
            "total": self.total,
            "trainable": self.trainable,
            "groups": self.groups,
            "budget": None if self.budget is None else asdict(self.budget),
            "sites": [asdict(site) for site in self.sites],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan back. Raises `PlanMismatch` when fields are missing or the counts contradict the sites."""
        try:
            sites = tuple(_read_site(site) for site in data["sites"])
            plan = cls(
                model=data["model"],
                inventory_digest=data["inventory_digest"],
                recipe=data["recipe"],
                total=data["total"],
                sites=sites,
                # Plans made before there were budgets have none.
                budget=None if data.get("budget") is None else Budget(**data["budget"]),
            )
            trainable = data["trainable"]
        except (KeyError, TypeError, ValueError) as error:
            problem = str(error).replace("\n", " ")
            raise PlanMismatch(f"plan: a field is missing or malformed ({problem}). Make the plan again.") from None
        if not all(isinstance(value, str) for value in (plan.model, plan.inventory_digest, plan.recipe)):
            raise PlanMismatch("plan: model, inventory_digest and recipe must be text. Make the plan again.")
        if plan.trainable != trainable:
            raise PlanMismatch(
                f"plan: says {trainable:,} trainable parameters, its sites add up to {plan.trainable:,}. "
                "It was edited by hand or damaged; make it again."
            )
        return plan


def _read_site(data: Mapping[str, Any]) -> Site:
    """A site from plain data, with every type checked. Raises `ValueError`, `KeyError` or `TypeError`."""
    unknown = sorted(set(data) - {field.name for field in fields(Site)})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} of a site")
    return pydantic.TypeAdapter(Site).validate_python(dict(data))


def make_plan(
    model: PreTrainedModel,
    recipe: str | Recipe = "all+core",
    *,
    inventory: Inventory | None = None,
    budget: int | None = None,
    **recipe_options: Any,
) -> Plan:
    """Return the plan of a recipe for a model, real or on the meta device. The model is not changed.

    `recipe` is a name (further options go to `named_recipe`) or a `Recipe`; `budget` is a number of trained parameters
    to which the rank is fitted (`fit_budget`). Raises `PlacementError` for what cannot work: a selection that matches
    nothing, a site that some execution path never uses in the way its method needs, naming the path, or a budget that
    no rank meets.

    >>> plan = make_plan(model, "all+core")      # doctest: +SKIP
    >>> plan.trainable                           # doctest: +SKIP
    """
    inventory = inventory or take_inventory(model)
    if isinstance(recipe, str):
        recipe = named_recipe(recipe, **recipe_options)
    uses = probe(model)
    chosen: list[Chosen] = []
    for edit in recipe.edits:
        method = get_method(edit.method)
        options = decode(method.Options, edit.options, where=f"recipe {recipe.name!r}, options of {edit.method!r}")
        for component in select_components(
            inventory, edit, allow_unmatched=recipe.allow_unmatched, without=recipe.without
        ):
            here = options if method.at is None else method.at(component, options)
            chosen.append((edit.method, here, component))
    fitted = None
    if budget is not None:
        chosen, fitted = fit_budget(chosen, budget)
    sites = [_site(model, entry, inventory, uses) for entry in chosen]
    _refuse_overlap(sites)
    refuse_mixture(sites)
    return Plan(
        model=model.config.name_or_path or inventory.model_type,
        inventory_digest=inventory.digest,
        recipe=recipe.name,
        total=inventory.total,
        sites=tuple(sites),
        budget=fitted,
    )


def _site(model: PreTrainedModel, entry: Chosen, inventory: Inventory, uses: Uses) -> Site:
    name, options, component = entry
    method = get_method(name)
    reason = method.refuses(component.shape, options)
    if reason:
        raise PlacementError(
            f"{component.role} in layer {component.layer} ({component.path}): method {name!r} cannot edit it, since "
            f"{reason}. Change the option, or remove the site."
        )
    container = _container(model, component, method, options, inventory)
    _refuse_dead(component, name, container, uses)
    return Site(
        role=component.role,
        group=component.group,
        layer=component.layer,
        path=component.path,
        rows=component.rows,
        shape=component.shape,
        method=name,
        container=container,
        options=asdict(options),
        num_params=method.num_params(component.shape, options),
    )


def _container(
    model: PreTrainedModel, component: Component, method: Method, options: Any, inventory: Inventory
) -> Container:
    """PEFT's layer where the whole of an unshared linear layer (or of packed experts) is adapted; else the tensor itself."""
    from torch import nn

    if component.group == "state":
        return "state"
    if component.group == "block":
        return "branch"
    shared = component.path in inventory.tied.values()
    as_tensor = not method.in_module or method.needs_tensor(component.shape, options)
    if as_tensor or component.rows is not None or shared:
        return "tensor"
    owner = model.get_submodule(component.path.rpartition(".")[0])
    if len(component.shape) == 3:
        # PEFT wraps the owner of a packed tensor, which renames the tensors of the modules in it and takes its inputs by
        # position; where there are such modules (Zamba's mixer), the tensor is edited by itself.
        return "tensor" if any(True for child in owner.children() for _ in child.parameters()) else "module"
    is_called = isinstance(owner, nn.Linear) and component.access == "module"
    return "module" if is_called and not _is_redirected(model, component.path.removesuffix(".weight")) else "tensor"


def _is_redirected(model: PreTrainedModel, module_name: str) -> bool:
    """Whether PEFT takes the name of this module for an expert's of transformers 4, and would adapt the packed experts.

    It does so for some model types (Qwen3-Next) by the end of the name alone, whatever the module is.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[module_name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two names that it would fuse
        return True
    return set(config.target_modules) != {module_name}


def _refuse_dead(component: Component, method_name: str, container: Container, uses: Uses) -> None:
    """A module adapter needs its module called on every path; a tensor edit needs its tensor used on every path."""
    if container == "state":
        return  # Read by ssmtune's own operations, which run on every path.
    if container == "branch":
        # The block's own call is what the branch hangs on, and what the probe has recorded.
        component = replace(component, path=component.path.removesuffix(f".{BRANCH}"))
    for path, use in uses.of(component.path).items():
        packed_experts = len(component.shape) == 3
        alive = use == "CALL" or (use == "READ" and (container == "tensor" or packed_experts))
        if not alive:
            what = "never called (its weight is read raw)" if use == "READ" else "never used"
            raise PlacementError(
                f"{component.role} in layer {component.layer} ({component.path}) is {what} on path {path}, so method "
                f"{method_name!r} would have no effect there. Remove the site; 'ssmtune inspect MODEL' shows every path."
            )


def _refuse_overlap(sites: list[Site]) -> None:
    """Several edits of one tensor are one edit of each of its rows, or a mistake."""
    taken: dict[str, list[Site]] = {}
    for site in sites:
        for other in taken.setdefault(site.path, []):
            if touches(site.rows, other.rows):
                methods = f"{other.role} by {other.method!r} and {site.role} by {site.method!r}"
                raise PlacementError(
                    f"{site.path} is edited twice ({methods}). Keep one edit for each row of a tensor."
                )
        taken[site.path].append(site)


def refuse_mixture(sites: Sequence[Site]) -> None:
    """Raise `PlacementError` unless what PEFT switches for an adapter as a whole is the same for all sites of its layers."""
    methods = sorted({site.method for site in sites if site.container == "module"})
    if len({str(dict(get_method(method).peft_switches)) for method in methods}) > 1:
        raise PlacementError(
            f"one adapter holds {' and '.join(map(repr, methods))} on projections that every path calls, and PEFT's layers "
            "are one or the other as a whole. Use one of the methods for these sites; row ranges and tensors that are "
            "read raw may have another."
        )


def refuse_other_model(model: PreTrainedModel, plan: Plan) -> Inventory:
    """Return the model's inventory. Raises `PlanMismatch` for a plan of another, or with sites that it does not have."""
    inventory = take_inventory(model)
    if inventory.digest != plan.inventory_digest:
        raise PlanMismatch(
            f"the plan was made for {plan.model} (inventory {plan.inventory_digest}), this model is {inventory.model_type} "
            f"with inventory {inventory.digest}. Make a plan for this model."
        )
    known = {(c.path, c.rows, c.shape) for c in inventory.everything}
    for site in plan.sites:
        if (site.path, site.rows, site.shape) not in known:
            raise PlanMismatch(
                f"the plan edits {site.key[:200]} of shape {site.shape}, which this model does not have. The plan was altered; "
                "make it again."
            )
    return inventory
