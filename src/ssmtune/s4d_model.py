"""S4D: a small language model of diagonal state-space layers, for controlled studies (no published checkpoint has this form).

Source: Gu, Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models", NeurIPS 2022.
Per channel, with A = -exp(log_A_real) + i A_imag and dt = exp(log_dt), complex of size N:
    S_t = exp(dt A) S_{t-1} + u_t,   y_t = 2 Re( C (exp(dt A) - 1) / A . S_t ) + D u_t
which is a convolution of u with K_l = 2 Re( C (exp(dt A) - 1) / A . exp(dt A l) ), plus the skip. B is 1, within C.

Dimensions: B batch, T time, D channels, N complex states of a channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ssmtune.ops.precision import outside_autocast


class S4DConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of an S4D model; `dt_min` and `dt_max` bound the initial step sizes and nothing else."""

    model_type = "s4d"

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 4
    state_size: int = 16
    hidden_act: str = "gelu"
    projection_bias: bool = True
    norm_eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    use_cache: bool = True


@outside_autocast
def s4d_convolution(
    u_BTD: torch.Tensor, log_decay_DN: torch.Tensor, readout_DN: torch.Tensor, state_BDN: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, D] and the final state [B, D, N], complex, by one FFT over the row.

    `log_decay_DN` = dt A and `readout_DN` = C (exp(dt A) - 1) / A are complex; `u_BTD` is real of the same precision.
    `state_BDN` is the state before the first step, zero by default.
    """
    num_steps = u_BTD.shape[1]
    steps = torch.arange(num_steps, device=u_BTD.device)
    powers_DNT = torch.exp(log_decay_DN[..., None] * steps)
    kernel_TD = 2 * torch.einsum("dn,dnt->td", readout_DN, powers_DNT).real
    spectrum = torch.fft.rfft(u_BTD, 2 * num_steps, dim=1) * torch.fft.rfft(kernel_TD, 2 * num_steps, dim=0)
    # The FFT leaves time innermost; a product with that layout rounds differently where weights require gradients.
    y_BTD = torch.fft.irfft(spectrum, 2 * num_steps, dim=1)[:, :num_steps].contiguous()
    final_BDN = torch.einsum("btd,dnt->bdn", u_BTD.to(powers_DNT.dtype), powers_DNT.flip(-1))
    if state_BDN is not None:
        entering = torch.exp(log_decay_DN) * state_BDN
        y_BTD = y_BTD + 2 * torch.einsum("dn,dnt,bdn->btd", readout_DN, powers_DNT, entering).real
        final_BDN = final_BDN + powers_DNT[..., -1] * entering
    return y_BTD, final_BDN


@outside_autocast
def s4d_recurrence(
    u_BTD: torch.Tensor,
    log_decay_DN: torch.Tensor,
    readout_DN: torch.Tensor,
    state_BDN: torch.Tensor | None = None,
    *,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same as `s4d_convolution`, step by step, also where rows hold several documents or padding.

    `seq_idx` [B, T]: the state is reset to zero where it changes. `padding_mask` [B, T]: a step where it is 0 leaves
    the state alone.
    """
    decay_DN = torch.exp(log_decay_DN)
    batch, num_steps, _ = u_BTD.shape
    state = decay_DN.new_zeros(batch, *decay_DN.shape) if state_BDN is None else state_BDN
    states = []
    for t in range(num_steps):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        moved = decay_DN * state + u_BTD[:, t, :, None]
        state = moved if padding_mask is None else torch.where(padding_mask[:, t, None, None].bool(), moved, state)
        states.append(state)
    return 2 * torch.einsum("dn,btdn->btd", readout_DN, torch.stack(states, dim=1)).real, state


