"""Doctor: are operations and scorers right on this machine, and does a model keep packed documents apart?"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

import torch

from ssmtune.errors import ConfigError, MissingDependency
from ssmtune.families.base import find_family
from ssmtune.op_cases import all_cases, case_errors
from ssmtune.operations import install_operations
from ssmtune.ops.backend import OPERATIONS, backends
from ssmtune.ops.case import Case
from ssmtune.records import environment
from ssmtune.tasks.base import Task, get_task, messages, sample_examples, task_names
from ssmtune.verify import left_unchanged_model, sample_documents
from ssmtune.verify.base import CheckResult
from ssmtune.verify.packing import compare_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMITS = {
    # Root mean square of the error, relative to that of the truth; inputs are rounded once and given to both.
    # fp32: decays are exp of differences of running sums over 64 steps, and gradients of A and dt_bias are what is left
    # of sums that nearly cancel: measured up to 1e-5. A wrong index or a missing term costs 1e-2 and more.
    torch.float32: 5e-5,
    # bf16: the arithmetic is fp32, and one rounding of the result is left, which costs at most 2^-8 (measured 3e-3); as
    # much for every further stage of an operation that rounds between its stages. A missing term costs a tenth or more.
    torch.bfloat16: 2.0**-8,
}


MAX_PROCESSES = 8
"""Processes on a GPU: each takes a context of half a gigabyte, and a processor that compiles."""


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """A pair of GPU and package whose kernels are known to compute wrong results."""

    name: str
    gpu: str
    package: str
    first: tuple[int, ...]
    last: tuple[int, ...]
    """Versions first <= v < last; an empty `last` means that no fixed version is known."""
    capability: tuple[int, ...]
    """Major compute capabilities concerned."""
    reason: str
    source: str

    def applies(self, capability: int, versions: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether this machine is such a pair."""
        version = versions.get(self.package)
        if capability not in self.capability or version is None:
            return False
        return self.first <= version and (not self.last or version < self.last)


