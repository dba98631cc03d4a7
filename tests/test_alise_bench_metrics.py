"""Metrics by tables: what a client's timestamps mean."""

from __future__ import annotations

import math

import pytest
from alise_bench.metrics import (
    EngineCounts,
    RequestRow,
    jct_s,
    longest_gap_s,
    normalized_latency_s,
    run_metrics,
    slowdown_longest_decile,
    spread,
    tpot_s,
    ttft_s,
)


def row(
    arrival: float = 10.0,
    tokens: tuple[float, ...] = (11.0, 11.5, 14.5, 15.0),
    error: str | None = None,
) -> RequestRow:
    finish = tokens[-1] if tokens else arrival
    return RequestRow("r", arrival, arrival, tokens, finish, 7, error)


def test_times_are_counted_from_arrival() -> None:
    assert ttft_s(row()) == 1.0
    assert jct_s(row()) == 5.0
    assert normalized_latency_s(row()) == 1.25
    assert tpot_s(row()) == pytest.approx(4.0 / 3)
    assert longest_gap_s(row()) == 3.0


def test_one_token_has_no_tpot_and_no_gap() -> None:
    single = row(tokens=(12.0,))
    assert tpot_s(single) is None
    assert longest_gap_s(single) == 0.0
    assert normalized_latency_s(single) == 2.0


@pytest.mark.parametrize(
    ("values", "mean", "p50", "p90"),
    [([3.0], 3.0, 3.0, 3.0), ([0.0, 10.0], 5.0, 5.0, 9.0), (list(range(101)), 50.0, 50.0, 90.0)],
    ids=["one", "two", "many"],
)
def test_spread(values: list[float], mean: float, p50: float, p90: float) -> None:
    result = spread(values)
    assert (result.mean, result.p50, result.p90) == pytest.approx((mean, p50, p90))


def test_spread_of_nothing_is_not_a_number() -> None:
    assert math.isnan(spread([]).p99)


def test_longest_decile_is_by_output_tokens() -> None:
    short = [row(tokens=(11.0, 12.0))] * 19
    long = row(tokens=tuple(10.0 + 2.0 * i for i in range(1, 11)))  # 20 s for 10 tokens
    other = row(tokens=tuple(10.0 + 1.0 * i for i in range(1, 11)))  # 10 s for 10 tokens
    # 21 rows: a decile of two, the long ones: 2 and 1 s/token, over 0.5 unloaded.
    assert slowdown_longest_decile([*short, long, other], 0.5) == pytest.approx(3.0)


def test_run_counts_failures_and_leaves_them_out() -> None:
    rows = [row(), row(tokens=(), error="HTTP 500"), row(arrival=12.0, tokens=(13.0, 20.0))]
    metrics = run_metrics(rows, EngineCounts(4, 200, 50), unloaded_s_per_token=0.1)
    assert (metrics.requests, metrics.failures, metrics.preemptions) == (3, 1, 4)
    assert metrics.recomputed_share == 0.25
    assert math.isnan(metrics.late_share)
    assert metrics.duration_s == 10.0
    assert metrics.tokens_per_s == pytest.approx(6 / 10)
    assert metrics.max_wait_s == 1.0
    assert metrics.itl_p50_s == 1.75  # of 0.5, 0.5, 3 and 7 s
    assert metrics.jct_s.mean == pytest.approx((5 + 8) / 2)


def test_a_run_says_how_far_the_machine_missed_its_pace() -> None:
    counts = EngineCounts(0, paced_s=120.0, late_s=4.0) - EngineCounts(0, paced_s=20.0, late_s=3.0)
    assert run_metrics([row()], counts, 0.1).late_share == pytest.approx(0.01)


def test_a_run_of_failures_only_has_no_latency() -> None:
    metrics = run_metrics([row(tokens=(), error="refused")], EngineCounts(0), 0.1)
    assert metrics.failures == 1
    assert math.isnan(metrics.jct_s.mean)
    assert math.isnan(metrics.tokens_per_s)
