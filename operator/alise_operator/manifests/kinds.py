"""The kinds of objects that the operator makes, and what to install where one is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from alise_operator.api.base import GROUP, KIND, PLURAL, VERSION

Manifest: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of child object."""

    group: str
    version: str
    kind: str
    plural: str
    product: str = ""
    """What brings this API; empty: every cluster has it."""
    is_namespaced: bool = True

    @property
    def api_version(self) -> str:
        """Return `group/version` as manifests write it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def is_optional(self) -> bool:
        """Whether a cluster may lack it."""
        return bool(self.product)


ALISE_SERVICE: Final = Kind(GROUP, VERSION, KIND, PLURAL)
POD: Final = Kind("", "v1", "Pod", "pods")
EVENT: Final = Kind("", "v1", "Event", "events")

CONFIG_MAP: Final = Kind("", "v1", "ConfigMap", "configmaps")
PVC: Final = Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
SERVICE: Final = Kind("", "v1", "Service", "services")
SERVICE_ACCOUNT: Final = Kind("", "v1", "ServiceAccount", "serviceaccounts")
DEPLOYMENT: Final = Kind("apps", "v1", "Deployment", "deployments")
HPA: Final = Kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
NETWORK_POLICY: Final = Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies")
PDB: Final = Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")
LWS: Final = Kind(
    "leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets", "LeaderWorkerSet"
)
POD_MONITOR: Final = Kind(
    "monitoring.coreos.com", "v1", "PodMonitor", "podmonitors", "the Prometheus operator"
)
SCALED_OBJECT: Final = Kind("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects", "KEDA")
HTTP_ROUTE: Final = Kind(
    "gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes", "the Gateway API"
)
INFERENCE_POOL: Final = Kind(
    "inference.networking.k8s.io",
    "v1",
    "InferencePool",
    "inferencepools",
    "the Gateway API inference extension",
)

# In the order in which they are applied: what a pod mounts comes before the pod.
KINDS: Final = (
    SERVICE_ACCOUNT,
    CONFIG_MAP,
    PVC,
    NETWORK_POLICY,
    SERVICE,
    PDB,
    DEPLOYMENT,
    LWS,
    HPA,
    SCALED_OBJECT,
    POD_MONITOR,
    HTTP_ROUTE,
    INFERENCE_POOL,
)
OPTIONAL: Final = tuple(kind for kind in KINDS if kind.is_optional)
WORKLOADS: Final = (DEPLOYMENT, LWS)
_BY_NAME: Final = {(kind.api_version, kind.kind): kind for kind in KINDS}


def kind_of(manifest: Manifest) -> Kind:
    """Return the kind of one of our manifests."""
    return _BY_NAME[manifest["apiVersion"], manifest["kind"]]
