"""Sharded generation from every kind of layer: bounded memories, hybrids, and hidden states (EL)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.mixed import HYBRID, mixed_model
from models.test_el import make
from models.test_generate import MODES, prompt

import longctx
from longctx.decode.caches.size import cache_bytes
from longctx.decode.norm import Norm
from longctx.decode.sharded import counters
from longctx.errors import AttentionError, ModelError
from longctx.generation.generate import generate, same_everywhere

from distributed import run_ranks
from tolerances import tolerance

NEW = 7
EL = ("gpt2", "opt", "bart", "t5", "mt5")
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"0-3": {"window": 6}},
    "abc": {"0-3": {"abc": {"slots": 5}}},
    "cottention": {"0-3": "cosine"},
    "hybrid": HYBRID,
    "running": {"0": {"abc": {"slots": 4, "normalizer": "running"}}, "1-2": {"abc": {"slots": 4, "tied": False}}},
    "queues": {
        "0": {"abc": {"slots": 6, "control": "window"}},
        "2": {"abc": {"slots": 4, "control": "compressive", "rate": 3}},
    },
    "by position": {
        "0-1": {"abc": {"slots": 4, "control": "linformer"}},
        "3": {"abc": {"slots": 4, "control": "random"}},
    },
}


def model_of(case: dict[str, Any]) -> Any:
    if case["kind"] in EL:
        return make(case["kind"], case.get("dtype", torch.float32))
    return mixed_model(case.get("name", "llama"), LAYERS[case["kind"]], 4).to(case.get("dtype", torch.float32))


def options(case: dict[str, Any]) -> dict[str, Any]:
    given = prompt(case.get("length", 27), case.get("padded", True))
    return given | MODES[case["mode"]] | {
        "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def truth(case: dict[str, Any]) -> torch.Tensor:
    """One process, keys and values or a bounded state, transformers' own generate()."""
    model = model_of(case)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.get("seed", 0))
        tokens: torch.Tensor = model.generate(**options(case), use_cache=True)
    return tokens


def worker(rank: int, world: int, cases: list[dict[str, Any]]) -> list[tuple[torch.Tensor, bool, int, int]]:
    """(tokens, whether all ranks have them, bytes received in merges, bytes of the cache) of each case."""
    mesh = longctx.Mesh(ring=world, world_size=world)
    results = []
    for case in cases:
        model = model_of(case)
        if case["kind"] in EL:
            longctx.enable_el(model, causal=case.get("causal", True))
        counters.reset()
        out = generate(
            model, mesh=mesh, layout=case.get("layout", "zigzag"), seed=case.get("seed", 0), **options(case),
            return_dict_in_generate=True,
        )  # fmt: skip
        same = same_everywhere(out.sequences, mesh)
        results.append((out.sequences, same, counters.bytes, cache_bytes(out.past_key_values)))
    return results


def check(world: int, cases: list[dict[str, Any]]) -> list[list[tuple[torch.Tensor, bool, int, int]]]:
    results = run_ranks(world, worker, cases, timeout=240)
    expected = [truth(case) for case in cases]
    for answers in results:
        for case, (tokens, same, *_), right in zip(cases, answers, expected, strict=True):
            assert same and torch.equal(tokens, right), (case, tokens, right)
    return results


def case(kind: str, mode: str = "greedy", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "mode": mode, **more}


def test_hidden_states_on_a_ring_of_two() -> None:
    """A token costs heads * (head_dim + 1) numbers a layer and row, d + h; prompts lie there once for all beams."""
    modes = [case("gpt2", mode) for mode in MODES] + [case("opt", "beam"), case("opt", "sampling", seed=5)]
    ((_, _, greedy, one), (_, _, beam, three), *_), _ = check(
        2, [*modes, case("gpt2", layout="striped", padded=False, length=2)]
    )
    layers, batch, heads, dim = 2, 2, 4, 8
    assert greedy == NEW * layers * (2 - 1) * batch * heads * (dim + 1) * 4 and beam == 3 * greedy
    width, prompt_here, new_here = heads * dim, 28 // 2, -(-NEW // 2)
    assert one == layers * batch * (prompt_here + new_here) * width * 4
    assert three == layers * batch * (prompt_here + 3 * new_here) * width * 4


