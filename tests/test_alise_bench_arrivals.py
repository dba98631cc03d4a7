"""Arrivals: deterministic, at the rate asked for, and traces read with errors by line."""

from __future__ import annotations

from pathlib import Path

import pytest
from alise_bench.arrivals import load_trace, poisson_arrivals, trace_window
from alise_bench.errors import BenchError


def test_poisson_is_the_same_for_the_same_seed_only() -> None:
    assert poisson_arrivals(1.4, 50, seed=3) == poisson_arrivals(1.4, 50, seed=3)
    assert poisson_arrivals(1.4, 50, seed=3) != poisson_arrivals(1.4, 50, seed=4)


def test_poisson_has_the_rate_asked_for() -> None:
    times = poisson_arrivals(2.0, 4000, seed=0)
    assert list(times) == sorted(times)
    assert 4000 / times[-1] == pytest.approx(2.0, rel=0.06)


def test_azure_csv(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:16:46,879,55\n"
    )
    assert load_trace(file) == pytest.approx((0.0, 4.314579, 59.31941), abs=1e-5)


def test_jsonl_trace_is_sorted_and_starts_at_zero(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"arrival_s": 7}\n\n{"arrival_s": 5.5}\n')
    assert load_trace(file) == (0.0, 1.5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "time,tokens\n1,2\n", "line 1: needs a CSV header with a TIMESTAMP"),
        ("a.csv", "TIMESTAMP\n1.5\nyesterday\n", "line 3: TIMESTAMP 'yesterday'"),
        ("a.jsonl", '{"arrival_s": 1}\n{"time": 2}\n', "line 2: needs a number `arrival_s`"),
        ("a.jsonl", "nonsense\n", "line 1: needs a number"),
        ("a.csv", "TIMESTAMP\n", "no arrivals"),
    ],
)
def test_bad_traces_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BenchError, match=message):
        load_trace(tmp_path / name)


def test_missing_trace(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="nowhere"):
        load_trace(tmp_path / "nowhere.csv")


def test_window_keeps_burstiness_and_takes_the_rate() -> None:
    window = trace_window((0.0, 5.0, 6.0, 8.0, 14.0), count=3, start=1, rate_per_s=0.5)
    assert window == pytest.approx((0.0, 4 / 3, 4.0))
    assert trace_window((0.0, 5.0, 6.0), 2, 0, None) == (0.0, 5.0)


def test_window_stays_within_the_trace() -> None:
    assert trace_window((0.0, 1.0, 5.0), 2, start=90, rate_per_s=None) == (0.0, 4.0)
    with pytest.raises(BenchError, match="3 arrivals"):
        trace_window((0.0, 1.0, 5.0), 4, 0, None)
