"""Compare a run with the checkpoint it resumes: changes that the state cannot follow are refused, all others are said.

A manifest carries the settings of the run that saved it, so that a refusal names the key and both values. Checkpoints
without settings (older ones) are compared by what else their manifest holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from longctx.config.keys import leaves
from longctx.config.schema import RunConfig
from longctx.config.write import scalar
from longctx.errors import CheckpointError
from longctx.train.checkpoint.manifest import Manifest

# Sections that say what is computed; the others say where it runs and what is written.
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
FREE = ("model.pretrained", "model.vocab_size", "model.max_positions")  # decided by the hash of the model


class SettingChange(NamedTuple):
    """One fact that a checkpoint records and the run contradicts."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {scalar(self.before)}, now {scalar(self.now)}"

    @property
    def remedy(self) -> str | None:
        """What to do about it where it is refused; None where the new value can apply."""
        of_model = self.key.startswith("model.") and self.key not in FREE
        return REFUSED.get(self.key) or ("set it back: it is a part of the model" if of_model else None)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a manifest records, as JSON: dotted key -> value."""
    values = config.model_dump(mode="json")
    found = {f"{name}.{key}": value for name in SECTIONS for key, value in values[name].items()}
    return found | {"deepspeed": values["deepspeed"]}


def require_settings(name: str, found: Manifest, here: Manifest) -> None:
    """Refuse to resume where a setting differs that decides the meaning of the saved state.

    Args:
        name: of the checkpoint, for the message.

    Raises:
        CheckpointError: it names every such key with both values.
    """
    refused = [change for change in changes(found, here) if change.remedy]
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
            "start as many, or choose another output.folder to start over"
        )


def require_content(name: str, found: Manifest, here: Manifest) -> None:
    """Refuse to resume where model or data are other ones although the settings are the same.

    Raises:
        CheckpointError: the hash of the model or of the data differs.
    """
    kinds = {
        "model": "the model has other shapes: check model.* and the folder in model.pretrained",
        "data": "the token files hold other tokens: restore data.sources, data.tokenizer and data.held_out",
    }
    for what, remedy in kinds.items():
        before, now = found.run.get(what), here.run.get(what)
        if before != now:
            raise CheckpointError(
                f"{name} was saved with the {what} {before}, this run has {now}: {remedy}; or choose another "
                "output.folder to start over"
            )


def announce(name: str, found: Manifest, here: Manifest, say: Callable[[str], None]) -> None:
    """Say every other fact that the checkpoint records and this run contradicts, one a line."""
    for change in changes(found, here):
        say(f"{name} was saved with {change}")


def changes(found: Manifest, here: Manifest) -> Iterator[SettingChange]:
    """Yield what differs between the manifest ``found`` and the facts of this run, in the order of the keys."""
    before, now = recorded(found), recorded(here)
    whole = bool(_settings(found))
    for key in now | before:
        if whole or (key in before and key in now):
            was, becomes = (facts[key] if key in facts else _default(key) for facts in (before, now))
            if was != becomes:
                yield SettingChange(key, was, becomes)


def recorded(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says about its run, by key; sizes that the settings leave open are those it came to."""
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


def _settings(manifest: Manifest) -> dict[str, Any]:
    found = manifest.run.get("settings")
    return found if isinstance(found, dict) else {}


def _default(key: str) -> Any:
    """Return the value of a key that one of two versions of longctx does not know, as JSON has it."""
    return json.loads(json.dumps(leaves()[key].default)) if key in leaves() else None
