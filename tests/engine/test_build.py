"""longctx.build: the same weights whole and partitioned, random and pretrained, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tiny import run_ranks, tiny_llama

from longctx.errors import LongctxError

from tolerances import tolerance


def built(rank: int, world: int, ring: int, stage: int, folder: str | None) -> dict[str, Any]:
    import deepspeed

    import longctx

    mesh = longctx.Mesh(ring=ring)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model = longctx.build(folder or tiny_llama().config, mesh, config=settings, seed=3)
    elements = {name: p.numel() for name, p in model.named_parameters()}  # 0 where partitioned
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    implementation = model.config._attn_implementation
    return {"weights": weights, "elements": elements, "attention": implementation}


def test_random_weights_do_not_depend_on_stage_or_ranks() -> None:
    whole = run_ranks(1, built, 1, 0, None)[0]
    assert whole["attention"] == "longctx"
    for world, ring, stage in ((2, 2, 0), (2, 2, 3), (4, 2, 3)):
        for result in run_ranks(world, built, ring, stage, None):
            assert result["attention"] == "longctx"
            assert not any(result["elements"].values()) or stage < 3
            for name, weight in whole["weights"].items():
                assert torch.equal(result["weights"][name], weight), name


def test_a_pretrained_folder_is_loaded_partitioned(tmp_path: Path) -> None:
    model = tiny_llama(seed=5)
    model.save_pretrained(tmp_path)
    for world, ring, stage in ((2, 2, 0), (2, 2, 3)):
        for result in run_ranks(world, built, ring, stage, str(tmp_path)):
            assert not any(result["elements"].values()) or stage < 3
            for name, weight in model.named_parameters():
                assert torch.equal(result["weights"][name], weight), name


def trained(rank: int, world: int, stage: int) -> tuple[float, list[float]]:
    """Build partitioned, train a few steps: the loss has to fall, on every rank alike."""
    from engine_tiny import make_optimizer, ragged_rows

    import longctx

    mesh = longctx.Mesh(ring=2)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 0},
    }
    model = longctx.build(tiny_llama().config, mesh, config=settings, seed=3)
    engine, *_ = longctx.initialize(model, settings, mesh, optimizer=make_optimizer("sgd", model.parameters()))
    losses = []
    for _ in range(4):
        batch = engine.shard(ragged_rows(0, 0, mesh.data_rank))
        engine.backward(engine(**batch).loss)
        engine.step()
        losses.append(engine.global_loss)
    engine.destroy()
    return engine.grad_norm, losses


def test_a_model_built_partitioned_trains_like_one_built_whole() -> None:
    partitioned, whole = run_ranks(4, trained, 3)[0], run_ranks(4, trained, 0)[0]
    assert partitioned[1][-1] < partitioned[1][0]
    torch.testing.assert_close(torch.tensor(partitioned[1]), torch.tensor(whole[1]), rtol=1e-5, atol=0)


def touched(rank: int, world: int, what: str, folder: str) -> dict[str, Any]:
    """Change a partitioned model, train a step, and save what came out."""
    import deepspeed
    from engine_tiny import make_optimizer, ragged_rows, run_window

    import longctx
    from longctx.errors import EngineError, ModelError

    mesh = longctx.Mesh(ring=world)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3 if world > 1 else 0, "stage3_param_persistence_threshold": 0},
    }
    model, messages = longctx.build(tiny_llama().config, mesh, config=settings, seed=3), []
    torch.manual_seed(3 + rank)  # ranks agree all the same: rank 0's new rows count
    if world > 1:
        for action in (lambda: model.save_pretrained(folder), lambda: resize_gathered(model)):
            try:
                action()
            except (EngineError, ModelError) as error:
                messages.append(str(error))
    if what == "resize":
        model.resize_token_embeddings(70)
    else:
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model = adapted(model, what)
    optimizer = make_optimizer("sgd", [p for p in model.parameters() if p.requires_grad])
    engine = longctx.initialize(model, settings, mesh, optimizer=optimizer)[0]
    rows = ragged_rows(0, 0, 0)
    if what == "resize":
        rows["input_ids"], rows["labels"] = rows["input_ids"] + 9, rows["labels"] + 9 * (rows["labels"] >= 0)
    run_window(engine, [rows])
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    result = {"loss": engine.global_loss, "weights": weights, "messages": messages}
    engine.destroy()
    return result


def resize_gathered(model: Any) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.resize_token_embeddings(70)


def adapted(model: Any, what: str) -> Any:
    import peft

    more = {"dora": {"use_dora": True}, "tokens": {"trainable_token_indices": [1, 7]}, "pissa": {}}[what]
    start = {"init_lora_weights": "pissa"} if what == "pissa" else {}
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], **more, **start}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


SLOW = [pytest.param(kind, marks=pytest.mark.deep) for kind in ("tokens", "pissa")]


@pytest.mark.parametrize("what", [pytest.param("resize", marks=pytest.mark.deep), "dora", *SLOW])
def test_weights_touched_after_they_were_partitioned(what: str, tmp_path: Path) -> None:
    (whole,) = run_ranks(1, touched, what, str(tmp_path))
    for result in run_ranks(2, touched, what, str(tmp_path)):
        torch.testing.assert_close(result["loss"], whole["loss"], rtol=tolerance("training loss"), atol=0)
        assert result["weights"].keys() == whole["weights"].keys()
        for name, weight in whole["weights"].items():
            assert result["weights"][name].shape == weight.shape, name
            assert (result["weights"][name] - weight).norm() <= tolerance("training weight") * weight.norm(), name
        stock, gathered = result["messages"]
        assert "engine.save_pretrained(folder)" in stock and "outside of deepspeed.zero.GatheredParameters" in gathered


def broken(rank: int, world: int, folder: str) -> str:
    import longctx
    from longctx.errors import ModelError

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with pytest.raises(ModelError) as error:
        longctx.build(folder, longctx.Mesh(ring=world), config=settings)
    return str(error.value)


def test_what_one_rank_cannot_read_stops_every_rank(tmp_path: Path) -> None:
    """Under ZeRO-3 rank 0 alone sees a weight of another shape."""
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(40)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader, other = run_ranks(2, broken, str(tmp_path))
    assert "size mismatch for model.norm.weight" in reader and "ranks [0] could not read" in other


def apart(rank: int, world: int) -> list[str]:
    """Rank 1 alone is given another depth, another seed, or a folder that is not there."""
    import longctx

    messages = []
    for given in ({"num_hidden_layers": 1}, {"seed": 4}, {"folder": "nowhere"}):
        more = given if rank == 1 else {}
        config = tiny_llama().config
        config.num_hidden_layers = more.get("num_hidden_layers", 2)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        with pytest.raises(LongctxError) as error:
            longctx.build(more.get("folder", config), longctx.Mesh(), config=settings, seed=more.get("seed", 3))
        messages.append(str(error.value))
    return messages


def test_ranks_that_build_different_models_are_stopped() -> None:
    for layers, seed, folder in run_ranks(2, apart):
        assert "model.config.num_hidden_layers: 2 on rank 0, 1 on rank 1" in layers
        assert "seed: 3 on rank 0, 4 on rank 1" in seed and "nowhere" in folder
