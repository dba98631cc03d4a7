"""Least privilege, as far as a cluster shows it. The namespaces enforce "restricted" throughout."""

from __future__ import annotations

import json

import pytest
from cluster import NAMESPACE, SYSTEM_NAMESPACE, in_pod, kubectl, objects, pods, run

# Ports that listen on more than the loopback interface, from the kernel's own tables.
_OPEN_PORTS = """
import pathlib
for table in ("tcp", "tcp6"):
    for line in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        address, port = local.split(":")
        if state == "0A" and address not in ("0100007F", "0" * 24 + "01000000"):
            print(int(port, 16))
"""


def test_the_namespaces_enforce_restricted_and_the_pods_run(smol: str) -> None:
    for namespace in (NAMESPACE, SYSTEM_NAMESPACE):
        labels = objects("namespace", namespace)["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    (pod,) = pods(smol)
    assert pod["status"]["phase"] == "Running"


@pytest.mark.parametrize("verb", ["get", "list", "watch", "create", "delete"])
def test_the_operator_may_not_touch_secrets(operator: None, verb: str) -> None:
    subject = f"system:serviceaccount:{SYSTEM_NAMESPACE}:alise-alise-operator"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": subject, "resourceAttributes": {"verb": verb, "resource": "secrets"}},
    }
    command = ("kubectl", "create", "-o", "json", "-f", "-")
    assert not json.loads(run(*command, stdin=json.dumps(review)))["status"]["allowed"]


def test_the_operator_may_list_pods(operator: None) -> None:
    """The other way round: the name of the account is right."""
    subject = f"system:serviceaccount:{SYSTEM_NAMESPACE}:alise-alise-operator"
    assert kubectl("auth", "can-i", "list", "pods", f"--as={subject}").strip() == "yes"


def test_nothing_listens_but_http_and_metrics(smol: str) -> None:
    """So no other pod reaches the sidecar's stream, a socket in the pod's own volume."""
    (pod,) = pods(smol)
    ports = set(map(int, in_pod(pod["metadata"]["name"], "engine", _OPEN_PORTS).split()))
    policy = objects("networkpolicy", smol)
    allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert allowed == {8000, 9464}
    assert {8000, 9464} <= ports
    assert ports - allowed == set()
