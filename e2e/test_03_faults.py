"""Sidecar, engine, pod and operator die under load from an ordinary client: all is Ready again."""

from __future__ import annotations

import cluster
import pytest
from cluster import (
    SYSTEM_NAMESPACE,
    chat,
    eventually,
    failed,
    in_pod,
    kubectl,
    load,
    metric,
    pods,
    restarts,
    run,
    wait_connected,
    wait_ready,
    wait_replaced,
)

# The sidecar is the child of process 1, which starts it again.
_SIDECAR = """
import os, pathlib, signal, sys
for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
    pid, _, rest = status.read_text().partition(" (")
    if rest.rpartition(")")[2].split()[1] == "1" and int(pid) != os.getpid():
        print(pid)
        if {is_killed}:
            os.kill(int(pid), signal.SIGKILL)
"""
# vLLM's engine core sets its own name; its parent, process 1, answers HTTP.
_KILL_ENGINE_CORE = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        line = (folder / "cmdline").read_bytes() + (folder / "comm").read_bytes()
    except OSError:
        continue
    if b"EngineCor" in line:
        os.kill(int(folder.name), signal.SIGKILL)
        print("killed", folder.name)
"""


def samples(service: str) -> float:
    """Return how many finished jobs the sidecar has learned from."""
    (pod,) = pods(service)
    return metric(pod, "alise_samples")


def test_a_sidecar_that_dies_costs_no_request_and_forgets_nothing(smol: str) -> None:
    (pod,) = pods(smol)
    wait_connected(pod)
    chat(smol, "--requests", "3")
    eventually(lambda: samples(smol) >= 3, "answers are samples", 60)
    before = samples(smol)
    name, count = pod["metadata"]["name"], restarts(smol, "predictor")
    with load(smol, "--concurrency", "2") as results:
        killed = in_pod(name, "predictor", _SIDECAR.format(is_killed=True)).split()
        eventually(
            lambda: (
                in_pod(name, "predictor", _SIDECAR.format(is_killed=False)).split()
                not in ([], killed)
            ),
            "the sidecar is started again",
            60,
        )
    assert restarts(smol, "predictor") == count
    assert failed(results) == []
    assert restarts(smol, "engine") == 0
    eventually(lambda: samples(smol) >= before, "samples are still there", 60)
    wait_ready(smol)


@pytest.mark.timeout(900)
def test_an_engine_that_dies_is_told_of_and_comes_back(smol: str) -> None:
    (pod,) = pods(smol)
    count = restarts(smol, "engine")
    # The stock client's own retries, more of them than by default: a restart takes longer.
    with load(smol, "--concurrency", "2", "--retries", "60") as results:
        killed = in_pod(pod["metadata"]["name"], "engine", _KILL_ENGINE_CORE)
        assert "killed" in killed
        eventually(lambda: cluster.condition(smol)[0] == "False", "status says so", 60)
        eventually(lambda: restarts(smol, "engine") > count, "the engine is restarted", 120)
        wait_ready(smol)
        assert cluster.status(smol)["lastFailure"]["container"] == "engine"
    # Only what streamed from the killed engine: the client can't know how to go on.
    assert len(failed(results)) <= 2, failed(results)
    assert len(results) > len(failed(results))


@pytest.mark.timeout(900)
def test_a_pod_that_dies_is_replaced(smol: str) -> None:
    before, (pod,) = cluster.uids(smol), pods(smol)
    with load(smol, "--concurrency", "2", "--retries", "100") as results:
        kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
        eventually(lambda: cluster.condition(smol)[0] == "False", "status says so", 30)
        wait_replaced(smol, before)
    assert len(failed(results)) <= 2, failed(results)
    assert len(results) > len(failed(results))


def test_an_operator_that_dies_is_not_missed(smol: str) -> None:
    before = cluster.uids(smol)
    system = ("kubectl", "-n", SYSTEM_NAMESPACE)
    with load(smol) as results:
        run(*system, "delete", "pods", "--all", "--grace-period=0", "--force")
        run(*system, "rollout", "status", "deployment", "--timeout=120s", wait_s=130)
        # It works: what it has to tell comes as before.
        cluster.patch(smol, scheduling={"gammaMilli": 500})
        generation = cluster.objects("alise", smol)["metadata"]["generation"]
        eventually(
            lambda: cluster.status(smol)["observedGeneration"] == generation, "it is seen", 120
        )
    assert failed(results) == []
    assert cluster.uids(smol) == before
    cluster.patch(smol, scheduling={"gammaMilli": None})
    wait_ready(smol)
