"""What a family file states, and how it is found.

A family is data and row arithmetic about one architecture of transformers.
It neither knows methods nor builds models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ssmtune.component import Access, Group
from ssmtune.discovery import load_constant, module_names
from ssmtune.errors import UnsupportedModel, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.ops.seam import Call

Topology = Literal["sequential", "parallel", "pure", "transformer"]

IGNORED_CONFIG = frozenset(
    # Attributes that change neither which parameters exist nor what the layers compute from them.
    """
    architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype transformers_version _name_or_path
    name_or_path use_cache model_type return_dict output_hidden_states output_attentions initializer_range
    id2label label2id num_labels problem_type chunk_size_feed_forward is_encoder_decoder is_decoder
    max_position_embeddings attention_dropout auto_map tokenizer_class _attn_implementation keys_to_ignore_at_inference
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """All tensors of one role: their names with `{layer}` for the layer's index, and the rows that make up the role's parts.

    `{block}` in a name is any number that is no layer's (of an image tower). `layer_type` restricts the claim to the
    layers of that type in the config's `layer_types`: for names that stand for something else in another kind of layer.
    `rows(config)` gives (role of the part, number of rows) from the first row to the last; the parts tile the tensor,
    and a role may come again (Qwen3-Next repeats q, k, v, z for every key head).
    `access` says whether the model calls a module that owns the tensor, or reads the parameter itself.
    """

    path: str
    role: str
    group: Group
    access: Access = "module"
    layer_type: str | None = None
    rows: Callable[[Any], tuple[tuple[str, int], ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything ssmtune knows of one architecture."""

    model_types: tuple[str, ...]
    topology: Topology
    claims: tuple[Claim, ...]
    handled_config: frozenset[str]
    """Config attributes that the claims and operations take into account, whatever their value."""
    backbone: str
    """Name of the submodule whose forward takes `position_ids` and `attention_mask` and runs the layers; "" for the
    model itself, where the submodule takes no `position_ids`."""
    cache: str = "past_key_values"
    """Name under which the model takes and returns its cache."""
    counts_on: bool = True
    """Whether the backbone, given a cache and no `position_ids`, counts them on from the cache (Bamba begins at 0 again)."""
    recurrent_classes: tuple[str, ...] = ()
    """Class names of the modules that carry a state from token to token."""
    operations: Callable[[nn.Module, Call], Mapping[str, Callable[..., Any]]] | None = None
    """For one recurrent module: name of a global of its forward -> the function to use instead.

    The functions read the current call's documents, padding and states from `Call`."""
    methods: Callable[[nn.Module, Call], Mapping[str, Callable[..., Any]]] | None = None
    """The same for modules off that seam: name of a method -> the function that the instance uses instead."""
    states: Callable[[nn.Module], Mapping[str, tuple[int, ...]]] | None = None
    """For one recurrent module: name of what can be added to its recurrence -> shape (`Call.states`)."""
    state_size: str | None = None
    """The config's attribute for the number N of states, where a larger one adds states and changes nothing else."""
    takes_prompt: bool = True
    """Whether learned positions can go before the text: its backbone takes embeddings, a mask of tokens and a cache."""
    entry_rows: Callable[[nn.Module], Mapping[str, tuple[tuple[int, int], ...]]] | None = None
    """For one recurrent module: name of each projection inside it whose output the convolution or the recurrence reads ->
    the [first, end) ranges of the output that they read; a gate's rows are not among them."""
    gated_norm: str = ""
    """Name of each recurrent module's submodule that takes its output and the gate z [B, T, D], where the gate reaches no
    operation; "" where it does."""
    blocks: Mapping[str, str] = field(default_factory=dict)
    """Role of a block -> name of its module, with `{layer}`, where it is not the deepest module that holds all of the
    layer's claims of that group; "" where a layer has no module that a branch can run beside."""
    prepare_packed: Callable[[nn.Module, torch.Tensor, torch.Tensor], Mapping[str, Any]] | None = None
    """(backbone, position_ids [B, T], seq_idx [B, T]) -> keyword arguments that keep documents apart in its layers.

    Where layers hand keyword arguments on, `{"seq_idx": seq_idx}` reaches the recurrent modules; where they only hand
    a mask on, `packing.mark_documents` makes one that carries `seq_idx`."""
    decay_bound: Callable[[Any], float | None] = lambda config: None
    """The least log decay per token where a sigmoid bounds it; None where the recurrence has no such gate."""
    tiny_configs: Callable[[], Mapping[str, Any]] = field(default=dict)
    """Small configs for the contract tests, by name; they cover the architecture's variants."""


def family_names() -> tuple[str, ...]:
    """Names of all families: the files beside this one."""
    return module_names("ssmtune.families")


def get_family(name: str) -> Family:
    """Return the family in the file `name`. Raises `UnsupportedModel` naming the nearest."""
    if name not in family_names():
        raise UnsupportedModel(f"family {name!r} does not exist; {nearest(name, family_names())}.")
    return load_constant("ssmtune.families", name, "FAMILY", Family)


def find_family(model_type: str) -> tuple[str, Family]:
    """Return (name, family) for a transformers `model_type`. Raises `UnsupportedModel` with the types that are supported."""
    supported = {}
    for name in family_names():
        family = get_family(name)
        if model_type in family.model_types:
            return name, family
        supported.update(dict.fromkeys(family.model_types, name))
    raise UnsupportedModel(
        f"model_type {model_type!r} is not supported; {nearest(model_type, supported)}. "
        "A family is one file in ssmtune/families; 'docs/families.md' shows how to write one."
    )


def check_config(name: str, family: Family, config: Any) -> None:
    """Raise `UnsupportedModel` when `config` sets an attribute away from its default that the family does not handle.

    The config of a language model inside a multimodal one is checked by itself.
    """
    if config.get_text_config() is not config:
        check_config(name, family, config.get_text_config())
    default = type(config)().to_dict()
    for key, value in config.to_dict().items():
        if key == "quantization_config":
            raise UnsupportedModel(
                f"{config.model_type}: its config says that its weights are quantised ({value.get('quant_method')}), by name "
                "patterns that say nothing of roles. Load the original weights and give 'quantize' in the run.yaml, or "
                "ssmtune.quantize.load_base(MODEL, quantize_config=...)."
            )
        if key in family.handled_config or key in IGNORED_CONFIG or key.startswith("_"):
            continue
        if key not in default or value != default[key]:
            raise UnsupportedModel(
                f"config attribute {key}={value!r} of model_type {config.model_type!r}: family {name!r} does not handle it "
                f"(default: {default.get(key, 'absent')!r}), so what it does to the layers is unknown. "
                f"Reset it, or extend ssmtune/families/{name}.py."
            )
