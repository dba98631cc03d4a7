"""When requests arrive: Poisson, or the times of a trace.

Pure but for reading the trace's file. All times are seconds since the run's start.
"""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path

import numpy as np

from alise_bench.errors import BenchError


def poisson_arrivals(rate_per_s: float, count: int, seed: int) -> tuple[float, ...]:
    """Return `count` arrival times of a Poisson process; the same for the same arguments."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate_per_s, count)
    return tuple(float(t) for t in np.cumsum(gaps))


def trace_window(
    trace_s: tuple[float, ...], count: int, start: int, rate_per_s: float | None
) -> tuple[float, ...]:
    """Return `count` arrivals of a trace from its `start`-th on, the first at 0.

    The window moves back where the trace would end before it does. With `rate_per_s` times are
    stretched so that the mean rate is that; burstiness stays. Raises `BenchError` if the trace
    is too short.
    """
    if len(trace_s) < count:
        raise BenchError(f"the trace has {len(trace_s)} arrivals, fewer than --requests {count}")
    first = min(start, len(trace_s) - count)
    window = trace_s[first : first + count]
    span = window[-1] - window[0]
    stretch = (count - 1) / rate_per_s / span if rate_per_s and span > 0 else 1.0
    return tuple((t - window[0]) * stretch for t in window)


def load_trace(path: Path) -> tuple[float, ...]:
    """Return the arrival times of a trace, ascending, seconds from its first.

    A `.jsonl` file has an `arrival_s` (seconds) in each row; any other is CSV with a `TIMESTAMP`
    column, as in the Azure LLM inference traces. Raises `BenchError` naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--trace {path}: {error}") from error
    times = _jsonl_times(path, text) if path.suffix == ".jsonl" else _csv_times(path, text)
    if not times:
        raise BenchError(f"--trace {path}: no arrivals in it")
    times.sort()
    return tuple(t - times[0] for t in times)


def _jsonl_times(path: Path, text: str) -> list[float]:
    times = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                times.append(float(json.loads(line)["arrival_s"]))
            except (ValueError, KeyError, TypeError) as error:
                raise BenchError(
                    f"--trace {path}, line {number}: needs a number `arrival_s` ({error!r})"
                ) from error
    return times


def _csv_times(path: Path, text: str) -> list[float]:
    reader = csv.DictReader(text.splitlines())
    if "TIMESTAMP" not in (reader.fieldnames or ()):
        raise BenchError(f"--trace {path}, line 1: needs a CSV header with a TIMESTAMP column")
    times = []
    for row in reader:
        try:
            times.append(_timestamp_s(row["TIMESTAMP"]))
        except (ValueError, TypeError) as error:
            raise BenchError(
                f"--trace {path}, line {reader.line_num}: TIMESTAMP {row['TIMESTAMP']!r} is "
                "neither a number of seconds nor YYYY-MM-DD HH:MM:SS[.fraction]"
            ) from error
    return times


def _timestamp_s(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # Seven-digit fractions (as Azure writes) are one too many for datetime.
        whole, _, fraction = text.partition(".")
        return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
