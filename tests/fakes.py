"""Fakes shared by tests, named so."""

from __future__ import annotations

from typing import Any

from alise_engine.client import Costs, Estimate
from alise_engine.events import EngineEvent, Snapshot


class FakeClient:
    """Stands in for the stream: events gather in a list, estimates are put in by the test."""

    def __init__(self, *_: Any) -> None:
        self.events: list[EngineEvent] = []
        self.estimates: list[Estimate] = []
        self.costs = Costs(prefill_s_per_token=0.001, decode_s_per_token=0.05)
        self.is_down = False
        self.is_new = True
        self.starts_over = 0

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def down_for_s(self, now_s: float) -> float:
        return 1e9 if self.is_down else 0.0

    def start_over(self) -> None:
        self.starts_over += 1

    def wants_snapshot(self) -> bool:
        return self.is_new

    def send_snapshot(self, snapshot: Snapshot) -> None:
        self.is_new = False
        self.events.append(snapshot)

    def send(self, event: EngineEvent) -> None:
        if not self.is_new:
            self.events.append(event)

    def receive(self, limit: int) -> list[Estimate]:
        taken, self.estimates = self.estimates[:limit], self.estimates[limit:]
        return taken

    def of_type(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]