KNOWN_BAD = (
    KnownBad(
        name="gated-delta backward",
        gpu="Hopper (H100, H20, H200)",
        package="triton",
        first=(3, 4),
        last=(3, 7, 1),
        capability=(9,),
        reason="the backward is miscompiled: gradients of beta and g are wrong, the forward is right",
        source="fla-org/flash-linear-attention#640, #826",
    ),
    KnownBad(
        name="gated-delta backward, chunk 64",
        gpu="Hopper (H100, H20, H200)",
        package="fla-core",
        first=(),
        last=(),
        capability=(9,),
        reason="gradients of k and beta can be wrong at chunk size 64",
        source="fla-org/flash-linear-attention#984, #988",
    ),
    KnownBad(
        name="linear-attention kernels",
        gpu="Blackwell",
        package="fla-core",
        first=(),
        last=(),
        capability=(10, 12),
        reason="silent NaN or misaligned addresses, crashes in the backward",
        source="fla-org/flash-linear-attention#913, #607",
    ),
    KnownBad(
        name="flash-qla gates",
        gpu="Hopper (H100, H20, H200)",
        package="flash-qla",
        first=(),
        last=(),
        capability=(9,),
        reason="gradients of A_log and dt_bias are corrupted, the forward is right",
        source="QwenLM/FlashQLA#28",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """What was measured on this machine."""

    device: str
    versions: Mapping[str, str]
    checks: Mapping[str, CheckResult]
    known_bad: tuple[KnownBad, ...]
    untried: tuple[str, ...] = ()
    """Scorers whose packages are not installed."""

    @property
    def ok(self) -> bool:
        """True when every operation and scorer is right here; a known-bad pair concerns kernels that ssmtune does not use."""
        return all(check.ok for check in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """The printed form of `doctor --json`."""
        return {
            "ok": self.ok,
            "device": self.device,
            "versions": dict(self.versions),
            "checks": [check.to_dict() for check in self.checks.values()],
            "known_bad": [asdict(pair) for pair in self.known_bad],
            "untried": list(self.untried),
        }

    def lines(self) -> list[str]:
        """The report as text: device, versions, one line per check, then the known-bad pairs that apply."""
        text = [f"device: {self.device}", ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        text += [
            f"{'ok    ' if c.ok else 'FAILED'} {c.name}: {c.measured:.2g} (limit {c.limit:.2g}) {c.where}"
            for c in self.checks.values()
        ]
        text += [f"known bad here: {pair.name} on {pair.gpu}: {pair.reason} ({pair.source})" for pair in self.known_bad]
        text += [f"not tried: {line}" for line in self.untried]
        return text


def examine(device: str | None = None) -> DoctorReport:
    """Run every operation of ssmtune, forward and every gradient, in fp32 and bf16, against its fp64 recurrence.

    Lengths are odd; packed, padded and continued sequences are among the cases. The scorer of every task is tried as well:
    what a model writes behind the end of its answer must not count. Nothing outside is changed.
    `device` is "cpu" or "cuda"; the GPU where there is one by default. Raises `ConfigError` for a GPU that is absent.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch {torch.__version__} sees no GPU here. Use 'cpu'.")
    operations = dict.fromkeys(case.operation for case in all_cases())
    names = [f"{operation}/{str(dtype).removeprefix('torch.')}" for operation in operations for dtype in LIMITS]
    on_gpu = torch.device(device).type == "cuda"
    # Compiling the kernels takes minutes one by one, and what breaks the GPU's context breaks one process.
    measure = _measure_apart if on_gpu else measure_operations
    checks = {check.name: check for check in measure(names, device)}
    untried = []
    for name in task_names():
        # A task for training alone has no scorer.
        if get_task(name).metrics:
            try:
                checks[f"scorer/{name}"] = scorer_check(name, get_task(name))
            except MissingDependency as error:
                untried.append(f"scorer/{name}: {error}")
    facts = environment()
    return DoctorReport(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        versions={"python": facts["python"], **facts["versions"]},
        checks=checks,
        known_bad=known_bad_here() if on_gpu else (),
        untried=tuple(untried),
    )


def measure_operations(names: Sequence[str], device: str) -> Iterator[CheckResult]:
    """Yield the check of every name, "operation/dtype", one after the other in this process."""
    cases = all_cases()
    for name in names:
        operation, _, kind = name.partition("/")
        dtype = getattr(torch, kind)
        members = [case for case in cases if case.operation == operation]
        num_stages = members[0].stages
        if operation in OPERATIONS and backends(device)[operation].name == "triton":
            num_stages = max(num_stages, members[0].kernel_stages)
        limit = LIMITS[dtype] * (num_stages if dtype == torch.bfloat16 else 1)
        yield _check(name, members, dtype, limit, torch.device(device))


def _measure_apart(names: Sequence[str], device: str) -> Iterator[CheckResult]:
    """The same in several processes side by side; an operation whose process ends without an answer has failed."""
    shares = [names[first::MAX_PROCESSES] for first in range(min(MAX_PROCESSES, len(names)))]
    command = [sys.executable, "-m", "ssmtune.doctor", device]
    running = [subprocess.Popen([*command, *share], stdout=PIPE, stderr=PIPE, text=True) for share in shares]
    found: dict[str, CheckResult] = {}
    for share, process in zip(shares, running, strict=True):
        out, err = process.communicate()
        answers = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        found |= {answer["name"]: CheckResult.from_dict(answer) for answer in answers}
        problem = (err.strip().splitlines() or ["no message"])[-1]
        for name in share:
            lost = f"its process ended with {process.returncode}: {problem}"
            found.setdefault(
                name, CheckResult(name=name, ok=False, measured=math.inf, limit=0, where=lost, detail=lost)
            )
    yield from (found[name] for name in names)


def known_bad_here() -> tuple[KnownBad, ...]:
    """Return the known-bad pairs of this GPU and the installed packages; empty without a GPU."""
    import importlib.metadata

    if not torch.cuda.is_available():
        return ()
    capability = torch.cuda.get_device_capability()[0]
    versions = {}
    for package in {pair.package for pair in KNOWN_BAD}:
        try:
            text = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        versions[package] = tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
    return tuple(pair for pair in KNOWN_BAD if pair.applies(capability, versions))


def _check(name: str, cases: list[Case], dtype: torch.dtype, limit: float, device: torch.device) -> CheckResult:
    worst, where, num = 0.0, "", 0
    for case in cases:
        for value, error in case_errors(case, dtype, device).items():
            num += 1
            if not error <= worst:
                worst, where = error, f"{value}, {case.label}"
    return CheckResult(
        name=name,
        ok=worst <= limit,
        measured=worst,
        limit=limit,
        where=where,
        detail=f"{num} outputs and gradients of {len(cases)} cases; largest relative error {worst:.2g}",
    )


def scorer_check(name: str, task: Task) -> CheckResult:
    """Return whether a task scores an answer up to its stop and no further.

    Measured: the largest change of a metric by text behind the stop: another answer after the right one, and the right
    one after an empty answer. Limit: 0. A task that does not give its own answers full marks fails as well.
    """
    right, other = sample_examples(task)[:2]
    answer, wrong = (messages(example)[1][0]["content"] for example in (right, other))
    best, worst, where = task.score(answer, right), 0.0, ""
    for stop in task.stops:
        for kept, text in ((answer, answer + stop + wrong), ("", stop + answer)):
            expected, found = task.score(kept, right), task.score(text, right)
            metric = max(expected, key=lambda key: abs(found[key] - expected[key]))
            if abs(found[metric] - expected[metric]) > worst:
                worst = abs(found[metric] - expected[metric])
                where = f"{metric}, text after {stop} behind {'the right' if kept else 'an empty'} answer"
    if best[task.primary] < 1:
        worst, where = 1.0, f"{task.primary} of the task's own answer is {best[task.primary]:.2f}"
    return CheckResult(
        name=f"scorer/{name}",
        ok=worst == 0,
        measured=worst,
        limit=0,
        where=where,
        detail=f"text behind {' or '.join(map(repr, task.stops))} changes the metrics by {worst:.2g}",
    )


def leak_test(model: PreTrainedModel) -> CheckResult:
    """Return the packing check of `model` on ssmtune's operations; `detail` says what it does without them.

    The model is left as it was. Raises `UnsupportedModel` for an architecture without a family.
    """
    family = find_family(model.config.model_type)[1]
    documents = sample_documents(model, None)
    with left_unchanged_model(model):
        try:
            stock = compare_packed(model, documents)
            found = "keeps packed documents apart" if stock.ok else f"leaks: {stock.measured:.2g} at {stock.where}"
        except ValueError as error:
            found = f"refuses packed documents ({str(error).splitlines()[0]})"
        operations = install_operations(model, family)
        try:
            ours = compare_packed(model, documents)
        finally:
            operations.remove()
    return CheckResult(
        name="packing",
        ok=ours.ok,
        measured=ours.measured,
        limit=ours.limit,
        where=ours.where,
        detail=f"with ssmtune's operations: {ours.detail}. The model as transformers runs it {found}.",
    )


def main(device: str, *names: str) -> int:
    """Answer for some operations, one line of JSON each as soon as it is known."""
    for check in measure_operations(names, device):
        print(json.dumps(check.to_dict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
