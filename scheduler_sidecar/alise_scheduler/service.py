"""The gRPC service: translates calls into streams and predictions, and failures into statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc

from alise_scheduler import protocol
from alise_scheduler.engine_state import PREDICTIONS_PER_STEP, Introduction
from alise_scheduler.engines import Connection, Engines, TooManyEnginesError
from alise_scheduler.measured_predictor import MeasuredPredictor
from alise_scheduler.metrics import Metrics
from alise_scheduler.policy import Policy
from alise_scheduler.status import Status
from alise_scheduler.status_source import BusyError
from alise_scheduler.stream import Stream
from alise_scheduler.token_table import TokenTableError
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc
from alise_scheduler.version import package_version
from alise_scheduler.wire import (
    InvalidMessageError,
    hello_from,
    prediction_message,
    prompt_from,
)

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class SchedulerService(scheduler_pb2_grpc.SchedulerServicer):
    """`alise.scheduler.v1.Scheduler`."""

    predictor: MeasuredPredictor
    engines: Engines
    metrics: Metrics
    policy: Policy
    shared_dir: Path | None
    stopping: asyncio.Event
    status: Callable[[], Status]
    """Called on a thread; raises `BusyError`."""
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of token tables, one after the other: the one that was named last wins."""
    _table_in_use: tuple[str, int] | None = None
    """Its name, and when it was written, ns."""

    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:  # noqa: N802
        """Predict answer lengths, a bounded batch at a time."""
        limit = protocol.MAX_TIMED_PROMPTS if request.with_times else protocol.MAX_PREDICT_PROMPTS
        if len(request.prompts) > limit:
            await self._abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"PredictRequest has {len(request.prompts)} prompts; allowed are {limit}",
            )
        response = pb.PredictResponse(model_version=self.predictor.model_version)
        for start in range(0, len(request.prompts), PREDICTIONS_PER_STEP):
            batch = request.prompts[start : start + PREDICTIONS_PER_STEP]
            try:
                jobs = [self.predictor.track(prompt_from(prompt)) for prompt in batch]
            except InvalidMessageError as error:
                await self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            response.predictions.extend(map(prediction_message, self.predictor.predict(jobs)))
            await asyncio.sleep(0)
        if request.with_times:
            with suppress(BusyError):  # the lengths are an answer, too
                await asyncio.to_thread(self._add_times, request, response)
        return response

    def _add_times(self, request: pb.PredictRequest, response: pb.PredictResponse) -> None:
        status = self.status()
        for prompt, prediction in zip(request.prompts, response.predictions, strict=True):
            quantiles = tuple(prediction.quantiles_tokens)
            times = status.times_of(prompt_from(prompt), quantiles) if quantiles else None
            if times is not None:
                prediction.wait_s, prediction.service_s = times.wait_s, times.service_s

    # The stubs know only handlers that yield; gRPC takes those that write as well.
    async def Session(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[pb.EngineMessage], context: Any
    ) -> None:
        """Serve one engine until either side ends the stream."""
        first = await anext(requests, None)
        if first is None:
            return
        try:
            hello = hello_from(first)
        except InvalidMessageError as error:
            await self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if hello.protocol_version != protocol.PROTOCOL_VERSION:
            await self._abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the engine speaks protocol version {hello.protocol_version}, "
                f"this sidecar {protocol.PROTOCOL_VERSION}",
            )
        try:
            connection = self.engines.connect(hello.engine_id)
        except TooManyEnginesError:
            await self._abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"there are {protocol.MAX_ENGINES} engines already",
            )
        _log.info(
            "engine %s connected: model %s, version %s",
            hello.engine_id,
            hello.model,
            hello.engine_version,
        )
        try:
            await self._serve(connection, hello, first, requests, context)
        finally:
            self.engines.disconnect(connection)
            _log.info("engine %s disconnected", hello.engine_id)

    async def _serve(
        self,
        connection: Connection,
        hello: pb.Hello,
        first: pb.EngineMessage,
        rest: AsyncIterator[pb.EngineMessage],
        context: Any,
    ) -> None:
        connection.state.introduction = Introduction(
            model=hello.model,
            slots=hello.max_num_seqs,
            kv_tokens=hello.kv_tokens,
            block_tokens=hello.block_tokens,
            batched_tokens=hello.max_num_batched_tokens,
        )
        await self._load_token_table(hello.token_table_file)
        stream = Stream(connection.state, self.metrics, context.write)
        await stream.welcome(
            pb.Welcome(
                protocol_version=protocol.PROTOCOL_VERSION,
                sidecar_version=package_version(),
                policy=self.policy.value,
                model_version=self.predictor.model_version,
            )
        )
        running = asyncio.create_task(stream.run(first, rest))
        replaced = asyncio.create_task(connection.replaced.wait())
        stopping = asyncio.create_task(self.stopping.wait())
        tasks = {running, replaced, stopping}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks - {running}:
                task.cancel()
            if not running.done():
                running.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not running.cancelled():
            await self._end(running, context)
        elif self.stopping.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the sidecar is stopping")
        else:
            await context.abort(
                grpc.StatusCode.ABORTED, "the engine has opened another stream, which replaces this"
            )

    async def _end(self, running: asyncio.Task[None], context: Any) -> None:
        try:
            running.result()
        except InvalidMessageError as error:
            await self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _load_token_table(self, name: str) -> None:
        if not name:
            return
        if self.shared_dir is None or Path(name).name != name or name == "..":
            _log.warning(
                "token table %r ignored: it must be a plain file name in --shared-dir", name
            )
            return
        path, predictor = self.shared_dir / name, self.predictor.inner
        try:
            async with self._reading:
                table = (name, path.stat().st_mtime_ns)
                if table != self._table_in_use:
                    # Takes seconds, in which the other engines' streams go on.
                    predictor.serve(await asyncio.to_thread(predictor.read, path))
                    self._table_in_use = table
        except (OSError, TokenTableError) as error:
            _log.warning("token table %r not used, predictions go on without: %s", name, error)

    async def _abort(self, context: Any, code: grpc.StatusCode, text: str) -> NoReturn:
        self.metrics.rejected.labels(code.name).inc()
        _log.warning("call refused with %s: %s", code.name, text)
        await context.abort(code, text)
        raise AssertionError("abort raises")
