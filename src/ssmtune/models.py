"""Find and load what MODEL names on the command line: the bundled model, a directory, a config file, or a hub id."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssmtune.checkpoint import INDEX, WEIGHTS, read_checkpoint
from ssmtune.config import read_json
from ssmtune.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = ("tiny-granite-h",)
Dtype = Literal["float32", "bfloat16", "auto"]
START = "start.safetensors"
"""Beside an exported model: what its sequences start from, which no weight holds (`export.cache_start`)."""


def model_location(name: str) -> str:
    """Return the directory of a bundled model, or `name` itself.

    Raises `ConfigError` for something that looks like a path and does not exist.
    """
    if name in BUNDLED:
        return str(resources.files("ssmtune") / "assets" / name)
    path = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") != 1
    if looks_like_path and not path.expanduser().exists():
        raise ConfigError(
            f"model {name!r}: no such file or directory. Give a model directory, a config .json, a hub id (owner/name), "
            f"or a bundled model ({nearest(name, BUNDLED)})."
        )
    return str(path.expanduser()) if path.expanduser().exists() else name


def load_config(name: str) -> Any:
    """Return the transformers config of MODEL; nothing else is read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    location = model_location(name)
    path = Path(location)
    if path.suffix == ".json" or (path / "config.json").is_file():
        path = path if path.suffix == ".json" else path / "config.json"
        try:
            model_type = read_json(path, infinite=True).get("model_type")
        except ConfigError as error:
            raise ConfigError(f"{path}: is no model config. {error}") from None
        if not isinstance(model_type, str):
            raise ConfigError(f"{path}: is no model config (model_type {model_type!r}). It must name its 'model_type'.")
        if model_type not in CONFIG_MAPPING:
            # The architectures that are ours and not transformers'.
            from ssmtune.parallel_gated_delta_model import register_parallel_gated_delta
            from ssmtune.s4d_model import register_s4d

            register_s4d()
            register_parallel_gated_delta()
        if model_type not in CONFIG_MAPPING:
            raise ConfigError(f"{path}: model_type {model_type!r} is unknown to the installed transformers.")
        try:
            config = CONFIG_MAPPING[model_type].from_json_file(str(path))
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ConfigError(f"{path}: transformers refuses this config: {str(error).splitlines()[0]}") from None
        config.name_or_path = name
        return config
    if path.exists():
        raise ConfigError(
            f"{name}: holds no config.json, so it is no model directory. Give the directory of a saved model."
        )
    try:
        return AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r}: cannot be loaded: {str(error).splitlines()[0]}") from None


def empty_model(name: str) -> PreTrainedModel:
    """Return MODEL without weights (meta device): enough for an inventory and a plan, at no memory."""
    return weightless(load_config(name))


def weightless(config: Any, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model of a transformers config on the meta device: names and shapes, no values, no memory.

    `dtype` is that of its tensors; None is transformers' choice for this config.
    """
    import torch

    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, **options)
    return model


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for the whole model of `config`; a multimodal config holds a language model's.

    `AutoModelForCausalLM` would build the language model alone, and a save would lose the rest.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText


def load_model(name: str, *, dtype: Dtype = "auto", device: str | None = None) -> PreTrainedModel:
    """Return MODEL with its weights, from safetensors only, without remote code.

    Raises `ConfigError` when files are missing or truncated, or tensors are missing or of another shape.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    config = load_config(name)
    logging.disable_progress_bar()
    location = model_location(name)
    if Path(location).suffix == ".json":
        raise ConfigError(f"{name}: is a config without weights. This needs a model directory or a hub id.")
    if Path(location).is_dir():
        try:
            _check_files(Path(location))
        except ConfigError as error:
            raise ConfigError(f"model {name!r}: weights cannot be loaded: {error}") from None
    try:
        model: PreTrainedModel
        model, loading = auto_class(config).from_pretrained(
            location,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Reported below by name, where transformers would only say that there are some.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model {name!r}: weights cannot be loaded: {str(error).splitlines()[0]}") from None
    # transformers fills what a checkpoint lacks with random numbers and goes on.
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            raise ConfigError(
                f"model {name!r}: {len(loading[problem])} tensors are {problem.split('_')[0]} in its weights "
                f"({', '.join(map(str, sorted(loading[problem])[:3]))}). The checkpoint is incomplete or not this config's."
            )
    # The name that plans and adapters show is what the user typed, not where it was found.
    model.config.name_or_path = name
    return model.to(device) if device else model


def _check_files(directory: Path) -> None:
    """Raise `ConfigError` for a model directory whose files lie, before anything is allocated for them."""
    if (directory / "adapter_config.json").exists():
        raise ConfigError(
            f"{directory}: holds adapter_config.json beside a model, and transformers would load the model that is named "
            "there instead. Move the adapter to a directory of its own."
        )
    if (directory / START).exists():
        raise ConfigError(
            f"{directory}: was exported with {START}, what its sequences start from, which no weight holds and ssmtune would "
            "leave out. Use its base with the run's adapter; to take the weights as a base of their own, move that file away."
        )
    if (directory / WEIGHTS).exists() or (directory / INDEX).exists():
        read_checkpoint(directory)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return MODEL's tokenizer. Raises `ConfigError` when it has none, or no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_location(name), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r}: tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise ConfigError(f"model {name!r}: its tokenizer has no chat template, which training data is rendered with.")
    return tokenizer
