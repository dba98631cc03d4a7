"""Pods that really run: on the cluster of ALISE_TEST_NODE_KUBECONFIG, with stand-in images.

The node must know the image ALISE_TEST_STANDIN_IMAGE (tests/standin/Dockerfile; default
localhost/alise-standin:1) and advertise two `nvidia.com/gpu`; docs/operator.md tells how.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_cluster import OperatorProcess, eventually, needs, running
from operator_fixtures import ROOT, merge, service_body

pytestmark = pytest.mark.cluster

KUBECONFIG = os.environ.get("ALISE_TEST_NODE_KUBECONFIG")
IMAGE = os.environ.get("ALISE_TEST_STANDIN_IMAGE", "localhost/alise-standin:1")
NAMESPACE = "alise-node-test"
SMALL: dict[str, Any] = {
    "model": {"cache": {"enabled": False}},
    "kvSwap": {"enabled": False},
    "engine": {
        "resources": {"cpu": "10m", "memoryGiB": 1},
        "shmGiB": 1,
        "accelerator": {"count": 0},
    },
    "predictor": {"resources": {"cpu": "10m", "memoryGiB": 1}},
    "lifecycle": {"drainSeconds": 0},
}
GPU = {"engine": {"accelerator": {"count": 1}}}

if KUBECONFIG is None:
    pytestmark = [
        pytest.mark.cluster,
        pytest.mark.skip(reason="needs a node: set ALISE_TEST_NODE_KUBECONFIG (docs/operator.md)"),
    ]


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    (path,) = needs("kubectl")
    done = subprocess.run(
        [path, "--kubeconfig", str(KUBECONFIG), "-n", NAMESPACE, *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    kubectl("create", "namespace", NAMESPACE, check=False)
    # The strictest standard: what the operator makes must be admitted.
    label = "pod-security.kubernetes.io/enforce=restricted"
    kubectl("label", "--overwrite", "namespace", NAMESPACE, label)
    kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    options = ("--engine-image", IMAGE, "--engine-cpu-image", IMAGE, "--predictor-image", IMAGE)
    folder = tmp_path_factory.mktemp("node")
    process = OperatorProcess(Path(str(KUBECONFIG)), folder, *options, "--namespace", NAMESPACE)
    try:
        with running(process):
            yield process
    finally:
        kubectl("delete", "alise", "--all", check=False)
        kubectl("delete", "namespace", NAMESPACE, "--wait=false", check=False)


@pytest.fixture
def serve(operator: OperatorProcess) -> Iterator[Callable[..., Callable[[], dict[str, Any]]]]:
    """Make a service; returns a function that returns its status."""
    made = []

    def make(name: str, **fields: Any) -> Callable[[], dict[str, Any]]:
        body = service_body(name, NAMESPACE, **merge(SMALL, fields))
        kubectl("apply", "-f", "-", stdin=json.dumps(body))
        made.append(name)
        return lambda: json.loads(kubectl("get", "alise", name, "-o", "json")).get("status", {})

    yield make
    for name in made:
        kubectl("delete", "alise", name, check=False)
    eventually(lambda: not json.loads(kubectl("get", "pods", "-o", "json"))["items"])


def reason(status: dict[str, Any], condition: str) -> tuple[str, str]:
    (found,) = [c for c in status["conditions"] if c["type"] == condition]
    return found["status"], found["reason"]


def test_pods_become_ready_and_serve(serve: Any) -> None:
    status = serve("ready")
    eventually(lambda: reason(status(), "Ready") == ("True", "AllReplicasReady"))
    assert reason(status(), "PredictorReady") == ("True", "PredictorsRun")
    found = status()
    assert (found["replicas"], found["readyReplicas"]) == (1, 1)
    assert found["selector"] == "serving.alise.dev/service=ready"
    pods = json.loads(kubectl("get", "pods", "-l", found["selector"], "-o", "json"))["items"]
    assert len(pods) == 1


def test_status_follows_a_crash(serve: Any) -> None:
    crash = [{"name": "STANDIN", "value": "crash"}]
    status = serve("crash", engine={"env": crash})
    eventually(lambda: reason(status(), "Ready") == ("False", "Crashed"))
    failure = status()["lastFailure"]
    assert failure["exitCode"] == 3
    assert failure["message"] == "RuntimeError: the stand-in crashes as told"
    assert failure["container"] == "engine"


def test_status_follows_an_out_of_memory(serve: Any) -> None:
    status = serve("memory", engine={"env": [{"name": "STANDIN", "value": "oom"}]})
    eventually(lambda: reason(status(), "Ready") == ("False", "OutOfMemory"))
    assert status()["lastFailure"]["exitCode"] == 137


def test_a_probe_that_never_succeeds_is_named(serve: Any) -> None:
    status = serve(
        "hang",
        engine={"env": [{"name": "STANDIN", "value": "hang"}]},
        lifecycle={"startupTimeoutSeconds": 30},
    )
    eventually(lambda: reason(status(), "Ready") == ("False", "ModelLoading"))
    eventually(lambda: reason(status(), "Degraded") == ("True", "ProbeFailed"), wait_s=150)


def test_status_follows_an_unschedulable_pod(serve: Any) -> None:
    status = serve("nowhere", placement={"nodeSelector": {"no": "such-node"}})
    eventually(lambda: reason(status(), "Ready") == ("False", "Unschedulable"))
    assert "didn't match Pod's node affinity/selector" in status()["lastFailure"]["message"]


def test_status_follows_a_missing_image(serve: Any) -> None:
    status = serve("no-image", engine={"image": "localhost/no-such-image:1"})
    try:
        eventually(lambda: reason(status(), "Ready") == ("False", "ImagePullFailed"))
    except BaseException:
        print(json.dumps(status(), indent=1))
        print(kubectl("describe", "pods"))
        raise


def test_status_follows_a_scale_up_beyond_the_gpus(serve: Any) -> None:
    status = serve("gpus", **GPU, replicas=2)
    eventually(lambda: reason(status(), "Ready") == ("True", "AllReplicasReady"))
    kubectl("scale", "alise", "gpus", "--replicas=3")
    eventually(lambda: reason(status(), "Ready") == ("False", "Unschedulable"))
    assert "Insufficient nvidia.com/gpu" in status()["lastFailure"]["message"]
    assert status()["readyReplicas"] == 2
    kubectl("scale", "alise", "gpus", "--replicas=2")
    eventually(lambda: reason(status(), "Ready") == ("True", "AllReplicasReady"))
    # A rolling update on the full node: no surge, so it does not wait for a third GPU.
    patch = json.dumps({"spec": {"rollout": {"revision": "2"}}})
    kubectl("patch", "alise", "gpus", "--type=merge", "-p", patch)
    eventually(
        lambda: (
            status()["resolvedImages"]["revision"] == "2"
            and status()["updatedReplicas"] == 2
            and reason(status(), "Ready") == ("True", "AllReplicasReady")
        ),
        wait_s=150,
    )


def test_changing_the_policy_restarts_no_pod(serve: Any) -> None:
    status = serve("policy")
    eventually(lambda: reason(status(), "Ready") == ("True", "AllReplicasReady"))
    before = kubectl("get", "pods", "-o", "name")
    patch = json.dumps({"spec": {"scheduling": {"policy": "FCFS"}}})
    kubectl("patch", "alise", "policy", "--type=merge", "-p", patch)
    eventually(
        lambda: "fcfs" in kubectl("get", "configmap", "policy-policy", "-o", "jsonpath={.data}")
    )
    eventually(lambda: reason(status(), "Progressing") == ("False", "Stable"))
    assert kubectl("get", "pods", "-o", "name") == before
