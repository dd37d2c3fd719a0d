"""Read `data.sources: [{path: …, weight: …}]` as the keys that the schema has: `data.sources` and `data.weights`."""

from __future__ import annotations

from typing import Any

from longctx.config.problems import Location, Problem, show
from longctx.config.strict_yaml import YamlDocument

_SOURCES, _WEIGHTS = ("data", "sources"), ("data", "weights")
_KEYS = ("path", "weight")


def split_sources(document: YamlDocument) -> None:
    """Replace the blocks among `data.sources` by their paths, in place, and set `data.weights` if one has a weight."""
    data = document.value.get("data")
    given = data.get("sources") if isinstance(data, dict) else None
    entries = given if isinstance(given, list) else [given]
    if not any(isinstance(entry, dict) for entry in entries):
        return
    assert isinstance(data, dict)
    place = document.values.get(_SOURCES) or document.keys.get(_SOURCES) or Location("configuration")
    paths: list[Any] = []
    weights: list[Any] = []
    for entry in entries:
        block = entry if isinstance(entry, dict) else {"path": entry}
        unknown = [str(key) for key in block if key not in _KEYS]
        if unknown or not isinstance(block.get("path"), str):
            what = f"unknown key {show(unknown[0])} in a source" if unknown else "a source has no path"
            message = f"{what}; write {{path: FILE, weight: NUMBER}}, or the path alone"
            document.problems.append(Problem(place, "data.sources", message, "unknown-key" if unknown else "missing"))
        paths.append(block.get("path", ""))
        weights.append(block.get("weight", 1.0))
    data["sources"] = [path if isinstance(path, str) else "" for path in paths]
    if any(isinstance(entry, dict) and "weight" in entry for entry in entries):
        if "weights" in data:
            message = "the sources have weights of their own; remove this key, or give all weights here"
            document.problems.append(Problem(place, "data.weights", message, "idle-key"))
        data["weights"] = weights
        document.values[_WEIGHTS] = place
