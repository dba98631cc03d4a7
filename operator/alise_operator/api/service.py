"""`ALISEService.spec`: the whole of what a user may ask for."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from alise_operator.api.base import ApiModel, LocalObjectReference, keyed_by
from alise_operator.api.engine import EngineSpec, LoraSpec, SpeculativeDecoding
from alise_operator.api.model import ModelSpec
from alise_operator.api.operations import (
    AutoscalingSpec,
    ExposureSpec,
    LifecycleSpec,
    MonitoringSpec,
    NetworkPolicySpec,
    PlacementSpec,
    PodDisruptionBudgetSpec,
    PodTemplateSpec,
    RolloutSpec,
)
from alise_operator.api.scheduling import KvSwapSpec, PredictorSpec, SchedulingSpec

# Children are called NAME-model-cache and the like: 63 characters less the longest suffix.
MAX_NAME_LENGTH: Final = 50

ROOT_RULES: Final = (
    (
        f"self.metadata.name.size() <= {MAX_NAME_LENGTH}",
        f"metadata.name must have at most {MAX_NAME_LENGTH} characters, "
        "as names of the objects made for it are longer",
    ),
    (
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must begin with a letter and contain only a-z, 0-9 and -, "
        "as a Service is named after it",
    ),
)
"""CEL rules on the whole object: only there `metadata` can be seen."""


class ALISEServiceSpec(ApiModel):
    """A model to serve, and how."""

    replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    """Number of replicas; `kubectl scale` and autoscalers write it."""
    paused: bool = False
    """Stop reconciling: nothing is changed or repaired, status is still reported."""
    model: ModelSpec
    """The model to serve."""
    engine: EngineSpec = EngineSpec()
    """The engine: vLLM with ALISE's plug-ins."""
    scheduling: SchedulingSpec = SchedulingSpec()
    """How jobs are ordered."""
    kv_swap: KvSwapSpec = KvSwapSpec()
    """The host tier that keeps the KV cache of preempted jobs."""
    predictor: PredictorSpec = PredictorSpec()
    """The scheduler sidecar."""
    speculative_decoding: SpeculativeDecoding | None = None
    """Guess several tokens at once and verify them in one step."""
    lora: LoraSpec | None = None
    """LoRA adapters served beside the base model."""
    autoscaling: AutoscalingSpec | None = None
    """Scale by the predicted work that waits."""
    rollout: RolloutSpec = RolloutSpec()
    """How pods are replaced."""
    lifecycle: LifecycleSpec = LifecycleSpec()
    """How long pods may take to start and to end."""
    placement: PlacementSpec = PlacementSpec()
    """Where pods run."""
    image_pull_secrets: Annotated[
        tuple[LocalObjectReference, ...], Field(max_length=8, json_schema_extra=keyed_by("name"))
    ] = ()
    """Secrets with which images are pulled."""
    exposure: ExposureSpec = ExposureSpec()
    """How clients reach the pods."""
    monitoring: MonitoringSpec = MonitoringSpec()
    """Prometheus operator's PodMonitor."""
    network_policy: NetworkPolicySpec = NetworkPolicySpec()
    """Who may connect to the pods."""
    pod_disruption_budget: PodDisruptionBudgetSpec = PodDisruptionBudgetSpec()
    """How many pods a node drain may end at once."""
    pod_template: PodTemplateSpec = PodTemplateSpec()
    """Escape hatch: merged over the pod that the operator makes."""
