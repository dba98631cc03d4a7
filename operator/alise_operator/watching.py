"""Keeps the watches running until the process is told to end, and starts them again if they break.

kopf gives up as a whole when one of its watches fails for good, as when somebody removes an
optional API from the cluster under it. Knows neither what is watched nor what is done about it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeAlias

Watch: TypeAlias = Callable[[asyncio.Event, asyncio.Event], Awaitable[None]]
"""Watches until the second event is set; sets the first one when it has begun."""

_log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 60.0
_STABLE_S: Final = 60.0
"""Watches that lasted this long are started again at once."""


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
        has_begun = asyncio.Event()
        taking_over = asyncio.create_task(_take_over(has_begun, is_ready, stop))
        started_s = loop.time()
        try:
            await watch(has_begun, stop)
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


async def _take_over(
    has_begun: asyncio.Event, is_ready: asyncio.Event, stop: asyncio.Event
) -> None:
    """Take the signals over from kopf: of itself it does not tell whether one has ended it."""
    await has_begun.wait()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    is_ready.set()
