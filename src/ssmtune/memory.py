"""How much of the forward pass is kept for the backward pass: the dial between memory and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ssmtune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssmtune.attach import AdaptedModel

Memory = Literal["fast", "balanced", "small"]
"""fast: keep what the layers keep. balanced: of three layers in four keep the input only. small: of every layer."""


def keep_activations(adapted: AdaptedModel, memory: Memory) -> None:
    """Let `adapted` keep as much for the backward pass as `memory` says, and compute the rest again.

    Raises `ConfigError` for a model of which transformers can recompute no layers.
    """
    # Imported here: a run's config is read, and help printed, without torch.
    from transformers.modeling_layers import GradientCheckpointingLayer

    if memory == "fast":
        return
    base = adapted.get_base_model()
    if not base.supports_gradient_checkpointing:
        raise ConfigError(
            f"memory: {memory!r}: {type(base).__name__} has no layers that can be recomputed. Use memory: fast."
        )
    base.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": draws_at_random(base)})
    layers = [name for name, module in base.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    outermost = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    for name in outermost[::4] if memory == "balanced" else ():
        for module in base.get_submodule(name).modules():
            if isinstance(module, GradientCheckpointingLayer):
                vars(module)["gradient_checkpointing"] = False


def recomputes(base: PreTrainedModel) -> bool:
    """Whether any layer of a model is computed again in the backward pass."""
    return any(vars(module).get("gradient_checkpointing", False) for module in base.modules())


def draws_at_random(base: PreTrainedModel) -> bool:
    """Whether a training pass of a model drops anything, in its own layers or in its adapters."""
    from torch import nn

    settings = base.config.get_text_config().to_dict()
    own = any(isinstance(value, float) and value > 0 for name, value in settings.items() if name.endswith("dropout"))
    return own or any(isinstance(module, nn.Dropout) and module.p > 0 for module in base.modules())
