"""What status needs to know of a pod: a small value made from its body."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ended:
    """One end of a container."""

    reason: str
    exit_code: int
    message: str
    time: str | None


@dataclass(frozen=True, slots=True)
class ContainerState:
    """One container of a pod."""

    name: str
    is_ready: bool
    is_running: bool
    has_started: bool
    """Whether its startup probe has succeeded."""
    waiting_reason: str
    waiting_message: str
    ended: Ended | None
    """Its present end, or else the one before the present run."""


@dataclass(frozen=True, slots=True)
class PodState:
    """One pod."""

    name: str
    uid: str
    is_ready: bool
    is_ending: bool
    has_failed: bool
    """Whether it failed as a whole: it runs no more, and stays until it is collected as garbage."""
    reason: str
    """Why the pod as a whole failed, such as Evicted."""
    message: str
    created: str
    """When it was made, as Kubernetes writes times."""
    changed: str
    """When it became ready or ceased to be; before that, when it was made."""
    unschedulable: str
    """Why no node takes it; empty if one did."""
    containers: tuple[ContainerState, ...]

    def container(self, name: str) -> ContainerState | None:
        """Return the container of that name, once the kubelet has reported it."""
        return next((item for item in self.containers if item.name == name), None)


def present_pods(pods: Collection[PodState]) -> tuple[PodState, ...]:
    """Return the pods without those that have failed and been replaced.

    A replacement counts once a node has taken it or none does: one that was only just made tells
    nothing, and may fail like the one before.
    """
    living = [pod for pod in pods if not pod.has_failed and (pod.containers or pod.unschedulable)]
    latest = max((pod.created for pod in living), default="")
    return tuple(pod for pod in pods if not pod.has_failed or pod.created > latest)


def pod_state(body: Mapping[str, Any]) -> PodState:
    """Return what `body` (a core/v1 Pod) says."""
    metadata, status = body["metadata"], body.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or ()}
    scheduled, ready = conditions.get("PodScheduled", {}), conditions.get("Ready", {})
    created = metadata.get("creationTimestamp") or ""
    statuses = [
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ]
    return PodState(
        name=metadata["name"],
        uid=metadata["uid"],
        is_ready=ready.get("status") == "True",
        is_ending="deletionTimestamp" in metadata,
        has_failed=status.get("phase") == "Failed",
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        created=created,
        changed=ready.get("lastTransitionTime") or created,
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        containers=tuple(map(_container_state, statuses)),
    )


def _container_state(status: Mapping[str, Any]) -> ContainerState:
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated")
    return ContainerState(
        name=status["name"],
        is_ready=bool(status.get("ready")),
        is_running="running" in state,
        has_started=bool(status.get("started")),
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        ended=_ended(ended) if ended else None,
    )


def _ended(state: Mapping[str, Any]) -> Ended:
    return Ended(
        reason=state.get("reason", ""),
        exit_code=int(state.get("exitCode", 0)),
        message=state.get("message", ""),
        time=state.get("finishedAt"),
    )
