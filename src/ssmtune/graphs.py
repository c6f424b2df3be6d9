"""CUDA graphs of a training step: the backbone's kernels, forward and backward, launched at once.

A step launches thousands of kernels, and for a few thousand tokens Python takes longer to launch them than the GPU to run
them. Where a batch has a shape that was seen before, its forward and its backward pass are replayed from two recordings;
head and loss, which see another number of targets in every batch, and the optimiser run as always.
Recordings share their memory: between a forward pass and its backward pass no other may be replayed.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils import ModelOutput

from ssmtune.memory import draws_at_random, recomputes
from ssmtune.packing import documents_of, mark_as

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel

R = TypeVar("R")
log = logging.getLogger(__name__)

EAGER_PASSES = 2
"""Passes of a shape before it is recorded: kernels are compiled in them, and a shape that does not return costs nothing."""

MAX_SHAPES = 8
"""Shapes recorded for one model; batches of any other run as always."""


PLAIN = (torch.Tensor, torch.dtype, bool, int, float, str, type(None))
"""What a recorded pass may be given: tensors are copied in, anything else stays what it was; a cache would not."""

SWITCH = "SSMTUNE_GRAPHS"
"""Environment variable: "off" runs every pass as always."""


class Recorder(Protocol):
    """Records what a function makes the device do."""

    def record(self, run: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """Return what `run` returned, and what does the same work again on the same memory."""


class CudaRecorder:
    """Records kernels into CUDA graphs of one memory pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """Return what `run` returned, whose tensors hold nothing before the first replay, and the replay."""
        # What warm-up passes left in the allocator would be held beside the pool.
        gc.collect()
        torch.cuda.empty_cache()
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                result = run()
        except RuntimeError:
            # It still believes that its numbers are drawn for a recording.
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return result, graph.replay


@dataclass(frozen=True)
class Recording:
    """One shape: where a pass reads its inputs and leaves its results."""

    inputs: list[torch.Tensor]
    hidden: torch.Tensor
    output: ModelOutput
    """What the backbone returned; its only tensor is `hidden`."""
    forward: Callable[[], None]
    hidden_grad: torch.Tensor
    grads: list[torch.Tensor | None]
    backward: Callable[[], None]


class Pass:
    """A replayed forward pass, until its backward pass was replayed too."""

    def __init__(self) -> None:
        self.is_open = True


