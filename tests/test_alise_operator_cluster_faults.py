"""The operator under fire: killed, throttled, lied to, doubled. It always ends at the same state.

ALISE_TEST_KILLS=100 kills it a hundred times; by default a few, as each start takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from operator_cluster import (
    ROOT,
    SERVICES,
    ApiServer,
    Cluster,
    OperatorProcess,
    Service,
    binary,
    eventually,
    running,
)
from operator_fixtures import service_body
from operator_proxy import Fault, Proxy, Request

pytestmark = pytest.mark.cluster

KILLS = int(os.environ.get("ALISE_TEST_KILLS", "5"))
CHILDREN = (
    ("apis/apps/v1", "deployments"),
    ("api/v1", "services"),
    ("api/v1", "serviceaccounts"),
    ("api/v1", "configmaps"),
    ("api/v1", "persistentvolumeclaims"),
    ("apis/policy/v1", "poddisruptionbudgets"),
    ("apis/networking.k8s.io/v1", "networkpolicies"),
)
VOLATILE = ("uid", "resourceVersion", "creationTimestamp", "managedFields", "generation")


@pytest.fixture
def namespace(crd: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.removeprefix("test_").partition("[")[0].replace("_", "-")[:50]
    found = crd.namespace(name)
    yield found
    for body in crd.items(f"{SERVICES}/namespaces/{found}/aliseservices"):
        crd.delete(f"{SERVICES}/namespaces/{found}/aliseservices/{body['metadata']['name']}")


def make(cluster: Cluster, namespace: str, name: str, **fields: Any) -> Service:
    path = f"{SERVICES}/namespaces/{namespace}/aliseservices"
    answer = cluster.create(path, service_body(name, namespace, **fields))
    assert answer.is_success, answer.text
    return Service(cluster, namespace, name)


def state(service: Service) -> dict[str, Any]:
    """Return all children as they are, less what differs between any two objects."""
    found = {}
    for api, plural in CHILDREN:
        for body in service.cluster.items(f"{api}/namespaces/{service.namespace}/{plural}"):
            metadata = body["metadata"]
            if metadata.get("labels", {}).get("serving.alise.dev/service") != service.name:
                continue
            kept = {k: v for k, v in metadata.items() if k not in VOLATILE}
            kept["ownerReferences"] = len(kept["ownerReferences"])
            kept["annotations"].pop("serving.alise.dev/applied")  # a hash of name and uid, too
            spec = {k: v for k, v in body.get("spec", {}).items() if "clusterIP" not in k}
            found[plural] = (kept, spec, body.get("data"))
    return found


def as_of(name: str, found: dict[str, Any], other: str) -> dict[str, Any]:
    """Return the state of one service as it would be under another name."""
    return json.loads(json.dumps(found).replace(name, other))  # type: ignore[no-any-return]


@contextmanager
def proxied(
    crd: Cluster, kubeconfig: Path, folder: Path, *options: str
) -> Iterator[tuple[Proxy, OperatorProcess]]:
    token = kubeconfig.read_text().partition("token: ")[2].split()[0]
    with Proxy(crd.server.url) as proxy:
        behind = crd.server.kubeconfig("proxied", token, proxy.url)
        with running(OperatorProcess(behind, folder, *options)) as operator:
            yield proxy, operator


def is_quiet(operator: OperatorProcess) -> bool:
    """Say whether nothing waits for a reconcile, now and a moment later."""
    done = 'alise_operator_reconciles_total{result="done"'
    before = operator.metric(done)
    time.sleep(1)
    return operator.metric(done) == before > 0


def is_complete(service: Service) -> bool:
    return service.has_settled() and len(state(service)) == len(CHILDREN)


def test_killed_at_random_points_it_always_converges(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, namespace: str
) -> None:
    randomness = random.Random(7)
    operator = OperatorProcess(operator_kubeconfig, tmp_path)
    operator.start()
    try:
        reference = make(crd, namespace, "reference", engine={"maxModelLen": KILLS})
        service = make(crd, namespace, "kill-me-now", engine={"maxModelLen": 1})
        eventually(lambda: is_complete(reference) and is_complete(service))
        for kill in range(1, KILLS + 1):
            service.patch(engine={"maxModelLen": kill}, replicas=1 + kill % 3)
            for api, plural in randomness.sample(CHILDREN[:4], 2):  # much to do at once
                for name in (service.name, f"{service.name}-policy"):
                    crd.delete(f"{api}/namespaces/{namespace}/{plural}/{name}")
            time.sleep(randomness.uniform(0.0, 0.3))
            operator.kill()
            operator.start()
        service.patch(replicas=1)
        eventually(lambda: is_complete(service) and is_quiet(operator))
        undisturbed = as_of("reference", state(reference), "kill-me-now")
        assert as_of("kill-me-now", state(service), "kill-me-now") == undisturbed
    finally:
        operator.kill()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=409),
        Fault(status=429),
        Fault(status=500),
        Fault(status=503),
        Fault(delay_s=1.0),
        Fault(is_lost=True),
    ],
    ids=["409", "429", "500", "503", "slow", "lost"],
)
def test_failing_requests_are_retried(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, namespace: str, fault: Fault
) -> None:
    randomness = random.Random(3)

    def sometimes(request: Request) -> Fault | None:
        is_ours = request.verb in ("get", "create", "patch", "delete")
        return fault if is_ours and randomness.random() < 0.25 else None

    with proxied(crd, operator_kubeconfig, tmp_path) as (proxy, operator):
        proxy.faults = sometimes
        name = f"retried-{randomness.randrange(10**6)}-{fault.status or int(fault.is_lost)}"
        service = make(crd, namespace, name)
        eventually(lambda: is_complete(service), "all children despite the faults")
        service.patch(replicas=2)
        eventually(lambda: service.child("deployments")["spec"]["replicas"] == 2)
        assert proxy.spoiled > 0
        assert operator.get("healthz").status_code == 200
        assert "Traceback" not in operator.log


def test_watches_that_break_are_resumed(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, namespace: str
) -> None:
    with proxied(crd, operator_kubeconfig, tmp_path) as (proxy, _):
        service = make(crd, namespace, "watched")
        eventually(lambda: is_complete(service))
        proxy.faults = lambda request: Fault(status=500) if request.verb == "watch" else None
        service.patch(replicas=4)
        proxy.faults = lambda _: None
        eventually(lambda: service.child("deployments")["spec"]["replicas"] == 4)


def test_an_optional_api_that_goes_away_under_its_watch_ends_the_process_which_starts_anew(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, namespace: str
) -> None:
    crd.install_crd(ROOT / "tests" / "crds" / "podmonitors.yaml")
    try:
        with proxied(crd, operator_kubeconfig, tmp_path) as (proxy, operator):
            service = make(crd, namespace, "bereft")
            eventually(lambda: is_complete(service))
            proxy.faults = lambda r: Fault(status=404) if r.resource == "podmonitors" else None
            proxy.cut()
            assert operator.wait() == 1
            assert "the watches broke" in operator.log
            proxy.faults = lambda _: None
            service.patch(replicas=3)
            operator.start()  # as the kubelet does
            eventually(lambda: service.child("deployments")["spec"]["replicas"] == 3)
            crd.delete(f"api/v1/namespaces/{namespace}/services/bereft")
            eventually(lambda: service.child("services", None, "api/v1") is not None)
    finally:
        crd.remove_crd("podmonitors.monitoring.coreos.com")


def test_an_api_server_that_restarts_is_waited_for(
    crd: Cluster, api_server: ApiServer, operator_kubeconfig: Path, tmp_path: Path, namespace: str
) -> None:
    with running(OperatorProcess(operator_kubeconfig, tmp_path)):
        service = make(crd, namespace, "restarted")
        eventually(lambda: is_complete(service))
        api_server.stop("kube-apiserver")
        time.sleep(2)
        api_server.start()
        service.patch(replicas=5)
        eventually(lambda: service.child("deployments")["spec"]["replicas"] == 5)
        crd.delete(f"api/v1/namespaces/{namespace}/services/restarted")
        eventually(lambda: service.child("services", None, "api/v1") is not None)


def test_of_two_operators_one_works_and_the_other_takes_over(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, namespace: str
) -> None:
    options = ("--peering", "alise-operator", "--priority")
    low = OperatorProcess(operator_kubeconfig, tmp_path, *options, "1")
    high = OperatorProcess(operator_kubeconfig, tmp_path, *options, "2")
    with running(low):
        service = make(crd, namespace, "two")
        eventually(lambda: is_complete(service))
        with running(high):
            eventually(lambda: "Pausing operations in favour of" in low.log)
            time.sleep(6)  # what the lower one still had to do is done or dropped
            before = low.metric('alise_operator_reconciles_total{result="done"')
            service.patch(replicas=2)
            eventually(lambda: service.child("deployments")["spec"]["replicas"] == 2)
            assert low.metric('alise_operator_reconciles_total{result="done"') == before
            versions = [service.body["metadata"]["resourceVersion"]]
            time.sleep(2)
            assert service.body["metadata"]["resourceVersion"] == versions[0]  # nobody fights
        service.patch(replicas=3)
        eventually(lambda: service.child("deployments")["spec"]["replicas"] == 3)


def test_an_audit_finds_what_no_watch_told(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, namespace: str
) -> None:
    with proxied(crd, operator_kubeconfig, tmp_path, "--audit-s", "3") as (proxy, operator):
        service = make(crd, namespace, "audited")
        eventually(lambda: is_complete(service))
        # From now on every watch hangs, and a deletion goes unseen.
        proxy.faults = lambda r: Fault(delay_s=600) if r.verb == "watch" else None
        proxy.cut()
        crd.delete(f"api/v1/namespaces/{namespace}/services/audited")
        eventually(lambda: service.child("services", None, "api/v1") is not None)
        assert operator.metric("alise_operator_missed_events_total") >= 1
        service.patch(replicas=2)
        eventually(lambda: service.child("deployments")["spec"]["replicas"] == 2)
        # Two audits in a row that find something: the watches are dead, and the kubelet is told.
        eventually(lambda: operator.get("healthz").status_code == 503)


@pytest.mark.parametrize("is_up", [True, False], ids=["operator-up", "operator-down"])
def test_deleting_a_namespace_never_hangs(
    crd: Cluster, operator_kubeconfig: Path, tmp_path: Path, is_up: bool
) -> None:
    manager = binary("kube-controller-manager")
    if manager is None:
        pytest.skip("needs kube-controller-manager, whose namespace controller deletes")
    name = crd.namespace(f"to-delete-{'up' if is_up else 'down'}")
    operator = OperatorProcess(operator_kubeconfig, tmp_path)
    with running(operator):
        service = make(crd, name, "doomed")
        eventually(lambda: is_complete(service))
        if not is_up:
            operator.stop()
        config = crd.server.kubeconfig("controllers")
        command = [manager, f"--kubeconfig={config}", "--leader-elect=false", "--secure-port=0"]
        command += ["--controllers=namespace-controller,garbage-collector-controller"]
        command += ["--controllers=persistentvolumeclaim-protection-controller"]
        with (tmp_path / "controllers.log").open("wb") as log:
            controllers = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            crd.delete(f"api/v1/namespaces/{name}")
            gone = lambda: crd.get(f"api/v1/namespaces/{name}") is None  # noqa: E731
            eventually(gone, "it is gone", wait_s=60)
        except BaseException:
            print((tmp_path / "controllers.log").read_text()[-3000:])
            raise
        finally:
            controllers.terminate()
            controllers.wait(20)
        if is_up:
            assert "Traceback" not in operator.log
