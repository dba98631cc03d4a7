"""The operator's process: what its health page and its metrics say of what runs inside."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("kopf", reason="needs the extra 'operator'")

import httpx2 as httpx
from alise_operator.images import DefaultImages
from alise_operator.process import Operator
from alise_operator.reconcile import Reconciler
from alise_operator.settings import Settings
from alise_operator.store import Key
from alise_operator.work_queue import RetryLaterError
from lightkube import AsyncClient, KubeConfig
from lightkube.config.models import Cluster, User

SETTINGS = Settings(
    images=DefaultImages("engine", "engine-cpu", "sidecar"),
    namespaces=(),
    peering=None,
    priority=1,
    identity="test",
    port=0,
    workers=1,
    discovery_s=0.01,
    audit_s=60.0,
)


def operator() -> Operator:
    """Return an operator whose API server answers nothing."""
    config = KubeConfig.from_one(user=User(token="t"), cluster=Cluster(server="http://api.example"))
    transport = httpx.MockTransport(lambda _: httpx.Response(503))
    return Operator(SETTINGS, AsyncClient(config=config.get(), transport=transport))


def test_a_part_that_dies_makes_the_process_unhealthy(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        found = operator()

        async def broken() -> None:
            raise ValueError("a bug")

        found._start(found.queue.run(1), "the work queue")
        await asyncio.sleep(0)
        assert found.is_healthy
        found._start(broken(), "the audit")
        await asyncio.sleep(0.01)
        assert not found.is_healthy
        await found._finish()

    asyncio.run(scenario())
    assert "the audit has ended" in caplog.text
    assert "a bug" in caplog.text
    assert "the work queue has ended" not in caplog.text  # it was told to


def test_metrics_follow_the_queue_and_a_bug_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Exception | None] = [None, RetryLaterError("later"), ValueError("a bug")]

    async def reconcile(*_: object) -> None:
        if outcome := outcomes.pop(0):
            raise outcome

    monkeypatch.setattr(Reconciler, "reconcile", reconcile)

    async def scenario() -> None:
        found = operator()

        def value(name: str, **labels: str) -> float | None:
            return found.metrics.registry.get_sample_value(name, labels)

        for name in ("a", "b", "c"):
            found.queue.add(Key("default", name))
        assert value("alise_operator_queue_length") == 3.0
        found._start(found.queue.run(1), "the work queue")
        while not found.queue.is_idle:
            await asyncio.sleep(0.01)
        assert value("alise_operator_queue_length") == 0.0
        for result in ("done", "retried", "failed"):
            assert value("alise_operator_reconciles_total", result=result) == 1.0
        await found._finish()

    asyncio.run(scenario())
