"""The status document: who runs, who waits and why; over HTTP, with its limits."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from alise_scheduler.cost_model import ServiceRates, StepCost
from alise_scheduler.estimates import Pricing
from alise_scheduler.policy import Policy, PolicyParameters
from alise_scheduler.queue_view import JobFacts, Pace, overtakers, rows, short_id
from alise_scheduler.status import (
    EngineFacts,
    Facts,
    PredictorFacts,
    Query,
    QueryError,
    Status,
)
from hypothesis import given
from hypothesis import strategies as st
from patience import eventually
from scheduler_fakes import FakePredictor, finished, progress, prompt_input
from status_harness import MadeUpEngine, sidecar_page

PACE = Pace(now_s=100.0, slots=2, rates=ServiceRates(0.0, 0.1), mean_service_s=5.0)


def facts(
    job_id: str,
    arrival_s: float,
    priority: float,
    state: str = "waiting",
    left: float | None = 10.0,
) -> JobFacts:
    return JobFacts(job_id, state, arrival_s, 8, 8, 0, 0, priority, left, None)


def test_rows_are_those_that_run_and_then_the_queue() -> None:
    found = rows(
        [
            facts("late-short", 30.0, 5.0, left=20),
            facts("first", 10.0, 9.0, "running", left=30),
            facts("early-long", 20.0, 19.0, "preempted", left=40),
        ],
        [25.0, 5.0],
        PACE,
    )
    assert [(row.facts.job_id, row.place) for row in found] == [
        ("first", None),
        ("late-short", 1),
        ("early-long", 2),
    ]
    # One slot was had while jobs wait: memory allows no second. 30 tokens left are 3 s.
    assert [row.ewt_s for row in found] == [None, 3.0, 5.0]
    assert [row.remaining_s for row in found] == [3.0, 2.0, 4.0]
    assert found[1].overtakes == 1
    # The one ahead in the queue, and one that arrived later and has ended.
    assert found[2].overtaken == 2
    assert overtakers(found[2], found) == ("late-short",)
    assert found[2].age_s == 80.0


def test_a_job_without_an_estimate_counts_as_a_mean_one_or_nothing_is_said() -> None:
    jobs = [facts("a", 1.0, 1.0, "running", left=None), facts("b", 2.0, 2.0)]
    assert rows(jobs, [], PACE)[1].ewt_s == 5.0
    unknown = Pace(100.0, 2, PACE.rates, None)
    assert [row.ewt_s for row in rows(jobs, [], unknown)] == [None, None]


@pytest.mark.parametrize(("first_tokens", "wait_s"), [(0, 5.0), (16, 3.0)])
def test_a_long_job_waits_for_the_queue_unless_first_tokens_come_early(
    first_tokens: int, wait_s: float
) -> None:
    pace = Pace(now_s=100.0, slots=1, rates=PACE.rates, mean_service_s=5.0)
    pricing = Pricing(Policy.BOOST, PolicyParameters(), pace.rates, first_tokens)
    jobs = [facts("runs", 0.0, 0.0, "running", left=30.0), facts("waits", 60.0, 50.0, left=20.0)]
    engine = EngineFacts("engine", "model", True, pace, pricing, StepCost(), jobs, ())
    predictor = PredictorFacts(1, 0.0, 64, FakePredictor().quality())
    status = Status.of(Facts("1", "boost", [engine], predictor, 0, 0))
    times = status.times_of(prompt_input(), (1000.0,) * 5)
    assert times is not None
    assert times.wait_s == pytest.approx(wait_s)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(-5, 5), st.sampled_from(["running", "waiting"])),
        max_size=30,
    )
)
def test_who_passed_whom_is_what_comparing_all_pairs_says(
    jobs: list[tuple[int, int, str]],
) -> None:
    found = rows([facts(str(i), a, p, state) for i, (a, p, state) in enumerate(jobs)], [], PACE)
    assert Counter(row.facts.job_id for row in found) == Counter(map(str, range(len(jobs))))
    for index, row in enumerate(found):
        at_s = row.facts.arrival_s
        behind = [r for r in found[index:] if r.place is not None]
        assert row.overtakes == sum(r.facts.arrival_s < at_s for r in behind)
        passed = [r for r in found[:index] if r.facts.arrival_s > at_s] if row.place else []
        assert row.overtaken == len(passed)
        assert overtakers(row, found) == tuple(r.facts.job_id for r in passed[:3])


@pytest.mark.parametrize(
    ("job_id", "shown"),
    [
        ("chatcmpl-0123456789abcdef-0123", "01234567…0123"),
        ("short", "short"),
        ("\x1b[31m<b>ü", "?[31m<b>?"),
    ],
)
def test_an_id_is_shortened_and_printable(job_id: str, shown: str) -> None:
    assert short_id(job_id) == shown


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"state": "asleep"}, "allowed are running, waiting, preempted and queued"),
        ({"limit": "501"}, "allowed are whole numbers of 0 to 500"),
        ({"offset": "-1"}, "offset='-1'"),
        ({"offset": "²"}, "offset='²'"),
        ({"search": "x" * 65}, "65 characters"),
        ({"page": "2"}, "unknown parameter 'page'"),
    ],
)
def test_a_query_that_cannot_be_is_refused(parameters: dict[str, str], text: str) -> None:
    with pytest.raises(QueryError, match=text.replace("²", ".")):
        Query.of(parameters)


def get(engine: MadeUpEngine, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(engine.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def written(engine: MadeUpEngine, query: str = "") -> bytes:
    """Return the document as it is sent; a sidecar that is busy is asked again."""
    path = f"/api/v1/status?{query}"
    status, _, body = eventually(lambda: (found := get(engine, path))[0] != 503 and found)
    assert status == 200, body
    return bytes(body)


def document(engine: MadeUpEngine, query: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written(engine, query))
    return found


def test_the_document_follows_the_engine(tmp_path: Path) -> None:
    predictor = FakePredictor(model_version=3)
    with sidecar_page(tmp_path, predictor) as engine:
        assert document(engine)["engines"] == []
        engine.connect(slots=2)
        engine.send(
            engine.arrive("long", ago_s=20, tokens=900),
            engine.arrive("short", ago_s=10, tokens=5),
            progress("short", 2, new=2),
        )
        found = eventually(
            lambda: (
                (d := document(engine))["jobs"]["running"] == 1
                and d["jobs"]["rows"][1]["p50_tokens"]
                and d
            )
        )
        short, long = found["jobs"]["rows"]
        assert (short["id"], short["state"], short["place"]) == ("short", "running", None)
        assert short["overtakes"] == 1
        assert (long["id"], long["place"], long["overtaken_by"]) == ("long", 1, ["short"])
        assert (long["p10_tokens"], long["p90_tokens"]) == (450, 1800)
        assert 20 <= long["age_s"] < 30
        assert long["boost_s"] >= 0
        (described,) = found["engines"]
        assert (described["model"], described["slots"]) == ("tiny", 2)
        assert described["is_connected"]
        assert found["predictor"]["model_version"] == 3
        assert found["predictor"]["tau_b"] is None  # JSON knows no NaN
        engine.send(finished("short", 4))
        ended = eventually(lambda: (d := document(engine))["since_start"]["finished"] and d)
        # It came later and is done: still one that passed.
        assert ended["jobs"]["rows"][0]["overtaken"] == 1
        engine.disconnect()
        eventually(lambda: not document(engine)["engines"][0]["is_connected"])


def test_nothing_of_prompts_is_in_the_document(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        engine.connect()
        engine.send(engine.arrive("a", tokens=31337), progress("a", 5, new=5))
        eventually(lambda: document(engine)["jobs"]["rows"])
        keys = document(engine)["jobs"]["rows"][0].keys()
        assert not {key for key in keys if "text" in key or "token_ids" in key}
        for job in document(engine)["jobs"]["rows"]:
            assert not any(isinstance(v, list) for k, v in job.items() if k != "overtaken_by")


def test_ten_thousand_jobs_are_cut_into_pages_and_searched(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        engine.connect()
        engine.crowd(10_000)
        eventually(lambda: document(engine)["jobs"]["running"] == 4)
        page = document(engine, "offset=9990&limit=50")
        assert len(page["jobs"]["rows"]) == 10
        assert page["jobs"]["matching"] == 10_000
        one = document(engine, "search=CMPL-09999")
        assert [job["id"] for job in one["jobs"]["rows"]] == ["09999"]
        assert document(engine, "state=queued")["jobs"]["matching"] == 9_996
        assert len(written(engine, "limit=500")) < 400_000


def test_a_copy_that_is_still_right_is_not_sent_again(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        for path in ("/", "/status.js", "/status.css", "/api/v1/status"):
            _, headers, body = get(engine, path)
            assert body
            status, _, body = get(engine, path, **{"If-None-Match": headers["ETag"]})
            assert (status, body) == (304, b"")


def test_the_page_may_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        for path in ("/", "/api/v1/status", "/nowhere"):
            _, headers, _ = get(engine, path)
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/nowhere", 404, "there are /, /api/v1/status and /metrics"),
        ("/../server.py", 404, "there are"),
        ("/api/v1/status?limit=many", 400, "whole numbers"),
        ("/api/v1/status?search=" + "x" * 2000, 400, "the query has"),
        ("/api/v1/status?" + "a=1&" * 9, 400, "parameters"),
    ],
)
def test_bad_requests_say_what_is_allowed(
    tmp_path: Path, path: str, status: int, text: str
) -> None:
    with sidecar_page(tmp_path) as engine:
        code, _, body = get(engine, path)
        assert code == status
        assert text in json.loads(body)["error"]


def test_only_reading_is_allowed(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        request = urllib.request.Request(engine.url + "/api/v1/status", data=b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(request, timeout=120)


def test_many_askers_cost_one_copy_each_half_second(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        engine.connect()
        engine.send(engine.arrive("a"))
        eventually(lambda: document(engine)["jobs"]["rows"])
        began_s, seen = time.monotonic(), set()
        for _ in range(30):
            seen.add(document(engine)["jobs"]["rows"][0]["age_s"])
        assert len(seen) <= 2 + (time.monotonic() - began_s) / 0.5
