"""The command line, and the sidecar as a process of its own with the real predictor."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from alise_scheduler.cli import app, scheduler
from alise_scheduler.listen import (
    ListenError,
    TcpAddress,
    UnixAddress,
    parse_address,
    prepare_socket,
)
from alise_scheduler.predictor import PredictorSettings
from alise_scheduler.prompt_key import prompt_key
from alise_scheduler.protocol import bounded_token_ids
from alise_scheduler.training import MAX_TRAINING_JOBS
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scheduler_fakes import arrived, engine
from typer.testing import CliRunner

ALISE = [sys.executable, "-m", "alise_scheduler"]
# Loading numpy, scipy and xgboost takes a while on a busy machine.
START_TIMEOUT_S = 240


def alise(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", **environment}
    return subprocess.run(
        [*ALISE, *arguments], capture_output=True, text=True, env=environment, timeout=240
    )


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a sidecar process; yields it and its address once it serves."""
    target = f"unix:{folder / 's.sock'}"
    command = [*ALISE, "scheduler", "--listen", target, "--state-dir", str(folder / "state")]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen([*command, "--metrics-port", "0", *options], stderr=log)
    try:
        asyncio.run(wait_until_serving(target))
        yield process, target
    finally:
        process.kill()
        process.wait()


async def wait_until_serving(target: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with grpc.aio.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service="alise.scheduler.v1.Scheduler")
        while True:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    request, wait_for_ready=True, timeout=START_TIMEOUT_S
                )
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                return
            except grpc.aio.AioRpcError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)


async def talk(target: str) -> None:
    async with engine(target) as stream:
        await stream.send(arrived("a"))
        assert (await stream.read()).update.HasField("cost_model")


def test_sigterm_ends_it_cleanly_and_removes_the_socket(tmp_path: Path) -> None:
    with started(tmp_path) as (process, target):
        asyncio.run(talk(target))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert not (tmp_path / "s.sock").exists()


def test_it_starts_again_over_the_socket_that_a_kill_left(tmp_path: Path) -> None:
    with started(tmp_path) as (process, _):
        process.kill()
        process.wait()
    assert (tmp_path / "s.sock").exists()
    with started(tmp_path) as (_, target):
        asyncio.run(talk(target))
        second = alise("scheduler", "--listen", target, "--state-dir", str(tmp_path / "other"))
        assert second.returncode == 1
        assert "is served by another process" in second.stderr


def test_the_real_predictor_learns_and_predicts(tmp_path: Path) -> None:
    async def predictions(target: str) -> list[pb.Prediction]:
        prompts = [pb.Prompt(token_ids=[2] * 10, prompt_tokens=10)]
        async with grpc.aio.insecure_channel(target) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            return list((await stub.Predict(pb.PredictRequest(prompts=prompts))).predictions)

    async def scenario(target: str) -> None:
        assert not (await predictions(target))[0].quantiles_tokens
        async with engine(target) as stream:
            for index in range(160):
                kind = 1 + index % 2
                await stream.send(
                    arrived(f"{index}", index, tokens=kind, length=10 * kind),
                    pb.Event(
                        finished=pb.JobFinished(
                            job_id=f"{index}",
                            reason=pb.FINISH_REASON_STOP,
                            output_tokens=kind * 100 + index % 7,
                            new_token_ids=[5] * 50,
                        )
                    ),
                )
            deadline = time.monotonic() + 60
            while not (quantiles := (await predictions(target))[0].quantiles_tokens):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
            assert list(quantiles) == sorted(quantiles)
            assert len(quantiles) == 5
            await stream.send(arrived("new", 500.0))
            assert (await stream.estimates("new"))["new"].remaining_tokens > 0

    with started(tmp_path) as (_, target):
        asyncio.run(scenario(target))


def test_oracle_file(tmp_path: Path) -> None:
    file = tmp_path / "oracle.json"
    file.write_text(json.dumps({prompt_key([50] * 8, 8): 321}))

    async def scenario(target: str) -> None:
        async with engine(target) as stream:
            await stream.send(arrived("a", tokens=50, length=8))
            assert (await stream.estimates("a"))["a"].remaining_tokens == 321

    with started(tmp_path, "--oracle-file", str(file)) as (_, target):
        asyncio.run(scenario(target))


