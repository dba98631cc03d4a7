"""The operator, with the chart's rights, against a real API server: what follows from a change."""

from __future__ import annotations

import json
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
    eventually,
    restarted,
    running,
)
from operator_fixtures import example, service_body

pytestmark = pytest.mark.cluster

NAMESPACE = "reconcile"
CORE = "api/v1"


@pytest.fixture(scope="module")
def operator(
    crd: Cluster, operator_kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    folder = tmp_path_factory.mktemp("operator")
    process = OperatorProcess(operator_kubeconfig, folder, "--peering", "alise-operator")
    with running(process) as it, restarted(it):
        yield it


@pytest.fixture
def service(
    crd: Cluster, operator: OperatorProcess, request: pytest.FixtureRequest
) -> Iterator[Service]:
    """A service with children, named after the test."""
    name = request.node.name.removeprefix("test_").partition("[")[0].replace("_", "-")[:40]
    found = make(crd, name.strip("-"))
    yield found
    crd.delete(found.path)


def make(cluster: Cluster, name: str, **fields: Any) -> Service:
    cluster.namespace(NAMESPACE)
    found = Service(cluster, NAMESPACE, name)
    path = f"{SERVICES}/namespaces/{NAMESPACE}/aliseservices"
    answer = cluster.create(path, service_body(name, NAMESPACE, **fields))
    assert answer.is_success, answer.text
    found.settle()
    return found


def pretend(service: Service, ready: int, **more: Any) -> None:
    """Say what the Deployment's controller would say."""
    body = service.child("deployments")
    path = f"apis/apps/v1/namespaces/{NAMESPACE}/deployments/{service.name}/status"
    status = {
        "observedGeneration": body["metadata"]["generation"],
        "replicas": body["spec"]["replicas"],
        "readyReplicas": ready,
        "updatedReplicas": body["spec"]["replicas"],
        **more,
    }
    assert service.cluster.patch(path, {"status": status}).is_success


def test_create_makes_all_children_and_a_status(service: Service) -> None:
    for api, plural, name in (
        ("apis/apps/v1", "deployments", service.name),
        (CORE, "services", service.name),
        (CORE, "serviceaccounts", service.name),
        (CORE, "configmaps", f"{service.name}-policy"),
        (CORE, "persistentvolumeclaims", f"{service.name}-model-cache"),
        ("apis/policy/v1", "poddisruptionbudgets", service.name),
        ("apis/networking.k8s.io/v1", "networkpolicies", service.name),
    ):
        body = service.child(plural, name, api)
        assert body["metadata"]["ownerReferences"][0]["uid"] == service.body["metadata"]["uid"]
        managers = {entry["manager"] for entry in body["metadata"]["managedFields"]}
        assert managers == {"alise-operator"}
        assert "finalizers" not in body["metadata"] or plural == "persistentvolumeclaims"
    metadata = service.body["metadata"]
    assert "finalizers" not in metadata
    assert not [name for name in metadata.get("annotations", {}) if "kopf" in name]
    status = service.body["status"]
    assert status["url"] == f"http://{service.name}.{NAMESPACE}.svc:8000/v1"
    assert status["resolvedImages"]["engine"].startswith("alise/engine:")
    assert service.condition("Ready")["reason"] == "PodsPending"
    assert service.condition("SpecValid")["status"] == "True"


def test_a_steady_state_makes_no_requests(service: Service, operator: OperatorProcess) -> None:
    def writes() -> float:
        return operator.metric('alise_operator_api_requests_total{code="200",kind="Depl') + (
            operator.metric('alise_operator_api_requests_total{code="200",kind="ALISE')
        )

    before = writes()
    version = service.body["metadata"]["resourceVersion"]
    # An annotation of somebody else's is an event, and no reason to do anything.
    service.cluster.patch(service.path, {"metadata": {"annotations": {"note": "1"}}})
    eventually(lambda: service.body["metadata"]["resourceVersion"] != version)
    reconciles = operator.metric("alise_operator_reconciles_total")
    service.cluster.patch(service.path, {"metadata": {"annotations": {"note": "2"}}})
    eventually(lambda: operator.metric("alise_operator_reconciles_total") > reconciles)
    assert writes() == before


def test_update_reaches_the_pod_template(service: Service) -> None:
    service.patch(engine={"maxModelLen": 4096})
    service.settle()
    template = service.child("deployments")["spec"]["template"]["spec"]
    assert "4096" in template["containers"][0]["args"]


def test_policy_and_replicas_restart_nothing(service: Service) -> None:
    before = service.child("deployments")["spec"]["template"]
    service.patch(scheduling={"policy": "FCFS", "agingSeconds": 5}, replicas=3)
    service.settle()
    data = service.child("configmaps", f"{service.name}-policy", CORE)["data"]
    assert json.loads(data["policy.json"]) == {"policy": "fcfs", "aging_s": 5}
    deployment = service.child("deployments")
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["template"] == before


def test_scale_subresource_drives_replicas(service: Service) -> None:
    answer = service.cluster.patch(f"{service.path}/scale", {"spec": {"replicas": 2}})
    assert answer.is_success
    eventually(lambda: service.child("deployments")["spec"]["replicas"] == 2)
    pretend(service, ready=2)
    scale = eventually(
        lambda: (
            (found := service.cluster.get(f"{service.path}/scale"))
            and found["status"]["replicas"] == 2
            and found
        )
    )
    assert scale["status"]["selector"] == f"serving.alise.dev/service={service.name}"


def test_paused_changes_nothing_until_it_is_lifted(service: Service) -> None:
    service.patch(paused=True, engine={"maxModelLen": 77})
    service.settle()
    assert service.condition("Progressing")["reason"] == "Paused"
    arguments = service.child("deployments")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "77" not in arguments
    service.patch(paused=False)
    service.settle()
    arguments = service.child("deployments")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "77" in arguments


def test_drift_is_repaired(service: Service) -> None:
    cluster, name = service.cluster, service.name
    where = f"namespaces/{NAMESPACE}"
    image = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "evil"}]
    path = f"apis/apps/v1/{where}/deployments/{name}"
    assert cluster.patch(path, image, "json-patch+json").is_success
    eventually(
        lambda: "evil" not in json.dumps(service.child("deployments")["spec"]), "image repaired"
    )
    cluster.patch(f"{CORE}/{where}/configmaps/{name}-policy", {"data": {"policy.json": "{}"}})
    eventually(
        lambda: (
            "boost" in service.child("configmaps", f"{name}-policy", CORE)["data"]["policy.json"]
        ),
        "ConfigMap repaired",
    )
    # Without our label the watch no longer shows it: it counts as deleted, and is made again.
    label = {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}}
    cluster.patch(f"{CORE}/{where}/services/{name}", label)
    eventually(
        lambda: (
            "app.kubernetes.io/managed-by"
            in service.child("services", None, CORE)["metadata"]["labels"]
        ),
        "label repaired",
    )


