"""The requests that the operator makes, and what it makes of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("lightkube", reason="needs the extra 'operator'")

import httpx2 as httpx
from alise_operator.kube import Kube, NotThereError, RefusedError, UnavailableError
from alise_operator.manifests.kinds import DEPLOYMENT
from alise_operator.metrics import Metrics
from lightkube import AsyncClient, KubeConfig
from lightkube.config.models import Cluster, User

CONFIG = KubeConfig.from_one(user=User(token="t"), cluster=Cluster(server="http://api.example"))


def kube(answer: Callable[[httpx.Request], httpx.Response]) -> tuple[Kube, Metrics]:
    metrics = Metrics()
    client = AsyncClient(config=CONFIG.get(), transport=httpx.MockTransport(answer))
    return Kube(client, metrics), metrics


def counted(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Return requests by verb and code."""
    return {
        (sample.labels["verb"], sample.labels["code"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "alise_operator_api_requests_total"
    }


@pytest.mark.parametrize(("objects", "pages"), [(0, 1), (1, 1), (100, 1), (250, 3), (500, 5)])
def test_a_list_counts_as_its_pages(objects: int, pages: int) -> None:
    requests = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        limit = int(request.url.params["limit"])
        start = int(request.url.params.get("continue", 0))
        end = min(start + limit, objects)
        names = [{"metadata": {"name": f"d-{i}", "namespace": "a"}} for i in range(start, end)]
        metadata = {"resourceVersion": "1", "continue": str(end) if end < objects else ""}
        body = {"apiVersion": "apps/v1", "kind": "DeploymentList", "items": names}
        return httpx.Response(200, json={**body, "metadata": metadata})

    async def scenario() -> tuple[list[Any], Metrics]:
        found, metrics = kube(answer)
        return [body async for body in found.list(DEPLOYMENT, None)], metrics

    bodies, metrics = asyncio.run(scenario())
    assert [body["metadata"]["name"] for body in bodies] == [f"d-{i}" for i in range(objects)]
    assert len(requests) == pages
    assert counted(metrics) == {("list", "200"): pages}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (404, NotThereError),
        (403, RefusedError),
        (422, RefusedError),
        (401, UnavailableError),
        (409, UnavailableError),
        (429, UnavailableError),
        (500, UnavailableError),
        (503, UnavailableError),
    ],
)
def test_what_a_failure_means(code: int, expected: type[Exception]) -> None:
    said = {"apiVersion": "v1", "kind": "Status", "code": code, "message": "no"}

    async def scenario() -> Metrics:
        found, metrics = kube(
            lambda _: httpx.Response(code, json=said, headers={"Retry-After": "7"})
        )
        metadata = {"name": "d", "namespace": "a"}
        with pytest.raises(expected, match="no") as caught:
            await found.apply(DEPLOYMENT, {"metadata": metadata})
        if isinstance(caught.value, UnavailableError) and code != 401:
            assert caught.value.after_s == 7.0
            # An overloaded server is left alone; a fault may be this object's only.
            assert caught.value.others_may_succeed == (code not in (429, 503))
        return metrics

    assert counted(asyncio.run(scenario())) == {("apply", str(code)): 1.0}


def test_a_connection_that_breaks_is_tried_again_later() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async def scenario() -> Metrics:
        found, metrics = kube(answer)
        with pytest.raises(UnavailableError, match="refused"):
            await found.get(DEPLOYMENT, "a", "d")
        return metrics

    assert counted(asyncio.run(scenario())) == {("get", "none"): 1.0}
