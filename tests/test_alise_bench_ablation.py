from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from alise_bench.ablation import GROUPS, Group
from alise_scheduler.answer_features import ANSWER_WIDTH
from alise_scheduler.evaluation import trained_on
from alise_scheduler.prompt_encoder import ENCODING_WIDTH
from alise_scheduler.prompt_features import PROMPT_WIDTH
from alise_scheduler.token_table import read_token_table
from alise_scheduler.tracked_job import TrackedJob
from predictor_fixtures import conversations, write_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("t") / "t.npz")


def ended(table: Path) -> TrackedJob:
    one = conversations(1, seed=3)[0]
    job = TrackedJob(one.prompt, read_token_table(table))
    job.extend(one.answer_ids, len(one.answer_ids))
    job.set_encoding(np.ones(ENCODING_WIDTH, dtype=np.float32))
    assert job.snapshots
    return job


def test_the_groups_are_all_columns_once_but_the_answer_s_length() -> None:
    for of_prompt, width in ((True, PROMPT_WIDTH), (False, ANSWER_WIDTH)):
        covered = np.zeros(width, dtype=np.int64)
        covered[0] += not of_prompt
        for group in GROUPS:
            if group.of_prompt is of_prompt and group.columns:
                covered[group.columns] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_group_is_wiped_and_no_other(group: Group, table: Path) -> None:
    before, job = ended(table), ended(table)
    group.wipe(job)
    pairs = [(before.features, job.features, group.of_prompt)]
    for was, now in zip(before.snapshots, job.snapshots, strict=True):
        pairs.append((was, now, not group.of_prompt))  # type: ignore[arg-type]
    for was, now, is_wiped in pairs:
        changed = np.flatnonzero(was.dense != now.dense)
        if is_wiped and group.columns:
            assert not now.dense[group.columns].any()
            inside = np.arange(len(was.dense))[group.columns]
            assert set(changed) <= set(inside)
        else:
            assert not len(changed)
        is_bag = group.columns is None and not group.is_encoding
        assert (len(now.bag) == 0) == (is_wiped and is_bag)
    assert before.features.encoding is not None
    assert (job.features.encoding is None) == group.is_encoding


@pytest.mark.parametrize("is_wiped", [True, False])
def test_what_is_wiped_in_training_has_no_part_in_predictions(is_wiped: bool, table: Path) -> None:
    sizes = GROUPS[0]
    change = sizes.wipe if is_wiped else lambda _: None
    predictor = trained_on(conversations(120), table, change=change)
    assert predictor.model_version == 1
    prompt = conversations(1, seed=5)[0].prompt
    same_text = [predictor.track(replace(prompt, prompt_tokens=n)) for n in (8, 200)]
    assert len(set(predictor.predict(same_text))) == (1 if is_wiped else 2)
