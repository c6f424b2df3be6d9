"""Gated DeltaNet and attention side by side in every layer: the sister that no published checkpoint gives controlled studies.

The layers are those of Qwen3.5's language model in transformers, the arrangement is Falcon-H1's:
both mixers read the same normed input, the residual connection adds both outputs, and a gated MLP follows.
Beside Qwen3.5, which alternates the two mixers, it differs in topology alone.

Dimensions: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, Qwen3_5TextConfig
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5GatedDeltaNet,
    Qwen3_5MLP,
    Qwen3_5PreTrainedModel,
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
)


class ParallelGatedDeltaConfig(Qwen3_5TextConfig):  # type: ignore[misc]
    """Sizes, with the names and defaults of Qwen3.5's; `layer_types` says "hybrid" for every layer, whatever is given."""

    model_type = "parallel_gated_delta"
    base_config_key = ""

    def __post_init__(self, **kwargs: Any) -> None:
        self.layer_types = ["hybrid"] * self.num_hidden_layers
        super().__post_init__(**kwargs)


class ParallelGatedDeltaLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Norm, both mixers, residual connection, norm, MLP, residual connection."""

    def __init__(self, config: ParallelGatedDeltaConfig, layer_idx: int) -> None:
        super().__init__()
        self.linear_attn = Qwen3_5GatedDeltaNet(config, layer_idx)
        self.self_attn = Qwen3_5Attention(config, layer_idx)
        self.mlp = Qwen3_5MLP(config, config.intermediate_size)
        self.input_layernorm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        masks: dict[str, Any],
        past_key_values: Any = None,
        **handed_on: Any,
    ) -> torch.Tensor:
        """Return the residual stream [B, T, D] after the layer; `masks` has one for each of the two mixers."""
        normed_BTD = self.input_layernorm(hidden_BTD)
        recurrent_BTD = self.linear_attn(
            hidden_states=normed_BTD,
            cache_params=past_key_values,
            attention_mask=masks["linear_attention"],
            **handed_on,
        )
        attended_BTD, _ = self.self_attn(
            hidden_states=normed_BTD,
            attention_mask=masks["full_attention"],
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **handed_on,
        )
        hidden_BTD = hidden_BTD + recurrent_BTD + attended_BTD
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))  # type: ignore[no-any-return]


class ParallelGatedDeltaPreTrainedModel(Qwen3_5PreTrainedModel):  # type: ignore[misc]
    """Qwen3.5's initialisation, and what transformers asks of a model class."""

    config: ParallelGatedDeltaConfig
    config_class = ParallelGatedDeltaConfig
    _no_split_modules = ["ParallelGatedDeltaLayer"]
    _can_record_outputs = {"hidden_states": ParallelGatedDeltaLayer, "attentions": Qwen3_5Attention}
    # A static cache has no layer that holds keys, values and a recurrent state.
    _can_compile_fullgraph = False


class ParallelGatedDeltaModel(ParallelGatedDeltaPreTrainedModel):
    """The layers between embeddings and head."""

    def __init__(self, config: ParallelGatedDeltaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ParallelGatedDeltaLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3_5TextRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **handed_on: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states [B, T, D] and the cache of tokens [B, T], or of `inputs_embeds` [B, T, D].

        `attention_mask` is [B, T'] with zeros at padding, or the masks of both mixers by their names.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("ParallelGatedDeltaModel takes either input_ids or inputs_embeds, and not both.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            first = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(first, first + hidden.shape[1], device=hidden.device)[None]
        masks = attention_mask
        if not isinstance(masks, dict):
            given = {
                "config": self.config,
                "inputs_embeds": hidden,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            masks = {
                "full_attention": create_causal_mask(**given),
                "linear_attention": create_recurrent_attention_mask(**given),
            }
        position_embeddings = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                position_embeddings=position_embeddings,
                masks=masks,
                past_key_values=past_key_values,
                **handed_on,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class ParallelGatedDeltaForCausalLM(ParallelGatedDeltaPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with a head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ParallelGatedDeltaConfig) -> None:
        super().__init__(config)
        self.model = ParallelGatedDeltaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **handed_on: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V] (of the last `logits_to_keep` steps if not 0), the cache, and with `labels` the loss."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **handed_on,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **handed_on)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)


@lru_cache
def register_parallel_gated_delta() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the model type `parallel_gated_delta`, for this process."""
    AutoConfig.register(ParallelGatedDeltaConfig.model_type, ParallelGatedDeltaConfig, exist_ok=True)
    AutoModelForCausalLM.register(ParallelGatedDeltaConfig, ParallelGatedDeltaForCausalLM, exist_ok=True)
