"""What keeps the pods running: a Deployment, or a LeaderWorkerSet where a replica spans nodes."""

from __future__ import annotations

from alise_operator.manifests.kinds import DEPLOYMENT, LWS, Manifest
from alise_operator.manifests.pod import pod_template
from alise_operator.manifests.service_view import ServiceView, child

_AFTER_START_S = 600  # scheduling and pulling of images, before a start begins


def workload(service: ServiceView) -> Manifest:
    """Return the Deployment or LeaderWorkerSet."""
    return _deployment(service) if service.nodes == 1 else _leader_worker_set(service)


def _deployment(service: ServiceView) -> Manifest:
    spec = service.spec
    deadline_s = spec.lifecycle.startup_timeout_seconds + _AFTER_START_S
    return child(
        service,
        DEPLOYMENT,
        service.name,
        spec={
            "replicas": spec.replicas,
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": deadline_s,
            "selector": {"matchLabels": service.selector},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling(service)},
            "template": pod_template(service),
        },
    )


def _leader_worker_set(service: ServiceView) -> Manifest:
    strategy = {"type": "RollingUpdate", "rollingUpdateConfiguration": _rolling(service)}
    return child(
        service,
        LWS,
        service.name,
        spec={
            "replicas": service.spec.replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": strategy,
            "leaderWorkerTemplate": {
                "size": service.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": pod_template(service),
                "workerTemplate": pod_template(service, is_worker=True),
            },
        },
    )


def _rolling(service: ServiceView) -> dict[str, int]:
    wanted = service.spec.rollout
    return {"maxSurge": wanted.max_surge, "maxUnavailable": wanted.max_unavailable}
