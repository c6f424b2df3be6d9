"""Attach: a model and a plan become an adapted model, which is a `peft.PeftModel` that also holds tensor edits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import PeftModelForCausalLM
from torch import nn
from torch.nn.utils import parametrize

from ssmtune import adapter_files
from ssmtune.adapter_files import SavedAdapter
from ssmtune.base_digest import base_digest
from ssmtune.base_tensors import owner_of
from ssmtune.branches import BranchHooks
from ssmtune.config import decode
from ssmtune.edits import apply_additions, apply_edits, site_tensor
from ssmtune.errors import AdapterMismatch, AttachError
from ssmtune.families.base import find_family
from ssmtune.fast.base import FastLayers, install_fast
from ssmtune.methods.base import TensorEdit, get_method
from ssmtune.operations import install_operations
from ssmtune.ops.seam import Call
from ssmtune.peft_layers import lora_config, settle_magnitudes, tuner_for_every_projection, unwrap
from ssmtune.plan import Plan, Site, refuse_other_model
from ssmtune.quantize import refuse_wrong_four_bits
from ssmtune.quantized import Quantized, quantized_of
from ssmtune.selection import choose_at_attach
from ssmtune.virtual_tokens import install_virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Fast = Literal["auto", "off", "require"]


class AdaptedModel(PeftModelForCausalLM):
    """A `PeftModel` whose adapters are PEFT's layers plus trained edits of single tensors.

    `plan` is what was attached, `base_digest` identifies the base weights, `edits` maps the tensor's name in the base
    model to its edit, `fast_block` says whether a rewritten layer is in use and why not.
    """

    plan: Plan
    base_digest: str
    edits: dict[str, TensorEdit]
    fast_block: str

    def __init__(self, model: PreTrainedModel, plan: Plan, *, digest: str | None = None) -> None:
        """`digest` is the base's, where `model` is on the meta device and has no weights to take it from.

        There magnitudes and sparse entries are not chosen either: an adapter's files hold them (`adapter_files.fill`).
        """
        object.__setattr__(self, "plan", plan)
        object.__setattr__(self, "base_digest", digest or base_digest(model))
        object.__setattr__(self, "edits", {})
        object.__setattr__(self, "fast_block", "off")
        object.__setattr__(self, "_fast", FastLayers())
        object.__setattr__(self, "_spent", "")
        object.__setattr__(self, "_branches", None)
        object.__setattr__(self, "_required_grad", {name: p.requires_grad for name, p in model.named_parameters()})
        order = [(module, list(module._parameters)) for module in model.modules() if module._parameters]
        object.__setattr__(self, "_parameter_order", order)
        object.__setattr__(self, "_operations", install_operations(model, find_family(model.config.model_type)[1]))
        try:
            with warnings.catch_warnings(), tuner_for_every_projection(model):
                # PEFT reads an attribute that transformers has renamed.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
                super().__init__(model, lora_config(plan))
            if digest is None:
                settle_magnitudes(model)
            apply_edits(model, plan, self.edits)
            if any(site.container == "branch" for site in plan.sites):
                object.__setattr__(self, "_branches", BranchHooks(model, find_family(model.config.model_type)[1]))
            apply_additions(model, plan, self.edits, self._branches)
            if any(site.role in ("state.prompt", "state.prefix") for site in plan.sites):
                self._operations.hooks.extend(install_virtual_tokens(model, find_family(model.config.model_type)[1]))
            if digest is None:
                choose_at_attach(plan, self.edits, lambda site: site_tensor(model, site))
        except BaseException:
            self._take_off(model)
            raise

    @property
    def calls(self) -> dict[str, Call]:
        """What each recurrent module was last given beside its input, by its name in the base model."""
        calls: dict[str, Call] = self._operations.calls
        return calls

    @property
    def quantized(self) -> Quantized | None:
        """What of the base is in 4 bits, None where nothing is."""
        return quantized_of(self.base_model.model)

    @property
    def fast_layers(self) -> FastLayers:
        """The rewritten layers that are under the model."""
        layers: FastLayers = self._fast
        return layers

    def use_fast_layers(self) -> FastLayers:
        """Put the family's rewritten layers under the model where they can serve, and say in `fast_block` what runs."""
        base: PreTrainedModel = self.base_model.model
        installed = install_fast(base, *find_family(base.config.model_type), self.plan)
        object.__setattr__(self, "_fast", installed)
        object.__setattr__(self, "fast_block", installed.describe())
        return installed

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return every trained parameter by name: PEFT's factors under their module names, edits under their tensor's."""
        in_edits = self.edit_parameters()
        edited = {id(p) for p in in_edits.values()}
        factors = {name: p for name, p in self.named_parameters() if "lora_" in name and id(p) not in edited}
        return {**factors, **in_edits}

    def edit_parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains in the tensor edits, by site, with the factor's name behind it where there are several."""
        return {
            f"{key}.{name}" if name else key: parameter
            for key, edit in self.edits.items()
            for name, parameter in edit.trained().items()
        }

    def edit_constants(self) -> dict[str, torch.Tensor]:
        """Return what the tensor edits need besides what trains, by site and name: it is saved with them.

        What follows from the rest is not among it (torch's non-persistent buffers): read back, it could contradict it.
        """
        return {
            f"{key}.{name}": value
            for key, edit in self.edits.items()
            for name, value in edit.named_buffers()
            if name in cast(nn.Module, edit).state_dict()
        }

    def optimizer_group(self, name: str) -> str:
        """Return the optimiser group of a name from `trained_parameters`: "lora", "core" or "state"."""
        site = self._site_of(name)
        return "lora" if site is None else get_method(site.method).optimizer_group

    def decay_factor(self, name: str) -> float:
        """Return the multiple of the optimiser's weight decay for a name from `trained_parameters`."""
        site = self._site_of(name)
        if site is None:
            modules = [site for site in self.plan.sites if site.container == "module"]
            # PEFT's layers are all of one kind (`plan`), so any of the sites stands for the one that has this name.
            site, local = modules[0], name.rpartition(".lora_")[2]
        else:
            local = name.removeprefix(site.key).removeprefix(".")
        method = get_method(site.method)
        if method.decay_factor is not None:
            options = decode(method.Options, site.options, where=f"plan, {site.path}")
            return method.decay_factor(site.role, local, options)
        return 1.0 if method.optimizer_group == "lora" else 0.0

    def _site_of(self, name: str) -> Site | None:
        """The site of a tensor edit's parameter; None for what is in PEFT's layers."""
        for site in self.plan.sites:
            if site.container != "module" and (name == site.key or name.startswith(f"{site.key}.")):
                return site
        return None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the block as the base model: PEFT's layers and the tensor edits are both off."""
        previous = {path: edit.enabled for path, edit in self.edits.items()}
        for edit in self.edits.values():
            edit.enabled = False
        try:
            # PEFT refuses to switch off what is not there.
            has_layers = any(site.container == "module" for site in self.plan.sites)
            with super().disable_adapter() if has_layers else nullcontext():
                yield
        finally:
            for path, edit in self.edits.items():
                edit.enabled = previous[path]
            self.require_gradients()

    def require_gradients(self) -> None:
        """Let exactly the trained parameters require gradients; PEFT and trainers switch some of them off on the way."""
        trained = {id(p) for p in self.trained_parameters().values()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def save_pretrained(self, save_directory: str | Path, *, step: int = 0, run_id: str = "", **_: Any) -> None:
        """Write one adapter directory (`adapter_files`) with everything that was trained.

        Further keyword arguments are those that trainers pass to any model's `save_pretrained`; safetensors is the
        only format and the adapter's own tensors are the only ones written, so they have nothing left to decide.
        """
        self._refuse_spent("save")
        adapter_files.write(self, Path(save_directory), step=step, run_id=run_id)

    def detach(self) -> PreTrainedModel:
        """Take everything off and return the base model, bitwise as it was attached."""
        self._refuse_spent("detach")
        base: PreTrainedModel = self.base_model.model
        self._take_off(base)
        self.mark_spent("detached")
        return base

    def _take_off(self, base: PreTrainedModel) -> None:
        """Remove edits, PEFT's layers and operations from `base`, whatever of them is on, and restore its flags."""
        for path in self._edited_paths(base):
            owner, name = owner_of(base, path)
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        self._restore_order(base)
        for site in self.plan.sites:
            if site.is_added:
                parent, _, name = site.path.rpartition(".")
                base.get_submodule(parent)._modules.pop(name, None)
        if "base_model" in vars(self).get("_modules", {}):
            self.base_model.unload()
        else:
            unwrap(base)
        self._operations.remove()
        self._fast.remove()
        if self._branches is not None:
            self._branches.remove()
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        vars(base).pop("_ssmtune_adapted", None)

    def _edited_paths(self, base: PreTrainedModel) -> list[str]:
        """Every name under which a tensor of `base` carries edits; a shared tensor has several."""
        return [
            f"{module_path}.{name}"
            for module_path, module in base.named_modules()
            if parametrize.is_parametrized(module)
            for name in module.parametrizations
        ]

    def _restore_order(self, base: PreTrainedModel) -> None:
        """Put the edited modules' parameters back in their order: a removed parametrisation appends its tensor at the end."""
        for module, order in self._parameter_order:
            parameters = module._parameters
            ordered = sorted(parameters.items(), key=lambda item: order.index(item[0]))  # noqa: B023
            parameters.clear()
            parameters.update(ordered)

    def mark_spent(self, how: str) -> None:
        """Refuse any further use of this adapted model: its adapters are gone from the base."""
        object.__setattr__(self, "_spent", how)

    def _refuse_spent(self, action: str) -> None:
        if self._spent:
            raise AttachError(
                f"cannot {action} this adapted model: it was {self._spent} before, so its adapters are no longer on the base. "
                "Load the adapter directory again with ssmtune.load(base, directory)."
            )


def attach(model: PreTrainedModel, plan: Plan, fast: Fast = "auto") -> AdaptedModel:
    """Return `model` with the plan's adapters on it; the model's layers are used in place.

    Trained parameters are fp32 and start as the identity. Nothing of transformers' classes is changed;
    `fast`: "auto" rewrites decoder layers on a GPU where it can (`fast.base`), "off" never, "require" all of them.
    `adapted.detach()` gives the model back bitwise.
    Raises `PlanMismatch` when the plan was made for another architecture, before anything is touched; `AttachError` when
    the model already carries adapters, other tensors are in 4 bits than it says, or `fast="require"` cannot be served.

    >>> adapted = attach(model, make_plan(model, "all+core"))    # doctest: +SKIP
    """
    refuse_adapted(model)
    refuse_wrong_four_bits(model)
    refuse_other_model(model, plan)
    adapted = AdaptedModel(model, plan)
    adapted.require_gradients()
    vars(model)["_ssmtune_adapted"] = True
    if fast == "require" or (fast == "auto" and model.device.type == "cuda"):
        layers = adapted.use_fast_layers()
        if fast == "require" and layers.reasons:
            layer, reason = next(iter(layers.reasons.items()))
            adapted.detach()
            raise AttachError(
                f"fast='require': {len(layers.reasons)} of {layers.num_layers} layers keep the model's own forward, "
                f"for example {layer}: {reason}. Use fast='auto', which runs those on ssmtune's operations."
            )
    return adapted


def refuse_adapted(model: PreTrainedModel) -> None:
    """Raise `AttachError` for a model that carries adapters, of ours or PEFT's."""
    if isinstance(model, AdaptedModel) or "_ssmtune_adapted" in vars(model) or hasattr(model, "peft_config"):
        raise AttachError(
            "the model already carries adapters; wrapping it a second time would leave one set unloaded or untrained. "
            "Detach them first (adapted.detach()), merge them (ssmtune.merge), or load the base model again."
        )


def load(base_model: PreTrainedModel, directory: str | Path, *, trainable: bool = False) -> AdaptedModel:
    """Return `base_model` with the adapter of `directory` on it, exactly as it was saved, or raise what differs.

    Raises `AdapterMismatch` for missing, truncated, altered or mixed files and for another base; the model is then as before.
    """
    return attach_saved(base_model, adapter_files.read(Path(directory)), trainable=trainable)


def attach_saved(base_model: PreTrainedModel, saved: SavedAdapter, *, trainable: bool = False) -> AdaptedModel:
    """Return `base_model` with an adapter that was read before on it. Raises as `load` does."""
    adapter_files.check_base(saved, base_model)
    with warnings.catch_warnings():
        # PEFT warns that a fresh adapter is about to be overwritten, which is what loading is.
        warnings.simplefilter("ignore")
        adapted = attach(base_model, saved.plan)
        try:
            adapter_files.fill(adapted, saved)
        except AdapterMismatch:
            adapted.detach()
            raise
    if not trainable:
        for parameter in adapted.parameters():
            parameter.requires_grad_(False)
        adapted.eval()
    return adapted
