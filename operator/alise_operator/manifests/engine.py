"""The engine container: `alise serve` with vLLM's options."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from alise_operator.api.service import ALISEServiceSpec
from alise_operator.manifests import model
from alise_operator.manifests.container import (
    CONTAINER_SECURITY,
    HOME_DIR,
    MESSAGES,
    RUN_DIR,
    SOCKET,
    memory_gib,
    mount,
    resources,
    variables,
)
from alise_operator.manifests.service_view import HTTP_PORT, ServiceView

ENGINE: Final = "engine"
PRE_STOP_S: Final = 5
"""Endpoints are updated everywhere in this time; requests still arrive meanwhile."""
_STARTUP_PERIOD_S: Final = 2
"""Asking costs nothing, and half of it is what a start takes longer on average."""
_BESIDE_WORKER_GIB: Final = 2
"""On the CPU: API server, engine core and launcher take 1.1 GiB before the first request."""

# Everything that wants to write somewhere, as the root file system is read-only and the user has
# no entry in /etc/passwd.
_PATHS: Final = {
    "HOME": HOME_DIR,
    "USER": "alise",
    "XDG_CACHE_HOME": f"{HOME_DIR}/.cache",
    "HF_HOME": f"{model.CACHE_DIR}/huggingface",
    "VLLM_CACHE_ROOT": f"{HOME_DIR}/.cache/vllm",
    "TORCHINDUCTOR_CACHE_DIR": f"{HOME_DIR}/.cache/torchinductor",
    "TRITON_CACHE_DIR": f"{HOME_DIR}/.cache/triton",
    "FLASHINFER_WORKSPACE_BASE": HOME_DIR,
    "VLLM_NO_USAGE_STATS": "1",
}


def engine_container(service: ServiceView, *, is_worker: bool = False) -> dict[str, Any]:
    """Return the container; a worker of a group that spans nodes answers no HTTP."""
    spec = service.spec
    serving = {} if is_worker else _serving(service)
    return {
        "name": ENGINE,
        "image": service.images.engine,
        "imagePullPolicy": spec.engine.image_pull_policy,
        "command": ["alise", "serve"],
        "args": engine_arguments(service, is_worker=is_worker),
        "env": _environment(service),
        "resources": resources(spec.engine.resources, memory_gib(spec), _devices(service)),
        "volumeMounts": [
            mount("run", RUN_DIR),
            mount("home", HOME_DIR),
            mount("tmp", "/tmp"),  # noqa: S108 # an emptyDir of the pod
            mount("shm", "/dev/shm"),  # noqa: S108
            mount("cache", model.CACHE_DIR),
            *model.base_model(service).mounts,
            *model.adapters(service).mounts,
        ],
        "securityContext": CONTAINER_SECURITY,
        **MESSAGES,
        **serving,
    }


def engine_arguments(service: ServiceView, *, is_worker: bool = False) -> list[str]:
    """Return the arguments of `alise serve`."""
    spec = service.spec
    engine, preemption = spec.engine, spec.scheduling.preemption
    arguments = [*model.base_model(service).arguments]
    arguments += ["--host", "0.0.0.0", "--port", str(HTTP_PORT)]  # noqa: S104 # in the pod
    arguments += ["--served-model-name", service.served_name]
    arguments += ["--alise-scheduler", SOCKET, "--alise-shared-dir", RUN_DIR]
    arguments += ["--alise-drain-s", str(spec.lifecycle.drain_seconds)]
    arguments += ["--alise-preemption" if preemption.enabled else "--no-alise-preemption"]
    if preemption.margin_seconds is not None:
        arguments += ["--alise-preemption-margin-s", str(preemption.margin_seconds)]
    # Said even when it is off: the engine's own default is a tier that the pod's memory lacks.
    host_gib = spec.kv_swap.host_gib if spec.kv_swap.enabled else 0
    arguments += ["--alise-kv-host-gib", str(host_gib)]
    arguments += ["--alise-kv-quantization", spec.kv_swap.quantization]
    if engine.max_model_len is not None:
        arguments += ["--max-model-len", str(engine.max_model_len)]
    arguments += ["--gpu-memory-utilization", _memory_share(spec)]
    if engine.parallelism.tensor > 1:
        arguments += ["--tensor-parallel-size", str(engine.parallelism.tensor)]
    if engine.parallelism.pipeline > 1:
        arguments += ["--pipeline-parallel-size", str(engine.parallelism.pipeline)]
    if engine.kv_cache_dtype != "auto":
        arguments += ["--kv-cache-dtype", engine.kv_cache_dtype]
    arguments += model.adapters(service).arguments
    arguments += _speculation(service)
    arguments += _group(service, is_worker=is_worker)
    return [*arguments, *engine.args]


def _memory_share(spec: ALISEServiceSpec) -> str:
    """Return the share of a device's memory that vLLM may take, weights and KV cache together.

    On the CPU it is a share of the container's limit, and bounds the worker process alone. Of that
    limit, /dev/shm and the host tier have their parts, and so have the other processes; what the
    percentage leaves is for large batches, which vLLM measures on accelerators only.
    """
    share = spec.engine.gpu_memory_utilization_percent / 100
    if spec.engine.accelerator.count:
        return f"{share:.2f}"
    worker_gib = spec.engine.resources.memory_gib * share - _BESIDE_WORKER_GIB
    # vLLM takes no share of 0; one that is too small for the weights ends its start with a message.
    return f"{max(worker_gib / memory_gib(spec), 0.001):.3f}"


def _speculation(service: ServiceView) -> list[str]:
    wanted = service.spec.speculative_decoding
    if wanted is None:
        return []
    config: dict[str, object] = {
        "method": wanted.method,
        "num_speculative_tokens": wanted.num_speculative_tokens,
    }
    if wanted.method == "ngram":
        config["prompt_lookup_max"] = wanted.prompt_lookup_max
    else:
        config["model"] = wanted.model
    return ["--speculative-config", json.dumps(config)]


def _group(service: ServiceView, *, is_worker: bool) -> list[str]:
    if service.nodes == 1:
        return []
    # LeaderWorkerSet sets these variables; the kubelet expands $(...) in arguments.
    arguments = ["--nnodes", str(service.nodes), "--node-rank", "$(LWS_WORKER_INDEX)"]
    arguments += ["--master-addr", "$(LWS_LEADER_ADDRESS)"]
    return [*arguments, "--headless"] if is_worker else arguments


def _environment(service: ServiceView) -> list[dict[str, Any]]:
    environment = variables(_PATHS)
    if service.nodes == 1:
        # torch's Gloo listens where the pod's name leads, the pod's address: open to other pods.
        environment += variables({"GLOO_SOCKET_IFNAME": "lo"})
    if token := service.spec.model.token_secret_ref:
        reference = {"secretKeyRef": {"name": token.name, "key": token.key}}
        environment.append({"name": "HF_TOKEN", "valueFrom": reference})
    own = [item.model_dump(by_alias=True, exclude_none=True) for item in service.spec.engine.env]
    names = {item["name"] for item in own}
    return [item for item in environment if item["name"] not in names] + own


def _devices(service: ServiceView) -> dict[str, str]:
    accelerator = service.spec.engine.accelerator
    if not accelerator.count:
        return {}
    return {accelerator.resource_name: str(accelerator.count // service.nodes)}


def _serving(service: ServiceView) -> dict[str, Any]:
    """Return port, probes and drain of a container that answers HTTP."""
    health = {"httpGet": {"path": "/health", "port": "http"}}
    attempts = math.ceil(service.spec.lifecycle.startup_timeout_seconds / _STARTUP_PERIOD_S)
    starting = {"periodSeconds": _STARTUP_PERIOD_S, "failureThreshold": attempts}
    return {
        "ports": [{"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"}],
        "startupProbe": {**health, **starting, "timeoutSeconds": 5},
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {
            **health,
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": 6,
        },
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_S}}},
    }
