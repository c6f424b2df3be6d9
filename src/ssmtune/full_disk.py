"""A full disk, whichever way it shows itself, as one error."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssmtune.errors import TrainingFailed

TORCH_WRITE_FAILED = ("PytorchStreamWriter", "unexpected pos", "iostream error", "file write failed")


@contextmanager
def full_disk_is_named(run_dir: Path) -> Iterator[None]:
    """Turn the several ways in which a full disk shows itself into one `TrainingFailed`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's archive writer reports a failed write as a RuntimeError of its own, without an errno.
        torch_write = isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_WRITE_FAILED)
        if not torch_write and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        free = shutil.disk_usage(run_dir).free
        raise TrainingFailed(
            f"{run_dir}: no space left on the disk ({free:,} bytes free). Complete checkpoints are kept; "
            "free space and run the same command again to continue."
        ) from None
