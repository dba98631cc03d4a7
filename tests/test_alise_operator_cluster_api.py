"""The CRD on a real API server: every CEL rule, valid and invalid, and what users see."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from operator_cluster import SERVICES, Cluster
from operator_fixtures import EXAMPLES, all_rules, merge, service_body

pytestmark = pytest.mark.cluster

PATH = f"{SERVICES}/namespaces/default/aliseservices"

# Part of the rule's message, a spec that it takes, one that it refuses. `model` etc. are merged.
CREATION: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "model.uri must start with",
        {"model": {"uri": "s3://bucket/model"}},
        {"model": {"uri": "http://example.com/m"}},
    ),
    (
        "embedded://smollm2-135m-instruct, the model in the engine's image",
        {"model": {"uri": "embedded://smollm2-135m-instruct"}},
        {"model": {"uri": "embedded://another-model"}},
    ),
    (
        "hf://ORGANISATION/NAME",
        {"model": {"uri": "hf://org/model-1.5_b"}},
        {"model": {"uri": "hf://org/model@main"}},
    ),
    (
        "pvc://CLAIM/PATH",
        {"model": {"uri": "pvc://claim/some/path"}},
        {"model": {"uri": "pvc://claim/../../etc"}},
    ),
    (
        "model.revision is for hf:// only",
        {"model": {"uri": "hf://org/m", "revision": "main"}},
        {"model": {"uri": "pvc://claim/m", "revision": "main"}},
    ),
    (
        "parallelism.tensor * pipeline must equal",
        {"engine": {"parallelism": {"tensor": 2, "pipeline": 2}, "accelerator": {"count": 4}}},
        {"engine": {"parallelism": {"tensor": 2}, "accelerator": {"count": 3}}},
    ),
    (
        "must be a multiple of engine.accelerator.perNode",
        {"engine": {"parallelism": {"tensor": 4}, "accelerator": {"count": 4, "perNode": 2}}},
        {"engine": {"parallelism": {"tensor": 4}, "accelerator": {"count": 4, "perNode": 3}}},
    ),
    (
        "engine.args has an option that the operator sets",
        {"engine": {"args": ["--max-num-seqs", "8"]}},
        {"engine": {"args": ["--port=9000"]}},
    ),
    (
        "takes value or valueFrom",
        {"engine": {"env": [{"name": "A", "value": "1"}]}},
        {
            "engine": {
                "env": [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]
            }
        },
    ),
    (
        "valueFrom needs exactly one of",
        {"engine": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]}},
        {"engine": {"env": [{"name": "A", "valueFrom": {}}]}},
    ),
    (
        "kvSwap.hostGiB must be above 0",
        {"kvSwap": {"enabled": True, "hostGiB": 1}},
        {"kvSwap": {"enabled": True, "hostGiB": 0}},
    ),
    (
        "speculativeDecoding.model is needed",
        {"speculativeDecoding": {"method": "eagle", "model": "org/draft"}},
        {"speculativeDecoding": {"method": "eagle"}},
    ),
    (
        "lora.adapters[].uri must start with",
        {"lora": {"adapters": [{"name": "a", "uri": "hf://org/a"}]}},
        {"lora": {"adapters": [{"name": "a", "uri": "s3://b/a"}]}},
    ),
    (
        "autoscaling.minReplicas must not exceed",
        {"autoscaling": {"minReplicas": 2, "maxReplicas": 2}},
        {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}},
    ),
    (
        "must not both be 0",
        {"rollout": {"maxSurge": 1, "maxUnavailable": 0}},
        {"rollout": {"maxSurge": 0, "maxUnavailable": 0}},
    ),
]
# Part of the message, the spec before, a change that is taken, one that is refused.
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (
        "model.servedName is immutable",
        {"model": {"servedName": "a"}},
        {"model": {"servedName": "a", "uri": "hf://org/other"}},
        {"model": {"servedName": "b"}},
    ),
    (
        "model.servedName is immutable",
        {},
        {"replicas": 2},
        {"model": {"servedName": "b"}},
    ),
    (
        "model.cache.sizeGiB cannot shrink",
        {"model": {"cache": {"sizeGiB": 20}}},
        {"model": {"cache": {"sizeGiB": 30}}},
        {"model": {"cache": {"sizeGiB": 10}}},
    ),
    (
        "model.cache.accessMode and storageClassName are immutable",
        {"model": {"cache": {"storageClassName": "a"}}},
        {"model": {"cache": {"storageClassName": "b", "enabled": False}}},
        {"model": {"cache": {"storageClassName": "b"}}},
    ),
]
NAMES = [
    ("metadata.name must have at most 50", "a" * 50, "a" * 51),
    ("metadata.name must begin with a letter", "a-1", "1-a"),
]


def create(cluster: Cluster, body: dict[str, Any], **params: str) -> tuple[bool, str]:
    answer = cluster.create(PATH, body, **params)
    return answer.is_success, answer.json().get("message", "")


def test_every_rule_has_a_case() -> None:
    said = [case[0] for case in (*CREATION, *CHANGES, *NAMES)]
    for path, message in all_rules():
        assert any(part in message for part in said), (path, message)


@pytest.mark.parametrize(("message", "valid", "invalid"), CREATION, ids=[c[0] for c in CREATION])
def test_rules_at_creation(
    crd: Cluster, message: str, valid: dict[str, Any], invalid: dict[str, Any]
) -> None:
    assert create(crd, service_body("valid", **valid), dryRun="All") == (True, "")
    is_taken, text = create(crd, service_body("invalid", **invalid), dryRun="All")
    assert not is_taken
    assert message in text


@pytest.mark.parametrize(("message", "valid", "invalid"), NAMES, ids=[c[0] for c in NAMES])
def test_rules_on_names(crd: Cluster, message: str, valid: str, invalid: str) -> None:
    assert create(crd, service_body(valid), dryRun="All") == (True, "")
    is_taken, text = create(crd, service_body(invalid), dryRun="All")
    assert not is_taken
    assert message in text


@pytest.mark.parametrize(
    ("message", "before", "taken", "refused"), CHANGES, ids=[c[0] for c in CHANGES]
)
def test_rules_on_changes(
    crd: Cluster,
    message: str,
    before: dict[str, Any],
    taken: dict[str, Any],
    refused: dict[str, Any],
) -> None:
    try:
        assert create(crd, service_body("change", **before)) == (True, "")
        answer = crd.patch(f"{PATH}/change", {"spec": refused})
        assert answer.status_code == 422
        assert message in answer.json()["message"]
        assert crd.patch(f"{PATH}/change", {"spec": taken}).is_success
    finally:
        crd.delete(f"{PATH}/change")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"replicas": 1001}, "spec.replicas"),
        ({"scheduling": {"policy": "Best"}}, "spec.scheduling.policy"),
        ({"model": {"uri": "x" * 600}}, "spec.model.uri"),
        ({"engine": {"args": ["a"] * 65}}, "spec.engine.args"),
        (
            {"engine": {"resources": {"cpu": "4 cores", "memoryGiB": 1}}},
            "spec.engine.resources.cpu",
        ),
        ({"model": None}, "spec.model"),
    ],
)
def test_bounds(crd: Cluster, fields: dict[str, Any], where: str) -> None:
    body = service_body("bounds")
    body["spec"] = {k: v for k, v in merge(body["spec"], fields).items() if v is not None}
    is_taken, text = create(crd, body, dryRun="All")
    assert not is_taken
    assert where in text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_taken_strictly(crd: Cluster, path: Any) -> None:
    body = yaml.safe_load(path.read_text())
    answer = crd.create(PATH, body, dryRun="All", fieldValidation="Strict")
    assert answer.is_success, answer.text


def test_defaults_come_from_the_crd(crd: Cluster) -> None:
    answer = crd.create(PATH, service_body("defaults"), dryRun="All").json()
    content = answer["spec"]
    assert content["replicas"] == 1
    assert content["rollout"] == {"maxSurge": 0, "maxUnavailable": 1, "revision": ""}
    assert content["engine"]["resources"] == {"cpu": "4", "memoryGiB": 16}
    assert "autoscaling" not in content


def test_kubectl_explain_reads_well(crd: Cluster) -> None:
    text = crd.kubectl("explain", "alise.spec.scheduling").stdout
    assert "How jobs are ordered" in text
    assert "enum: Boost, SpeculativeSRTF, MLFQ, FCFS" in text
    whole = crd.kubectl("explain", "alise.spec", "--recursive").stdout
    assert "<no description>" not in whole
    assert "targetBacklogSeconds" in whole
