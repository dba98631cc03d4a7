"""The operator's requests to the API server, and what their failures mean for a reconcile.

Knows lightkube, and no rule about what should be where.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any, Final

import httpx2 as httpx
from lightkube import AsyncClient
from lightkube.core.exceptions import ApiError
from lightkube.generic_resource import create_global_resource, create_namespaced_resource
from lightkube.types import CascadeType, PatchType

from alise_operator.manifests.kinds import ALISE_SERVICE, EVENT, Kind, Manifest
from alise_operator.manifests.service_view import MANAGED_BY, MANAGER
from alise_operator.metrics import Metrics

_CHUNK: Final = 100
_PAGES_END: Final = object()
_RETRIED: Final = {408, 409, 429}
_DEFAULT_RETRY_S: Final = 1.0


class UnavailableError(Exception):
    """The API server could not serve the request now; the same request may succeed later."""

    def __init__(
        self, message: str, after_s: float = 0.0, *, others_may_succeed: bool = False
    ) -> None:
        super().__init__(message)
        self.after_s = after_s
        self.others_may_succeed = others_may_succeed
        """Whether only this object seems to be concerned, as by a broken webhook."""


class RefusedError(Exception):
    """The API server refuses this very object; the text is for the user."""


class NotThereError(Exception):
    """The object, its API or its namespace does not exist, or is being deleted."""


class Kube:
    """Reads and writes objects of the kinds that the operator knows."""

    def __init__(self, client: AsyncClient, metrics: Metrics) -> None:
        self._client = client
        self._metrics = metrics
        self._resources: dict[Kind, Any] = {}

    async def get(self, kind: Kind, namespace: str | None, name: str) -> dict[str, Any] | None:
        """Return an object, None if there is none; `namespace` is None for those of the cluster."""
        where: dict[str, Any] = {"namespace": namespace} if kind.is_namespaced else {}
        try:
            answer: dict[str, Any] = await self._call(
                "get", kind, self._client.get, self._resource(kind), name, **where
            )
        except NotThereError:
            return None
        return answer

    async def apply(self, kind: Kind, manifest: Manifest) -> dict[str, Any]:
        """Apply `manifest` on the server's side, taking over the fields that it names."""
        metadata = manifest["metadata"]
        return await self._patch(kind, self._resource(kind), metadata["name"], manifest, metadata)

    async def apply_status(self, service: Manifest, status: dict[str, Any]) -> dict[str, Any]:
        """Apply the status of an ALISEService; refused if another one has its name by now."""
        metadata = {name: service["metadata"][name] for name in ("name", "namespace", "uid")}
        body = {
            "apiVersion": ALISE_SERVICE.api_version,
            "kind": ALISE_SERVICE.kind,
            "metadata": metadata,
            "status": status,
        }
        resource = self._resource(ALISE_SERVICE).Status
        return await self._patch(ALISE_SERVICE, resource, metadata["name"], body, metadata)

    async def delete(self, kind: Kind, namespace: str, name: str) -> None:
        """Delete an object and, in the background, what it owns; done if it is not there."""
        try:
            await self._call(
                "delete",
                kind,
                self._client.delete,
                self._resource(kind),
                name,
                namespace=namespace,
                cascade=CascadeType.BACKGROUND,
            )
        except NotThereError:
            return

    async def create_event(self, event: Manifest) -> None:
        """Post an event."""
        resource = self._resource(EVENT)
        namespace = event["metadata"]["namespace"]
        await self._call("create", EVENT, self._client.create, resource(event), namespace=namespace)

    async def list(self, kind: Kind, namespace: str | None) -> AsyncIterator[dict[str, Any]]:
        """Yield our objects of a kind, page by page; `namespace` None: of all namespaces."""
        labels: Any = None if kind is ALISE_SERVICE else {MANAGED_BY: MANAGER}
        pages = self._client.list(
            self._resource(kind), namespace=namespace or "*", chunk_size=_CHUNK, labels=labels
        ).__aiter__()
        for index in count():
            # The other items of a page cost no request, and neither does the end after a full one.
            end = _PAGES_END if index else None
            brings_page = index % _CHUNK == 0
            item = await self._call("list", kind, anext, pages, end, is_request=brings_page)
            if item is end:
                return
            yield item

    async def exists(self, kind: Kind, namespace: str | None) -> bool:
        """Say whether the API server knows a kind."""
        try:
            async for _ in self.list(kind, namespace):
                return True
        except NotThereError:
            return False
        return True

    def _resource(self, kind: Kind) -> Any:
        if kind not in self._resources:
            create = create_namespaced_resource if kind.is_namespaced else create_global_resource
            self._resources[kind] = create(kind.group, kind.version, kind.kind, kind.plural)
        return self._resources[kind]

    async def _patch(
        self, kind: Kind, resource: Any, name: str, body: Manifest, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call(
            "apply",
            kind,
            self._client.patch,
            resource,
            name,
            body,
            **({"namespace": metadata["namespace"]} if kind.is_namespaced else {}),
            patch_type=PatchType.APPLY,
            field_manager=MANAGER,
            force=True,
        )
        return answer

    async def _call(
        self,
        verb: str,
        kind: Kind,
        method: Callable[..., Any],
        *args: Any,
        is_request: bool = True,
        **kwargs: Any,
    ) -> Any:
        code = "none"
        answer: Any = None
        try:
            answer = await method(*args, **kwargs)
            code = "200"
        except httpx.HTTPStatusError as error:
            code = str(error.response.status_code)
            raise _meaning(error, kind) from error
        except (httpx.HTTPError, asyncio.TimeoutError, OSError) as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        finally:
            if is_request and answer is not _PAGES_END:
                self._metrics.requests.labels(verb, kind.kind, code).inc()
        return answer


def _meaning(error: httpx.HTTPStatusError, kind: Kind) -> Exception:
    code = error.response.status_code
    message = error.status.message if isinstance(error, ApiError) else str(error)
    if code == httpx.codes.NOT_FOUND or _is_ending(error):
        return NotThereError(message)
    if code in _RETRIED or code >= httpx.codes.INTERNAL_SERVER_ERROR:
        is_overload = code in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
        text, after_s = f"{kind.kind}: {code}: {message}", _retry_after_s(error)
        return UnavailableError(text, after_s, others_may_succeed=not is_overload)
    if code == httpx.codes.UNAUTHORIZED:  # a token that is being rotated
        return UnavailableError(f"{code}: {message}", _DEFAULT_RETRY_S)
    return RefusedError(f"{kind.kind}: {message}")


def _is_ending(error: httpx.HTTPStatusError) -> bool:
    """Say whether the namespace is being deleted, so that nothing can be made in it any more."""
    details = error.status.details if isinstance(error, ApiError) else None
    causes = (details.causes if details else None) or ()
    return any(cause.reason == "NamespaceTerminating" for cause in causes)


def _retry_after_s(error: httpx.HTTPStatusError) -> float:
    text = error.response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0
