"""kopf's part: watches feed the store, and say which service to look at again.

Only event handlers and index functions are registered. Those need neither finalizers nor
annotations on any object, so that a dead operator blocks no deletion and a live one writes nothing
that the user did not ask for.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import kopf

from alise_operator.manifests.kinds import ALISE_SERVICE, KINDS, POD, Kind
from alise_operator.manifests.service_view import MANAGED_BY, MANAGER
from alise_operator.store import Key, Store, object_name, owner_key
from alise_operator.work_queue import WorkQueue

_OURS: Final = f"{MANAGED_BY}={MANAGER}"
_CONNECT_TIMEOUT_S: Final = 10.0
_REQUEST_TIMEOUT_S: Final = 30.0


def register(
    registry: kopf.OperatorRegistry,
    store: Store,
    queue: WorkQueue[Key],
    is_ending: asyncio.Event,
) -> None:
    """Register the watches of services, children and pods, and how kopf finds the cluster.

    `is_ending` is set when kopf ends, of itself or because one of its watches broke.
    """

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        # In the order in which lightkube looks.
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.cleanup(registry=registry)
    async def note_the_end(**_: Any) -> None:
        is_ending.set()

    for kind in (ALISE_SERVICE, POD, *KINDS):
        _watch(registry, kind, store, queue)


def configure(settings: kopf.OperatorSettings, *, is_cluster_wide: bool) -> None:
    """Set kopf up: bounded requests, watches of our own objects only, no events of its own."""
    settings.networking.connect_timeout = _CONNECT_TIMEOUT_S
    settings.networking.request_timeout = _REQUEST_TIMEOUT_S
    settings.watching.connect_timeout = _CONNECT_TIMEOUT_S
    settings.posting.enabled = False
    settings.scanning.disabled = not is_cluster_wide
    for kind in (POD, *KINDS):
        settings.watching.label_selectors[_selector(kind)] = _OURS


def _selector(kind: Kind) -> tuple[str, str, str]:
    return kind.group, kind.version, kind.plural


def _watch(
    registry: kopf.OperatorRegistry, kind: Kind, store: Store, queue: WorkQueue[Key]
) -> None:
    where = _selector(kind)

    # Coroutines, though they wait for nothing: kopf runs plain functions in threads, and store and
    # queue live on the event loop.
    # kopf calls index functions for all objects before it calls any handler. So when the first
    # reconcile runs after a start, everything is known: status does not flicker.
    @kopf.index(*where, registry=registry, id=f"store-{kind.plural}")
    async def remember(body: kopf.Body, **_: Any) -> None:
        store.put(kind, body)

    @kopf.on.event(*where, registry=registry, id=f"queue-{kind.plural}")
    async def enqueue(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002 # kopf's name
        if type == "DELETED":
            store.drop(object_name(kind, body), body["metadata"]["uid"])
        if key := owner_key(kind, body):
            queue.add(key)
