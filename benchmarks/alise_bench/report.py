"""The report: all runs in one structure, and that as JSON, Markdown and a terminal table.

Pure but for `write_report`. Ratios to FCFS are computed within each repeat (same requests, same
arrivals) before their median is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.table import Table

from alise_bench.errors import BenchError
from alise_bench.json_values import without_nan
from alise_bench.metrics import run_metrics
from alise_bench.pictures import draw_pictures
from alise_bench.store import Run, load_plan, load_runs
from alise_bench.systems import System

BASELINE: Final = System.FCFS.value

# (metric, title, unit, decimals) of the tables; the JSON has all metrics.
_COLUMNS: Final = (
    ("normalized_latency_s.mean", "norm. latency mean", "s/token", 3),
    ("normalized_latency_s.p99", "norm. latency p99", "s/token", 3),
    ("jct_s.mean", "JCT mean", "s", 1),
    ("jct_s.p50", "JCT p50", "s", 1),
    ("jct_s.p90", "JCT p90", "s", 1),
    ("jct_s.p99", "JCT p99", "s", 1),
    ("ttft_s.mean", "TTFT mean", "s", 2),
    ("ttft_s.p99", "TTFT p99", "s", 2),
    ("tpot_s.mean", "TPOT mean", "s", 3),
    ("itl_p50_s", "ITL p50", "s", 3),
    ("longest_gap_s.p99", "token gap p99", "s", 2),
    ("max_wait_s", "max wait", "s", 1),
    ("slowdown_longest_decile", "slowdown, longest 10%", "x", 2),
    ("tokens_per_s", "throughput", "tokens/s", 1),
    ("preemptions", "preemptions", "", 0),
    ("recomputed_share", "recomputed of preempted", "share", 2),
    ("late_share", "steps longer than their pace", "share", 3),
    ("failures", "failures", "", 0),
)


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """Return nested metrics by dotted names."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def build_report(plan: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything that was measured, as JSON values (no NaN: None)."""
    unloaded: float = plan.get("unloaded_s_per_token", math.nan)
    measured = [
        {
            "system": run.id.system.value,
            "rate_per_s": run.id.rate_per_s,
            "repeat": run.id.repeat,
            "command": list(run.command),
            "metrics": flatten(asdict(run_metrics(run.rows, run.counts, unloaded))),
        }
        for run in runs
    ]
    rates = sorted({run.id.rate_per_s for run in runs})
    loads = [{"rate_per_s": rate, "systems": _compare(measured, rate)} for rate in rates]
    report = {**plan, "loads": loads, "runs": measured}
    cleaned: dict[str, Any] = without_nan(report)
    return cleaned


