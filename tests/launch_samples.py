"""What tests of the launcher share: a small configuration, a job spec, and strings that a shell would obey."""

from __future__ import annotations

import random
from pathlib import Path

from longctx.config.load import loads
from longctx.config.schema import RunConfig
from longctx.launch.cluster import jobspec
from longctx.launch.cluster.hosts import default_world

BASE = """
model: {architecture: llama, hidden_size: 32, layers: 2, heads: 2}
data: {sources: python-stdlib, tokenizer: bytes, sequence_length: 256}
train: {steps: 2}
output: {folder: runs/none}
"""
HOSTILE = tuple(
    "$(touch pwned)|`touch pwned`|; touch pwned|'; touch pwned; '|\"$(touch pwned)\"|a\nb|%h %n|&& touch pwned|> pwned|"
    "*|~|$HOME|\\|!!|#x| ||-oProxyCommand=x|a'b\"c|{a,b}|\u2028|é|\udcff|--|${IFS}|\t|^x^y|=x".split("|")
) + ("| touch pwned",)

CANARIES = {f"SECRET_{number:02d}": f"c4n4ry-{number:02d}-hf_sk-ghp_AKIA" for number in range(40)}


def hostile(count: int) -> list[str]:
    """Return ``count`` different strings that a shell would obey, combined from those above, the same on every call."""
    pieces, draw = [*HOSTILE, "a", "pwned", "node1"], random.Random(0)
    found = dict.fromkeys(HOSTILE)
    while len(found) < count:
        found["".join(draw.choices(pieces, k=draw.randint(1, 6)))] = None
    return list(found)


def repeats_a_canary(text: str) -> bool:
    """Say whether one of the 40 secrets is in ``text``."""
    return any(secret in text for secret in CANARIES.values())


def config(launch: str, *overrides: str) -> RunConfig:
    """Return a configuration with this `launch` section."""
    return loads(f"{BASE}launch: {launch}\n", overrides, default_world=default_world).config


def make_spec(folder: Path, **changes: object) -> jobspec.JobSpec:
    """Return a job spec for three ranks on two hosts."""
    values = {
        "address": "127.0.0.1",
        "port": 1,
        "token": "t",
        "hosts": (("a", 2), ("b", 1)),
        "folder": str(folder),
        "output": str(folder),
        "config": str(folder / "config.yaml"),
        "config_sha256": "",
        "environment": {},
        "interface": "auto",
        "python": "python",
        "python_path": "",
        "silence_seconds": 5,
        "columns": 0,
        "command": ("true",),
    }
    return jobspec.JobSpec(**(values | changes))  # type: ignore[arg-type]
