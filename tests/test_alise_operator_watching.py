"""Watches that break are started again; a signal ends them, however they take it."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from alise_operator import watching
from alise_operator.watching import Course, watch_until_stopped


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FIRST_PAUSE_S", 0.01)


def test_watches_that_break_are_started_again_after_catching_up() -> None:
    happened: list[str] = []

    async def watch(course: Course) -> None:
        happened.append("watch")
        course.has_begun.set()
        if happened.count("watch") < 3:
            raise LookupError("404")
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await course.stop.wait()

    async def catch_up() -> None:
        happened.append("catch up")

    async def scenario() -> bool:
        is_ready = asyncio.Event()
        await asyncio.wait_for(watch_until_stopped(watch, is_ready, catch_up), 10)
        return is_ready.is_set()

    assert asyncio.run(scenario())
    assert happened == ["watch", "catch up", "watch", "catch up", "watch"]


def test_an_error_after_the_signal_is_an_end() -> None:
    started = []

    async def watch(course: Course) -> None:
        started.append(1)
        course.has_begun.set()
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        await course.stop.wait()
        raise ConnectionError("closed")

    async def catch_up() -> None:
        pytest.fail("nothing is to be caught up with")

    async def scenario() -> None:
        await asyncio.wait_for(watch_until_stopped(watch, asyncio.Event(), catch_up), 10)

    asyncio.run(scenario())
    assert started == [1]


def test_a_signal_during_the_pause_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FIRST_PAUSE_S", 60.0)

    async def watch(course: Course) -> None:
        course.has_begun.set()
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
        raise LookupError("404")

    async def catch_up() -> None:
        pytest.fail("nothing is to be caught up with")

    async def scenario() -> None:
        await asyncio.wait_for(watch_until_stopped(watch, asyncio.Event(), catch_up), 10)

    asyncio.run(scenario())


def test_watches_that_never_end_are_left_to_themselves_and_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "END_S", 0.05)
    happened: list[str] = []

    async def watch(course: Course) -> None:
        happened.append("watch")
        course.has_begun.set()
        if happened.count("watch") == 1:
            course.is_ending.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await course.stop.wait()

    async def catch_up() -> None:
        happened.append("catch up")

    async def scenario() -> None:
        await asyncio.wait_for(watch_until_stopped(watch, asyncio.Event(), catch_up), 10)

    asyncio.run(scenario())
    assert happened == ["watch", "catch up", "watch"]
