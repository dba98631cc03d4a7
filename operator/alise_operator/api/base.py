"""What all API models share: naming, immutability, CEL rules and bounded strings.

Knows pydantic and the conventions of Kubernetes' APIs, but none of our fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

GROUP: Final = "serving.alise.dev"
VERSION: Final = "v1alpha1"
KIND: Final = "ALISEService"
PLURAL: Final = "aliseservices"


def _alias(name: str) -> str:
    return to_camel(name).replace("Gib", "GiB")


class ApiModel(BaseModel):
    """Base of all API models: frozen, camelCase outside, unknown fields are the API server's."""

    model_config = ConfigDict(
        frozen=True,
        alias_generator=_alias,
        populate_by_name=True,
        extra="ignore",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def rules(*pairs: tuple[str, str]) -> ConfigDict:
    """Return a model's configuration with CEL rules: pairs of rule and message."""
    validations = [{"rule": rule, "message": message} for rule, message in pairs]
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": validations})  # type: ignore[dict-item]


def keyed_by(*keys: str) -> dict[str, Any]:
    """Return the schema of a list that server-side apply merges by these keys."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


ATOMIC: Final[dict[str, Any]] = {"x-kubernetes-list-type": "atomic"}

Name = Annotated[str, Field(min_length=1, max_length=253)]
"""The name of another object."""
Text = Annotated[str, Field(max_length=1024)]
Image = Annotated[str, Field(min_length=1, max_length=512)]
LabelValue = Annotated[str, Field(max_length=63)]
Labels = Annotated[dict[str, LabelValue], Field(max_length=32)]
Annotations = Annotated[dict[str, Text], Field(max_length=32)]
Cpu = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}m?$", max_length=8)]
RawObject = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""Kubernetes' own types, checked when the API server sees the object that they end up in."""


class LocalObjectReference(ApiModel):
    """An object of the same namespace."""

    name: Name
    """Name of the object."""


class SecretKeyRef(ApiModel):
    """One key of a Secret of the same namespace; the operator never reads it."""

    name: Name
    """Name of the Secret."""
    key: Name = "token"
    """Key in the Secret."""


class ConfigMapKeyRef(ApiModel):
    """One key of a ConfigMap of the same namespace."""

    name: Name
    """Name of the ConfigMap."""
    key: Name
    """Key in the ConfigMap."""


class FieldRef(ApiModel):
    """A field of the pod."""

    field_path: Name
    """Path of the field, such as `status.podIP`."""


class EnvSource(ApiModel):
    """Where a variable's value comes from."""

    model_config = rules(
        (
            "[has(self.secretKeyRef), has(self.configMapKeyRef), has(self.fieldRef)]"
            ".filter(x, x).size() == 1",
            "valueFrom needs exactly one of secretKeyRef, configMapKeyRef and fieldRef",
        )
    )

    secret_key_ref: SecretKeyRef | None = None
    """A key of a Secret."""
    config_map_key_ref: ConfigMapKeyRef | None = None
    """A key of a ConfigMap."""
    field_ref: FieldRef | None = None
    """A field of the pod."""


class EnvVar(ApiModel):
    """An environment variable: a value, or a reference to one."""

    model_config = rules(
        (
            "!(has(self.value) && has(self.valueFrom))",
            "an environment variable takes value or valueFrom: remove one of them",
        )
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value, in plain text: for secrets use valueFrom."""
    value_from: EnvSource | None = None
    """Reference to its value."""


class Resources(ApiModel):
    """What a container asks of its node."""

    cpu: Cpu
    """CPU request, in cores (`4`) or thousandths (`500m`); there is no CPU limit."""
    memory_gib: Annotated[int, Field(ge=1, le=16384)]
    """Memory of the container's own, request and limit, in GiB."""


def names(items: Sequence[LocalObjectReference]) -> list[dict[str, str]]:
    """Return references as Kubernetes writes them."""
    return [{"name": item.name} for item in items]