@pytest.mark.parametrize(
    ("api", "plural", "suffix"),
    [
        ("apis/apps/v1", "deployments", ""),
        (CORE, "services", ""),
        (CORE, "configmaps", "-policy"),
        (CORE, "serviceaccounts", ""),
        ("apis/policy/v1", "poddisruptionbudgets", ""),
    ],
)
def test_a_deleted_child_comes_back(service: Service, api: str, plural: str, suffix: str) -> None:
    name = service.name + suffix
    uid = service.child(plural, name, api)["metadata"]["uid"]
    service.cluster.delete(f"{api}/namespaces/{NAMESPACE}/{plural}/{name}")
    eventually(
        lambda: (
            (found := service.child(plural, name, api)) is not None
            and found["metadata"]["uid"] != uid
        )
    )


def test_what_is_no_longer_wanted_goes(service: Service) -> None:
    service.patch(
        podDisruptionBudget={"enabled": False},
        networkPolicy={"enabled": False},
        model={"cache": {"enabled": False}},
        autoscaling={"maxReplicas": 3},
    )
    service.settle()
    assert service.child("poddisruptionbudgets", None, "apis/policy/v1") is None
    assert service.child("networkpolicies", None, "apis/networking.k8s.io/v1") is None
    claim = service.child("persistentvolumeclaims", f"{service.name}-model-cache", CORE)
    assert claim is None or "deletionTimestamp" in claim["metadata"]
    scaler = "horizontalpodautoscalers"
    assert service.child(scaler, None, "apis/autoscaling/v2")["spec"]["maxReplicas"] == 3
    service.patch(autoscaling=None)
    service.settle()
    assert service.child(scaler, None, "apis/autoscaling/v2") is None


