"""Every planned site carries its adapter with the size, scale and count of the plan, and nothing else trains."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import LoraLayer
from torch.nn.utils import parametrize

from ssmtune.base_tensors import owner_of
from ssmtune.inventory import Inventory, coverage_table, take_inventory
from ssmtune.methods.lora import effective_alpha
from ssmtune.peft_layers import module_name
from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.fresh import base_tensors, build_base

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Site

REACHED_BY_DEFAULT = ("attention", "recurrent", "mlp", "core")


def _run(subject: Subject) -> CheckResult:
    """Measured: planned sites that are as planned. Limit: planned sites. A plan that is partial on purpose passes.

    What such a plan leaves untouched is named in `where` and, by layer, in `detail`.
    """
    adapted = subject.adapted
    plan = adapted.plan
    tensors = base_tensors(adapted)
    inventory = take_inventory(build_base(adapted.base_model.model.config, tensors, device="meta"))
    faults = {} if inventory.digest == plan.inventory_digest else {plan.model: "the plan was made for another model"}
    counts = _trained_counts(adapted)
    expected: Counter[str] = Counter()
    for site in plan.sites:
        expected[_key(site)] += site.num_params
    for site in plan.sites:
        fault = _site_fault(adapted, site, counts, expected)
        if fault:
            faults[site.path] = fault
    for key in sorted(set(counts) - set(expected)):
        faults[key] = f"{counts[key]:,} parameters train here, which the plan does not contain"
    num_bad = sum(site.path in faults for site in plan.sites)
    num_trained = sum(counts.values())
    untouched, table = _untouched(inventory, {site.path for site in plan.sites})
    if faults:
        path, fault = next(iter(faults.items()))
        detail = (
            f"{len(faults)} faults; first: {fault}. {num_trained:,} parameters train, the plan says {plan.trainable:,}."
        )
    else:
        path = untouched
        detail = f"{num_trained:,} parameters train, as the plan says. {table}"
    return CheckResult(
        name="coverage",
        ok=not faults and num_trained == plan.trainable,
        measured=len(plan.sites) - num_bad,
        limit=len(plan.sites),
        where=path,
        detail=detail,
    )


def _key(site: Site) -> str:
    """Where a site's parameters are found: its tensor, its module, or the module of all packed experts together."""
    if site.container != "module":
        return site.key
    return module_name(site) if len(site.shape) == 2 else site.path.rpartition(".")[0]


def _trained_counts(adapted: AdaptedModel) -> Counter[str]:
    counts: Counter[str] = Counter()
    keys = {f"{key}.{name}" if name else key: key for key, edit in adapted.edits.items() for name in edit.trained()}
    branches = {site.path for site in adapted.plan.sites if site.container == "branch"}
    for name, parameter in adapted.trained_parameters().items():
        if name.rpartition(".")[0] in branches:
            counts[name.rpartition(".")[0]] += parameter.numel()
            continue
        module = name.partition(".lora_")[0].removeprefix("base_model.model.").replace(".base_layer", "")
        counts[keys.get(name, module)] += parameter.numel()
    return counts


def _site_fault(adapted: AdaptedModel, site: Site, counts: Counter[str], expected: Counter[str]) -> str:
    """What is wrong at one site, or the empty string."""
    key = _key(site)
    if not counts[key]:
        return f"{site.role} carries no adapter"
    if counts[key] != expected[key]:
        return f"{site.role} trains {counts[key]:,} parameters, the plan says {expected[key]:,}"
    if site.container != "module":
        return _edit_fault(adapted, site)
    layer = adapted.base_model.model.get_submodule(key)
    if not isinstance(layer, LoraLayer):
        return f"{site.role} is not an adapted layer but a {type(layer).__name__}"
    if layer.merged or layer.disable_adapters or "default" not in layer.active_adapters:
        return f"{site.role}: the adapter is merged or switched off"
    if len(site.shape) == 2:
        return _factor_fault(layer, site)
    return ""


def _factor_fault(layer: LoraLayer, site: Site) -> str:
    rank, (num_out, num_in) = site.options["rank"], site.shape
    found = [tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)]
    if found != [(rank, num_in), (num_out, rank)]:
        return f"{site.role} has factors {found}, the plan says {[(rank, num_in), (num_out, rank)]}"
    scale = effective_alpha(site.options) / rank
    if layer.scaling["default"] != scale:
        return f"{site.role} is scaled by {layer.scaling['default']}, the plan says alpha / rank = {scale}"
    return ""


def _edit_fault(adapted: AdaptedModel, site: Site) -> str:
    owner: Any
    owner, name = owner_of(adapted.base_model.model, site.path)
    edit: Any = adapted.edits[site.key]
    if site.is_added:
        registered = [owner._modules.get(name)]
    else:
        registered = list(owner.parametrizations[name]) if parametrize.is_parametrized(owner, name) else []
    if not any(part is edit for part in registered):
        return f"{site.role}: the edit is not where the model reads it"
    if not edit.enabled:
        return f"{site.role}: the edit is switched off"
    if site.container == "branch":
        return ""
    trained = edit.trained()
    if "" in trained:
        shape = tuple(trained[""].shape)
        return "" if shape == site.shape else f"{site.role} has an edit of shape {shape}, the plan says {site.shape}"
    if site.container == "tensor" and edit.rows != site.rows:
        return f"{site.role} acts on rows {edit.rows}, the plan says {site.rows}"
    return ""


def _untouched(inventory: Inventory, edited: set[str]) -> tuple[str, str]:
    """Groups of which nothing is adapted, and one phrase per group: sites adapted of sites, and in which layers."""
    rows = [row for row in coverage_table(inventory, edited) if row["group"] in REACHED_BY_DEFAULT]
    phrases, untouched = [], []
    for group in REACHED_BY_DEFAULT:
        members = [row for row in rows if row["group"] == group]
        if not members:
            continue
        num = sum(row["adapted"] for row in members)
        missed = [str(row["layer"]) for row in members if not row["adapted"]]
        phrases.append(
            f"{group} {num} of {sum(row['sites'] for row in members)}"
            + (f" (nothing in layers {', '.join(missed)})" if missed else "")
        )
        if num == 0:
            untouched.append(group)
    where = f"not adapted: {', '.join(untouched)}" if untouched else ""
    return where, "Tensors adapted: " + "; ".join(phrases) + "."


CHECK = Check(proves="every planned site carries its adapter, and the counts equal the closed form", run=_run)
