"""Events on an `ALISEService`, as `kubectl describe` shows them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from alise_operator.manifests.kinds import ALISE_SERVICE, EVENT, Manifest
from alise_operator.manifests.service_view import MANAGER
from alise_operator.status.status import Announcement

_MAX_MESSAGE = 1000


def event_body(service: Mapping[str, Any], what: Announcement, now: str) -> Manifest:
    """Return an event about `service` (an ALISEService)."""
    metadata = service["metadata"]
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.kind,
        "metadata": {
            "name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": ALISE_SERVICE.api_version,
            "kind": ALISE_SERVICE.kind,
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "type": what.type,
        "reason": what.reason,
        "message": what.message[:_MAX_MESSAGE],
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "reportingInstance": MANAGER,
    }
