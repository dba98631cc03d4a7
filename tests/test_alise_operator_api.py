"""The API's models, and what is generated from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from alise_operator.api.crd import FILE_NAME, crd, crd_yaml, root_schema
from alise_operator.api.reference import reference_markdown
from alise_operator.api.service import ALISEServiceSpec
from operator_fixtures import EXAMPLES, ROOT, all_rules, example, spec
from pydantic import ValidationError

# Kubernetes' own types: bounded and checked by the objects that they end up in.
RAW = {"spec.placement.affinity", "spec.podTemplate.spec"}


def nodes(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(f"{path}.{name}".lstrip("."), inner)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(f"{path}[]", schema[key])


FIELDS = [(p, s) for p, s in nodes("", root_schema()) if p.startswith(("spec", "status"))]


def test_the_crd_in_the_repository_is_the_generated_one() -> None:
    text = (ROOT / "crds" / FILE_NAME).read_text()
    assert text == crd_yaml(), f"run: alise operator crd > crds/{FILE_NAME}"


def test_the_reference_in_the_repository_is_the_generated_one() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert text == reference_markdown(), "run: alise operator reference > docs/api.md"


@pytest.mark.parametrize(("path", "schema"), FIELDS, ids=[path for path, _ in FIELDS])
def test_each_field_is_described_and_bounded(path: str, schema: dict[str, Any]) -> None:
    assert "type" in schema
    assert not schema.keys() & {"$ref", "anyOf", "title", "const", "$defs"}, "not structural"
    if not path.endswith("[]"):
        assert schema.get("description", "").endswith((".", "lost")), "no sentence"
    match schema["type"]:
        case "string":
            assert "maxLength" in schema or "enum" in schema
        case "array":
            assert "maxItems" in schema
            assert "x-kubernetes-list-type" in schema
        case "integer" if path.startswith("spec"):
            assert {"minimum", "maximum"} <= schema.keys()
        case "object" if path not in RAW and path != "spec":
            assert "properties" in schema or "maxProperties" in schema


def test_defaults_of_whole_objects_are_complete() -> None:
    # The API server checks the CEL rules against a default as it is written.
    fields = root_schema()["properties"]["spec"]["properties"]
    assert fields["rollout"]["default"] == {"maxSurge": 0, "maxUnavailable": 1, "revision": ""}
    assert fields["engine"]["default"]["resources"] == {"cpu": "4", "memoryGiB": 16}
    assert "storageClassName" not in fields["model"]["properties"]["cache"]["default"]


def test_the_crd_has_subresources_columns_and_a_short_name() -> None:
    content = crd()["spec"]
    (version,) = content["versions"]
    assert content["names"]["shortNames"] == ["alise"]
    assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.replicas"
    assert "status" in version["subresources"]
    names = [column["name"] for column in version["additionalPrinterColumns"]]
    assert names == ["Ready", "Reason", "Replicas", "Model", "Policy", "URL", "Age"]


def test_each_rule_says_what_to_do() -> None:
    for path, message in all_rules():
        assert any(
            word in message
            for word in (
                "must",
                "remove",
                "needs",
                "needed",
                "create",
                "use",
                "is written",
                "first",
            )
        ), (path, message)


def test_there_is_an_example_of_everything() -> None:
    assert {path.stem for path in EXAMPLES} == {
        "cpu",
        "lora",
        "minimal",
        "production",
        "speculative-decoding",
        "tensor-parallel",
    }


def test_a_minimal_manifest_is_five_lines_of_spec() -> None:
    lines = (ROOT / "examples" / "minimal.yaml").read_text().splitlines()
    assert len(lines[lines.index("spec:") + 1 :]) <= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_name_known_fields_only(path: Any) -> None:
    def unknown(where: str, value: Any, schema: dict[str, Any]) -> Iterator[str]:
        if isinstance(value, dict) and "properties" in schema:
            for name, inner in value.items():
                if name not in schema["properties"]:
                    yield f"{where}.{name}"
                else:
                    yield from unknown(f"{where}.{name}", inner, schema["properties"][name])
        if isinstance(value, list):
            for item in value:
                yield from unknown(f"{where}[]", item, schema["items"])

    body = yaml.safe_load(path.read_text())
    schema = root_schema()["properties"]["spec"]
    assert not list(unknown("spec", body["spec"], schema))
    ALISEServiceSpec.model_validate(body["spec"])


def test_production_shows_cache_autoscaling_budget_and_monitoring() -> None:
    content = example("production")["spec"]
    assert {"autoscaling", "podDisruptionBudget", "monitoring"} <= content.keys()
    assert "cache" in content["model"]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"replicas": -1}, "replicas"),
        ({"replicas": "many"}, "replicas"),
        ({"scheduling": {"policy": "Best"}}, "scheduling.policy"),
        ({"engine": {"resources": {"cpu": "4 cores", "memoryGiB": 1}}}, "engine.resources.cpu"),
        ({"autoscaling": {"minReplicas": 1}}, "autoscaling.maxReplicas"),
    ],
)
def test_models_refuse_what_the_schema_refuses(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [where]


def test_specs_are_immutable_and_ignore_fields_of_a_newer_operator() -> None:
    parsed = spec(engine={"aFieldOfTheFuture": 1})
    with pytest.raises(ValidationError):
        parsed.replicas = 3  # type: ignore[misc]
