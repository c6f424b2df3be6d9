"""Tasks: what a model is fine-tuned on and scored by. One file per task, found by its name; see `base`."""
