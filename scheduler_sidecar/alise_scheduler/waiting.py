"""The estimated waiting time (EWT) of jobs without a slot, by list scheduling over the slots.

Pure, for the engine's KV tier and the sidecar's status page alike: both see slots as free from a
time on, and know nothing of why a job waits where it does in the queue.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence


def waiting_times(
    frees_s: Sequence[float], free_slots: int, remaining_s: Iterable[float]
) -> list[float]:
    """Return the EWT of each waiting job, in queue order.

    `frees_s` are the expected seconds until each running job ends; each waiting job takes the
    first slot that is free and keeps it for its `remaining_s`. Infinite where there is no slot.
    """
    slots = [0.0] * free_slots + list(frees_s)
    heapq.heapify(slots)
    times = []
    for work_s in remaining_s:
        if not slots:
            times.append(math.inf)
            continue
        times.append(slots[0])
        heapq.heapreplace(slots, slots[0] + work_s)
    return times
