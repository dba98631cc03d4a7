"""`ALISEService.status`: what was seen, in terms that a user can act on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alise_operator.api.base import ApiModel, keyed_by

Message = Annotated[str, Field(max_length=4096)]
Time = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
Count = Annotated[int, Field(ge=0)]


class ResolvedImages(ApiModel):
    """Images in use; an upgrade of the operator does not change them by itself."""

    engine: Annotated[str, Field(max_length=512)]
    """Image of the engine."""
    predictor: Annotated[str, Field(max_length=512)]
    """Image of the sidecar."""
    revision: Annotated[str, Field(max_length=63)] = ""
    """spec.rollout.revision at which they were chosen."""
    accelerated: bool = True
    """Whether the engine's image was chosen for accelerators; false: for the CPU."""


class LastFailure(ApiModel):
    """The latest failure of a container; it stays after the pod has recovered."""

    pod: Annotated[str, Field(max_length=253)]
    """Pod in which it happened."""
    container: Annotated[str, Field(max_length=253)]
    """engine, predictor, predictor-seed, or empty when the pod itself failed."""
    reason: Annotated[str, Field(max_length=128)]
    """What happened, in one word, such as OutOfMemory."""
    exit_code: int | None = None
    """Exit status of the container, if it ended."""
    message: Message = ""
    """Last line of its log, or what the cluster said."""
    time: Time | None = None
    """When it happened, or was first seen."""


class Condition(ApiModel):
    """One aspect of the service, as metav1.Condition."""

    type: Annotated[str, Field(max_length=316)]
    """Ready, SpecValid, EngineReady, PredictorReady, Progressing, Degraded or IntegrationsReady."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=128)]
    """Why, in one word."""
    message: Message = ""
    """Why, in a sentence."""
    last_transition_time: Time
    """When status last flipped."""
    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] = 0
    """metadata.generation that it is about."""


class ALISEServiceStatus(ApiModel):
    """What was seen of the service."""

    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] = 0
    """metadata.generation that the operator has acted upon."""
    replicas: Count = 0
    """Pods that exist."""
    ready_replicas: Count = 0
    """Pods that serve."""
    updated_replicas: Count = 0
    """Pods of the present spec."""
    selector: Annotated[str, Field(max_length=1024)] = ""
    """Selects the pods; the scale subresource shows it to autoscalers."""
    url: Annotated[str, Field(max_length=1024)] = ""
    """Base URL of the OpenAI-compatible API."""
    resolved_images: ResolvedImages | None = None
    """Images in use."""
    last_failure: LastFailure | None = None
    """The latest failure of a container."""
    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra=keyed_by("type"))
    ] = ()
    """Ready, SpecValid, EngineReady, PredictorReady, Progressing, Degraded and
    IntegrationsReady."""
