"""The scheduler plug-in inside real vLLM schedulers; the sidecar's stream is a fake."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from alise_bench.scheduler_setup import BLOCK_SIZE, build_scheduler
from alise_engine import scheduler as plugin
from alise_engine.client import Estimate
from alise_engine.events import Arrived, Finished, Snapshot
from alise_engine.scheduler import AliseScheduler
from alise_scheduler.events import Preempted, StepTiming
from alise_scheduler.v1 import scheduler_pb2 as pb
from fakes import FakeClient
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm_factories import Driver, create_request


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a factory of (scheduler, fake client)."""
    monkeypatch.setenv("ALISE_SCHEDULER", "unix:///nobody.sock")
    monkeypatch.setattr(plugin, "SidecarClient", FakeClient)

    def create(**options: Any) -> tuple[AliseScheduler, FakeClient]:
        scheduler = build_scheduler(AliseScheduler, tmp_path, **options)
        return scheduler, scheduler._client

    return create


def estimate(request: Request, priority: float, remaining_tokens: float = 100.0) -> Estimate:
    return Estimate(request.request_id, priority, remaining_tokens, request.num_output_tokens)


def add(scheduler: AliseScheduler, count: int, **options: Any) -> list[Request]:
    requests = [create_request(**options) for _ in range(count)]
    for request in requests:
        scheduler.add_request(request)
    return requests


def running_ids(scheduler: AliseScheduler) -> set[str]:
    return {request.request_id for request in scheduler.running}


def test_without_an_address_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALISE_SCHEDULER", raising=False)
    scheduler = build_scheduler(AliseScheduler, tmp_path)
    assert isinstance(scheduler.waiting, FCFSRequestQueue)
    driver = Driver(scheduler)
    request = create_request(max_tokens=3)
    scheduler.add_request(request)
    for _ in range(3):
        driver.step()
    assert driver.finished == [request.request_id]


def test_a_better_waiting_job_takes_the_slot_of_the_worst(make: Any) -> None:
    scheduler, client = make(slots=2)
    driver = Driver(scheduler)
    long_a, long_b = add(scheduler, 2)
    driver.step()
    client.estimates = [estimate(long_a, 100.0, 1000), estimate(long_b, 90.0, 900)]
    (short,) = add(scheduler, 1)
    client.estimates.append(estimate(short, 0.0, 10))
    output = driver.step()
    assert running_ids(scheduler) == {long_b.request_id, short.request_id}
    assert long_a.request_id not in output.num_scheduled_tokens
    assert long_a.request_id in output.preempted_req_ids
    assert long_a.status == RequestStatus.PREEMPTED
    assert client.of_type(Preempted) == [Preempted(long_a.request_id, 1)]
    driver.step({short.request_id})
    driver.step()
    assert long_a.request_id in running_ids(scheduler)


def test_nobody_is_preempted_for_an_adapter_that_has_no_place(make: Any) -> None:
    scheduler, client = make(slots=2)
    scheduler.lora_config = LoRAConfig(max_loras=1)
    driver = Driver(scheduler)

    def add_with_adapter(number: int) -> Request:
        request = create_request()
        request.lora_request = LoRARequest(f"adapter {number}", number, "nowhere")
        scheduler.add_request(request)
        return request

    holder, long = add_with_adapter(1), add(scheduler, 1)[0]
    driver.step()
    other = add_with_adapter(2)
    client.estimates = [estimate(holder, 90.0, 900), estimate(long, 100.0, 1000)]
    client.estimates.append(estimate(other, 0.0, 10))
    driver.step()
    assert running_ids(scheduler) == {holder.request_id, long.request_id}
    same = add_with_adapter(1)
    client.estimates = [estimate(same, 1.0, 10)]
    driver.step()
    assert running_ids(scheduler) == {holder.request_id, same.request_id}


