"""The one reconcile: from what a service wants and what there is, to what there should be.

Level-based and idempotent: it may run at any time, be killed anywhere, and run again. Knows nothing
of kopf or of watches; whoever calls it says only which service may have changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Final

from pydantic import ValidationError

from alise_operator.api.service import ALISEServiceSpec
from alise_operator.events import event_body
from alise_operator.images import DefaultImages, resolve_images
from alise_operator.kube import (
    Kube,
    NotThereError,
    RefusedError,
    UnavailableError,
)
from alise_operator.manifests.kinds import ALISE_SERVICE, WORKLOADS, Kind, Manifest, kind_of
from alise_operator.manifests.render import render
from alise_operator.manifests.service_view import ServiceView
from alise_operator.metrics import Metrics
from alise_operator.optional_apis import OptionalApis
from alise_operator.plan import APPLIED, Child, digest, keeps_pods, plan
from alise_operator.status.conditions import SCALED_TO_ZERO
from alise_operator.status.observation import Observation, WorkloadState, workload_state
from alise_operator.status.status import (
    Announcement,
    Status,
    announcements,
    images_status,
    invalid_status,
    service_status,
)
from alise_operator.store import Key, Store
from alise_operator.work_queue import RetryLaterError

_log = logging.getLogger(__name__)

_REFUSED_AGAIN_S: Final = 60.0
"""What the API server refused may be allowed later, by a quota or a role."""


def utc_now() -> str:
    """Return the time as Kubernetes writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(slots=True)
