"""Autoscaling by the predicted work that waits.

The target is the ALISEService, not its Deployment: an autoscaler writes `spec.replicas` through the
scale subresource, and the operator follows, so that the two never fight.
"""

from __future__ import annotations

from typing import Any, Final

from alise_operator.api.base import GROUP, KIND, VERSION
from alise_operator.api.operations import AutoscalingSpec
from alise_operator.manifests.kinds import HPA, SCALED_OBJECT, Manifest
from alise_operator.manifests.service_view import ServiceView, child

BACKLOG_METRIC: Final = "alise_backlog_seconds"


def horizontal_pod_autoscaler(service: ServiceView, wanted: AutoscalingSpec) -> Manifest:
    """Return an HPA that reads the custom metrics API."""
    target = {"type": "AverageValue", "averageValue": str(wanted.target_backlog_seconds)}
    metric = {"type": "Pods", "pods": {"metric": {"name": BACKLOG_METRIC}, "target": target}}
    content = {
        "scaleTargetRef": _target(service),
        "minReplicas": wanted.min_replicas,
        "maxReplicas": wanted.max_replicas,
        "metrics": [metric],
        "behavior": _behavior(wanted),
    }
    return child(service, HPA, service.name, spec=content)


def scaled_object(service: ServiceView, wanted: AutoscalingSpec) -> Manifest:
    """Return KEDA's ScaledObject, which asks Prometheus."""
    pods = f'namespace="{service.namespace}",pod=~"{_pod_names(service)}"'
    trigger = {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": wanted.prometheus_address,
            "query": f"sum({BACKLOG_METRIC}{{{pods}}})",
            "threshold": str(wanted.target_backlog_seconds),
        },
    }
    content = {
        "scaleTargetRef": _target(service),
        "minReplicaCount": wanted.min_replicas,
        "maxReplicaCount": wanted.max_replicas,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(wanted)}},
        "triggers": [trigger],
    }
    return child(service, SCALED_OBJECT, service.name, spec=content)


def _pod_names(service: ServiceView) -> str:
    """Return a regular expression for the names of the serving pods, and of no other service's.

    A service `chat` must not scale by the backlog of `chat-large`. The API server shortens long
    names, and may take the hyphen with it, before it appends five random characters.
    """
    end = "[0-9]+" if service.nodes > 1 else "[a-z0-9]{1,10}-?[a-z0-9]{5}"
    return f"{service.name}-{end}"


def _target(service: ServiceView) -> dict[str, Any]:
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "name": service.name}


def _behavior(wanted: AutoscalingSpec) -> dict[str, Any]:
    window_s = wanted.scale_down_stabilization_seconds
    return {"scaleDown": {"stabilizationWindowSeconds": window_s}}
