"""kubectl and helm on the cluster of KUBECONFIG, for the tests. Knows nothing of kind."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "alise-e2e"
SYSTEM_NAMESPACE = "alise-system"
CLIENT = "client"
# Where a failure's logs and events go, and the figures.
OUT = Path(os.environ.get("E2E_OUT", ROOT / "build" / "e2e"))
# A slow machine may take longer: only a failure waits this long.
WAIT_S = float(os.environ.get("E2E_WAIT_S", "300"))
_COMMAND_S = 120


def run(*command: str, stdin: str | None = None, wait_s: float = _COMMAND_S) -> str:
    """Run a command and return what it prints; fails with what it says of its failure."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=wait_s)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{' '.join(command)}: not within {wait_s:g} s") from error
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def kubectl(*arguments: str, stdin: str | None = None, wait_s: float = _COMMAND_S) -> str:
    """Run kubectl in the tests' namespace."""
    return run("kubectl", "-n", NAMESPACE, *arguments, stdin=stdin, wait_s=wait_s)


def objects(*arguments: str) -> Any:
    """Return what `kubectl get` finds, parsed."""
    return json.loads(kubectl("get", *arguments, "-o", "json"))


def apply(*manifests: dict[str, Any]) -> None:
    """Apply manifests."""
    kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, manifests)))


def patch(service: str, **spec: Any) -> None:
    """Merge fields into a service's spec."""
    kubectl("patch", "alise", service, "--type=merge", "-p", json.dumps({"spec": spec}))


def status(service: str) -> dict[str, Any]:
    """Return a service's status, empty before there is one."""
    return dict(objects("alise", service).get("status", {}))


def condition(service: str, name: str = "Ready") -> tuple[str, str]:
    """Return status and reason of a condition, two empty strings before there is one."""
    for found in status(service).get("conditions", []):
        if found["type"] == name:
            return found["status"], found["reason"]
    return "", ""


def pods(service: str) -> list[dict[str, Any]]:
    """Return a service's pods."""
    return list(objects("pods", "-l", f"serving.alise.dev/service={service}")["items"])


def eventually(check: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> Any:
    """Return the first true value of `check`, which may fail before."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            last = check()
            if last:
                return last
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {wait_s:g} s: {what}; last: {last!r}")
        time.sleep(1)


def wait_ready(service: str) -> None:
    """Wait until all replicas serve."""
    deadline_s = time.monotonic() + WAIT_S
    while condition(service) != ("True", "AllReplicasReady"):
        if time.monotonic() > deadline_s:
            pytest.fail(f"{service} is not Ready: {json.dumps(status(service), indent=1)}")
        time.sleep(1)


def wait_connected(pod: dict[str, Any]) -> None:
    """Wait until a pod's engine streams to its sidecar, and so is learned from.

    An engine that has just started first makes its token table, at the lowest priority.
    """
    eventually(lambda: metric(pod, "alise_sessions") >= 1, "the engine is connected", 120)


def in_pod(pod: str, container: str, code: str, *arguments: str, wait_s: float = _COMMAND_S) -> str:
    """Run Python code in a container: all images have Python, none has curl or ps."""
    command = ("exec", "-i", pod, "-c", container, "--", "python3", "-", *arguments)
    return kubectl(*command, stdin=code, wait_s=wait_s)


def url(service: str) -> str:
    """Return the Service's URL inside the cluster."""
    return f"http://{service}.{NAMESPACE}.svc:8000/v1"


def chat(service: str, *options: str, wait_s: float = _COMMAND_S) -> list[dict[str, Any]]:
    """Send chat completions through the Service from another pod; return a dict for each."""
    code = (ROOT / "e2e" / "chat_client.py").read_text()
    lines = in_pod(CLIENT, CLIENT, code, url(service), *options, wait_s=wait_s).splitlines()
    return [json.loads(line) for line in lines]


@contextmanager
def load(service: str, *options: str) -> Iterator[list[dict[str, Any]]]:
    """Send requests while the body runs, which begins with the first token of an answer.

    The list has their results afterwards.
    """
    flag, begun, results = "/tmp/stop", "/tmp/stop.begun", []
    kubectl("exec", CLIENT, "--", "rm", "-f", flag, begun)

    def send() -> None:
        results.extend(chat(service, "--until", flag, *options, wait_s=900))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        eventually(lambda: kubectl("exec", CLIENT, "--", "ls", begun), "answers come", 120)
        yield results
    finally:
        kubectl("exec", CLIENT, "--", "touch", flag)
        sender.join()
    assert results, "no request was sent, or the client's pod failed"


def failed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the requests that failed, for messages of assertions."""
    return [each for each in results if "error" in each]


def restarts(service: str, container: str) -> int:
    """Return how often a container of the only pod was restarted."""
    (pod,) = pods(service)
    found = pod["status"]["containerStatuses"] + pod["status"]["initContainerStatuses"]
    (count,) = [each["restartCount"] for each in found if each["name"] == container]
    return int(count)


def uids(service: str) -> set[str]:
    """Return what tells a service's pods from others of the same name."""
    return {pod["metadata"]["uid"] for pod in pods(service)}


def wait_replaced(service: str, old: set[str]) -> None:
    """Wait until other pods than the `old` ones serve, and none else is there."""

    def is_replaced() -> bool:
        found = pods(service)
        return bool(found) and all(
            pod["metadata"]["uid"] not in old and _serves(pod) for pod in found
        )

    eventually(is_replaced, f"pods of {service} are replaced")
    wait_ready(service)


def _serves(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def metric(pod: dict[str, Any], name: str, port: int = 9464) -> float:
    """Return a metric of a pod, asked from another pod: the sum over the labels not in `name`.

    0 for labels that have not come up yet.
    """
    lines = _page(pod, "/metrics", port).splitlines()
    family = name.partition("{")[0]
    found = [each for each in lines if each.startswith(_starts(family))]
    assert found, f"{pod['metadata']['name']}:{port} has no metric {family}"
    return sum(float(each.rpartition(" ")[2]) for each in found if each.startswith(_starts(name)))


def _starts(name: str) -> tuple[str, str]:
    return f"{name} ", f"{name}{{"


def sidecar_document(pod: dict[str, Any]) -> dict[str, Any]:
    """Return what a pod's sidecar says of itself and its jobs."""
    return dict(json.loads(_page(pod, "/api/v1/status", 9464)))


def _page(pod: dict[str, Any], path: str, port: int) -> str:
    page = f"http://{pod['status']['podIP']}:{port}{path}"
    code = f"import urllib.request; print(urllib.request.urlopen({page!r}).read().decode())"
    return in_pod(CLIENT, CLIENT, code)
