"""Sidecar and engine die under load from an ordinary client: all is Ready again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cluster
import pytest
from cluster import CLIENT, chat, eventually, in_pod, kubectl, metric, pods, wait_ready

_TERMINATE = "import os, signal; os.kill(1, signal.SIGTERM)"
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


@contextmanager
def load(service: str, *options: str) -> Iterator[list[dict[str, Any]]]:
    """Send requests while the body runs; the list has their results afterwards."""
    flag, results = "/tmp/stop", []
    kubectl("exec", CLIENT, "--", "rm", "-f", flag)

    def send() -> None:
        results.extend(chat(service, "--until", flag, *options, wait_s=600))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield results
    finally:
        kubectl("exec", CLIENT, "--", "touch", flag)
        sender.join()


def restarts(service: str, container: str) -> int:
    """Return how often a container of the only pod was restarted."""
    (pod,) = pods(service)
    found = pod["status"]["containerStatuses"] + pod["status"]["initContainerStatuses"]
    (count,) = [each["restartCount"] for each in found if each["name"] == container]
    return int(count)


def samples(service: str) -> float:
    """Return how many finished jobs the sidecar has learned from."""
    (pod,) = pods(service)
    return metric(pod, "alise_samples")


def test_a_sidecar_that_dies_costs_no_request_and_forgets_nothing(smol: str) -> None:
    chat(smol, "--requests", "3")
    eventually(lambda: samples(smol) >= 3, "answers are samples", 60)
    before, (pod,) = samples(smol), pods(smol)
    count = restarts(smol, "predictor")
    with load(smol, "--concurrency", "2") as results:
        in_pod(pod["metadata"]["name"], "predictor", _TERMINATE)
        eventually(lambda: restarts(smol, "predictor") > count, "the sidecar is restarted", 60)
        eventually(lambda: cluster.condition(smol, "PredictorReady")[0] == "True", "Ready", 60)
    assert results
    assert [each for each in results if "error" in each] == []
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
    broken = [each for each in results if "error" in each]
    # Only what streamed from the killed engine: the client can't know how to go on.
    assert len(broken) <= 2, broken
    assert any("error" not in each for each in results)
