"""What rendering knows of one `ALISEService`, and the names and labels that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from alise_operator.api.base import GROUP, KIND, VERSION
from alise_operator.api.service import ALISEServiceSpec
from alise_operator.api.status import ResolvedImages
from alise_operator.manifests.kinds import Kind, Manifest

MANAGER: Final = "alise-operator"
"""Field manager of server-side apply, and the `managed-by` label."""
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
SERVICE_LABEL: Final = f"{GROUP}/service"
LEADER_LABEL: Final = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}

HTTP_PORT: Final = 8000
METRICS_PORT: Final = 9464


@dataclass(frozen=True, slots=True)
class ServiceView:
    """One `ALISEService`: identity, parsed spec, and the images that it shall run."""

    name: str
    namespace: str
    uid: str
    spec: ALISEServiceSpec
    images: ResolvedImages

    @property
    def nodes(self) -> int:
        """Nodes that one replica spans."""
        accelerator = self.spec.engine.accelerator
        if not accelerator.count or accelerator.per_node is None:
            return 1
        return max(1, accelerator.count // accelerator.per_node)

    @property
    def selector(self) -> dict[str, str]:
        """Labels of all pods of this service."""
        return {SERVICE_LABEL: self.name}

    @property
    def serving_selector(self) -> dict[str, str]:
        """Labels of the pods that answer HTTP: of a group that spans nodes, its leader."""
        return {**self.selector, **(LEADER_LABEL if self.nodes > 1 else {})}

    @property
    def labels(self) -> dict[str, str]:
        """Labels of every child."""
        return {
            "app.kubernetes.io/name": "alise",
            "app.kubernetes.io/instance": self.name,
            MANAGED_BY: MANAGER,
            **self.selector,
        }

    @property
    def served_name(self) -> str:
        """The name that clients ask for."""
        model = self.spec.model
        return model.served_name or model.uri.partition("://")[2]

    @property
    def policy_config_map(self) -> str:
        """Name of the ConfigMap with the policy knobs."""
        return f"{self.name}-policy"

    @property
    def cache_claim(self) -> str | None:
        """Name of the claim that caches weights; None without one."""
        model = self.spec.model
        if not model.uri.startswith("hf://"):
            return None
        if model.cache.existing_claim:
            return model.cache.existing_claim
        return f"{self.name}-model-cache" if model.cache.enabled else None


def child(service: ServiceView, kind: Kind, name: str, **content: object) -> Manifest:
    """Return a manifest that belongs to `service`: deleting that deletes it."""
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "name": name,
            "namespace": service.namespace,
            "labels": service.labels,
            "ownerReferences": [
                {
                    "apiVersion": f"{GROUP}/{VERSION}",
                    "kind": KIND,
                    "name": service.name,
                    "uid": service.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        **content,
    }
