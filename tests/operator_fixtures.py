"""Builders of the values that the operator's tests start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from alise_operator.api.crd import root_schema
from alise_operator.api.service import ALISEServiceSpec
from alise_operator.api.status import ResolvedImages
from alise_operator.images import DefaultImages
from alise_operator.manifests.service_view import ServiceView
from alise_operator.status.pods import PodState, pod_state

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
IMAGES = DefaultImages("alise/engine:1", "alise/engine-cpu:1", "alise/sidecar:1")
UID = "0a6d2c3e-0000-4000-8000-000000000001"
MINIMAL: dict[str, Any] = {"model": {"uri": "hf://org/model"}}


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())


def merge(base: Any, overlay: Any) -> Any:
    """Lay one spec over another; plain, so that it is no copy of the code under test."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    return {**base, **{name: merge(base.get(name), value) for name, value in overlay.items()}}


def spec(**fields: Any) -> ALISEServiceSpec:
    return ALISEServiceSpec.model_validate(merge(MINIMAL, fields))


def view(name: str = "qwen", namespace: str = "default", **fields: Any) -> ServiceView:
    parsed = spec(**fields)
    engine = IMAGES.engine if parsed.engine.accelerator.count else IMAGES.engine_cpu
    images = ResolvedImages(
        engine=parsed.engine.image or engine,
        predictor=parsed.predictor.image or IMAGES.predictor,
        revision=parsed.rollout.revision,
        accelerated=parsed.engine.accelerator.count > 0,
    )
    return ServiceView(name, namespace, UID, parsed, images)


def service_body(name: str = "qwen", namespace: str = "default", **fields: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.alise.dev/v1alpha1",
        "kind": "ALISEService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": merge(MINIMAL, fields),
    }


def all_rules() -> list[tuple[str, str]]:
    """Return path and message of every CEL rule in the CRD."""

    def walk(path: str, schema: dict[str, Any]):
        for rule in schema.get("x-kubernetes-validations", ()):
            yield path, rule["message"]
        for name, inner in schema.get("properties", {}).items():
            yield from walk(f"{path}.{name}" if path else name, inner)
        if isinstance(schema.get("items"), dict):
            yield from walk(f"{path}[]", schema["items"])

    return list(walk("", root_schema()))


def pod(
    name: str = "qwen-1",
    *,
    engine: dict[str, Any] | None = None,
    predictor: dict[str, Any] | None = None,
    ready: bool = False,
    created: str = "2025-12-31T00:00:00Z",
    **status: Any,
) -> PodState:
    """Return a pod with the given container statuses."""
    body = pod_body(name, engine=engine, predictor=predictor, ready=ready, **status)
    body["metadata"]["creationTimestamp"] = created
    return pod_state(body)


def pod_body(
    name: str = "qwen-1",
    *,
    engine: dict[str, Any] | None = None,
    predictor: dict[str, Any] | None = None,
    ready: bool = False,
    **status: Any,
) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": str(ready)}, *status.pop("conditions", ())]
    body: dict[str, Any] = {
        "metadata": {"name": name, "uid": f"uid-{name}"},
        "status": {"phase": "Running", "conditions": conditions, **status},
    }
    if engine is not None:
        body["status"]["containerStatuses"] = [{"name": "engine", **engine}]
    if predictor is not None:
        body["status"]["initContainerStatuses"] = [{"name": "predictor", **predictor}]
    return json.loads(json.dumps(body))


RUNNING: dict[str, Any] = {"state": {"running": {}}, "started": True, "ready": True}
LOADING: dict[str, Any] = {"state": {"running": {}}, "started": False, "ready": False}


def waiting(why: str, said: str = "", **last: Any) -> dict[str, Any]:
    last_state = {"lastState": {"terminated": last}} if last else {}
    return {"state": {"waiting": {"reason": why, "message": said}}, **last_state}
