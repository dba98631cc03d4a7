"""What must change so that the children are as wanted: a pure comparison of desired and live.

Two things differ from plain server-side apply. Children that are as wanted are left alone, so a
steady state makes no requests. And the pod template of a workload whose inputs did not change is
kept as it was applied, so that a new version of the operator, which may render it differently,
restarts no pods by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from alise_operator.api.base import GROUP
from alise_operator.manifests.kinds import DEPLOYMENT, LWS, WORKLOADS, Kind, Manifest, kind_of
from alise_operator.manifests.merge import contains
from alise_operator.manifests.service_view import ServiceView

APPLIED: Final = f"{GROUP}/applied"
"""Annotation: hash of the manifest that was applied; tells when a field is no longer wanted."""
INPUTS: Final = f"{GROUP}/pod-inputs"
"""Annotation of workloads: hash of all that the user chose and that pods depend on."""
TEMPLATE: Final = f"{GROUP}/pod-template"
"""Annotation of workloads: the pod template as it was applied."""

_TEMPLATE_KEYS: Final = {DEPLOYMENT: "template", LWS: "leaderWorkerTemplate"}
_POD_FIELDS: Final = {
    "model",
    "engine",
    "kv_swap",
    "predictor",
    "speculative_decoding",
    "lora",
    "lifecycle",
    "placement",
    "image_pull_secrets",
    "pod_template",
}


@dataclass(frozen=True, slots=True)
class Child:
    """A live child, as the store keeps it: without managedFields, and status for workloads only."""

    kind: Kind
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the object."""
        return str(self.body["metadata"]["name"])

    @property
    def uid(self) -> str:
        """Identity of the object."""
        return str(self.body["metadata"]["uid"])

    def is_controlled_by(self, uid: str) -> bool:
        """Say whether the owner with this uid controls it."""
        owners = self.body["metadata"].get("ownerReferences") or ()
        return any(owner.get("controller") and owner["uid"] == uid for owner in owners)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do."""

    apply: tuple[Manifest, ...]
    delete: tuple[Child, ...]


def plan(service: ServiceView, desired: Iterable[Manifest], live: Collection[Child]) -> Plan:
    """Return what to apply and what to delete."""
    found = {(child.kind, child.name): child for child in live}
    wanted = set()
    apply = []
    for manifest in desired:
        kind, name = kind_of(manifest), manifest["metadata"]["name"]
        wanted.add((kind, name))
        child = found.get((kind, name))
        marked = _marked(service, manifest, child)
        if child is None or not contains(child.body, marked):
            apply.append(marked)
    stale = [
        child
        for key, child in found.items()
        if key not in wanted and child.is_controlled_by(service.uid)
    ]
    return Plan(tuple(apply), tuple(stale))


def keeps_pods(service: ServiceView, live: Iterable[Child]) -> bool:
    """Say whether the pods may stay: their workload was applied with the same inputs."""
    inputs = pod_inputs(service)
    return any(
        (child.body["metadata"].get("annotations") or {}).get(INPUTS) == inputs
        for child in live
        if child.kind in WORKLOADS
    )


def digest(value: Any) -> str:
    """Return a short hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pod_inputs(service: ServiceView) -> str:
    """Return a hash of all that pods depend on and a user can choose."""
    spec = service.spec.model_dump(mode="json", include=_POD_FIELDS, exclude_defaults=True)
    preemption = service.spec.scheduling.preemption.model_dump(exclude_defaults=True)
    images = service.images.model_dump()  # with the revision that asks for a restart
    return digest([spec, preemption, images])


def _marked(service: ServiceView, manifest: Manifest, live: Child | None) -> Manifest:
    """Return the manifest with our annotations, and with its old pod template if that may stay."""
    kind = kind_of(manifest)
    metadata = manifest["metadata"]
    annotations = dict(metadata.get("annotations") or {})
    spec = manifest.get("spec")
    if kind in WORKLOADS:
        key, inputs = _TEMPLATE_KEYS[kind], pod_inputs(service)
        spec = {**manifest["spec"], key: _template(manifest["spec"][key], inputs, live)}
        annotations[INPUTS] = inputs
        annotations[TEMPLATE] = json.dumps(spec[key], sort_keys=True, separators=(",", ":"))
    marked = {**manifest, "metadata": {**metadata, "annotations": annotations}}
    if spec is not None:
        marked["spec"] = spec
    annotations[APPLIED] = digest(marked)
    return marked


def _template(rendered: dict[str, Any], inputs: str, live: Child | None) -> Any:
    if live is None:
        return rendered
    annotations = live.body["metadata"].get("annotations") or {}
    if annotations.get(INPUTS) != inputs or TEMPLATE not in annotations:
        return rendered
    return json.loads(annotations[TEMPLATE])
