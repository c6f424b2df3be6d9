"""What families of gated delta rule layers share: the operations, packing, and claims that read the same in all of them.

Gated DeltaNet decays its state by one number per head, Kimi Delta Attention (KDA) by one per key channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ssmtune.component import Group
from ssmtune.families._convolution import convolution_operations
from ssmtune.families._transformer import linear
from ssmtune.families.base import Claim

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.ops.seam import Call


def deltanet_operations(module: nn.Module, call: Call) -> Mapping[str, Callable[..., Any]]:
    """Our functions under the names that Gated DeltaNet layers call."""
    rule = _delta_rule(call)
    return {
        **convolution_operations(module, call),
        "torch_chunk_gated_delta_rule": rule,
        "torch_recurrent_gated_delta_rule": rule,
    }


def kda_operations(module: nn.Module, call: Call) -> Mapping[str, Callable[..., Any]]:
    """Our functions under the names that Kimi Delta Attention layers call."""
    rule = _delta_rule(call)
    return {
        **convolution_operations(module, call),
        "chunk_kimi_delta_attention": rule,
        "recurrent_kimi_delta_attention": rule,
    }


def _delta_rule(call: Call) -> Callable[..., Any]:
    def rule(
        query: Any,
        key: Any,
        value: Any,
        *,
        g: Any,
        beta: Any,
        initial_state: Any,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool,
        **_: Any,
    ) -> Any:
        from ssmtune.ops.documents import scan_from_state
        from ssmtune.ops.gated_delta_rule import gated_delta_rule

        def run(query: Any, key: Any, value: Any, g: Any, beta: Any, state: Any, seq_idx: Any, mask: Any) -> Any:
            return gated_delta_rule(
                query,
                key,
                value,
                g,
                beta,
                qk_l2norm=use_qk_l2norm_in_kernel,
                initial_state_BHKV=state,
                seq_idx=seq_idx,
                padding_mask=mask,
            )

        output, final = scan_from_state(call, initial_state, run, (query, key, value, g, beta))
        output = call.add_offsets(output, _read_out(query, use_qk_l2norm_in_kernel))
        return output, final if output_final_state else None

    return rule


def deltanet_states(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what can be added to the recurrence of a Gated DeltaNet layer."""
    layer: Any = module
    return _states(layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)


def kda_states(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what can be added to the recurrence of a Kimi Delta Attention layer."""
    layer: Any = module
    return _states(layer.num_heads, layer.head_dim, layer.head_dim)


def entry_rows(names: Iterable[str]) -> Callable[[nn.Module], Mapping[str, tuple[tuple[int, int], ...]]]:
    """`Family.entry_rows` where q, k, v, decay and write strength are all the rows of the linears `names`."""

    def rows(module: nn.Module) -> Mapping[str, tuple[tuple[int, int], ...]]:
        linears: Mapping[str, Any] = {name: module.get_submodule(name) for name in names}
        return {name: ((0, linear.out_features),) for name, linear in linears.items()}

    return rows


def _states(heads: int, keys: int, values: int) -> Mapping[str, tuple[int, ...]]:
    """For H_v value heads, keys of width d_k, values of width d_v."""
    return {
        "initial_state": (heads, keys, values),
        "state_offset": (heads, keys, values),
        "output_offset": (heads, values),
    }


def _read_out(query_HK: Any, normalised: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """S^T q [..., H_v, d_v] of a state S [H_v, d_k, d_v]; q as the rule reads it, normalised and scaled."""

    def read(state_HKV: torch.Tensor) -> torch.Tensor:
        import torch

        from ssmtune.ops.gated_delta_rule.reference import queries_and_keys

        query, _ = queries_and_keys(query_HK.float(), query_HK.float(), state_HKV.shape[0], None, normalised)
        return torch.einsum("...hk,hkv->...hv", query, state_HKV)

    return read


def projections(
    path: str, names: Mapping[str, str], group: Group, *, layer_type: str | None = None
) -> tuple[Claim, ...]:
    """Claims of the linear modules `path` + name; `names` maps a module's name to its role."""
    return tuple(
        replace(claim, layer_type=layer_type)
        for name, role in names.items()
        for claim in linear(path + name, role, group)
    )


def norms(path: str, names: Mapping[str, str], *, layer_type: str | None = None) -> tuple[Claim, ...]:
    """Claims of the weights of the norms `path` + name; `names` maps a module's name to its role."""
    return tuple(
        Claim(path=f"{path}{name}.weight", role=role, group="norm", layer_type=layer_type)
        for name, role in names.items()
    )


def embeddings(backbone: str) -> tuple[Claim, ...]:
    """Claims outside the layers."""
    return (
        Claim(path=f"{backbone}.embed_tokens.weight", role="embed.tokens", group="embedding"),
        Claim(path="lm_head.weight", role="embed.head", group="embedding"),
        Claim(path=f"{backbone}.norm.weight", role="norm.final", group="norm"),
    )


def mlp(path: str) -> tuple[Claim, ...]:
    """Claims of a gated MLP."""
    return projections(path, {f"{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}, "mlp")


def experts(path: str, shared: str) -> tuple[Claim, ...]:
    """Claims of packed experts, their router, and the shared expert whose module is named `shared`."""
    return (
        Claim(path=f"{path}experts.gate_up_proj", role="moe.experts.in", group="mlp", access="parameter"),
        Claim(path=f"{path}experts.down_proj", role="moe.experts.out", group="mlp", access="parameter"),
        Claim(path=f"{path}gate.weight", role="moe.router", group="mlp"),
        *projections(
            f"{path}{shared}.", {f"{name}_proj": f"moe.shared.{name}" for name in ("gate", "up", "down")}, "mlp"
        ),
    )


def recurrence(path: str, rows: Callable[[Any], tuple[tuple[str, int], ...]], *, gate: str = "") -> tuple[Claim, ...]:
    """Claims of the convolution and the core; `gate` names the submodule that owns the core, if one does."""
    return (
        Claim(path=f"{path}conv1d.weight", role="gdn.conv", group="conv", access="parameter", rows=rows),
        Claim(path=f"{path}{gate}A_log", role="gdn.A_log", group="core", access="parameter"),
        Claim(path=f"{path}{gate}dt_bias", role="gdn.dt_bias", group="core", access="parameter"),
    )
