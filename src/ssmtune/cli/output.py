"""Where a command's result and words go: with --json the result is the only thing on stdout, words are on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

from rich.console import Console

words = Console(stderr=True, soft_wrap=True)


def print_result(value: Any) -> None:
    """Print a result as JSON on stdout."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def tables() -> Console:
    """A console on stdout for tables meant for people."""
    return Console(soft_wrap=False)


def quiet_libraries() -> None:
    """Keep the libraries' notices off the screen: what a user has to know, ssmtune says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def layer_ranges(layers: list[int]) -> str:
    """Return layer numbers as ranges: "0-4, 6-14"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
