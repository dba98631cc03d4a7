"""Runs in a pod of the cluster: the stock OpenAI client, unchanged, against a Service.

Prints a line of JSON for each request. Has the standard library and `openai`, nothing of ALISE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--requests", type=int, default=1)
parser.add_argument("--until", type=Path, help="go on until this file exists")
parser.add_argument("--concurrency", type=int, default=1)
parser.add_argument("--tokens", type=int, default=16)
parser.add_argument("--retries", type=int, default=0)
arguments = parser.parse_args()
client = OpenAI(base_url=arguments.url, api_key="none", max_retries=arguments.retries, timeout=120)


def chat(number: int) -> None:
    """Ask for one streamed answer."""
    start_s = time.monotonic()
    result: dict[str, object] = {"number": number}
    try:
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": f"Count from {number} upwards."}],
            max_tokens=arguments.tokens,
            stream=True,
        )
        pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        texts = [piece for piece in pieces if piece]
        result |= {"text": "".join(texts), "pieces": len(texts)}
    except Exception as error:  # a stream that breaks is not wrapped by the client
        result["error"] = f"{type(error).__name__}: {error}"
    result["seconds"] = round(time.monotonic() - start_s, 2)
    print(json.dumps(result), flush=True)


def series(worker: int) -> None:
    """Ask one after the other, until there is a file."""
    for number in itertools.count(worker, arguments.concurrency):
        if arguments.until.exists():
            return
        chat(number)


with ThreadPoolExecutor(arguments.concurrency) as executor:
    if arguments.until:
        list(executor.map(series, range(arguments.concurrency)))
    else:
        list(executor.map(chat, range(arguments.requests)))
