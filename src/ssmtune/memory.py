"""How much of the forward pass is kept for the backward pass: the dial between memory and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ssmtune.errors import ConfigError

if TYPE_CHECKING:
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
    base.activation_checkpointing_enable({"use_reentrant": False})
    layers = [name for name, module in base.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    outermost = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    for name in outermost[::4] if memory == "balanced" else ():
        for module in base.get_submodule(name).modules():
            if isinstance(module, GradientCheckpointingLayer):
                vars(module)["gradient_checkpointing"] = False
