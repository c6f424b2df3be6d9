"""Count the near-duplicates across the 90/10 split of each task, and how alike the closest pair is.

Usage: python recipes/near_duplicates.py [--size 1] [--seed 0]
"""

from __future__ import annotations

import argparse

from ssmtune.tasks.base import NEAR_DUPLICATE, GeneratedTask, get_task, near_duplicates, split, task_names


def main() -> None:
    """Print one line per task and exit with 1 when any pair reaches the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=float, default=1.0, help="share of the full task")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total = 0
    for name in task_names():
        task = get_task(name)
        if not isinstance(task, GeneratedTask):
            continue
        parts = split(task.generate(arguments.size, arguments.seed))
        # Without a bound the closest pair is found too, however far below the real bound it lies.
        alike = near_duplicates(parts.train, parts.test, bound=0.0)
        found = sum(similarity >= NEAR_DUPLICATE for _, _, similarity in alike)
        closest = max((similarity for _, _, similarity in alike), default=0.0)
        total += found
        print(
            f"{name}: {len(parts.train)} train, {len(parts.test)} test, {found} pairs at {NEAR_DUPLICATE} or above, "
            f"closest {closest:.2f}"
        )
    raise SystemExit(1 if total else 0)


if __name__ == "__main__":
    main()