class S4DMixer(nn.Module):
    """The state-space layer, an activation, and a projection that mixes the channels."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.state_size
        self.log_dt = nn.Parameter(torch.empty(width))
        self.log_A_real = nn.Parameter(torch.empty(width, size))
        self.A_imag = nn.Parameter(torch.empty(width, size))
        self.C = nn.Parameter(torch.empty(width, size, 2))
        self.D = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(width, width, bias=config.projection_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        state_BDN: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mixed input [B, T, D] and the final state [B, D, N], complex64 (complex128 for fp64)."""
        dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        u_BTD = hidden_BTD.to(dtype)
        A_DN = torch.complex(-torch.exp(self.log_A_real.to(dtype)), self.A_imag.to(dtype))
        log_decay_DN = torch.exp(self.log_dt.to(dtype))[:, None] * A_DN
        readout_DN = torch.view_as_complex(self.C.to(dtype)) * (torch.exp(log_decay_DN) - 1) / A_DN
        if hidden_BTD.shape[1] > 1 and seq_idx is None and padding_mask is None:
            y_BTD, final = s4d_convolution(u_BTD, log_decay_DN, readout_DN, state_BDN)
        else:
            y_BTD, final = s4d_recurrence(
                u_BTD, log_decay_DN, readout_DN, state_BDN, seq_idx=seq_idx, padding_mask=padding_mask
            )
        y_BTD = y_BTD + u_BTD * self.D.to(dtype)
        return self.out_proj(self.act_fn(y_BTD.to(hidden_BTD.dtype))), final


class S4DLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Norm, mixer, residual connection."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = S4DMixer(config)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        state_BDN: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states [B, T, D] after the layer, and the mixer's final state."""
        mixed, final = self.mixer(self.norm(hidden_BTD), state_BDN, seq_idx=seq_idx, padding_mask=padding_mask)
        return hidden_BTD + mixed, final


class S4DPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Initialisation, and what transformers asks of a model class."""

    config_class = S4DConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["S4DLayer"]
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """S4D-Lin: A = -1/2 + i pi n, log-uniform step sizes, C complex normal."""
        super()._init_weights(module)
        if isinstance(module, S4DMixer):
            low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
            initialization.uniform_(module.log_dt, low, high)
            initialization.constant_(module.log_A_real, math.log(0.5))
            frequencies = math.pi * torch.arange(self.config.state_size, device=module.A_imag.device)
            initialization.copy_(module.A_imag, frequencies.expand_as(module.A_imag).to(module.A_imag.dtype))
            initialization.normal_(module.C, std=math.sqrt(0.5))
            initialization.ones_(module.D)


@dataclass
class S4DOutput(ModelOutput):  # type: ignore[misc]
    """`state`: the final state of every layer, [B, D, N] each, to be given back with the next tokens."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: list[torch.Tensor] | None = None
    last_hidden_state: torch.Tensor | None = None


class S4DModel(S4DPreTrainedModel):
    """The layers between embeddings and head."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(S4DLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        state: list[torch.Tensor] | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> S4DOutput:
        """Return the last hidden states [B, T, D] of tokens [B, T], or of continuous inputs `inputs_embeds` [B, T, D].

        `seq_idx` [B, T] numbers the documents of a packed row; `position_ids` have no effect, the layers count nothing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("S4DModel takes either input_ids or inputs_embeds, and not both.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else attention_mask[:, -hidden.shape[1] :]
        if mask is not None and bool(mask.bool().all()):
            mask = None
        finals = []
        for index, layer in enumerate(self.layers):
            entering = None if state is None else state[index]
            hidden, final = layer(hidden, entering, seq_idx=seq_idx, padding_mask=mask)
            finals.append(final)
        keep = self.config.use_cache and not self.training if use_cache is None else use_cache
        return S4DOutput(last_hidden_state=self.norm(hidden), state=finals if keep else None)


class S4DForCausalLM(S4DPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with a head: next-token logits, or the outputs of a regression on continuous inputs."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: S4DConfig) -> None:
        super().__init__(config)
        self.model = S4DModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        state: list[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        seq_idx: torch.Tensor | None = None,
        **loss_options: Any,
    ) -> S4DOutput:
        """Return logits [B, T, V] (of the last `logits_to_keep` steps if not 0), the state, and with `labels` the loss."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            state=state,
            use_cache=use_cache,
            seq_idx=seq_idx,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_options)
        return S4DOutput(loss=loss, logits=logits, state=output.state, last_hidden_state=output.last_hidden_state)


@lru_cache
def register_s4d() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the model type `s4d`, for this process."""
    AutoConfig.register(S4DConfig.model_type, S4DConfig, exist_ok=True)
    AutoModelForCausalLM.register(S4DConfig, S4DForCausalLM, exist_ok=True)
