"""Learned positions in front of every text of the whole model: prompt tuning, and a prefix at the input of every layer.

They are put before the first token of every document, so that they pass through attention, convolutions and recurrences as
tokens do, and are dropped from what the backbone returns: logits and losses are those of the real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ssmtune.errors import AttachError
from ssmtune.packing import documents_of, mark_documents, segment_index

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ssmtune.families.base import Family

PROMPT, PREFIX = "prompt", "prefix"
"""Names under which the backbone and its layers hold learned positions."""


def backbone_of(model: PreTrainedModel, family: Family) -> str:
    """Return the name of the submodule that takes embeddings and returns hidden states."""
    return family.backbone or model.base_model_prefix


class Insertion:
    """M positions before the first token of every document of [B, T] steps, and the way back; T' steps with them.

    A document begins where `seq_idx` changes, or at the first step that `mask` does not mark as padding.
    Rows with fewer documents than others end in steps that belong to none.
    """

    def __init__(self, num_tokens: int, mask_BT: torch.Tensor, seq_idx: torch.Tensor | None) -> None:
        batch, num_steps = mask_BT.shape
        if seq_idx is None:
            # A row of padding alone has no first token: its positions go behind it.
            num_before = (mask_BT.cumsum(dim=1) == 0).sum(dim=1).clamp(max=num_steps - 1)
            starts = F.one_hot(num_before, num_steps)
        else:
            starts = (torch.diff(seq_idx, prepend=seq_idx[:, :1] - 1, dim=1) != 0).long()
        steps = torch.arange(num_steps, device=mask_BT.device) + num_tokens * starts.cumsum(dim=1)
        self.num_steps = num_steps + num_tokens * int(starts.sum(dim=1).max())
        rows = torch.arange(batch, device=mask_BT.device)[:, None] * self.num_steps
        self.batch, self.num_tokens = batch, num_tokens
        self._real = (rows + steps).flatten()
        first = self._real[starts.flatten().bool()]
        self._virtual = (first[:, None] + torch.arange(-num_tokens, 0, device=mask_BT.device)).flatten()
        self.num_documents = len(first)

    def lengthen(self, x: torch.Tensor, virtual: torch.Tensor | None = None, fill: int = 0) -> torch.Tensor:
        """Return `x` [B, T, ...] as [B, T', ...] with `virtual` [M, ...] (or as many per document) in the places of M."""
        longer = x.new_full((self.batch * self.num_steps, *x.shape[2:]), fill).index_copy(
            0, self._real, x.flatten(0, 1)
        )
        longer = longer.view(self.batch, self.num_steps, *x.shape[2:])
        return longer if virtual is None else self.overwrite(longer, virtual)

    def overwrite(self, longer: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
        """Return `longer` [B, T', ...] with `virtual` in the places of M, as `lengthen` puts it there."""
        if len(virtual) == self.num_tokens:
            virtual = virtual.repeat(self.num_documents, *[1] * (virtual.dim() - 1))
        flat = longer.flatten(0, 1).index_copy(0, self._virtual, virtual.to(longer.dtype))
        return flat.view(longer.shape)

    def shorten(self, longer: torch.Tensor) -> torch.Tensor:
        """Return [B, T', ...] as [B, T, ...]: the real steps alone."""
        return longer.flatten(0, 1)[self._real].view(self.batch, -1, *longer.shape[2:])

    def before(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Return [D M]: for each place of M the value that `x_BT` has at its document's first step."""
        first = self._virtual.view(-1, self.num_tokens)[:, -1] + 1
        longer = self.lengthen(x_BT).flatten()
        return longer[first].repeat_interleave(self.num_tokens)


@dataclass
class _Running:
    """The insertion of the pass that is running, None where a sequence is continued; what its embeddings still lack."""

    insertion: Insertion | None = None
    prompt: torch.Tensor | None = None


def install_virtual_tokens(model: PreTrainedModel, family: Family) -> list[Any]:
    """Let the backbone of `model` insert the positions that it and its layers hold; return the handles that undo it.

    Raises `AttachError` when it holds a prompt and prefixes at once, or prefixes of several lengths.
    """
    backbone: Any = model.get_submodule(backbone_of(model, family))
    layers = [layer for layer in backbone.layers if PREFIX in layer._modules]
    lengths = {layer.prefix.num_tokens for layer in layers}
    if len(lengths) > 1 or (layers and PROMPT in backbone._modules):
        raise AttachError(
            f"one model has one prompt or one prefix; the plan has {'a prompt and ' if PROMPT in backbone._modules else ''}"
            f"prefixes of {sorted(lengths)} positions. A prefix at the first layer is a prompt: keep one of the edits."
        )
    running = _Running()
    handles = [
        backbone.register_forward_pre_hook(_inserting(running, family, layers), with_kwargs=True, prepend=True),
        # Models may scale what the embedding gives, and not what they are given in its place.
        backbone.get_input_embeddings().register_forward_hook(_embedding(running)),
        backbone.register_forward_hook(_dropping(running)),
    ]
    return handles + [layer.register_forward_pre_hook(_prefixing(running), with_kwargs=True) for layer in layers]


def _inserting(running: _Running, family: Family, layers: list[Any]) -> Any:
    def hook(backbone: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make the backbone's inputs longer by the positions: tokens or embeddings, mask, position ids, documents."""
        running.insertion = running.prompt = None
        edits = (backbone._modules.get(PROMPT), *(layer.prefix for layer in layers))
        edits = tuple(edit for edit in edits if edit is not None and edit.enabled)
        if not edits:
            return args, kwargs
        if args:
            args, kwargs = (), {**kwargs, "input_ids": args[0]}
        _refuse_inputs(kwargs)
        mask, cache, positions = (kwargs.get(name) for name in ("attention_mask", family.cache, "position_ids"))
        num_tokens = edits[0].num_tokens
        given = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        tokens = kwargs[given]
        if cache is not None and holds_text(cache):
            return args, {**kwargs, **_continued(num_tokens, mask, positions, tokens.shape[1])}
        seq_idx = kwargs.get("seq_idx") if documents_of(mask) is None else documents_of(mask)
        if positions is not None:
            positions = positions.expand(tokens.shape[0], -1)
            if seq_idx is None and cache is None and (mask is None or bool(mask.bool().all())):
                seq_idx = segment_index(positions)
        ones = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        insertion = running.insertion = Insertion(num_tokens, ones if mask is None else mask, seq_idx)
        running.prompt = edits[0]() if PROMPT in backbone._modules else None
        longer = {given: insertion.lengthen(tokens)}
        if given == "inputs_embeds" and running.prompt is not None:
            longer[given] = insertion.overwrite(longer[given], running.prompt)
        return args, {**kwargs, **longer, **_lengthened(insertion, mask, positions, seq_idx, kwargs)}

    return hook


def _lengthened(
    insertion: Insertion,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Mask, position ids and documents of the longer rows, in the form in which they were given."""
    changed: dict[str, Any] = {}
    if positions is not None:
        first = insertion.before(positions)
        steps = torch.arange(insertion.num_tokens, device=first.device).repeat(insertion.num_documents)
        longer = insertion.lengthen(positions + insertion.num_tokens, first + steps, fill=-1)
        # What is left at a row's end counts as a document of its own, as a collator's padding does.
        changed["position_ids"] = torch.where(longer < 0, (longer < 0).cumsum(dim=1) - 1, longer)
    if seq_idx is not None:
        documents = insertion.lengthen(seq_idx, insertion.before(seq_idx), fill=int(seq_idx.max()) + 1)
        if given.get("seq_idx") is not None:
            changed["seq_idx"] = documents
        if mask is not None:
            marked = documents_of(mask) is not None
            changed["attention_mask"] = mark_documents(documents) if marked else torch.ones_like(documents)
    elif mask is not None:
        changed["attention_mask"] = insertion.lengthen(mask, mask.new_ones(insertion.num_tokens))
    return changed


def _continued(
    num_tokens: int, mask: torch.Tensor | None, positions: torch.Tensor | None, num_new: int
) -> dict[str, Any]:
    """Mask and positions of `num_new` steps after those in a cache, which holds the learned positions as well."""
    changed: dict[str, Any] = {}
    if mask is not None:
        num_seen = mask.shape[1] - num_new
        if num_seen > 0 and not bool(mask[:, :num_seen].any(dim=1).all()):
            raise AttachError(
                f"prompt: all {num_seen} steps that the cache holds of a row are padding, so that the learned positions "
                "would not lie before its first token. Prefill the padding together with a token of every row."
            )
        longer = Insertion(num_tokens, mask, None)
        changed["attention_mask"] = longer.lengthen(mask, mask.new_ones(num_tokens))
    if positions is not None:
        changed["position_ids"] = positions + num_tokens
    return changed


def _embedding(running: _Running) -> Any:
    def hook(embedding: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Put the prompt, without one zeros, where the longer rows hold no token of the text."""
        if running.insertion is None:
            return output
        zeros = output.new_zeros(running.insertion.num_tokens, output.shape[-1])
        return running.insertion.overwrite(output, zeros if running.prompt is None else running.prompt)

    return hook


def _dropping(running: _Running) -> Any:
    def hook(backbone: nn.Module, args: Any, output: Any) -> Any:
        """Drop the learned positions from the hidden states."""
        insertion, running.insertion, running.prompt = running.insertion, None, None
        if insertion is None:
            return output
        if not hasattr(output, "last_hidden_state"):
            return (insertion.shorten(output[0]), *output[1:])
        output.last_hidden_state = insertion.shorten(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(insertion.shorten(hidden) for hidden in output.hidden_states)
        return output

    return hook


def _prefixing(running: _Running) -> Any:
    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Put the layer's own positions in the place of what the layer before made of its."""
        if torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False):
            raise AttachError(
                "prefix: gradient checkpointing runs a layer again when it is no longer known where its positions lie. "
                "Switch checkpointing off, or train a prompt, which checkpointing leaves alone."
            )
        if running.insertion is None or not layer.prefix.enabled:
            return args, kwargs
        if args:
            return (running.insertion.overwrite(args[0], layer.prefix()), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": running.insertion.overwrite(kwargs["hidden_states"], layer.prefix())}

    return hook


def run_virtual_tokens(model: PreTrainedModel, family: Family) -> Any:
    """Return the cache after the learned positions alone, for one row; None where the model holds none, or none is on.

    What else acts where a sequence starts acts before them. The model is not changed.
    """
    if not family.takes_prompt:
        return None
    backbone: Any = model.get_submodule(backbone_of(model, family))
    held = {layer: layer._modules[PREFIX] for layer in backbone.layers if PREFIX in layer._modules}
    embedding = backbone.get_input_embeddings()
    if PROMPT in backbone._modules:
        held[embedding] = backbone._modules[PROMPT]
    held = {module: edit for module, edit in held.items() if edit.enabled}
    if not held:
        return None
    num_tokens = next(iter(held.values())).num_tokens
    prompt = held.pop(embedding)()[None] if embedding in held else None

    def embed(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output) if prompt is None else prompt.to(output.dtype)

    handles = [embedding.register_forward_hook(embed)]
    handles += [layer.register_forward_pre_hook(_replacing(edit()), with_kwargs=True) for layer, edit in held.items()]
    # Off, so that these positions are not preceded by themselves.
    edits = [*held.values(), *([backbone._modules[PROMPT]] if prompt is not None else [])]
    try:
        for edit in edits:
            edit.enabled = False
        tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=embedding.weight.device)
        return model(input_ids=tokens, use_cache=True)[family.cache]
    finally:
        for edit in edits:
            edit.enabled = True
        for handle in handles:
            handle.remove()


def _replacing(positions_MD: torch.Tensor) -> Any:
    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = args[0] if args else kwargs["hidden_states"]
        positions = positions_MD[None].to(given.dtype)
        return ((positions, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": positions})

    return hook


def _refuse_inputs(given: dict[str, Any]) -> None:
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        found = "a dict of masks" if isinstance(mask, dict) else f"a mask of shape {tuple(mask.shape)}"
        raise AttachError(
            f"prompt: got {found}, which cannot be made longer by learned positions. Give a padding mask [B, T], or "
            "position_ids that restart at each document; generate with the model's own dynamic cache."
        )
    if positions is not None and positions.dim() != 2:
        raise AttachError(
            f"prompt: got position_ids of shape {tuple(positions.shape)}, which learned positions cannot be put into. "
            "Give position_ids [B, T]."
        )


def holds_text(cache: Any) -> bool:
    """Whether a cache holds steps already, in its attention or in its recurrent layers."""
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            if any(layer.has_previous_state.values()):
                return True
        elif isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0:
            return True
    return False
