"""`train:`, `memory:` and `fp16:`: keys without effect and values that contradict each other are refused."""

from __future__ import annotations

from typing import Any

import pytest
from config_samples import load_variant, refused_by

from longctx.config.train_rules import RULES

FP16 = {"model__dtype": "fp16"}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("warm-up longer than the run", {"train__warmup_steps": 101}, "train.warmup_steps"),
    (
        "kernel of an untiled loss",
        {"memory__loss_tile": "none", "memory__loss_backend": "torch"},
        "memory.loss_backend",
    ),
    ("z-loss of an untiled loss", {"memory__loss_tile": "none", "memory__z_loss": 1e-4}, "memory.z_loss"),
    ("checkpoints of nothing", {"memory__offload_checkpoints": True}, "memory.offload_checkpoints"),
    ("betas", {"train__betas": [0.9, 1.0]}, "train.betas"),
    ("momentum of adamw", {"train__momentum": 0.9}, "train.momentum"),
    ("eps of sgd", {"train__optimizer": "sgd", "train__eps": 1e-6}, "train.eps"),
    ("end of a constant schedule", {"train__schedule": "constant", "train__min_lr_ratio": 0.5}, "train.min_lr_ratio"),
    ("a loss scale without fp16", {"fp16__window": 100}, "fp16.window"),
    ("a static scale and a window", {**FP16, "fp16__static_scale": 128, "fp16__window": 9}, "fp16.window"),
    ("a least scale above the first", {**FP16, "fp16__scale_power": 4, "fp16__min_scale": 32}, "fp16.min_scale"),
    ("hysteresis at stage 0", {**FP16, "zero__stage": 0, "fp16__hysteresis": 4}, "fp16.hysteresis"),
]


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_broken_rules_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(RULES, changes)


def test_legal_ones_pass() -> None:
    load_variant(train__warmup_steps=100, train__betas=[0.0, 0.999], memory__z_loss=1e-4)
    load_variant(train__optimizer="sgd", train__momentum=0.9)
    load_variant(**FP16, fp16__scale_power=5, fp16__min_scale=32, fp16__hysteresis=4)
