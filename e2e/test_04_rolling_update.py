"""A rolling update under load, on nodes whose GPUs are all taken: no deadlock, no request lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import NAMESPACE, apply, failed, kubectl, load, patch, pods, run, uids, wait_replaced
from conftest import CONTAINER_SECURITY, image

_FILLER = "filler"


@pytest.fixture
def one_gpu_left(operator: None) -> Iterator[None]:
    """Take all GPUs of the cluster but one."""
    nodes = json.loads(run("kubectl", "get", "nodes", "-o", "json"))["items"]
    total = sum(int(node["status"]["allocatable"].get("nvidia.com/gpu", 0)) for node in nodes)
    assert total, "no node advertises nvidia.com/gpu; e2e/run.sh simulates them on kind"
    container = {
        "name": _FILLER,
        "image": image("sidecar"),
        "command": ["sleep", "infinity"],
        "securityContext": CONTAINER_SECURITY,
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
    }
    labels = {"app": _FILLER}
    spec = {"terminationGracePeriodSeconds": 0, "containers": [container]}
    apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": _FILLER, "namespace": NAMESPACE},
            "spec": {
                "replicas": total - 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": spec},
            },
        }
    )
    kubectl("rollout", "status", f"deployment/{_FILLER}", "--timeout=120s", wait_s=130)
    yield
    kubectl("delete", "deployment", _FILLER)


def engine(pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod's engine container."""
    (container,) = pod["spec"]["containers"]
    return dict(container)


@pytest.mark.timeout(1200)
def test_no_request_is_lost_and_full_nodes_are_no_deadlock(smol: str, one_gpu_left: None) -> None:
    # Answers of some seconds, so that there always is one to drain; the stock client's own retries,
    # more than by default: with one replica and no room for another, nobody answers for a while.
    with load(smol, "--concurrency", "2", "--tokens", "60", "--retries", "100") as results:
        before = uids(smol)
        patch(smol, engine={"accelerator": {"count": 1}, "image": image("engine")})
        wait_replaced(smol, before)
        (pod,) = pods(smol)
        assert engine(pod)["resources"]["limits"]["nvidia.com/gpu"] == "1"

        before = uids(smol)
        patch(smol, engine={"maxModelLen": 1024})
        wait_replaced(smol, before)
        (pod,) = pods(smol)
        assert "1024" in engine(pod)["args"]
    assert failed(results) == []
    before = uids(smol)
    patch(smol, engine={"accelerator": {"count": 0}, "image": None, "maxModelLen": None})
    wait_replaced(smol, before)
