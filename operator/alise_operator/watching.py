"""Runs the watches to their end, and tells an end that was asked for from one that was not.

kopf gives up as a whole when one of its watches fails for good, as when somebody removes an
optional API from the cluster under it, and may then wait without end for watches that it has itself
cancelled. A new process is what helps then. Knows neither what is watched nor who starts the
process again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

END_S: Final = 10.0
"""Watches that end have this long; kopf gives its handlers 5 s of it."""


class WatchesBrokeError(Exception):
    """The watches have failed, or do not come to their end."""


async def run_to_the_end(watch: Coroutine[Any, Any, None], is_ending: asyncio.Event) -> None:
    """Run `watch`, which sets `is_ending` once it ends; raises `WatchesBrokeError`.

    Watches that are not done `END_S` later are left to themselves.
    """
    # Before the watches: kopf waits for, and cancels, any task that is younger than its own.
    ending = asyncio.create_task(is_ending.wait())
    watching = asyncio.create_task(watch)
    try:
        await asyncio.wait((watching, ending), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((watching,), timeout=END_S)
        if not watching.done():
            raise WatchesBrokeError(f"they have not ended within {END_S:g} s")
        if error := watching.exception():
            raise WatchesBrokeError(repr(error)) from error
    finally:
        ending.cancel()
        watching.cancel()
