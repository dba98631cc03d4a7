"""The watches' end: as asked for, broken, or never coming."""

from __future__ import annotations

import asyncio

import pytest
from alise_operator import watching
from alise_operator.watching import WatchesBrokeError, run_to_the_end


def run(watch, is_ending: asyncio.Event) -> None:
    asyncio.run(asyncio.wait_for(run_to_the_end(watch, is_ending), 10))


def test_an_end_without_an_error_is_one_that_was_asked_for() -> None:
    is_ending = asyncio.Event()

    async def watch() -> None:
        is_ending.set()
        await asyncio.sleep(0.01)

    run(watch(), is_ending)


def test_an_error_breaks_the_watches() -> None:
    async def watch() -> None:
        raise LookupError("404")

    with pytest.raises(WatchesBrokeError, match="404"):
        run(watch(), asyncio.Event())


def test_watches_that_do_not_end_are_left_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "END_S", 0.05)
    is_ending = asyncio.Event()

    async def watch() -> None:
        is_ending.set()
        await asyncio.Event().wait()

    with pytest.raises(WatchesBrokeError, match="not ended"):
        run(watch(), is_ending)
