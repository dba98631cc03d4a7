"""The tables that `alise simulate` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

from rich.table import Table

from alise_bench.simulation.against import Comparison
from alise_bench.simulation.compare import SimulatedMetrics
from alise_bench.simulation.what_if import Answer

_COLUMNS: Final = {
    "normalized_latency_s": "mean norm. latency s/token",
    "jct_s": "mean JCT s",
    "jct_p99_s": "p99 JCT s",
    "ttft_p99_s": "p99 TTFT s",
    "longest_gap_p99_s": "p99 longest gap s",
    "tokens_per_s": "tokens/s",
    "preemptions": "preemptions",
}


def systems_table(results: Mapping[str, SimulatedMetrics]) -> Table:
    """Return the metrics of each system, beside their ratios to the first one's."""
    table = Table(title="simulated (x the first system's)", title_justify="left")
    table.add_column("system")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", overflow="fold")  # a number is never cut off
    base = asdict(next(iter(results.values())))
    for name, metrics in results.items():
        row = asdict(metrics)
        table.add_row(name, *(_cell(row[column], base[column]) for column in _COLUMNS))
    return table


def carried_table(rates: Mapping[str, float], latency_s: float) -> Table:
    """Return the load that each system carries, beside its ratio to the first one's."""
    table = Table(title=f"load at {latency_s:g} s/token (x the first system's)")
    table.add_column("system")
    table.add_column("requests/s", justify="right")
    base = next(iter(rates.values()))
    for name, rate in rates.items():
        table.add_row(name, _cell(rate, base))
    return table


def answers_table(answers: Sequence[Answer], objective: str, most: int) -> Table:
    """Return how many replicas each system needs."""
    table = Table(title=f"replicas for {objective}", title_justify="left")
    for title in ("system", "replicas", "p99 JCT s", "mean norm. latency s/token"):
        table.add_column(title, justify="right")
    for answer in answers:
        table.add_row(
            answer.system,
            f"more than {most}" if answer.replicas is None else str(answer.replicas),
            f"{answer.metrics.jct_p99_s:.3g}",
            f"{answer.metrics.normalized_latency_s:.3g}",
        )
    return table


def against_table(comparisons: Sequence[Comparison]) -> Table:
    """Return what was simulated of each real run, beside its ratio to what was real."""
    table = Table(title="simulated (x the real run's)", title_justify="left")
    for title in ("run", "mean norm. latency s/token", "mean JCT s", "p99 JCT s"):
        table.add_column(title, justify="right")
    for comparison in comparisons:
        real, simulated = asdict(comparison.real), asdict(comparison.simulated)
        columns = ("normalized_latency_s", "jct_s", "jct_p99_s")
        table.add_row(comparison.run, *(_cell(simulated[c], real[c]) for c in columns))
    return table


def _cell(value: float, base: float) -> str:
    if not base or math.isnan(value):
        return f"{value:,.0f}"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{shown} ({value / base:.2f}x)"
