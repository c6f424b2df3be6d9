"""Export: what was trained, in the layout of the one who uses it, proven to have arrived. The `export` stage."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmtune.errors import ConfigError
from ssmtune.export.base import ExportConfig, get_target
from ssmtune.records import new_record, write_json

__all__ = ["ExportConfig", "export"]


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the export and its record, and return the record.

    The result is compared with the model in memory before it gets its name: what does not match is not left behind.
    Raises `ConfigError` for a request that the target cannot serve, with the reason; `CheckFailed` when what was
    written does not behave as what was trained.
    """
    target = get_target(config.to)
    unread = sorted(config.chosen - target.options)
    if unread:
        raise ConfigError(
            f"--to {config.to} does not read --{unread[0].replace('_', '-')}. It reads: "
            f"{', '.join(sorted('--' + name.replace('_', '-') for name in target.options)) or 'no options'}."
        )
    started = time.time()
    facts = target.run(config)
    record_path = facts.pop("record_path")
    record = new_record("export", config=asdict(config), **facts, seconds=time.time() - started)
    write_json(Path(record_path), record)
    return record
