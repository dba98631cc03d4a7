"""Settings from the environment, and what the launcher reads of vLLM's command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from alise_engine.settings import EngineSettings, SettingsError
from alise_engine.vllm_arguments import ServerAddress, has_option, option_value


def test_defaults_are_stock() -> None:
    settings = EngineSettings.from_env({})
    assert settings.address is None
    assert settings.preempts
    assert settings.tls is None


def test_values() -> None:
    settings = EngineSettings.from_env(
        {
            "ALISE_SCHEDULER": "unix:///run/s.sock",
            "ALISE_SHARED_DIR": "/run",
            "ALISE_PREEMPTION": "no",
            "ALISE_PREEMPTION_MARGIN_S": "1.5",
            "ALISE_SCHEDULER_TLS_CA": "/ca.pem",
        }
    )
    assert settings.address == "unix:///run/s.sock"
    assert settings.shared_dir == Path("/run")
    assert not settings.preempts
    assert settings.margin_s == 1.5
    assert settings.tls is not None
    assert settings.tls.ca == Path("/ca.pem")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ALISE_PREEMPTION", "maybe", "true"),
        ("ALISE_PREEMPTION_MARGIN_S", "-1", "0 or more"),
        ("ALISE_PREEMPTION_MARGIN_S", "nan", "0 or more"),
        ("ALISE_STALE_AFTER_S", "soon", "seconds"),
    ],
)
def test_an_error_names_the_variable_its_value_and_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        EngineSettings.from_env({name: value})
    for part in (name, value, allowed):
        assert part in str(caught.value)


def test_half_a_client_certificate_is_refused() -> None:
    with pytest.raises(SettingsError, match="go together"):
        EngineSettings.from_env({"ALISE_SCHEDULER_TLS_CERT": "/c.pem"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["m", "--port", "1"], "1"),
        (["m", "--port=2"], "2"),
        (["--port", "1", "--port", "3"], "3"),
        (["--port"], None),
    ],
)
def test_option_value(arguments: list[str], expected: str | None) -> None:
    assert option_value(arguments, "--port") == expected


def test_vllm_takes_underscores_for_dashes() -> None:
    assert has_option(["--scheduler_cls=x"], "--scheduler-cls")
    assert option_value(["--max_model_len", "9"], "--max-model-len") == "9"


def test_address_and_curl() -> None:
    server = ServerAddress.of(["m", "--host", "0.0.0.0", "--port", "8001"])
    assert server.url == "http://localhost:8001"
    assert "http://localhost:8001/v1/chat/completions" in server.curl("m")
    assert '"model": "m"' in server.curl("m")
    assert ServerAddress.of(["--ssl-certfile", "c"]).url == "https://localhost:8000"
    assert "--unix-socket /s" in ServerAddress.of(["--uds", "/s"]).curl("m")
    assert not ServerAddress.of(["--port", "9"]).is_healthy()
