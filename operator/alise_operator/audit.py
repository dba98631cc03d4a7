"""Looks for changes that no watch told of: repairs them, and tells when watches are dead.

A watch can freeze without an error, and kopf does not see deletions that happen while it
reconnects. So now and then everything is listed, in pages, and compared with what is known.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any, Final

from alise_operator.kube import Kube, NotThereError, RefusedError, UnavailableError
from alise_operator.leadership import Leadership
from alise_operator.manifests.kinds import ALISE_SERVICE, KINDS, POD, Kind
from alise_operator.metrics import Metrics
from alise_operator.store import Key, ObjectName, Store, object_name, owner_key, version_of
from alise_operator.work_queue import WorkQueue

_log = logging.getLogger(__name__)

_GRACE_S: Final = 5.0
"""A watch may tell of a change this much later than a list."""
_DEAD_AFTER: Final = 2
"""Audits in a row that find missed changes."""


@dataclass(slots=True)
class Audit:
    """Compares the cluster with the store."""

    kube: Kube
    store: Store
    queue: WorkQueue[Key]
    leadership: Leadership
    metrics: Metrics
    namespaces: tuple[str | None, ...]
    """Namespaces to look at; (None,): all."""
    absent: set[Kind]
    """Kinds that the cluster lacks; followed, as it changes."""
    grace_s: float = _GRACE_S
    _bad_in_a_row: int = field(default=0)

    @property
    def is_healthy(self) -> bool:
        """Whether watches deliver; false after audits in a row that found missed changes."""
        return self._bad_in_a_row < _DEAD_AFTER

    async def run_once(self) -> int:
        """Compare everything once; returns the number of changes that were missed."""
        if not await self.leadership.holds():
            return 0
        missed = 0
        for kind in (ALISE_SERVICE, POD, *KINDS):
            if kind in self.absent:
                continue
            try:
                missed += await self._compare(kind)
            except (UnavailableError, RefusedError, NotThereError) as error:
                _log.warning("not audited: %s: %s", kind.kind, error)
        self._bad_in_a_row = self._bad_in_a_row + 1 if missed else 0
        return missed

    async def _compare(self, kind: Kind) -> int:
        before = self.store.versions(kind)
        listed: set[ObjectName] = set()
        newer: list[dict[str, Any]] = []
        for namespace in self.namespaces:
            async for body in self.kube.list(kind, namespace):
                name = object_name(kind, body)
                listed.add(name)
                if version_of(body) > before.get(name, 0):
                    newer.append(body)
        gone = before.keys() - listed
        if not newer and not gone:
            return 0
        await asyncio.sleep(self.grace_s)
        now = self.store.versions(kind)
        missed = [b for b in newer if now.get(object_name(kind, b), 0) < version_of(b)]
        lost = [name for name in gone if now.get(name) == before[name]]
        count = sum([self._take_in(kind, body) for body in missed])
        count += sum([self._let_go(name) for name in lost])
        if count:
            _log.error("%d changes of %s were missed", count, kind.kind)
            self.metrics.missed_events.labels(kind.kind).inc(count)
        return count

    def _take_in(self, kind: Kind, body: dict[str, Any]) -> bool:
        key = owner_key(kind, body)
        if key is None:
            return False
        self.store.put(kind, body)
        self.queue.add(key)
        return True

    def _let_go(self, name: ObjectName) -> bool:
        key = self.store.drop(name)
        if key is not None:
            self.queue.add(key)
        return key is not None
