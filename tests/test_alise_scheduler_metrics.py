"""The sidecar's metrics: what docs/metrics.md lists, and the sums over many jobs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from alise_scheduler.engine_state import EngineState, PolicySettings
from alise_scheduler.estimates import backlog_s
from alise_scheduler.events import Arrived, Progress
from alise_scheduler.metrics import Metrics
from prometheus_client import Counter, Gauge, Histogram
from scheduler_fakes import FakePredictor, prompt_input

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(alise_\w+)` \| (\w+) \|(.*?)\| (.+) \|$", re.MULTILINE)


def test_docs_list_exactly_the_registry() -> None:
    sidecar = DOCS.read_text().split("## Engine")[0]
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", re.sub(r": [^;]*$", "", labels))))
        for name, kind, labels, _ in ROW.findall(sidecar)
    }
    registered = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            suffix = "_total" if isinstance(metric, Counter) else ""
            registered[metric._name + suffix] = (metric._type, set(metric._labelnames))
    assert documented == registered


def test_many_waiting_jobs_are_priced_a_few_at_a_time() -> None:
    state = EngineState(FakePredictor(), PolicySettings())
    for number in range(1000):
        state.apply(Arrived(str(number), 1.0, prompt_input(50)))
    while state.has_work:
        state.advance()
    state.apply(Progress("0", 1, [7], is_running=True))
    one_s = backlog_s(state.table.jobs["1"], state.pricing.rates)
    metrics, turns = Metrics(), 0

    async def scenario() -> None:
        nonlocal turns
        showing = asyncio.create_task(metrics.show_engines([("e", state)], 1))
        while not showing.done():
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert turns >= 10
    value = metrics.registry.get_sample_value
    assert value("alise_jobs", {"state": "waiting"}) == 999
    assert value("alise_jobs", {"state": "running"}) == 1
    assert value("alise_backlog_seconds") == pytest.approx(999 * one_s)
