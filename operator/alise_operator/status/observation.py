"""All that a reconcile saw and did, from which status is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alise_operator.manifests.kinds import Kind
from alise_operator.status.pods import PodState


@dataclass(frozen=True, slots=True)
class WorkloadState:
    """What the Deployment or LeaderWorkerSet says of itself."""

    replicas: int = 0
    ready: int = 0
    updated: int = 0
    is_current: bool = False
    """Whether its controller has seen its latest spec."""
    refusal: str = ""
    """Why its pods cannot be made, such as a quota; empty if they can."""
    is_stuck: bool = False
    """Whether its progress deadline has passed."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The outcome of one reconcile."""

    generation: int
    workload: WorkloadState
    pods: tuple[PodState, ...] = ()
    missing: tuple[Kind, ...] = ()
    """Kinds that the spec asks for and the cluster lacks."""
    refused: tuple[str, ...] = ()
    """What the API server said to children that it refused."""


def workload_state(body: Mapping[str, Any] | None) -> WorkloadState:
    """Return what `body` (a Deployment or LeaderWorkerSet; None: there is none yet) says."""
    if body is None:
        return WorkloadState()
    status = body.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or ()}
    failure, progress = conditions.get("ReplicaFailure", {}), conditions.get("Progressing", {})
    generation = body["metadata"].get("generation", 0)
    # Older LeaderWorkerSets do not say which spec they have seen: what they say is then believed.
    observed = status.get("observedGeneration", generation if status else 0)
    return WorkloadState(
        replicas=status.get("replicas", 0),
        ready=status.get("readyReplicas", 0),
        updated=status.get("updatedReplicas", 0),
        is_current=observed >= generation,
        refusal=failure.get("message", "") if failure.get("status") == "True" else "",
        is_stuck=progress.get("reason") == "ProgressDeadlineExceeded",
    )
