"""PEFT's own layers around the modules of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType, TaskType
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ssmtune.errors import AttachError
from ssmtune.methods.base import get_method
from ssmtune.methods.lora import effective_alpha
from ssmtune.plan import Plan, Site
from ssmtune.quantized import dense, quantized_of


class _ProjectionTuner(LoraModel):  # type: ignore[misc]
    """PEFT's LoRA without its guard against `out_proj` in Mamba models.

    The guard is about fused kernels that read the weight past the module; ssmtune's operations never do, and the probe
    has measured that the module is called on every path.
    """

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        return None


@contextmanager
def tuner_for_every_projection(base: nn.Module) -> Iterator[None]:
    """Let a `PeftModel` of `base` that is built in this block use `_ProjectionTuner` for LoRA, and PEFT's 4-bit layers."""
    previous = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = _ProjectionTuner
    if quantized_of(base) is not None:
        # Only here: TRL rounds everything that trains to bf16 where a model says that it is loaded in 4 bits.
        vars(base)["is_loaded_in_4bit"] = True
    try:
        yield
    finally:
        vars(base).pop("is_loaded_in_4bit", None)
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = previous


def unwrap(base: nn.Module) -> None:
    """Take PEFT's layers off where building the tuner failed half-way, so that there is none to unload them."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer) and ".base_layer" not in name:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.get_base_layer())


def lora_config(plan: Plan) -> LoraConfig:
    """PEFT's config for the plan's low-rank sites, by full names only."""
    sites = [site for site in plan.sites if site.container == "module"]
    modules = [site for site in sites if len(site.shape) == 2]
    packed = [site for site in sites if len(site.shape) == 3]
    default: Mapping[str, Any] = sites[0].options if sites else {"rank": 1, "alpha": 1.0, "dropout": 0.0}
    alphas = {module_name(site): effective_alpha(site.options) for site in sites}
    alpha = effective_alpha(default)
    dropouts = {site.options["dropout"] for site in sites}
    if len(dropouts) > 1:
        raise AttachError(
            f"one adapter has one LoRA dropout, the plan has {sorted(dropouts)}. Use one value in all edits."
        )
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=default["rank"],
        # The scale of "rs" is put into alpha: PEFT's own switch for it would hold for every site.
        lora_alpha=alpha,
        lora_dropout=default["dropout"],
        target_modules=[module_name(site) for site in modules] or DUMMY_TARGET_MODULES,
        target_parameters=[site.path for site in packed] or None,
        rank_pattern={module_name(s): s.options["rank"] for s in sites if s.options["rank"] != default["rank"]},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        bias="none",
        **(get_method(sites[0].method).peft_switches if sites else {}),
    )


def settle_magnitudes(base: nn.Module) -> None:
    """Put the magnitudes of PEFT's DoRA layers at the fp32 norms of their rows.

    PEFT takes the norms in the base's dtype, so that on a bf16 base the start is not the base model.
    Raises `AttachError` for a row of zeros, by whose norm the layer would divide.
    """
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and module.lora_magnitude_vector:
            norms = torch.linalg.vector_norm(dense(module.get_base_layer().weight).detach().float(), dim=1)
            if not bool(norms.all()):
                raise AttachError(
                    f"{name}: {int((norms == 0).sum())} rows of its weight are zero, and DoRA divides by the norm of each. "
                    "Leave this projection out, or use method 'lora'."
                )
            module.lora_magnitude_vector["default"].weight = nn.Parameter(norms)


def module_name(site: Site) -> str:
    """Full name of the module that PEFT wraps for a site; the tensor's own name for packed experts."""
    return site.path.removesuffix(".weight")
