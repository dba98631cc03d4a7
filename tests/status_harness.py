"""A real sidecar with a fake predictor and a made-up engine, on a thread, for tests of its page."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from alise_scheduler.listen import UnixAddress
from alise_scheduler.server import running
from alise_scheduler.v1 import scheduler_pb2 as pb
from live_server import free_port
from scheduler_fakes import EngineStream, FakePredictor, progress, server_settings, snapshot

STEP = pb.StepTiming(prefill_tokens=8, decode_jobs=4, context_tokens=800, duration_s=0.03)


class MadeUpEngine:
    """The engine's end of a stream, driven from a test's thread; its clock starts at 1,000 s."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: str, url: str) -> None:
        self.url = url
        self._loop, self._target = loop, target
        self._began_s = time.monotonic()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def now_s(self) -> float:
        return 1000.0 + time.monotonic() - self._began_s

    def connect(self, slots: int = 4, kv_tokens: int = 0) -> None:
        async def connect() -> None:
            self._channel = grpc.aio.insecure_channel(self._target)
            self.stream = EngineStream(self._channel)
            greeting = pb.Hello(
                protocol_version=1,
                engine_id="engine-1",
                model="tiny",
                max_num_seqs=slots,
                kv_tokens=kv_tokens,
                block_tokens=16,
            )
            await self.stream.send(pb.Event(hello=greeting), snapshot())
            await self.stream.read()
            self._reading = asyncio.create_task(self._read())

        self.run(connect())

    async def _read(self) -> None:
        with suppress(grpc.aio.AioRpcError):  # the sidecar stops
            while await self.stream.call.read() is not grpc.aio.EOF:
                pass

    def disconnect(self) -> None:
        async def disconnect() -> None:
            self._reading.cancel()
            self.stream.call.cancel()
            await self._channel.close()

        self.run(disconnect())

    def send(self, *events: pb.Event) -> None:
        async def send() -> None:
            for start in range(0, len(events), 1000):
                self.stream.sequence += 1
                await self.stream.call.write(
                    pb.EngineMessage(
                        sequence=self.stream.sequence,
                        sent_s=self.now_s(),
                        events=events[start : start + 1000],
                    )
                )

        self.run(send())

    def arrive(self, job_id: str, ago_s: float = 0.0, tokens: int = 100) -> pb.Event:
        """An arrival `ago_s` ago of a job that the fake predictor takes for `tokens` long."""
        prompt = pb.Prompt(token_ids=[tokens] * 8, prompt_tokens=8)
        job = pb.JobArrived(job_id=job_id, arrival_s=self.now_s() - ago_s, prompt=prompt)
        return pb.Event(arrived=job)

    def crowd(self, count: int) -> None:
        """Send `count` jobs, the first four of which run."""
        jobs = [
            self.arrive(f"chatcmpl-{i:05d}", ago_s=(count - i) / 100, tokens=20 + 37 * i % 700)
            for i in range(count)
        ]
        self.send(*[pb.Event(step=STEP)] * 40, *jobs)
        self.send(*(progress(f"chatcmpl-{i:05d}", 10 + i) for i in range(4)))


@contextmanager
def sidecar_page(folder: Path, predictor: FakePredictor | None = None) -> Iterator[MadeUpEngine]:
    """Run a sidecar; yields an engine that can connect to it and knows the page's URL."""
    loop, port = asyncio.new_event_loop(), free_port()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    settings = server_settings(UnixAddress(folder / "s.sock"), metrics_port=port)
    serving = running(settings, predictor or FakePredictor(), asyncio.Event())
    target = asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result(20)
    engine = MadeUpEngine(loop, target, f"http://127.0.0.1:{port}")
    try:
        yield engine
    finally:
        engine.run(serving.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
