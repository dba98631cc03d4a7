"""Whether this operator leads, by kopf's peering object.

kopf itself stops the watches of an operator that does not lead. This stops the work that is already
queued, which would be done from an outdated view.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from alise_operator.kube import Kube, NotThereError, RefusedError, UnavailableError
from alise_operator.manifests.kinds import Kind

PEERING: Final = Kind("kopf.dev", "v1", "KopfPeering", "kopfpeerings", "kopf")
CLUSTER_PEERING: Final = Kind(
    "kopf.dev", "v1", "ClusterKopfPeering", "clusterkopfpeerings", "kopf", False
)
_TRUSTED_S: Final = 5.0


def leads(peers: Mapping[str, Any], identity: str, priority: int, now: datetime) -> bool:
    """Say whether no live peer other than `identity` has the same priority or a higher one."""
    for name, peer in peers.items():
        seen = datetime.fromisoformat(peer["lastseen"].replace("Z", "+00:00"))
        if seen.tzinfo is None:
            seen = seen.replace(tzinfo=timezone.utc)
        is_alive = seen + timedelta(seconds=int(peer.get("lifetime", 60))) > now
        if name != identity and is_alive and int(peer.get("priority", 0)) >= priority:
            return False
    return True


@dataclass(slots=True)
class Leadership:
    """Asks the peering object, at most every few seconds and only when there is work."""

    kube: Kube
    name: str | None
    """Name of the peering object; None: there is no other operator."""
    namespaces: tuple[str, ...]
    """Where there is such an object; empty: it is of the cluster."""
    identity: str
    priority: int
    _asked_s: float = float("-inf")
    _leads: bool = True

    async def prepare(self) -> None:
        """Make the peering objects, which kopf expects to find."""
        if self.name is None:
            return
        kind = PEERING if self.namespaces else CLUSTER_PEERING
        for namespace in self.namespaces or (None,):
            metadata = {"name": self.name, **({"namespace": namespace} if namespace else {})}
            body = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}
            try:
                await self.kube.apply(kind, body)
            except NotThereError as error:
                raise NotThereError(
                    f"no {kind.kind} can be made: {error}; install kopf's CRDs (the chart does, by "
                    "crds.installPeering), or run without --peering"
                ) from error

    async def holds(self) -> bool:
        """Say whether this operator leads, as of some seconds ago."""
        if self.name is None or time.monotonic() - self._asked_s < _TRUSTED_S:
            return self._leads
        kind, namespace = (
            (PEERING, self.namespaces[0]) if self.namespaces else (CLUSTER_PEERING, None)
        )
        try:
            found = await self.kube.get(kind, namespace, self.name)
        except (UnavailableError, RefusedError):
            return self._leads
        peers = (found or {}).get("status") or {}
        self._leads = leads(peers, self.identity, self.priority, datetime.now(timezone.utc))
        self._asked_s = time.monotonic()
        return self._leads