def test_sources_of_encoder_decoders_on_a_ring_of_two() -> None:
    """Each rank keeps its part of the encoder's output; a token costs d + h numbers a layer and row here too."""
    cases = [case(kind, mode) for kind in ("bart", "t5") for mode in MODES] + [case("bart", length=2, padded=False)]
    cases += [case("t5", "beam", causal=False), case("mt5"), case("mt5", "beam", causal=False)]
    ((_, _, greedy, _), (_, _, beam, _), *_), _ = check(2, cases)
    assert greedy == NEW * 2 * (2 - 1) * 2 * 4 * (8 + 1) * 4 and beam == 3 * greedy


def test_windows_on_a_ring_of_two() -> None:
    check(2, [case("window"), case("window", "beam"), case("window", length=5, padded=False)])


BOUNDED = ("abc", "cottention", "hybrid", "running", "queues", "by position")


def test_bounded_memories_on_a_ring_of_two() -> None:
    """Bounded layers exchange nothing while they write; their state has the same size after any prompt."""
    cases = [case(kind) for kind in BOUNDED] + [case("hybrid", mode) for mode in ("beam", "sampling")]
    cases += [case("abc", length=61, layout="contiguous"), case("hybrid", name="gpt2", padded=False, seed=1)]
    cases += [case("cottention", length=3, padded=False), case("hybrid", dtype=torch.float64)]
    found = check(2, cases)[0]
    assert found[0][2] == found[1][2] == 0 and found[0][3] == found[8][3]
    assert found[2][2] == NEW * 1 * (2 - 1) * 2 * 4 * (8 + 1) * 4  # the one exact layer of the hybrid


EVERY = [case(kind) for kind in ("window", "abc", "cottention", "hybrid", "gpt2")] + [case("hybrid", "beam")]


def test_every_kind_on_a_ring_of_four() -> None:
    check(4, EVERY)


def test_every_kind_on_a_ring_of_one() -> None:
    for made, one in zip(worker(0, 1, EVERY), EVERY, strict=True):
        assert torch.equal(made[0], truth(one)), one


def test_a_cache_on_a_ring_without_generate_is_refused() -> None:
    model = mixed_model("llama", LAYERS["cottention"], 4)
    longctx.attach(model, longctx.Mesh(ring=2, world_size=2))
    with pytest.raises(ModelError, match="generate with longctx.generate"):
        model(torch.ones(1, 4, dtype=torch.int64), use_cache=True)


def parts_of_a_context(rank: int, world: int) -> list[float]:
    """Largest errors of el_attention over parts of very unequal lengths, one of them empty, against the whole."""
    torch.manual_seed(0)
    x, hidden, b_k, b_v = (torch.randn(*s, dtype=torch.float64) for s in ((4, 3, 12), (2, 11, 12), (8,), (10,)))
    w_q, w_k, w_v, w_o = (torch.randn(*s, dtype=torch.float64) for s in ((16, 12), (8, 12), (10, 12), (12, 20)))
    mask = torch.rand(4, 1, 3, 11) > 0.3
    mask[0] = False
    mesh, sizes = longctx.Mesh(ring=world), (7, 0, 3, 1)
    errors = []
    for extra in ({}, {"sink": torch.randn(4, dtype=torch.float64)}, {"softcap": 2.0}, {"k_norm": Norm("layer")}):
        common = dict(w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, b_k=b_k, b_v=b_v, heads=4, tile=2, **extra)
        whole = longctx.el_attention(x, hidden, mask=mask, **common)
        here = longctx.el_attention(
            x, hidden.split(sizes, 1)[rank], mask=mask.split(sizes, 3)[rank], mesh=mesh, **common
        )
        errors.append(float((here - whole).abs().max()))
    return errors


def test_el_attention_over_parts_of_a_context() -> None:
    assert max(max(errors) for errors in run_ranks(4, parts_of_a_context, timeout=120)) <= tolerance("fp64")
    x = torch.ones(1, 1, 4)
    with pytest.raises(AttentionError, match="give those of this rank's part as key_positions"):
        longctx.el_attention(x, x, *[torch.eye(4)] * 4, heads=1, causal=True, mesh=longctx.Mesh(ring=2, world_size=2))
