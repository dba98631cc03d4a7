"""Feeds the engines' shadows, on a thread of its own and with little of a core's time.

The event loop only hands over jobs that have ended; the thread computes for a millisecond at a
time and then sleeps, so that a stream's next event never waits for it longer than that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from alise_scheduler.engine_state import EngineState
from alise_scheduler.history import PastJob
from alise_scheduler.replica import Hardware
from alise_scheduler.shadow import Ratios, Shadow, ratios

_log = logging.getLogger(__name__)

_PERIOD_S: Final = 1.0
_PIECE_S: Final = 0.001
_PAUSE_S: Final = 0.02  # after each piece: 5% of one core at most
_MAX_BATCHED_TOKENS: Final = 2048  # vLLM's default, for an engine that does not tell


@dataclass(frozen=True, slots=True)
class Feed:
    """What one engine's shadow is told at once."""

    engine_id: str
    ended: Sequence[PastJob]
    horizon_s: float
    hardware: Hardware | None
    """None while it is not known."""


def feed_of(engine_id: str, state: EngineState) -> Feed:
    """Take what is new for an engine's shadow out of its state."""
    told, cost = state.introduction, state.cost_model
    hardware = None
    if told.slots and told.kv_tokens and cost.is_fitted:
        hardware = Hardware(
            step=cost.cost,
            slots=told.slots,
            kv_tokens=told.kv_tokens,
            block_tokens=max(told.block_tokens, 1),
            batched_tokens=told.batched_tokens or _MAX_BATCHED_TOKENS,
        )
    live_s = (job.arrival_s for job in state.table.jobs.values())
    # Every job that arrived before its newest message has been heard of.
    return Feed(engine_id, state.take_ended(), min(live_s, default=state.heard_s), hardware)


@dataclass(slots=True, eq=False)
class ShadowRunner:
    """The shadows by engine, and the thread that runs them."""

    ratios: Ratios | None = None
    """Over all engines; replaced, never changed."""
    _shadows: dict[str, Shadow] = field(default_factory=dict)
    _feeds: list[Feed] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, in the midst of whatever it computes."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def feed(self, engines: Iterable[tuple[str, EngineState]]) -> None:
        """Hand over what has ended since the last call; some microseconds. From the event loop."""
        feeds = [feed_of(engine_id, state) for engine_id, state in engines]
        with self._lock:
            self._feeds = feeds if not self._feeds else _merged(self._feeds, feeds)

    def _run(self) -> None:
        while not self._stopping.wait(_PERIOD_S):
            with self._lock:
                feeds, self._feeds = self._feeds, []
            names = {feed.engine_id for feed in feeds}
            for gone in self._shadows.keys() - names if feeds else ():
                del self._shadows[gone]
            for feed in feeds:
                try:
                    self._advance(feed)
                except Exception:  # a comparison must not end with one odd job
                    _log.exception("the shadow of engine %s starts over", feed.engine_id)
                    self._shadows[feed.engine_id] = Shadow()
            pairs = [pair for shadow in self._shadows.values() for pair in shadow.pairs]
            self.ratios = ratios(pairs)

    def _advance(self, feed: Feed) -> None:
        shadow = self._shadows.setdefault(feed.engine_id, Shadow())
        for job in feed.ended:
            shadow.add(job)
        if feed.hardware is not None:
            shadow.advance(feed.horizon_s, feed.hardware, _Pace(self._stopping))


class _Pace:
    """Sleeps after each millisecond of work."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._until_s = time.monotonic() + _PIECE_S

    def __call__(self) -> bool:
        if time.monotonic() >= self._until_s:
            if self._stopping.wait(_PAUSE_S):
                return False
            self._until_s = time.monotonic() + _PIECE_S
        return True


def _merged(older: Sequence[Feed], newer: Sequence[Feed]) -> list[Feed]:
    ended = {feed.engine_id: feed.ended for feed in older}
    return [
        Feed(f.engine_id, [*ended.get(f.engine_id, ()), *f.ended], f.horizon_s, f.hardware)
        for f in newer
    ]
