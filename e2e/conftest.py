"""The suite's cluster: chart, a namespace that enforces "restricted", a client pod, one service.

Any cluster: KUBECONFIG says which. It has the images of E2E_OPERATOR_IMAGE, E2E_SIDECAR_IMAGE and
E2E_ENGINE_IMAGE or can pull them; the default is what `make images` builds.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import cluster
import pytest
import yaml
from cluster import CLIENT, NAMESPACE, ROOT, SYSTEM_NAMESPACE, kubectl, run

_CHART = ROOT / "charts" / "alise-operator"
VERSION = yaml.safe_load((_CHART / "Chart.yaml").read_text())["appVersion"]
RELEASE = "alise"
# What "restricted" asks of a container.
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def image(name: str) -> str:
    """Return the image of `operator`, `sidecar` or `engine`."""
    default = f"alise/{'engine-cpu' if name == 'engine' else name}:{VERSION}"
    return os.environ.get(f"E2E_{name.upper()}_IMAGE", default)


def helm(verb: str, *options: str) -> None:
    """Run helm on the release."""
    chart = () if verb == "uninstall" else (str(_CHART),)
    where = ("--namespace", SYSTEM_NAMESPACE, "--wait")
    run("helm", verb, RELEASE, *chart, *where, *options, wait_s=300)


def install() -> None:
    """Install the chart with the images of this run."""
    repository, _, tag = image("operator").rpartition(":")
    values = {
        "image.repository": repository,
        "image.tag": tag,
        "defaultImages.engineCpu": image("engine"),
        "defaultImages.predictor": image("sidecar"),
    }
    options = [f"--set-string={name}={value}" for name, value in values.items()]
    helm("upgrade", "--install", *options)


@pytest.fixture(scope="session")
def operator() -> Iterator[None]:
    """Install the chart in a namespace that enforces "restricted", as the tests' own does.

    With E2E_KEEP set, all stays when the tests are done, and the next run takes it up.
    """
    for namespace in (SYSTEM_NAMESPACE, NAMESPACE):
        body = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": namespace,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        }
        run("kubectl", "apply", "-f", "-", stdin=json.dumps(body))
    install()
    yield
    if os.environ.get("E2E_KEEP"):
        return
    run("kubectl", "delete", "alise", "--all", "--all-namespaces", "--wait")
    helm("uninstall")
    run("kubectl", "delete", "namespace", NAMESPACE, SYSTEM_NAMESPACE, wait_s=300)


@pytest.fixture(scope="session")
def client(operator: None) -> str:
    """Start a pod from which requests come: through DNS and the Service, as users' do."""
    container = {
        "name": CLIENT,
        "image": image("engine"),  # vLLM brings the OpenAI client along
        "command": ["sleep", "infinity"],
        # Without a share of its own it would starve beside busy engines, and send no burst.
        "resources": {"requests": {"cpu": "500m"}},
        "securityContext": CONTAINER_SECURITY,
    }
    pod = {"terminationGracePeriodSeconds": 0, "containers": [container]}
    metadata = {"name": CLIENT, "namespace": NAMESPACE}
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod})
    kubectl("wait", "pod", CLIENT, "--for=condition=Ready", "--timeout=300s", wait_s=310)
    return CLIENT


@pytest.fixture(scope="session")
def smol(operator: None, client: str) -> str:
    """Apply the README's example for CPUs and wait until it is Ready."""
    start_s = time.monotonic()
    kubectl("apply", "-f", str(ROOT / "examples" / "cpu.yaml"))
    cluster.wait_ready("smol")
    ready_s = time.monotonic() - start_s
    print(f"\nReady {ready_s:.0f} s after apply")
    return "smol"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """Keep logs and events of a failure, before anything is cleaned up."""
    report = yield
    if report.failed:
        folder = cluster.OUT / "failures" / item.name
        folder.mkdir(parents=True, exist_ok=True)
        names = f"--namespaces={NAMESPACE},{SYSTEM_NAMESPACE}"
        commands = {
            "dump.txt": ["kubectl", "cluster-info", "dump", names, f"--output-directory={folder}"],
            "services.yaml": ["kubectl", "get", "alise", "-A", "-o", "yaml"],
            "pods.txt": ["kubectl", "-n", NAMESPACE, "describe", "pods"],
            "logs.txt": [
                *("kubectl", "-n", NAMESPACE, "logs", "-l", "serving.alise.dev/service"),
                *("--all-containers", "--prefix", "--tail=500"),
            ],
        }
        for name, command in commands.items():
            with (folder / name).open("w") as target, suppress(subprocess.TimeoutExpired):
                subprocess.run(command, stdout=target, stderr=target, timeout=120)
        print(f"logs and events: {folder}")
    return report
