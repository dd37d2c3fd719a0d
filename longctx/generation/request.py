"""The request of `longctx generate`: a frozen value that every rank reads as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from longctx.errors import ConfigError

FIGURES = "figures.txt"
"""File beside the request to which rank 0 of a ring writes the lines for stderr."""
ATTENTION = ("auto", "el", "kv")


@dataclass(frozen=True)
class Request:
    """A checkpoint, a prompt, and how to continue it."""

    folder: str
    prompt: str
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    beams: int = 1
    seed: int = 0
    attention: str = "auto"
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        limits = {
            "max-new-tokens": (self.max_new_tokens, 1, 2**31), "temperature": (self.temperature, 0, 100),
            "top-k": (self.top_k, 0, 2**31), "top-p": (self.top_p, 1e-6, 1), "beams": (self.beams, 1, 1024),
            "seed": (self.seed, 0, 2**63 - 1),
        }  # fmt: skip
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise ConfigError(f"generate --{name} {value}: give a number from {low} to {high}")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:  # undecodable bytes of an argument or of stdin arrive as lone surrogates
            raise ConfigError(
                f"generate: the prompt is not UTF-8 text at its character {error.start + 1}; convert it to UTF-8"
            ) from None
        if self.attention not in ATTENTION:
            raise ConfigError(f"generate --attention {self.attention}: choose one of {', '.join(ATTENTION)}")

    def write(self, path: Path) -> None:
        """Write the request for the ranks, readable by this user only."""
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Request:
        """Read a request that `write` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def model_folder(checkpoint: Path) -> Path:
    """Return the folder with the weights: ``checkpoint`` itself, or the `model` folder of a run directory.

    Raises:
        ConfigError: there is none.
    """
    for folder in (checkpoint, checkpoint / "model"):
        if (folder / "config.json").is_file():
            return folder
    if (checkpoint / "checkpoints").is_dir():
        raise ConfigError(
            f"generate {checkpoint}: this run has not ended, so it has no model folder; `longctx export {checkpoint}` "
            "writes one from its newest checkpoint"
        )
    raise ConfigError(
        f"generate {checkpoint}: no config.json there, nor in {checkpoint / 'model'}; give a run directory whose "
        "training has ended, or a folder that save_pretrained wrote"
    )
