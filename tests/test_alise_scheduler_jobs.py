"""The job table and its estimates: nothing lost, nothing twice, whatever the engine says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from alise_scheduler.engine_state import EngineState, Introduction, PolicySettings
from alise_scheduler.estimates import backlog_s, remaining_tokens
from alise_scheduler.events import (
    Arrived,
    Finished,
    FinishReason,
    Preempted,
    Progress,
    SnapshotEnd,
    StepTiming,
)
from alise_scheduler.jobs import JobTable, next_milestone
from alise_scheduler.measured_predictor import MeasuredPredictor
from alise_scheduler.metrics import Metrics
from alise_scheduler.policy import Policy, gamma_for, overdue_s
from alise_scheduler.predictor import Outcome, PromptInput
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scheduler_fakes import FakePredictor, FakeTracked, prompt_input

IDS = st.sampled_from([f"job-{i}" for i in range(6)])
COUNTS = st.integers(0, 3000)
NEW_IDS = st.lists(st.just(7), max_size=50)


class AnyEvents(RuleBasedStateMachine):
    """Arbitrary events against a plain model of who should live."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = FakePredictor()
        self.state = EngineState(self.predictor, PolicySettings())
        self.live: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.named: set[str] | None = None

    @rule(job_id=IDS, arrival_s=st.sampled_from([1.0, 2.0, 3.0]), tokens=st.integers(1, 5000))
    def arrive(self, job_id: str, arrival_s: float, tokens: int) -> None:
        self.state.apply(Arrived(job_id, arrival_s, prompt_input(tokens)))
        if self.named is not None:
            self.named.add(job_id)
        if self.named is not None or self.ended.get(job_id) != arrival_s:
            self.live.setdefault(job_id, arrival_s)

    @rule(job_id=IDS, count=COUNTS, ids=NEW_IDS, is_running=st.booleans())
    def progress(self, job_id: str, count: int, ids: list[int], is_running: bool) -> None:
        self.state.apply(Progress(job_id, count, ids, is_running))

    @rule(job_id=IDS, count=COUNTS)
    def preempt(self, job_id: str, count: int) -> None:
        self.state.apply(Preempted(job_id, count))

    @rule(job_id=IDS, reason=st.sampled_from(FinishReason), count=COUNTS, ids=NEW_IDS)
    def finish(self, job_id: str, reason: FinishReason, count: int, ids: list[int]) -> None:
        ended = self.state.apply(Finished(job_id, reason, count, ids))
        assert (ended is not None) == (job_id in self.live)
        if job_id in self.live:
            self.ended[job_id] = self.live.pop(job_id)

    @rule()
    def reconnect(self) -> None:
        self.state.connect()
        self.named = set()

    @rule()
    def end_snapshot(self) -> None:
        self.state.apply(SnapshotEnd())
        if self.named is not None:
            self.live = {k: v for k, v in self.live.items() if k in self.named}
        self.named = None

    @rule(duration_s=st.floats(0.001, 10))
    def step(self, duration_s: float) -> None:
        self.state.apply(StepTiming(0, 4, 400, duration_s))

    @rule()
    def new_model(self) -> None:
        self.predictor.model_version += 1

    @rule()
    def advance(self) -> None:
        update = self.state.advance()
        if update is not None:
            assert update.estimates or update.rates
            ids = [e.job_id for e in update.estimates]
            assert len(ids) == len(set(ids))
            assert set(ids) <= self.live.keys()
            assert all(math.isfinite(e.priority) for e in update.estimates)
            assert all(0 < e.remaining_tokens < math.inf for e in update.estimates)

    @invariant()
    def nobody_is_lost_or_there_twice(self) -> None:
        jobs = self.state.table.jobs
        assert {job_id: job.arrival_s for job_id, job in jobs.items()} == self.live

    @invariant()
    def the_predictor_follows(self) -> None:
        for job in self.state.table.jobs.values():
            assert job.tracked.output_tokens == job.output_tokens

    def teardown(self) -> None:
        self.state.apply(SnapshotEnd())
        for _ in range(50):
            if self.state.advance() is None and not self.state.has_work:
                break
        assert not self.state.has_work
        # Each live job has its estimate in the end.
        assert all(job.sent is not None for job in self.state.table.jobs.values())