def test_a_victim_does_not_come_back_in_the_same_step(make: Any) -> None:
    # The candidate needs more tokens than the step's budget leaves: a slot stays empty.
    scheduler, client = make(slots=1, max_num_batched_tokens=64)
    driver = Driver(scheduler)
    (long,) = add(scheduler, 1)
    driver.step()
    (short,) = add(scheduler, 1, prompt_tokens=200)
    client.estimates = [estimate(long, 100.0, 1000), estimate(short, 0.0, 5)]
    output = driver.step()
    assert output.preempted_req_ids == {long.request_id}
    assert long.request_id not in output.num_scheduled_tokens
    assert long in list(scheduler.waiting)


def test_waiting_jobs_follow_their_newest_estimates(make: Any) -> None:
    scheduler, client = make(slots=1)
    driver = Driver(scheduler)
    first, *others = add(scheduler, 4)
    driver.step()
    client.estimates = [estimate(job, p) for job, p in zip(others, (30.0, 10.0, 20.0), strict=True)]
    driver.step()
    assert [r.request_id for r in scheduler.waiting] == [others[i].request_id for i in (1, 2, 0)]
    client.estimates = [estimate(others[0], 5.0)]
    driver.step()
    assert scheduler.waiting.peek_request() is others[0]
    driver.step({first.request_id})


def test_estimates_of_unknown_jobs_are_ignored(make: Any) -> None:
    scheduler, client = make()
    driver = Driver(scheduler)
    (job,) = add(scheduler, 1, max_tokens=2)
    client.estimates = [Estimate("never was", 1.0, 5.0, 0)]
    driver.step()
    driver.step()
    client.estimates = [estimate(job, 1.0)]
    driver.step()
    assert driver.finished == [job.request_id]
    assert scheduler._ranked_jobs == 0


def test_a_lost_sidecar_means_arrival_order(make: Any) -> None:
    scheduler, client = make(slots=1)
    driver = Driver(scheduler)
    jobs = add(scheduler, 4)
    client.estimates = [estimate(job, -float(i)) for i, job in enumerate(jobs)]
    driver.step()
    assert running_ids(scheduler) == {jobs[3].request_id}
    client.is_down = True
    driver.step()
    assert [r.request_id for r in scheduler.waiting] == [j.request_id for j in jobs[:3]]
    assert scheduler._ranked_jobs == 0
    assert client.starts_over == 1
    driver.step()
    assert client.starts_over == 1, "once for each outage"


def test_a_new_stream_gets_all_live_jobs_and_then_events(make: Any) -> None:
    scheduler, client = make(slots=1)
    driver = Driver(scheduler)
    jobs = add(scheduler, 3)
    assert client.events == []
    driver.step()
    driver.step()
    client.is_new, client.events = True, []
    driver.step()
    (snapshot,) = client.of_type(Snapshot)
    assert [job.job_id for job in snapshot.jobs] == [job.request_id for job in jobs]
    (progress,) = snapshot.progress
    assert (progress.job_id, progress.output_tokens) == (jobs[0].request_id, 2)
    assert list(progress.new_token_ids) == [7, 7]
    (late,) = add(scheduler, 1)
    driver.step()
    assert [event.job_id for event in client.of_type(Arrived)] == [late.request_id]


def test_events_wait_until_the_batch_is_on_its_way(make: Any) -> None:
    scheduler, client = make(slots=1)
    driver = Driver(scheduler)
    (first,) = add(scheduler, 1)
    driver.step()
    (second,) = add(scheduler, 1)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {first.request_id: 1}
    assert client.of_type(Arrived) == []
    scheduler.get_grammar_bitmask(output)
    assert [event.job_id for event in client.of_type(Arrived)] == [second.request_id]


def test_the_sidecar_is_told_what_the_prefix_cache_has_of_a_prompt(make: Any) -> None:
    scheduler, client = make()
    driver = Driver(scheduler)
    prompt = list(range(100, 140))
    add(scheduler, 1, prompt_token_ids=prompt)
    driver.step()
    (same,) = add(scheduler, 1, prompt_token_ids=prompt)
    (other,) = add(scheduler, 1, prompt_token_ids=[7, *prompt])
    driver.step()
    told = {event.job_id: event.cached_prompt_tokens for event in client.of_type(Arrived)}
    whole_blocks = 39 // BLOCK_SIZE * BLOCK_SIZE  # the last token is computed in any case
    assert whole_blocks > 0
    assert told == {same.request_id: whole_blocks, other.request_id: 0}


