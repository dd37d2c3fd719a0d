"""Registering makes transformers find attention and mask under one name, and refuses an old transformers."""

from __future__ import annotations

import sys

import pytest
from transformers import AttentionInterface, AttentionMaskInterface

from longctx.errors import MissingPackageError
from longctx.models.hook.attention import longctx_attention
from longctx.models.hook.masks import document_ids_as_mask
from longctx.models.names import NAME
from longctx.models.register import OLDEST, register


def test_attention_and_mask_are_found_under_one_name() -> None:
    register()
    register()
    assert AttentionInterface()[NAME] is longctx_attention
    assert AttentionMaskInterface()[NAME] is document_ids_as_mask


def test_an_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.2.1")
    with pytest.raises(MissingPackageError, match=rf"5\.2\.1 is too old.*>={OLDEST[0]}\.{OLDEST[1]}"):
        register()
