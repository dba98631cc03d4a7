"""The policy file: what it may say, and that jobs are priced anew when it changes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from alise_scheduler.engine_state import EngineState, PolicySettings
from alise_scheduler.events import Arrived, SnapshotEnd
from alise_scheduler.listen import UnixAddress
from alise_scheduler.metrics import Metrics
from alise_scheduler.policy import Policy
from alise_scheduler.policy_file import PolicyFile, PolicyFileError, parse_policy
from alise_scheduler.server import running
from scheduler_fakes import FakePredictor, arrived, engine, prompt_input, server_settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", PolicySettings()),
        ('{"policy": "fcfs"}', PolicySettings(Policy.FCFS)),
        ('{"gamma": 0.05}', PolicySettings(gamma_per_s=0.05)),
        ('{"policy": "srtf-aging", "aging_s": 5}', PolicySettings(Policy.SRTF_AGING, aging_s=5.0)),
        ('{"first_tokens": 8}', PolicySettings(first_tokens=8)),
    ],
    ids=["empty", "policy", "gamma", "aging", "first tokens"],
)
def test_what_a_file_may_say(text: str, expected: PolicySettings) -> None:
    # What the file leaves out has its default, not what was there before.
    found = parse_policy(text, PolicySettings(Policy.MLFQ, 7.0, 7.0, expected.true_tokens_of, 7))
    assert found == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "allowed is an object of aging_s, first_tokens, gamma, policy"),
        ('{"gama": 1}', "not gama"),
        ('{"policy": "best"}', "allowed are boost, boost-attained, srtf"),
        ('{"gamma": 0}', "gamma 0: allowed"),
        ('{"gamma": true}', "gamma True: allowed"),
        ('{"aging_s": NaN}', "aging_s nan: allowed"),
        ('{"first_tokens": -1}', "first_tokens -1: allowed"),
        ('{"first_tokens": true}', "first_tokens True: allowed"),
    ],
)
def test_what_a_file_may_not_say(text: str, message: str) -> None:
    with pytest.raises(PolicyFileError, match=message):
        parse_policy(text, PolicySettings())


def test_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    file = PolicyFile(path, PolicySettings(Policy.SRTF))
    assert not file.refresh()  # there is none
    path.write_text('{"policy": "mlfq"}')
    assert file.refresh()
    path.write_text('{"policy": "m')
    assert not file.refresh()
    assert file.settings.policy is Policy.MLFQ
    path.unlink()
    assert not file.refresh()
    path.write_text('{"policy": "mlfq", "aging_s": 30.0}')
    assert not file.refresh()  # another text, the same settings


def test_a_mounted_config_map_is_followed_through_its_links(tmp_path: Path) -> None:
    # The kubelet swaps a link to a folder; the file itself never changes.
    for name, policy in (("one", "fcfs"), ("two", "boost")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.json").write_text(json.dumps({"policy": policy}))
    (tmp_path / "data").symlink_to("one")
    file = PolicyFile(tmp_path / "data" / "policy.json", PolicySettings())
    assert file.refresh()
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").replace(tmp_path / "data")
    assert file.refresh()
    assert file.settings.policy is Policy.BOOST


def live_state(policy: Policy, *, version: int = 1) -> EngineState:
    predictor = FakePredictor()
    predictor.model_version = version
    state = EngineState(predictor, PolicySettings(policy, gamma_per_s=0.05))
    state.connect()
    state.apply(Arrived("job-1", 10.0, prompt_input(100)))
    state.apply(SnapshotEnd())
    state.advance()
    return state


def test_live_jobs_are_priced_anew() -> None:
    state = live_state(Policy.BOOST)
    boosted = state.table.jobs["job-1"].sent
    assert boosted is not None
    assert boosted.priority < 10.0
    state.choose(PolicySettings(Policy.FCFS))
    update = state.advance()
    assert update is not None
    assert [estimate.priority for estimate in update.estimates] == [10.0]


def test_a_job_without_prediction_returns_to_its_place_by_arrival() -> None:
    state = live_state(Policy.MLFQ, version=0)
    job = state.table.jobs["job-1"]
    job.sent = None
    job.output_tokens = 4000  # far down in MLFQ's queues
    state.table.mark_unpriced([job])
    state.advance()
    assert job.sent is not None
    assert job.sent.priority > 1e6
    state.choose(PolicySettings(Policy.BOOST))
    update = state.advance()
    assert update is not None
    assert [estimate.priority for estimate in update.estimates] == [10.0]


def test_backlog_counts_jobs_without_a_slot() -> None:
    state, metrics = live_state(Policy.BOOST), Metrics()
    asyncio.run(metrics.show_engines([("e", state)], 1))
    waiting_s = metrics.registry.get_sample_value("alise_backlog_seconds")
    assert waiting_s == pytest.approx(
        state.pricing.rates.service_s(8, 100 * (0.5 + 0.7 + 1 + 1.4 + 2) / 5), rel=0.2
    )
    state.table.jobs["job-1"].is_running = True
    asyncio.run(metrics.show_engines([("e", state)], 1))
    assert metrics.registry.get_sample_value("alise_backlog_seconds") == 0


def test_a_running_sidecar_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"policy": "fcfs"}')
    settings = server_settings(UnixAddress(tmp_path / "s.sock"))
    settings = replace(settings, policy_file=path)

    async def scenario() -> None:
        async with running(settings, FakePredictor(), asyncio.Event()) as target:
            async with engine(target) as stream:
                assert stream.received[0].welcome.policy == "fcfs"
                await stream.send(arrived("job", 1.0, tokens=5))
                assert (await stream.estimates("job"))["job"].priority == 1.0
                path.write_text('{"policy": "boost", "gamma": 0.05}')
                assert (await stream.estimates("job"))["job"].priority < 1.0
            async with engine(target, engine_id="engine-2") as stream:
                assert stream.received[0].welcome.policy == "boost"

    asyncio.run(asyncio.wait_for(scenario(), 240))
