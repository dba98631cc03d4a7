"""Finding the request rate at which a system's latency is a given multiple of its unloaded one.

Pure but for the measurement, which is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_CLOSE_ENOUGH: Final = 0.15
_MAX_STEP: Final = 1.35
_MIN_STEP: Final = 1.03


@dataclass(frozen=True, slots=True)
class Probe:
    """One short run: mean normalized latency over the unloaded one, at a rate."""

    rate_per_s: float
    ratio: float


def find_rate(
    target: float, first_rate_per_s: float, measure: Callable[[float], float], max_probes: int = 4
) -> tuple[float, list[Probe]]:
    """Return the rate at which `measure(rate)` is about `target`, and the probes made.

    `measure` returns the ratio, which grows with the rate. Between a probe below and one above,
    the next rate is interpolated in log(ratio); outside, steps are bounded. Ends when a probe is
    within 15% of `target`, else after `max_probes` with the rate interpolated last.
    """
    probes: list[Probe] = []
    rate = first_rate_per_s
    for _ in range(max_probes):
        probes.append(Probe(rate, measure(rate)))
        if abs(probes[-1].ratio / target - 1.0) <= _CLOSE_ENOUGH:
            return rate, probes
        rate = next_rate(probes, target)
    return rate, probes


def next_rate(probes: list[Probe], target: float) -> float:
    """Return where to look next, given the probes so far."""
    below = max((p for p in probes if p.ratio < target), key=lambda p: p.rate_per_s, default=None)
    above = min((p for p in probes if p.ratio >= target), key=lambda p: p.rate_per_s, default=None)
    if below and above and below.rate_per_s < above.rate_per_s:
        low, high = math.log(below.ratio), math.log(above.ratio)
        share = (math.log(target) - low) / (high - low)
        return below.rate_per_s + share * (above.rate_per_s - below.rate_per_s)
    last = probes[-1]
    # Near saturation latency climbs far faster than load: the root is the step to take.
    step: float = min(
        max((max(target, last.ratio) / min(target, last.ratio)) ** 0.25, _MIN_STEP), _MAX_STEP
    )
    return last.rate_per_s * step if last.ratio < target else last.rate_per_s / step
