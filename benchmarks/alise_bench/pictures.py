"""The report's pictures: latency against load, JCT distribution, timeline of one run.

Colours are Okabe and Ito's, which colour-blind readers tell apart; line styles differ too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from alise_bench.metrics import RequestRow, jct_s
from alise_bench.store import Run
from alise_bench.systems import System

_STYLE: Final = {
    System.FCFS: ("#000000", "-", "o"),
    System.PRIORITY_ORACLE: ("#E69F00", "--", "s"),
    System.ALISE: ("#0072B2", "-", "^"),
    System.ALISE_RECOMPUTE: ("#56B4E9", ":", "v"),
    System.ALISE_ORACLE: ("#009E73", "-.", "D"),
}
_WAITING: Final = "#E69F00"
_RUNNING: Final = "#0072B2"
# A longer pause between two tokens is drawn as waiting.
_PAUSE_S: Final = 1.0


def draw_pictures(report: dict[str, Any], runs: Sequence[Run], folder: Path) -> list[str]:
    """Draw what the runs allow into `folder`; return the names of the PNG files."""
    names = []
    for load in report["loads"]:
        here = [run for run in runs if run.id.rate_per_s == load["rate_per_s"]]
        suffix = f"-rate{load['rate_per_s']:.4g}".replace(".", "_")
        names.append(_save(jct_distribution(here), folder, f"jct-distribution{suffix}.png"))
        names.append(_save(timeline(here), folder, f"timeline{suffix}.png"))
    if len(report["loads"]) > 1:
        names.insert(0, _save(latency_against_load(report), folder, "latency-against-load.png"))
    return names


def _save(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=140, bbox_inches="tight")
    return name


def latency_against_load(report: dict[str, Any]) -> Figure:
    """Mean normalized latency (median over repeats) by request rate, one line per system."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for system in System:
        points = [
            (load["rate_per_s"], load["systems"][system.value]["median"])
            for load in report["loads"]
            if system.value in load["systems"]
        ]
        if points:
            colour, line, marker = _STYLE[system]
            latencies = [metrics["normalized_latency_s.mean"] for _, metrics in points]
            rates = [rate for rate, _ in points]
            axes.plot(rates, latencies, line, color=colour, marker=marker, label=system.value)
    if report.get("unloaded_s_per_token"):
        axes.axhline(report["unloaded_s_per_token"], color="0.6", lw=0.8, label="unloaded")
    axes.set_xlabel("load, requests/s")
    axes.set_ylabel("mean normalized latency, s/token")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _good(run: Run) -> list[RequestRow]:
    return [row for row in run.rows if row.error is None]


def jct_distribution(runs: Sequence[Run]) -> Figure:
    """Share of requests done within a time, over all repeats of one load, one line per system."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for system in System:
        times = sorted(jct_s(row) for run in runs if run.id.system is system for row in _good(run))
        if times:
            colour, line, _ = _STYLE[system]
            share = np.arange(1, len(times) + 1) / len(times)
            axes.step(times, share, line, where="post", color=colour, label=system.value)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("job completion time (JCT), s")
    axes.set_ylabel("share of requests done")
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3, which="both")
    return figure


def timeline(runs: Sequence[Run]) -> Figure:
    """Each job of the first repeat as a line from arrival to finish, systems side by side."""
    first = min(run.id.repeat for run in runs)
    by_system = {run.id.system: run for run in runs if run.id.repeat == first}
    shown = [system for system in System if system in by_system]
    figure = Figure(figsize=(4.2 * len(shown), 6))
    all_axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, system in zip(all_axes, shown, strict=True):
        rows = sorted(_good(by_system[system]), key=lambda row: row.arrival_s)
        for place, row in enumerate(rows):
            waits, runs_ = _phases(row)
            axes.broken_barh(waits, (place, 0.8), color=_WAITING)
            axes.broken_barh(runs_, (place, 0.8), color=_RUNNING)
        axes.set_title(system.value)
        axes.set_xlabel("time, s")
    all_axes[0].set_ylabel("jobs, by arrival")
    all_axes[0].yaxis.get_major_locator().set_params(integer=True)
    all_axes[0].invert_yaxis()
    figure.legend(
        handles=_legend_handles(), loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.02)
    )
    return figure


def _legend_handles() -> list[Any]:
    waiting = f"waiting (no token for over {_PAUSE_S:.0f} s, or none yet)"
    return [Patch(color=_WAITING, label=waiting), Patch(color=_RUNNING, label="tokens coming out")]


def _phases(row: RequestRow) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return (start, width) of the waiting and of the running phases, as the client saw them."""
    waits = [(row.arrival_s, row.token_s[0] - row.arrival_s)]
    running = []
    begun = row.token_s[0]
    for before, after in zip(row.token_s, row.token_s[1:], strict=False):
        if after - before > _PAUSE_S:
            running.append((begun, before - begun))
            waits.append((before, after - before))
            begun = after
    running.append((begun, row.finish_s - begun))
    return waits, running
