"""Which of the optional APIs this cluster has at the moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from alise_operator.kube import Kube, RefusedError, UnavailableError
from alise_operator.manifests.kinds import OPTIONAL, Kind


@dataclass(slots=True)
class OptionalApis:
    """Asked of the API server at start and every `Settings.discovery_s` seconds."""

    kube: Kube
    namespace: str | None
    """Where to ask; None: all namespaces."""
    absent: set[Kind] = field(default_factory=lambda: set(OPTIONAL))

    async def refresh(self) -> bool:
        """Ask for all of them; returns whether anything has changed."""
        before = set(self.absent)
        for kind in OPTIONAL:
            try:
                exists = await self.kube.exists(kind, self.namespace)
            except UnavailableError:
                continue  # keep what is known
            except RefusedError:
                exists = False  # what the operator may not touch is as good as absent
            (self.absent.discard if exists else self.absent.add)(kind)
        return self.absent != before
