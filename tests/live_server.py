"""A real `alise serve` (or `vllm serve`) process and a client of it, for tests marked `engine`."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from alise_engine.default_model import DEFAULT_MODEL_NAME
from patience import eventually

START_S = 300.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A server process and a client of it."""

    def __init__(self, command: list[str], log: Path, port: int) -> None:
        self.port, self.log = port, log
        self.url = f"http://localhost:{port}"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                return httpx.get(f"{self.url}/health").is_success
            except httpx.HTTPError:
                return False

        eventually(is_ready, START_S)

    def chat(self, prompt: str, max_tokens: int = 24, **options: Any) -> httpx.Response:
        body = {
            "model": DEFAULT_MODEL_NAME,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **options,
        }
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=600.0)

    def answer(self, prompt: str, **options: Any) -> str:
        response = self.chat(prompt, **options)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics", timeout=60.0).text.splitlines():
            if line.startswith(name) and line[len(name)] in " {":
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name}")

    def sidecar(self) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children():
            if "alise_scheduler" in child.cmdline():
                return child
        raise psutil.NoSuchProcess(0, "the sidecar is not running")

    def wait_for_a_sidecar_after(self, old: psutil.Process) -> None:
        def is_there() -> bool:
            try:
                return self.sidecar().pid != old.pid
            except psutil.NoSuchProcess:  # the old one ended, and the next is not there yet
                return False

        eventually(is_there)

    def is_connected(self) -> bool:
        # The engine looks when it schedules.
        self.answer("Hi", max_tokens=2)
        return self.metric("alise_engine_sidecar_connected") == 1

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(120.0)


@contextmanager
def serving(command: list[str], log: Path, port: int) -> Iterator[Server]:
    """Run `alise serve` without the network; yields when its sidecar is connected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        server = Server(command, log, port)
    try:
        server.wait_until_ready()
        eventually(server.is_connected)
        yield server
    finally:
        server.stop()