TestAnyEvents = AnyEvents.TestCase
TestAnyEvents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def state_of(policy: Policy = Policy.BOOST, gamma: float | None = None, **options):
    predictor = FakePredictor()
    return EngineState(predictor, PolicySettings(policy, gamma, **options)), predictor


def settle(state: EngineState):
    """Advance until nothing is left; returns the last estimate of each job told."""
    told = {}
    while (update := state.advance()) is not None or state.has_work:
        if update is not None:
            told.update((e.job_id, e) for e in update.estimates)
    return told


def test_milestones() -> None:
    reached, length = [], 0
    while length < 3000:
        length = next_milestone(length)
        reached.append(length)
    assert reached == [
        8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072,
    ]  # fmt: skip


def test_a_job_is_predicted_at_arrival_and_at_each_milestone() -> None:
    state, predictor = state_of()
    state.apply(Arrived("a", 0.0, prompt_input(5000)))
    settle(state)
    assert len(predictor.batches) == 1
    for tokens in range(1, 130):
        state.apply(Progress("a", tokens, [7], is_running=True))
        settle(state)
    assert len(predictor.batches) == 1 + len((8, 16, 32, 64, 96, 128))


def test_an_outlived_estimate_is_made_anew_before_the_milestone() -> None:
    state, predictor = state_of()
    state.apply(Arrived("a", 0.0, prompt_input(70)))
    state.apply(Progress("a", 65, [7] * 65, is_running=True))
    settle(state)  # 5 more tokens are expected, at most 10
    state.apply(Progress("a", 76, [7] * 11, is_running=True))
    settle(state)
    assert len(predictor.batches) == 2


def test_what_remains_shrinks_between_predictions() -> None:
    state, _ = state_of()
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    settle(state)
    job = state.table.jobs["a"]
    before = remaining_tokens(job)
    state.apply(Progress("a", 7, [7] * 7, is_running=True))
    assert remaining_tokens(job) == pytest.approx([p - 7 for p in before])


def test_max_tokens_bounds_what_remains() -> None:
    state, _ = state_of()
    state.apply(Arrived("a", 0.0, prompt_input(1000, max_tokens=100)))
    settle(state)
    assert max(remaining_tokens(state.table.jobs["a"])) == 100


def test_only_news_goes_out() -> None:
    state, _ = state_of(gamma=0.05)
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    assert settle(state).keys() == {"a"}
    state.apply(Progress("a", 1, [7], is_running=True))
    assert settle(state) == {}
    state.apply(Progress("a", 600, [7] * 599, is_running=True))
    assert settle(state).keys() == {"a"}


def test_waiting_jobs_cost_nothing() -> None:
    state, predictor = state_of(gamma=0.05)
    for index in range(100):
        state.apply(Arrived(f"{index}", 0.0, prompt_input()))
    settle(state)
    predictor.batches.clear()
    assert not state.has_work
    assert state.advance() is None
    assert predictor.batches == []


def test_a_burst_is_predicted_in_bounded_batches_arrivals_before_the_rest() -> None:
    state, predictor = state_of()
    for index in range(300):
        state.apply(Arrived(f"{index}", 0.0, prompt_input()))
    settle(state)
    assert max(predictor.batches) <= 64
    predictor.model_version += 1
    state.advance()
    state.apply(Arrived("new", 1.0, prompt_input()))
    update = state.advance()
    assert "new" in {e.job_id for e in update.estimates}
    assert len(settle(state)) <= 300


def test_new_rates_reach_the_engine_and_all_jobs() -> None:
    state, _ = state_of(gamma=0.05)
    for index in range(10):
        state.apply(Arrived(f"{index}", 0.0, prompt_input()))
    settle(state)
    for _ in range(32):
        state.apply(StepTiming(0, 4, 400, 0.5))
    update = state.advance()
    assert update.rates.decode_s_per_token == pytest.approx(0.5)
    assert len(update.estimates) == 10
    state.apply(StepTiming(0, 4, 400, 0.51))
    assert state.advance() is None


def finish_40_jobs(
    state: EngineState, output_tokens: int, *, prompt_tokens: int = 1, cached_prompt_tokens: int = 0
) -> None:
    """Let the state learn how long jobs are."""
    for index in range(40):
        job_id = f"past {index}"
        state.apply(Arrived(job_id, 0.0, prompt_input(10, prompt_tokens=prompt_tokens)))
        settle(state)
        event = Finished(
            job_id,
            FinishReason.STOP,
            output_tokens,
            [],
            cached_prompt_tokens=cached_prompt_tokens,
        )
        state.apply(event)
    settle(state)


