"""The reconcile with an API server made of a dictionary, and the parts around it."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

pytest.importorskip("lightkube", reason="needs the extra 'operator'")

from alise_operator.audit import Audit
from alise_operator.images import DefaultImages
from alise_operator.kube import NotThereError, RefusedError, UnavailableError
from alise_operator.leadership import CLUSTER_PEERING, Leadership, leads
from alise_operator.manifests import engine
from alise_operator.manifests.kinds import ALISE_SERVICE, KINDS, OPTIONAL, Kind
from alise_operator.metrics import Metrics
from alise_operator.optional_apis import OptionalApis
from alise_operator.reconcile import Reconciler
from alise_operator.store import Key, ObjectName, Store
from alise_operator.work_queue import RetryLaterError, WorkQueue
from operator_fixtures import IMAGES, service_body

KEY = Key("default", "qwen")


class FakeKube:
    """Keeps objects as applied; answers like the API server in what the operator relies on."""

    def __init__(self) -> None:
        self.objects: dict[ObjectName, dict[str, Any]] = {}
        self.version = 0
        self.writes: list[tuple[str, str]] = []
        self.events: list[str] = []
        self.absent = set(OPTIONAL)
        self.failures: list[Exception] = []

    def write(self, kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        name = ObjectName(kind, body["metadata"]["namespace"], body["metadata"]["name"])
        old = self.objects.get(name, {"metadata": {"uid": f"uid-{self.version}"}})
        merged = deepcopy({**old, **body})
        merged["metadata"] = {
            **deepcopy(body["metadata"]),
            "uid": old["metadata"]["uid"],
            "resourceVersion": str(self.version),
            "generation": body["metadata"].get("generation", 1),
        }
        self.objects[name] = merged
        return deepcopy(merged)

    def fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    async def get(self, kind: Kind, namespace: str | None, name: str) -> dict[str, Any] | None:
        return deepcopy(self.objects.get(ObjectName(kind, namespace or "", name)))

    async def apply(self, kind: Kind, manifest: dict[str, Any]) -> dict[str, Any]:
        self.fail()
        if kind in self.absent:
            raise NotThereError(kind.kind)
        self.writes.append(("apply", kind.kind))
        return self.write(kind, manifest)

    async def apply_status(self, service: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
        self.fail()
        self.writes.append(("status", ""))
        return self.write(ALISE_SERVICE, {**service, "status": status})

    async def delete(self, kind: Kind, namespace: str, name: str) -> None:
        self.writes.append(("delete", kind.kind))
        self.objects.pop(ObjectName(kind, namespace, name), None)

    async def create_event(self, event: dict[str, Any]) -> None:
        self.events.append(event["reason"])

    async def list(self, kind: Kind, namespace: str | None):
        if kind in self.absent:
            raise NotThereError(kind.kind)
        for name, body in list(self.objects.items()):
            if name.kind is kind:
                yield deepcopy(body)

    async def exists(self, kind: Kind, namespace: str | None) -> bool:
        return kind not in self.absent


class World:
    """A reconciler, and what it acts on."""

    def __init__(self, images: DefaultImages = IMAGES, kube: FakeKube | None = None) -> None:
        self.kube = kube or FakeKube()
        self.store = Store()
        self.apis = OptionalApis(self.kube, None)  # type: ignore[arg-type]
        self.metrics = Metrics()
        self.reconciler = Reconciler(
            self.kube,  # type: ignore[arg-type]
            self.store,
            self.apis,
            images,
            self.metrics,
            now=lambda: "2026-01-01T00:00:00Z",
        )
        for name, body in self.kube.objects.items():
            self.store.put(name.kind, body)

    def user_applies(self, **fields: Any) -> None:
        body = service_body(**fields)
        old = self.kube.objects.get(ObjectName(ALISE_SERVICE, *KEY))
        generation = old["metadata"]["generation"] + 1 if old else 1
        body["metadata"]["generation"] = generation
        self.store.put(ALISE_SERVICE, self.kube.write(ALISE_SERVICE, body))

    def reconcile(self) -> list[tuple[str, str]]:
        """Reconcile once; returns the writes."""
        self.kube.writes.clear()
        asyncio.run(self.reconciler.reconcile(KEY))
        return list(self.kube.writes)

    @property
    def status(self) -> dict[str, Any]:
        return self.kube.objects[ObjectName(ALISE_SERVICE, *KEY)]["status"]

    def child(self, kind_name: str, name: str = "qwen") -> dict[str, Any]:
        (kind,) = [kind for kind in KINDS if kind.kind == kind_name]
        return self.kube.objects[ObjectName(kind, "default", name)]


@pytest.fixture
def world() -> World:
    found = World()
    found.user_applies()
    return found


def test_a_second_reconcile_writes_nothing(world: World) -> None:
    assert len(world.reconcile()) == 9  # pins, seven children, status
    assert world.reconcile() == []


def test_a_restarted_operator_writes_nothing(world: World) -> None:
    world.reconcile()
    assert World(kube=world.kube).reconcile() == []


def test_an_upgraded_operator_restarts_no_pod(world: World) -> None:
    world.reconcile()
    newer = World(NEWER, world.kube)
    assert newer.reconcile() == []
    newer.user_applies(rollout={"revision": "2"})
    newer.reconcile()
    assert newer.status["resolvedImages"]["engine"] == "engine:2"
    assert "engine:2" in json.dumps(newer.child("Deployment"))


NEWER = DefaultImages("engine:2", "cpu:2", "sidecar:2")


def upgraded(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A newer operator's view of the same cluster: other default images, another pod template."""
    monkeypatch.setitem(engine._PATHS, "NEW_IN_TEMPLATE", "1")
    return World(NEWER, world.kube)


