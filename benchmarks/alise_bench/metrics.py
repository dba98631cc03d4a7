"""What a client measured of one run, as the numbers that systems are compared by.

Pure: definitions are those of docs/benchmark.md (TTFT, JCT, TPOT, normalized latency, longest
token gap). This module knows nothing of servers, files or policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request as its client saw it. Times are seconds since the run's start."""

    id: str
    arrival_s: float
    """When the load said it should be sent; lateness of the client counts as latency."""
    sent_s: float
    token_s: tuple[float, ...]
    """Arrival of each output token, in order; the end-of-sequence token is one of them."""
    finish_s: float
    prompt_tokens: int
    error: str | None = None
    """Why it failed; a failed request enters no latency."""

    @property
    def output_tokens(self) -> int:
        """Return the number of tokens received."""
        return len(self.token_s)


def ttft_s(row: RequestRow) -> float:
    """Return time to first token: first token - arrival."""
    return row.token_s[0] - row.arrival_s


def jct_s(row: RequestRow) -> float:
    """Return job completion time: finish - arrival."""
    return row.finish_s - row.arrival_s


def tpot_s(row: RequestRow) -> float | None:
    """Return time per output token after the first; None (undefined) for one token."""
    if row.output_tokens < 2:
        return None
    return (jct_s(row) - ttft_s(row)) / (row.output_tokens - 1)


def normalized_latency_s(row: RequestRow) -> float:
    """Return JCT / output tokens, s/token."""
    return jct_s(row) / row.output_tokens


def inter_token_s(row: RequestRow) -> list[float]:
    """Return the times between an answer's tokens, one fewer than there are tokens."""
    return [after - before for before, after in pairwise(row.token_s)]


def longest_gap_s(row: RequestRow) -> float:
    """Return the longest time between two tokens of the answer; 0 for one token."""
    return max(inter_token_s(row), default=0.0)


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """What an engine counted in a run."""

    preemptions: int
    preempted_tokens: int = 0
    """Tokens whose KV preemptions took from the device; ALISE systems only."""
    recomputed_tokens: int = 0
    """Of these, computed again."""
    paced_s: float = 0.0
    """What a paced engine's steps should have taken in all (docs/benchmark.md)."""
    late_s: float = 0.0
    """How much longer they took, where the machine was too slow."""

    @property
    def late_share(self) -> float:
        """Return by what share the pace was missed; NaN where there was none to keep."""
        return self.late_s / self.paced_s if self.paced_s else math.nan

    def __sub__(self, before: EngineCounts) -> EngineCounts:
        return EngineCounts(
            self.preemptions - before.preemptions,
            self.preempted_tokens - before.preempted_tokens,
            self.recomputed_tokens - before.recomputed_tokens,
            self.paced_s - before.paced_s,
            self.late_s - before.late_s,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles of one quantity over requests, seconds; NaN without requests."""

    mean: float
    p50: float
    p90: float
    p99: float


def spread(values: Sequence[float]) -> Spread:
    """Return mean, p50, p90 and p99 (linear interpolation) of `values`."""
    if not values:
        return Spread(math.nan, math.nan, math.nan, math.nan)
    p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
    return Spread(float(np.mean(values)), p50, p90, p99)


def itl_p50_s(rows: Sequence[RequestRow]) -> float:
    """Return the median time between the tokens of all answers: a step's typical time."""
    return spread([gap for row in rows for gap in inter_token_s(row)]).p50


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """One run in numbers."""

    requests: int
    failures: int
    duration_s: float
    """From the first arrival to the last finish."""
    requests_per_s: float
    tokens_per_s: float
    ttft_s: Spread
    jct_s: Spread
    tpot_s: Spread
    normalized_latency_s: Spread
    itl_p50_s: float
    """Median over all tokens of the time since the one before. A step's typical time: where it
    differs between systems at the same load, the machine's speed did (TPOT has pauses in it)."""
    longest_gap_s: Spread
    max_wait_s: float
    """The longest TTFT."""
    slowdown_longest_decile: float
    """Mean JCT of the tenth of requests with the longest answers, over their unloaded JCT."""
    preemptions: int
    recomputed_share: float
    """Of the tokens that preemptions took from the device; NaN without any, or with stock."""
    late_share: float
    """By what share the machine missed the pace; NaN without one."""
    client_lag_p99_s: float
    """How late the client sent requests: above a few ms the load was not as stated."""


def slowdown_longest_decile(rows: Sequence[RequestRow], unloaded_s_per_token: float) -> float:
    """Return mean of JCT / (output tokens * unloaded s/token) over the longest tenth (at least 1).

    `rows` must hold no failures; NaN when empty.
    """
    if not rows:
        return math.nan
    longest = sorted(rows, key=lambda row: row.output_tokens)[-max(1, len(rows) // 10) :]
    return float(np.mean([normalized_latency_s(row) / unloaded_s_per_token for row in longest]))


def run_metrics(
    rows: Sequence[RequestRow], counts: EngineCounts, unloaded_s_per_token: float
) -> RunMetrics:
    """Return the metrics of a run; failed requests are counted and enter nothing else."""
    good = [row for row in rows if row.error is None]
    start = min((row.arrival_s for row in good), default=0.0)
    duration = max((row.finish_s for row in good), default=0.0) - start
    tokens = sum(row.output_tokens for row in good)
    tpots = [tpot for row in good if (tpot := tpot_s(row)) is not None]
    return RunMetrics(
        requests=len(rows),
        failures=len(rows) - len(good),
        duration_s=duration,
        requests_per_s=len(good) / duration if duration else math.nan,
        tokens_per_s=tokens / duration if duration else math.nan,
        ttft_s=spread([ttft_s(row) for row in good]),
        jct_s=spread([jct_s(row) for row in good]),
        tpot_s=spread(tpots),
        normalized_latency_s=spread([normalized_latency_s(row) for row in good]),
        itl_p50_s=itl_p50_s(good),
        longest_gap_s=spread([longest_gap_s(row) for row in good]),
        max_wait_s=max((ttft_s(row) for row in good), default=math.nan),
        slowdown_longest_decile=slowdown_longest_decile(good, unloaded_s_per_token),
        preemptions=counts.preemptions,
        recomputed_share=(
            counts.recomputed_tokens / counts.preempted_tokens
            if counts.preempted_tokens
            else math.nan
        ),
        late_share=counts.late_share,
        client_lag_p99_s=spread([row.sent_s - row.arrival_s for row in good]).p99,
    )