def test_what_the_prefix_cache_has_of_a_prompt_counts_nothing() -> None:
    state, _ = state_of()
    for job_id, cached in (("new", 0), ("next turn", 9000), ("told nonsense", 20_000)):
        prompt = prompt_input(50, prompt_tokens=10_000)
        state.apply(Arrived(job_id, 0.0, prompt, cached_prompt_tokens=cached))
    settle(state)
    new, turn, odd = (state.table.jobs[name] for name in ("new", "next turn", "told nonsense"))
    assert new.sent is not None
    assert turn.sent is not None
    assert turn.sent.priority < new.sent.priority
    rates = state.pricing.rates
    saved_s = backlog_s(new, rates) - backlog_s(turn, rates)
    assert saved_s == pytest.approx(rates.service_s(9000, 0))
    assert odd.uncached_prompt_tokens == 1


def engine_s_of(state: EngineState, output_tokens: float) -> float:
    return state.pricing.rates.engine_s(1, output_tokens)


def gamma_without_a_queue(state: EngineState, output_tokens: float) -> float:
    return gamma_for(engine_s_of(state, output_tokens), 0, state.pricing.rates.decode_jobs)


def test_gamma_follows_the_finished_jobs() -> None:
    state, _ = state_of()
    finish_40_jobs(state, 1000)
    expected = gamma_without_a_queue(state, 1000)
    assert state.pricing.parameters.gamma_per_s == pytest.approx(expected, rel=0.1)


def test_gamma_uses_the_predictions_until_enough_have_finished() -> None:
    state, _ = state_of()
    for index in range(5):
        state.apply(Arrived(f"{index}", 0.0, prompt_input(2000, prompt_tokens=1)))
    settle(state)
    expected = gamma_without_a_queue(state, 2000)
    assert state.pricing.parameters.gamma_per_s == pytest.approx(expected, rel=0.3)


def step_with(waiting_jobs: int) -> StepTiming:
    return StepTiming(0, 4, 400, 0.05, waiting_jobs=waiting_jobs)


def test_gamma_falls_as_jobs_wait_and_rises_as_they_end() -> None:
    # Slots need not be short: of 256, four are taken, as a step has no tokens left for more.
    state, _ = state_of()
    state.introduction = Introduction(slots=256)
    finish_40_jobs(state, 1000)
    state.apply(step_with(waiting_jobs=100))
    settle(state)
    crowded = state.pricing.parameters.gamma_per_s
    assert crowded == pytest.approx(gamma_for(engine_s_of(state, 1000), 100, 4), rel=0.1)
    state.apply(step_with(waiting_jobs=0))
    settle(state)
    assert state.pricing.parameters.gamma_per_s > 3 * crowded


def test_what_the_prefix_cache_has_takes_no_time() -> None:
    state, _ = state_of()
    finish_40_jobs(state, 100, prompt_tokens=5000, cached_prompt_tokens=4999)
    expected = gamma_without_a_queue(state, 100)
    assert state.pricing.parameters.gamma_per_s == pytest.approx(expected, rel=0.1)


def overdue_jobs(state: EngineState, now_s: float) -> list[str]:
    state.hear(now_s, now_s)
    settle(state)
    return [job_id for job_id, job in state.table.jobs.items() if job.is_overdue]


def test_a_job_that_has_waited_longer_than_with_fcfs_goes_before_younger_ones() -> None:
    state, _ = state_of()
    finish_40_jobs(state, 1000)
    state.apply(step_with(waiting_jobs=100))
    state.apply(Arrived("long", 0.0, prompt_input(32_000, prompt_tokens=1)))
    state.apply(Arrived("had a slot", 0.0, prompt_input(32_000, prompt_tokens=1)))
    settle(state)
    state.apply(Progress("had a slot", 100, [7] * 100, is_running=True))
    settle(state)
    due_s = overdue_s(engine_s_of(state, 1000), 100, 4)
    assert overdue_jobs(state, due_s - 0.5) == []
    assert overdue_jobs(state, due_s + 0.4) == []  # it looks once in a second, not every time
    assert overdue_jobs(state, due_s + 0.6) == ["long"]
    had_s = state.pricing.rates.service_s(0, 100)
    assert overdue_jobs(state, due_s + had_s + 1.6) == ["long", "had a slot"]
    state.apply(Arrived("late and shorter", due_s, prompt_input(5000, prompt_tokens=1)))
    settle(state)
    jobs = state.table.jobs
    late, overdue = jobs["late and shorter"].sent, jobs["long"].sent
    assert late is not None
    assert overdue is not None
    assert overdue.priority < late.priority


