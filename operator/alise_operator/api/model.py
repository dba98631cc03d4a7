"""`spec.model`: which weights are served, under which name, and where they are cached."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from alise_operator.api.base import ApiModel, Name, SecretKeyRef, rules

EMBEDDED: Final = "embedded://smollm2-135m-instruct"
"""The model that `alise serve` serves when it is told none."""


class CacheSpec(ApiModel):
    """A volume that keeps downloaded hf:// weights over restarts; other schemes need none."""

    model_config = rules(
        (
            "!oldSelf.enabled || !self.enabled || self.sizeGiB >= oldSelf.sizeGiB",
            "model.cache.sizeGiB cannot shrink: set it to the old size or more, "
            "or disable the cache first (that deletes it)",
        ),
        (
            "!oldSelf.enabled || !self.enabled || (self.accessMode == oldSelf.accessMode && "
            "has(self.storageClassName) == has(oldSelf.storageClassName) && "
            "(!has(self.storageClassName) || self.storageClassName == oldSelf.storageClassName))",
            "model.cache.accessMode and storageClassName are immutable: "
            "disable the cache first (that deletes it), then enable it with the new values",
        ),
    )

    enabled: bool = True
    """Keep the weights on a volume; otherwise each pod downloads them again."""
    size_gib: Annotated[int, Field(ge=1, le=65536)] = 100
    """Size of the volume in GiB; may grow if the storage class allows it."""
    storage_class_name: Name | None = None
    """Storage class of the volume; the cluster's default if unset."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = "ReadWriteOnce"
    """ReadWriteOnce keeps all replicas on one node; with more nodes use ReadWriteMany."""
    existing_claim: Name | None = None
    """A PersistentVolumeClaim of yours to use instead; it outlives the ALISEService."""


class ModelSpec(ApiModel):
    """The model to serve."""

    model_config = rules(
        (
            "self.uri.startsWith('hf://') || self.uri.startsWith('s3://') || "
            "self.uri.startsWith('pvc://') || self.uri.startsWith('oci://') || "
            f"self.uri == '{EMBEDDED}'",
            "model.uri must start with hf://, s3://, pvc:// or oci://, "
            "for example hf://Qwen/Qwen2.5-7B-Instruct, "
            f"or be {EMBEDDED}, the model in the engine's image",
        ),
        (
            "!self.uri.startsWith('hf://') || self.uri.matches('^hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$')",
            "a model of the hub is written hf://ORGANISATION/NAME; "
            "its revision goes to model.revision",
        ),
        (
            "!self.uri.startsWith('pvc://') || "
            "(self.uri.matches('^pvc://[a-z0-9][a-z0-9.-]*(/.*)?$') && !self.uri.contains('..'))",
            "a model on a volume is written pvc://CLAIM/PATH, with no `..` in the path",
        ),
        (
            "!has(self.revision) || self.uri.startsWith('hf://')",
            "model.revision is for hf:// only: remove it, or put the version into model.uri",
        ),
        (
            "has(self.servedName) == has(oldSelf.servedName) && "
            "(!has(self.servedName) || self.servedName == oldSelf.servedName)",
            "model.servedName is immutable, as clients ask for the model by it: "
            "create another ALISEService for another name",
        ),
    )

    uri: Annotated[str, Field(min_length=6, max_length=512)]
    """Where the weights are: hf://ORGANISATION/NAME, s3://BUCKET/PATH, pvc://CLAIM/PATH or
    oci://IMAGE; or embedded://smollm2-135m-instruct, the small model in the engine's CPU image."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of a hf:// model; a commit makes restarts reproducible."""
    served_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """The name that clients ask for; by default the URI without its scheme. Immutable."""
    token_secret_ref: SecretKeyRef | None = None
    """Token for a gated hf:// model."""
    cache: CacheSpec = CacheSpec()
    """Volume that keeps the weights over restarts."""
