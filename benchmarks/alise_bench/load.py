"""Which load is run: unloaded latency, capacity, and the rates that follow from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from alise_bench.arrivals import load_trace, poisson_arrivals, trace_window
from alise_bench.client import Answer, Ask
from alise_bench.dataset import Item
from alise_bench.load_search import find_rate
from alise_bench.metrics import EngineCounts, run_metrics
from alise_bench.server import engine_counts, free_port, running_server
from alise_bench.session import Session, at_once, send
from alise_bench.settings import BenchSettings
from alise_bench.store import save_plan
from alise_bench.systems import System, command, environment

_CAPACITY_ROUNDS: Final = 3


def measure_load(session: Session) -> None:
    """Measure the unloaded latency, and choose the rates unless they were given.

    With stock vLLM, asking prompts of the first repeat's training part.
    """
    settings, plan = session.settings, session.plan
    if "unloaded_s_per_token" in plan and "rates_per_s" in plan:
        return
    port = free_port()
    line = command(System.FCFS, session.servers, port)
    log = session.out / "logs" / "load.log"
    with running_server(line, environment(session.servers, os.environ), port, log) as url:
        train = session.split(0).train
        session.progress.step("unloaded latency: one request at a time")
        send(url, settings, at_once(train[-2:]), session.progress)
        before = engine_counts(url, session.servers.pace)
        asks = at_once(train[: settings.unloaded_requests])
        answers = send(url, settings, asks, session.progress, 1)
        unloaded = _mean_normalized_latency_s(answers)
        session.progress.note(f"unloaded: {unloaded:.4f} s/token")
        session.progress.pace((engine_counts(url, session.servers.pace) - before).late_share)
        save_plan(session.out, plan, unloaded_s_per_token=unloaded)
        save_plan(session.out, plan, rates_per_s=_choose_rates(session, url, train, unloaded))
    rates = ", ".join(f"{rate:.3g}" for rate in plan["rates_per_s"])
    session.progress.note(f"load: {rates} requests/s")


def _choose_rates(
    session: Session, url: str, train: Sequence[Item], unloaded: float
) -> list[float]:
    settings, plan = session.settings, session.plan
    if settings.rates_per_s:
        return list(settings.rates_per_s)
    if "capacity_per_s" not in plan:
        session.progress.step("capacity: all slots kept full")
        asks = at_once(train[: _CAPACITY_ROUNDS * settings.slots])
        answers = send(url, settings, asks, session.progress, settings.slots)
        save_plan(session.out, plan, capacity_per_s=capacity_per_s(answers, settings.slots))
    capacity: float = plan["capacity_per_s"]
    session.progress.note(f"capacity: about {capacity:.3g} requests/s")
    if settings.auto_load is None:
        return [settings.load_share * capacity]

    def measure(rate_per_s: float) -> float:
        session.progress.step(f"load search: FCFS at {rate_per_s:.3g} requests/s")
        # As long a run as the judged ones (a queue grows with time), with the training prompts.
        asked = [train[i % len(train)] for i in range(settings.requests)]
        arrivals = arrivals_of(settings, rate_per_s, repeat=0)
        asks = [Ask(item, t) for item, t in zip(asked, arrivals, strict=True)]
        ratio = _mean_normalized_latency_s(send(url, settings, asks, session.progress)) / unloaded
        session.progress.note(f"FCFS at {rate_per_s:.3g} requests/s: {ratio:.2f}x unloaded")
        return ratio

    rate, probes = find_rate(settings.auto_load, capacity, measure)
    save_plan(session.out, plan, probes=[[p.rate_per_s, p.ratio] for p in probes])
    return [rate]


def capacity_per_s(answers: Sequence[Answer], slots: int) -> float:
    """Return the requests per second that full slots serve, from a closed loop over `slots`."""
    # Slots over the mean time in a slot: the end, where slots run empty, counts for little.
    rows = [answer.row for answer in answers if answer.row.error is None]
    return slots * len(rows) / sum(row.finish_s - row.arrival_s for row in rows)


def _mean_normalized_latency_s(answers: Sequence[Answer]) -> float:
    rows = [answer.row for answer in answers]
    return run_metrics(rows, EngineCounts(0), unloaded_s_per_token=1.0).normalized_latency_s.mean


def arrivals_of(settings: BenchSettings, rate_per_s: float, repeat: int) -> tuple[float, ...]:
    """Return the arrivals of one repeat: the same for every system."""
    if settings.trace is None:
        return poisson_arrivals(rate_per_s, settings.requests, settings.seed * 1000 + repeat)
    trace = load_trace(settings.trace)
    return trace_window(trace, settings.requests, repeat * settings.requests, rate_per_s)
