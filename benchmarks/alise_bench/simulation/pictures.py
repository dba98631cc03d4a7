"""The simulation's picture: mean against tail, a point or a curve for each policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from matplotlib.figure import Figure

from alise_bench.simulation.compare import SimulatedMetrics

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS: Final = "o^sDvPX*"


def pareto(curves: Mapping[str, Sequence[SimulatedMetrics]], title: str) -> Figure:
    """Draw mean normalized latency against p99 JCT, both as shares of FCFS's (`fcfs`, required)."""
    figure = Figure(figsize=(7.5, 4.8))
    axes = figure.subplots()
    (base,) = curves["fcfs"]
    for index, (name, points) in enumerate(curves.items()):
        axes.plot(
            [p.normalized_latency_s / base.normalized_latency_s for p in points],
            [p.jct_p99_s / base.jct_p99_s for p in points],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            label=name,
        )
    axes.axhline(1.1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("mean normalized latency, share of FCFS's (left is better)")
    axes.set_ylabel("p99 JCT, share of FCFS's (down is better)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    return figure
