"""What engine and predictor share: security, volumes for everything that is written, resources."""

from __future__ import annotations

import math
from typing import Any, Final

from alise_operator.api.base import Resources
from alise_operator.api.service import ALISEServiceSpec

RUN_DIR: Final = "/run/alise"
SOCKET: Final = f"unix://{RUN_DIR}/scheduler.sock"
HOME_DIR: Final = "/home/alise"

# The socket is its owner's alone, so engine and predictor run as the same user.
USER_ID: Final = 10001
POD_SECURITY: Final[dict[str, Any]] = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Final[dict[str, Any]] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
MESSAGES: Final = {"terminationMessagePolicy": "FallbackToLogsOnError"}

_KV_HEADROOM: Final = 1.1  # pinned host memory is allocated in blocks, with some book-keeping


def memory_gib(spec: ALISEServiceSpec) -> int:
    """Return the engine's memory in GiB: its own, /dev/shm, and the KV host tier with headroom.

    A memory-backed volume and pinned host memory both count against the container's limit.
    """
    tier = math.ceil(spec.kv_swap.host_gib * _KV_HEADROOM) if spec.kv_swap.enabled else 0
    return spec.engine.resources.memory_gib + spec.engine.shm_gib + tier


def resources(
    wanted: Resources, memory: int, devices: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return requests and limits: memory is the same in both, CPU is not limited."""
    fixed = {"memory": gib(memory), **(devices or {})}
    return {"requests": {"cpu": _cores(wanted.cpu), **fixed}, "limits": fixed}


def gib(amount: int) -> str:
    """Return a quantity as the API server writes it, so that it compares equal to the live one."""
    return f"{amount // 1024}Ti" if amount % 1024 == 0 else f"{amount}Gi"


def _cores(cpu: str) -> str:
    return cpu.removesuffix("000m") if cpu.endswith("000m") else cpu


def mount(name: str, path: str, **more: Any) -> dict[str, Any]:
    """Return a volume mount."""
    return {"name": name, "mountPath": path, **more}


def claim_volume(name: str, claim: str) -> dict[str, Any]:
    """Return a volume of the user's claim, which is only read."""
    return {"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}


def variables(values: dict[str, str]) -> list[dict[str, Any]]:
    """Return environment variables as Kubernetes writes them."""
    return [{"name": name, "value": value} for name, value in values.items()]
