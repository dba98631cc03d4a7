"""What operator and chart render for optional APIs, against the CRDs of those projects.

A real API server checks each object with a dry run, and refuses fields that it does not know. The
CRDs are those of ALISE_TEST_CRDS, a folder of files as the projects publish them, or else the
shortened ones in tests/crds; a third test shows that these two agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from alise_operator.manifests.kinds import INFERENCE_POOL, KINDS, LWS, OPTIONAL, kind_of
from alise_operator.manifests.render import render
from operator_cluster import CHART_EXTRAS, ROOT, Cluster, render_chart
from operator_fixtures import example, merge, view

SHORTENED = ROOT / "tests" / "crds"
PUBLISHED = os.environ.get("ALISE_TEST_CRDS")
GROUPS = {kind.group for kind in OPTIONAL}
EVERYTHING = merge(
    example("production")["spec"],
    {
        "exposure": {
            "httpRoute": {
                "parentRefs": [{"name": "gateway", "namespace": "edge", "sectionName": "web"}],
                "hostnames": ["chat.example.com"],
            },
            "inferencePool": {"endpointPickerName": "picker"},
        },
        "autoscaling": {"maxReplicas": 4, "prometheusAddress": "http://prometheus:9090"},
        "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
        "podTemplate": {"annotations": {"team": "search"}},
    },
)
SPREAD = merge(
    EVERYTHING,
    {
        "engine": {
            "parallelism": {"tensor": 8, "pipeline": 2},
            "accelerator": {"count": 16, "perNode": 8},
        }
    },
)
PLURALS = {kind.kind: kind.plural for kind in KINDS} | {"PrometheusRule": "prometheusrules"}


def crds_in(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the CRDs of the optional APIs by name, each with its file."""
    bodies = [
        (path, body)
        for path in sorted(folder.glob("*.yaml"))
        for body in yaml.safe_load_all(path.read_text())
    ]
    return {
        body["metadata"]["name"]: (path, body)
        for path, body in bodies
        if body["spec"]["group"] in GROUPS
    }


@pytest.fixture(scope="module")
def cluster(crd: Cluster) -> Iterator[Cluster]:
    """A cluster with all optional APIs."""
    wanted = crds_in(SHORTENED)
    found = crds_in(Path(PUBLISHED)) if PUBLISHED else wanted
    assert wanted.keys() <= found.keys(), "ALISE_TEST_CRDS lacks some"
    for name in wanted:
        crd.install_crd(found[name][0])
    yield crd
    for name in wanted:
        crd.remove_crd(name)


def dry_run(cluster: Cluster, body: dict[str, Any]) -> tuple[bool, str]:
    metadata = body["metadata"]
    plural = PLURALS.get(body["kind"], f"{body['kind'].lower()}s")
    root = "apis" if "/" in body["apiVersion"] else "api"
    where = f"namespaces/{metadata['namespace']}/" if "namespace" in metadata else ""
    path = f"{root}/{body['apiVersion']}/{where}{plural}/{metadata['name']}"
    answer = cluster.apply(path, body, dryRun="All", fieldValidation="Strict")
    return answer.is_success, answer.text


@pytest.mark.cluster
@pytest.mark.parametrize("fields", [EVERYTHING, SPREAD], ids=["one-node", "multi-node"])
def test_the_api_server_takes_what_the_operator_renders(
    cluster: Cluster, fields: dict[str, Any]
) -> None:
    rendered = render(view("chat", **fields))
    assert not rendered.missing
    wanted = set(OPTIONAL) - (set() if fields is SPREAD else {LWS})
    assert {kind for kind in map(kind_of, rendered.manifests) if kind.is_optional} == wanted
    for manifest in rendered.manifests:
        is_taken, text = dry_run(cluster, manifest)
        assert is_taken, (manifest["kind"], text)


@pytest.mark.cluster
def test_the_api_server_would_refuse_a_field_that_does_not_exist(cluster: Cluster) -> None:
    rendered = render(view("chat", **SPREAD)).manifests
    for manifest in (m for m in rendered if kind_of(m).is_optional):
        is_taken, text = dry_run(cluster, merge(manifest, {"spec": {"noSuchField": 1}}))
        assert not is_taken, manifest["kind"]
        assert "noSuchField" in text
    (pool,) = [m for m in rendered if kind_of(m) is INFERENCE_POOL]
    is_taken, text = dry_run(cluster, merge(pool, {"spec": {"targetPorts": []}}))
    assert not is_taken
    assert "targetPorts" in text


@pytest.mark.cluster
@pytest.mark.parametrize(
    "options", [(), ("--set", "watchNamespaces={alise-system}")], ids=["cluster", "namespaced"]
)
def test_the_api_server_takes_what_the_chart_renders(
    cluster: Cluster, options: tuple[str, ...]
) -> None:
    cluster.namespace("alise-system")
    bodies = render_chart(*CHART_EXTRAS, *options)
    assert {"PodMonitor", "PrometheusRule", "ConfigMap"} <= {body["kind"] for body in bodies}
    for body in bodies:
        is_taken, text = dry_run(cluster, body)
        assert is_taken, (body["kind"], text)


@pytest.mark.skipif(
    PUBLISHED is None,
    reason="set ALISE_TEST_CRDS to a folder with the CRDs as their projects publish them",
)
def test_the_shortened_crds_are_those_published() -> None:
    published = crds_in(Path(str(PUBLISHED)))
    for name, (path, body) in crds_in(SHORTENED).items():
        spec, original = body["spec"], published[name][1]["spec"]
        assert (spec["group"], spec["names"]) == (original["group"], original["names"]), path
        versions = {version["name"]: version for version in original["versions"]}
        for version in spec["versions"]:
            schema = versions[version["name"]]["schema"]["openAPIV3Schema"]
            assert version["schema"]["openAPIV3Schema"] == without_descriptions(schema), path


def without_descriptions(schema: Any, *, is_properties: bool = False) -> Any:
    """Return a schema less its descriptions; a property may be called `description`."""
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: without_descriptions(value, is_properties=name == "properties" and not is_properties)
        for name, value in schema.items()
        if is_properties or name != "description"
    }
