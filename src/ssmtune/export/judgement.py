"""Is what llama.cpp answered near enough to transformers?"""

from __future__ import annotations

from typing import Any

F32_LIMIT = 1e-3
"""Largest difference of a log-probability in nats. Both compute in fp32, in another order: 4e-5 to 2e-4 is measured."""

KL_LIMITS = {"f16": 0.1, "bf16": 0.1, "q8_0": 0.1, "q4_k_m": 1.0}
"""Mean Kullback-Leibler divergence in nats that rounding weights to a type may cost (q8_0: 1e-3 is measured).

A tensor in the wrong place costs whole nats; how much rounding costs below this is reported, not judged. For q4_k_m it
depends on the model (3e-2 to 6e-1 is measured), and every tensor is read back and compared as well.
"""

TABLE_EXPLAINS = 10
"""llama.cpp's table of GELU explains a difference if, with the table in transformers too, the mean is so many times smaller.

The largest is not judged: an argument that rounds to the other neighbour in the table moves it by a step of the table.
Measured: 35 to 65 times.
"""


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Return `ok`, whether the figures of a comparison pass, and `detail`, one sentence that names the one that decides."""
    exact = result["type"] == "f32"
    measured, limit = (
        (result["max_abs_logprob"], F32_LIMIT) if exact else (result["mean_kl"], KL_LIMITS[result["type"]])
    )
    what = "largest difference of a log-probability" if exact else "mean divergence"
    # Written this way round, NaN fails.
    ok = bool(measured <= limit)
    detail = f"{what} from transformers: {measured:.2g} nats over {result['steps']} steps (limit {limit:g})"
    if result["texts_split_differently"]:
        text = result["texts_split_differently"][0]
        ok, detail = False, f"llama.cpp splits {text[:60]!r} into other tokens than the model's tokenizer."
    elif (dt := result["dt_limits"]) and not dt["max_abs_effect"] <= F32_LIMIT:
        ok = False
        detail = (
            "the model's dt reaches the bounds that the config sets (`time_step_min`, `time_step_limit`), and llama.cpp "
            f"has none: without them log-probabilities move by {dt['max_abs_effect']:.2g} nats (limit {F32_LIMIT:g}; "
            f"llama.cpp and transformers without them: {dt['max_abs_logprob']:.2g}). Use --to hf"
        )
    elif (table := result["gelu_table"]) and not ok:
        detail += (
            f"; llama.cpp on a CPU looks GELU up in a table of half-precision values. With a step in GELU's place on "
            f"both sides: {table['max_abs_without_gelu']:.2g}; with such a table in transformers too: "
            f"{table['max_abs_logprob']:.2g}, on average {table['mean_abs_logprob']:.2g} instead of "
            f"{result['mean_abs_logprob']:.2g}"
        )
        ok = (
            table["max_abs_without_gelu"] <= F32_LIMIT
            and table["mean_abs_logprob"] * TABLE_EXPLAINS <= result["mean_abs_logprob"]
        )
    return {"ok": ok, "detail": detail}
