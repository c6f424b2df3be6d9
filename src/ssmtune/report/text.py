"""Numbers and names as readers want them."""

from __future__ import annotations

import math
from typing import Any


def metric_text(value: float, *, percent: bool) -> str:
    """Return a metric's value: percent with one decimal, else three significant figures."""
    return f"{100 * value:.1f} %" if percent else number_text(value)


def interval_text(low: float | None, high: float | None, *, percent: bool, signed: bool = False) -> str:
    """Return an interval as "[low, high]"; empty without one."""
    if low is None or high is None:
        return ""
    scale, sign = (100.0 if percent else 1.0), ("+" if signed else "")
    digits = ".1f" if percent else ".3g"
    bounds = (minus(_unsigned_zero(f"{scale * bound:{sign}{digits}}")) for bound in (low, high))
    return f"[{', '.join(bounds)}]"


def difference_text(value: float, *, percent: bool) -> str:
    """Return a signed difference, in percentage points when the metric is a share."""
    return minus(_unsigned_zero(f"{100 * value:+.1f} pp" if percent else f"{value:+.3g}"))


def size_text(value: float, *, percent: bool) -> str:
    """Return the size of a difference, without a sign."""
    return f"{100 * value:.1f} pp" if percent else f"{value:.3g}"


def p_text(value: float | None) -> str:
    """Return a p-value with what can be told of it."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def number_text(value: Any) -> str:
    """Return a number in at most three significant figures, thousands grouped; anything else as it is written."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return minus(f"{value:,}")
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return minus(f"{mantissa}e{int(exponent)}")
    return minus(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def bytes_text(value: float | None) -> str:
    """Return bytes in GiB or MiB."""
    if value is None:
        return ""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def seconds_text(value: float | None) -> str:
    """Return a duration in seconds, minutes or hours."""
    if value is None:
        return ""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _unsigned_zero(text: str) -> str:
    return text[1:] if text[:1] in ("+", "-") and not any(digit in text for digit in "123456789") else text


def minus(text: str) -> str:
    """Return `text` with typographic minus signs at the start of numbers."""
    return f"\N{MINUS SIGN}{text[1:]}" if text.startswith("-") else text
