"""Sharded generation gives the tokens of transformers' generate() in one process, on rings of one to four."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models.zoo import tiny_config, tiny_model

import longctx
from longctx.decode.sharded import counters
from longctx.errors import ModelError
from longctx.generation.generate import generate, same_everywhere

from distributed import run_ranks

NEW = 9
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 6, "num_return_sequences": 2},
}
# everything that changes what a cached key is worth: windows, caps, sinks, grouped keys, learned and growing positions
NAMES = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt-oss", "qwen3-window"]
EAGER_ONLY = ["gemma2", "gpt-oss"]  # softcaps and sinks are lost in the other


def prompt(length: int, padded: bool) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(5)
    mask = torch.ones(2, length, dtype=torch.int64)
    if padded:
        mask[0, : length // 3] = 0
    return {"input_ids": torch.randint(2, 64, (2, length), generator=make), "attention_mask": mask}


def options(mode: str) -> dict[str, Any]:
    return MODES[mode] | {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 1}


def truth(name: str, mode: str, length: int, padded: bool, **extra: Any) -> torch.Tensor:
    """The same model, whole, with transformers' own attention (eager gives NaN for padded rows in fp64)."""
    model = tiny_model(tiny_config(name, **extra), "eager" if name in EAGER_ONLY else "sdpa").double().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens: torch.Tensor = model.generate(**prompt(length, padded), **options(mode), use_cache=True)
    return tokens


def worker(
    rank: int, world: int, cases: list[dict[str, Any]], ulysses: int = 1
) -> list[tuple[torch.Tensor, bool, int]]:
    mesh = longctx.Mesh(ring=world // ulysses, ulysses=ulysses)
    results = []
    for case in cases:
        model = tiny_model(tiny_config(case["name"], **case.get("extra", {})), "longctx").double()
        counters.reset()
        given = prompt(case["length"], case["padded"])
        tokens = generate(model, mesh=mesh, layout=case.get("layout", "zigzag"), **given, **options(case["mode"]))
        results.append((tokens, same_everywhere(tokens, mesh), counters.bytes))
    return results


def check(world: int, cases: list[dict[str, Any]], ulysses: int = 1) -> list[list[tuple[torch.Tensor, bool, int]]]:
    results = run_ranks(world, worker, cases, ulysses, timeout=240)
    for answers in results:
        for case, (tokens, same, _) in zip(cases, answers, strict=True):
            extra = case.get("extra", {})
            expected = truth(case["name"], case["mode"], case["length"], case["padded"], **extra)
            assert same and torch.equal(tokens, expected), (case, tokens, expected)
    return results


def case(name: str, mode: str = "greedy", length: int = 29, padded: bool = True, **more: Any) -> dict[str, Any]:
    return {"name": name, "mode": mode, "length": length, "padded": padded, **more}


def test_a_context_sharded_by_ulysses() -> None:
    """Only the prompt's pass does all-to-alls; afterwards each rank keeps its own tokens, for any grid."""
    check(2, [case("llama"), case("gemma2", padded=False)], ulysses=2)


def test_every_kind_of_model_on_a_ring_of_two() -> None:
    check(2, [case(name, padded=name not in EAGER_ONLY) for name in NAMES])


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.deep), 4])
def test_every_size_and_mode(world: int) -> None:
    check(world, [case("llama", mode) for mode in MODES] + [case("mistral", "beam", padded=False)])


def test_layouts_and_prompts_shorter_than_the_ring() -> None:
    layouts = [case("llama", layout=layout) for layout in ("contiguous", "striped")]
    check(4, [*layouts, case("llama", length=2, padded=False), case("gpt-oss", length=4, padded=False)])


def test_growing_rotary_frequencies() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    extra = {"rope_scaling": rope, "max_position_embeddings": 16}
    check(2, [case("llama", padded=False, extra=extra)])


def test_a_token_costs_what_the_formula_says() -> None:
    """layers * (ranks - 1) * batch * heads * (head_dim + 1) numbers a token; none of it depends on the context."""
    for length in (8, 64):
        for world in (2, 4):
            ((_, _, received), *_) = check(world, [case("llama", length=length, padded=False)])[0]
            assert received == NEW * 2 * (world - 1) * 2 * 4 * (8 + 1) * 8  # fp64: 8 bytes a number


def held(rank: int, world: int) -> list[int]:
    """Keys held after a generation, by rank: the prompt's part and a fair share of the new ones."""
    mesh = longctx.Mesh(ring=world)
    model = tiny_model(tiny_config("llama"), "longctx")
    out = generate(
        model, mesh=mesh, **prompt(32, False), **options("greedy") | {"max_new_tokens": 9}, return_dict_in_generate=True
    )
    return [layer.prompt[0].shape[2] + layer.keys.shape[2] for layer in out.past_key_values.layers]


def test_ranks_stay_balanced() -> None:
    counts = run_ranks(4, held, timeout=120)
    assert [ours[0] for ours in counts] == [8 + 3, 8 + 2, 8 + 2, 8 + 2] and all(len(set(ours)) == 1 for ours in counts)


def windowed(rank: int, world: int) -> list[tuple[list[int], int]]:
    """(positions held by rank, of a layer with a window and one without, bytes) after prompts of two lengths."""
    mesh, found = longctx.Mesh(ring=world), []
    for length in (40, 80):
        model = tiny_model(tiny_config("qwen3-window"), "longctx")
        out = generate(
            model, mesh=mesh, **prompt(length, True), **options("beam") | {"max_new_tokens": 13, "min_new_tokens": 13},
            return_dict_in_generate=True,
        )  # fmt: skip
        full, near = out.past_key_values.layers
        kept = [layer.prompt[0].shape[2] + layer.keys.shape[2] for layer in (full, near)]
        found.append((kept, near.nbytes))
        with pytest.raises(ModelError, match="sliding window has passed"):
            near.crop(-1)
    return found


def test_keys_behind_a_window_are_dropped() -> None:
    """All ranks together hold the window and no more, whatever the prompt; beams go on sharing what is left of it."""
    results = run_ranks(2, windowed, timeout=120)
    for short, long in results:
        assert short[1] == long[1] and long[0][0] == short[0][0] + 20
    assert sum(result[0][0][1] for result in results) == sum(result[1][0][1] for result in results) == 10


def test_what_cannot_be_is_refused() -> None:
    mesh = longctx.Mesh(ring=1)
    model = tiny_model(tiny_config("llama"), "longctx")
    with pytest.raises(ModelError, match="S >= 1"):
        generate(model, torch.ones(1, 0, dtype=torch.int64), mesh=mesh)
    assert generate(model, torch.ones(1, 1, dtype=torch.int64), mesh=mesh, max_new_tokens=2).shape == (1, 3)
    with pytest.raises(ModelError, match="padding on the left"):
        generate(model, torch.ones(1, 3, dtype=torch.int64), mesh=mesh, attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(ModelError, match="cache_implementation"):
        generate(model, torch.ones(1, 3, dtype=torch.int64), mesh=mesh, cache_implementation="static")
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, pad_token_id=0,
            decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip
    with pytest.raises(ModelError, match="call longctx.enable_el"):
        generate(bart, torch.ones(1, 3, dtype=torch.int64), mesh=longctx.Mesh(ring=2, world_size=2))
