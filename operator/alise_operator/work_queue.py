"""A queue of keys to work on: each at most once at a time, retried with growing pauses.

Knows nothing of Kubernetes. A key that is added while it is worked on is worked on again.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)

FIRST_PAUSE_S: Final = 0.5
LAST_PAUSE_S: Final = 120.0


class RetryLaterError(Exception):
    """The work is not done: try the key again, not before `after_s` seconds."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


@dataclass(slots=True)
class WorkQueue(Generic[KeyT]):
    """Lives on one event loop."""

    work: Callable[[KeyT], Awaitable[None]]
    """Raises `RetryLaterError`; anything else that it raises goes to `on_error`, and is retried."""
    on_error: Callable[[KeyT, Exception], None]
    _ready: deque[KeyT] = field(default_factory=deque)
    _queued: set[KeyT] = field(default_factory=set)
    _active: set[KeyT] = field(default_factory=set)
    _timers: dict[KeyT, asyncio.TimerHandle] = field(default_factory=dict)
    _failures: dict[KeyT, int] = field(default_factory=dict)
    _wake: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def add(self, key: KeyT) -> None:
        """Work on `key` soon; a pending retry of it comes forward."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key not in self._queued:
            self._queued.add(key)
            if key not in self._active:
                self._put(key)

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or worked on; retries may be pending."""
        return not self._queued and not self._active

    async def run(self, workers: int) -> None:
        """Work until cancelled."""
        tasks = [asyncio.create_task(self._worker()) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    async def _worker(self) -> None:
        while True:
            await self._wake.acquire()
            key = self._ready.popleft()
            self._queued.discard(key)
            self._active.add(key)
            try:
                await self.work(key)
                self._failures.pop(key, None)
            except RetryLaterError as error:
                self._retry(key, error.after_s)
            except Exception as error:  # one bad key must not stop the others
                self.on_error(key, error)
                self._retry(key, 0.0)
            finally:
                self._active.discard(key)
                if key in self._queued:
                    self._put(key)

    def _put(self, key: KeyT) -> None:
        self._ready.append(key)
        self._wake.release()

    def _retry(self, key: KeyT, at_least_s: float) -> None:
        if key in self._queued:
            return  # there is news of it already
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** min(failures, 20), LAST_PAUSE_S)
        pause_s = max(pause_s, at_least_s) * random.uniform(1.0, 1.2)  # noqa: S311 # spreads load
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(pause_s, self._due, key)

    def _due(self, key: KeyT) -> None:
        self._timers.pop(key, None)
        self.add(key)
