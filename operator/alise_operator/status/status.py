"""The whole of `.status`, and the events that tell of its transitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from alise_operator.api.service import ALISEServiceSpec
from alise_operator.api.status import ResolvedImages
from alise_operator.manifests.network import url
from alise_operator.manifests.service_view import SERVICE_LABEL, ServiceView
from alise_operator.status.conditions import Verdict, conditions, invalid_spec
from alise_operator.status.failures import Failure, failures_of, latest
from alise_operator.status.observation import Observation

Status: TypeAlias = dict[str, Any]

_MAX_REASON: Final = 128
_MAX_MESSAGE: Final = 2048
_IDENTITY: Final = ("pod", "container", "reason")


@dataclass(frozen=True, slots=True)
class Announcement:
    """An event to post on the ALISEService."""

    type: str
    """Normal or Warning."""
    reason: str
    message: str


def service_status(
    service: ServiceView, seen: Observation, previous: Mapping[str, Any], now: str
) -> Status:
    """Return the status of a service with a valid spec.

    `previous` is the status so far: times of conditions that did not flip, and the last failure,
    are kept. `now` is RFC 3339.
    """
    spec: ALISEServiceSpec = service.spec
    status: Status = {
        **_seen(seen, previous, now),
        "selector": f"{SERVICE_LABEL}={service.name}",
        "url": url(service),
        "conditions": dated(conditions(spec, seen), previous, now, seen.generation),
    }
    # While it is paused, what runs is what was chosen before.
    images = previous.get("resolvedImages") if spec.paused else images_status(service.images)
    return {**status, "resolvedImages": images} if images else status


def invalid_status(
    message: str, seen: Observation, previous: Mapping[str, Any], now: str
) -> Status:
    """Return the status of a service whose spec cannot be read, for the reason `message`."""
    verdicts = dated(invalid_spec(message, seen), previous, now, seen.generation)
    return {**previous, **_seen(seen, previous, now), "conditions": verdicts}


def _seen(seen: Observation, previous: Mapping[str, Any], now: str) -> Status:
    """Return the part of the status that follows from pods and workload alone."""
    failures = [failure for pod in seen.pods for failure in failures_of(pod)]
    last = _last_failure(latest(failures, now), previous.get("lastFailure"), now)
    return {
        "observedGeneration": seen.generation,
        "replicas": seen.workload.replicas,
        "readyReplicas": seen.workload.ready,
        "updatedReplicas": seen.workload.updated,
        **({"lastFailure": last} if last else {}),
    }


def images_status(images: ResolvedImages) -> dict[str, str]:
    """Return pinned images as status holds them."""
    return images.model_dump(by_alias=True)


def dated(
    verdicts: Iterable[Verdict], previous: Mapping[str, Any], now: str, generation: int
) -> list[dict[str, Any]]:
    """Return conditions; the time of one whose status is as before is kept.

    Conditions that have no verdict this time stay as they were.
    """
    before = {item["type"]: item for item in previous.get("conditions") or ()}
    after = dict(before)
    for verdict in verdicts:
        old = before.get(verdict.type)
        is_same = old is not None and old["status"] == verdict.status
        after[verdict.type] = {
            "type": verdict.type,
            "status": verdict.status,
            "reason": verdict.reason,
            "message": verdict.message,
            "lastTransitionTime": old["lastTransitionTime"] if old and is_same else now,
            "observedGeneration": generation,
        }
    return list(after.values())


def _last_failure(
    failure: Failure | None, known: dict[str, Any] | None, now: str
) -> dict[str, Any] | None:
    if failure is None:
        return known
    found: dict[str, Any] = {
        "pod": failure.pod,
        "container": failure.container,
        "reason": failure.reason[:_MAX_REASON],
        "message": failure.message[:_MAX_MESSAGE],
    }
    if failure.exit_code is not None:
        found["exitCode"] = failure.exit_code
    same = known if known and all(known.get(name) == found[name] for name in _IDENTITY) else {}
    found["time"] = failure.time or same.get("time") or now
    # The pod of a later one may be gone, while one that failed before is still there.
    return known if known and known.get("time", "") > found["time"] else found


def announcements(previous: Mapping[str, Any], status: Status) -> list[Announcement]:
    """Return events for the conditions Ready, Degraded and IntegrationsReady that changed."""
    before = {item["type"]: item for item in previous.get("conditions") or ()}
    found = []
    for condition in status["conditions"]:
        old = before.get(condition["type"], {"status": "", "reason": ""})
        if (old["status"], old["reason"]) == (condition["status"], condition["reason"]):
            continue
        holds = condition["status"] == "True"
        match condition["type"]:
            case "Ready" if holds:
                found.append(Announcement("Normal", "Ready", condition["message"]))
            case "Degraded" if holds:
                found.append(Announcement("Warning", condition["reason"], condition["message"]))
            case "Degraded" if old["status"] == "True":
                found.append(Announcement("Normal", "Recovered", "nothing is wrong any more"))
            case "IntegrationsReady" if not holds:
                found.append(Announcement("Warning", condition["reason"], condition["message"]))
    return found
