"""Where a status comes from: the engines' state, copied on the event loop that owns it.

The copying yields to the streams, is done only when somebody asks, and at most twice a second
however many ask; all that is worked out of the copies is worked out on the asker's thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from typing import Final

from alise_scheduler.engine_state import EngineState
from alise_scheduler.engines import Engines
from alise_scheduler.metrics import Metrics
from alise_scheduler.policy import Policy
from alise_scheduler.predictor import Predictor
from alise_scheduler.queue_view import JobFacts, Pace, facts_of
from alise_scheduler.shadow_runner import ShadowRunner
from alise_scheduler.status import EngineFacts, Facts, PredictorFacts, Status
from alise_scheduler.version import package_version

_FRESH_S: Final = 0.5
_PATIENCE_S: Final = 5.0
_JOBS_PER_TURN: Final = 100


class BusyError(Exception):
    """The event loop did not answer in time."""


@dataclass(slots=True)
class StatusSource:
    """Makes statuses for other threads than the event loop's."""

    loop: asyncio.AbstractEventLoop
    policy: Callable[[], Policy]
    engines: Engines
    predictor: Predictor
    metrics: Metrics
    shadow: ShadowRunner
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _newest: Status | None = None
    _made_s: float = 0.0

    def status(self) -> Status:
        """Return a status of at most half a second ago; raises `BusyError`."""
        with self._lock:
            if self._newest is None or time.monotonic() - self._made_s > _FRESH_S:
                copying = asyncio.run_coroutine_threadsafe(self._facts(), self.loop)
                try:
                    facts = copying.result(_PATIENCE_S)
                except futures.TimeoutError as error:
                    copying.cancel()
                    raise BusyError from error
                self._newest, self._made_s = Status.of(facts), time.monotonic()
            return self._newest

    async def _facts(self) -> Facts:
        predictor = self.predictor
        return Facts(
            version=package_version(),
            policy=self.policy().value,
            engines=[await self._engine(name, state) for name, state in self.engines],
            predictor=PredictorFacts(
                model_version=predictor.model_version,
                trained_unix_s=predictor.model_trained_unix_s,
                samples=predictor.sample_count,
                quality=predictor.quality(),
            ),
            finished=self.metrics.finished_jobs(),
            preemptions=self.metrics.preempted_jobs(),
            shadow=self.shadow.ratios,
        )

    async def _engine(self, engine_id: str, state: EngineState) -> EngineFacts:
        facts: list[JobFacts] = []
        for index, job in enumerate(list(state.table.jobs.values()), start=1):
            facts.append(facts_of(job))
            if index % _JOBS_PER_TURN == 0:
                await asyncio.sleep(0)
        return EngineFacts(
            engine_id=engine_id,
            model=state.introduction.model,
            is_connected=self.engines.is_connected(engine_id),
            pace=Pace(
                now_s=self.loop.time() + state.clock_ahead_s,
                slots=state.introduction.slots,
                rates=state.cost_model.rates(),
                mean_service_s=state.mean_service_s,
            ),
            pricing=state.pricing,
            cost=state.cost_model.cost,
            jobs=facts,
            ended_arrivals_s=[job.arrival_s for job in state.history],
        )
