"""Runs in a pod of the cluster: the stock OpenAI client, unchanged, against a Service.

Prints a line of JSON for each request. Has the standard library and `openai`, nothing of ALISE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

_APART_S = 0.05  # of a burst: so that the server sees its requests in this order

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--requests", type=int, default=1)
parser.add_argument("--until", type=Path, help="go on until this file exists")
parser.add_argument("--concurrency", type=int, default=1)
parser.add_argument("--tokens", type=int, default=16)
parser.add_argument("--retries", type=int, default=0)
parser.add_argument(
    "--burst",
    type=json.loads,
    help="JSON list of [prompt, most tokens]: all sent at once, in this order",
)
arguments = parser.parse_args()
client = OpenAI(base_url=arguments.url, api_key="none", max_retries=arguments.retries, timeout=300)
model = client.models.list().data[0].id
start_s = time.monotonic()


def ask(number: int, prompt: str, tokens: int) -> None:
    """Ask for one streamed answer; times are seconds since this program's start."""
    result: dict[str, object] = {"number": number, "sent_s": time.monotonic() - start_s}
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=tokens,
            stream=True,
        )
        texts, reason = [], None
        for chunk in stream:
            if not chunk.choices:
                continue
            if "first_s" not in result:  # it has the role, and comes with the first token
                result["first_s"] = time.monotonic() - start_s
                if arguments.until:
                    arguments.until.with_suffix(".begun").touch()
            texts.append(chunk.choices[0].delta.content or "")
            reason = chunk.choices[0].finish_reason
        result |= {"text": "".join(texts), "pieces": sum(map(bool, texts))}
        if reason not in ("stop", "length"):
            result["error"] = f"ended by {reason}"
    except Exception as error:  # a stream that breaks is not wrapped by the client
        result["error"] = f"{type(error).__name__}: {error}"
    result["done_s"] = time.monotonic() - start_s
    sys.stdout.write(json.dumps(result) + "\n")  # at once: threads share the line
    sys.stdout.flush()


def chat(number: int) -> None:
    """Ask for something that takes some tokens to say."""
    ask(number, f"Count from {number} upwards.", arguments.tokens)


def series(worker: int) -> None:
    """Ask one after the other, until there is a file."""
    for number in itertools.count(worker, arguments.concurrency):
        if arguments.until.exists():
            return
        chat(number)


def burst() -> None:
    """Ask for everything at once, in this order."""
    with ThreadPoolExecutor(len(arguments.burst)) as executor:
        for number, (prompt, tokens) in enumerate(arguments.burst):
            executor.submit(ask, number, prompt, tokens)
            time.sleep(_APART_S)


if arguments.burst:
    burst()
else:
    with ThreadPoolExecutor(arguments.concurrency) as executor:
        if arguments.until:
            list(executor.map(series, range(arguments.concurrency)))
        else:
            list(executor.map(chat, range(arguments.requests)))
