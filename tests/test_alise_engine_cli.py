"""What `alise serve` makes of its command line; nothing is started."""

from __future__ import annotations

from itertools import pairwise

import pytest
from alise_engine import cli
from alise_engine.launcher import ServePlan
from alise_engine.vllm_arguments import option_value
from typer.testing import CliRunner


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[ServePlan]:
    """Gather the plans that would be launched."""
    found: list[ServePlan] = []

    class FakeLauncher:
        def __init__(self, plan: ServePlan) -> None:
            found.append(plan)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(cli, "Launcher", FakeLauncher)
    return found


def plan_of(plans: list[ServePlan], *options: str) -> ServePlan:
    result = CliRunner().invoke(cli.app, ["a-model", *options])
    assert result.exit_code == 0, result.output
    return plans[-1]


@pytest.mark.parametrize(
    ("options", "drain_s"),
    [
        pytest.param([], 30, id="default"),
        pytest.param(["--alise-drain-s", "60"], 60, id="ours"),
        pytest.param(["--shutdown-timeout", "90"], 90, id="vLLM's"),
        pytest.param(["--alise-drain-s", "5", "--shutdown_timeout=90"], 90, id="both"),
    ],
)
def test_launcher_and_vllm_drain_for_the_same_time(
    plans: list[ServePlan], options: list[str], drain_s: int
) -> None:
    plan = plan_of(plans, *options)
    assert plan.drain_s == drain_s
    assert option_value(plan.engine_command, "--shutdown-timeout") == str(drain_s)


def test_requests_are_turned_away_before_anything_else_sees_them(plans: list[ServePlan]) -> None:
    command = plan_of(plans, "--middleware", "the.users", "--alise-estimate-headers").engine_command
    given = [value for name, value in pairwise(command) if name == "--middleware"]
    assert given == ["the.users", cli.ESTIMATE_HEADERS, cli.DRAINING]