def test_a_snapshot_says_what_had_not_gone_out(make: Any) -> None:
    scheduler, client = make(slots=1)
    driver = Driver(scheduler)
    add(scheduler, 1)
    driver.step()
    client.is_new, client.events = True, []
    add(scheduler, 1)
    driver.step()
    (snapshot,) = client.of_type(Snapshot)
    assert len(snapshot.jobs) == 2
    assert client.of_type(Arrived) == []


def test_a_job_with_drafts_to_verify_is_decoding(make: Any) -> None:
    scheduler, client = make()
    scheduler.num_spec_tokens = 2
    driver = Driver(scheduler)
    (job,) = add(scheduler, 1, prompt_tokens=30)
    driver.step()
    job.spec_token_ids = [7, 7]
    output = driver.step()
    assert output.num_scheduled_tokens == {job.request_id: 3}
    # The driver's answers accept none; here one of the two is.
    scheduler.make_spec_decoding_stats(
        None,
        num_draft_tokens=2,
        num_accepted_tokens=1,
        num_invalid_spec_tokens=None,
        request_id=job.request_id,
    )
    driver.step()
    scheduler._report(client)
    scheduler._do_beside_the_model()
    steps = [
        (s.prefill_tokens, s.decode_jobs, s.decoded_tokens) for s in client.of_type(StepTiming)
    ]
    assert steps == [(30, 0, 0), (0, 1, 2)]


def test_a_prompt_longer_than_a_step_does_not_stop_the_answers_behind_it(make: Any) -> None:
    scheduler, client = make(slots=2, max_num_batched_tokens=64)
    driver = Driver(scheduler)
    (answering,) = add(scheduler, 1)
    driver.step()
    (long_prompt,) = add(scheduler, 1, prompt_tokens=300)
    client.estimates = [estimate(answering, 100.0, 90), estimate(long_prompt, 0.0, 1000)]
    steps = [driver.step().num_scheduled_tokens for _ in range(5)]
    assert [step[answering.request_id] for step in steps] == [1] * 5
    assert [step[long_prompt.request_id] for step in steps] == [63, 63, 63, 63, 48]


def test_the_sidecar_is_told_who_had_no_place_in_a_step(make: Any) -> None:
    scheduler, client = make()
    driver = Driver(scheduler)
    slots = scheduler.max_num_active_reqs
    add(scheduler, slots + 3)
    driver.step()
    driver.step()
    scheduler._report(client)
    scheduler._do_beside_the_model()
    (step,) = client.of_type(StepTiming)
    assert (step.prefill_tokens > 0, step.waiting_jobs) == (True, 3)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("stop", pb.FINISH_REASON_STOP),
        ("length", pb.FINISH_REASON_LENGTH),
        ("abort", pb.FINISH_REASON_ABORTED),
    ],
)
def test_the_end_of_a_job_is_reported(make: Any, end: str, reason: int) -> None:
    scheduler, client = make()
    driver = Driver(scheduler)
    (job,) = add(scheduler, 1, max_tokens=3)
    driver.step()
    if end == "abort":
        scheduler.finish_requests(job.request_id, RequestStatus.FINISHED_ABORTED)
    else:
        driver.step({job.request_id} if end == "stop" else None)
        driver.step()
    driver.step()  # vLLM asks once more when a job has ended
    (event,) = client.of_type(Finished)
    assert (event.job_id, event.reason) == (job.request_id, reason)
    assert event.output_tokens == {"stop": 2, "length": 3, "abort": 1}[end]
    assert event.first_token_s >= 0
    assert not scheduler._jobs


def test_a_request_of_a_better_class_goes_first(make: Any) -> None:
    scheduler, client = make(slots=1, policy="priority")
    driver = Driver(scheduler)
    (ordinary,) = add(scheduler, 1)
    driver.step()
    waiting, urgent = add(scheduler, 1)[0], add(scheduler, 1, priority=-1)[0]
    client.estimates = [estimate(waiting, -1000.0, 1)]
    driver.step({ordinary.request_id})
    driver.step()
    assert running_ids(scheduler) == {urgent.request_id}


