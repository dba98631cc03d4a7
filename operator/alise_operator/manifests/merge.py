"""Merging and comparing manifests the way that Kubernetes does: named items by name."""

from __future__ import annotations

from typing import Any, Final

# Keys that identify an item of a list, most specific first.
_KEYS: Final = ("mountPath", "name", "containerPort", "uid")


def merged(base: Any, overlay: Any) -> Any:
    """Return `base` with `overlay` over it; lists of named items are merged, others replaced."""
    if isinstance(base, dict) and isinstance(overlay, dict):
        result = dict(base)
        for name, value in overlay.items():
            result[name] = merged(base[name], value) if name in base else value
        return result
    if isinstance(base, list) and isinstance(overlay, list):
        key = _key(base, overlay)
        if key is not None:
            items = {item[key]: item for item in base}
            for item in overlay:
                items[item[key]] = merged(items.get(item[key], {}), item)
            return list(items.values())
    return overlay


def contains(live: Any, desired: Any) -> bool:
    """Say whether `live` has everything that `desired` says; it may have more, such as defaults."""
    if isinstance(desired, dict):
        return isinstance(live, dict) and all(
            contains(live.get(name), value) for name, value in desired.items()
        )
    if isinstance(desired, list):
        if not desired and live is None:
            return True  # the API server drops empty lists
        if not isinstance(live, list):
            return False
        key = _key(desired, live)
        if key is not None:
            items = {item[key]: item for item in live}
            return all(contains(items.get(item[key]), item) for item in desired)
        return len(live) == len(desired) and all(map(contains, live, desired))
    if desired in (None, False, "", {}) and live is None:
        return True  # a zero value that the API server left out
    return bool(live == desired)


def _key(*lists: list[Any]) -> str | None:
    """Return the key that every item has and that no two items of one list share, if any."""
    items = [item for items in lists for item in items]
    if not items or not all(isinstance(item, dict) for item in items):
        return None
    for key in _KEYS:
        if all(isinstance(item.get(key), (str, int)) for item in items) and all(
            len({item[key] for item in items}) == len(items) for items in lists
        ):
            return key
    return None