@pytest.mark.parametrize(
    "edit",
    [
        {"engine": {"maxModelLen": 5}},
        {"engine": {"accelerator": {"count": 0}}},
        {"scheduling": {"preemption": {"enabled": False}}},
        {"rollout": {"revision": "2"}},
    ],
    ids=["engine", "cpu", "preemption", "revision"],
)
def test_a_restart_brings_the_new_template_and_the_new_images_together(
    world: World, monkeypatch: pytest.MonkeyPatch, edit: dict[str, Any]
) -> None:
    world.reconcile()
    newer = upgraded(world, monkeypatch)
    assert newer.reconcile() == []
    newer.user_applies(**edit)
    assert newer.reconcile()[0] == ("status", "")  # pinned before they are used
    pod = json.dumps(newer.child("Deployment")["spec"]["template"])
    wanted = "cpu:2" if "accelerator" in edit.get("engine", {}) else "engine:2"
    assert all(f'"{image}"' in pod for image in (wanted, "sidecar:2", "NEW_IN_TEMPLATE"))
    images = newer.status["resolvedImages"]
    assert (images["engine"], images["predictor"]) == (wanted, "sidecar:2")
    assert newer.reconcile() == []


@pytest.mark.parametrize(
    "edit",
    [{"replicas": 3}, {"scheduling": {"policy": "FCFS"}}, {"exposure": {"service": {"port": 1}}}],
    ids=["replicas", "policy", "port"],
)
def test_a_change_without_a_restart_adopts_neither(
    world: World, monkeypatch: pytest.MonkeyPatch, edit: dict[str, Any]
) -> None:
    world.reconcile()
    before = world.child("Deployment")["spec"]["template"]
    newer = upgraded(world, monkeypatch)
    newer.user_applies(**edit)
    assert newer.reconcile()
    assert newer.child("Deployment")["spec"]["template"] == before
    assert newer.status["resolvedImages"]["engine"] == IMAGES.engine


def test_own_images_stay_and_defaults_come_back_when_they_are_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.user_applies(engine={"image": "mine:1"})
    world.reconcile()
    newer = upgraded(world, monkeypatch)
    assert newer.reconcile() == []
    newer.user_applies(engine={"image": "mine:1", "maxModelLen": 5})
    newer.reconcile()
    images = newer.status["resolvedImages"]
    assert (images["engine"], images["predictor"]) == ("mine:1", "sidecar:2")
    newer.user_applies(engine={"maxModelLen": 5})
    newer.reconcile()
    assert newer.status["resolvedImages"]["engine"] == "engine:2"
    assert '"engine:2"' in json.dumps(newer.child("Deployment"))


def test_while_it_is_paused_images_stay_and_come_with_the_change_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.reconcile()
    newer = upgraded(world, monkeypatch)
    newer.user_applies(paused=True, engine={"maxModelLen": 5})
    newer.reconcile()
    assert newer.status["resolvedImages"]["engine"] == IMAGES.engine
    newer.user_applies(engine={"maxModelLen": 5})
    newer.reconcile()
    assert newer.status["resolvedImages"]["engine"] == "engine:2"


def test_images_are_pinned_before_they_are_used(world: World) -> None:
    assert world.reconcile()[0] == ("status", "")
    world = World()
    world.user_applies()
    world.kube.failures = [UnavailableError("down")]
    with pytest.raises(RetryLaterError):
        world.reconcile()
    assert world.kube.writes == []


