"""A burst of long and short requests: short ones overtake with predictions, not with FCFS.

More long ones than there are slots come first, and then the short ones.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from cluster import chat, eventually, metric, patch, pods, sidecar_document, wait_connected

_SLOTS = 16  # of the embedded model's default
_LEAD_S = 1.0  # jobs that are admitted in one step have their first tokens together, in any order
# Answers end by themselves: the predictor learns nothing of the length of one that was cut off.
_LONG = ("Explain in one paragraph how a machine with {} wheels works.", 400)
_SHORT = ("What comes after {}? Say the number only.", 400)


def burst(service: str, *kinds: tuple[str, int]) -> list[dict[str, Any]]:
    """Send one request of each kind, in this order; results come back in this order."""
    jobs = [(prompt.format(number), tokens) for number, (prompt, tokens) in enumerate(kinds)]
    results = chat(service, "--burst", json.dumps(jobs), wait_s=600)
    assert [each for each in results if "error" in each] == []
    return sorted(results, key=lambda each: int(each["number"]))


def overtakings(service: str) -> tuple[int, int]:
    """Return in how many pairs a shorter one, which came later, clearly began first; of how many.

    Not all answers are as long as they were meant to be: pairs are those of a later one that came
    out less than half as long.
    """
    sent = burst(service, *[_LONG] * 2 * _SLOTS, *[_SHORT] * 8)
    waiting, late = sent[_SLOTS : 2 * _SLOTS], sent[2 * _SLOTS :]
    pairs = [
        (early, later)
        for early, later in itertools.product(waiting, late)
        if 2 * later["pieces"] < early["pieces"]
    ]
    overtaken = [later["first_s"] < early["first_s"] - _LEAD_S for early, later in pairs]
    print(f"\n{sum(overtaken)} of {len(pairs)} overtaken")
    return sum(overtaken), len(pairs)


@pytest.fixture
def trained(smol: str) -> str:
    """Have the sidecar learn from answers to both kinds of prompts."""

    (pod,) = pods(smol)
    wait_connected(pod)

    def is_trained() -> bool:
        return metric(pod, "alise_model_version") >= 1

    for _ in range(6):  # 24 answers each, less those that are cut off; it takes some 64
        burst(smol, *[_LONG, _SHORT] * 12)
        if is_trained():
            break
    eventually(is_trained, "the sidecar has trained a predictor", 60)
    return smol


@pytest.mark.timeout(1800)
def test_short_ones_overtake_with_predictions_and_not_with_fcfs(trained: str) -> None:
    (pod,) = pods(trained)
    boosts, predictions = "alise_boost_seconds_count", 'alise_predictions_total{result="quantiles"}'
    before = metric(pod, boosts), metric(pod, predictions)
    overtaken, of = overtakings(trained)
    assert of >= 16
    assert overtaken > of / 2
    assert metric(pod, boosts) > before[0]
    assert metric(pod, predictions) >= before[1] + 2 * _SLOTS + 8

    patch(trained, scheduling={"policy": "FCFS"})
    try:
        # The kubelet brings the sidecar its new policy, without a restart.
        eventually(lambda: sidecar_document(pod)["policy"] == "fcfs", "the policy is FCFS", 180)
        before = metric(pod, boosts), metric(pod, predictions)
        assert overtakings(trained)[0] == 0
        assert metric(pod, boosts) == before[0]
    finally:
        patch(trained, scheduling={"policy": "Boost"})
    (after,) = pods(trained)
    assert after["metadata"]["uid"] == pod["metadata"]["uid"]
