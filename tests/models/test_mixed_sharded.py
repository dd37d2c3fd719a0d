"""Converted models on a sharded sequence equal themselves on one device: logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models.mixed import ALL, HYBRID, mixed_model
from models.zoo import documents, positions_of

import longctx
from longctx.errors import ModelError
from longctx.models.attach import attach_attention
from longctx.models.hook.bounded_layer import bounded_child

from distributed import run_ranks
from tolerances import tolerance

LENGTH = 45  # of no ring a multiple: every shard is padded
RUNNING = {"0": {"abc": {"slots": 3, "normalizer": "running", "control_input": "kv", "tied": False}}, "1": "cosine"}
QUERY = {"0": {"cosine": {"scale_on": "query"}}, "1": {"abc": {"slots": 4, "per_head": False}}}
OTHERS = {
    "0": {"abc": {"slots": 4, "control": "random"}},
    "1": {"abc": {"slots": 4, "control": "linformer", "max_length": 64}},
    "2": {"abc": {"slots": 4, "control": "window"}},
    "3": {"abc": {"slots": 4, "control": "dilated", "rate": 2}},
}


def both(mesh: Any, name: str, layers: dict[str, Any], count: int, kind: str, **more: Any) -> dict[str, float]:
    """Return the largest differences between a sharded model and the whole one, relative to the largest value."""
    checkpointing, layout = more.get("checkpointing"), more.get("layout", "zigzag")
    ids = documents(kind, 2, LENGTH)
    positions, valid = positions_of(ids), ids >= 0
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, ids.shape, generator=generator)
    weights = torch.randn(*ids.shape, 64, generator=generator, dtype=torch.float64) * valid[..., None]
    plain: dict[str, Any] = {} if name == "bert" else {"use_cache": False}

    whole = mixed_model(name, layers, count).train()
    truth = whole(input_ids=tokens, position_ids=positions, document_ids=ids, **plain).logits
    (truth * weights).sum().backward()
    model = mixed_model(name, layers, count).train()
    attach_attention(model, mesh, layout)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    part = [longctx.shard(x, mesh, layout=layout) for x in (tokens, positions, weights)]
    local = longctx.shard(ids, mesh, layout=layout, pad_value=-1)
    logits = model(input_ids=part[0], position_ids=part[1], document_ids=local, **plain).logits
    assert torch.isfinite(logits).all(), "padded rows must stay finite"
    (logits * part[2]).sum().backward()
    gathered = longctx.unshard(logits.detach(), mesh, length=LENGTH, layout=layout)

    gradients = []
    for (label, ours), (_, theirs) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, label
        gradient = ours.grad.clone()
        dist.all_reduce(gradient, group=mesh.sequence_group)
        gradients.append((gradient - theirs.grad).abs().max() / theirs.grad.abs().max().clamp(min=1e-3))
    difference = (gathered - truth.detach())[valid].abs().max() / truth.detach()[valid].abs().max()
    return {"logits": float(difference), "gradient": float(torch.stack(gradients).max())}  # NaN stays NaN


def worker(rank: int, world: int, ring: int, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    mesh = longctx.Mesh(ring=ring)
    return [both(mesh, **case) for case in cases]


def check(world: int, ring: int, cases: list[dict[str, Any]]) -> None:
    for results in run_ranks(world, worker, ring, cases, timeout=240):
        for case, errors in zip(cases, results, strict=True):
            for what, error in errors.items():
                assert error <= tolerance("model"), f"{what} of {case}: {error:.1e}"


def case(name: str, layers: dict[str, Any], kind: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "layers": layers, "count": max(int(key) for key in layers) + 1, "kind": kind, **more}


@pytest.mark.parametrize("name", ALL)
def test_hybrids_on_a_ring_of_two(name: str) -> None:
    check(2, 2, [case(name, HYBRID, kind) for kind in ("whole", "packed", "left")])


def test_other_forms_and_controls() -> None:
    check(2, 2, [case("llama", layers, kind) for layers in (RUNNING, QUERY, OTHERS) for kind in ("packed", "left")])


def test_bert_sees_both_directions() -> None:
    layers = {"0": {"abc": {"slots": 5}}, "1": "cosine"}
    check(2, 2, [case("bert", layers, kind) for kind in ("whole", "packed", "left")])


def test_checkpointing_and_another_layout() -> None:
    more: list[dict[str, Any]] = [{"checkpointing": False}, {"checkpointing": True}, {"layout": "contiguous"}]
    check(2, 2, [case("qwen3", HYBRID, "packed", **options) for options in more])


def test_more_ranks() -> None:
    check(3, 3, [case("llama", HYBRID, "packed")])


def bypassed(rank: int, world: int) -> str:
    """A bounded layer that attends by itself on a shard must not pass in silence."""
    mesh = longctx.Mesh(ring=world)
    model = mixed_model("llama", HYBRID, 4)
    attach_attention(model, mesh)
    layer = model.model.layers[0].self_attn
    layer.forward = lambda hidden_states, **_: (hidden_states, None)
    assert bounded_child(layer) is not None
    tokens = torch.arange(8)[None]
    try:
        model(input_ids=tokens, position_ids=tokens, document_ids=tokens.clamp(max=0), use_cache=False)
    except ModelError as error:
        return str(error)
    return "nothing was said"


def test_a_layer_that_goes_around_its_memory_is_named() -> None:
    for message in run_ranks(2, bypassed):
        assert "LlamaAttention" in message and "without it" in message