class Graphs:
    """The recordings of one adapted model. `refusal` says why none are made; `describe` what happened."""

    def __init__(self, adapted: AdaptedModel, refusal: str | None, recorder: Recorder | None) -> None:
        self.refusal = refusal
        self.recorder = recorder
        self.parameters = list(adapted.trained_parameters().values())
        self.edits = list(adapted.edits.values())
        self.factors = adapted.fast_layers.factors
        self.seen: Counter[Any] = Counter()
        self.recordings: dict[Any, Recording] = {}
        self.addresses: list[int] = []
        self.num_replayed = 0
        self.eager: Counter[str] = Counter()
        """Why a training pass ran as always -> how many did."""
        self._last: weakref.ref[Pass] = weakref.ref(Pass())

    def __call__(
        self, backbone: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return what `run(*args, **kwargs)` returns, the backbone's forward: from a recording where there can be one."""
        if not (torch.is_grad_enabled() and backbone.training) or self.refusal is not None:
            return run(*args, **kwargs)
        leaves, structure = tree_flatten((args, dict(kwargs)))
        other = next((leaf for leaf in leaves if not isinstance(leaf, PLAIN)), None)
        if other is not None:
            self.eager[f"an argument is a {type(other).__name__}"] += 1
            return run(*args, **kwargs)
        key = (structure, tuple(_kind(leaf) for leaf in leaves), _autocast(self.parameters[0].device.type))
        reason = self._reason(leaves, key)
        if reason is None and key not in self.recordings:
            try:
                self._record(backbone, key, run, leaves, structure)
            except RuntimeError as error:
                self.refusal = reason = f"recording failed: {str(error).splitlines()[0]}"
            if self.refusal is not None:
                # Out of the handler: the error holds what was recorded, and the pass to come needs its memory.
                self.release()
                log.warning("Training without CUDA graphs: %s.", self.refusal)
        if reason is not None:
            self.eager[reason] += 1
            return run(*args, **kwargs)
        recording, current = self.recordings[key], Pass()
        self._last = weakref.ref(current)
        self.num_replayed += 1
        for static, given in zip(recording.inputs, _tensors(leaves), strict=True):
            static.copy_(given)
        hidden = _Replay.apply(recording, current, self, *self.parameters)  # type: ignore[no-untyped-call]
        return type(recording.output)(**{**recording.output, "last_hidden_state": hidden})

    def _reason(self, leaves: list[Any], key: Any) -> str | None:
        """Why this pass cannot be replayed, or None."""
        if os.environ.get(SWITCH) == "off":
            return f"{SWITCH}=off"
        last = self._last()
        if last is not None and last.is_open:
            return "another pass's backward is still to come"
        if any(not edit.enabled for edit in self.edits) or any(one.low_rank() is None for one in self.factors[:1]):
            return "adapters are switched off"
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
            return "an input asks for its gradient"
        if key in self.recordings:
            addresses = [p.data_ptr() for p in self.parameters]
            if addresses == self.addresses:
                return None
            # Somebody gave the parameters other memory: what was recorded would train what is gone.
            self.release()
        self.seen[key] += 1
        if self.seen[key] <= EAGER_PASSES:
            return f"a shape's first {EAGER_PASSES} passes"
        if len(self.recordings) == MAX_SHAPES:
            return f"more than {MAX_SHAPES} shapes"
        return None

    def _record(
        self, backbone: nn.Module, key: Any, run: Callable[..., Any], leaves: list[Any], structure: Any
    ) -> None:
        """Record one shape. Raises `RuntimeError` for what cannot be recorded; the model is then as before."""
        assert self.recorder is not None
        copies = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        for leaf, copy in zip(leaves, copies, strict=True):
            documents = documents_of(leaf) if isinstance(leaf, torch.Tensor) else None
            if documents is not None:
                mark_as(copy, documents.clone())
        args, kwargs = tree_unflatten(copies, structure)
        enabled, dtype = key[-1]

        def forward() -> Any:
            # Without autocast's cache: a weight that it cast before would be read from memory of before.
            with torch.autocast(self.parameters[0].device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
                return run(*args, **kwargs)

        with _fresh_leaves(backbone, self.parameters) as leaves_now:
            output, replay_forward = self.recorder.record(forward)
            hidden = _only_tensor(output)
            hidden_grad = torch.zeros_like(hidden)

            def backward() -> tuple[torch.Tensor | None, ...]:
                return torch.autograd.grad(hidden, leaves_now, hidden_grad, allow_unused=True)

            grads, replay_backward = self.recorder.record(backward)
        self.addresses = [p.data_ptr() for p in self.parameters]
        self.recordings[key] = Recording(
            inputs=_tensors(copies),
            hidden=hidden.detach(),
            output=type(output)(**{**output, "last_hidden_state": None}),
            forward=replay_forward,
            hidden_grad=hidden_grad,
            grads=list(grads),
            backward=replay_backward,
        )

    def release(self) -> None:
        """Give the recordings' memory back."""
        self.recordings.clear()
        self.seen.clear()
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()

    def replayable(self, current: Pass) -> bool:
        """Whether the activations of a pass are still those in the recordings' memory."""
        return self._last() is current

    def describe(self) -> str:
        """Return one line: how many passes were replayed, and why others were not."""
        if self.refusal is not None:
            return f"no CUDA graphs: {self.refusal}"
        others = "; ".join(f"{number} not: {reason}" for reason, number in self.eager.items())
        return f"{self.num_replayed} passes replayed from CUDA graphs{f' ({others})' if others else ''}"


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, current: Pass, graphs: Graphs, *_: Any) -> torch.Tensor:
        ctx.recording, ctx.current, ctx.graphs = recording, current, graphs
        recording.forward()
        # A copy, as of the gradients below: what is handed out must outlive the next replay.
        return recording.hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hidden_grad: torch.Tensor) -> tuple[Any, ...]:
        recording: Recording = ctx.recording
        if not ctx.graphs.replayable(ctx.current):
            raise RuntimeError(
                "the activations of this pass were overwritten by a later one: call backward before that"
            )
        recording.hidden_grad.copy_(hidden_grad)
        recording.backward()
        ctx.current.is_open = False
        found = [grad for grad in recording.grads if grad is not None]
        copies = iter(torch._foreach_mul(found, 1.0) if found else ())
        return None, None, None, *(None if grad is None else next(copies) for grad in recording.grads)


