"""The scheduler sidecar: a native sidecar, and the ConfigMap with the knobs that it reloads."""

from __future__ import annotations

import json
from typing import Any, Final

from alise_operator.api.scheduling import SchedulingSpec
from alise_operator.manifests.container import (
    CONTAINER_SECURITY,
    MESSAGES,
    RUN_DIR,
    SOCKET,
    mount,
    resources,
)
from alise_operator.manifests.kinds import CONFIG_MAP, Manifest
from alise_operator.manifests.service_view import METRICS_PORT, ServiceView, child

PREDICTOR: Final = "predictor"
STATE_DIR: Final = "/var/lib/alise"
POLICY_DIR: Final = "/etc/alise"
_POLICY_FILE: Final = "policy.json"
# Contents only: the volume's root is root's, so the sidecar's user may not set its mode or times.
# Each file appears whole, and once: after a restart of the node the sidecar's own is newer.
_SEED: Final = """\
import pathlib, shutil, sys
source, target = map(pathlib.Path, sys.argv[1:])
files = [path for path in source.rglob("*") if path.is_file()]
if not files:
    sys.exit(f"no files in {source.name!r}: predictor.modelRef.path must name the folder that "
             "`alise predictor train` wrote")
for path in files:
    copy = target / path.relative_to(source)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_name(copy.name + ".part")
        shutil.copyfile(path, part)
        part.replace(copy)
"""


def predictor_container(service: ServiceView) -> dict[str, Any]:
    """Return the sidecar.

    It has no probe, and what dies or hangs is started again inside of the container: the engine
    serves without it, so it must not hold back the engine's start nor take the pod out of service,
    as a container that is down does.
    """
    wanted = service.spec.predictor
    return {
        "name": PREDICTOR,
        "restartPolicy": "Always",
        "command": [
            *("python3", "-m", "alise_scheduler.supervisor", "--watch-port", str(METRICS_PORT)),
            *("alise", "scheduler"),
        ],
        "args": [
            *("--listen", SOCKET, "--shared-dir", RUN_DIR, "--state-dir", STATE_DIR),
            *("--metrics-address", "0.0.0.0", "--metrics-port", str(METRICS_PORT)),  # noqa: S104
            *("--max-samples", str(wanted.retrain.max_samples)),
            *("--policy-file", f"{POLICY_DIR}/{_POLICY_FILE}"),
        ],
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}],
        **_common(service),
        "volumeMounts": [
            mount("run", RUN_DIR),
            mount("state", STATE_DIR),
            mount("policy", POLICY_DIR, readOnly=True),
            mount("tmp", "/tmp"),  # noqa: S108 # an emptyDir of the pod
        ],
    }


def seed_container(service: ServiceView) -> dict[str, Any] | None:
    """Return the container that copies a trained predictor into the sidecar's folder, if wanted."""
    reference = service.spec.predictor.model_ref
    if reference is None:
        return None
    return {
        "name": "predictor-seed",
        "command": ["python3", "-c", _SEED],
        "args": [f"/seed/{reference.path}", STATE_DIR],
        **_common(service),
        "volumeMounts": [mount("state", STATE_DIR), mount("seed", "/seed", readOnly=True)],
    }


def policy_config_map(service: ServiceView) -> Manifest:
    """Return the knobs that change without a restart."""
    text = json.dumps(policy_knobs(service.spec.scheduling), sort_keys=True)
    return child(service, CONFIG_MAP, service.policy_config_map, data={_POLICY_FILE: text})


def policy_knobs(scheduling: SchedulingSpec) -> dict[str, object]:
    """Return what the sidecar's `--policy-file` holds, in the sidecar's own terms."""
    policy = {
        "Boost": "boost",
        "SpeculativeSRTF": "srtf-aging" if scheduling.aging_seconds else "srtf",
        "MLFQ": "mlfq",
        "FCFS": "fcfs",
    }[scheduling.policy]
    knobs: dict[str, object] = {"policy": policy}
    if scheduling.gamma_milli is not None:
        knobs["gamma"] = scheduling.gamma_milli / 1000
    if scheduling.aging_seconds:
        knobs["aging_s"] = scheduling.aging_seconds
    return knobs


def _common(service: ServiceView) -> dict[str, Any]:
    wanted = service.spec.predictor.resources
    return {
        "image": service.images.predictor,
        "imagePullPolicy": service.spec.engine.image_pull_policy,
        "resources": resources(wanted, wanted.memory_gib),
        "securityContext": CONTAINER_SECURITY,
        **MESSAGES,
    }
