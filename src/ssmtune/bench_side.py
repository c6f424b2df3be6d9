"""One side of a benchmark in a process of its own: python -m ssmtune.bench_side REQUEST.json

The step is the same on both sides: forward, next-token loss on every token, backward, clipping, AdamW.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ssmtune.bench import BenchConfig, Side
from ssmtune.bench_batch import Batch, make_batches
from ssmtune.bench_profile import called_operations, component_modules, profile_step
from ssmtune.config import decode
from ssmtune.errors import ConfigError
from ssmtune.graphs import SWITCH
from ssmtune.inventory import Inventory, take_inventory
from ssmtune.memory import keep_activations
from ssmtune.methods.base import get_method
from ssmtune.models import Dtype, load_config, model_location
from ssmtune.ops.seam import rebind
from ssmtune.packing import model_inputs
from ssmtune.placement import named_recipe
from ssmtune.plan import Plan, make_plan
from ssmtune.quantize import load_base, quantization_facts, quantize
from ssmtune.quantized import is_quantized
from ssmtune.records import write_json
from ssmtune.train import OptimizerConfig, peak_memory

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedModel

    from ssmtune.attach import Fast

R = TypeVar("R")

PEER_METHODS = ("lora", "core")
"""Methods that plain PEFT and a trained parameter can stand for."""

FUSED_LAYERS = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Functions of transformers' modeling modules that are a whole layer; without mamba_ssm they answer None."""

WARM_UP_STEPS = 2
"""Untimed steps after the first, in which allocators and caches settle."""

WINDOWS = 3
"""Times that a process is timed, each time over several steps in a row: as in training, nothing waits between them."""


def main(request_path: str) -> int:
    """Answer one request. Returns the exit status."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    config = decode(BenchConfig, request["config"], where="the benchmark's request")
    side = request["side"]
    write_json(request["answer"], exact_loss(config) if side == "exact" else measure(config, side))
    return 0


def exact_loss(config: BenchConfig) -> dict[str, Any]:
    """Return the first loss of the same weights and tokens in fp32, from the model's own layers on ssmtune's operations."""
    torch.manual_seed(0)
    model = base_model(config)
    model.float()
    plan = make_plan(model, named_recipe(config.recipe, rank=config.rank, alpha=2.0 * config.rank))
    _, loss_of, _ = _prepare_ssmtune(model, plan, config, fast="off")
    with torch.no_grad():
        losses = [loss_of(batch) for batch in make_batches(config, "ssmtune", model.config.vocab_size)]
    return {"first_loss": float(torch.stack(losses).sum())}


def measure(config: BenchConfig, side: Side) -> dict[str, Any]:
    """Run one side and return its figures: step times, peak memory, loss, dead tensors, floor, components, kernels."""
    torch.manual_seed(0)
    model = base_model(config)
    inventory = take_inventory(model)
    plan = make_plan(model, named_recipe(config.recipe, rank=config.rank, alpha=2.0 * config.rank))
    batches = make_batches(config, side, model.config.vocab_size)
    shape = {
        "parameters": inventory.total,
        "trainable": plan.trainable,
        "tokens": list(batches[0]["input_ids"].shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "quantization": quantization_facts(model),
    }
    floor_s = _floor_seconds(inventory, config, model.dtype) if side == "ssmtune" else None
    # Found by the base model's names, before adapters change them.
    modules = component_modules(model, inventory)
    prepare = _prepare_ssmtune if side == "ssmtune" else _prepare_peer
    trained, loss_of, operations = prepare(model, plan, config)
    step = _make_step(trained, loss_of, batches, config)
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    first_loss, first_step_s = _timed(step, config.device)
    called = called_operations(step) if operations is None else ""
    for _ in range(WARM_UP_STEPS):
        step()

    def several() -> None:
        for _ in range(config.num_steps):
            step()

    step_s = [_timed(several, config.device)[1] / config.num_steps for _ in range(WINDOWS)]
    peak = peak_memory()
    before = {name: p.detach().clone() for name, p in trained.items()}
    described = called if operations is None else operations()
    # A replayed pass is one operation to a profiler.
    before_profile = os.environ.get(SWITCH)
    os.environ[SWITCH] = "off"
    shares, kernels = profile_step(step, modules, with_cuda=config.device == "cuda")
    # A process may measure more than once.
    os.environ.pop(SWITCH)
    if before_profile is not None:
        os.environ[SWITCH] = before_profile
    return {
        "step_s": step_s,
        "first_step_s": first_step_s,
        "first_loss": float(first_loss),
        "peak_memory_bytes": peak,
        "num_trained": len(trained),
        "dead": sorted(name for name, p in trained.items() if torch.equal(before[name], p.detach())),
        "floor_s": floor_s,
        "components": shares,
        "kernels": kernels,
        "processed_tokens": sum(batch["input_ids"].numel() for batch in batches),
        "num_documents": sum(batch["num_documents"] for batch in batches),
        "useful_tokens": sum(batch["num_tokens"] for batch in batches),
        "operations": described,
        "shape": shape,
        "threads": torch.get_num_threads(),
        # What else the machine was doing: processes that ran or waited, over the last minute.
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name()
        if config.device == "cuda"
        else f"cpu ({torch.get_num_threads()} threads)",
    }


def base_model(config: BenchConfig) -> PreTrainedModel:
    """The model on its device, fp32 on a CPU and the config's precision on a GPU; random weights for a bare config."""
    from transformers import AutoModelForCausalLM

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device 'cuda': torch {torch.__version__} sees no GPU here. Use 'cpu'.")
    if not model_location(config.model).endswith(".json"):
        dtype: Dtype = "float32" if config.device == "cpu" else "auto"
        return load_base(config.model, dtype=dtype, device=config.device, quantize_config=config.quantize).train()
    model_config = load_config(config.model)
    precision = torch.float32 if config.device == "cpu" else model_config.dtype or torch.bfloat16
    with torch.device(config.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=precision)
    return (model if config.quantize is None else quantize(model, config.quantize)).train()