@contextmanager
def _fresh_leaves(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """While the block runs, `module` holds other parameters in their place, on the same memory; yields those.

    Autograd lets a parameter's gradient arrive on the stream on which the parameter was first used, for as long as any
    loss of that time is held; a recording must not wait for another stream.
    """
    fresh = {id(p): nn.Parameter(p.detach()) for p in parameters}
    held = [
        (owner._parameters, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if id(p) in fresh
    ]
    for owned, name, p in held:
        owned[name] = fresh[id(p)]
    try:
        yield [fresh[id(p)] for p in parameters]
    finally:
        for owned, name, p in held:
            owned[name] = p


def use_graphs(adapted: AdaptedModel, *, recorder: Recorder | None = None) -> Graphs:
    """Let training passes of `adapted` replay CUDA graphs where they can, and return what says whether they do.

    Only where every layer is rewritten (`fast`): of those it is known that no pass depends on what Python decides anew.
    `recorder` stands in for CUDA's in tests.
    """
    refusal = _refusal(adapted, recorder)
    if recorder is None and refusal is None:
        recorder = CudaRecorder()
    graphs = Graphs(adapted, refusal, recorder)
    adapted.fast_layers.replay = graphs
    return graphs


def _refusal(adapted: AdaptedModel, recorder: Recorder | None) -> str | None:
    """Why no pass of this model can be recorded, or None."""
    layers = adapted.fast_layers
    if recorder is None and adapted.device.type != "cuda":
        return f"runs on {adapted.device.type}"
    if layers.num_blocks == 0 or layers.num_blocks < layers.num_layers:
        return f"{layers.num_layers - layers.num_blocks} of {layers.num_layers} layers keep the model's own forward"
    outside = [site.path for site in adapted.plan.sites if site.layer is None]
    if outside:
        return f"{outside[0]} trains outside of the layers"
    base = adapted.get_base_model()
    if recomputes(base) and draws_at_random(base):
        return "recomputed layers draw their dropout again"
    return None


def _kind(leaf: Any) -> Any:
    """What of an argument decides about the kernels."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride(), documents_of(leaf) is not None
    return leaf


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments, each followed by the documents that it stands for."""
    found = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            documents = documents_of(leaf)
            found += [leaf] if documents is None else [leaf, documents]
    return found


def _only_tensor(output: Any) -> torch.Tensor:
    """The hidden states of a backbone's output. Raises `RuntimeError` where there is anything else that a head could read."""
    if not isinstance(output, ModelOutput):
        raise RuntimeError(f"the backbone returned a {type(output).__name__}")
    others = [name for name, value in output.items() if value is not None and name != "last_hidden_state"]
    if others:
        raise RuntimeError(f"the backbone returned {', '.join(others)} beside its hidden states")
    hidden: torch.Tensor = output["last_hidden_state"]
    return hidden
