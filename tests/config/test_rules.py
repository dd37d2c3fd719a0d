"""Cross-field rules: every illegal cell of the support matrix is refused by its key, the legal ones pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from config_samples import BASE, load_variant, problems_of, text_of, variant

from longctx.config.derived import derive
from longctx.config.load import loads

FROM_FOLDER: dict[str, Any] = {f"model__{key}": ... for key in BASE["model"] if key != "dtype"}
FROM_FOLDER |= {"data__tokenizer": ..., "data__vocab_size": ...}

NVME = {"zero__stage": 3, "zero__offload_optimizer": "nvme", "zero__nvme_folder": "/tmp"}
FP16 = {"model__dtype": "fp16"}
ILLEGAL: list[tuple[str, dict[str, Any], str]] = [
    ("no model", {f"model__{key}": ... for key in BASE["model"]}, "model"),
    ("folder and sizes", {"model__pretrained": "m"}, "model.hidden_size"),
    ("heads do not divide hidden", {"model__heads": 5, "model__kv_heads": 5}, "model.heads"),
    ("kv heads do not divide heads", {"model__kv_heads": 3}, "model.kv_heads"),
    ("odd head", {"model__head_dim": 15}, "model.head_dim"),
    ("gpt2 with grouped heads", {"model__architecture": "gpt2"}, "model.kv_heads"),
    ("olmo with free heads", {"model__architecture": "olmo", "model__head_dim": 32}, "model.head_dim"),
    ("architecture that goes around the hook", {"model__architecture": "bloom"}, "model.architecture"),
    ("vocabulary below tokenizer", {"model__vocab_size": 1000}, "model.vocab_size"),
    (
        "bytes vocabulary",
        {"data__tokenizer": "bytes", "data__vocab_size": ..., "model__vocab_size": 256},
        "model.vocab_size",
    ),
    ("positions below length", {"model__max_positions": 1024}, "model.max_positions"),
    ("own keyword in extra", {"model__extra": {"hidden_size": 3}}, "model.extra.hidden_size"),
    ("remote code in extra", {"model__extra": {"auto_map": {"a": "b"}}}, "model.extra.auto_map"),
    ("attention in extra", {"model__extra": {"_attn_implementation": "x"}}, "model.extra._attn_implementation"),
    ("grid is not the world", {"mesh__world": 8}, "mesh.ring"),
    ("ring does not divide", {"mesh__ring": 3, "mesh__data": "auto"}, "mesh.ring"),
    ("ulysses above heads", {"mesh__ulysses": 16, "mesh__ring": 1, "mesh__data": 1, "mesh__world": 16}, "mesh.ulysses"),
    ("ulysses of memories", {"mesh__ulysses": 2, "mesh__data": 1, "attention__layers": {"0": "abc"}}, "mesh.ulysses"),
    ("zigzag ring too large", {"data__sequence_length": 3}, "data.sequence_length"),
    (
        "ring too large",
        {"data__sequence_length": 2, "mesh__ring": 4, "mesh__data": 1, "attention__layout": "striped"},
        "data.sequence_length",
    ),
    ("window without one", {"attention__window": 64}, "attention.window"),
    ("window as long", {"attention__window": 4096, "model__architecture": "mistral"}, "attention.window"),
    ("a layer too many", {"attention__layers": {"0-90": "abc"}}, "attention.layers"),
    ("unknown kind of layer", {"attention__layers": {"0": "abd"}}, "attention.layers"),
    ("unknown option of a layer", {"attention__layers": {"0": {"abc": {"slot": 3}}}}, "attention.layers"),
    ("layers of gemma", {"attention__layers": {"0": "abc"}, "model__architecture": "gemma"}, "attention.layers"),
    ("striped memory", {"attention__layers": {"0": "abc"}, "attention__layout": "striped"}, "attention.layout"),
    ("future", {"attention__layers": {"0": {"abc": {"normalizer": "global"}}}}, "attention.layers"),
    (
        "linformer too short",
        {"attention__layers": {"*": {"abc": {"control": "linformer", "max_length": 9}}}},
        "attention.layers",
    ),
    ("window of a folder", {**FROM_FOLDER, "model__pretrained": "m", "attention__window": 64}, "attention.window"),
    ("batch not a multiple", {"train__global_batch": 5}, "train.global_batch"),
    ("batch below replicas", {"train__global_batch": 1}, "train.global_batch"),
    ("micro batch above", {"train__micro_batch": 4}, "train.global_batch"),
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
    ("evaluation of nothing", {"data__held_out": 0}, "train.eval_every"),
    ("vocabulary of bytes", {"data__tokenizer": "bytes"}, "data.vocab_size"),
    ("url", {"data__sources": ["https://user:hunter2@example.com/x"]}, "data.sources"),
    ("offload at stage 0", {"zero__stage": 0, "zero__offload_optimizer": "cpu"}, "zero.offload_optimizer"),
    ("parameters at stage 2", {"zero__stage": 2, "zero__offload_parameters": "cpu"}, "zero.offload_parameters"),
    ("group at stage 2", {"zero__group": 2}, "zero.group"),
    ("group that does not divide the world", {"zero__stage": 3, "zero__group": 3}, "zero.group"),
    ("group of the whole world", {"zero__stage": 3, "zero__group": 4}, "zero.group"),
    ("group of one", {"zero__stage": 3, "zero__group": 1}, "zero.group"),
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
    ("a loss scale without fp16", {"fp16__window": 100}, "fp16.window"),
    ("a static scale and a window", {**FP16, "fp16__static_scale": 128, "fp16__window": 9}, "fp16.window"),
    ("a least scale above the first", {**FP16, "fp16__scale_power": 4, "fp16__min_scale": 32}, "fp16.min_scale"),
    ("hysteresis at stage 0", {**FP16, "zero__stage": 0, "fp16__hysteresis": 4}, "fp16.hysteresis"),
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


@pytest.mark.parametrize(("changes", "key"), [case[1:] for case in ILLEGAL], ids=[case[0] for case in ILLEGAL])
def test_illegal_cells_are_refused_by_name(changes: dict[str, Any], key: str):
    error = problems_of(text_of(variant(**changes)))
    assert key in [problem.key for problem in error.problems], str(error)
    assert all(len(str(problem)) < 400 for problem in error.problems)


def test_the_matrix_of_stage_offload_overlap_scatter_and_dtype():
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


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "olmo", "olmo2"]
)
def test_every_architecture_with_grouped_heads_passes(architecture: str):
    assert load_variant(model__architecture=architecture).config.model.architecture == architecture


def test_writing_a_default_out_is_never_a_mistake():
    load_variant(train__momentum=0.0, zero__stage=0, zero__overlap_comm=False, zero__reduce_scatter=True)


@pytest.mark.parametrize(
    ("ring", "data", "world", "default", "grid"),
    [
        ("auto", "auto", "auto", 2, (2, 1)),
        ("auto", "auto", "auto", 8, (8, 1)),
        (4, "auto", "auto", 2, (4, 1)),
        (2, "auto", "auto", 8, (2, 4)),
        ("auto", 2, "auto", 8, (4, 2)),
        ("auto", 3, "auto", 2, (1, 3)),
        (2, 2, "auto", 2, (2, 2)),
        (1, "auto", 4, 2, (1, 4)),
        (64, 1, "auto", 2, (64, 1)),
    ],
)
def test_auto_fills_the_mesh(ring: Any, data: Any, world: Any, default: int, grid: tuple[int, int]):
    from longctx.config.derived import world_size

    text = text_of(variant(mesh__ring=ring, mesh__data=data, mesh__world=world, train__global_batch=...))
    config = loads(text, default_world=default).config
    size = derive(config, world_size(config, default))
    assert (size.ring, size.data) == grid and size.world == size.ring * size.data


@pytest.mark.parametrize(
    ("mesh", "world", "more", "grid"),
    [
        ({"ring": 2, "ulysses": 2}, 4, {}, (2, 2, 1)),
        ({"ring": "auto", "ulysses": 2}, 8, {}, (4, 2, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 8, {}, (2, 4, 1)),  # 4 key/value heads
        ({"ring": "auto", "ulysses": "auto", "data": 2}, 8, {}, (1, 4, 2)),
        ({"ring": 2, "ulysses": "auto", "data": 2}, 12, {}, (2, 3, 2)),  # what the two leave
        ({"ring": 1, "ulysses": "auto"}, 8, {}, (1, 4, 2)),
        ({"ring": "auto", "ulysses": "auto"}, 6, {}, (3, 2, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 8, {"model__kv_heads": 1}, (8, 1, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 8, {"attention__layers": {"0": "abc"}}, (8, 1, 1)),
        ({"ring": "auto", "ulysses": "auto"}, 16, {"launch__launcher": "slurm"}, (16, 1, 1)),
        (
            {"ring": "auto", "ulysses": "auto"},
            16,
            {"launch__launcher": "slurm", "launch__ranks_per_host": 2},
            (8, 2, 1),
        ),
        (
            {"ring": "auto", "ulysses": "auto"},
            6,
            {"launch__launcher": "openmpi", "launch__hosts": ["a:4", "b:2"]},
            (3, 2, 1),
        ),
    ],
)
def test_auto_exchanges_heads_inside_a_host(mesh: dict, world: int, more: dict, grid: tuple[int, int, int]):
    keys = {f"mesh__{key}": mesh.get(key, ...) for key in ("ring", "ulysses", "data", "world")}
    changes = {"model__heads": 8, "model__kv_heads": 4, "train__global_batch": ..., **keys, **more}
    size = derive(loads(text_of(variant(**changes)), default_world=world).config, world)
    assert (size.ring, size.ulysses, size.data) == grid


def test_heads_of_a_folder_are_read_where_they_can_be(tmp_path):
    changes = {**FROM_FOLDER, "model__pretrained": str(tmp_path), "mesh__ulysses": "auto", "mesh__ring": "auto"}
    changes |= {"mesh__data": ..., "mesh__world": ..., "train__global_batch": ...}
    config = loads(text_of(variant(**changes)), default_world=4).config
    assert derive(config, 4).ulysses == 1
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8, "num_key_value_heads": 2}')
    assert derive(config, 4).ulysses == 2


def test_sizes_follow():
    size = derive(load_variant(train__global_batch=12, data__sequence_length=4097).config)
    assert (size.accumulation, size.global_batch, size.micro_batch) == (6, 12, 1)
    assert (size.padded_length, size.local_length, size.tokens_per_step) == (4100, 2050, 12 * 4097)


def test_the_launcher_decides_the_world(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    problem = problems_of(text_of(BASE)).problems[0]
    assert problem.key == "mesh.world" and "8" in problem.message
    free = variant(mesh__world=..., mesh__data="auto", train__global_batch=8)
    assert derive(loads(text_of(free)).config).data == 4


def test_rules_point_at_the_line():
    text = text_of(variant(train__global_batch=5))
    line = text.splitlines().index("  global_batch: 5") + 1
    problem = problems_of(text).problems[0]
    assert problem.place.line == line and "write 4 or 6" in problem.message
