"""Feeds the engines' shadows, on a thread of its own and with little of a core's time.

The event loop only hands over jobs that have ended; the thread computes for a millisecond at a
time and then sleeps, so that a stream's next event never waits for it longer than that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from alise_scheduler.cost_model import CostModel
from alise_scheduler.engine_state import EngineState, Introduction
from alise_scheduler.events import StepTiming
from alise_scheduler.history import HISTORY_STEPS, PastJob
from alise_scheduler.replica import Hardware
from alise_scheduler.shadow import Ratios, Shadow, ratios

_log = logging.getLogger(__name__)

_PERIOD_S: Final = 1.0
_PIECE_S: Final = 0.001
_PAUSE_S: Final = 0.02  # after each piece: 5% of one core at most
_REFIT_STEPS: Final = 128
_MAX_BATCHED_TOKENS: Final = 2048  # vLLM's default, for an engine that does not tell


@dataclass(frozen=True, slots=True)
class Feed:
    """What one engine's shadow is told at once."""

    engine_id: str
    ended: Sequence[PastJob]
    steps: Sequence[StepTiming]
    horizon_s: float
    engine: Introduction


def feed_of(engine_id: str, state: EngineState) -> Feed:
    """Take what is new for an engine's shadow out of its state."""
    live_s = (job.arrival_s for job in state.table.jobs.values())
    # Every job that arrived before its newest message has been heard of.
    horizon_s = min(live_s, default=state.heard_s)
    return Feed(engine_id, *state.take_past(), horizon_s, state.introduction)


@dataclass(slots=True, eq=False)
class EngineShadow:
    """One engine's shadow, and what a step costs that engine.

    Fitted to many more steps than the serving cost model: under a steady load, a few hundred of
    them do not tell the cost of a step from that of a job in it, and another order runs others.
    """

    shadow: Shadow = field(default_factory=Shadow)
    cost: CostModel = field(
        default_factory=lambda: CostModel(window_steps=HISTORY_STEPS, refit_steps=_REFIT_STEPS)
    )
    has_drafts: bool = False
    """The engine decodes speculatively: its model, one token a step, says nothing of it."""

    def advance(self, feed: Feed, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Take in what is new, and run as far as is known."""
        self.has_drafts = self.has_drafts or any(step.decoded_tokens for step in feed.steps)
        if self.has_drafts:
            self.shadow = Shadow()
            return
        for job in feed.ended:
            self.shadow.add(job)
        for step in feed.steps:
            self.cost.observe(step)
        told = feed.engine
        if told.slots and told.kv_tokens and self.cost.is_fitted:
            hardware = Hardware(
                step=self.cost.cost,
                slots=told.slots,
                kv_tokens=told.kv_tokens,
                block_tokens=max(told.block_tokens, 1),
                batched_tokens=told.batched_tokens or _MAX_BATCHED_TOKENS,
            )
            self.shadow.advance(feed.horizon_s, hardware, may_go_on)


@dataclass(slots=True, eq=False)
class ShadowRunner:
    """The shadows by engine, and the thread that runs them."""

    ratios: Ratios | None = None
    """Over all engines; replaced, never changed."""
    _shadows: dict[str, EngineShadow] = field(default_factory=dict)
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
                    one = self._shadows.setdefault(feed.engine_id, EngineShadow())
                    one.advance(feed, _Pace(self._stopping))
                except Exception:  # a comparison must not end with one odd job
                    _log.exception("the shadow of engine %s starts over", feed.engine_id)
                    self._shadows[feed.engine_id] = EngineShadow()
            pairs = [pair for one in self._shadows.values() for pair in one.shadow.pairs]
            self.ratios = ratios(pairs)


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
    """Keep what the thread has not fetched: it was busy for longer than a period."""
    by_id = {feed.engine_id: feed for feed in older}
    return [_after(by_id.get(feed.engine_id), feed) for feed in newer]


def _after(older: Feed | None, newer: Feed) -> Feed:
    if older is None:
        return newer
    ended = [*older.ended, *newer.ended]
    return replace(newer, ended=ended, steps=[*older.steps, *newer.steps][-HISTORY_STEPS:])
