"""The first stage of a run whose recipe ranks entries by a warm-up: train, choose, put everything back.

RUN/warmup/selection.safetensors   the entries of every sparse edit, by key, sorted int32
RUN/warmup/stage.json              what the stage did; written last, and vouches for the selection by its sha256
RUN/warmup/checkpoints/            resumable states of the stage itself
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save

from ssmtune.errors import RecordError
from ssmtune.records import file_sha256, write_bytes, write_json
from ssmtune.selection import begin_warm_up, choose_after_warm_up, num_warmup_steps, put, sparse_edits

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ssmtune.attach import AdaptedModel
    from ssmtune.sft import EditTrainer

SELECTION, STAGE = "selection.safetensors", "stage.json"


def choose_by_warm_up(
    adapted: AdaptedModel,
    directory: Path,
    *,
    attach_again: Callable[[PreTrainedModel], AdaptedModel],
    make_trainer: Callable[[AdaptedModel, int], EditTrainer],
    run: Callable[[EditTrainer], None],
) -> tuple[AdaptedModel, list[dict[str, Any]]]:
    """Return an adapted model whose entries are chosen and that is otherwise as freshly attached, and the stages run.

    Without a warm-up in the plan that is `adapted` itself and no stage. A selection that `directory` holds is read and
    not made again. Else a warm-up trains; its deltas decide, and are thrown away with the factors beside them:
    `attach_again` puts the plan on the base anew, from the run's seed.
    Raises `RecordError` for a selection that is damaged or of another plan or base, `TrainingFailed` as training does.
    """
    num_steps = num_warmup_steps(adapted.plan, adapted.edits)
    if num_steps == 0:
        return adapted, []
    if not (directory / STAGE).is_file():
        started = time.time()
        begin_warm_up(adapted.plan, adapted.edits)
        adapted.require_gradients()
        trainer = make_trainer(adapted, num_steps)
        run(trainer)
        chosen = choose_after_warm_up(adapted.plan, adapted.edits)
        _write(adapted, directory, chosen, num_steps=num_steps, history=trainer.history, seconds=time.time() - started)
        del trainer
        adapted = attach_again(adapted.detach())
    stage, entries = _read(adapted, directory)
    put(adapted.edits, entries)
    return adapted, [stage]


def _write(adapted: AdaptedModel, directory: Path, chosen: dict[str, torch.Tensor], **facts: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / SELECTION, save(chosen, metadata={"format": "pt"}))
    stage = {
        "name": "warm-up",
        **facts,
        "trained": sum(p.numel() for p in adapted.trained_parameters().values()),
        "chosen": sum(index.numel() for index in chosen.values()),
        "plan": adapted.plan.digest,
        "base_digest": adapted.base_digest,
        "sha256": file_sha256(directory / SELECTION),
    }
    write_json(directory / STAGE, stage)


def _read(adapted: AdaptedModel, directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The stage and its entries, checked against its digest, the plan and the base."""
    remedy = f"Delete {directory} and the run's checkpoints to choose again."
    try:
        stage: dict[str, Any] = json.loads((directory / STAGE).read_text(encoding="utf-8"))
        found = (stage["plan"], stage["base_digest"], stage["sha256"])
        sha256 = file_sha256(directory / SELECTION)
    except (OSError, ValueError, KeyError) as error:
        raise RecordError(f"{directory}: the selection of the warm-up cannot be read ({error!r}). {remedy}") from None
    if found != (adapted.plan.digest, adapted.base_digest, sha256):
        raise RecordError(
            f"{directory / SELECTION}: is not the selection that {STAGE} vouches for, or of another plan or base (plan "
            f"{found[0]}, base {found[1]}; this run: {adapted.plan.digest}, {adapted.base_digest}). {remedy}"
        )
    entries = load((directory / SELECTION).read_bytes())
    expected = set(sparse_edits(adapted.edits))
    if set(entries) != expected:
        raise RecordError(f"{directory / SELECTION}: holds other sites than the plan. {remedy}")
    return stage, entries
