"""Budget: the size of the edits at which a plan trains as many parameters as asked, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ssmtune.component import Component
from ssmtune.errors import PlacementError
from ssmtune.methods.base import get_method

Chosen = tuple[str, Any, Component]
"""A method's name, its decoded options, and the component it edits."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What was asked, and how near to it the plan comes.

    `size` is the rank (or what else the methods scale with) of every edit that has one, `left` the parameters of the
    budget that are not used, `fixed` those of edits whose size is what it is.
    """

    parameters: int
    size: int
    left: int
    fixed: int


def fit_budget(chosen: Sequence[Chosen], parameters: int) -> tuple[list[Chosen], Budget]:
    """Return the edits at the largest size with at most `parameters` trained parameters, and the size.

    One size for all edits that have one; it ends where no matrix has a rank that high. alpha keeps its ratio to the
    rank, and stays as it is with "rs" scaling, which is made for that. The counts are the methods' closed forms, which
    grow with the size. Raises `PlacementError` naming the smallest possible count, or what has a fixed size.
    """
    sized = [component.shape for name, _, component in chosen if get_method(name).size_option]
    fixed = sum(_count(entry) for entry in chosen if not get_method(entry[0]).size_option)
    if not sized:
        names = ", ".join(sorted({name for name, _, _ in chosen}))
        raise PlacementError(
            f"budget {parameters:,}: the edits ({names}) train {fixed:,} parameters and have a fixed size. "
            "Leave the budget out, or select fewer roles or layers."
        )
    smallest = sum(map(_count, _resized(chosen, 1)))
    if smallest > parameters:
        beside = f", {fixed:,} of them in edits of a fixed size" if fixed else ""
        raise PlacementError(
            f"budget {parameters:,}: the smallest plan of this recipe, size 1, trains {smallest:,} parameters{beside}. "
            f"Give at least {smallest:,}, or select fewer roles or layers."
        )
    low, high = 1, max(min(shape[-2:]) for shape in sized)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(_resized(chosen, middle), parameters) else (low, middle - 1)
    best = _resized(chosen, low)
    return best, Budget(parameters=parameters, size=low, left=parameters - sum(map(_count, best)), fixed=fixed)


def _count(entry: Chosen) -> int:
    name, options, component = entry
    return get_method(name).num_params(component.shape, options)


def _fits(chosen: Sequence[Chosen], parameters: int) -> bool:
    refused = any(get_method(name).refuses(component.shape, options) for name, options, component in chosen)
    return not refused and sum(map(_count, chosen)) <= parameters


def _resized(chosen: Sequence[Chosen], size: int) -> list[Chosen]:
    return [(name, _with_size(name, options, size), component) for name, options, component in chosen]


def _with_size(name: str, options: Any, size: int) -> Any:
    option = get_method(name).size_option
    if not option:
        return options
    given = asdict(options)
    changed: dict[str, Any] = {option: size}
    if "alpha" in given and given.get("scaling") != "rs":
        changed["alpha"] = given["alpha"] * size / given[option]
    return replace(options, **changed)