def test_an_engine_whose_clock_begins_anew_has_overdue_jobs_too() -> None:
    state, _ = state_of()
    state.introduction = Introduction(slots=4)
    assert overdue_jobs(state, 1e6) == []
    state.connect()
    state.apply(Arrived("a", 0.0, prompt_input(10, prompt_tokens=1)))
    state.apply(SnapshotEnd())
    assert overdue_jobs(state, 1000.0) == ["a"]


def test_with_a_fixed_gamma_nobody_is_overdue() -> None:
    state, _ = state_of(gamma=0.123)
    state.apply(Arrived("a", 0.0, prompt_input(10, prompt_tokens=1)))
    assert overdue_jobs(state, 1e6) == []


def test_a_fixed_gamma_stays() -> None:
    state, _ = state_of(gamma=0.123)
    for index in range(40):
        state.apply(Arrived(f"{index}", 0.0, prompt_input()))
        settle(state)
        state.apply(Finished(f"{index}", FinishReason.STOP, 1000, []))
    settle(state)
    assert state.pricing.parameters.gamma_per_s == 0.123


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (FinishReason.STOP, Outcome.COMPLETE),
        (FinishReason.LENGTH, Outcome.CENSORED),
        (FinishReason.ABORTED, Outcome.CENSORED),
        (FinishReason.ERROR, None),
    ],
)
def test_what_the_predictor_learns(reason: FinishReason, outcome: Outcome | None) -> None:
    state, predictor = state_of()
    state.apply(Arrived("a", 0.0, prompt_input()))
    state.apply(Finished("a", reason, 30, [7] * 30))
    assert [o for _, o in predictor.observed] == ([outcome] if outcome else [])


def test_an_abort_in_the_queue_teaches_nothing() -> None:
    state, predictor = state_of()
    state.apply(Arrived("a", 0.0, prompt_input()))
    state.apply(Finished("a", FinishReason.ABORTED, 0, []))
    assert predictor.observed == []


def test_the_oracle_is_exact_and_asks_nobody() -> None:
    state, predictor = state_of(true_tokens_of=lambda prompt: int(prompt.token_ids[0]))
    state.apply(Arrived("a", 0.0, prompt_input(77)))
    assert settle(state)["a"].remaining_tokens == 77
    state.apply(Progress("a", 70, [7] * 70, is_running=True))
    assert settle(state)["a"].remaining_tokens == 7
    assert predictor.batches == []


def test_mlfq_needs_no_predictions() -> None:
    state, predictor = state_of(Policy.MLFQ)
    predictor.model_version = 0
    state.apply(Arrived("a", 0.0, prompt_input()))
    first = settle(state)["a"].priority
    state.apply(Progress("a", 2000, [], is_running=True))
    assert settle(state)["a"].priority > first


def test_states_and_counts() -> None:
    table = JobTable(FakeTracked)
    events = [
        Arrived("a", 0.0, prompt_input()),
        Arrived("a", 0.0, prompt_input()),
        Progress("nobody", 3, [], is_running=True),
        Progress("a", 0, [], is_running=True),
        Progress("a", 5, [7] * 5, is_running=True),
        Progress("a", 5, [7] * 5, is_running=True),
        Progress("a", 4, [7], is_running=True),
        Progress("a", 7, [7] * 5, is_running=True),  # three of the five are known
    ]
    for event in events:
        table.apply(event)
    job = table.jobs["a"]
    assert (job.state, len(job.tracked.token_ids)) == ("running", 7)
    table.apply(Preempted("a", 7))
    table.apply(Preempted("a", 7))
    assert job.state == "preempted"
    table.apply(Finished("a", FinishReason.STOP, 7, []))
    table.apply(Finished("a", FinishReason.STOP, 7, []))
    assert table.tally == Counter(applied=6, duplicate=5, unknown=1, preemptions=1)


