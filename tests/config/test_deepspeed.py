"""Our sections become DeepSpeed's dictionary; the raw block is merged in."""

from __future__ import annotations

from config_samples import load_variant

from longctx.config.deepspeed import OWNED, REFUSED, to_deepspeed
from longctx.config.derived import derive
from longctx.config.keys import leaves
from longctx.engine.settings import load_settings
from longctx.mesh import Mesh


def test_the_dictionary():
    config = load_variant(model__dtype="bf16", zero__offload_optimizer="cpu", train__global_batch=8).config
    assert to_deepspeed(config) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "offload_optimizer": {"device": "cpu"},
        },
    }


def test_fp16_and_its_loss_scale():
    settings = to_deepspeed(load_variant(model__dtype="fp16", fp16__window=50, fp16__min_scale=4).config)
    assert "bf16" not in settings and settings["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 50,
        "hysteresis": 2,
        "min_loss_scale": 4,
    }
    static = to_deepspeed(load_variant(model__dtype="fp16", fp16__static_scale=128).config)
    assert static["fp16"]["loss_scale"] == 128


def test_parameters_in_host_memory():
    settings = to_deepspeed(load_variant(zero__stage=3, zero__offload_parameters="cpu").config)
    assert settings["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_a_copy_of_the_weights():
    settings = to_deepspeed(load_variant(zero__stage=3, zero__group=2).config)
    assert settings["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert "zero_hpz_partition_size" not in to_deepspeed(load_variant(zero__stage=3).config)["zero_optimization"]


def test_stage_0_and_no_clipping():
    settings = to_deepspeed(load_variant(zero__stage=0, train__clip=None).config)
    assert (
        settings["zero_optimization"] == {"stage": 0}
        and settings["gradient_clipping"] == 0.0
        and "bf16" not in settings
    )


def test_the_raw_block_is_merged_and_left_alone():
    config = load_variant(
        deepspeed__zero_optimization={"reduce_bucket_size": 1000}, deepspeed__wall_clock_breakdown=True
    ).config
    settings = to_deepspeed(config)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000 and settings["zero_optimization"]["stage"] == 2
    assert settings["wall_clock_breakdown"] is True
    settings["zero_optimization"]["reduce_bucket_size"] = 5
    assert config.deepspeed["zero_optimization"]["reduce_bucket_size"] == 1000


def test_the_engine_accepts_it():
    for stage in range(4):
        config = load_variant(zero__stage=stage).config
        size = derive(config)
        mesh = Mesh(size.ring, size.ulysses, size.data, world_size=size.world, rank=0)
        settings = load_settings(to_deepspeed(config, size), mesh)
        assert settings["train_batch_size"] == size.global_batch


def test_what_we_own_is_owned_by_a_key_that_exists():
    assert set(OWNED.values()) <= set(leaves()) and not set(OWNED) & set(REFUSED)
