"""What a training step spends its time on, by component and by kernel, and whose operations it calls."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions, version
from typing import TYPE_CHECKING, Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ssmtune.fast._marks import LOSS, PREFIX

if TYPE_CHECKING:
    from types import FrameType

    from torch import nn

    from ssmtune.inventory import Inventory

REST = "rest"

LABELS = {
    "recurrent": "recurrent",
    "core": "recurrent",
    "conv": "recurrent",
    "attention": "attention",
    "mlp": "mlp",
    "norm": "norms",
}
"""Group of a component -> label, the first that a module holds: a mixer with a norm inside is the mixer."""

NUM_KERNELS = 40
"""Kernels that a profile keeps, the slowest first; the rest is summed by kind all the same."""

KINDS: tuple[tuple[str, str], ...] = (
    # The first that matches, in lower case. A kernel of ours is named by what it does, one of a library by where it is from.
    ("optimiser", r"multi_tensor_apply|adam|foreach|lpnorm|l2norm"),
    ("attention", r"flash|fmha|attention|softmax_warp"),
    ("loss", r"cross_entropy|log_softmax|softmax|nll_loss|loss_kernel|loss_back"),
    ("convolution", r"causal_conv1d|conv|window_kernel|window_back|^(forward|gradient|backward)_kernel$"),
    (
        "scan",
        r"chunk|state_passing|selective_scan|pass_kernel|pass_back|states_kernel|scores|steps_kernel|steps_back"
        r"|through_states|entering_kernel|leaving_kernel|readouts|inputs_kernel|output_kernel|delta_|cumsum",
    ),
    ("norm", r"norm"),
    (
        "matrix products",
        r"gemm|nvjet|cutlass|cublas|gemv|splitk|xmma|low_rank|aten::(mm|addmm|bmm|baddbmm|linear|matmul)$",
    ),
    ("four bits", r"dequant|quantize|4bit|nf4"),
    ("gate and activation", r"activate|gate_kernel|gate_back|silu|relu"),
    ("copies and fills", r"copy|memcpy|memset|catarray|fill|aten::(cat|clone|_to_copy|contiguous|zero_|empty)"),
    ("elementwise and sums", r"elementwise|reduce|triton|aten::"),
)
"""Kind of a kernel -> pattern of its name."""

LOSS_OPERATIONS = ("aten::cross_entropy_loss", "aten::log_softmax", "aten::nll_loss_nd")

KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d", "fla")
"""Packages whose functions transformers' recurrent layers take where they can be imported."""

OUR_OPERATIONS = re.compile(r"ssmtune\.ops\.(\w+)\.(reference|triton)")
"""Name of a module that runs an operation of ours, and on what."""


def component_modules(model: nn.Module, inventory: Inventory) -> list[tuple[nn.Module, str]]:
    """Return the modules that stand for components, each with its label.

    A component is a layer's direct child that holds its tensors (mixer, MLP, norm), or a module outside the layers.
    """
    groups: dict[str, set[str]] = {}
    for component in inventory.components:
        owner = component.path.rpartition(".")[0]
        parts = owner.split(".")
        inside = next((i + 2 for i, part in enumerate(parts) if part.isdigit()), len(parts))
        groups.setdefault(".".join(parts[:inside]), set()).add(component.group)
    head = model.get_output_embeddings()  # type: ignore[operator]
    named = [(model.get_submodule(name), _label(held)) for name, held in groups.items()]
    return [*((module, label) for module, label in named if module is not head), (head, LOSS)]


def _label(groups: set[str]) -> str:
    return next((label for group, label in LABELS.items() if group in groups), REST)


def profile_step(
    step: Callable[[], object], modules: Sequence[tuple[nn.Module, str]], *, with_cuda: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run `step` once under the profiler; return the share of its time by component, and `kernel_times`.

    Time is the GPU's where the step runs there.

    An operation counts for the component whose module it runs in. In the backward pass it counts for the component of
    the forward operation that it belongs to, which autograd numbers alike.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if with_cuda else [])]
    handles = [handle for module, label in modules for handle in _mark(module, label)]
    with profile(activities=activities) as profiled:
        step()
    for handle in handles:
        handle.remove()
    events: Any = profiled.events()
    by_number: dict[int, str] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if (
            event.device_type == DeviceType.CPU
            and event.sequence_nr >= 0
            and not event.name.startswith("autograd::engine")
        ):
            label = _component_of(event, {})
            if label is not None and not _in_backward(event):
                by_number[event.sequence_nr] = label
    seconds: Counter[str] = Counter()
    # On a GPU every operation knows the time of the kernels it launched; the kernels' own events would count twice.
    for event in (e for e in events if e.device_type == DeviceType.CPU):
        own = event.self_device_time_total if with_cuda else event.self_cpu_time_total
        seconds[_component_of(event, by_number) or REST] += own
    total = sum(seconds.values())
    shares = {name: value / total for name, value in seconds.most_common()}
    return shares, kernel_times(events, with_cuda=with_cuda)


