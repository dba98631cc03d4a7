"""What the users of other operators complain about: each point a test, named after it."""

from __future__ import annotations

from typing import Any

import pytest
from alise_operator.images import DefaultImages, resolve_images
from alise_operator.manifests.container import memory_gib
from alise_operator.manifests.engine import PRE_STOP_S
from alise_operator.manifests.kinds import DEPLOYMENT, OPTIONAL, PVC, kind_of
from alise_operator.manifests.pod import pod_template
from alise_operator.manifests.render import render
from alise_operator.manifests.service_view import ServiceView
from alise_operator.plan import TEMPLATE, Child, keeps_pods, plan
from alise_operator.status.observation import Observation, WorkloadState
from alise_operator.status.status import service_status
from operator_cluster import CHART, render_chart
from operator_fixtures import IMAGES, RUNNING, all_rules, example, pod, spec, view, waiting

NOW = "2026-01-01T00:00:00Z"


def deployment(service: ServiceView) -> dict[str, Any]:
    (found,) = [m for m in render(service).manifests if kind_of(m) is DEPLOYMENT]
    return found


def engine(service: ServiceView) -> dict[str, Any]:
    return pod_template(service)["spec"]["containers"][0]


def test_01_an_absent_optional_api_breaks_no_reconcile() -> None:
    service = view(**example("production")["spec"])
    rendered = render(service, OPTIONAL)
    assert DEPLOYMENT in map(kind_of, rendered.manifests)
    seen = Observation(1, WorkloadState(), missing=rendered.missing)
    status = service_status(service, seen, {}, NOW)
    (found,) = [c for c in status["conditions"] if c["type"] == "IntegrationsReady"]
    assert found["status"] == "False"
    assert "install KEDA" in found["message"]


def test_02_a_rolling_update_on_a_full_node_does_not_deadlock() -> None:
    rolling = deployment(view())["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": 1}
    assert any(path == "spec.rollout" and "both be 0" in text for path, text in all_rules())


