"""Read every set that lies in a directory and score its own answers: each must be right by the task's own scorer.

Usage: python recipes/check_task_data.py --data DIR [--most 200]
"""

from __future__ import annotations

import argparse

from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import Side, get_task, messages, task_names


def main() -> None:
    """Print one line per task and side, and exit with 1 when an answer of a set scores below 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="directory with the sets")
    parser.add_argument("--most", type=int, default=200, help="answers scored per side")
    arguments = parser.parse_args()
    wrong = 0
    for name in task_names():
        task = get_task(name)
        if not isinstance(task, SourcedTask):
            continue
        splits = task.found_splits(arguments.data)
        sides: list[Side] = []
        if task.trained and "train" in splits:
            sides.append("train")
        if task.tested and task.test_split in splits:
            sides.append("test")
        for side in sides:
            examples = task.examples(side, 1.0, arguments.data)
            longest = max(len(messages(example)[0][-1]["content"]) for example in examples)
            scored = examples[: arguments.most]
            scores = [task.score(example.output, example)[task.primary] for example in scored if task.primary]
            below = [example.id for example, score in zip(scored, scores, strict=False) if score < 1]
            wrong += len(below)
            corpus = task.score_corpus([e.output for e in scored], scored) if side == "test" else {}
            words = ", ".join(f"{metric} {value:.3f}" for metric, value in corpus.items())
            print(
                f"{name} {side}: {len(examples)} examples, longest question {longest:,} characters, "
                f"{len(scores)} answers scored, {len(below)} below 1 {below[:3]} {words}"
            )
        if not sides:
            print(f"{name}: not here")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