@pytest.mark.parametrize("fails_at", range(9))
def test_a_failure_anywhere_is_continued_where_it_broke(world: World, fails_at: int) -> None:
    calls = iter(range(100))

    def fail() -> None:
        if next(calls) == fails_at:
            raise UnavailableError("500: injected", after_s=3.0)

    world.kube.fail = fail  # type: ignore[method-assign]
    with pytest.raises(RetryLaterError) as caught:
        world.reconcile()
    assert caught.value.after_s == 3.0
    world.reconcile()
    undisturbed = World()
    undisturbed.user_applies()
    undisturbed.reconcile()
    assert {name.kind.kind for name in world.kube.objects} == {
        name.kind.kind for name in undisturbed.kube.objects
    }
    assert world.reconcile() == []


def test_replicas_and_knobs_touch_only_what_they_must(world: World) -> None:
    world.reconcile()
    world.user_applies(replicas=3)
    assert world.reconcile() == [("apply", "Deployment"), ("status", "")]
    world.user_applies(replicas=3, scheduling={"policy": "FCFS"})
    assert world.reconcile() == [("apply", "ConfigMap"), ("status", "")]


def test_what_is_refused_is_reported_and_the_rest_goes_on(world: World) -> None:
    original = world.kube.apply

    async def apply(kind: Kind, manifest: dict[str, Any]) -> dict[str, Any]:
        if kind.kind == "Service":
            raise RefusedError("Service: port is taken")
        return await original(kind, manifest)

    world.kube.apply = apply  # type: ignore[method-assign]
    with pytest.raises(RetryLaterError) as caught:
        world.reconcile()
    assert caught.value.after_s >= 60
    conditions = {c["type"]: c for c in world.status["conditions"]}
    assert conditions["Degraded"]["message"] == "Service: port is taken"
    assert world.child("Deployment")
    assert "Refused" in world.kube.events


def test_one_child_that_fails_does_not_hold_back_the_others(world: World) -> None:
    original = world.kube.apply

    async def apply(kind: Kind, manifest: dict[str, Any]) -> dict[str, Any]:
        if kind.kind == "ServiceAccount":
            raise UnavailableError("500: a webhook is broken", others_may_succeed=True)
        return await original(kind, manifest)

    world.kube.apply = apply  # type: ignore[method-assign]
    with pytest.raises(RetryLaterError):
        world.reconcile()
    assert world.child("Deployment")


def test_an_invalid_spec_touches_no_child(world: World) -> None:
    world.reconcile()
    world.user_applies(replicas="many")
    assert world.reconcile() == [("status", "")]
    conditions = {c["type"]: c for c in world.status["conditions"]}
    assert conditions["SpecValid"]["status"] == "False"
    assert "spec.replicas" in conditions["SpecValid"]["message"]
    assert world.reconcile() == []


def ready_sample(world: World) -> float | None:
    labels = {"namespace": "default", "name": "qwen"}
    return world.metrics.registry.get_sample_value("alise_operator_service_ready", labels)


def test_no_alert_for_a_service_that_is_scaled_to_zero_or_gone(world: World) -> None:
    world.reconcile()
    assert ready_sample(world) == 0.0
    world.user_applies(replicas=0)
    world.reconcile()
    assert ready_sample(world) is None
    world.user_applies(replicas=1)
    world.reconcile()
    assert ready_sample(world) == 0.0
    world.store.drop(ObjectName(ALISE_SERVICE, *KEY))
    world.reconcile()
    assert ready_sample(world) is None


def test_a_deleted_service_is_left_to_the_garbage_collector(world: World) -> None:
    world.reconcile()
    body = world.kube.objects[ObjectName(ALISE_SERVICE, *KEY)]
    world.store.drop(ObjectName(ALISE_SERVICE, *KEY), body["metadata"]["uid"])
    assert world.reconcile() == []
    assert world.child("Deployment")


def test_an_api_that_goes_away_in_the_middle_is_noticed(world: World) -> None:
    world.kube.absent.clear()
    world.apis.absent.clear()
    world.user_applies(monitoring={"enabled": True})
    world.kube.absent = set(OPTIONAL)
    with pytest.raises(RetryLaterError):
        world.reconcile()
    world.reconcile()
    conditions = {c["type"]: c["status"] for c in world.status["conditions"]}
    assert conditions["IntegrationsReady"] == "False"


