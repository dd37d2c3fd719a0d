"""initialize compares what ranks were given before the first step, and says what DeepSpeed does unasked."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from engine_tiny import make_optimizer, run_ranks, tiny_llama

from longctx.errors import EngineError

FAULTS: dict[str, tuple[dict[str, Any], str]] = {  # what rank 1 alone is given, and what every rank must say
    "clip": ({"gradient_clipping": 0.5}, r"config\.gradient_clipping: 0\.0 on rank 0, 0\.5 on rank 1"),
    "stage": ({"zero_optimization": {"stage": 2}}, r"config\.zero_optimization\.stage: 1 on rank 0, 2 on rank 1"),
    "accumulation": ({"gradient_accumulation_steps": 2}, r"config\.gradient_accumulation_steps: 1 on rank 0, 2"),
    "misspelt": ({"gradient_cliping": 0.5}, "gradient_cliping"),
    "layout": ({"layout": "striped"}, "layout: zigzag on rank 0, striped on rank 1"),
    "seed": ({"seed_": 7}, "seed: 0 on rank 0, 7 on rank 1"),
    "lr": ({"lr": 0.2}, r"optimizer\.param_groups\[0\]\.lr: 0\.1 on rank 0, 0\.2 on rank 1"),
    "layers": ({"layers": 1}, r"model\.config\.num_hidden_layers: 2 on rank 0, 1 on rank 1"),
    "attention dropout": ({"dropout": 0.5}, r"model\.config\.attention_dropout: 0\.0 on rank 0, 0\.5 on rank 1"),
    "no model": ({"model": None}, "initialize needs a model"),
}


def disagreed(rank: int, world: int) -> dict[str, str]:
    import longctx

    messages = {}
    for name, (given, _) in FAULTS.items():
        more = dict(given) if rank == 1 else {}
        model = tiny_llama(num_hidden_layers=more.pop("layers", 2), attention_dropout=more.pop("dropout", 0.0))
        optimizer = make_optimizer("sgd", model.parameters())
        optimizer.param_groups[0]["lr"] = more.pop("lr", 0.1)
        options = {"layout": more.pop("layout", "zigzag"), "seed": more.pop("seed_", 0)}
        model = more.pop("model", model)
        settings = {
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000}, "steps_per_print": 1 + rank, **more,
        }  # fmt: skip
        with pytest.raises(EngineError) as error:
            longctx.initialize(model, settings, longctx.Mesh(ring=2), optimizer=optimizer, **options)
        messages[name] = str(error.value)
    return messages


def test_ranks_that_were_given_different_things_are_stopped_and_the_key_is_named() -> None:
    for messages in run_ranks(2, disagreed):
        for name, (_, said) in FAULTS.items():
            assert re.search(said, messages[name]), (name, messages[name])


def announced(rank: int, world: int) -> list[str]:
    import longctx

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("longctx.engine.initialize")
    logger.addHandler(handler)
    for settings in ({}, {"gradient_clipping": 0.0}):
        model = tiny_llama(num_hidden_layers=1)
        optimizer = make_optimizer("sgd", model.parameters())
        longctx.initialize(model, settings, longctx.Mesh(), optimizer=optimizer)[0].destroy()
    logger.removeHandler(handler)
    return said


def test_the_default_clipping_of_deepspeed_is_announced() -> None:
    (said,) = run_ranks(1, announced)
    assert len(said) == 1 and "default of 1" in said[0] and "gradient_clipping" in said[0]
