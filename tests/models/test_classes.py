"""Which folders hold a causal language model is known from transformers' tables without importing transformers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from transformers.models.auto import modeling_auto

from longctx.errors import ModelError
from longctx.models.load.classes import require_causal, tables


def test_the_tables_are_those_of_the_installed_transformers() -> None:
    found = tables()
    for task in ("MODEL_FOR_CAUSAL_LM", "MODEL", "MODEL_FOR_MASKED_LM", "MODEL_FOR_SEQUENCE_CLASSIFICATION"):
        theirs = getattr(modeling_auto, f"{task}_MAPPING_NAMES")
        expected = {
            kind: (names,) if isinstance(names, str) else tuple(filter(None, names)) for kind, names in theirs.items()
        }
        assert found[task] == expected


def test_reading_the_tables_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from longctx.models.load.classes import tables; assert tables(); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        (
            {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True},
            "BartForConditionalGeneration, an encoder-decoder",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassif"),
        ({"model_type": "gemma", "architectures": ["GemmaForTokenClassification"]}, "GemmaForCausalLM"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "both sides of a token"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"], "is_decoder": True}, "BertForMaskedLM, not"),
        ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"]}, '"is_decoder": true'),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "images or sound"),
        ({"model_type": "qwen2_vl", "text_config": {}, "vision_config": {}}, "no causal language model"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "WhisperForCond"),
        ({"model_type": "vit"}, "no causal language model of type 'vit'"),
        ({}, "no model_type"),
    ],
)
def test_other_models_are_refused_by_the_name_of_their_class(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        require_causal(settings, "folder")


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama"},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gpt2", "architectures": ["GPT2Model"]},  # the same weights, and the output layer is tied
        {"model_type": "bart", "architectures": ["BartForCausalLM"], "is_encoder_decoder": False},
        {"model_type": "roberta", "architectures": ["RobertaForCausalLM"], "is_decoder": True},
        {"model_type": "longctx_llama", "architectures": ["MixedLlamaForCausalLM"]},
    ],
)
def test_causal_language_models_pass(settings: dict[str, Any]) -> None:
    require_causal(settings, "folder")
