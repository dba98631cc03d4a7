"""The replay processor: right through every way that requests move within a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alise_bench.keys import key_of
from alise_bench.replay_table import (
    REPLAY_FILE_VARIABLE,
    read_replay_table,
    write_replay_table,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from alise_bench.replay import ReplayRecordedAnswers  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor import MoveDirectionality  # noqa: E402
from vllm.v1.sample.logits_processor.state import BatchUpdateBuilder  # noqa: E402

EOS = 0
VOCABULARY = 50
# prompt -> answer; the last prompt has none recorded.
ANSWERS = {(n, n + 1): (*range(n + 1, n + 2 + n % 5), EOS) for n in range(8)}
UNRECORDED = (40, 41)

MakeProcessor = Callable[[], ReplayRecordedAnswers]


def build(folder: Path) -> ReplayRecordedAnswers:
    file = folder / "answers.npz"
    write_replay_table({key_of(prompt): answer for prompt, answer in ANSWERS.items()}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REPLAY_FILE_VARIABLE, str(file))
        return ReplayRecordedAnswers(None, torch.device("cpu"), False)


def sample(processor: ReplayRecordedAnswers, batch: int) -> list[int]:
    logits = torch.zeros(batch, VOCABULARY)
    logits[:, VOCABULARY - 1] = 5.0  # what the model would say
    return processor.apply(logits).argmax(dim=-1).tolist()


def test_table_round_trip(tmp_path: Path) -> None:
    answers = {"a" * 64: (1, 2, 3), "b" * 64: (70_000,)}
    write_replay_table(answers, tmp_path / "t.npz")
    assert read_replay_table(tmp_path / "t.npz") == answers


def test_no_file_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REPLAY_FILE_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=REPLAY_FILE_VARIABLE):
        ReplayRecordedAnswers(None, torch.device("cpu"), False)


def test_a_long_prompt_is_keyed_by_its_ends_and_length() -> None:
    long = list(range(3000))
    assert key_of(long) != key_of(long[:-1])
    changed = [*long[:1000], 0, *long[1001:]]
    assert key_of(long) == key_of(changed)


class Batch(RuleBasedStateMachine):
    """A persistent batch as vLLM keeps it; every step must give each job its next token."""

    folder: Path

    @initialize()
    def start(self) -> None:
        self.processor = build(self.folder)
        self.builder = BatchUpdateBuilder()
        # Batch index -> (prompt, output tokens), dense between steps.
        self.slots: dict[int, tuple[tuple[int, ...], list[int]]] = {}
        self.preempted: list[tuple[tuple[int, ...], list[int]]] = []
        self.fresh = 0

    def _add(self, prompt: tuple[int, ...], output: list[int]) -> None:
        # As vLLM: into the lowest hole that a removal left, else at the end.
        index = self.builder.pop_removed()
        if index is None:
            index = len(self.slots)
        # A list of the request's own, the same object for the processor and the engine.
        self.builder.added.append((index, SamplingParams(), list(prompt), output))
        self.slots[index] = (prompt, output)

    @rule(prompt=st.sampled_from([*ANSWERS, UNRECORDED]))
    def add(self, prompt: tuple[int, ...]) -> None:
        self._add(prompt, [])

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def remove_and_step(self, data: st.DataObject) -> None:
        gone = data.draw(st.sets(st.sampled_from(sorted(self.slots)), min_size=1))
        is_preemption = data.draw(st.booleans())
        for index in gone:
            job = self.slots.pop(index)
            self.builder.removed_append(index)
            if is_preemption:
                self.preempted.append(job)
        if self.preempted and data.draw(st.booleans()):
            # Back after a recompute: a new list with all that was out before.
            prompt, output = self.preempted.pop(0)
            index = self.builder.pop_removed()
            assert index is not None
            output = list(output)
            self.builder.added.append((index, SamplingParams(), list(prompt), output))
            self.slots[index] = (prompt, output)
        self._condense()
        self._step()

    @precondition(lambda self: len(self.slots) > 1)
    @rule(data=st.data())
    def swap_and_step(self, data: st.DataObject) -> None:
        a, b = data.draw(
            st.lists(st.sampled_from(sorted(self.slots)), min_size=2, max_size=2, unique=True)
        )
        self.builder.moved.append((a, b, MoveDirectionality.SWAP))
        self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
        self._step()

    @rule()
    def step(self) -> None:
        self._step()

    def _condense(self) -> None:
        # As vLLM's InputBatch.condense: the last job moves into the lowest hole.
        for hole in range(len(self.slots)):
            if hole not in self.slots:
                last = max(self.slots)
                self.builder.moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
                self.slots[hole] = self.slots.pop(last)

    def _step(self) -> None:
        self.processor.update_state(self.builder.get_and_reset(len(self.slots)))
        tokens = sample(self.processor, len(self.slots))
        for index, (prompt, output) in self.slots.items():
            answer = ANSWERS.get(prompt)
            if answer is None:
                expected = VOCABULARY - 1
            else:
                expected = answer[min(len(output), len(answer) - 1)]
            assert tokens[index] == expected
            output.append(tokens[index])


def test_each_job_gets_its_own_next_token_whatever_moves(tmp_path: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Batch.folder = tmp_path
    run_state_machine_as_test(
        Batch,
        settings=settings(
            max_examples=60,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
