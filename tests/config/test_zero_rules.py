"""`zero:` and the raw `deepspeed:` block: every illegal cell of the support matrix is refused, the legal ones pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from config_samples import load_variant, problems_of, refused_by, text_of, variant

from longctx.config.zero_rules import RULES

NVME = {"zero__stage": 3, "zero__offload_optimizer": "nvme", "zero__nvme_folder": "/tmp"}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("offload at stage 0", {"zero__stage": 0, "zero__offload_optimizer": "cpu"}, "zero.offload_optimizer"),
    ("parameters at stage 2", {"zero__stage": 2, "zero__offload_parameters": "cpu"}, "zero.offload_parameters"),
    ("group at stage 2", {"zero__group": 2}, "zero.group"),
    ("nvme without a folder", {"zero__offload_optimizer": "nvme"}, "zero.nvme_folder"),
    ("nvme at stage 2", {**NVME, "zero__stage": 2}, "zero.offload_optimizer"),
    ("nvme at stage 0", {**NVME, "zero__stage": 0}, "zero.offload_optimizer"),
    ("nvme with sgd", {**NVME, "train__optimizer": "sgd"}, "zero.offload_optimizer"),
    ("a swap folder for nothing", {"zero__nvme_folder": "/tmp"}, "zero.nvme_folder"),
    ("overlap at stage 0", {"zero__stage": 0, "zero__overlap_comm": True}, "zero.overlap_comm"),
    ("all-reduce at stage 0", {"zero__stage": 0, "zero__reduce_scatter": False}, "zero.reduce_scatter"),
    ("batch in deepspeed", {"deepspeed__train_batch_size": 4}, "deepspeed.train_batch_size"),
    ("stage in deepspeed", {"deepspeed__zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage"),
    ("optimizer in deepspeed", {"deepspeed__optimizer": {"type": "Adam"}}, "deepspeed.optimizer"),
    ("bf16 in deepspeed", {"deepspeed__bf16": {"enabled": True}}, "deepspeed.bf16"),
    ("fp16 in deepspeed", {"deepspeed__fp16": {"enabled": True}}, "deepspeed.fp16"),
    (
        "nvme",
        {"deepspeed__zero_optimization": {"offload_param": {"device": "nvme"}}},
        "deepspeed.zero_optimization.offload_param",
    ),
    (
        "hierarchical sharding",
        {"deepspeed__zero_optimization": {"zero_hpz_partition_size": 2}},
        "deepspeed.zero_optimization.zero_hpz_partition_size",
    ),
    (
        "MiCS",
        {"deepspeed__zero_optimization": {"mics_shard_size": 2}},
        "deepspeed.zero_optimization.mics_shard_size",
    ),
    ("sequence size in deepspeed", {"deepspeed__sequence_parallel_size": 2}, "deepspeed.sequence_parallel_size"),
    (
        "auto in deepspeed",
        {"deepspeed__zero_optimization": {"reduce_bucket_size": "auto"}},
        "deepspeed.zero_optimization.reduce_bucket_size",
    ),
    ("misspelt deepspeed", {"deepspeed__wall_clock_breakdwon": True}, "deepspeed.wall_clock_breakdwon"),
    ("curriculum", {"deepspeed__curriculum_learning": {"enabled": True}}, "deepspeed.curriculum_learning"),
    ("predivide", {"deepspeed__gradient_predivide_factor": 2.0}, "deepspeed.gradient_predivide_factor"),
]


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_broken_rules_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert key in refused_by(RULES, changes)


def test_the_matrix_of_stage_offload_overlap_scatter_and_dtype() -> None:
    legal = illegal = 0
    cells = itertools.product((0, 1, 2, 3), ("none", "cpu"), (False, True), (False, True), ("fp32", "bf16"))
    for stage, offload, overlap, scatter, dtype in cells:
        changes = {
            "zero__stage": stage,
            "zero__offload_optimizer": offload,
            "zero__overlap_comm": overlap,
            "zero__reduce_scatter": scatter,
            "model__dtype": dtype,
        }
        if stage == 0 and (offload == "cpu" or overlap or not scatter):
            assert {p.code for p in problems_of(text_of(variant(**changes))).problems} == {"zero-stage"}
            illegal += 1
        else:
            load_variant(**changes)
            legal += 1
    assert (legal, illegal) == (50, 14)