def test_jobs_above_the_limit_are_refused() -> None:
    table = JobTable(FakeTracked, max_jobs=2)
    for job_id in "abc":
        table.apply(Arrived(job_id, 0.0, prompt_input()))
    assert table.jobs.keys() == {"a", "b"}
    assert table.tally["refused"] == 1


@given(st.lists(st.tuples(COUNTS, NEW_IDS), max_size=20))
def test_token_ids_are_taken_once(reports: list[tuple[int, list[int]]]) -> None:
    table = JobTable(FakeTracked)
    table.apply(Arrived("a", 0.0, prompt_input()))
    for count, ids in reports:
        for _ in range(2):
            table.apply(Progress("a", count, ids, is_running=True))
    job = table.jobs["a"]
    assert job.output_tokens == max([count for count, _ in reports], default=0)
    assert len(job.tracked.token_ids) <= job.output_tokens


class ReadingPredictor(FakePredictor):
    """Knows better what it is told to have read; reads at once, with `reads_tokens` set."""

    def __init__(self, reads_tokens: int = 0) -> None:
        super().__init__()
        self.reads_tokens = reads_tokens
        self.asked: list[tuple[FakeTracked, Callable[[], None]]] = []

    def encode(self, prompt: PromptInput, job: FakeTracked, then: Callable[[], None]) -> None:
        self.asked.append((job, then))
        if self.reads_tokens:
            self.read(self.reads_tokens)

    def read(self, tokens: int) -> None:
        job, then = self.asked[-1]
        job.prompt = prompt_input(tokens)
        then()


def reading_state() -> tuple[EngineState, ReadingPredictor]:
    predictor = ReadingPredictor()
    return EngineState(predictor, PolicySettings(gamma_per_s=0.05)), predictor


def test_a_prompt_that_has_been_read_is_predicted_again_and_the_engine_told() -> None:
    state, predictor = reading_state()
    state.apply(Arrived("other", 0.0, prompt_input(500)))
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    before = settle(state)["a"]
    predictor.batches.clear()
    predictor.read(20)
    assert state.has_work
    told = settle(state)
    assert (told.keys(), predictor.batches) == ({"a"}, [1])
    assert told["a"].remaining_tokens < 0.1 * before.remaining_tokens
    assert told["a"].priority < before.priority
    assert not state.has_work


def test_a_prompt_can_be_read_while_its_answer_comes_out() -> None:
    state, predictor = reading_state()
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    settle(state)
    state.apply(Progress("a", 5, [7] * 5, is_running=True))
    settle(state)
    predictor.read(200)
    settle(state)
    job = state.table.jobs["a"]
    assert job.predicted_at_tokens == 5
    assert sorted(remaining_tokens(job))[len(remaining_tokens(job)) // 2] == pytest.approx(195, 0.2)


def test_what_is_read_at_once_is_predicted_once() -> None:
    predictor = ReadingPredictor(reads_tokens=20)
    state = EngineState(predictor, PolicySettings(gamma_per_s=0.05))
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    assert settle(state)["a"].remaining_tokens < 100
    assert predictor.batches == [1]


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.ABORTED])
def test_a_prompt_read_after_its_job_has_ended_changes_nothing(reason: FinishReason) -> None:
    state, predictor = reading_state()
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    state.apply(Arrived("b", 0.0, prompt_input(1000)))
    settle(state)
    state.apply(Finished("b", reason, 3, [7] * 3))
    settle(state)
    predictor.batches.clear()
    predictor.read(20)
    assert not state.has_work
    assert (settle(state), predictor.batches) == ({}, [])


def test_each_job_is_read_once_though_the_engine_names_it_again() -> None:
    state, predictor = reading_state()
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    state.connect()
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    state.apply(SnapshotEnd())
    assert len(predictor.asked) == 1


class IlliteratePredictor(FakePredictor):
    """Cannot read."""

    def encode(self, prompt: PromptInput, job: FakeTracked, then: Callable[[], None]) -> None:
        raise RuntimeError("on purpose")


def test_a_prompt_that_cannot_be_read_is_predicted_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured = MeasuredPredictor(IlliteratePredictor(), Metrics())
    state = EngineState(measured, PolicySettings(gamma_per_s=0.05))
    state.apply(Arrived("a", 0.0, prompt_input(1000)))
    assert settle(state)["a"].remaining_tokens > 500
    assert "a prompt was not encoded" in caplog.text
