"""Why a pod does not serve, in words that a user can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from alise_operator.manifests.engine import ENGINE
from alise_operator.status.pods import ContainerState, Ended, PodState

_MAX_MESSAGE: Final = 1024
_PULL_REASONS: Final = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
}
_CONFIG_REASONS: Final = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
# What the log's tail gives away about a crash: (pattern, reason), the first that matches counts.
_CRASHES: Final = (
    (
        re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|No available memory for the cache"),
        "AcceleratorOutOfMemory",
    ),
    (
        re.compile(
            r"GatedRepoError|RepositoryNotFoundError|RevisionNotFoundError|HfHubHTTPError"
            r"|LocalEntryNotFoundError|OfflineModeIsEnabled|No space left on device"
            r"|Invalid repository ID or local directory"
        ),
        "ModelDownloadFailed",
    ),
)
# A process that handles SIGTERM ends with 0; one that does not, with 137 or 143.
_AFTER_SIGNAL: Final = {0, 137, 143}
_SIGKILL: Final = 137


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure of one pod."""

    pod: str
    container: str
    """Empty when the pod itself failed."""
    reason: str
    message: str
    exit_code: int | None = None
    time: str | None = None
    """When it happened, as Kubernetes writes times; None: it goes on."""


def failures_of(pod: PodState) -> list[Failure]:
    """Return what is wrong with `pod` now, the worst first."""
    if pod.is_ending:
        return []
    if pod.unschedulable:
        return [Failure(pod.name, "", "Unschedulable", pod.unschedulable)]
    if pod.has_failed:
        reason = pod.reason or "PodFailed"
        return [Failure(pod.name, "", reason, pod.message, time=pod.changed or None)]
    found = [failure for item in pod.containers if (failure := _failure(pod, item))]
    return sorted(found, key=lambda failure: failure.container != ENGINE)


def latest(failures: Iterable[Failure], now: str) -> Failure | None:
    """Return the latest failure; of several that go on `now`, the first."""
    return max(failures, key=lambda failure: failure.time or now, default=None)


def _failure(pod: PodState, container: ContainerState) -> Failure | None:
    if container.waiting_reason in _PULL_REASONS:
        return Failure(pod.name, container.name, "ImagePullFailed", container.waiting_message)
    if container.waiting_reason in _CONFIG_REASONS:
        reason = "ContainerConfigError"
        return Failure(pod.name, container.name, reason, container.waiting_message)
    ended = container.ended
    if ended is None or container.is_ready or _has_finished(container, ended):
        return None
    return Failure(
        pod.name,
        container.name,
        _crash_reason(ended),
        _crash_message(ended),
        ended.exit_code,
        ended.time,
    )


def _has_finished(container: ContainerState, ended: Ended) -> bool:
    """Say whether this is an init container that has done its work, not one that is restarted."""
    is_over = not container.is_running and not container.waiting_reason
    return is_over and ended.reason == "Completed" and container.name != ENGINE


def _crash_reason(ended: Ended) -> str:
    if ended.reason == "OOMKilled":
        return "OutOfMemory"
    for pattern, reason in _CRASHES:
        if pattern.search(ended.message):
            return reason
    return "ProbeFailed" if ended.exit_code in _AFTER_SIGNAL else "Crashed"


def _crash_message(ended: Ended) -> str:
    lines = [line.strip() for line in ended.message.splitlines() if line.strip()]
    if ended.reason == "OOMKilled":
        text = "the container used more memory than its limit: raise resources.memoryGiB"
        return text + (f"; last line: {lines[-1]}" if lines else "")
    if lines:
        matching = [line for line in lines if any(p.search(line) for p, _ in _CRASHES)]
        return (matching or lines)[-1][-_MAX_MESSAGE:]
    if ended.exit_code in _AFTER_SIGNAL:
        how = "killed" if ended.exit_code == _SIGKILL else "asked to end"
        return f"the container was {how} from outside, as after a failed startup or liveness probe"
    return f"the container ended with exit status {ended.exit_code} and wrote nothing"