def _compare(measured: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Return, by system, medians over repeats and ratios to the baseline of the same repeat."""
    by_system: dict[str, dict[int, dict[str, float]]] = {}
    for run in measured:
        if run["rate_per_s"] == rate:
            by_system.setdefault(run["system"], {})[run["repeat"]] = run["metrics"]
    baseline = by_system.get(BASELINE, {})
    order = [system.value for system in System if system.value in by_system]
    return {
        system: {
            "repeats": sorted(by_system[system]),
            "median": _medians(by_system[system]),
            "ratio_to_fcfs": _ratios(by_system[system], baseline),
        }
        for system in order
    }


def _medians(repeats: dict[int, dict[str, float]]) -> dict[str, float]:
    names = next(iter(repeats.values()))
    return {name: median(metrics[name] for metrics in repeats.values()) for name in names}


def _ratios(
    repeats: dict[int, dict[str, float]], baseline: dict[int, dict[str, float]]
) -> dict[str, dict[str, float]]:
    paired = sorted(repeats.keys() & baseline.keys())
    ratios: dict[str, dict[str, float]] = {}
    for name in next(iter(repeats.values())):
        values = [
            repeats[r][name] / baseline[r][name]
            for r in paired
            if baseline[r][name] not in (0, None)
        ]
        if values:
            ratios[name] = {"median": median(values), "min": min(values), "max": max(values)}
    return ratios


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _cell(system: dict[str, Any], name: str, decimals: int, *, baseline: bool) -> str:
    text = _number(system["median"].get(name), decimals)
    ratio = system["ratio_to_fcfs"].get(name)
    if baseline or ratio is None or ratio["median"] is None:
        return text
    spread = f" [{ratio['min']:.2f}..{ratio['max']:.2f}]" if len(system["repeats"]) > 1 else ""
    return f"{text} ({ratio['median']:.2f}x{spread})"


def _grid(load: dict[str, Any]) -> list[list[str]]:
    """Return the table of one load: a header, then one row per metric, one column per system."""
    systems: dict[str, Any] = load["systems"]
    grid = [["", *systems]]
    for name, title, unit, decimals in _COLUMNS:
        head = f"{title}, {unit}" if unit else title
        grid.append(
            [head] + [_cell(s, name, decimals, baseline=n == BASELINE) for n, s in systems.items()]
        )
    return grid


def _load_title(report: dict[str, Any], load: dict[str, Any]) -> str:
    title = f"{load['rate_per_s']:.3g} requests/s"
    fcfs = load["systems"].get(BASELINE)
    unloaded = report.get("unloaded_s_per_token")
    if fcfs and unloaded and fcfs["median"]["normalized_latency_s.mean"] is not None:
        ratio = fcfs["median"]["normalized_latency_s.mean"] / unloaded
        title += f" (FCFS's mean normalized latency is {ratio:.1f}x its unloaded value)"
    return title


def terminal_tables(report: dict[str, Any]) -> list[Table]:
    """Return one rich table per load."""
    tables = []
    for load in report["loads"]:
        head, *rows = _grid(load)
        table = Table(title=_load_title(report, load), title_justify="left")
        table.add_column("median (paired ratio to fcfs)")
        for name in head[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def render_markdown(report: dict[str, Any], pictures: Sequence[str]) -> str:
    """Return the report as Markdown, with links to `pictures` (file names beside it)."""
    settings, env = report["settings"], report.get("environment", {})
    packages = ", ".join(f"{n} {v}" for n, v in env.get("packages", {}).items())
    lines = [
        "# ALISE benchmark",
        "",
        f"Mode {settings['mode']}, {settings['requests']} requests a run, {settings['slots']} "
        f"slots, `max_tokens` {settings['max_tokens']} for every request, seed "
        f"{settings['seed']}. Unloaded: {_number(report.get('unloaded_s_per_token'), 4)} s/token. "
        "Each cell: median over repeats (ratio to `fcfs` of the same repeat: median "
        "[smallest..largest]). One server at a time, started for each run.",
    ]
    for load in report["loads"]:
        head, *rows = _grid(load)
        lines += ["", f"## {_load_title(report, load)}", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"![{Path(name).stem.replace('-', ' ')}]({name})" for name in pictures)]
    left_out = ", ".join(f"{n} ({why})" for why, n in report.get("left_out", {}).items())
    lines += [
        "",
        "## How it was measured",
        "",
        f"- command: `{env.get('command')}`",
        f"- {packages}; Python {env.get('python')}; commit {env.get('git_commit')}",
        f"- {env.get('cpu')}, {env.get('cores')} cores, {env.get('memory')}; {env.get('platform')}",
        f"- usable prompts: {report.get('usable_prompts')}; rows left out: {left_out or 'none'}",
    ]
    return "\n".join(lines) + "\n"


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json, report.md and the pictures from the raw files in `folder`."""
    plan, runs = load_plan(folder), load_runs(folder)
    if not any(row.error is None for run in runs for row in run.rows):
        raise BenchError(f"{folder}: every request of every run failed; see its logs folder")
    report = build_report(plan, runs)
    pictures = draw_pictures(report, runs, folder)
    text = json.dumps(report, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(report, pictures), encoding="utf-8")
    return report
