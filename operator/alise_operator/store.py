"""What the operator has seen of the cluster, by the `ALISEService` that it belongs to.

Filled from watches and from answers to own writes, so that a reconcile sees what the one before
did. Children are kept as compressed JSON: there are thousands, and each is looked at seldom.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from alise_operator.manifests.kinds import ALISE_SERVICE, POD, WORKLOADS, Kind
from alise_operator.manifests.service_view import SERVICE_LABEL
from alise_operator.plan import Child
from alise_operator.status.pods import PodState, pod_state

Body: TypeAlias = Mapping[str, Any]


class Key(NamedTuple):
    """An `ALISEService`."""

    namespace: str
    name: str


class ObjectName(NamedTuple):
    """Any object that is stored."""

    kind: Kind
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class _Entry:
    version: int
    uid: str
    owner: Key
    content: Any
    """A service's body, a pod's `PodState`, a child's packed body."""


@dataclass(slots=True)
class Store:
    """Services, their children and their pods."""

    _entries: dict[ObjectName, _Entry] = field(default_factory=dict)
    # service -> its children and pods
    _owned: defaultdict[Key, set[ObjectName]] = field(default_factory=lambda: defaultdict(set))

    def put(self, kind: Kind, body: Body) -> None:
        """Take in an object, unless a newer version of it is known or it is not ours."""
        name, owner = object_name(kind, body), owner_key(kind, body)
        if owner is None:
            return
        version, uid = version_of(body), body["metadata"]["uid"]
        old = self._entries.get(name)
        if old is not None and old.uid == uid and old.version > version:
            return
        if old is not None and old.owner != owner:
            self._owned[old.owner].discard(name)
        self._entries[name] = _Entry(version, uid, owner, _content(kind, body))
        if kind is not ALISE_SERVICE:
            self._owned[owner].add(name)

    def drop(self, name: ObjectName, uid: str | None = None) -> Key | None:
        """Forget a deleted object, unless another one than `uid` has its name by now.

        Returns the service that it belonged to, if it was known.
        """
        known = self._entries.get(name)
        if known is None or uid not in (None, known.uid):
            return None
        del self._entries[name]
        if name.kind is not ALISE_SERVICE:
            self._owned[known.owner].discard(name)
            if not self._owned[known.owner]:
                del self._owned[known.owner]
        return known.owner

    def drop_kind(self, kind: Kind) -> None:
        """Forget all objects of a kind whose API has gone."""
        for name in [name for name in self._entries if name.kind is kind]:
            self.drop(name)

    def service(self, key: Key) -> dict[str, Any] | None:
        """Return the body of a service, None if there is none."""
        entry = self._entries.get(ObjectName(ALISE_SERVICE, *key))
        return entry.content if entry else None

    def services(self) -> list[Key]:
        """Return all services."""
        return [Key(n.namespace, n.name) for n in self._entries if n.kind is ALISE_SERVICE]

    def children(self, key: Key) -> list[Child]:
        """Return the children of a service."""
        return [
            Child(name.kind, json.loads(zlib.decompress(self._entries[name].content)))
            for name in self._owned.get(key, ())
            if name.kind is not POD
        ]

    def pods(self, key: Key) -> tuple[PodState, ...]:
        """Return the pods of a service, by name."""
        names = sorted(name.name for name in self._owned.get(key, ()) if name.kind is POD)
        return tuple(self._entries[ObjectName(POD, key.namespace, name)].content for name in names)

    def versions(self, kind: Kind) -> dict[ObjectName, int]:
        """Return the known resource version of each object of `kind`."""
        return {name: e.version for name, e in self._entries.items() if name.kind is kind}


def object_name(kind: Kind, body: Body) -> ObjectName:
    """Return the name under which an object is stored."""
    return ObjectName(kind, body["metadata"]["namespace"], body["metadata"]["name"])


def owner_key(kind: Kind, body: Body) -> Key | None:
    """Return the service that an object belongs to: itself, or the one that it is labelled with."""
    metadata = body["metadata"]
    if kind is ALISE_SERVICE:
        return Key(metadata["namespace"], metadata["name"])
    name = (metadata.get("labels") or {}).get(SERVICE_LABEL)
    return Key(metadata["namespace"], name) if name else None


def version_of(body: Body) -> int:
    """Return a resource version. They compare as numbers: a guarantee since Kubernetes 1.35."""
    return int(body["metadata"].get("resourceVersion") or 0)


def _content(kind: Kind, body: Body) -> Any:
    if kind is POD:
        return pod_state(body)
    metadata = {name: v for name, v in body["metadata"].items() if name != "managedFields"}
    has_status = kind is ALISE_SERVICE or kind in WORKLOADS
    kept = {name: v for name, v in body.items() if name != "status" or has_status}
    kept = {**kept, "metadata": metadata}
    if kind is ALISE_SERVICE:
        return kept
    return zlib.compress(json.dumps(kept, separators=(",", ":")).encode(), 1)
