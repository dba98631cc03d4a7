"""Keeps the watches running until the process is told to end, and starts them again if they break.

kopf gives up as a whole when one of its watches fails for good, as when somebody removes an
optional API from the cluster under it, and may then wait without end for watches that it has itself
cancelled. Knows neither what is watched nor what is done about it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypeAlias


@dataclass(frozen=True, slots=True)
class Course:
    """How far watches are; all but `stop` is for the watches to set."""

    stop: asyncio.Event
    """They are to end."""
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    is_ending: asyncio.Event = field(default_factory=asyncio.Event)
    """They end, whether told to or because they broke."""


Watch: TypeAlias = Callable[[Course], Awaitable[None]]
"""Watches until it is told to stop, or raises what broke it."""

_log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 60.0
_STABLE_S: Final = 60.0
"""Watches that lasted this long are started again at once."""
END_S: Final = 10.0
"""Watches that end have this long; kopf gives its handlers 5 s of it."""


async def watch_until_stopped(
    watch: Watch, is_ready: asyncio.Event, catch_up: Callable[[], Awaitable[object]]
) -> None:
    """Run `watch` until SIGTERM or SIGINT; sets `is_ready` when it has begun.

    `catch_up` finds out what happened while nothing was watched, before the watches start again.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    pause_s = FIRST_PAUSE_S
    while True:
        course = Course(stop)
        taking_over = asyncio.create_task(_take_over(course, is_ready))
        started_s = loop.time()
        try:
            await _run_to_its_end(watch, course)
        except Exception as error:
            if stop.is_set():
                _log.warning("the watches did not end cleanly: %r", error)
                return
            # Without a traceback: kopf has written its own.
            _log.error("the watches broke, and are started again: %r", error)
        else:
            return
        finally:
            taking_over.cancel()
        pause_s = FIRST_PAUSE_S if loop.time() - started_s > _STABLE_S else pause_s
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), pause_s)
            return
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        await catch_up()


async def _run_to_its_end(watch: Watch, course: Course) -> None:
    """Run `watch`, and leave it to itself if it does not come to its end in `END_S`."""
    # Before the watches: kopf waits for, and cancels, any task that is younger than its own.
    ending = asyncio.create_task(course.is_ending.wait())
    running = asyncio.ensure_future(watch(course))
    try:
        await asyncio.wait((running, ending), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((running,), timeout=END_S)
        if not running.done():
            raise TimeoutError(f"they have not ended within {END_S:g} s")
        await running
    finally:
        ending.cancel()
        running.cancel()


async def _take_over(course: Course, is_ready: asyncio.Event) -> None:
    """Take the signals over from kopf: of itself it does not tell whether one has ended it."""
    await course.has_begun.wait()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, course.stop.set)
    is_ready.set()
