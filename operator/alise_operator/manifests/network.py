"""How clients and gateways reach the pods, and who else may."""

from __future__ import annotations

from typing import Any

from alise_operator.api.operations import HttpRouteSpec, InferencePoolSpec, PeerSelector
from alise_operator.manifests.kinds import (
    HTTP_ROUTE,
    INFERENCE_POOL,
    NETWORK_POLICY,
    SERVICE,
    Manifest,
)
from alise_operator.manifests.service_view import HTTP_PORT, METRICS_PORT, ServiceView, child


def service_object(service: ServiceView) -> Manifest:
    """Return the Service in front of the pods."""
    wanted = service.spec.exposure.service
    port = {"name": "http", "port": wanted.port, "targetPort": "http", "protocol": "TCP"}
    manifest = child(
        service,
        SERVICE,
        service.name,
        spec={"type": wanted.type, "selector": service.serving_selector, "ports": [port]},
    )
    if wanted.annotations:
        manifest["metadata"]["annotations"] = dict(wanted.annotations)
    return manifest


def network_policy(service: ServiceView) -> Manifest:
    """Return the policy that closes all ports but HTTP and metrics.

    vLLM's ports between the workers of one replica take commands from anyone who can connect, so
    they are open to the pods of this service only.
    """
    peers = [_peer(selector) for selector in service.spec.network_policy.allow_from]
    ports = [{"port": port, "protocol": "TCP"} for port in (HTTP_PORT, METRICS_PORT)]
    ingress: list[dict[str, Any]] = [{"ports": ports, **({"from": peers} if peers else {})}]
    own = {"matchLabels": service.selector}
    if service.nodes > 1:
        ingress.append({"from": [{"podSelector": own}]})
    content = {"podSelector": own, "policyTypes": ["Ingress"], "ingress": ingress}
    return child(service, NETWORK_POLICY, service.name, spec=content)


def _peer(selector: PeerSelector) -> dict[str, Any]:
    peer: dict[str, Any] = {}
    if selector.namespace_labels is not None:
        peer["namespaceSelector"] = _matching(selector.namespace_labels)
    if selector.pod_labels is not None or not peer:
        peer["podSelector"] = _matching(selector.pod_labels or {})
    return peer


def _matching(labels: dict[str, str]) -> dict[str, Any]:
    return {"matchLabels": dict(labels)} if labels else {}


def http_route(service: ServiceView, wanted: HttpRouteSpec) -> Manifest:
    """Return the route of the Gateway API; it leads to the InferencePool where there is one."""
    backend: dict[str, Any] = {"name": service.name, "port": service.spec.exposure.service.port}
    if service.spec.exposure.inference_pool:
        backend = {
            "group": INFERENCE_POOL.group,
            "kind": INFERENCE_POOL.kind,
            "name": service.name,
        }
    match = {"path": {"type": "PathPrefix", "value": "/"}}
    content: dict[str, Any] = {
        "parentRefs": [
            parent.model_dump(by_alias=True, exclude_none=True) for parent in wanted.parent_refs
        ],
        "rules": [{"matches": [match], "backendRefs": [backend]}],
    }
    if wanted.hostnames:
        content["hostnames"] = list(wanted.hostnames)
    return child(service, HTTP_ROUTE, service.name, spec=content)


def inference_pool(service: ServiceView, wanted: InferencePoolSpec) -> Manifest:
    """Return the InferencePool over the pods that answer HTTP."""
    picker = {
        "name": wanted.endpoint_picker_name,
        "port": {"number": wanted.endpoint_picker_port},
    }
    content = {
        "selector": {"matchLabels": service.serving_selector},
        "targetPorts": [{"number": HTTP_PORT}],
        "endpointPickerRef": picker,
    }
    return child(service, INFERENCE_POOL, service.name, spec=content)


def url(service: ServiceView) -> str:
    """Return the base URL for clients: the route's first host name, or the Service."""
    route = service.spec.exposure.http_route
    if route is not None and route.hostnames:
        return f"http://{route.hostnames[0]}/v1"
    port = service.spec.exposure.service.port
    return f"http://{service.name}.{service.namespace}.svc:{port}/v1"