def test_a_removed_option_leaves_the_pod_template(service: Service) -> None:
    service.patch(placement={"nodeSelector": {"a": "b"}})
    service.settle()
    assert service.child("deployments")["spec"]["template"]["spec"]["nodeSelector"] == {"a": "b"}
    service.patch(placement={"nodeSelector": {"a": None}})
    service.settle()
    assert "nodeSelector" not in service.child("deployments")["spec"]["template"]["spec"]


def test_an_object_of_somebody_else_is_not_taken_over(
    crd: Cluster, operator: OperatorProcess
) -> None:
    crd.namespace(NAMESPACE)
    path = f"{CORE}/namespaces/{NAMESPACE}/serviceaccounts"
    crd.create(path, {"metadata": {"name": "foreign"}})
    service = make(crd, "foreign")
    assert service.condition("Degraded")["reason"] == "Refused"
    assert "belongs to somebody else" in service.condition("Degraded")["message"]
    assert "ownerReferences" not in service.child("serviceaccounts", None, CORE)["metadata"]
    crd.delete(service.path)


def test_status_follows_deployment_and_pods(service: Service) -> None:
    pretend(service, ready=1)
    eventually(lambda: service.condition("Ready")["status"] == "True")
    since = service.condition("Ready")["lastTransitionTime"]
    crash = {
        "name": "engine",
        "image": "i",
        "imageID": "",
        "ready": False,
        "restartCount": 3,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {
            "terminated": {
                "exitCode": 1,
                "reason": "Error",
                "message": "loading\nhuggingface_hub.errors.GatedRepoError: 403 for org/model\n",
                "finishedAt": "2026-01-01T00:00:00Z",
                "startedAt": "2026-01-01T00:00:00Z",
                "containerID": "",
            }
        },
    }
    path = f"{CORE}/namespaces/{NAMESPACE}/pods"
    deployment = service.child("deployments")
    template = deployment["spec"]["template"]
    name = f"{service.name}-abc"
    pod = {"metadata": {**template["metadata"], "name": name}, "spec": template["spec"]}
    answer = service.cluster.create(path, pod)
    assert answer.is_success, answer.text
    try:
        service.cluster.patch(f"{path}/{name}/status", {"status": {"containerStatuses": [crash]}})
        pretend(service, ready=0)
        eventually(lambda: service.condition("Ready")["reason"] == "ModelDownloadFailed")
        failure = service.body["status"]["lastFailure"]
        assert failure["exitCode"] == 1
        assert "GatedRepoError" in failure["message"]
        events = [
            event["reason"]
            for event in service.cluster.items(f"{CORE}/namespaces/{NAMESPACE}/events")
            if event["involvedObject"]["name"] == service.name
        ]
        assert {"Ready", "ModelDownloadFailed"} <= set(events)
    finally:
        service.cluster.http.delete(f"{path}/{name}", params={"gracePeriodSeconds": "0"})
    pretend(service, ready=1)
    eventually(lambda: service.condition("Ready")["status"] == "True")
    assert service.condition("Degraded")["status"] == "False"
    assert service.body["status"]["lastFailure"] == failure
    assert service.condition("Ready")["lastTransitionTime"] >= since


