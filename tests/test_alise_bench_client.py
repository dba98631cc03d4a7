"""The load generator against a server, of a few lines, that drops reused connections."""

from __future__ import annotations

import asyncio
import json

from alise_bench.client import Answer, Ask, run_load
from alise_bench.dataset import Conversation, Item

_ITEM = Item("one", "key", (1, 2), (3,), Conversation("", (), ""))
_EVENT = {"choices": [{"token_ids": [3], "text": "a", "finish_reason": "stop"}]}
_BODY = f"data: {json.dumps(_EVENT)}\n\ndata: [DONE]\n\n".encode()


async def _answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer a connection's first request, and close at its second, as an idle timeout would."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().split(b"content-length:")[1].split(b"\r\n")[0]
    await reader.readexactly(int(length))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY))
    await writer.drain()
    await reader.read(1)
    writer.close()


async def _answers(asks: list[Ask]) -> list[Answer]:
    server = await asyncio.start_server(_answer_once, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await run_load(f"http://127.0.0.1:{port}", "bench", asks, max_tokens=4)


def test_no_request_is_lost_to_a_server_that_closes_idle_connections() -> None:
    answers = asyncio.run(_answers([Ask(_ITEM, 0.0), Ask(_ITEM, 0.3)]))
    assert [(answer.row.error, answer.token_ids) for answer in answers] == [(None, (3,))] * 2
