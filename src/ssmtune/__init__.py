"""ssmtune: parameter-efficient fine-tuning of state-space and hybrid language models, with proof of what was trained.

inventory = ssmtune.take_inventory(model)
plan      = ssmtune.make_plan(model, recipe="all+core")
adapted   = ssmtune.attach(model, plan)
adapted.save_pretrained(directory)
adapted   = ssmtune.load(base_model, directory)
report    = ssmtune.verify(adapted)
model     = ssmtune.merge(adapted)
adapters  = ssmtune.AdapterSet(base_model)
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmtune.adapter_set import AdapterSet
    from ssmtune.attach import AdaptedModel, attach, load
    from ssmtune.inventory import Inventory, take_inventory
    from ssmtune.merge import merge
    from ssmtune.plan import Plan, make_plan
    from ssmtune.recipe import Edit, Recipe
    from ssmtune.truncate import truncate
    from ssmtune.verify import verify

__version__ = "0.1.0"

_WHERE = {
    "AdapterSet": "ssmtune.adapter_set",
    "AdaptedModel": "ssmtune.attach",
    "attach": "ssmtune.attach",
    "load": "ssmtune.attach",
    "Inventory": "ssmtune.inventory",
    "take_inventory": "ssmtune.inventory",
    "merge": "ssmtune.merge",
    "Edit": "ssmtune.recipe",
    "Recipe": "ssmtune.recipe",
    "Plan": "ssmtune.plan",
    "make_plan": "ssmtune.plan",
    "truncate": "ssmtune.truncate",
    "verify": "ssmtune.verify",
}

__all__ = [
    "AdaptedModel",
    "AdapterSet",
    "Edit",
    "Inventory",
    "Plan",
    "Recipe",
    "__version__",
    "attach",
    "load",
    "make_plan",
    "merge",
    "take_inventory",
    "truncate",
    "verify",
]


class _Package(types.ModuleType):
    """The package, in which `ssmtune.attach` stays the function although there is a module of that name.

    Importing a submodule binds its name in the package; for the names below that would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import on first use, so that `ssmtune --help` loads neither torch nor transformers."""
    if name not in _WHERE:
        raise AttributeError(f"module 'ssmtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