def test_what_the_server_keeps_in_another_form_is_not_applied_for_ever(world: World) -> None:
    original = world.kube.write

    def canonical(kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(body).replace('"16Gi"', '"17179869184"')
        return original(kind, json.loads(text))

    world.kube.write = canonical  # type: ignore[method-assign]
    limits = {"containers": [{"name": "engine", "resources": {"limits": {"memory": "16Gi"}}}]}
    world.user_applies(podTemplate={"spec": limits})
    world.reconcile()
    assert world.reconcile() == []


def test_stale_events_do_not_undo_what_was_written(world: World) -> None:
    world.reconcile()
    old = deepcopy(world.child("Deployment"))
    world.user_applies(engine={"maxModelLen": 5})
    world.reconcile()
    (kind,) = [kind for kind in KINDS if kind.kind == "Deployment"]
    world.store.put(kind, old)  # an event of the time before
    assert world.reconcile() == []


def test_the_store_forgets_only_what_it_knows_by_uid() -> None:
    store, body = Store(), service_body()
    body["metadata"] |= {"uid": "new", "resourceVersion": "5"}
    store.put(ALISE_SERVICE, body)
    name = ObjectName(ALISE_SERVICE, *KEY)
    assert store.drop(name, "old") is None
    assert store.service(KEY)
    assert store.drop(name, "new") == KEY
    assert store.services() == []


NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def peer(priority: int, age_s: float = 0.0) -> dict[str, Any]:
    seen = NOW - timedelta(seconds=age_s)
    return {"priority": priority, "lifetime": 60, "lastseen": seen.isoformat()}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, True),
        ({"other": peer(1)}, True),
        ({"other": peer(5)}, False),
        ({"other": peer(9)}, False),
        ({"other": peer(9, age_s=61)}, True),
        ({"me": peer(5)}, True),
    ],
    ids=["alone", "lower", "same", "higher", "dead", "self"],
)
def test_who_leads(others: dict[str, Any], expected: bool) -> None:
    assert leads(others, "me", 5, NOW) is expected


def test_a_guard_without_its_crd_says_what_to_install() -> None:
    kube = FakeKube()
    kube.absent.add(CLUSTER_PEERING)
    guarded = Leadership(kube, "alise-operator", (), "me", 1)  # type: ignore[arg-type]
    with pytest.raises(NotThereError, match=r"install kopf's CRDs .* or run without --peering"):
        asyncio.run(guarded.prepare())


def test_each_key_is_worked_on_once_at_a_time_and_again_after_news() -> None:
    async def scenario() -> None:
        running, most, done = 0, 0, []

        async def work(key: str) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            done.append(key)

        queue: WorkQueue[str] = WorkQueue(work, lambda *_: None)
        task = asyncio.create_task(queue.run(4))
        for _ in range(5):
            queue.add("a")
        await asyncio.sleep(0.005)
        queue.add("a")  # news while it is worked on
        queue.add("a")
        while not queue.is_idle:
            await asyncio.sleep(0.01)
        task.cancel()
        assert (done, most) == (["a", "a"], 1)

    asyncio.run(scenario())


def test_failures_are_retried_with_growing_pauses_and_others_go_on() -> None:
    async def scenario() -> None:
        tries: list[float] = []
        errors: list[str] = []
        clock = asyncio.get_running_loop().time

        async def work(key: str) -> None:
            if key == "bad":
                tries.append(clock())
                if len(tries) == 1:
                    raise RetryLaterError("soon")
                if len(tries) == 2:
                    raise ValueError("a bug")

        queue: WorkQueue[str] = WorkQueue(work, lambda key, error: errors.append(str(error)))
        task = asyncio.create_task(queue.run(1))
        queue.add("bad")
        queue.add("good")
        while len(tries) < 3:
            await asyncio.sleep(0.02)
        task.cancel()
        first, second = tries[1] - tries[0], tries[2] - tries[1]
        assert 0.5 <= first < second
        assert errors == ["a bug"]

    asyncio.run(scenario())


def test_an_audit_repairs_what_watches_missed(world: World) -> None:
    world.reconcile()

    async def scenario() -> None:
        queue: WorkQueue[Key] = WorkQueue(world.reconciler.reconcile, lambda *_: None)
        alone = Leadership(world.kube, None, (), "me", 1)  # type: ignore[arg-type]
        audit = Audit(
            world.kube,  # type: ignore[arg-type]
            world.store,
            queue,
            alone,
            world.metrics,
            (None,),
            world.apis.absent,
            grace_s=0.01,
        )
        assert await audit.run_once() == 0
        (service,) = [n for n in world.kube.objects if n.kind.kind == "Service"]
        del world.kube.objects[service]
        assert await audit.run_once() == 1
        assert audit.is_healthy  # once may happen: a watch that reconnects
        assert len(queue) == 1
        body = deepcopy(world.kube.objects[ObjectName(ALISE_SERVICE, *KEY)])
        world.kube.write(ALISE_SERVICE, body)  # a change that no watch told of
        assert await audit.run_once() == 1
        assert not audit.is_healthy
        assert await audit.run_once() == 0
        assert audit.is_healthy

    asyncio.run(scenario())
