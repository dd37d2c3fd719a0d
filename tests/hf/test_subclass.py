"""longctx.hf.ring makes a subclass of a Trainer class, or refuses a class that would be wrong on a shard."""

from __future__ import annotations

from typing import Any

import pytest

from longctx.errors import EngineError


def test_classes_that_would_be_wrong() -> None:
    import transformers

    from longctx.hf import ring

    class Own(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **keywords: Any) -> Any:
            return 0

    with pytest.raises(EngineError, match="Own has a compute_loss of its own"):
        ring(Own)
    Own.ring_loss = True  # type: ignore[attr-defined]
    assert ring.__wrapped__(Own).__name__ == "RingOwn"
    with pytest.raises(EngineError, match="Seq2SeqTrainer has a prediction_step of its own.*not supported"):
        ring(transformers.Seq2SeqTrainer)
    with pytest.raises(EngineError, match="give a subclass of transformers.Trainer"):
        ring(int)
    trainer = ring(transformers.Trainer)
    assert ring(trainer) is trainer and ring(transformers.Trainer) is trainer


def test_trl_classes_that_would_be_wrong() -> None:
    import trl

    from longctx.hf import ring

    for name in ("GRPOTrainer", "RewardTrainer", "KTOTrainer"):
        with pytest.raises(EngineError, match=f"{name} has a .* of its own.*not supported"):
            ring(getattr(trl, name))


def test_ring_is_the_function_whatever_was_loaded_before() -> None:
    import longctx

    assert longctx.hf.SFTTrainer.__name__ == "RingSFTTrainer"
    assert callable(longctx.hf.ring) and longctx.hf.Trainer is not None
    with pytest.raises(AttributeError, match="has no attribute 'rings'; it has SFTTrainer, Trainer, ring"):
        _ = longctx.hf.rings
