"""Recorded mode on a real engine: the answers are the recorded ones, even through preemption."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from alise_bench.client import Ask, run_load
from alise_bench.dataset import Conversation, load_dataset, packaged_dataset, tokenize
from alise_bench.replay_table import write_replay_table
from alise_bench.server import engine_counts, free_port, running_server
from alise_bench.systems import (
    SERVED_NAME,
    Pace,
    ServerSettings,
    System,
    command,
    environment,
)
from alise_engine.default_model import (
    DefaultModelMissingError,
    ensure_default_model,
)

MAX_TOKENS = 256
JOBS = 8


def model_folder() -> Path:
    try:
        return ensure_default_model()
    except DefaultModelMissingError as error:
        pytest.skip(str(error))


@pytest.mark.engine
def test_recorded_answers_come_back_token_for_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = model_folder()
    rows = [
        Conversation(
            row.id, row.messages, " ".join(f"word {n} of {row.id}," for n in range(4 + 3 * place))
        )
        for place, row in enumerate(load_dataset(packaged_dataset(), need_response=False)[:JOBS])
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    items = tokenize(
        rows, tokenizer, max_model_len=512, max_tokens=MAX_TOKENS, with_answers=True
    ).items
    assert len(items) == JOBS
    assert max(item.output_tokens for item in items) > 128
    answers = tmp_path / "answers.npz"
    write_replay_table({item.key: item.answer_ids for item in items}, answers)
    # So few KV blocks (of 128 tokens) that jobs are preempted, and recomputed, as they grow.
    settings = ServerSettings(
        model,
        JOBS,
        512,
        1,
        ("--num-gpu-blocks-override", "9"),
        replay_file=answers,
        pace=Pace("flat-16", tmp_path / "pace.json"),
    )
    port = free_port()
    line = command(System.FCFS, settings, port)
    environ = environment(settings, os.environ)
    with running_server(line, environ, port, tmp_path / "server.log") as url:
        asks = [Ask(item, 0.0) for item in items]
        received = asyncio.run(run_load(url, SERVED_NAME, asks, MAX_TOKENS))
        counts = engine_counts(url, settings.pace)
    for item, answer in zip(items, received, strict=True):
        assert answer.row.error is None
        assert answer.token_ids == item.answer_ids
        assert answer.finish_reason == "stop"
        assert len(answer.row.token_s) == item.output_tokens
        assert list(answer.row.token_s) == sorted(answer.row.token_s)
    assert counts.preemptions > 0
    # All steps together took as long as their pace, which is 40 ms and more for each.
    steps = max(item.output_tokens for item in items)
    assert counts.paced_s > 0.04 * steps
    assert max(answer.row.finish_s for answer in received) > 0.04 * steps