Prepared = tuple[dict[str, "nn.Parameter"], Callable[[Batch], torch.Tensor], Callable[[], str] | None]
"""Trained parameters, the loss of a batch, and what says what ran; None where a watched step has to show it."""


def _prepare_ssmtune(model: PreTrainedModel, plan: Plan, config: BenchConfig, fast: Fast = "auto") -> Prepared:
    """Trained parameters, the loss of a batch, and what runs the operations: as `ssmtune train` does it."""
    from ssmtune.attach import attach
    from ssmtune.graphs import use_graphs
    from ssmtune.head_loss import HeadLoss

    adapted = attach(model, plan, fast=fast).train()
    keep_activations(adapted, config.memory)
    head_loss = HeadLoss(adapted)
    graphs = use_graphs(adapted)

    def loss_of(batch: Batch) -> torch.Tensor:
        targets: torch.Tensor = batch["targets"]
        loss: torch.Tensor = head_loss(adapted, model_inputs(batch), batch["loss_positions"], targets) / len(targets)
        return loss

    return adapted.trained_parameters(), loss_of, lambda: f"{adapted.fast_block}; {graphs.describe()}"


def _prepare_peer(model: PreTrainedModel, plan: Plan, config: BenchConfig) -> Prepared:
    """The same sites through plain PEFT, the core's tensors trained in place, transformers' loss.

    What runs the operations is None, as the step has to show it: kernels if transformers found some.
    """
    from peft import LoraConfig, get_peft_model

    others = sorted({site.method for site in plan.sites} - set(PEER_METHODS))
    if others:
        raise ConfigError(
            f"recipe {plan.recipe!r}: plain PEFT has no {', '.join(others)}, so there is no peer. Use --no-peer."
        )
    linears = [site.path.removesuffix(".weight") for site in plan.sites if get_method(site.method).in_module]
    settings = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, lora_dropout=0.0)
    settings.target_modules = {name for name in linears if not _refused_by_peft(name, model, settings)}
    if settings.target_modules:
        wrapped = get_peft_model(model, settings)
    else:
        wrapped = model.requires_grad_(False)
    for site in plan.sites:
        if not get_method(site.method).in_module:
            model.get_parameter(site.path).requires_grad_(True)
    _keep_fused_layers_off_four_bits(model)
    if config.memory != "fast":
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    wrapped.train()

    def loss_of(batch: Batch) -> torch.Tensor:
        given = {name: batch[name] for name in ("input_ids", "labels", "attention_mask") if name in batch}
        share: float = batch["share"]
        loss: torch.Tensor = wrapped(**given, use_cache=False).loss * share
        return loss

    return {name: p for name, p in wrapped.named_parameters() if p.requires_grad}, loss_of, None