class Reconciler:
    """Reconciles one service at a time per key; different keys may run at once."""

    kube: Kube
    store: Store
    apis: OptionalApis
    images: DefaultImages
    metrics: Metrics
    now: Callable[[], str] = utc_now
    # What the API server keeps in another form than it was given: not to be applied for ever.
    _settled: dict[tuple[Key, Kind, str], tuple[str, str]] = field(default_factory=dict)

    async def reconcile(self, key: Key) -> None:
        """Bring the children and the status of a service to where they should be.

        Raises `RetryLaterError` if that has to be continued later.
        """
        body = self.store.service(key)
        if body is None or "deletionTimestamp" in body["metadata"]:
            self._forget(key)
            return  # its children go with it: they are owned
        try:
            await self._reconcile(key, body)
        except NotThereError as error:
            # The service or its namespace goes away; if not, a retry finds out.
            raise RetryLaterError(str(error), after_s=5.0) from error
        except UnavailableError as error:
            _log.warning("retried: %s", error, extra=_named(key))
            raise RetryLaterError(str(error), after_s=error.after_s) from error
        except RefusedError as error:  # not a child, which is reported, but the status itself
            _log.error("refused: %s", error, extra=_named(key))
            raise RetryLaterError(str(error), after_s=_REFUSED_AGAIN_S) from error

    async def _reconcile(self, key: Key, body: dict[str, Any]) -> None:
        previous: Status = body.get("status") or {}
        generation: int = body["metadata"]["generation"]
        try:
            spec = ALISEServiceSpec.model_validate(body["spec"])
        except ValidationError as error:
            seen = Observation(generation, self._workload(key, WORKLOADS), self.store.pods(key))
            status = invalid_status(_readable(error), seen, previous, self.now())
            await self._publish(key, body, previous, status)
            return
        images = resolve_images(spec, previous.get("resolvedImages") or {}, self.images)
        metadata = body["metadata"]
        service = ServiceView(key.name, key.namespace, metadata["uid"], spec, images)
        if not keeps_pods(service, self.store.children(key)):
            # A new template may need what only new images have: they come together.
            images = resolve_images(spec, {}, self.images)
            service = replace(service, images=images)
        if previous.get("resolvedImages") != images_status(images) and not spec.paused:
            # Pinned before they are used: a killed operator's successor may have other defaults.
            status = {**previous, "resolvedImages": images_status(images)}
            body = await self._write_status(body, status)
            previous = body.get("status") or {}
        rendered = render(service, self.apis.absent)
        refused = [] if spec.paused else await self._carry_out(key, service, rendered.manifests)
        seen = Observation(
            generation=generation,
            workload=self._workload(key, map(kind_of, rendered.manifests)),
            pods=self.store.pods(key),
            missing=rendered.missing,
            refused=tuple(refused),
        )
        status = service_status(service, seen, previous, self.now())
        await self._publish(key, body, previous, status)
        if refused:
            raise RetryLaterError(refused[0], after_s=_REFUSED_AGAIN_S)

    async def _carry_out(
        self, key: Key, service: ServiceView, manifests: tuple[Manifest, ...]
    ) -> list[str]:
        """Apply and delete what differs; returns what the API server refused."""
        live = self.store.children(key)
        todo = plan(service, manifests, live)
        refused: list[str] = []
        unavailable: UnavailableError | None = None
        found = {(child.kind, child.name): child for child in live}
        for manifest in todo.apply:
            known = found.get((kind_of(manifest), manifest["metadata"]["name"]))
            try:
                await self._apply(key, service, manifest, known)
            except RefusedError as error:
                refused.append(str(error))
            except UnavailableError as error:
                if not error.others_may_succeed:
                    raise
                unavailable = error
        if unavailable is not None:
            raise unavailable
        for child in todo.delete:
            _log.info("deleting %s %s", child.kind.kind, child.name, extra=_named(key))
            try:
                await self.kube.delete(child.kind, key.namespace, child.name)
            except RefusedError as error:
                refused.append(str(error))
        return refused

    async def _apply(
        self, key: Key, service: ServiceView, manifest: Manifest, known: Child | None
    ) -> None:
        kind, name = kind_of(manifest), manifest["metadata"]["name"]
        wanted = manifest["metadata"]["annotations"][APPLIED]
        if known is None:
            await self._refuse_foreign(kind, key, name, service.uid)
        elif self._settled.get((key, kind, name)) == (wanted, _fingerprint(known.body)):
            return
        _log.info("applying %s %s", kind.kind, name, extra=_named(key))
        try:
            answer = await self.kube.apply(kind, manifest)
        except NotThereError:
            if not kind.is_optional or await self.kube.exists(kind, key.namespace):
                raise
            self.apis.absent.add(kind)  # it went away just now
            self.store.drop_kind(kind)
            raise RetryLaterError(f"{kind.kind} is no longer known") from None
        self.store.put(kind, answer)
        self._settled[key, kind, name] = (wanted, _fingerprint(answer))

    async def _refuse_foreign(self, kind: Kind, key: Key, name: str, uid: str) -> None:
        """Refuse to take over an object that is not ours: it would go with the service."""
        existing = await self.kube.get(kind, key.namespace, name)
        if existing is not None and not Child(kind, existing).is_controlled_by(uid):
            raise RefusedError(
                f"{kind.kind} {name} exists and belongs to somebody else: "
                "delete or rename it, or give the ALISEService another name"
            )

    def _workload(self, key: Key, kinds: Iterable[Kind]) -> WorkloadState:
        wanted = set(kinds) & set(WORKLOADS)
        children = [child for child in self.store.children(key) if child.kind in wanted]
        return workload_state(children[0].body if children else None)

    async def _publish(
        self, key: Key, body: dict[str, Any], previous: Status, status: Status
    ) -> None:
        (ready,) = [item for item in status["conditions"] if item["type"] == "Ready"]
        if ready["reason"] == SCALED_TO_ZERO:
            self._forget_ready(key)  # as was wished: nobody needs to be woken
        else:
            self.metrics.ready.labels(key.namespace, key.name).set(ready["status"] == "True")
        if status == previous:
            return
        await self._write_status(body, status)
        for announcement in announcements(previous, status):
            await self._announce(key, body, announcement)

    async def _write_status(self, body: dict[str, Any], status: Status) -> dict[str, Any]:
        answer = await self.kube.apply_status(body, status)
        self.store.put(ALISE_SERVICE, answer)
        return answer

    async def _announce(self, key: Key, body: dict[str, Any], what: Announcement) -> None:
        _log.info("%s: %s", what.reason, what.message, extra=_named(key))
        try:
            await self.kube.create_event(event_body(body, what, self.now()))
        except (UnavailableError, RefusedError, NotThereError) as error:
            _log.warning("an event is lost: %s", error, extra=_named(key))

    def _forget(self, key: Key) -> None:
        for known in [known for known in self._settled if known[0] == key]:
            del self._settled[known]
        self._forget_ready(key)

    def _forget_ready(self, key: Key) -> None:
        with suppress(KeyError):
            self.metrics.ready.remove(key.namespace, key.name)


def _fingerprint(body: Any) -> str:
    """Return a hash of what an object is, without what changes by itself."""
    metadata = body["metadata"]
    kept = {name: metadata.get(name) for name in ("labels", "annotations", "ownerReferences")}
    rest = {name: v for name, v in body.items() if name not in ("metadata", "status")}
    return digest([kept, rest])


def _readable(error: ValidationError) -> str:
    return "; ".join(
        f"spec.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
    )


def _named(key: Key) -> dict[str, str]:
    return {"namespace": key.namespace, "service": key.name, "kind": ALISE_SERVICE.kind}
