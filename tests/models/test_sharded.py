"""Models of transformers on a sharded sequence equal the same models, whole and eager: logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models.zoo import CAUSAL, documents, eager_mask, positions_of, tiny_config, tiny_model

import longctx
from longctx.models.attach import attach_attention

from distributed import run_ranks
from tolerances import tolerance

LENGTH = 45  # of no ring a multiple: every shard is padded


def sharded_error(
    mesh: Any,
    config: Any,
    kind: str,
    layout: str = "zigzag",
    length: int = LENGTH,
    checkpointing: dict[str, bool] | None = None,
    by_mask: bool = False,
) -> dict[str, float]:
    """Return the largest differences between the sharded model and the eager one, relative to the largest value."""
    ids = documents(kind, 2, length)
    positions, valid = positions_of(ids), ids >= 0
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, ids.shape, generator=generator)
    weights = torch.randn(*ids.shape, config.vocab_size, generator=generator, dtype=torch.float64) * valid[..., None]

    eager = tiny_model(config, "eager").double().train()
    model = tiny_model(config, "longctx").double().train()
    attach_attention(model, mesh, layout)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    more: dict[str, Any] = {} if config.model_type == "bert" else {"use_cache": False}
    mask = eager_mask(config, ids, torch.float64)
    truth = eager(input_ids=tokens, position_ids=positions, attention_mask=mask, **more).logits
    (truth * weights).sum().backward()

    part = [longctx.shard(x, mesh, layout=layout) for x in (tokens, positions, weights)]
    if by_mask:  # padding said by a (B, T) attention_mask instead of by document ids
        more["attention_mask"] = longctx.shard(valid.long(), mesh, layout=layout)
    local_ids = longctx.shard(ids.clamp(min=0) if by_mask else ids, mesh, layout=layout, pad_value=-1)
    logits = model(input_ids=part[0], position_ids=part[1], document_ids=local_ids, **more).logits
    assert torch.isfinite(logits).all(), "padded rows must stay finite"
    (logits * part[2]).sum().backward()
    whole = longctx.unshard(logits.detach(), mesh, length=length, layout=layout)

    scale = truth.detach()[valid].abs().max()
    gradients = []
    for (name, ours), (_, theirs) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert ours.grad is not None, f"{name} has no gradient"
        gradient = ours.grad.clone()
        if mesh.sequence_size > 1:
            dist.all_reduce(gradient, group=mesh.sequence_group)
        assert theirs.grad is not None
        gradients.append((gradient - theirs.grad).abs().max() / theirs.grad.abs().max().clamp(min=1e-3))
    logits_error = (whole - truth.detach())[valid].abs().max() / scale
    return {"logits": float(logits_error), "gradient": float(torch.stack(gradients).max())}  # NaN stays NaN


def worker(rank: int, world: int, ring: int, cases: list[dict[str, Any]], ulysses: int = 1) -> list[dict[str, float]]:
    mesh = longctx.Mesh(ring=ring, ulysses=ulysses)
    return [sharded_error(mesh, **case) for case in cases]


def check(world: int, ring: int, cases: list[dict[str, Any]], ulysses: int = 1) -> None:
    for results in run_ranks(world, worker, ring, cases, ulysses, timeout=240):
        for case, errors in zip(cases, results, strict=True):
            for what, error in errors.items():
                named = {key: value for key, value in case.items() if key != "config"}
                assert error <= tolerance("model"), f"{what} of {case['config'].model_type} {named}: {error:.1e}"


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_every_model_on_a_ring_of_two(name: str) -> None:
    config = tiny_config(name)
    check(2, 2, [{"config": config, "kind": kind} for kind in ("whole", "packed", "left")])


@pytest.mark.parametrize("world, ring", [(1, 1), (3, 3), (4, 4), (4, 2)])
def test_llama_on_other_rings(world: int, ring: int) -> None:
    config = tiny_config("llama")
    check(world, ring, [{"config": config, "kind": kind} for kind in ("packed", "left")])


def test_every_model_exchanging_heads() -> None:
    """Also those with fewer key heads than members, learned sinks, softcaps and windows by layer."""
    cases = [{"config": tiny_config(name), "kind": kind} for name in (*CAUSAL, "bert") for kind in ("packed", "left")]
    check(2, 1, cases, ulysses=2)


def test_llama_on_two_by_two() -> None:
    check(4, 2, [{"config": tiny_config("llama"), "kind": kind} for kind in ("packed", "left")], ulysses=2)


def test_padding_given_as_a_mask_of_the_local_tokens() -> None:
    check(
        2, 2, [{"config": tiny_config(name), "kind": "left", "by_mask": True} for name in ("llama", "gemma3", "bert")]
    )


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_other_layouts(layout: str) -> None:
    cases = [{"config": tiny_config(name), "kind": "packed", "layout": layout} for name in ("llama", "gemma3", "bert")]
    check(2, 2, cases)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    keywords = {"use_reentrant": reentrant}
    cases = [
        {"config": tiny_config(n), "kind": "packed", "checkpointing": keywords}
        for n in ("llama", "gemma2", "gemma3", "gpt2", "gpt-oss", "bert")
    ]
    check(2, 2, cases)


ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 36,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}  # fmt: skip


def rope_config(kind: str) -> Any:
    config = tiny_config("llama", rope_parameters={"rope_theta": 10000.0, **ROPE[kind]})
    if kind == "dynamic":
        config.max_position_embeddings = 24  # the sequences must be longer than this for the frequencies to change
    return config


@pytest.mark.parametrize("kind", list(ROPE))
def test_rope_variants(kind: str) -> None:
    check(2, 2, [{"config": rope_config(kind), "kind": rows} for rows in ("whole", "packed")])


def length_worker(rank: int, world: int, kind: str) -> list[float]:
    """One sharded model on a long batch, a middling and a short one, against a fresh eager model each time."""
    mesh = longctx.Mesh(ring=world)
    config = rope_config(kind)
    model = tiny_model(config, "longctx").double()
    attach_attention(model, mesh)
    errors = []
    for length in (60, 40, 17):  # the second rank of 40 sees no position that is long for longrope
        tokens = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            truth = tiny_model(config, "eager").double()(tokens, use_cache=False).logits
            ids = longctx.shard(torch.zeros(1, length, dtype=torch.int32), mesh, pad_value=-1)
            part = longctx.shard(tokens, mesh)
            positions = longctx.positions(length, mesh)[None]  # padding continues past the end, and must not count
            logits = model(input_ids=part, position_ids=positions, document_ids=ids, use_cache=False).logits
            errors.append(float((longctx.unshard(logits, mesh, length=length) - truth).abs().max()))
    return errors


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_depends_on_the_true_length_and_nothing_before(kind: str) -> None:
    for errors in run_ranks(2, length_worker, kind, timeout=240):
        assert max(errors) <= tolerance("model"), errors


def compiled_worker(rank: int, world: int) -> tuple[float, float]:
    """One compiled step of a sharded model (second forward: the first is watched) against the same step uncompiled."""
    mesh = longctx.Mesh(ring=world)
    ids = documents("packed", 1, 32)
    part = longctx.shard(torch.arange(32)[None], mesh)
    arguments = {
        "input_ids": part,
        "position_ids": longctx.shard(positions_of(ids), mesh),
        "document_ids": longctx.shard(ids, mesh, pad_value=-1),
        "use_cache": False,
    }
    model = tiny_model(tiny_config("llama"), "longctx")
    attach_attention(model, mesh)
    truth = model(**arguments).logits
    truth.square().sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logits = torch.compile(model, backend="aot_eager")(**arguments).logits
    logits.square().sum().backward()
    difference = (model.lm_head.weight.grad - gradient).abs().max() / gradient.abs().max()
    return float((logits - truth).detach().abs().max()), float(difference)


@pytest.mark.deep
def test_a_compiled_model() -> None:
    for errors in run_ranks(2, compiled_worker, timeout=240):
        assert max(errors) <= tolerance("model")
