"""Shadow FCFS: what the jobs that really came would have met under stock vLLM's order.

Pure. Ended jobs go in, with their true lengths; the modelled engine (`replica`) runs them in the
order of arrival, as far as the true lengths are known: up to the arrival of the oldest job that
still lives. So it trails the present by that job's age, and each job is run once.

Jobs that the client gave up count as load, up to where they got, and are not compared. What it
cannot see: prefixes that only FCFS's own order would have found in the cache, and jobs that ended
before the sidecar knew the engine (FCFS looks better for it).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from alise_scheduler.history import PastJob
from alise_scheduler.replica import (
    FirstComeFirstServed,
    Hardware,
    Replica,
    ReplicaJob,
    SimulatedRequest,
)

WINDOW_JOBS: Final = 1_000
MIN_JOBS: Final = 50
_MAX_PENDING_JOBS: Final = 20_000
"""More than these, and the model is not what serves: it starts over."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One job as it went and as FCFS would have served it; seconds from arrival to finish."""

    jct_s: float
    fcfs_jct_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Ratios:
    """What is served now over what FCFS would have done; below 1 is a gain."""

    jobs: int
    mean_normalized_latency: float
    mean_jct: float
    p99_jct: float


def ratios(pairs: Iterable[Pair]) -> Ratios | None:
    """Return the ratios over the same jobs on both sides; None for fewer than `MIN_JOBS`."""
    rows = np.array([(p.jct_s, p.fcfs_jct_s, p.output_tokens) for p in pairs], dtype=np.float64)
    if len(rows) < MIN_JOBS:
        return None
    served_s, fcfs_s, tokens = rows.T
    return Ratios(
        jobs=len(rows),
        mean_normalized_latency=float((served_s / tokens).mean() / (fcfs_s / tokens).mean()),
        mean_jct=float(served_s.mean() / fcfs_s.mean()),
        p99_jct=float(np.percentile(served_s, 99) / np.percentile(fcfs_s, 99)),
    )


@dataclass(slots=True, eq=False)
class Shadow:
    """One engine's shadow. Costs a fraction of a millisecond a job."""

    pairs: deque[Pair] = field(default_factory=lambda: deque(maxlen=WINDOW_JOBS))
    """The newest jobs that both have finished."""
    restarts: int = 0
    _replica: Replica | None = None
    _known: list[tuple[float, int, PastJob]] = field(default_factory=list)
    """Ended and not yet arrived here: a heap by arrival."""
    _under_way: dict[int, PastJob] = field(default_factory=dict)
    _number: int = 0

    def add(self, job: PastJob) -> None:
        """Take in a job that has ended."""
        if job.output_tokens < 1 or job.finish_s <= job.arrival_s:
            return  # it has cost nothing, or its times were not told
        if len(self._known) + len(self._under_way) >= _MAX_PENDING_JOBS:
            self._known.clear()
            self._under_way.clear()
            self._replica = None
            self.restarts += 1
        heapq.heappush(self._known, (job.arrival_s, self._number, job))
        self._number += 1

    def advance(
        self, horizon_s: float, hardware: Hardware, may_go_on: Callable[[], bool] = lambda: True
    ) -> None:
        """Run to `horizon_s`, before which no job lives that has not been added.

        Asks `may_go_on` between pieces of well below a millisecond.
        """
        if self._replica is None:
            # Before the horizon nobody is missing: the first that is known is the first of all.
            if not self._known or self._known[0][0] >= horizon_s:
                return
            self._replica = Replica(hardware, FirstComeFirstServed(), self._known[0][0])
        replica = self._replica
        replica.hardware = hardware
        while replica.now_s < horizon_s and may_go_on():
            while self._known and self._known[0][0] <= min(replica.now_s, horizon_s):
                self._arrive(replica, hardware)
            replica.admit()
            next_s = self._known[0][0] if self._known else math.inf
            # A new job changes nothing for the others while all slots are taken.
            until_s = min(next_s, horizon_s) if replica.free_slots > 0 else horizon_s
            for job in replica.advance(until_s):
                self._end(job)

    def _arrive(self, replica: Replica, hardware: Hardware) -> None:
        arrival_s, number, past = heapq.heappop(self._known)
        tokens = past.computed_prompt_tokens + past.output_tokens
        if tokens + hardware.block_tokens > hardware.kv_tokens:
            return  # the model cannot hold it, whoever could
        request = SimulatedRequest(arrival_s, past.computed_prompt_tokens, past.output_tokens)
        self._under_way[number] = past
        replica.arrive(ReplicaJob(number, request, arrival_s))

    def _end(self, job: ReplicaJob) -> None:
        past = self._under_way.pop(job.number)
        if past.is_complete:
            self.pairs.append(
                Pair(
                    past.finish_s - past.arrival_s,
                    job.finish_s - past.arrival_s,
                    past.output_tokens,
                )
            )
