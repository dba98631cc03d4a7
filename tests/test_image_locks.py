"""The images' lock files have all that pyproject.toml asks for: what lacks starts in no pod."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# In an image for Linux; ALISE itself is installed from the source, and torch from elsewhere.
NOT_LOCKED = {"alise", "torch"}
LINUX = {"sys_platform": "linux", "python_version": "3.11"}


def extra(name: str) -> list[str]:
    return list(PROJECT["optional-dependencies"][name])


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("operator", ["operator"]),
        ("scheduler_sidecar", ["sidecar"]),
        ("engine", ["engine", "sidecar", "cpu"]),
    ],
)
def test_a_lock_file_has_all_that_is_asked_for(lock: str, extras: list[str]) -> None:
    lines = (ROOT / lock / "requirements.txt").read_text()
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([\w.-]+)==([\w.+!-]+)", lines, re.M)
    }
    texts = [*PROJECT["dependencies"], *(text for e in extras for text in extra(e))]
    wanted = [Requirement(text) for text in texts]
    for each in wanted:
        name = canonicalize_name(each.name)
        if name in NOT_LOCKED or (each.marker and not each.marker.evaluate(LINUX)):
            continue
        assert name in pins, f"{each} is not in {lock}/requirements.txt: make lock"
        assert each.specifier.contains(pins[name]), f"{each} in {lock}/requirements.txt: make lock"
