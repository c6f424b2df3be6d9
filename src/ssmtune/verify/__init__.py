"""Verify: prove of an adapted model, or of a run, that what was trained is what is saved, loaded and merged.

One file per check; `verify` runs them all and leaves the model bitwise as it was.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.errors import ConfigError, RecordError, SsmtuneError
from ssmtune.records import Status, new_record, read_record, write_json
from ssmtune.verify.base import CheckResult, Subject, check_names, get_check

if TYPE_CHECKING:
    import torch

    from ssmtune.attach import AdaptedModel

RUN_RECORD, RECORD = "run.json", "verify.json"

DOCUMENT_LENGTHS = (71, 13, 9)
"""The first crosses a chunk of the scan (64 steps); none is a multiple of anything."""

TEXTS = (
    "The state of a recurrent layer is all that it keeps of the text so far; attention keeps every token instead. "
    "A hybrid has both, so an adapter can change what is remembered, or what is looked up, or what is made of it. " * 2,
    "Answer with one word: is the following sentence a question or a statement?",
    '{"name": "order", "fields": [{"name": "id", "type": "integer"}, {"name": "customer", "type": "string"}]}',
)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The results of all checks by name. Round-trips through `to_dict` and `from_dict`."""

    checks: Mapping[str, CheckResult]

    @property
    def ok(self) -> bool:
        """True when every check passed."""
        return all(result.ok for result in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """The printed form of `verify --json`."""
        return {"ok": self.ok, "checks": [result.to_dict() for result in self.checks.values()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VerifyReport:
        """Read a report back."""
        results = [CheckResult.from_dict(entry) for entry in data["checks"]]
        return cls(checks={result.name: result for result in results})


def verify(adapted_or_run_dir: AdaptedModel | str | Path, *, checks: Sequence[str] | None = None) -> VerifyReport:
    """Return the report of all checks, or of those named, on an adapted model or on a run directory.

    An adapted model is left bitwise as it was: weights, flags, mode and random state.
    A run directory gets RUN/verify.json, and its run.json the result under `verify`; the base named in the record is
    loaded, and the trained values come from the checkpoint that was restored, so that what RUN/adapter lacks shows.
    Raises `ConfigError` for an unknown check, or one that needs a run directory; `RecordError` for no finished run.

    >>> report = verify(adapted)                             # doctest: +SKIP
    >>> report.ok, report.checks["liveness"].where           # doctest: +SKIP
    """
    is_run = isinstance(adapted_or_run_dir, (str, Path))
    names = _chosen(checks, is_run)
    with tempfile.TemporaryDirectory(prefix="ssmtune-verify-") as scratch:
        if isinstance(adapted_or_run_dir, (str, Path)):
            run_dir = Path(adapted_or_run_dir)
            report = _run_checks(_subject_of_run(run_dir, Path(scratch)), names)
            _write_records(run_dir, names, report)
            return report
        return _run_checks(_subject_of_model(adapted_or_run_dir, Path(scratch)), names)


def _chosen(checks: Sequence[str] | None, is_run: bool) -> list[str]:
    if checks is None:
        return [name for name in check_names() if is_run or not get_check(name).needs_run]
    for name in checks:
        if get_check(name).needs_run and not is_run:
            raise ConfigError(f"check {name!r} looks at the files of a run; give a run directory instead of a model.")
    return list(checks)


def _run_checks(subject: Subject, names: Sequence[str]) -> VerifyReport:
    results = {}
    with left_unchanged(subject.adapted):
        for name in names:
            try:
                results[name] = get_check(name).run(subject)
            except SsmtuneError as error:
                # What ssmtune itself refuses is a finding, not a crash of the verification.
                where = str(subject.directory)
                results[name] = CheckResult(name=name, ok=False, measured=1, limit=0, where=where, detail=str(error))
    return VerifyReport(checks=results)


@contextmanager
def left_unchanged(adapted: AdaptedModel) -> Iterator[None]:
    """Run the block, then put back trained values, gradient flags, training modes and random states."""
    import torch

    values = {name: p.detach().clone() for name, p in adapted.trained_parameters().items()}
    with left_unchanged_model(adapted):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in adapted.trained_parameters().items():
                    # A check that failed half way through may have left a value behind; a fault may have removed one.
                    if name in values and not torch.equal(p, values[name]):
                        p.copy_(values[name])


@contextmanager
def left_unchanged_model(model: torch.nn.Module) -> Iterator[None]:
    """Run the block, then put back gradient flags, training modes and random states; values are the block's affair."""
    import torch

    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    python_state = random.getstate()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, training in modes:
                module.training = training


def _subject_of_model(adapted: AdaptedModel, scratch: Path) -> Subject:
    from ssmtune.verify.fresh import find_base_name

    directory = scratch / "adapter"
    adapted.save_pretrained(directory)
    return Subject(
        adapted=adapted,
        documents=sample_documents(adapted, None),
        directory=directory,
        scratch=scratch,
        base_name=find_base_name(adapted, adapted.plan.model),
    )


def _subject_of_run(run_dir: Path, scratch: Path) -> Subject:
    import torch

    from ssmtune.attach import load
    from ssmtune.quantize import load_base, recorded_config

    record = read_record(run_dir / RUN_RECORD, kind="train")
    if record["status"] not in ("done", "provisional"):
        raise RecordError(
            f"{run_dir / RUN_RECORD}: the run is {record['status']!r}, so it has no adapter to verify. "
            "Run 'ssmtune train' again with the same file to continue it."
        )
    config = record["config"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(config["model"], dtype=config["dtype"], device=device, quantize_config=recorded_config(config))
    # The checkpoint holds everything that was trained; RUN/adapter holds what the recipe keeps.
    checkpoint = run_dir / "checkpoints" / f"checkpoint-{record['restored_step']}"
    directory = run_dir / "adapter"
    adapted = load(base, checkpoint if checkpoint.is_dir() else directory)
    return Subject(
        adapted=adapted,
        documents=sample_documents(adapted, config["model"]),
        directory=directory,
        scratch=scratch,
        run_dir=run_dir,
        base_name=config["model"],
    )


def sample_documents(model: Any, tokenizer_name: str | None) -> tuple[torch.Tensor, ...]:
    """Return documents of `DOCUMENT_LENGTHS` tokens: text where a tokenizer can be loaded, else random token ids."""
    import torch

    from ssmtune.models import load_tokenizer

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    documents = [torch.randint(vocabulary, (length,), generator=generator) for length in DOCUMENT_LENGTHS]
    if tokenizer_name is not None:
        try:
            tokenizer = load_tokenizer(tokenizer_name)
        except ConfigError:
            tokenizer = None
        if tokenizer is not None:
            for document, text in zip(documents, TEXTS, strict=True):
                ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
                num = min(len(ids), len(document))
                document[:num] = ids[:num]
    return tuple(documents)


def _write_records(run_dir: Path, names: Sequence[str], report: VerifyReport) -> None:
    record = read_record(run_dir / RUN_RECORD, kind="train")
    facts = report.to_dict()
    config = {"run": record["run_id"], "checks": list(names)}
    status: Status = "done" if report.ok else "failed"
    write_json(run_dir / RECORD, new_record("verify", config=config, status=status, run_id=record["run_id"], **facts))
    write_json(run_dir / RUN_RECORD, {**record, "verify": facts})
