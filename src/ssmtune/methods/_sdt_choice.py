"""Which entries SDT trains: channels by their score, then in each channel its states by theirs.

Dimensions: C channels, N states of a channel.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ssmtune.methods.sdt import DECAYS, SdtOptions, num_kept, split_shape


@dataclass(frozen=True, kw_only=True)
class Member:
    """One sparse site of a layer: its key in the plan, role, shape, layer and options."""

    key: str
    role: str
    shape: tuple[int, ...]
    layer: int | None
    options: SdtOptions


def choose_entries(members: Sequence[Member], evidence: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return for each member of one layer its sorted entries [K] int32, counted through the member's own shape.

    `evidence` holds by key what is ranked, of the member's shape: the change |Delta A| of a warm-up, or |A|. It is not
    looked at where the selection is random. The score of a channel is the sum of squares over its states and over the
    layer's tensors of A; a plan without A in this layer ranks by the members of equal channel count themselves.
    """
    return {member.key: _entries(member, *_scores(member, members, evidence)) for member in members}


def size_of(role: str, weight: torch.Tensor) -> torch.Tensor:
    """The size of what a tensor stands for, fp32: |A| of a logarithm of A, else |W|."""
    log = role in DECAYS and "log" in role
    return weight.float().exp() if log else weight.float().abs()


def _scores(
    member: Member, members: Sequence[Member], evidence: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the layer's channels [C] and of their states [C, N]."""
    decays = [m for m in members if m.role in DECAYS]
    decisive = decays or [m for m in members if _num_channels(m) == _num_channels(member)]
    if member.options.selection == "random":
        channels, states = max(split_shape(m.shape)[:2] if m in decays else (_num_channels(m), 1) for m in decisive)
        seed = random.Random(f"sdt-{member.options.seed}-{member.layer}").getrandbits(63)
        drawn = torch.rand(channels, states + 1, generator=torch.Generator().manual_seed(seed))
        return drawn[:, 0], drawn[:, 1:]
    squares = [_by_channel(m, evidence[m.key].detach().cpu().float().square()) for m in decisive]
    channel_scores = torch.stack([square.sum(1) for square in squares]).sum(0)
    same_states = [s for m, s in zip(decisive, squares, strict=True) if m.options.part == "entries"]
    return channel_scores, torch.stack(same_states).sum(0) if same_states else channel_scores[:, None]


def _num_channels(member: Member) -> int:
    if member.options.part == "columns":
        return member.shape[1]
    return split_shape(member.shape)[0] if member.options.part == "entries" else member.shape[0]


def _by_channel(member: Member, values: torch.Tensor) -> torch.Tensor:
    """[C, N] of the member's values (entries: summed over the numbers of a state)."""
    if member.options.part == "columns":
        return values.T
    if member.options.part == "rows":
        return values
    return values.reshape(split_shape(member.shape)).sum(2)


def _entries(member: Member, channel_C: torch.Tensor, state_CN: torch.Tensor) -> torch.Tensor:
    shape, ratio = member.shape, member.options.channel_freeze_ratio
    mask = torch.zeros(shape, dtype=torch.bool)
    if member.options.part == "columns":
        mask[:, _best(channel_C, num_kept(shape[1], ratio))] = True
    elif member.options.part == "rows":
        # Several rows a head (Kimi Delta Attention) rank as their head does.
        per_row = channel_C.repeat_interleave(shape[0] // len(channel_C))
        mask[_best(per_row, num_kept(shape[0], ratio))] = True
    else:
        channels, states, numbers = split_shape(shape)
        kept = mask.view(channels, states, numbers)
        for channel in _best(channel_C, num_kept(channels, ratio)).tolist():
            kept[channel, _best(state_CN[channel], num_kept(states, member.options.state_freeze_ratio))] = True
    return mask.flatten().nonzero().flatten().to(torch.int32)


def _best(scores: torch.Tensor, num: int) -> torch.Tensor:
    """Indices [num] of the largest scores, the first of equal ones."""
    return torch.argsort(scores, descending=True, stable=True)[:num]