def test_03_the_kv_host_tier_is_part_of_the_memory_and_shm_is_sized() -> None:
    fields = {
        "kvSwap": {"enabled": True, "hostGiB": 40},
        "engine": {"resources": {"cpu": "4", "memoryGiB": 16}, "shmGiB": 8},
    }
    service = view(**fields)
    memory = engine(service)["resources"]
    assert memory["limits"]["memory"] == memory["requests"]["memory"] == "68Gi"  # 16 + 8 + 44
    volumes = {volume["name"]: volume for volume in pod_template(service)["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in engine(service)["volumeMounts"]
    assert memory_gib(spec(kvSwap={"enabled": False, "hostGiB": 40})) == 18  # disabled: not counted


def test_04_a_crash_loop_is_not_ready_and_its_reason_is_kept() -> None:
    killed = waiting(
        "CrashLoopBackOff", reason="OOMKilled", exitCode=137, finishedAt=NOW, message="loading"
    )
    seen = Observation(
        1,
        WorkloadState(replicas=1, ready=0, updated=1, is_current=True),
        (pod(engine=killed, predictor=RUNNING),),
    )
    status = service_status(view(), seen, {}, NOW)
    conditions = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
    assert conditions["Ready"] == ("False", "OutOfMemory")
    assert conditions["Degraded"] == ("True", "OutOfMemory")
    assert status["lastFailure"]["exitCode"] == 137
    recovered = Observation(
        1,
        WorkloadState(replicas=1, ready=1, updated=1, is_current=True),
        (pod(engine=RUNNING, predictor=RUNNING, ready=True),),
    )
    after = service_status(view(), recovered, status, NOW)
    assert after["lastFailure"] == status["lastFailure"]


def test_05_the_model_is_downloaded_once() -> None:
    service = view()
    (claim,) = [m for m in render(service).manifests if kind_of(m) is PVC]
    volumes = {volume["name"]: volume for volume in pod_template(service)["spec"]["volumes"]}
    name = claim["metadata"]["name"]
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == name
    mounted = {m["name"]: m["mountPath"] for m in engine(service)["volumeMounts"]}["cache"]
    (home,) = [item["value"] for item in engine(service)["env"] if item["name"] == "HF_HOME"]
    assert home.startswith(mounted)


@pytest.mark.parametrize("drain_s", [0, 30, 600])
def test_06_requests_in_progress_survive_a_shutdown(drain_s: int) -> None:
    service = view(lifecycle={"drainSeconds": drain_s})
    spec_of_pod = pod_template(service)["spec"]
    assert engine(service)["lifecycle"]["preStop"] == {"sleep": {"seconds": PRE_STOP_S}}
    arguments = engine(service)["args"]
    assert arguments[arguments.index("--alise-drain-s") + 1] == str(drain_s)
    # `alise serve` insists 15 s after the drain.
    assert spec_of_pod["terminationGracePeriodSeconds"] > PRE_STOP_S + drain_s + 15


def test_07_an_operator_upgrade_restarts_no_pod() -> None:
    newer = DefaultImages("alise/engine:2", "alise/engine-cpu:2", "alise/sidecar:2")
    first = resolve_images(spec(), {}, IMAGES)
    assert resolve_images(spec(), first.model_dump(by_alias=True), newer) == first
    service = view()
    live = applied(plan(service, render(service).manifests, ()).apply)
    assert keeps_pods(service, live)
    # Where the pods are restarted anyway, the pins are given up.
    for change in ({"engine": {"accelerator": {"count": 0}}}, {"rollout": {"revision": "2"}}):
        assert not keeps_pods(view(**change), live)


def test_07_an_operator_that_renders_pods_differently_restarts_no_pod() -> None:
    service = view()
    manifests = render(service).manifests
    live = applied(plan(service, manifests, ()).apply)
    changed = deployment(service)
    changed["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 999  # a newer version
    others = [m for m in manifests if kind_of(m) is not DEPLOYMENT]
    assert plan(service, [*others, changed], live).apply == ()
    # A change that the user asks for brings the new rendering along.
    edited = view(engine={"maxModelLen": 10})
    (todo,) = plan(edited, [*others, changed], live).apply
    assert todo["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 999
    assert "999" in todo["metadata"]["annotations"][TEMPLATE]


def applied(manifests: Any) -> list[Child]:
    """Return what the API server makes of manifests, more or less."""
    return [
        Child(kind_of(m), {**m, "metadata": {**m["metadata"], "uid": f"u{i}"}})
        for i, m in enumerate(manifests)
    ]


def test_08_the_operator_does_not_fight_the_autoscaler() -> None:
    service = view(autoscaling={"minReplicas": 2, "maxReplicas": 5}, replicas=4)
    assert deployment(service)["spec"]["replicas"] == 4  # what the autoscaler wrote, within or not
    (scaler,) = [m for m in render(service).manifests if m["kind"] == "HorizontalPodAutoscaler"]
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": "serving.alise.dev/v1alpha1",
        "kind": "ALISEService",
        "name": "qwen",
    }


@pytest.mark.parametrize(
    "uri",
    ["hf://org/m", "s3://b/m", "pvc://c/m", "oci://m:1", "embedded://smollm2-135m-instruct"],
)
def test_09_a_non_root_user_can_write_all_caches(uri: str) -> None:
    # Adapters and draft models come from the hub, whatever the model comes from.
    service = view(model={"uri": uri})
    spec_of_pod, container = pod_template(service)["spec"], engine(service)
    writable = {
        mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
    }
    assert {"/tmp", "/dev/shm"} <= writable
    for item in container["env"]:
        if item.get("value", "").startswith("/"):
            assert any(item["value"].startswith(path) for path in writable), item
    assert spec_of_pod["securityContext"]["fsGroup"] == spec_of_pod["securityContext"]["runAsUser"]


def test_10_crds_are_upgraded_by_helm() -> None:
    assert not (CHART / "crds").exists()  # Helm would never upgrade what lies there
    template = (CHART / "templates" / "crds.yaml").read_text()
    assert '"helm.sh/resource-policy" "keep"' in template
    assert ".Values.crds.install" in template


def test_10_all_namespaces_are_served_unless_some_are_named() -> None:
    def scope(*options: str) -> tuple[set[str], list[str]]:
        bodies = render_chart(*options)
        (operator,) = [body for body in bodies if body["kind"] == "Deployment"]
        (container,) = operator["spec"]["template"]["spec"]["containers"]
        named = [item for item in container["args"] if item.startswith("--namespace")]
        roles = {body["kind"] for body in bodies if body["kind"].endswith("Role")}
        return roles, named

    assert scope() == ({"ClusterRole"}, [])
    some = scope("--set", "watchNamespaces={team-a,team-b}")
    assert some == ({"Role"}, ["--namespace=team-a", "--namespace=team-b"])


def test_also_no_service_links_secrets_per_service_and_termination_messages() -> None:
    service = view(imagePullSecrets=[{"name": "registry"}])
    spec_of_pod = pod_template(service)["spec"]
    assert spec_of_pod["enableServiceLinks"] is False
    assert spec_of_pod["imagePullSecrets"] == [{"name": "registry"}]
    for container in [*spec_of_pod["initContainers"], *spec_of_pod["containers"]]:
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
