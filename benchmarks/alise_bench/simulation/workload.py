"""What is simulated: requests of a trace, or of a data set at a rate."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from alise_scheduler.replica import Hardware, SimulatedRequest, replay

from alise_bench.arrivals import poisson_arrivals
from alise_bench.dataset import Item, load_dataset, tokenize
from alise_bench.errors import BenchError

_CAPACITY_REQUESTS = 2000


@dataclass(frozen=True, slots=True)
class RecordedRequest(SimulatedRequest):
    """A request whose tokens are known, for predictors that read them."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


def recorded_request(item: Item, arrival_s: float) -> RecordedRequest:
    """Return the request for `item` at a time."""
    return RecordedRequest(
        arrival_s, len(item.prompt_ids), item.output_tokens, item.prompt_ids, item.answer_ids
    )


def load_trace_requests(file: Path) -> tuple[SimulatedRequest, ...]:
    """Read a trace with lengths, ascending by arrival, the first at 0.

    CSV with the columns of the Azure LLM inference traces (TIMESTAMP, ContextTokens,
    GeneratedTokens), or JSONL with `arrival_s`, `prompt_tokens` and `output_tokens` in each row.
    Requests without output are left out. Raises `BenchError` naming file and row.
    """
    rows: list[SimulatedRequest] = []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--trace {file}: {error}") from error
    is_jsonl = file.suffix == ".jsonl"
    lines = text.splitlines()
    values = map(json.loads, filter(str.strip, lines)) if is_jsonl else csv.DictReader(lines)
    read = _jsonl_request if is_jsonl else _csv_request
    try:
        for row in values:
            rows.append(read(row))
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"--trace {file}, row {len(rows) + 1}: {error!r}; needed are TIMESTAMP, ContextTokens "
            "and GeneratedTokens (CSV), or arrival_s, prompt_tokens and output_tokens (JSONL)"
        ) from error
    rows = sorted((row for row in rows if row.output_tokens > 0), key=lambda row: row.arrival_s)
    if not rows:
        raise BenchError(f"--trace {file}: no requests in it")
    first_s = rows[0].arrival_s
    return tuple(
        SimulatedRequest(r.arrival_s - first_s, max(r.prompt_tokens, 1), r.output_tokens)
        for r in rows
    )


def _jsonl_request(row: Mapping[str, Any]) -> SimulatedRequest:
    return SimulatedRequest(
        float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"])
    )


def _csv_request(row: Mapping[str, Any]) -> SimulatedRequest:
    return SimulatedRequest(
        _seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])
    )


def _seconds(text: str) -> float:
    # Seven-digit fractions (as Azure writes) are one too many for datetime.
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def items_of_dataset(file: Path, model: Path, hardware: Hardware) -> tuple[Item, ...]:
    """Return what of a JSONL data set fits the KV cache, in the model's tokens."""
    from transformers import AutoTokenizer

    longest = hardware.kv_tokens - hardware.block_tokens
    items = tokenize(
        load_dataset(file, need_response=True),
        AutoTokenizer.from_pretrained(model),
        max_model_len=min(longest, 8192),
        max_tokens=min(longest, 8192) // 2,
        with_answers=True,
    ).items
    if not items:
        raise BenchError(f"--dataset {file}: nothing in it fits the profile's KV cache")
    return items


def lengths_of(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Return (prompt tokens, output tokens) of each."""
    return [(len(item.prompt_ids), item.output_tokens) for item in items]


def poisson_items(
    items: Sequence[Item], rate_per_s: float, count: int, seed: int
) -> tuple[RecordedRequest, ...]:
    """Return what `poisson_requests` does for the lengths of `items`, with their tokens."""
    arrivals = poisson_arrivals(rate_per_s, count, seed)
    drawn = (items[index] for index in _draw(len(items), count, seed))
    return tuple(
        recorded_request(item, arrival_s) for arrival_s, item in zip(arrivals, drawn, strict=True)
    )


def poisson_requests(
    lengths: Sequence[tuple[int, int]], rate_per_s: float, count: int, seed: int
) -> tuple[SimulatedRequest, ...]:
    """Return `count` requests with lengths drawn from `lengths`, arriving at random."""
    arrivals = poisson_arrivals(rate_per_s, count, seed)
    return tuple(
        SimulatedRequest(arrival_s, *lengths[index])
        for arrival_s, index in zip(arrivals, _draw(len(lengths), count, seed), strict=True)
    )


def _draw(among: int, count: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng((seed, 1)).integers(0, among, count)]


def stretched(
    requests: Sequence[SimulatedRequest], rate_per_s: float
) -> tuple[SimulatedRequest, ...]:
    """Return `requests` with arrivals stretched to this mean rate; their burstiness stays."""
    span_s = requests[-1].arrival_s
    if span_s <= 0:
        return tuple(requests)
    factor = (len(requests) - 1) / rate_per_s / span_s
    return tuple(
        SimulatedRequest(r.arrival_s * factor, r.prompt_tokens, r.output_tokens) for r in requests
    )


def capacity_per_s(lengths: Sequence[tuple[int, int]], hardware: Hardware) -> float:
    """Return the requests per second that one replica finishes with a queue that never ends."""
    requests = poisson_requests(lengths, 1e6, max(_CAPACITY_REQUESTS, 20 * hardware.slots), 0)
    ends = sorted(outcome.finish_s for outcome in replay(requests, hardware))
    low, high = len(ends) // 5, len(ends) * 4 // 5
    return (high - low) / (ends[high] - ends[low])


@dataclass(frozen=True, slots=True)
class RequestSource:
    """Where requests come from: a data set, or else a trace."""

    items: Sequence[Item]
    trace: Sequence[SimulatedRequest]
    count: int
    hardware: Hardware

    def draw(self, rate_per_s: float, seed: int) -> Sequence[SimulatedRequest]:
        """Return `count` requests; a trace's burstiness stays, stretched to the rate."""
        if self.items:
            return poisson_items(self.items, rate_per_s, self.count, seed)
        window = self._window(seed)
        shifted = [replace(row, arrival_s=row.arrival_s - window[0].arrival_s) for row in window]
        return stretched(shifted, rate_per_s)

    def capacity_per_s(self, seed: int) -> float:
        """Return what one replica finishes with a queue that never ends."""
        lengths = lengths_of(self.items) or [
            (row.prompt_tokens, row.output_tokens) for row in self._window(seed)
        ]
        return capacity_per_s(lengths, self.hardware)

    def _window(self, seed: int) -> Sequence[SimulatedRequest]:
        start = seed * self.count % max(len(self.trace) - self.count, 1)
        return self.trace[start : start + self.count]
