"""Short variants of drawn tasks for the studies of tiny models, named in study files as `study_tasks:NAME`.

They keep a task's rule, words and scorer, and ask shorter questions, so that 300 of them are answered in seconds.
Run studies that name them with this folder in PYTHONPATH.
"""

from __future__ import annotations

import dataclasses

from ssmtune.tasks.copying import TASK as COPYING_TASK
from ssmtune.tasks.needle import TASK as NEEDLE_TASK
from ssmtune.tasks.parity import TASK as PARITY_TASK

RECALL = dataclasses.replace(
    NEEDLE_TASK, name="recall", train_lengths=(6, 8, 12, 16), test_lengths=(8, 16, 32), num_train=10_000, num_test=100
)
"""Which of four numbers stood beside a name, up to 32 lines before: twice as far as in training."""

COPYING = dataclasses.replace(
    COPYING_TASK,
    name="copying-short",
    train_lengths=(6, 8, 10, 12),
    test_lengths=(8, 12, 16),
    num_train=10_000,
    num_test=100,
    max_new_tokens=40,
)
"""Up to 16 letters; two tokens a letter, so the longest answer has 32."""

PARITY = dataclasses.replace(
    PARITY_TASK,
    name="parity-short",
    train_lengths=(4, 6, 8, 12),
    test_lengths=(8, 16, 32),
    num_train=10_000,
    num_test=100,
)
"""Up to 32 bits."""
