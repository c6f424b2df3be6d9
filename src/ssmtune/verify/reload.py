"""A fresh process that loads the saved directory gives the logits of memory, bit for bit, and not the base's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ssmtune.errors import AdapterMismatch
from ssmtune.quantized import is_quantized
from ssmtune.records import write_json
from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.forward import path_logits, relative_difference, worst_position
from ssmtune.verify.fresh import attention_of, base_tensors, dtype_name

TIMEOUT_S = 900


def _run(subject: Subject) -> CheckResult:
    """Measured: largest difference to memory, relative to the largest logit. Limit: 0, on the same device and threads.

    Fails as well when the reloaded logits are the base's own: then nothing was loaded, or nothing was trained.
    """
    adapted = subject.adapted
    ids_BT = subject.documents[0][None].to(adapted.base_model.model.device)
    with torch.no_grad():
        expected = path_logits(adapted, "eval", ids_BT).cpu()
    try:
        reloaded, base = logits_of_fresh_process(subject, ids_BT)
    except AdapterMismatch as error:
        return CheckResult(
            name="reload", ok=False, measured=1, limit=0, where=str(subject.directory), detail=str(error)
        )
    difference = relative_difference(reloaded, expected)
    effect = relative_difference(reloaded, base)
    if difference > 0:
        where = f"token {worst_position(reloaded[0], expected[0])} after loading {subject.directory}"
        detail = f"the saved adapter is not the one in memory: logits differ by {difference:.2g} of the largest"
        if effect == 0:
            detail += "; they equal the base's, so nothing that was trained is loaded"
    elif effect == 0:
        where, detail = str(subject.directory), "reloaded logits equal the base's: the adapter does nothing"
    else:
        where, detail = "", f"bitwise equal to memory; {effect:.2g} of the largest logit away from the base"
    return CheckResult(
        name="reload", ok=difference == 0 and effect > 0, measured=difference, limit=0, where=where, detail=detail
    )


def logits_of_fresh_process(subject: Subject, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [B, T, V] of the saved directory and of its base, as a new Python process computes them.

    Raises `AdapterMismatch` with that process's message when it refuses to load.
    """
    adapted, folder = subject.adapted, subject.scratch
    model = adapted.base_model.model
    save_file({"ids": ids_BT.cpu().contiguous()}, folder / "input.safetensors")
    if subject.base_name is None:
        model.config.to_json_file(str(folder / "config.json"), use_diff=False)
        save_file(_plain(base_tensors(adapted)), folder / "base.safetensors")
    request = {
        "base_name": subject.base_name,
        "dtype": dtype_name(adapted),
        "config": str(folder / "config.json"),
        "tensors": str(folder / "base.safetensors"),
        "attention": attention_of(adapted),
        "quantized": None if adapted.quantized is None else adapted.quantized.to_dict(),
        "adapter": str(subject.directory),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "input": str(folder / "input.safetensors"),
        "output": str(folder / "output.safetensors"),
    }
    path = write_json(folder / "request.json", request)
    _run_child(path)
    logits = load_file(request["output"])  # type: ignore[arg-type]
    return logits["adapted"], logits["base"]


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` as a file can hold them; what is in 4 bits under several names."""
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = {"": tensor}
        if is_quantized(tensor):
            from ssmtune.four_bit import pack

            parts = pack(tensor)
        plain |= {f"{name}.{part}".rstrip("."): value.cpu().contiguous() for part, value in parts.items()}
    return plain


def _run_child(request: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "ssmtune.verify.child", str(request)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise AdapterMismatch(f"a fresh process cannot load the adapter: {lines[-1]}")


CHECK = Check(proves="what is on the disk is what is in memory, and it differs from the base", run=_run)
