import json
from pathlib import Path

import numpy as np
import pytest
from alise_scheduler.conversations import read_rows
from alise_scheduler.predictor import Predictor, PredictorSettings
from alise_scheduler.predictor_cli import app
from test_alise_engine_token_table import make_model
from typer.testing import CliRunner


def write_rows(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        is_long = i % 2 == 0
        words = "".join(f" w{n}" for n in rng.integers(0, 40, size=5))
        response = "a" * int((120 if is_long else 15) * rng.lognormal(0, 0.2))
        prompt = ("list" if is_long else "name") + words
        messages = [{"role": "user", "content": prompt}]
        row = {"messages": messages} if i % 3 else {"prompt": prompt}
        lines.append(json.dumps({**row, "response": response}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2: not an object"),
        ('{"response": "x"}', 'neither a list "messages"'),
        ('{"messages": [], "response": "x"}', 'neither a list "messages"'),
        ('{"messages": [{"role": 1}], "response": "x"}', "role"),
        ('{"prompt": "x"}', "response"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    rows, problems = read_rows(path)
    assert len(rows) == len(problems) == 1
    assert message in problems[0]


def test_train_leaves_a_state_that_predicts_at_once(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    file = write_rows(tmp_path / "rows.jsonl", 120)
    arguments = ["train", str(file), "--model", str(model), "--state-dir", str(tmp_path / "s")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    from alise_engine.token_table import build_token_table

    build_token_table(model, tmp_path / "t.npz")
    predictor = Predictor(PredictorSettings(tmp_path / "s"))
    predictor.load_token_table(tmp_path / "t.npz")
    assert (predictor.model_version, predictor.sample_count) == (1, 120)


def test_evaluate_prints_and_writes_the_figures(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    file = write_rows(tmp_path / "rows.jsonl", 120)
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(
        app,
        [
            "evaluate",
            str(file),
            "--model",
            str(model),
            "--seeds",
            "1",
            "--json",
            str(out),
            "--latency",
        ],
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["tau_b"] > 0.4
    assert figures["latency"]["wall"]["batched_prompts_per_s"] > 0
    assert 0 < figures["latency"]["cpu"]["single_median_ms"] < 1000
    assert "tau-b" in result.output


def test_errors_are_one_line(tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", 5)
    model = str(make_model(tmp_path / "m"))
    for file, text in ((few, "at least 64"), (tmp_path / "none.jsonl", "No such file")):
        result = CliRunner().invoke(app, ["evaluate", str(file), "--model", model])
        assert result.exit_code == 1
        assert text in result.output
    many = write_rows(tmp_path / "many.jsonl", 70)
    result = CliRunner().invoke(app, ["evaluate", str(many), "--model", str(tmp_path)])
    assert result.exit_code == 1
    assert "no tokenizer" in result.output
