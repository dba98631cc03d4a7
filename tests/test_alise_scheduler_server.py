"""The sidecar's service over a real gRPC connection, in this process, with a fake predictor."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from alise_scheduler import protocol
from alise_scheduler.engine_state import PolicySettings
from alise_scheduler.listen import ListenError, TcpAddress, UnixAddress
from alise_scheduler.policy import Policy
from alise_scheduler.predictor import Outcome
from alise_scheduler.server import TlsFiles, running
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scheduler_fakes import (
    EngineStream,
    FakePredictor,
    arrived,
    engine,
    finished,
    hello,
    job_arrived,
    progress,
    server_settings,
    sidecar,
    snapshot,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 240))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_short_job_goes_before_a_long_one_that_came_earlier(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        async with sidecar(tmp_path, predictor) as target, engine(target) as stream:
            await stream.send(arrived("long", 1.0, tokens=900), arrived("short", 1.1, tokens=5))
            estimates = await stream.estimates("long", "short")
            assert estimates["short"].priority < estimates["long"].priority < 1.0
            assert 400 < estimates["long"].remaining_tokens < 1800

            await stream.send(progress("long", 400, new=400))
            # As gamma follows the jobs seen, the first estimate may have been corrected meanwhile.
            while (await stream.estimates("long"))["long"].at_output_tokens != 400:
                pass
            await stream.send(finished("long", 410), finished("short", 4, pb.FINISH_REASON_LENGTH))
            while len(predictor.observed) < 2:
                await asyncio.sleep(0.01)
        assert [outcome for _, outcome in predictor.observed] == [
            Outcome.COMPLETE,
            Outcome.CENSORED,
        ]
        assert predictor.observed[0][0].output_tokens == 410
        assert predictor.observed[0][0].token_ids == [7] * 400
        sequences = [message.sequence for message in stream.received]
        assert sequences == list(range(1, len(sequences) + 1))
        updates = [m.update for m in stream.received if m.HasField("update")]
        first = next(u for u in updates if u.ByteSize())  # those without content are heartbeats
        assert first.HasField("cost_model")
        assert predictor.is_closed

    run(scenario())


def test_without_a_model_nothing_is_said_and_then_all_jobs_are(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor(model_version=0)
        async with sidecar(tmp_path, predictor) as target, engine(target) as stream:
            await stream.send(arrived("a"), arrived("b"))
            while not (update := (await stream.read()).update).ByteSize():
                pass  # a heartbeat
            assert not update.estimates
            assert update.HasField("cost_model")
            predictor.model_version = 3
            assert (await stream.estimates("a", "b")).keys() == {"a", "b"}
            assert any(m.update.model_version == 3 for m in stream.received)

    run(scenario())


def test_a_failing_predictor_leaves_the_stream_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        predictor.is_failing = True
        async with sidecar(tmp_path, predictor) as target, engine(target) as stream:
            await stream.send(arrived("a"))
            while not predictor.failures:
                await asyncio.sleep(0.01)
            predictor.is_failing = False
            await stream.send(arrived("b"))
            assert "a" not in await stream.estimates("b")

    run(scenario())


def test_duplicate_messages_and_events_change_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        async with sidecar(tmp_path, predictor) as target, engine(target) as stream:
            await stream.send(arrived("a"), arrived("a"))
            await stream.estimates("a")
            await stream.send(arrived("x"), sequence=stream.sequence)  # a message sent twice
            await stream.send(
                finished("a", 5), finished("a", 5), progress("nobody", 3), arrived("a")
            )
            await stream.send(arrived("b"))
            assert "x" not in await stream.estimates("b")
            await stream.send(arrived("c"))
            assert (await stream.estimates("c")).keys() <= {"b", "c"}
        assert len(predictor.observed) == 1

    run(scenario())


def test_a_returning_engine_keeps_what_the_snapshot_names(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        async with sidecar(tmp_path, predictor) as target:
            async with engine(target) as stream:
                await stream.send(arrived("kept"), arrived("gone"))
                await stream.send(progress("kept", 20, new=20))
                await stream.estimates("kept", "gone")
            async with engine(target, job_arrived("kept"), job_arrived("new", 2.0)) as stream:
                estimates = await stream.estimates("kept", "new")
                assert estimates.keys() == {"kept", "new"}
                await stream.send(finished("kept", 21), finished("gone", 5))
                while not predictor.observed:
                    await asyncio.sleep(0.01)
        ((job, _),) = predictor.observed
        assert job.token_ids == [7] * 20

    run(scenario())


def test_jobs_of_an_engine_that_stays_away_are_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        async with sidecar(tmp_path, predictor, grace_s=0.1) as target:
            async with engine(target) as stream:
                await stream.send(arrived("a"), progress("a", 20, new=20))
                await stream.estimates("a")
            await asyncio.sleep(0.5)
            async with engine(target, job_arrived("a")) as stream:
                await stream.send(finished("a", 21))
                while not predictor.observed:
                    await asyncio.sleep(0.01)
        assert predictor.observed[0][0].token_ids == []  # begun anew, so the old ids are gone

    run(scenario())


def test_a_second_stream_of_the_same_engine_replaces_the_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with sidecar(tmp_path) as target, engine(target) as first, engine(target) as second:
            code, text = await first.status()
            assert code is grpc.StatusCode.ABORTED
            assert "replaces" in text
            await second.send(arrived("a"))
            await second.estimates("a")

    run(scenario())


def test_two_engines_do_not_see_each_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            sidecar(tmp_path) as target,
            engine(target, engine_id="one") as one,
            engine(target, engine_id="two") as two,
        ):
            await one.send(arrived("a"))
            await two.send(arrived("a", tokens=500), arrived("b"))
            assert (await one.estimates("a")).keys() == {"a"}
            assert (await two.estimates("a", "b")).keys() == {"a", "b"}

    run(scenario())


def test_another_protocol_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with sidecar(tmp_path) as target, grpc.aio.insecure_channel(target) as channel:
            stream = EngineStream(channel)
            await stream.send(hello(version=7))
            code, text = await stream.status()
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert text == "the engine speaks protocol version 7, this sidecar 1"

    run(scenario())


LONG_PROMPT = pb.JobArrived(job_id="a", prompt=pb.Prompt(token_ids=[1] * 1025))
BREACHES = {
    "no hello": ([snapshot()], "first event of a stream must be Hello"),
    "hello twice": ([hello(), hello()], "Hello may come only once"),
    "no snapshot": ([hello(), arrived("a")], "second event of a stream must be Snapshot"),
    "snapshot twice": ([hello(), snapshot(), snapshot()], "Snapshot may come only once"),
    "no engine id": ([hello("")], "Hello.engine_id has 0 characters"),
    "long prompt": ([hello(), snapshot(LONG_PROMPT)], "1025 ids; allowed are 1024"),
    "long job id": ([hello(), snapshot(), arrived("x" * 257)], "257 characters"),
    "no job id": ([hello(), snapshot(), arrived("")], "0 characters"),
    "infinite": ([hello(), snapshot(), arrived("a", float("inf"))], "arrival_s is inf"),
    "nan": ([hello(), snapshot(), pb.Event(step=pb.StepTiming(duration_s=float("nan")))], "is nan"),
    "token id": ([hello(), snapshot(), arrived("a", tokens=2**31)], "holds 2147483648"),
    "events": ([hello(), snapshot(), *[arrived("a")] * 4095], "4096"),
}


@pytest.mark.parametrize(("events", "text"), BREACHES.values(), ids=BREACHES.keys())
def test_a_breach_of_the_contract_is_named(tmp_path: Path, events, text: str) -> None:
    async def scenario() -> None:
        async with sidecar(tmp_path) as target, grpc.aio.insecure_channel(target) as channel:
            stream = EngineStream(channel)
            await stream.send(*events)
            code, details = await stream.status()
            assert code is INVALID
            assert text in details

    run(scenario())


def test_messages_above_the_bound_are_refused_and_the_server_lives(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with sidecar(tmp_path) as target, engine(target) as stream:
            await stream.send(*[arrived(f"{i}", tokens=2**30, length=1000) for i in range(1000)])
            code, _ = await stream.status()
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            async with engine(target) as again:
                await again.send(arrived("a"))
                await again.estimates("a")

    run(scenario())


def test_garbage_on_the_socket_harms_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with sidecar(tmp_path) as target, engine(target) as stream:
            _, writer = await asyncio.open_unix_connection(tmp_path / "s.sock")
            writer.write(os.urandom(100_000))
            writer.close()
            async with grpc.aio.insecure_channel(target) as channel:
                call = channel.stream_stream(f"/{protocol.SERVICE_NAME}/Session")()
                await call.write(b"\xff" * 1000)  # a frame, but no EngineMessage
                assert await call.code() is not grpc.StatusCode.OK
            await stream.send(arrived("a"))
            await stream.estimates("a")

    run(scenario())


def test_predict(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        async with (
            sidecar(tmp_path, predictor) as target,
            grpc.aio.insecure_channel(target) as channel,
        ):
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            prompts = [pb.Prompt(token_ids=[i + 1], prompt_tokens=1) for i in range(1024)]
            answer = await stub.Predict(pb.PredictRequest(prompts=prompts))
            assert [p.quantiles_tokens[2] for p in answer.predictions] == list(range(1, 1025))
            assert answer.model_version == 1
            assert max(predictor.batches) <= 64
            for request, text in (
                ([pb.Prompt()] * 1025, "1025 prompts; allowed are 1024"),
                ([pb.Prompt(token_ids=[1] * 1025)], "1025 ids"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Predict(pb.PredictRequest(prompts=request))
                assert error.value.code() is INVALID
                assert text in error.value.details()

    run(scenario())


def test_ten_thousand_jobs_in_a_snapshot_do_not_hold_up_another_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        jobs = [job_arrived(f"job-{i}", i / 100, 10 + i % 500, 100) for i in range(10_000)]
        async with (
            sidecar(tmp_path) as target,
            engine(target, engine_id="other") as other,
            grpc.aio.insecure_channel(target) as channel,
        ):
            big = EngineStream(channel)
            await big.send(hello("big"))
            for start in range(0, 10_000, 1000):
                is_last = start == 9000
                await big.send(snapshot(*jobs[start : start + 1000], is_last=is_last))
            reading = asyncio.create_task(big.estimates(*(job.job_id for job in jobs)))
            answered = 0
            while not reading.done():
                await other.send(arrived(f"o-{answered}"))
                await other.estimates(f"o-{answered}")
                answered += 1
            assert len(reading.result()) == 10_000
            # It got many answers while the big one was served, not one at the end.
            assert answered > 20

    run(scenario())


def test_oracle_knows_better_than_the_predictor(tmp_path: Path) -> None:
    async def scenario() -> None:
        policy = PolicySettings(Policy.SRTF, true_tokens_of=lambda _: 123)
        async with sidecar(tmp_path, policy=policy) as target, engine(target) as stream:
            await stream.send(arrived("a", tokens=900))
            assert (await stream.estimates("a"))["a"].remaining_tokens == 123

    run(scenario())


def test_health_and_reflection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with sidecar(tmp_path) as target, grpc.aio.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", protocol.SERVICE_NAME):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = (await call.read()).list_services_response.service
            assert protocol.SERVICE_NAME in {service.name for service in listed}
            call.cancel()

    run(scenario())


@pytest.mark.parametrize("name", ["missing.bin", "../outside", "..", "a/b", "bad.bin"])
def test_a_bad_token_table_is_only_a_warning(tmp_path: Path, name: str, caplog) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        (tmp_path / "outside").write_text("x")
        shared = tmp_path / "shared"
        shared.mkdir()
        (shared / "bad.bin").write_text("bad")
        async with (
            sidecar(tmp_path, predictor, shared_dir=shared) as target,
            engine(target, table=name) as stream,
        ):
            await stream.send(arrived("a"))
            await stream.estimates("a")
        assert predictor.tables == []
        assert "token table" in caplog.text

    run(scenario())


def test_token_table_is_loaded_from_the_shared_folder(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        (tmp_path / "table.bin").write_text("x")
        async with (
            sidecar(tmp_path, predictor, shared_dir=tmp_path) as target,
            engine(target, table="table.bin"),
        ):
            pass
        assert predictor.tables == [tmp_path / "table.bin"]

    run(scenario())


def test_streams_go_on_while_another_engine_s_token_table_is_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        predictor.may_read.clear()
        (tmp_path / "table.bin").write_text("x")
        async with (
            sidecar(tmp_path, predictor, shared_dir=tmp_path) as target,
            engine(target, engine_id="one") as one,
            grpc.aio.insecure_channel(target) as channel,
        ):
            two = EngineStream(channel)
            await two.send(hello("two", table="table.bin"), snapshot())
            await asyncio.sleep(0.1)
            await one.send(arrived("a"))
            await one.estimates("a")
            assert predictor.tables == []
            predictor.may_read.set()
            assert (await two.read()).HasField("welcome")
            assert predictor.tables == [tmp_path / "table.bin"]

    run(scenario())


def test_a_token_table_is_read_again_only_if_another_was_or_it_is_new(tmp_path: Path) -> None:
    async def scenario() -> None:
        predictor = FakePredictor()
        a, b = tmp_path / "a.bin", tmp_path / "b.bin"
        a.write_text("x")
        b.write_text("x")
        async with sidecar(tmp_path, predictor, shared_dir=tmp_path) as target:
            for name in ("a.bin", "a.bin", "b.bin", "a.bin"):
                async with engine(target, table=name):
                    pass
            assert predictor.tables == [a, b, a]
            os.utime(a, ns=(1, 1))
            async with engine(target, table="a.bin"):
                pass
            assert predictor.tables == [a, b, a, a]

    run(scenario())


def test_socket_is_private_and_removed_at_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "made" / "s.sock"
        settings = server_settings(UnixAddress(path))
        async with running(settings, FakePredictor(), asyncio.Event()):
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700
            with pytest.raises(ListenError, match="served by another process"):
                async with running(settings, FakePredictor(), asyncio.Event()):
                    pass
            async with engine(f"unix:{path}"):
                pass
        assert not path.exists()

    run(scenario())


def test_a_taken_tcp_port_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        address = TcpAddress("127.0.0.1", free_port())
        settings = server_settings(address)
        async with running(settings, FakePredictor(), asyncio.Event()) as target:
            assert target == address.target
            with pytest.raises(ListenError, match=str(address.port)):
                async with running(settings, FakePredictor(), asyncio.Event()):
                    pass

    run(scenario())


def test_stopping_ends_the_streams(tmp_path: Path) -> None:
    async def scenario() -> None:
        stopping = asyncio.Event()
        settings = server_settings(UnixAddress(tmp_path / "s.sock"))
        async with running(settings, FakePredictor(), stopping) as target, engine(target) as stream:
            stopping.set()
            code, text = await stream.status()
            assert (code, text) == (
                grpc.StatusCode.UNAVAILABLE,
                "the sidecar is stopping",
            )

    run(scenario())


def test_metrics_page_shows_what_happened(tmp_path: Path) -> None:
    async def scenario() -> str:
        port = free_port()
        async with sidecar(tmp_path, metrics_port=port) as target, engine(target) as stream:
            await stream.send(arrived("a"), arrived("a"), progress("b", 3), progress("a", 9, new=9))
            await stream.send(
                pb.Event(preempted=pb.JobPreempted(job_id="a", output_tokens=9)), arrived("c")
            )
            await stream.estimates("a", "c")
            url = f"http://127.0.0.1:{port}/metrics"
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
                if 'alise_jobs{state="preempted"} 1.0' in page:
                    return page
                await asyncio.sleep(0.1)
        raise AssertionError(page)

    page = run(scenario())
    for line in (
        'alise_jobs{state="waiting"} 1.0',
        "alise_preemptions_total 1.0",
        "alise_sessions 1.0",
        'alise_events_total{result="duplicate"} 1.0',
        'alise_events_total{result="unknown"} 1.0',
        "alise_model_version 1.0",
        'alise_gamma_per_second{engine="engine-1"}',
    ):
        assert line in page, line


def client_credentials(folder: Path, name: str | None) -> grpc.ChannelCredentials:
    ca = (folder / "ca.pem").read_bytes()
    if name is None:
        return grpc.ssl_channel_credentials(ca)
    pair = ((folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes())
    return grpc.ssl_channel_credentials(ca, *pair)


@pytest.mark.parametrize(
    ("is_mutual", "client", "is_welcome"),
    [
        (False, None, True),
        (True, "client", True),
        (True, None, False),
        (True, "stranger", False),
    ],
)
def test_tls(certificates: Path, is_mutual: bool, client: str | None, is_welcome: bool) -> None:
    async def scenario() -> None:
        tls = TlsFiles(
            certificates / "server.pem",
            certificates / "server.key",
            certificates / "ca.pem" if is_mutual else None,
        )
        settings = server_settings(TcpAddress("127.0.0.1", 0), tls=tls)
        async with running(settings, FakePredictor(), asyncio.Event()) as target:
            credentials = client_credentials(certificates, client)
            async with grpc.aio.secure_channel(target, credentials) as channel:
                call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                if is_welcome:
                    assert (await call).status == health_pb2.HealthCheckResponse.SERVING
                else:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call

    run(scenario())
