"""Numbers, sizes and durations as text."""

from __future__ import annotations

import math


def number_text(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits, from 10,000 on as an integer with commas; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}g}"


def error_text(value: float, stderr: float | None, *, signed: bool = False) -> str:
    """A value with its standard error, both to two digits of the error."""
    sign = "+" if signed else ""
    if not stderr:
        return f"{value:{sign}.4g}" + ("" if stderr is None else " ±0")
    digits = max(0, min(4, 1 - math.floor(math.log10(stderr))))
    return f"{value:{sign}.{digits}f} ±{stderr:.{digits}f}"


def share_text(value: float) -> str:
    """A fraction between 0 and 1 in percent."""
    return f"{value:.0%}"


def count_text(count: float) -> str:
    """A number of parameters: 7.2 B, 124 M, 260 k."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def bytes_text(size: float) -> str:
    """Bytes as decimal gigabytes, below a tenth of one as megabytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def duration_text(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"
