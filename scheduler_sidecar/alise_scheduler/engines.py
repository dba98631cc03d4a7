"""The engines that the sidecar serves, by id, with a grace period for those that went away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from alise_scheduler.engine_state import EngineState
from alise_scheduler.protocol import MAX_ENGINES

_log = logging.getLogger(__name__)


class TooManyEnginesError(Exception):
    """More engines than `MAX_ENGINES` are connected or in their grace period."""


@dataclass(slots=True, eq=False)
class Connection:
    """One stream of one engine."""

    engine_id: str
    state: EngineState
    replaced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the same engine has opened another stream."""


@dataclass(slots=True)
class Engines:
    """Engine states by id. Lives on one event loop."""

    new_state: Callable[[], EngineState]
    grace_s: float
    _states: dict[str, EngineState] = field(default_factory=dict)
    _connections: dict[str, Connection] = field(default_factory=dict)
    _expiries: dict[str, asyncio.TimerHandle] = field(default_factory=dict)

    def connect(self, engine_id: str) -> Connection:
        """Open a stream: an engine that returns in time finds its jobs again.

        The newest stream of an engine wins. Raises `TooManyEnginesError`.
        """
        if engine_id not in self._states:
            if len(self._states) >= MAX_ENGINES:
                raise TooManyEnginesError
            self._states[engine_id] = self.new_state()
        if expiry := self._expiries.pop(engine_id, None):
            expiry.cancel()
        if older := self._connections.get(engine_id):
            older.replaced.set()
        connection = Connection(engine_id, self._states[engine_id])
        self._connections[engine_id] = connection
        connection.state.connect()
        return connection

    def disconnect(self, connection: Connection) -> None:
        """Note the end of a stream; its jobs are kept for the grace period."""
        engine_id = connection.engine_id
        if self._connections.get(engine_id) is not connection:
            return
        del self._connections[engine_id]
        loop = asyncio.get_running_loop()
        self._expiries[engine_id] = loop.call_later(self.grace_s, self._expire, engine_id)

    @property
    def connected(self) -> int:
        """Number of open streams."""
        return len(self._connections)

    def is_connected(self, engine_id: str) -> bool:
        """Whether the engine has an open stream."""
        return engine_id in self._connections

    def __iter__(self) -> Iterator[tuple[str, EngineState]]:
        return iter(list(self._states.items()))

    def _expire(self, engine_id: str) -> None:
        self._expiries.pop(engine_id, None)
        state = self._states.pop(engine_id)
        jobs = len(state.table.jobs)
        _log.info("engine %s stayed away for %g s: %d jobs dropped", engine_id, self.grace_s, jobs)
