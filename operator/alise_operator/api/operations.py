"""How replicas are rolled out, scaled, placed, reached, watched and protected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alise_operator.api.base import (
    ATOMIC,
    Annotations,
    ApiModel,
    Labels,
    LabelValue,
    Name,
    RawObject,
    rules,
)


class AutoscalingSpec(ApiModel):
    """Scale by the predicted work that waits. The autoscaler writes spec.replicas."""

    model_config = rules(
        (
            "self.minReplicas <= self.maxReplicas",
            "autoscaling.minReplicas must not exceed autoscaling.maxReplicas",
        )
    )

    min_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Fewest replicas."""
    max_replicas: Annotated[int, Field(ge=1, le=1000)]
    """Most replicas."""
    target_backlog_seconds: Annotated[int, Field(ge=1, le=86400)] = 30
    """Predicted seconds of unfinished work per replica to aim at."""
    scale_down_stabilization_seconds: Annotated[int, Field(ge=0, le=3600)] = 300
    """Scale down only to the highest wish of this period."""
    prometheus_address: (
        Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=512)] | None
    ) = None
    """Prometheus that KEDA asks. Unset, or without KEDA, a HorizontalPodAutoscaler reads the
    custom metrics API."""


class RolloutSpec(ApiModel):
    """How pods are replaced."""

    model_config = rules(
        (
            "self.maxSurge > 0 || self.maxUnavailable > 0",
            "rollout.maxSurge and maxUnavailable must not both be 0: no pod could be replaced",
        )
    )

    max_surge: Annotated[int, Field(ge=0, le=100)] = 0
    """Pods above replicas during a rollout; they need free accelerators."""
    max_unavailable: Annotated[int, Field(ge=0, le=100)] = 1
    """Pods below replicas during a rollout."""
    revision: Annotated[str, Field(max_length=63)] = ""
    """Any change restarts all pods; as with every restart that a change of the spec brings, they
    get the operator's present default images."""


class LifecycleSpec(ApiModel):
    """How long pods may take to start and to end."""

    drain_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    """How long answers in progress may take once a pod is asked to end."""
    startup_timeout_seconds: Annotated[int, Field(ge=30, le=86400)] = 1800
    """How long the engine may take to download and load the model."""


class Toleration(ApiModel):
    """A taint that the pods tolerate."""

    key: Annotated[str, Field(max_length=316)] | None = None
    """Key of the taint; unset with operator Exists matches all."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How the value is compared."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; unset matches all."""
    toleration_seconds: Annotated[int, Field(ge=0, le=604800)] | None = None
    """NoExecute: how long the pod stays."""


class PlacementSpec(ApiModel):
    """Where pods run."""

    node_selector: Labels = Field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: Annotated[
        tuple[Toleration, ...], Field(max_length=32, json_schema_extra=ATOMIC)
    ] = ()
    """Taints that the pods tolerate."""
    affinity: RawObject | None = None
    """Affinity, as in a pod's spec."""
    runtime_class_name: Name | None = None
    """Runtime class, such as nvidia."""
    priority_class_name: Name | None = None
    """Priority class."""


class ServiceSpec(ApiModel):
    """The Service in front of the pods."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Type of the Service."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the OpenAI-compatible API."""
    annotations: Annotations = Field(default_factory=dict)
    """Annotations of the Service, for example for a load balancer."""


class ParentRef(ApiModel):
    """A Gateway."""

    name: Name
    """Name of the Gateway."""
    namespace: LabelValue | None = None
    """Its namespace; by default the ALISEService's."""
    section_name: Name | None = None
    """One listener of it; by default all that match."""


class HttpRouteSpec(ApiModel):
    """A route of the Gateway API to the Service."""

    parent_refs: Annotated[
        tuple[ParentRef, ...], Field(min_length=1, max_length=8, json_schema_extra=ATOMIC)
    ]
    """The Gateways to attach to."""
    hostnames: Annotated[tuple[Name, ...], Field(max_length=16, json_schema_extra=ATOMIC)] = ()
    """Host names that are routed here; the first one becomes status.url."""


class InferencePoolSpec(ApiModel):
    """An InferencePool over the pods, for an inference gateway."""

    endpoint_picker_name: Name
    """Service of the endpoint picker."""
    endpoint_picker_port: Annotated[int, Field(ge=1, le=65535)] = 9002
    """Port of the endpoint picker."""


class ExposureSpec(ApiModel):
    """How clients reach the pods."""

    service: ServiceSpec = ServiceSpec()
    """The Service in front of the pods."""
    http_route: HttpRouteSpec | None = None
    """A route of the Gateway API, if it is installed."""
    inference_pool: InferencePoolSpec | None = None
    """An InferencePool, if that API is installed."""


class MonitoringSpec(ApiModel):
    """Prometheus operator's PodMonitor for engine and sidecar."""

    enabled: bool = False
    """Create a PodMonitor, if the Prometheus operator is installed."""
    interval_seconds: Annotated[int, Field(ge=5, le=3600)] = 30
    """How often the pods are scraped."""
    labels: Labels = Field(default_factory=dict)
    """Labels of the PodMonitor, by which a Prometheus finds it."""


class PeerSelector(ApiModel):
    """Pods that may connect: those with the labels, in namespaces with the labels."""

    namespace_labels: Labels | None = None
    """Labels of their namespace; unset: the ALISEService's own, {}: any."""
    pod_labels: Labels | None = None
    """Labels of the pods; unset: all."""


class NetworkPolicySpec(ApiModel):
    """Closes all ports of the pods but the API's and the metrics', which may be narrowed."""

    enabled: bool = True
    """Create a NetworkPolicy."""
    allow_from: Annotated[
        tuple[PeerSelector, ...], Field(max_length=16, json_schema_extra=ATOMIC)
    ] = ()
    """Who may connect; empty: everyone."""


class PodDisruptionBudgetSpec(ApiModel):
    """Limits how many pods a node drain may end at once."""

    enabled: bool = True
    """Create a PodDisruptionBudget."""
    max_unavailable: Annotated[int, Field(ge=0, le=100)] = 1
    """Pods that may be down at once by a drain; 0 blocks drains."""


class PodTemplateSpec(ApiModel):
    """Escape hatch: merged over the pod that the operator makes."""

    labels: Labels = Field(default_factory=dict)
    """More labels of the pods."""
    annotations: Annotations = Field(default_factory=dict)
    """More annotations of the pods."""
    spec: RawObject | None = None
    """Part of a pod's spec; lists of named items are merged by name, other lists replace."""
