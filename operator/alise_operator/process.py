"""The operator's process: builds the parts, runs them together, and ends them in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import kopf
from lightkube import AsyncClient

from alise_operator.audit import Audit
from alise_operator.endpoints import endpoints
from alise_operator.handlers import configure, register
from alise_operator.kube import Kube, NotThereError, RefusedError, UnavailableError
from alise_operator.leadership import Leadership
from alise_operator.metrics import Metrics
from alise_operator.optional_apis import OptionalApis
from alise_operator.reconcile import Reconciler
from alise_operator.settings import Settings
from alise_operator.store import Key, Store
from alise_operator.watching import run_to_the_end
from alise_operator.work_queue import RetryLaterError, WorkQueue

_log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_DRAIN_S = 10.0
_FIRST_PAUSE_S = 0.5
_LAST_PAUSE_S = 15.0


class Operator:
    """All parts of one process."""

    def __init__(self, settings: Settings, client: AsyncClient) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.store = Store()
        self.kube = Kube(client, self.metrics)
        first = settings.namespaces[0] if settings.namespaces else None
        self.apis = OptionalApis(self.kube, first)
        self.leadership = Leadership(
            self.kube,
            settings.peering,
            settings.namespaces,
            settings.identity,
            settings.priority,
        )
        self.reconciler = Reconciler(
            self.kube, self.store, self.apis, settings.images, self.metrics
        )
        self.queue: WorkQueue[Key] = WorkQueue(self._work, self._failed)
        self.audit = Audit(
            self.kube,
            self.store,
            self.queue,
            self.leadership,
            self.metrics,
            settings.namespaces or (None,),
            self.apis.absent,
        )
        self.metrics.queued.set_function(lambda: len(self.queue))
        self.metrics.services.set_function(lambda: len(self.store.services()))
        self._is_stopping = asyncio.Event()
        self._is_ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_healthy(self) -> bool:
        """Whether watches deliver, and all that runs beside them still does."""
        return self.audit.is_healthy and not any(task.done() for task in self._tasks)

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT; raises `WatchesBrokeError`."""
        await self._prepare()
        self._start(self.queue.run(self.settings.workers), "the work queue")
        self._start(self._follow_apis(), "the look for optional APIs")
        self._start(self._audit(), "the audit")
        try:
            async with endpoints(
                self.settings.port, self.metrics, lambda: self.is_healthy, self._is_ready.is_set
            ):
                await self._watch()
        finally:
            await self._finish()

    async def _watch(self) -> None:
        registry, settings = kopf.OperatorRegistry(), kopf.OperatorSettings()
        is_cluster_wide = not self.settings.namespaces
        is_ending = asyncio.Event()
        configure(settings, is_cluster_wide=is_cluster_wide)
        register(registry, self.store, self.queue, is_ending)
        watch = kopf.operator(
            registry=registry,
            settings=settings,
            ready_flag=self._is_ready,
            clusterwide=is_cluster_wide,
            namespaces=self.settings.namespaces,
            standalone=self.settings.peering is None,
            peering_name=self.settings.peering,
            priority=self.settings.priority,
            identity=self.settings.identity,  # type: ignore[arg-type]
        )
        await run_to_the_end(watch, is_ending)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` until the operator ends; an end before that is a bug, and unhealthy."""

        def report(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                _log.error("%s has ended", name, exc_info=task.exception())

        task = asyncio.create_task(work)
        task.add_done_callback(report)
        self._tasks.append(task)

    async def _prepare(self) -> None:
        """Do what must be done before anything is watched, however long it takes to be possible.

        The API server may be away; rights and CRDs may come a little after the operator.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self.leadership.prepare()
                await self.apis.refresh()
            except (UnavailableError, RefusedError, NotThereError) as error:
                _log.warning("cannot start yet: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            else:
                self._log_apis()
                return

    async def _finish(self) -> None:
        """Let reconciles that run come to their end, then stop."""
        self._is_stopping.set()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until_idle(), _DRAIN_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _until_idle(self) -> None:
        while not self.queue.is_idle:
            await asyncio.sleep(0.05)

    async def _work(self, key: Key) -> None:
        if self._is_stopping.is_set():
            return
        if not await self.leadership.holds():
            self.metrics.reconciles.labels("skipped").inc()
            return  # whoever leads does it; all comes again should we lead one day
        with self.metrics.reconcile_s.time():
            try:
                await self.reconciler.reconcile(key)
            except RetryLaterError:
                self.metrics.reconciles.labels("retried").inc()
                raise
        self.metrics.reconciles.labels("done").inc()

    def _failed(self, key: Key, error: Exception) -> None:
        self.metrics.reconciles.labels("failed").inc()
        _log.error("reconcile of %s/%s failed", *key, exc_info=error)

    def _log_apis(self) -> None:
        names = sorted(kind.kind for kind in self.apis.absent)
        _log.info("optional APIs that are absent: %s", ", ".join(names) or "none")

    async def _follow_apis(self) -> None:
        while True:
            await asyncio.sleep(self.settings.discovery_s)
            if await self.apis.refresh():
                self._log_apis()
                for kind in self.apis.absent:
                    self.store.drop_kind(kind)
                for key in self.store.services():
                    self.queue.add(key)

    async def _audit(self) -> None:
        while True:
            await asyncio.sleep(self.settings.audit_s)
            await self.audit.run_once()


async def run(settings: Settings) -> None:
    """Run an operator until it is told to stop; raises `WatchesBrokeError`."""
    client = AsyncClient(timeout=httpx.Timeout(_TIMEOUT_S))
    try:
        await Operator(settings, client).run()
    finally:
        await client.aclose()
