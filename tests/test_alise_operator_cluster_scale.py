"""Many services; at full size: ALISE_TEST_SERVICES=500 ALISE_TEST_STEADY_S=60 pytest FILE -s."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from operator_cluster import SERVICES, Cluster, OperatorProcess, eventually, running
from operator_fixtures import service_body

pytestmark = pytest.mark.cluster

COUNT = int(os.environ.get("ALISE_TEST_SERVICES", "20"))
STEADY_S = float(os.environ.get("ALISE_TEST_STEADY_S", "5"))
NAMESPACE = "scale"
PATH = f"{SERVICES}/namespaces/{NAMESPACE}/aliseservices"
_REQUESTS = "alise_operator_api_requests_total"
_LIMIT_S = 300.0
_LIMIT_MIB = 200.0


@pytest.mark.timeout(900)
def test_many_services(crd: Cluster, operator_kubeconfig: Path, tmp_path: Path) -> None:
    crd.namespace(NAMESPACE)
    for index in range(COUNT):
        answer = crd.create(PATH, service_body(f"s-{index}", NAMESPACE))
        assert answer.is_success, answer.text
    # Optional APIs are looked for as often as by default. Audits come five times as often, so that
    # a minute of the steady state has one in it.
    pace = {"ALISE_OPERATOR_DISCOVERY_S": "30", "ALISE_OPERATOR_AUDIT_S": "60"}
    operator = OperatorProcess(operator_kubeconfig, tmp_path, "--peering", "alise-operator", **pace)
    try:
        started_s = time.monotonic()
        with running(operator):

            def settled() -> bool:
                time.sleep(1)  # to list them all is work for the API server too
                found = crd.items(PATH)
                return all("conditions" in body.get("status", {}) for body in found)

            eventually(settled, "all are reconciled", wait_s=_LIMIT_S)
            took_s = time.monotonic() - started_s
            eventually(lambda: operator.metric("alise_operator_queue_length") == 0)
            time.sleep(3)  # the echo of the last writes
            before = operator.metric(_REQUESTS)
            written = writes(operator)
            time.sleep(STEADY_S)
            rate = (operator.metric(_REQUESTS) - before) / STEADY_S
            memory_mib = operator.metric("process_resident_memory_bytes") / 2**20
            print(
                f"\n{COUNT} services: initial reconcile {took_s:.1f} s, steady state "
                f"{rate:.2f} requests/s, {writes(operator) - written:g} writes in "
                f"{STEADY_S:g} s, {memory_mib:.0f} MiB"
            )
            assert writes(operator) == written
            assert rate < 1 or STEADY_S < 30  # a short look may fall on a look for optional APIs
            assert memory_mib < _LIMIT_MIB
    finally:
        for index in range(COUNT):
            crd.delete(f"{PATH}/s-{index}")


def writes(operator: OperatorProcess) -> float:
    """Return the requests so far that change something, status and events included."""
    lines = operator.get("metrics").text.splitlines()
    verbs = ('verb="apply"', 'verb="delete"', 'verb="create"')
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(_REQUESTS) and any(verb in line for verb in verbs)
    )
