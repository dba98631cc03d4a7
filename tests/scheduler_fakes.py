"""A fake predictor and a real client, for tests of the sidecar's service."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from alise_scheduler.engine_state import PolicySettings
from alise_scheduler.listen import Address, UnixAddress
from alise_scheduler.predictor import Outcome, PromptInput, Quality, TokenTableError
from alise_scheduler.server import ServerSettings, TlsFiles, running
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc


@dataclass
class FakeTracked:
    prompt: PromptInput
    output_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)

    def extend(self, new_token_ids: Sequence[int], output_tokens: int) -> None:
        assert output_tokens > self.output_tokens
        assert len(new_token_ids) <= output_tokens - self.output_tokens
        self.token_ids.extend(new_token_ids)
        self.output_tokens = output_tokens


class FakePredictor:
    """Predicts as many tokens as the prompt's first token id says, spread by a factor of 2."""

    def __init__(self, model_version: int = 1) -> None:
        self.model_version = model_version
        self.model_trained_unix_s = 1.0
        self.sample_count = 0
        self.batches: list[int] = []
        self.observed: list[tuple[FakeTracked, Outcome]] = []
        self.tables: list[Path] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.is_failing = False
        self.failures = 0
        self.is_closed = False
        self.encoder = None

    def read(self, path: Path) -> Path:
        if path.read_text() == "bad":
            raise TokenTableError("on purpose")
        self.may_read.wait(10)
        return path

    def serve(self, model: Path) -> None:
        self.tables.append(model)

    def track(self, prompt: PromptInput) -> FakeTracked:
        return FakeTracked(prompt)

    def predict(self, jobs: Sequence[FakeTracked]) -> list[tuple[float, ...] | None]:
        if self.is_failing:
            self.failures += 1
            raise RuntimeError("on purpose")
        self.batches.append(len(jobs))
        if not self.model_version:
            return [None] * len(jobs)
        return [_spread(job) for job in jobs]

    def observe(self, job: FakeTracked, outcome: Outcome) -> None:
        self.observed.append((job, outcome))
        self.sample_count += 1

    def start(self, deliver: object) -> None:
        pass

    def encode(self, prompt: PromptInput, job: FakeTracked, then: object) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True

    def quality(self) -> Quality:
        return Quality(0, math.nan, math.nan, math.nan, math.nan, False)


def _spread(job: FakeTracked) -> tuple[float, ...]:
    median = max(float(job.prompt.token_ids[0]) - job.output_tokens, 1.0)
    return tuple(max(median * factor, 1.0) for factor in (0.5, 0.7, 1.0, 1.4, 2.0))


def prompt_input(tokens: int = 50, prompt_tokens: int = 8, max_tokens: int = 0) -> PromptInput:
    ids = np.full(prompt_tokens, tokens, dtype=np.int32)
    return PromptInput(ids, prompt_tokens, max_tokens, 0.0, 0, "")


def server_settings(
    address: Address,
    *,
    tls: TlsFiles | None = None,
    grace_s: float = 30.0,
    metrics_port: int = 0,
    policy: PolicySettings | None = None,
    shared_dir: Path | None = None,
) -> ServerSettings:
    return ServerSettings(
        address=address,
        tls=tls,
        shared_dir=shared_dir,
        metrics_address="127.0.0.1",
        metrics_port=metrics_port,
        grace_s=grace_s,
        policy=policy or PolicySettings(),
    )


@asynccontextmanager
async def sidecar(tmp_path: Path, predictor: FakePredictor | None = None, **options):
    """Run a server on a Unix socket in this process; yields its gRPC address."""
    settings = server_settings(UnixAddress(tmp_path / "s.sock"), **options)
    async with running(settings, predictor or FakePredictor(), asyncio.Event()) as target:
        yield target


def hello(engine_id: str = "engine-1", version: int = 1, table: str = "") -> pb.Event:
    return pb.Event(
        hello=pb.Hello(
            protocol_version=version, engine_id=engine_id, model="m", token_table_file=table
        )
    )


def arrived(job_id: str, arrival_s: float = 1.0, tokens: int = 50, length: int = 8) -> pb.Event:
    return pb.Event(arrived=job_arrived(job_id, arrival_s, tokens, length))


def job_arrived(job_id: str, arrival_s: float = 1.0, tokens: int = 50, length: int = 8):
    prompt = pb.Prompt(token_ids=[tokens] * length, prompt_tokens=length)
    return pb.JobArrived(job_id=job_id, arrival_s=arrival_s, prompt=prompt)


def progress(job_id: str, output_tokens: int, *, new: int = 0, is_running: bool = True) -> pb.Event:
    ids = [7] * new
    return pb.Event(
        progress=pb.JobProgress(
            job_id=job_id, output_tokens=output_tokens, new_token_ids=ids, is_running=is_running
        )
    )


def finished(job_id: str, output_tokens: int, reason: int = pb.FINISH_REASON_STOP) -> pb.Event:
    return pb.Event(
        finished=pb.JobFinished(job_id=job_id, reason=reason, output_tokens=output_tokens)
    )


def snapshot(*jobs: pb.JobArrived, is_last: bool = True) -> pb.Event:
    return pb.Event(snapshot=pb.Snapshot(jobs=jobs, is_last=is_last))


class EngineStream:
    """The engine's end of one Session stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = scheduler_pb2_grpc.SchedulerStub(channel).Session()
        self.sequence = 0
        self.received: list[pb.SidecarMessage] = []

    async def send(self, *events: pb.Event, sequence: int | None = None) -> None:
        self.sequence = self.sequence + 1 if sequence is None else sequence
        await self.call.write(pb.EngineMessage(sequence=self.sequence, events=events))

    async def read(self) -> pb.SidecarMessage:
        message = await asyncio.wait_for(self.call.read(), 120)
        if message is grpc.aio.EOF:
            await self.call  # raises what ended the stream
            raise EOFError
        self.received.append(message)
        return message

    async def estimates(self, *job_ids: str) -> dict[str, pb.Estimate]:
        """Read until each of the jobs got an estimate."""
        found: dict[str, pb.Estimate] = {}
        while not found.keys() >= set(job_ids):
            found.update((e.job_id, e) for e in (await self.read()).update.estimates)
        return found

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """Read to the end; returns how it ended."""
        try:
            while True:
                await self.read()
        except EOFError:
            return grpc.StatusCode.OK, ""
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details()


@asynccontextmanager
async def engine(
    target: str, *jobs: pb.JobArrived, engine_id: str = "engine-1", table: str = ""
) -> AsyncIterator[EngineStream]:
    """Connect as an engine with these live jobs; the Welcome has been read."""
    async with grpc.aio.insecure_channel(target) as channel:
        stream = EngineStream(channel)
        await stream.send(hello(engine_id, table=table), snapshot(*jobs))
        assert (await stream.read()).HasField("welcome")
        yield stream
        stream.call.cancel()
