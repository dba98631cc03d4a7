"""Where the engine finds the weights: an argument for vLLM, volumes and mounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from alise_operator.api.model import EMBEDDED
from alise_operator.manifests.service_view import ServiceView

CACHE_DIR: Final = "/var/cache/alise"
_MODEL_DIR: Final = "/models"
_ADAPTERS_DIR: Final = "/adapters"


@dataclass(frozen=True, slots=True)
class Weights:
    """How weights reach the engine."""

    arguments: tuple[str, ...]
    volumes: tuple[dict[str, Any], ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()


def base_model(service: ServiceView) -> Weights:
    """Return the model argument, which comes first, and what must be mounted for it."""
    model = service.spec.model
    if model.uri == EMBEDDED:
        return Weights(())  # what `alise serve` takes, with options that suit it
    scheme, _, rest = model.uri.partition("://")
    if scheme == "hf":
        revision = ("--revision", model.revision) if model.revision else ()
        return Weights((rest, *revision), (_cache_volume(service),), (_mount("cache", CACHE_DIR),))
    if scheme == "s3":  # streamed from the bucket into the accelerator, nothing on disk
        return Weights((model.uri, "--load-format", "runai_streamer"))
    mounts = (_mount("model", _MODEL_DIR, read_only=True),)
    if scheme == "oci":
        source = {"reference": rest, "pullPolicy": service.spec.engine.image_pull_policy}
        return Weights((_MODEL_DIR,), ({"name": "model", "image": source},), mounts)
    claim, _, path = rest.partition("/")
    return Weights((_join(_MODEL_DIR, path),), (_claim_volume("model", claim),), mounts)


def adapters(service: ServiceView) -> Weights:
    """Return the options that serve the LoRA adapters, and what must be mounted for them."""
    lora = service.spec.lora
    if lora is None:
        return Weights(())
    modules, volumes, mounts = [], [], []
    for index, adapter in enumerate(lora.adapters):
        scheme, _, rest = adapter.uri.partition("://")
        if scheme == "pvc":
            claim, _, path = rest.partition("/")
            folder = f"{_ADAPTERS_DIR}/{adapter.name}"
            volumes.append(_claim_volume(f"adapter-{index}", claim))
            mounts.append(_mount(f"adapter-{index}", folder, read_only=True))
            rest = _join(folder, path)
        modules.append(f"{adapter.name}={rest}")
    options = ["--enable-lora", "--max-lora-rank", str(lora.max_rank)]
    options += ["--max-loras", str(lora.max_loaded), "--lora-modules", *modules]
    return Weights(tuple(options), tuple(volumes), tuple(mounts))


def _cache_volume(service: ServiceView) -> dict[str, Any]:
    if claim := service.cache_claim:
        return {"name": "cache", "persistentVolumeClaim": {"claimName": claim}}
    return {"name": "cache", "emptyDir": {}}


def _claim_volume(name: str, claim: str) -> dict[str, Any]:
    return {"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}


def _mount(name: str, path: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def _join(folder: str, path: str) -> str:
    return f"{folder}/{path}" if path else folder
