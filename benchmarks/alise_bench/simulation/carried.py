"""The load that a system carries at a given mean normalized latency: the paper's own measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from alise_bench.errors import BenchError

_PRECISION: Final = 1.01


def load_carried(
    latency_at: Callable[[float], float], latency_s: float, low: float, high: float
) -> float:
    """Return the highest load in [low, high] whose latency is at most `latency_s`, within 1%.

    Latency grows with load if all loads share one draw of requests and gaps. Raises `BenchError`
    if even `low` is above it.
    """
    if (least := latency_at(low)) > latency_s:
        raise BenchError(
            f"--carry {latency_s:g}: it is {least:.3g} s/token even at {low:.2g} requests/s"
        )
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        if latency_at(middle) <= latency_s:
            low = middle
        else:
            high = middle
    return low
