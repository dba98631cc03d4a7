"""One engine's stream: reads its events, writes estimates, and yields to the other streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from alise_scheduler import protocol
from alise_scheduler.engine_state import EngineState, Update
from alise_scheduler.events import Event
from alise_scheduler.metrics import Metrics
from alise_scheduler.policy import Policy
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.wire import InvalidMessageError, StreamOrder, events_from, update_message

_log = logging.getLogger(__name__)

_EVENTS_PER_TURN: Final = 16
_IDLE_S: Final = protocol.HEARTBEAT_S  # also how soon a new model is noticed without events


@dataclass(slots=True, eq=False)
class Stream:
    """The two halves of a stream, which share nothing but the engine's state and a wake-up."""

    state: EngineState
    metrics: Metrics
    send: Callable[[pb.SidecarMessage], Awaitable[None]]
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _order: StreamOrder = field(default_factory=StreamOrder)
    _received_sequence: int = 0
    _sent_sequence: int = 0
    _sent_at_s: float = 0.0  # on the event loop's clock
    _is_half_closed: bool = False

    async def welcome(self, body: pb.Welcome) -> None:
        """Answer Hello."""
        await self._send(pb.SidecarMessage(welcome=body))

    async def run(self, first: pb.EngineMessage, rest: AsyncIterator[pb.EngineMessage]) -> None:
        """Serve until the engine closes its half and has been told all.

        Raises `InvalidMessageError` if it breaks the contract.
        """
        reader = asyncio.create_task(self._read(first, rest))
        writer = asyncio.create_task(self._write())
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
                self._is_half_closed = True
                self._wake.set()
            await writer
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, first: pb.EngineMessage, rest: AsyncIterator[pb.EngineMessage]) -> None:
        await self._take(first)
        async for message in rest:
            await self._take(message)

    async def _take(self, message: pb.EngineMessage) -> None:
        if message.sequence == 0:
            raise InvalidMessageError("EngineMessage.sequence is 0; the first is 1")
        if message.sequence <= self._received_sequence:
            self.metrics.events.labels("duplicate").inc(len(message.events))
            return
        self._received_sequence = message.sequence
        self._order.check(message)
        self.state.hear(message.sent_s, asyncio.get_running_loop().time())
        for index, event in enumerate(events_from(message), start=1):
            self._apply(event)
            if index % _EVENTS_PER_TURN == 0:
                self._wake.set()
                await asyncio.sleep(0)
        self.metrics.count_events(self.state.table.tally)
        self._wake.set()

    def _apply(self, event: Event) -> None:
        try:
            ended = self.state.apply(event)
        except Exception:  # one odd event must not end the stream, on which all others travel
            _log.exception("a %s event failed", type(event).__name__)
            self.metrics.events.labels("failed").inc()
            return
        if ended is not None:
            self.metrics.finished.labels(ended.event.reason.value).inc()

    async def _write(self) -> None:
        while True:
            update = self.state.advance()
            if update is not None:
                await self._send_update(update)
            elif asyncio.get_running_loop().time() - self._sent_at_s >= protocol.HEARTBEAT_S:
                await self._send(pb.SidecarMessage(update=pb.EstimateUpdate()))
            if self.state.has_work:
                await asyncio.sleep(0)
            elif self._is_half_closed:
                return
            elif update is None:
                await self._wait_for_work()

    async def _wait_for_work(self) -> None:
        # Not `wait_for`: before Python 3.12 it loses a cancellation that comes with the wake-up.
        waiter = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({waiter}, timeout=_IDLE_S)
        finally:
            waiter.cancel()
        self._wake.clear()

    async def _send_update(self, update: Update) -> None:
        await self._send(update_message(update))
        self.metrics.estimates_sent.inc(len(update.estimates))
        if self.state.settings.policy is Policy.BOOST:
            for estimate in update.estimates:
                self.metrics.boost_s.observe(estimate.boost_s)

    async def _send(self, message: pb.SidecarMessage) -> None:
        self._sent_sequence += 1
        message.sequence = self._sent_sequence
        await self.send(message)
        self._sent_at_s = asyncio.get_running_loop().time()
