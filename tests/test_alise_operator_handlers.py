"""kopf's part: what is registered, and what its events do."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

pytest.importorskip("kopf", reason="needs the extra 'operator'")

import kopf
from alise_operator.handlers import configure, register
from alise_operator.manifests.kinds import ALISE_SERVICE, KINDS, POD
from alise_operator.store import Key, Store
from alise_operator.work_queue import WorkQueue
from operator_fixtures import service_body

KEY = Key("default", "qwen")


def registered() -> tuple[Any, Store, WorkQueue[Key]]:
    async def work(_: Key) -> None:
        """Nothing is run here."""

    registry, store = kopf.OperatorRegistry(), Store()
    queue: WorkQueue[Key] = WorkQueue(work, lambda *_: None)
    register(registry, store, queue, asyncio.Event())
    return registry, store, queue


def handlers(registry: Any) -> list[Any]:
    return [*registry._indexing.get_all_handlers(), *registry._watching.get_all_handlers()]


def test_handlers_run_on_the_event_loop() -> None:
    # kopf runs plain functions in threads: store and queue would be changed while they are read.
    registry, _, _ = registered()
    assert all(inspect.iscoroutinefunction(handler.fn) for handler in handlers(registry))


def test_nothing_is_registered_that_needs_finalizers_or_annotations() -> None:
    registry, _, _ = registered()
    assert len(handlers(registry)) == 2 * len((ALISE_SERVICE, POD, *KINDS))
    assert not list(registry._changing.get_all_handlers())
    assert not list(registry._spawning.get_all_handlers())


def test_only_our_own_objects_are_watched() -> None:
    settings = kopf.OperatorSettings()
    configure(settings, is_cluster_wide=True)
    selectors = settings.watching.label_selectors
    assert set(selectors.values()) == {"app.kubernetes.io/managed-by=alise-operator"}
    assert len(selectors) == len((POD, *KINDS))  # the user's ALISEServices have no such label


def test_events_fill_the_store_and_the_queue() -> None:
    async def scenario() -> None:
        registry, store, queue = registered()
        body = service_body()
        body["metadata"] |= {"uid": "u", "resourceVersion": "3"}
        (remember,) = [h.fn for h in handlers(registry) if h.id == "store-aliseservices"]
        (enqueue,) = [h.fn for h in handlers(registry) if h.id == "queue-aliseservices"]
        await remember(body=body)
        await enqueue(type="ADDED", body=body)
        assert store.services() == [KEY]
        assert len(queue) == 1
        await enqueue(type="DELETED", body=body)
        assert store.services() == []

    asyncio.run(scenario())