def _keep_fused_layers_off_four_bits(model: PreTrainedModel) -> None:
    """Let layers call their projections where a fused layer would read codes: it takes every weight but in_proj's.

    The convolution and the scan of such a layer stay kernels.
    """
    for module in model.modules():
        names = set(FUSED_LAYERS) & set(inspect.unwrap(type(module).forward).__code__.co_names)
        read = [child for name, child in module.named_children() if name != "in_proj"]
        if names and any(is_quantized(tensor) for child in read for tensor in child.parameters()):
            rebind(module, dict.fromkeys(names, lambda *_, **__: None))


def _refused_by_peft(name: str, model: PreTrainedModel, settings: LoraConfig) -> bool:
    """Whether PEFT takes no LoRA there: some families' fused layers pass over it. `num_trained` is lower by what is left out."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(settings, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _make_step(
    trained: dict[str, nn.Parameter],
    loss_of: Callable[[Batch], torch.Tensor],
    batches: Sequence[Batch],
    config: BenchConfig,
) -> Callable[[], torch.Tensor]:
    """Return one full training step; it returns the loss before the update and waits for nothing."""
    settings = OptimizerConfig()
    parameters = list(trained.values())
    cuda = config.device == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=cuda)

    def step() -> torch.Tensor:
        losses = []
        for batch in batches:
            # As trainers do it: PEFT's fp32 factors would otherwise meet bf16 activations.
            with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
                loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        with torch.profiler.record_function("component:optimiser"):
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    return step


def _timed(run: Callable[[], R], device: str) -> tuple[R, float]:
    """Run something; its result and its seconds, with the device's queue empty before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def _floor_seconds(inventory: Inventory, config: BenchConfig, dtype: torch.dtype) -> float | None:
    """Seconds a step of the frozen matrix products, x W^T and dy W, each shape timed alone; None with packed experts."""
    matrices: Counter[tuple[int, ...]] = Counter(
        c.shape for c in inventory.components if len(c.shape) == 2 and c.role != "embed.tokens"
    )
    if any(len(c.shape) == 3 and c.group == "mlp" for c in inventory.components):
        return None
    if not any(c.role == "embed.head" for c in inventory.components):
        matrices.update(c.shape for c in inventory.components if c.role == "embed.tokens")
    total = 0.0
    for shape, count in matrices.items():
        num_out, num_in = shape
        x = torch.randn(config.tokens_per_step, num_in, device=config.device, dtype=dtype)
        dy = torch.randn(config.tokens_per_step, num_out, device=config.device, dtype=dtype)
        weight = torch.randn(num_out, num_in, device=config.device, dtype=dtype)

        def both(x: torch.Tensor = x, dy: torch.Tensor = dy, weight: torch.Tensor = weight) -> None:
            torch.mm(x, weight.t())
            torch.mm(dy, weight)

        both()
        total += count * statistics.median(_timed(both, config.device)[1] for _ in range(5))
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