def test_kubectl_get_shows_the_columns(service: Service) -> None:
    lines = service.cluster.kubectl("get", "alise", service.name, "-n", NAMESPACE).stdout
    header, row = lines.splitlines()
    assert header.split() == [
        "NAME",
        "READY",
        "REASON",
        "REPLICAS",
        "MODEL",
        "POLICY",
        "URL",
        "AGE",
    ]
    assert "hf://org/model" in row


def test_optional_apis_come_and_go(crd: Cluster, operator: OperatorProcess) -> None:
    crd.namespace(NAMESPACE)
    service = make(crd, "optional", **example("production")["spec"])
    condition = service.condition("IntegrationsReady")
    assert condition["status"] == "False"
    assert "install KEDA" in condition["message"]
    # The stand-in for KEDA's ScaledObject:
    assert service.child("horizontalpodautoscalers", None, "apis/autoscaling/v2") is not None
    for plural in ("scaledobjects", "podmonitors", "httproutes"):
        crd.install_crd(ROOT / "tests" / "crds" / f"{plural}.yaml")
    eventually(lambda: service.condition("IntegrationsReady")["status"] == "True")
    for api, plural in (
        ("apis/keda.sh/v1alpha1", "scaledobjects"),
        ("apis/monitoring.coreos.com/v1", "podmonitors"),
        ("apis/gateway.networking.k8s.io/v1", "httproutes"),
    ):
        assert service.child(plural, None, api) is not None
    assert service.child("horizontalpodautoscalers", None, "apis/autoscaling/v2") is None
    # Drift of an optional kind is seen too: kopf has begun to watch it.
    crd.delete(f"apis/keda.sh/v1alpha1/namespaces/{NAMESPACE}/scaledobjects/optional")
    eventually(lambda: service.child("scaledobjects", None, "apis/keda.sh/v1alpha1") is not None)
    crd.remove_crd("scaledobjects.keda.sh")
    eventually(lambda: service.condition("IntegrationsReady")["status"] == "False")
    eventually(
        lambda: service.child("horizontalpodautoscalers", None, "apis/autoscaling/v2") is not None
    )
    service.patch(engine={"maxModelLen": 99})
    service.settle()
    crd.delete(service.path)
    crd.remove_crd("podmonitors.monitoring.coreos.com")
    crd.remove_crd("httproutes.gateway.networking.k8s.io")


def test_a_replica_over_nodes_needs_the_leader_worker_set(
    crd: Cluster, operator: OperatorProcess
) -> None:
    spread = {"parallelism": {"tensor": 4}, "accelerator": {"count": 4, "perNode": 2}}
    service = make(crd, "spread", engine=spread)
    assert service.condition("Ready")["reason"] == "LeaderWorkerSetMissing"
    assert "install LeaderWorkerSet" in service.condition("Degraded")["message"]
    crd.install_crd(ROOT / "tests" / "crds" / "leaderworkersets.yaml")
    api = "apis/leaderworkerset.x-k8s.io/v1"
    group = eventually(lambda: service.child("leaderworkersets", None, api))
    assert group["spec"]["leaderWorkerTemplate"]["size"] == 2
    service.patch(engine={"accelerator": {"perNode": None}})
    service.settle()
    assert service.child("leaderworkersets", None, api) is None
    assert service.child("deployments") is not None
    crd.delete(service.path)
    crd.remove_crd("leaderworkersets.leaderworkerset.x-k8s.io")


def test_graceful_shutdown_and_health(operator: OperatorProcess) -> None:
    # It may have ended when the test before removed an API, and is started again then.
    eventually(lambda: operator.get("readyz").status_code == 200)
    assert operator.get("healthz").status_code == 200
    assert "alise_operator_reconciles_total" in operator.get("metrics").text
    # kopf may show one of its own, when an API goes away under its watch.
    frames = [line for line in operator.log.splitlines() if line.strip().startswith('File "')]
    assert not [frame for frame in frames if "alise_operator/" in frame]
    assert operator.stop() == 0, operator.log[-4000:]
    operator.start()