def kernel_times(events: Any, *, with_cuda: bool) -> dict[str, Any]:
    """Return what ran: `kinds`, milliseconds by kind of kernel, and `slowest`, single kernels with count and milliseconds.

    A kernel is what the GPU ran, copies included, or, on a CPU, an operation of torch without what it called.
    """
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        # Marks show on the GPU as well, over the kernels that they hold.
        if with_cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[event.name] += event.self_device_time_total
            counts[event.name] += 1
        elif not with_cuda and event.name.startswith("aten::"):
            seconds[event.name] += event.self_cpu_time_total
            counts[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, value in seconds.items():
        kinds[kernel_kind(name)] += value
    slowest = [
        {"name": name[:120], "kind": kernel_kind(name), "count": counts[name], "ms": value / 1000}
        for name, value in seconds.most_common(NUM_KERNELS)
    ]
    return {"kinds": {kind: value / 1000 for kind, value in kinds.most_common()}, "slowest": slowest}


def kernel_kind(name: str) -> str:
    """Return what a kernel is for, by its name; "other" where no pattern knows it."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), "other")


def _mark(module: nn.Module, label: str) -> list[Any]:
    """Make the profiler see when `module` runs; the handles take the mark off."""
    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(PREFIX + label))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _component_of(event: Any, by_number: dict[int, str]) -> str | None:
    """The label of the nearest enclosing mark, else of the forward operation that an enclosing backward belongs to."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        if event.name in LOSS_OPERATIONS:
            return LOSS
        if event.name.startswith("autograd::engine") and event.sequence_nr in by_number:
            return by_number[event.sequence_nr]
        event = event.cpu_parent
    return None


def _in_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith("autograd::engine"):
            return True
        event = event.cpu_parent
    return False


def called_operations(step: Callable[[], object]) -> str:
    """Run `step` once and say whose operations its forward pass called, with versions.

    For example "mamba_ssm 2.3.2, causal_conv1d 1.7.0", "transformers' own, without causal_conv1d, mamba_ssm", or
    "ssmtune's causal_conv1d (triton), mamba2_chunk_scan (triton)".
    Seen are the calls: transformers takes a package's function or its own when a modeling module is imported, so what
    is installed does not tell.
    """
    packages: set[str] = set()
    own: dict[str, str] = {}
    ours: set[str] = set()

    def look(frame: FrameType, event: str, result: Any) -> None:
        module = str(frame.f_globals.get("__name__"))
        package = module.partition(".")[0]
        if event == "call" and package in KERNEL_PACKAGES:
            packages.add(package)
        # Named as its operation: modules call each other's smaller functions, and are imported.
        if event == "call" and (found := OUR_OPERATIONS.fullmatch(module)) and frame.f_code.co_name == found[1]:
            ours.add(f"{found[1]} ({found[2]})")
        # The function of transformers that stands for a kernel. It returns None where only a kernel could answer.
        if event == "return" and result is not None and "is_new_implementation" in frame.f_code.co_freevars:
            held = frame.f_locals
            if not held["is_new_implementation"]:
                own[held["torch_function"].__name__] = held["package"]

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(before)
    missing = f", without {', '.join(sorted(set(own.values())))}" if own else ""
    if not packages and not ours:
        return f"transformers' own{missing}"
    parts = [", ".join(_with_version(package) for package in KERNEL_PACKAGES if package in packages)]
    parts.append(f"ssmtune's {', '.join(sorted(ours))}" if ours else "")
    parts.append(f"transformers' own {', '.join(sorted(own))}{missing}" if own else "")
    return "; ".join(part for part in parts if part)


def _with_version(package: str) -> str:
    distributions = sorted(set(packages_distributions().get(package, ())))
    return " ".join([distributions[0], version(distributions[0])]) if distributions else f"{package} of unknown version"
