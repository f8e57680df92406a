"""Numbers for people: three significant digits and a unit. A figure not taken is a dash."""

from __future__ import annotations

import math

MISSING = "–"

_KI = 1024.0
_BYTES = (("TiB", _KI**4), ("GiB", _KI**3), ("MiB", _KI**2), ("KiB", _KI), ("B", 1.0))
_FLOPS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0))
_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_RATE = (("M", 1e6), ("k", 1e3), ("", 1.0))
_COUNT = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def missing(value: float | None) -> bool:
    """Whether a figure was not taken: None or not a number."""
    return value is None or math.isnan(value)


def digits(value: float | None, significant: int = 3) -> str:
    """Significant digits, thousands separated, no exponent: 0.0123, 1.23, 12.3, 1,234."""
    if value is None or math.isnan(value):
        return MISSING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # The exponent after rounding, so that 9.999 becomes 10.0 and not 10.00.
    exponent = int(f"{value:.{significant - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, significant - 1 - exponent)}f}"


def score(value: float | None) -> str:
    """A figure of quality: four significant digits, because variants differ in the last ones."""
    return f"{value:.3e}" if value is not None and value >= 1e6 else digits(value, 4)


def tick(value: float) -> str:
    """The value with as few digits as possible: for the labels of an axis."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def scaled(value: float | None, scale: tuple[tuple[str, float], ...], *, short: bool = False) -> str:
    """The value in the largest unit that leaves it at one or more; the smallest unit otherwise."""
    if value is None or math.isnan(value):
        return MISSING
    if value == 0:
        return f"0 {scale[-1][0]}".strip()
    # 0.9995 and up prints as 1.00 of the larger unit rather than 1,000 of the smaller.
    unit, size = next((pair for pair in scale if abs(value) >= 0.9995 * pair[1]), scale[-1])
    number = tick(value / size) if short else digits(value / size)
    return f"{number} {unit}".strip()


def size(value: float | None, *, short: bool = False) -> str:
    """Bytes as B, KiB, MiB, GiB or TiB."""
    return scaled(value, _BYTES, short=short)


def flops(value: float | None, *, short: bool = False) -> str:
    """Floating-point operations as FLOP, MFLOP … EFLOP."""
    return scaled(value, _FLOPS, short=short)


def seconds(value: float | None, *, short: bool = False) -> str:
    """Seconds as µs, ms or s."""
    return scaled(value, _SECONDS, short=short)


def rate(value: float | None, *, short: bool = False) -> str:
    """Tokens per second, such as 12.3 k tokens/s; `short` leaves the unit to the axis."""
    number = scaled(value, _RATE, short=short)
    return number if short or number == MISSING else f"{number} tokens/s"


def count(value: float | None, *, short: bool = False) -> str:
    """A count such as parameters or tokens: 812, 12.3 k, 4.56 M."""
    return scaled(value, _COUNT, short=short)


def budget(kind: object, amount: float | None) -> str:
    """A training budget: 400 k tokens, 1.20 TFLOP, 60.0 s."""
    if missing(amount):
        return MISSING
    show = {"flops": flops, "seconds": seconds}.get(str(kind))
    return show(amount) if show else f"{count(amount)} tokens"


def learning_rate(value: float | None) -> str:
    """A learning rate with the digits that it was given with: 0.003."""
    return MISSING if missing(value) else f"{value:g}"


def whole(value: float | None) -> str:
    """A whole number in full, such as a rank: 1, 12."""
    return MISSING if value is None or math.isnan(value) else f"{value:.0f}"


def places(low: float | None, high: float | None) -> str:
    """The ranks that a row may have: 2, 1–3."""
    return whole(low) if low == high else MISSING if missing(low) else f"{whole(low)}–{whole(high)}"


def difference(value: float | None, low: float | None, high: float | None) -> str:
    """A difference with its sign and its interval: +0.012 (+0.004 to +0.020)."""
    if value is None or missing(value):
        return MISSING
    ends = "" if missing(low) or missing(high) else f" ({_signed(low)} to {_signed(high)})"
    return _signed(value) + ends


def _signed(value: float | None) -> str:
    """Three decimals, with the minus sign of tables."""
    return f"{value:+.3f}".replace("-", "−")


def ratio(value: float | None) -> str:
    """A factor, such as 0.25×."""
    return MISSING if missing(value) else f"{digits(value)}×"


def ratios(low: float | None, high: float | None) -> str:
    """A range of factors, such as 0.25–0.31×; one factor where both ends have the same text."""
    if missing(low) or missing(high) or ratio(low) == ratio(high):
        return ratio(low)
    return f"{digits(low)}–{ratio(high)}"


def percent(value: float | None) -> str:
    """A share in percent, such as 1.25 %; a difference keeps its sign."""
    return MISSING if value is None or math.isnan(value) else f"{digits(value * 100)} %"


LARGEST_EXCESS = 10.0
"""Share above 1 of a ratio whose digits are still shown."""


def above_one(ratio: float) -> str:
    """How much a ratio is above 1, in percent; one that says nothing, such as a bound from two pairs, without
    its digits: over 1,000 %."""
    if not math.isnan(ratio) and ratio - 1 > LARGEST_EXCESS:
        return f"over {percent(LARGEST_EXCESS)}"
    return percent(ratio - 1)


def share(mean: float | None, deviation: float | None = None) -> str:
    """A share in percent, with its deviation if there is one: 98.4 %, 98.4 ± 0.3 %."""
    if mean is None or math.isnan(mean):
        return MISSING
    spread = "" if deviation is None or math.isnan(deviation) else f" ± {deviation * 100:.1f}"
    return f"{mean * 100:.1f}{spread} %"


def scientific(value: float | None) -> str:
    """A figure that spans magnitudes, such as an error: 1.2e-07."""
    return MISSING if value is None or math.isnan(value) else f"{value:.1e}" if value else "0"


def length(value: float | None) -> str:
    """A sequence length, binary: 512, 1k, 1.5k, 1M; one that is not a round binary stays whole."""
    if value is None or math.isnan(value):
        return MISSING
    whole = int(value)
    for unit, step in (("M", 1 << 20), ("k", 1 << 10)):
        if whole >= step and whole % (step // 2) == 0:
            return f"{whole / step:g}{unit}"
    return str(whole)


def between(low: float | None, high: float | None, unit: str) -> str:
    """A range with its unit once where both ends share it; `unit` is 'seconds', 'size' or 'rate'."""
    if missing(low) or missing(high):
        return MISSING
    show = {"seconds": seconds, "size": size, "rate": rate}[unit]
    first, last = show(low), show(high)
    if first == last:
        return first
    return f"{first.split()[0]}–{last}" if first.split()[1:] == last.split()[1:] else f"{first} – {last}"
