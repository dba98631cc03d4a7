"""All manifests of one `ALISEService`, and the optional APIs that it asks for in vain."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from alise_operator.manifests.container import gib
from alise_operator.manifests.kinds import (
    KINDS,
    PDB,
    POD_MONITOR,
    PVC,
    SCALED_OBJECT,
    SERVICE_ACCOUNT,
    Kind,
    Manifest,
    kind_of,
)
from alise_operator.manifests.network import (
    http_route,
    inference_pool,
    network_policy,
    service_object,
)
from alise_operator.manifests.predictor import policy_config_map
from alise_operator.manifests.scaling import horizontal_pod_autoscaler, scaled_object
from alise_operator.manifests.service_view import ServiceView, child
from alise_operator.manifests.workload import workload


@dataclass(frozen=True, slots=True)
class Rendered:
    """The wanted children."""

    manifests: tuple[Manifest, ...]
    """In the order in which they are applied."""
    missing: tuple[Kind, ...]
    """Kinds that the spec asks for and the cluster lacks."""


def render(service: ServiceView, absent: Collection[Kind] = ()) -> Rendered:
    """Return the children of `service` in a cluster that lacks the kinds `absent`."""
    spec = service.spec
    wanted = [
        _service_account(service),
        policy_config_map(service),
        service_object(service),
        workload(service),
        *_autoscaling(service, absent),
    ]
    if service.cache_claim and not spec.model.cache.existing_claim:
        wanted.append(_cache_claim(service))
    if spec.network_policy.enabled:
        wanted.append(network_policy(service))
    if spec.pod_disruption_budget.enabled:
        wanted.append(_disruption_budget(service))
    if spec.monitoring.enabled:
        wanted.append(_pod_monitor(service))
    if spec.exposure.http_route:
        wanted.append(http_route(service, spec.exposure.http_route))
    if spec.exposure.inference_pool:
        wanted.append(inference_pool(service, spec.exposure.inference_pool))
    wanted.sort(key=lambda manifest: KINDS.index(kind_of(manifest)))
    kinds = [kind_of(manifest) for manifest in wanted]
    return Rendered(
        manifests=tuple(m for m, kind in zip(wanted, kinds, strict=True) if kind not in absent),
        missing=tuple(kind for kind in kinds if kind in absent),
    )


def _autoscaling(service: ServiceView, absent: Collection[Kind]) -> list[Manifest]:
    wanted = service.spec.autoscaling
    if wanted is None:
        return []
    if wanted.prometheus_address is None:
        return [horizontal_pod_autoscaler(service, wanted)]
    # Without KEDA both: the ScaledObject is reported as missing, and the HPA stands in for it.
    stand_in = [horizontal_pod_autoscaler(service, wanted)] if SCALED_OBJECT in absent else []
    return [scaled_object(service, wanted), *stand_in]


def _service_account(service: ServiceView) -> Manifest:
    return child(service, SERVICE_ACCOUNT, service.name, automountServiceAccountToken=False)


def _cache_claim(service: ServiceView) -> Manifest:
    cache = service.spec.model.cache
    content: dict[str, Any] = {
        "accessModes": [cache.access_mode],
        "resources": {"requests": {"storage": gib(cache.size_gib)}},
    }
    if cache.storage_class_name is not None:
        content["storageClassName"] = cache.storage_class_name
    return child(service, PVC, f"{service.name}-model-cache", spec=content)


def _disruption_budget(service: ServiceView) -> Manifest:
    content = {
        "maxUnavailable": service.spec.pod_disruption_budget.max_unavailable,
        "selector": {"matchLabels": service.serving_selector},
    }
    return child(service, PDB, service.name, spec=content)


def _pod_monitor(service: ServiceView) -> Manifest:
    wanted = service.spec.monitoring
    interval = f"{wanted.interval_seconds}s"
    endpoints = [{"port": port, "path": "/metrics", "interval": interval} for port in _SCRAPED]
    manifest = child(
        service,
        POD_MONITOR,
        service.name,
        spec={
            "selector": {"matchLabels": service.selector},
            "podMetricsEndpoints": endpoints,
        },
    )
    manifest["metadata"]["labels"] = {**wanted.labels, **service.labels}
    return manifest


_SCRAPED = ("http", "metrics")
