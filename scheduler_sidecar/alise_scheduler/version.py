"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the version of `alise`, or "unknown" when it runs from a source tree."""
    try:
        return version("alise")
    except PackageNotFoundError:
        return "unknown"
