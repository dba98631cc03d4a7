"""From pydantic's JSON schema to the structural schema that a CRD takes.

Inlines references, and drops what structural schemas do not know. Knows no field of ours.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pydantic import BaseModel

Schema: TypeAlias = dict[str, Any]

_DROPPED = ("title", "$defs", "const", "anyOf", "default")


def structural_schema(model: type[BaseModel]) -> Schema:
    """Return the structural schema of `model` (apiextensions.k8s.io/v1)."""
    source = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(source, source.get("$defs", {}))


def _structural(source: Schema, definitions: Schema) -> Schema:
    node = _resolved(source, definitions)
    result: Schema = {}
    for key, value in node.items():
        if key == "properties":
            result[key] = {name: _structural(item, definitions) for name, item in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            result[key] = _structural(value, definitions)
        elif key not in _DROPPED:
            result[key] = value
    if "const" in node:
        result["enum"] = [node["const"]]
    if result.get("type") == "integer":
        result.setdefault("format", "int32")
    if (default := _without_nulls(node.get("default"))) is not None:
        result["default"] = default
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    return dict(sorted(result.items()))


def _resolved(source: Schema, definitions: Schema) -> Schema:
    """Follow a reference and an optional's `anyOf`; what stands beside them wins."""
    node = dict(source)
    if "anyOf" in node:
        (inner,) = [item for item in node.pop("anyOf") if item.get("type") != "null"]
        node = {**_resolved(inner, definitions), **node}
    if "$ref" in node:
        name = node.pop("$ref").rpartition("/")[2]
        node = {**_resolved(definitions[name], definitions), **node}
    return node


def _without_nulls(default: Any) -> Any:
    """Leave out of a default what is unset; the rest stays, as CEL rules are checked against it."""
    if not isinstance(default, dict):
        return default
    kept = {name: _without_nulls(value) for name, value in default.items() if value is not None}
    return {name: value for name, value in kept.items() if value != {}}
