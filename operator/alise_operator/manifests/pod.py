"""The pod: predictor beside engine, the volumes between them, and who may end it when."""

from __future__ import annotations

from typing import Any

from alise_operator.api.base import GROUP, names
from alise_operator.manifests import model
from alise_operator.manifests.container import POD_SECURITY, claim_volume, gib
from alise_operator.manifests.engine import PRE_STOP_S, engine_container
from alise_operator.manifests.merge import merged
from alise_operator.manifests.predictor import predictor_container, seed_container
from alise_operator.manifests.service_view import ServiceView

# `alise serve` gives vLLM 15 s beyond the drain, and then ends the rest.
_AFTER_DRAIN_S = 25


def grace_period_s(service: ServiceView) -> int:
    """Return a grace period longer than preStop and drain together, seconds."""
    return PRE_STOP_S + service.spec.lifecycle.drain_seconds + _AFTER_DRAIN_S


def pod_template(service: ServiceView, *, is_worker: bool = False) -> dict[str, Any]:
    """Return the template of a pod; a worker of a group that spans nodes has no sidecar."""
    spec = service.spec
    wanted = spec.pod_template
    annotations = {**wanted.annotations}
    if spec.rollout.revision:
        annotations[f"{GROUP}/revision"] = spec.rollout.revision
    own = {
        "metadata": {
            "labels": {**wanted.labels, **service.labels},
            **({"annotations": annotations} if annotations else {}),
        },
        "spec": _pod_spec(service, is_worker=is_worker),
    }
    return merged(own, {"spec": wanted.spec or {}})  # type: ignore[no-any-return]


def _pod_spec(service: ServiceView, *, is_worker: bool) -> dict[str, Any]:
    spec = service.spec
    initial = [] if is_worker else [seed_container(service), predictor_container(service)]
    pod: dict[str, Any] = {
        "serviceAccountName": service.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        "terminationGracePeriodSeconds": grace_period_s(service),
        "initContainers": [container for container in initial if container],
        "containers": [engine_container(service, is_worker=is_worker)],
        "volumes": _volumes(service, is_worker=is_worker),
    }
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = names(spec.image_pull_secrets)
    return {**pod, **_placement(service)}


def _volumes(service: ServiceView, *, is_worker: bool) -> list[dict[str, Any]]:
    spec = service.spec
    shm = {"medium": "Memory", "sizeLimit": gib(spec.engine.shm_gib)}
    volumes: list[dict[str, Any]] = [
        {"name": "run", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "home", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": shm},
        model.cache_volume(service),
        *model.base_model(service).volumes,
        *model.adapters(service).volumes,
    ]
    if is_worker:
        return volumes
    volumes += [
        {"name": "state", "emptyDir": {}},
        {"name": "policy", "configMap": {"name": service.policy_config_map}},
    ]
    if reference := spec.predictor.model_ref:
        volumes.append(claim_volume("seed", reference.claim_name))
    return volumes


def _placement(service: ServiceView) -> dict[str, Any]:
    wanted = service.spec.placement.model_dump(by_alias=True, exclude_none=True)
    wanted["tolerations"] = list(wanted["tolerations"])
    return {name: value for name, value in wanted.items() if value}
