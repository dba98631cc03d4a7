"""The chart's rights are minimal: each is used, and nothing else is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_cluster import (
    ROOT,
    SERVICES,
    Cluster,
    OperatorProcess,
    Service,
    chart_account_token,
    eventually,
    render_chart,
    running,
)
from operator_fixtures import example, merge, service_body
from operator_proxy import Proxy

pytestmark = pytest.mark.cluster

NAMESPACE = "rights"
OPTIONAL = {
    "scaledobjects": "keda.sh",
    "podmonitors": "monitoring.coreos.com",
    "httproutes": "gateway.networking.k8s.io",
    "inferencepools": "inference.networking.k8s.io",
    "leaderworkersets": "leaderworkerset.x-k8s.io",
}
# The API server asks for it when it sees a blocking owner reference: no request shows it.
FINALIZERS = ("serving.alise.dev", "aliseservices/finalizers", "update")
EVERYTHING = merge(
    example("production")["spec"],
    {"exposure": {"inferencePool": {"endpointPickerName": "picker"}}},
)
NOTHING: dict[str, Any] = {
    "autoscaling": None,
    "exposure": {"httpRoute": None, "inferencePool": None},
    "monitoring": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "podDisruptionBudget": {"enabled": False},
    "model": {"cache": {"enabled": False}},
}
SPREAD = {"parallelism": {"tensor": 4}, "accelerator": {"count": 4, "perNode": 2}}


def cluster_role() -> dict[str, Any]:
    (role,) = [body for body in render_chart() if body["kind"] == "ClusterRole"]
    return role


def granted() -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in cluster_role()["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.fixture
def optional_apis(crd: Cluster) -> Iterator[None]:
    for plural in OPTIONAL:
        crd.install_crd(ROOT / "tests" / "crds" / f"{plural}.yaml")
    yield
    for plural, group in OPTIONAL.items():
        crd.remove_crd(f"{plural}.{group}")


def make(cluster: Cluster, name: str, fields: dict[str, Any]) -> Service:
    cluster.namespace(NAMESPACE)
    path = f"{SERVICES}/namespaces/{NAMESPACE}/aliseservices"
    answer = cluster.create(path, service_body(name, NAMESPACE, **fields))
    assert answer.is_success, answer.text
    return Service(cluster, NAMESPACE, name)


def test_every_right_is_used_and_no_other_is_missed(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, optional_apis: None
) -> None:
    crd.delete("apis/kopf.dev/v1/clusterkopfpeerings/alise-operator")  # it has to make it
    token = operator_kubeconfig.read_text().partition("token: ")[2].split()[0]
    with Proxy(crd.server.url) as proxy:
        behind = crd.server.kubeconfig("rights", token, proxy.url)
        operator = OperatorProcess(behind, tmp_path, "--peering", "alise-operator")
        with running(operator):
            services = [
                make(crd, "everything", EVERYTHING),
                make(crd, "hpa", {"autoscaling": {"maxReplicas": 2}}),
                make(crd, "spread", {"engine": SPREAD}),
            ]
            everything, hpa, spread = services
            everything.settle()
            # Ready at last, says its controller: an event is posted.
            where = f"apis/apps/v1/namespaces/{NAMESPACE}/deployments/everything/status"
            generation = everything.child("deployments")["metadata"]["generation"]
            ready = {"observedGeneration": generation, "replicas": 1, "readyReplicas": 1}
            assert crd.patch(where, {"status": {**ready, "updatedReplicas": 1}}).is_success
            eventually(lambda: everything.condition("Ready")["status"] == "True")
            for service in services:
                service.settle()
                assert service.condition("Degraded")["reason"] == "AsExpected", service.body
            everything.patch(**NOTHING)
            hpa.patch(**NOTHING, engine=SPREAD)  # its Deployment goes
            spread.patch(engine={"accelerator": {"perNode": None}})  # its LeaderWorkerSet goes
            for service in services:
                service.settle()
                eventually(lambda s=service: s.condition("Degraded")["reason"] == "AsExpected")
            assert spread.child("deployments") is not None
            assert hpa.child("deployments") is None
        used = {(r.group, r.resource, r.verb) for r in proxy.requests}
        for service in services:
            crd.delete(service.path)
    assert granted() - used == {FINALIZERS}, "rights that nobody uses"
    assert used - granted() == set(), "requests that are not allowed"


def test_without_the_right_to_finalizers_children_are_refused(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path
) -> None:
    role = cluster_role()
    path = f"apis/{role['apiVersion']}/clusterroles/{role['metadata']['name']}"
    fewer = [r for r in role["rules"] if r["resources"] != ["aliseservices/finalizers"]]
    assert len(fewer) == len(role["rules"]) - 1
    try:
        assert crd.patch(path, {"rules": fewer}).is_success
        with running(OperatorProcess(operator_kubeconfig, tmp_path)):
            service = make(crd, "refused", {})
            eventually(lambda: service.condition("Degraded")["reason"] == "Refused")
            assert "blockOwnerDeletion" in service.condition("Degraded")["message"]
    finally:
        crd.patch(path, {"rules": role["rules"]})
        crd.delete(f"{SERVICES}/namespaces/{NAMESPACE}/aliseservices/refused")


def test_a_namespaced_operator_needs_no_rights_in_the_cluster(crd: Cluster, tmp_path: Path) -> None:
    crd.namespace("scoped")
    options = ("--set", "watchNamespaces={scoped}")
    token = chart_account_token(crd, *options, release="scoped")
    config = crd.server.kubeconfig("scoped", token)
    arguments = ("--namespace", "scoped", "--peering", "alise-operator")
    paths = {name: f"{SERVICES}/namespaces/{name}/aliseservices" for name in ("scoped", "default")}
    with running(OperatorProcess(config, tmp_path, *arguments)) as operator:
        for namespace, path in paths.items():
            assert crd.create(path, service_body("one", namespace)).is_success
        service = Service(crd, "scoped", "one")
        service.settle()
        assert service.condition("Degraded")["reason"] == "AsExpected"
        crd.delete("apis/apps/v1/namespaces/scoped/deployments/one")
        eventually(lambda: service.child("deployments") is not None)
        assert "status" not in Service(crd, "default", "one").body  # not its namespace
        assert "Traceback" not in operator.log
    for path in paths.values():
        crd.delete(f"{path}/one")
