"""Generation with a cache that does not grow: equal to the forward without one, for every way of choosing tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.mixed import ALL, HYBRID, MIXED, mixed_model, random_tokens

from longctx.decode.caches.size import cache_bytes
from longctx.decode.caches.state import StateLayer
from longctx.errors import ModelError

from tolerances import tolerance

BOUNDED: dict[str, Any] = {"0": {"abc": {"slots": 5}}, "1": {"window": 6}, "2-3": "cosine"}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 4},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}


def generate(model: Any, prompts: torch.Tensor, mask: torch.Tensor, cache: bool, new: int = 12, **way: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(
        prompts, attention_mask=mask, max_new_tokens=new, use_cache=cache, pad_token_id=0, eos_token_id=63,
        return_dict_in_generate=True, **way,
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [HYBRID, BOUNDED], ids=["hybrid", "bounded"])
def test_left_padded_batches_equal_the_forward_without_a_cache(layers: dict[str, Any], way: str) -> None:
    model = mixed_model("llama", layers, 4)
    prompts = random_tokens(3, 9)
    mask = torch.ones_like(prompts)
    for row, padding in enumerate((0, 4, 7)):
        mask[row, :padding] = 0
    prompts = prompts * mask
    with_cache = generate(model, prompts, mask, True, **WAYS[way]).sequences
    assert torch.equal(with_cache, generate(model, prompts, mask, False, **WAYS[way]).sequences)
    if way == "greedy":  # padding changes nothing
        for row, padding in enumerate((0, 4, 7)):
            alone = generate(model, prompts[row : row + 1, padding:], mask[row : row + 1, padding:], True, **WAYS[way])
            length = alone.sequences.shape[1]
            assert torch.equal(alone.sequences[0], with_cache[row, padding : padding + length])


@pytest.mark.parametrize("name", ALL)
def test_steps_and_chunks_equal_the_teacher_forced_forward(name: str) -> None:
    model, tokens = mixed_model(name, HYBRID, 4), random_tokens(2, 24)
    truth = model(tokens, use_cache=False).logits
    for cuts in ([7, *range(8, 25)], [10, 11, 19, 24]):
        cache, parts, start = None, [], 0
        for end in cuts:
            out = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            parts.append(out.logits)
        assert (torch.cat(parts, 1) - truth).abs().max() <= tolerance("model") * truth.abs().max()
        assert cache is not None and cache.get_seq_length() == 24
        assert [isinstance(layer, StateLayer) for layer in cache.layers] == [True, False, True, True]


def test_a_packed_prompt_goes_on_with_its_last_document() -> None:
    model, tokens = mixed_model("llama", BOUNDED, 4), random_tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    truth = model(tokens, position_ids=positions, use_cache=False).logits
    out = model(tokens[:, :15], position_ids=positions[:, :15], use_cache=True)
    rest = model(tokens[:, 15:], position_ids=positions[:, 15:], past_key_values=out.past_key_values, use_cache=True)
    assert (torch.cat([out.logits, rest.logits], 1) - truth).abs().max() <= tolerance("model")


def test_a_packed_prompt_is_refused_where_exact_layers_cannot_go_on() -> None:
    model, tokens = mixed_model("llama", HYBRID, 4), random_tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    out = model(tokens[:, :15], position_ids=positions[:, :15], use_cache=True)
    with pytest.raises(ModelError, match="packed prompt"):
        model(tokens[:, 15:], position_ids=positions[:, 15:], past_key_values=out.past_key_values, use_cache=True)


def test_a_new_document_restarts_the_state() -> None:
    model, tokens = mixed_model("llama", BOUNDED, 4), random_tokens(1, 20)
    first = model(tokens[:, :8], use_cache=True)
    positions = torch.arange(12)[None]
    second = model(tokens[:, 8:], position_ids=positions, past_key_values=first.past_key_values, use_cache=True)
    alone = model(tokens[:, 8:], use_cache=False).logits
    assert (second.logits - alone).abs().max() <= tolerance("model")


def held(model: Any, prompt: int, new: int) -> int:
    tokens = random_tokens(2, prompt)
    with torch.no_grad():
        done = generate(model, tokens, torch.ones_like(tokens), True, new=new, min_new_tokens=new, do_sample=False)
    assert done.past_key_values.get_seq_length() == prompt + new - 1
    return cache_bytes(done.past_key_values)


def test_the_cache_does_not_grow() -> None:
    model = mixed_model("llama", BOUNDED, 4).float()
    assert held(model, 8, 8) == held(model, 8, 60) == held(model, 90, 8)
    hybrid = mixed_model("llama", HYBRID, 4).float()
    grown = held(hybrid, 8, 60) - held(hybrid, 8, 8)
    assert grown == 52 * 2 * 2 * 2 * 8 * 4, "only the exact layer's keys and values: rows, heads, two of D, fp32"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_cache_is_flat_from_1k_to_64k_tokens() -> None:
    model = mixed_model("llama", {"0": {"abc": {"slots": 8}}, "1": "cosine"}).float()
    model.config.max_position_embeddings = 2**17
    tokens, cache, sizes = random_tokens(1, 1), None, {}
    with torch.no_grad():
        for step in range(1, 65_537):
            out = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            if step in (1024, 8192, 65_536):
                sizes[step] = cache_bytes(cache)
    assert len(sizes) == 3 and len(set(sizes.values())) == 1


def test_documents_of_tokens_whose_positions_nobody_says() -> None:
    layer, keys = StateLayer(), torch.zeros(2, 1, 5, 4)
    for length in (5, 1, 2):
        layer.update(keys[:, :, :length], keys[:, :, :length])
        assert not layer.documents_of(None, None, (2, length)).any()
    valid = torch.tensor([[True, False, True], [False, False, False]])
    layer.update(keys[:, :, :3], keys[:, :, :3])
    assert layer.documents_of(torch.tensor([[8, 1, 9]]), valid, (2, 3)).tolist() == [[0, -1, 0], [-1, -1, -1]]
    layer.update(keys[:, :, :1], keys[:, :, :1])
    assert layer.documents_of(torch.tensor([[10], [0]]), None, (2, 1)).tolist() == [[0], [1]]


def test_what_a_state_cannot_do_is_refused() -> None:
    from transformers import StaticCache

    model, tokens = mixed_model("llama", MIXED), random_tokens(1, 6)
    out = model(tokens, use_cache=True)
    with pytest.raises(ModelError, match="cannot be removed"):
        out.past_key_values.crop(-2)
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ModelError, match="StaticCache|cache that grows"):
        model(tokens, past_key_values=static, use_cache=True)
