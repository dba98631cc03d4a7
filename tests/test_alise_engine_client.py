"""The stream against real sidecars, and against peers that are not what they should be."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from alise_engine.client import SidecarClient
from alise_engine.events import Arrived, Finished, Snapshot, to_messages
from alise_engine.settings import TlsFiles
from alise_scheduler import protocol
from alise_scheduler.events import Preempted, Progress, StepTiming
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc as pb_grpc
from alise_scheduler.wire import events_from
from patience import eventually

PATIENCE_S = 120.0


def hello(version: int = protocol.PROTOCOL_VERSION) -> pb.Hello:
    return pb.Hello(
        protocol_version=version,
        engine_id="engine",
        engine_version="1",
        model="m",
        max_model_len=2048,
        max_num_seqs=16,
    )


def arrived(job_id: str) -> Arrived:
    return Arrived(job_id, time.monotonic(), [1, 2, 3], 100, 0.0, 0, "", 0)


def is_up(client: SidecarClient) -> bool:
    return client.down_for_s(time.monotonic()) == 0


@pytest.fixture
def client_of() -> Iterator[Callable[..., SidecarClient]]:
    clients: list[SidecarClient] = []

    def start(
        address: str, make_hello: Callable[[], pb.Hello] = hello, tls: TlsFiles | None = None
    ) -> SidecarClient:
        client = SidecarClient(address, tls, make_hello)
        clients.append(client)
        client.start()
        return client

    yield start
    for client in clients:
        client.stop()


class Sidecar:
    """A real sidecar process on a socket; `oracle_file` lets it estimate without a model."""

    def __init__(self, folder: Path, *options: str, address: str = "") -> None:
        self.socket = folder / "s.sock"
        self.address = address or f"unix://{self.socket}"
        command = [sys.executable, "-m", "alise_scheduler", "scheduler"]
        command += ["--listen", self.address, "--state-dir", str(folder / "state")]
        self.process = subprocess.Popen([*command, "--metrics-port", "0", *options])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def sidecar_of(tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    sidecars: list[Sidecar] = []

    def start(*options: str, address: str = "") -> Sidecar:
        sidecars.append(Sidecar(tmp_path, *options, address=address))
        return sidecars[-1]

    yield start
    for sidecar in sidecars:
        sidecar.process.kill()
        sidecar.process.wait()


def test_estimates_come_back(
    sidecar_of: Callable[..., Sidecar], client_of: Callable[..., SidecarClient]
) -> None:
    # MLFQ ranks without a model.
    client = client_of(sidecar_of("--policy", "mlfq").address)
    eventually(client.wants_snapshot)
    client.send_snapshot(Snapshot(jobs=[arrived("a")]))
    client.send(arrived("b"))
    received: dict[str, float] = {}

    def take() -> bool:
        received.update({e.job_id: e.priority for e in client.receive(100)})
        return {"a", "b"} <= received.keys()

    eventually(take)
    assert received["a"] <= received["b"]
    assert client.costs.decode_s_per_token > 0


def test_names_beyond_the_bounds_do_not_end_the_stream(
    sidecar_of: Callable[..., Sidecar], client_of: Callable[..., SidecarClient]
) -> None:
    client = client_of(sidecar_of("--policy", "mlfq").address)
    eventually(client.wants_snapshot)
    id_a, id_b = ("x" * (protocol.MAX_NAME_CHARS + 1) + end for end in "ab")
    said = [Progress(id_a, 1, [5], is_running=True)]
    client.send_snapshot(Snapshot(jobs=[arrived(id_a), arrived("before")], progress=said))
    client.send(arrived(id_b))
    client.send(Progress(id_b, 1, [5], is_running=True))
    client.send(Preempted(id_b, 1))
    client.send(Finished(id_b, pb.FINISH_REASON_STOP, 1, [], 0.0, 0.1, 0, 0))
    long_name = "y" * (protocol.MAX_NAME_CHARS + 1)
    client.send(Arrived("adapted", time.monotonic(), [1, 2, 3], 100, 0.0, 0, long_name, 0))
    client.send(arrived("after"))
    ranked: set[str] = set()
    eventually(lambda: ranked.update(e.job_id for e in client.receive(100)) or "after" in ranked)
    assert ranked == {"before", "adapted", "after"}


def test_a_step_arrives_as_it_was_told() -> None:
    step = StepTiming(7, 4, 400, 0.05, decoded_tokens=9, waiting_jobs=3)
    message = pb.EngineMessage(sequence=1, events=to_messages(step))
    assert list(events_from(message)) == [step]


def test_events_before_the_snapshot_are_not_sent(client_of: Callable[..., SidecarClient]) -> None:
    client = client_of("unix:///nobody/there.sock")
    client.send(arrived("a"))
    assert client.receive(10) == []
    assert not client.wants_snapshot()
    assert client.down_for_s(time.monotonic()) > 0


def test_a_killed_sidecar_is_found_again(
    sidecar_of: Callable[..., Sidecar], client_of: Callable[..., SidecarClient]
) -> None:
    first = sidecar_of()
    client = client_of(first.address)
    eventually(client.wants_snapshot)
    client.send_snapshot(Snapshot())
    first.signal(signal.SIGKILL)
    eventually(lambda: not is_up(client))
    sidecar_of()
    eventually(client.wants_snapshot)
    assert is_up(client)


def test_a_hung_sidecar_is_noticed_and_welcomed_back(
    sidecar_of: Callable[..., Sidecar], client_of: Callable[..., SidecarClient]
) -> None:
    sidecar = sidecar_of()
    client = client_of(sidecar.address)
    eventually(client.wants_snapshot)
    client.send_snapshot(Snapshot())
    sidecar.signal(signal.SIGSTOP)
    eventually(lambda: not is_up(client))
    for number in range(1000):
        client.send(arrived(str(number)))  # returns at once
    sidecar.signal(signal.SIGCONT)
    eventually(lambda: is_up(client))


def test_starting_over_asks_for_all_live_jobs_again(
    sidecar_of: Callable[..., Sidecar], client_of: Callable[..., SidecarClient]
) -> None:
    client = client_of(sidecar_of("--policy", "mlfq").address)
    for _ in range(2):
        eventually(client.wants_snapshot)
        client.send_snapshot(Snapshot(jobs=[arrived("a")]))
        eventually(lambda: client.receive(10))
        client.start_over()
        assert not client.wants_snapshot()


def test_a_deleted_socket_does_not_end_the_stream(
    sidecar_of: Callable[..., Sidecar], client_of: Callable[..., SidecarClient]
) -> None:
    sidecar = sidecar_of("--policy", "mlfq")
    client = client_of(sidecar.address)
    eventually(client.wants_snapshot)
    client.send_snapshot(Snapshot())
    sidecar.socket.unlink()
    client.send(arrived("a"))
    eventually(lambda: client.receive(1))


def test_mutual_tls(
    certificates: Path,
    sidecar_of: Callable[..., Sidecar],
    client_of: Callable[..., SidecarClient],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    server = ["--tls-cert", "server.pem", "--tls-key", "server.key", "--tls-client-ca", "ca.pem"]
    paths = [a if a.startswith("--") else str(certificates / a) for a in server]
    sidecar_of(*paths, address=address)
    ca = certificates / "ca.pem"
    member = TlsFiles(ca, certificates / "client.pem", certificates / "client.key")
    eventually(client_of(address, tls=member).wants_snapshot)
    nobody = client_of(address, tls=TlsFiles(ca, None, None))
    time.sleep(1.0)
    assert not nobody.wants_snapshot()


class FakeScheduler(pb_grpc.SchedulerServicer):
    """A sidecar that answers what a test wants it to."""

    def __init__(self, session: Callable[[Any, grpc.ServicerContext], Iterator[Any]]) -> None:
        self.Session = session  # type: ignore[method-assign]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    servers: list[grpc.Server] = []

    def start(session: Callable[[Any, grpc.ServicerContext], Iterator[Any]]) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(4))
        pb_grpc.add_SchedulerServicer_to_server(FakeScheduler(session), server)  # type: ignore[no-untyped-call]
        address = f"unix://{tmp_path}/fake.sock"
        server.add_insecure_port(address)
        server.start()
        servers.append(server)
        return address

    yield start
    for server in servers:
        server.stop(0)


WELCOME = pb.SidecarMessage(sequence=1, welcome=pb.Welcome(protocol_version=1))


def test_nonsense_estimates_are_refused(
    serve: Callable[..., str], client_of: Callable[..., SidecarClient]
) -> None:
    def session(_: Any, context: grpc.ServicerContext) -> Iterator[pb.SidecarMessage]:
        yield WELCOME
        update = pb.EstimateUpdate(
            cost_model=pb.CostModel(prefill_s_per_token=-1, decode_s_per_token=float("nan"))
        )
        for priority, remaining in ((float("nan"), 1), (float("inf"), 1), (1, -5), (2.5, 7)):
            update.estimates.add(job_id="j", priority=priority, remaining_tokens=remaining)
        yield pb.SidecarMessage(sequence=2, update=update)
        while context.is_active():
            time.sleep(0.05)

    client = client_of(serve(session))
    good: list[Any] = []
    eventually(lambda: good.extend(client.receive(10)) or good)
    assert [(e.priority, e.remaining_tokens) for e in good] == [(2.5, 7.0)]
    assert client.costs.decode_s_per_token > 0


def test_a_slow_sidecar_delays_nothing(
    serve: Callable[..., str], client_of: Callable[..., SidecarClient]
) -> None:
    seen = threading.Event()

    def session(requests: Any, _: grpc.ServicerContext) -> Iterator[pb.SidecarMessage]:
        yield WELCOME
        for message in requests:
            time.sleep(0.5)
            if any(event.WhichOneof("body") == "finished" for event in message.events):
                seen.set()
            yield pb.SidecarMessage(sequence=2, update=pb.EstimateUpdate())

    client = client_of(serve(session))
    eventually(client.wants_snapshot)
    began_s = time.monotonic()
    client.send_snapshot(Snapshot())
    for number in range(2000):
        client.send(arrived(str(number)))
        client.send(Progress(str(number), 1, [5], is_running=True))
        client.send(Finished(str(number), pb.FINISH_REASON_STOP, 1, [], began_s, 0.1, 0, 0))
    took_s = time.monotonic() - began_s
    assert took_s < 6000 * 0.5 / 100, "sending must not wait for answers"
    assert seen.wait(PATIENCE_S)


def test_another_version_is_told_both_versions(
    sidecar_of: Callable[..., Sidecar],
    client_of: Callable[..., SidecarClient],
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = client_of(sidecar_of().address, lambda: hello(version=99))
    with caplog.at_level("WARNING", logger="vllm.alise.client"):
        eventually(lambda: "FAILED_PRECONDITION" in caplog.text)
    assert "99" in caplog.text
    assert str(protocol.PROTOCOL_VERSION) in caplog.text
    assert not client.wants_snapshot()


def test_a_peer_that_talks_garbage(client_of: Callable[..., SidecarClient]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(os.urandom(4096))
                except OSError:
                    return

        threading.Thread(target=babble, daemon=True).start()
        client = client_of(f"127.0.0.1:{listener.getsockname()[1]}")
        time.sleep(1.0)
        client.send(arrived("a"))
        assert client.receive(10) == []
        assert not is_up(client)
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("count", "prompt_tokens"), [(1000, 5000), (6000, 3)])
def test_a_large_snapshot_fits_the_bounds(
    sidecar_of: Callable[..., Sidecar],
    client_of: Callable[..., SidecarClient],
    count: int,
    prompt_tokens: int,
) -> None:
    client = client_of(sidecar_of("--policy", "mlfq").address)
    eventually(client.wants_snapshot)
    prompt = list(range(100_000, 100_000 + prompt_tokens))
    jobs = [Arrived(f"j{n}", 0.0, prompt, 100, 0.0, 0, "", 0) for n in range(count)]
    progress = [Progress(job.job_id, 1, [5], is_running=True) for job in jobs]
    client.send_snapshot(Snapshot(jobs=jobs, progress=progress))
    received: set[str] = set()
    eventually(
        lambda: received.update(e.job_id for e in client.receive(5000)) or len(received) == count,
        patience_s=120.0,
    )