def test_without_classes_the_field_means_nothing_as_in_stock(make: Any) -> None:
    scheduler, _ = make(slots=1)
    first, _second = add(scheduler, 1)[0], add(scheduler, 1, priority=-5)[0]
    Driver(scheduler).step()
    assert running_ids(scheduler) == {first.request_id}


Trace = list[tuple[list[str], set[str]]]


def random_run(
    scheduler: Any, seed: int, *, batches_in_flight: int, client: FakeClient | None
) -> tuple[Trace, Driver, list[Request]]:
    """Drive 60 jobs with stops and aborts at random; the choices depend on `seed` alone."""
    rng = random.Random(seed)
    driver = Driver(scheduler, batches_in_flight=batches_in_flight)
    requests: list[Request] = []
    trace: Trace = []
    for number in range(600):
        if len(requests) < 60 and rng.random() < 0.3:
            request = create_request(
                request_id=f"{seed}-{len(requests)}",
                prompt_tokens=rng.randint(1, 100),
                max_tokens=rng.randint(1, 60),
            )
            requests.append(request)
            scheduler.add_request(request)
        live = [r for r in requests if r.request_id in scheduler.requests]
        if client is not None:
            client.estimates += [
                Estimate(r.request_id, rng.uniform(-50, 50), rng.uniform(0, 500), 0)
                for r in live
                if rng.random() < 0.1
            ]
        stops = {f"{seed}-{rng.randrange(60)}"}
        abort = f"{seed}-{rng.randrange(60)}"
        if rng.random() < 0.02 and abort in scheduler.requests:
            scheduler.finish_requests(abort, RequestStatus.FINISHED_ABORTED)
        output = driver.step(stops)
        trace.append((list(output.num_scheduled_tokens), set(output.preempted_req_ids or ())))
        if number > 400 and not scheduler.requests:
            break
    while scheduler.requests:
        driver.step()
    driver.drain()
    driver.step()  # as vLLM's engine core, which tells its workers what has ended
    driver.drain()
    return trace, driver, requests


@pytest.mark.parametrize("batches_in_flight", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("num_blocks", [25, 1000], ids=["few blocks", "many blocks"])
def test_without_estimates_every_step_is_stocks(
    make: Any, tmp_path: Path, batches_in_flight: int, num_blocks: int
) -> None:
    options: dict[str, Any] = {
        "async_scheduling": batches_in_flight > 1,
        "blocks": num_blocks,
        "max_num_batched_tokens": 128,
    }
    for seed in range(5):
        stock_class = AsyncScheduler if batches_in_flight > 1 else Scheduler
        stock = build_scheduler(stock_class, tmp_path, **options)
        ours, _ = make(**options)
        run = {"batches_in_flight": batches_in_flight, "client": None}
        stock_trace, *_ = random_run(stock, seed, **run)
        our_trace, *_ = random_run(ours, seed, **run)
        assert our_trace == stock_trace


@pytest.mark.parametrize("batches_in_flight", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("num_blocks", [25, 1000], ids=["few blocks", "many blocks"])
def test_no_job_is_lost_or_run_twice_whatever_the_estimates(
    make: Any, batches_in_flight: int, num_blocks: int
) -> None:
    preemptions = 0
    for seed in range(10):
        scheduler, client = make(
            async_scheduling=batches_in_flight > 1,
            blocks=num_blocks,
            max_num_batched_tokens=128,
        )
        _, driver, requests = random_run(
            scheduler, seed, batches_in_flight=batches_in_flight, client=client
        )
        preemptions += len(client.of_type(Preempted))
        assert len(set(driver.finished)) == len(driver.finished)
        ended = {event.job_id for event in client.of_type(Finished)}
        assert ended == {request.request_id for request in requests}
        assert not scheduler._jobs
        assert not scheduler.waiting
        assert not scheduler.running
        assert scheduler._ranked_jobs == 0
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert free == num_blocks - 1  # block 0 is vLLM's null block
        for request in requests:
            if request.request_id in driver.finished:
                assert driver.tokens[request.request_id] == request.num_output_tokens
    assert preemptions > 10
