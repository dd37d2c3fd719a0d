"""The cache that stores a prompt once for its beams, against transformers' own with every row in full."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from longctx.decode.caches.prompt import PromptLayer, SourceLayer, self_attention_cache, use_layers

BEAMS, ROWS = 3, 6
CHANGES = ("beams", "any order", "select", "crop", "crop prompt", "repeat", "update")


def filled(prompt: int = 4, new: int = 2) -> tuple[PromptLayer, DynamicLayer]:
    """The same tokens in our layer and in transformers'."""
    torch.manual_seed(0)
    ours, theirs = PromptLayer(BEAMS), DynamicLayer()
    states = torch.randn(2, 1, prompt, 3).repeat_interleave(BEAMS, 0), torch.randn(2, 1, prompt, 2)
    first = states[0], states[1].repeat_interleave(BEAMS, 0)
    for keys, values in (first, *((torch.randn(ROWS, 1, 1, 3), torch.randn(ROWS, 1, 1, 2)) for _ in range(new))):
        ours.update(keys, values)
        theirs.update(keys, values)
    return ours, theirs


def whole(layer: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of every row."""
    if layer.prompt is None:
        return layer.keys, layer.values
    prompt = (x.repeat_interleave(layer.beams, 0) for x in layer.prompt)
    keys, values = (torch.cat(x, 2) for x in zip(prompt, (layer.keys, layer.values), strict=True))
    return keys, values


def assert_same(ours: PromptLayer, theirs: DynamicLayer) -> None:
    keys, values = whole(ours)
    assert torch.equal(keys, theirs.keys) and torch.equal(values, theirs.values)
    assert ours.get_seq_length() == theirs.get_seq_length()


@settings(max_examples=20)
@given(st.lists(st.sampled_from(CHANGES), max_size=4))
def test_every_change_is_that_of_a_full_cache(changes: list[str]) -> None:
    ours, theirs = filled()
    for change in changes:
        rows = theirs.keys.shape[0]
        order = {
            "beams": torch.arange(rows) // ours.beams * ours.beams,
            "any order": torch.arange(rows).flip(0),
            "select": torch.arange(rows)[::2],
        }.get(change)
        for layer in (ours, theirs):
            if change in ("beams", "any order"):
                layer.reorder_cache(order)
            elif change == "select":
                layer.batch_select_indices(order)
            elif change.startswith("crop"):
                layer.crop(-3 if change == "crop prompt" else -1)
            elif change == "repeat":
                layer.batch_repeat_interleave(2)
            else:
                layer.update(torch.ones(rows, 1, 1, 3), torch.ones(rows, 1, 1, 2))
        if theirs.keys.shape[2] < 2:
            return
        assert_same(ours, theirs)


def test_a_beam_search_keeps_the_prompt_shared() -> None:
    ours, _ = filled(new=1)
    prompt = ours.prompt
    ours.reorder_cache(torch.tensor([1, 1, 0, 5, 3, 3]))
    assert ours.prompt is prompt and ours.nbytes == (2 * 4 + ROWS) * (3 + 2) * 4
    ours.reorder_cache(torch.tensor([3, 1, 0, 5, 3, 3]))  # a row of the other prompt
    assert ours.prompt is None and ours.nbytes == ROWS * (4 + 1) * (3 + 2) * 4


def test_attention_finds_the_prompt_beside_new_keys() -> None:
    ours, _ = filled(new=0)
    keys, _ = ours.update(torch.ones(ROWS, 1, 1, 3), torch.ones(ROWS, 1, 1, 2))
    assert keys.shape[2] == 1 and keys.longctx_prompt is ours.prompt
    assert ours.prompt is not None and ours.prompt[0].shape == (2, 1, 4, 3)


def test_only_an_empty_growing_cache_is_changed() -> None:
    cache = DynamicCache()
    use_layers(cache, [1], PromptLayer, BEAMS)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, PromptLayer] and cache.layers[1].beams == BEAMS
    before = list(cache.layers)
    use_layers(cache, [0, 1], PromptLayer, BEAMS)
    assert cache.layers == before
    encoder_decoder = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert self_attention_cache(encoder_decoder) is encoder_decoder.self_attention_cache
    assert self_attention_cache(cache) is cache


def test_a_source_is_not_reordered() -> None:
    layer = SourceLayer()
    layer.update(torch.arange(2.0).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.keys.flatten().tolist() == [0, 1]
