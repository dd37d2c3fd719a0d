"""Compare a run with the checkpoint it resumes: reject incompatible changes, print all others.

A manifest contains the settings of the run that saved it, so an error names the key and both values. Older checkpoints
without settings are compared by the other facts in their manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from longctx.config.keys import leaves
from longctx.config.lora_rules import LORA_FREE
from longctx.config.schema import RunConfig
from longctx.config.write import scalar
from longctx.errors import CheckpointError
from longctx.train.checkpoint.manifest import Manifest

# Sections that define what is computed; the others define where it runs and what is written.
SECTIONS = ("model", "data", "attention", "mesh", "train", "zero", "memory")
REFUSED = {
    "zero.stage": "set it back: each stage keeps the state in files of its own",
    "data.seed": "set it back: it orders the samples",
    "data.sequence_length": "set it back: the position in the data counts rows of that length",
    "data.packing": "set it back: the position in the data counts rows that are packed that way",
    "attention.window": "set it back: it is a part of the model",
    "attention.layers": "set it back: it is a part of the model",
    "train.optimizer": "set it back: the saved state is that of the other optimizer",
}
STAGES = "train.stages"  # what is past must stay as it was
FREE = ("model.pretrained", "model.vocab_size", "model.max_positions")  # compared by the model's hash instead


class SettingChange(NamedTuple):
    """One value that differs between a checkpoint's manifest and this run."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {scalar(self.before)}, now {scalar(self.now)}"

    @property
    def remedy(self) -> str | None:
        """How to fix an incompatible change; None if the run may continue with the new value."""
        of_model = self.key.startswith("model.") and self.key not in FREE
        if self.key == "model.lora" and isinstance(self.before, dict) and isinstance(self.now, dict):
            of_model = any(self.before.get(key) != value for key, value in self.now.items() if key not in LORA_FREE)
        return REFUSED.get(self.key) or ("set it back: it is a part of the model" if of_model else None)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a manifest records: dotted key -> JSON value."""
    values = config.model_dump(mode="json")
    found = {f"{name}.{key}": value for name in SECTIONS for key, value in values[name].items()}
    return found | {"deepspeed": values["deepspeed"]}


def require_settings(name: str, found: Manifest, here: Manifest) -> None:
    """Refuse to resume if a setting differs that determines the meaning of the saved state.

    Args:
        name: of the checkpoint, for the message.

    Raises:
        CheckpointError: it lists every such key with both values.
    """
    refused = [change for change in changes(found, here) if change.remedy]
    if any(_settings(manifest).get(STAGES) for manifest in (found, here)):
        refused = [change for change in refused if change.key != "data.sequence_length"]
        past, now_past = (_history(_settings(manifest), found.step) for manifest in (found, here))
        if past != now_past:
            raise CheckpointError(
                f"{name} was saved after stages of (steps, tokens per row) {_shown(past)}, but train.stages of this "
                f"run begin with {_shown(now_past)}: steps 1 to {found.step} must be those trained. Or choose "
                "another output.folder to start over"
            )
    if refused:
        listed = "; ".join(
            f"{change.key} {scalar(change.before)}, this run has {scalar(change.now)}: {change.remedy}"
            for change in refused
        )
        raise CheckpointError(f"{name} was saved with {listed}. Or choose another output.folder to start over")
    before, now = found.world.get("size"), here.world["size"]
    if before != now and here.run.get("optimizer") != "adamw":
        raise CheckpointError(
            f"{name} was saved by {before} ranks, this run has {now}, and only the state of adamw can be resharded: "
            "start with the same number of ranks, or choose another output.folder to start over"
        )


def require_content(name: str, found: Manifest, here: Manifest) -> None:
    """Refuse to resume if the model or the data differ although the settings are equal.

    Raises:
        CheckpointError: the hash of the model or of the data differs.
    """
    kinds = {
        "model": "the model has different shapes: check model.* and the folder in model.pretrained",
        "data": "the token files hold different tokens: restore data.sources, data.tokenizer and data.held_out",
    }
    for what, remedy in kinds.items():
        before, now = found.run.get(what), here.run.get(what)
        if before != now:
            raise CheckpointError(
                f"{name} was saved with the {what} {before}, this run has {now}: {remedy}; or choose another "
                "output.folder to start over"
            )


def announce(name: str, found: Manifest, here: Manifest, say: Callable[[str], None]) -> None:
    """Print every change, one per line."""
    for change in changes(found, here):
        say(f"{name} was saved with {change}")


def changes(found: Manifest, here: Manifest) -> Iterator[SettingChange]:
    """Yield the differences between the manifest ``found`` and this run's facts, in the order of the keys."""
    before, now = recorded(found), recorded(here)
    whole = bool(_settings(found))
    for key in now | before:
        if whole or (key in before and key in now):
            was, becomes = (facts[key] if key in facts else _default(key) for facts in (before, now))
            if was != becomes:
                yield SettingChange(key, was, becomes)


def recorded(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest's facts about its run by key, with the resolved sizes where a setting is `auto`."""
    run, world = manifest.run, manifest.world
    facts = {
        "zero.stage": manifest.zero_stage,
        "data.seed": manifest.seed,
        "train.optimizer": run.get("optimizer"),
        "train.global_batch": run.get("global_batch"),
        "attention.layout": manifest.layout,
        **{f"mesh.{name}": world[name] for name in ("data", "ring", "ulysses") if name in world},
        "ranks": world.get("size"),
        "threads": run.get("threads"),
        "code": manifest.git_commit,
        **{f"version of {name}": version for name, version in manifest.versions.items()},
    }
    return _settings(manifest) | {key: value for key, value in facts.items() if value is not None}


def _history(settings: dict[str, Any], step: int) -> list[tuple[int, int, Any]]:
    """Return (steps, sequence length, rope) of each stage of steps 1 to ``step``."""
    whole = {"sequence_length": settings.get("data.sequence_length"), "steps": step}
    past, left = [], step
    for stage in settings.get(STAGES) or [whole]:
        if left > 0:
            past.append((min(stage["steps"], left), stage["sequence_length"], stage.get("rope")))
            left -= stage["steps"]
    return past


def _shown(past: list[tuple[int, int, Any]]) -> str:
    return ", ".join(f"({steps}, {length}{', with a rope' if rope else ''})" for steps, length, rope in past)


def _settings(manifest: Manifest) -> dict[str, Any]:
    found = manifest.run.get("settings")
    return found if isinstance(found, dict) else {}


def _default(key: str) -> Any:
    """Return the default (as JSON) of a key that only one of the two longctx versions has; None if unknown here."""
    return json.loads(json.dumps(leaves()[key].default)) if key in leaves() else None