def test_help_lists_all_subcommands_and_imports_none_of_them() -> None:
    script = (
        "import sys; from alise_scheduler.main import main; sys.argv = ['alise', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'xgboost', 'vllm', 'torch', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    for name in ("serve", "scheduler", "predictor", "bench"):
        assert name in result.stdout


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "grpc.py").write_text("raise ModuleNotFoundError('No grpc', name='grpc')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = alise("scheduler", "--help", PYTHONPATH=path)
    assert result.returncode == 2
    assert "alise scheduler needs the extra 'sidecar'" in result.stderr
    assert "pip install 'alise[sidecar]'" in result.stderr


def test_version() -> None:
    assert alise("--version").stdout.startswith("alise ")


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--policy", "lifo"], {}, ["--policy", "lifo", "boost", "srtf-aging"]),
        ([], {"ALISE_POLICY": "lifo"}, ["lifo", "boost"]),
        (["--gamma", "-1"], {}, ["--gamma", "-1"]),
        (["--metrics-port", "70000"], {}, ["--metrics-port", "70000", "65535"]),
        (["--listen", "unix:"], {}, ["unix:PATH"]),
        (["--listen", "nowhere"], {}, ["nowhere", "HOST:PORT"]),
        (["--listen", "0.0.0.0:0"], {}, ["--listen", "0.0.0.0:0", "--insecure"]),
        (["--oracle-file", "/nonexistent"], {}, ["--oracle-file", "/nonexistent"]),
        (["--tls-client-ca", __file__], {}, ["--tls-client-ca", "--tls-cert"]),
        (["--tls-cert", __file__], {}, ["--tls-cert", "--tls-key"]),
        (["--oracle-file", __file__], {}, ["--oracle-file", "not JSON"]),
    ],
)
def test_bad_options_are_named_with_what_is_allowed(arguments, environment, said) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300", **environment})
    assert result.exit_code == 2
    for text in said:
        assert text in result.output


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:///run/a/s.sock", UnixAddress(Path("/run/a/s.sock"))),
        ("unix:/run/a/s.sock", UnixAddress(Path("/run/a/s.sock"))),
        ("unix:s.sock", UnixAddress(Path("s.sock"))),
        ("127.0.0.1:50051", TcpAddress("127.0.0.1", 50051)),
        ("[::1]:50051", TcpAddress("::1", 50051)),
        ("localhost:0", TcpAddress("localhost", 0)),
    ],
)
def test_addresses(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000", ":1", "unix:/a/"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        parse_address(text)


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(ValueError, match="107"):
        parse_address("unix:/" + "x" * 120)


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s.sock").write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        prepare_socket(UnixAddress(tmp_path / "s.sock"))
    assert (tmp_path / "s.sock").read_text() == "precious"


def test_a_stale_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    prepare_socket(UnixAddress(path))
    assert not path.exists()


def test_prompt_key_is_of_the_ids_and_the_length() -> None:
    # sha256 of 01000000 02000000 02000000, by coreutils' sha256sum
    known = "782486f75e626020735465b875a72f8f468aa5fd32d09f243ca88917f9ce26c1"
    assert prompt_key([1, 2], 2) == known
    assert prompt_key([1, 2], 2) != prompt_key([1, 2], 3)
    assert prompt_key([1, 2], 2) != prompt_key([2, 1], 2)


def test_long_prompts_travel_as_their_ends() -> None:
    assert bounded_token_ids(list(range(1024))) == list(range(1024))
    bounded = bounded_token_ids(list(range(5000)))
    assert bounded == [*range(512), *range(4488, 5000)]


def test_as_many_samples_are_kept_as_a_training_takes() -> None:
    kept = inspect.signature(scheduler).parameters["max_samples"].default
    assert kept == PredictorSettings().max_samples == MAX_TRAINING_JOBS
