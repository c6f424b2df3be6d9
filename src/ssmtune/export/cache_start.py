"""What acts where a sequence starts, beside a model for plain transformers: the tensors, and a short file that loads them.

Dimensions: T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssmtune.attach import AdaptedModel, attach
from ssmtune.compiled import save_compiled
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.export.plain import Started, compare_logits, own_logits, plain_started
from ssmtune.methods.base import get_method
from ssmtune.models import START, load_model
from ssmtune.records import write_bytes
from ssmtune.verify.forward import STEP_TOLERANCE
from ssmtune.widen import SCAN

if TYPE_CHECKING:
    from ssmtune.plan import Plan, Site

LOADER = "load_start.py"

CARD = f"""
## What sequences start from

Part of what was trained is no weight: it is in `{START}`, and acts where a sequence starts.
`{LOADER}` puts it into the cache of a new batch; without it this is another model.

```python
from load_start import start  # from this directory

inputs = start(model, tokenizer(text, return_tensors="pt")["input_ids"])
model.generate(**inputs, max_new_tokens=20)
```
"""


def starting_sites(plan: Plan) -> tuple[Site, ...]:
    """Return the sites that act where a sequence starts and no later, which a cache can hold.

    Raises `ConfigError` naming those that neither a weight nor a cache can hold, with what each does.
    """
    lasting = [site for site in plan.unmergeable if not get_method(site.method).acts_at_start and site.role != SCAN]
    if lasting:
        reasons = {site.method: get_method(site.method).at_every_token for site in lasting}
        raise ConfigError(
            f"{len(lasting)} sites ({', '.join(sorted({site.role for site in lasting}))}) cannot be represented in plain "
            f"transformers, neither in a weight nor in a cache: "
            f"{'; '.join(f'{name!r} {reason}' for name, reason in sorted(reasons.items()))}. "
            "Use the adapter with ssmtune.load(base, directory). What merges goes into weights, initial states, affixes, "
            "prompts and prefixes into a cache, an additional scan into a larger state ('ssmtune methods')."
        )
    starting = tuple(site for site in plan.unmergeable if get_method(site.method).acts_at_start)
    if starting and len(starting) < len(plan.unmergeable):
        raise ConfigError(
            f"{', '.join(sorted({site.method for site in starting}))} beside an additional scan: the plain model has more "
            "states than they were trained for. Use the adapter with ssmtune.load(base, directory)."
        )
    return starting


def write_start(
    adapted: AdaptedModel,
    sites: Sequence[Site],
    draft: Path,
    prompts: Sequence[list[int]],
    trained: Sequence[torch.Tensor],
) -> dict[str, Any]:
    """Write what `sites` of `adapted` come to beside the merged model `draft`; return how exactly it arrived.

    A fresh process runs the merged model in fp32 from the loader: over each prompt in one call, and generating after it. If
    that is another model, as where a call of several tokens starts its recurrence from zero, it is tried one at a time.
    `trained` are the logits of `adapted` for `prompts`. Raises `CheckFailed` for what does not give the logits of the merged
    weights with these sites in ssmtune.
    """
    # On the weights as they were rounded: what an affix leaves behind depends on them.
    started = attach(load_model(str(draft), dtype="float32"), replace(adapted.plan, sites=tuple(sites)))
    for key, edit in started.edits.items():
        edit.load_state_dict(adapted.edits[key].state_dict())  # type: ignore[attr-defined]
    save_compiled(started, draft / START)
    text = (Path(__file__).parent / "_load_start.py").read_text(encoding="utf-8")
    limit, tried = STEP_TOLERANCE[torch.float32], {}
    for one_by_one in (False, True):
        write_bytes(draft / LOADER, text.replace("ONE_BY_ONE = False", f"ONE_BY_ONE = {one_by_one}").encode())
        tried[one_by_one] = _differences(started, prompts, plain_started(str(draft), prompts, dtype="float32"))
        if max(side["max"] for side in tried[one_by_one].values()) <= limit:
            break
    else:
        raise CheckFailed(f"{draft.name}: not written. {_words(tried, limit)}")
    card = draft / "README.md"
    write_bytes(card, (card.read_text(encoding="utf-8") + CARD).encode())
    rounded = compare_logits(own_logits(started, prompts), trained)
    return {"limit": limit, "one_by_one": one_by_one, **tried[one_by_one], "merged_to_adapted": rounded}


def _differences(started: AdaptedModel, prompts: Sequence[list[int]], found: Started) -> dict[str, dict[str, float]]:
    """How far prompts and the generated tokens after them are from what `started` computes for the whole sequences."""
    read, generated = [], []
    for prompt, tokens, logits in zip(prompts, found.generated, found.prompts, strict=True):
        (whole,) = own_logits(started, [prompt + tokens])
        read.append(whole[len(prompt) - len(logits) : len(prompt)])
        generated.append(whole[len(prompt) - 1 : -1])
    return {
        "prompts_to_expected": compare_logits(found.prompts, read),
        "generated_to_expected": compare_logits(found.steps, generated),
    }


def _words(tried: Mapping[bool, Mapping[str, Mapping[str, float]]], limit: float) -> str:
    """What plain transformers did otherwise, in both ways of reading a prompt."""
    parts = [
        f"{'one token at a time' if one_by_one else 'with a prompt in one call'}: logits of the prompt differ by "
        f"{d['prompts_to_expected']['max']:.2g} of the largest, of generated tokens by {d['generated_to_expected']['max']:.2g}"
        for one_by_one, d in tried.items()
    ]
    return (
        f"From the compiled start plain transformers computes something else (limit {limit:g}); {'; '.join(parts)}. "
        "Use the adapter with ssmtune.load(base, directory)."
    )
