"""The status document as a terminal shows it. Pure: a document in, something rich can print out."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COLOURS = {"running": "green", "waiting": "yellow", "preempted": "magenta"}


def view(status: dict[str, Any]) -> RenderableType:
    """Return the whole screen; `status` is the document of `/api/v1/status`."""
    return Group(*_header(status), Text(""), _jobs(status["jobs"]))


def _header(status: dict[str, Any]) -> list[Text]:
    jobs, predictor, shadow = status["jobs"], status["predictor"], status.get("shadow")
    engines = status["engines"]
    slots = sum(engine["slots"] or 0 for engine in engines)
    models = sorted({engine["model"] for engine in engines if engine["model"]})
    away = sum(not engine["is_connected"] for engine in engines)
    lines = [
        f"[bold]ALISE[/] {status['version']}  policy {status['policy']}  "
        f"{len(engines)} engine{'' if len(engines) == 1 else 's'}"
        + (f" ([red]{away} away[/])" if away else ""),
        f"[green]running {jobs['running']}[/]{f' of {slots}' if slots else ''}  "
        f"[yellow]waiting {jobs['waiting']}[/]  [magenta]preempted {jobs['preempted']}[/]  "
        f"work in the queue {duration(sum(e['backlog_s'] or 0 for e in engines))}  "
        f"oldest {duration(max((e['longest_wait_s'] or 0 for e in engines), default=0))}  "
        f"finished {status['since_start']['finished']}",
        _prediction(predictor, engines),
        _against_fcfs(shadow),
    ]
    shown = [Text.from_markup(line) for line in lines]
    if models:  # a name is text, whatever is in it
        shown[0].append("  " + ", ".join(models), style="dim")
    return shown


def _prediction(predictor: dict[str, Any], engines: list[dict[str, Any]]) -> str:
    gamma = ", ".join(f"{e['gamma_per_s']:.3g}" for e in engines)
    end = f"  gamma {gamma} /s" if gamma else ""
    if not predictor["model_version"]:
        return f"[yellow]no model yet[/] ({predictor['samples']} samples): order is FCFS{end}"
    quality = ""
    if predictor["tau_b"] is not None:
        quality = (
            f"  tau-b {predictor['tau_b']:.2f}  error {predictor['mae_tokens']:.0f} tokens  "
            f"p50 {predictor['p50_coverage']:.0%}  p90 {predictor['p90_coverage']:.0%}"
        )
    drift = "  [red]drifting[/]" if predictor["is_drifting"] else ""
    return (
        f"model {predictor['model_version']} ({predictor['samples']} samples){quality}{drift}{end}"
    )


def _against_fcfs(shadow: dict[str, Any] | None) -> str:
    if shadow is None:
        return "[dim]against FCFS: not enough finished jobs[/]"
    return (
        f"against FCFS: mean normalized latency {_times(shadow['mean_normalized_latency_ratio'])}  "
        f"mean JCT {_times(shadow['mean_jct_ratio'])}  p99 JCT {_times(shadow['p99_jct_ratio'])}  "
        f"[dim]({shadow['jobs']} jobs)[/]"
    )


def _jobs(jobs: dict[str, Any]) -> Table:
    last = jobs["offset"] + len(jobs["rows"])
    table = Table(
        box=None,
        pad_edge=False,
        header_style="dim",
        caption=f"{last} of {jobs['matching']} jobs",
        caption_justify="left",
    )
    for name in ("#", "job", "state", "age", "prompt", "answer", "predicted", "left", "EWT"):
        table.add_column(name, justify="left" if name in ("job", "state") else "right")
    for name in ("boost", "ahead of", "passed by", "preempted"):
        table.add_column(name, justify="right")
    for job in jobs["rows"]:
        table.add_row(
            _count(job["place"]),
            Text(job["id"]),
            Text(job["state"], style=_COLOURS.get(job["state"], "")),
            duration(job["age_s"]),
            str(job["prompt_tokens"]),
            str(job["output_tokens"]),
            _range(job),
            duration(job["remaining_s"]),
            "" if job["place"] is None else duration(job["ewt_s"]),
            duration(job["boost_s"]),
            _count(job["overtakes"]),
            _count(job["overtaken"]),
            _count(job["preemptions"]),
        )
    return table


def duration(seconds: float | None) -> str:
    """Return a time for people; unknown is a dash."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 120 else f"{minutes // 60}h{minutes % 60:02d}m"


def _range(job: dict[str, Any]) -> str:
    if job["p50_tokens"] is None:
        return "-"
    return f"{job['p50_tokens']} ({job['p10_tokens']}-{job['p90_tokens']})"


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"[{'green' if ratio < 1 else 'red'}]{ratio:.2f}x[/]"


def _count(number: int | None) -> str:
    return str(number) if number else ""
