"""Models with a tiled loss: the same loss and gradients as their own forward, without logits."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from models.zoo import CAUSAL, VOCABULARY, tiny_config, tiny_model

from longctx.errors import ModelError
from longctx.models.activations.loss import TILED, tile_loss, why_not_tiled
from longctx.models.convert import convert
from longctx.nn import entropy

from tolerances import tolerance

KINDS = [*CAUSAL, "qwen2", "gemma2-capped", "llama-tied", "llama-abc"]


def make(kind: str) -> Any:
    extra = {"final_logit_softcapping": 0.4} if kind == "gemma2-capped" else {}
    config = tiny_config(kind.partition("-capped")[0].removesuffix("-tied").removesuffix("-abc"), **extra)
    if kind == "llama-tied":
        config.tie_word_embeddings = True
    if kind == "llama-abc":
        config = convert(config, {"1": {"abc": {"slots": 4}}})
    return tiny_model(config, "longctx").double().train()


def rows(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (2, 21), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 21, generator=generator) < 0.3, -100)}


def gradients(model: Any, **batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    (1.3 * loss).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("given", ["labels", "shift_labels and a count"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_models_own_loss(kind: str, given: str) -> None:
    model, batch = make(kind), rows()
    if given != "labels":
        batch |= {"shift_labels": batch["labels"].roll(-1, 1), "num_items_in_batch": torch.tensor(7.5)}
    loss, wanted = gradients(model, **batch)
    tile_loss(model, 5)
    ours, got = gradients(model, **batch)
    # transformers' own loss is fp32 even in an fp64 model
    torch.testing.assert_close(ours, loss.double(), rtol=tolerance("model"), atol=0)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= tolerance("model") * gradient.norm().clamp(min=1e-6), name


def test_every_tiled_family_is_tested() -> None:
    tested = {tiny_config(name).model_type for name in CAUSAL} | {"qwen2"}
    assert tested == TILED


def test_logits_come_without_labels_and_only_then() -> None:
    model, batch = make("llama"), rows()
    wanted = model(batch["input_ids"]).logits
    tile_loss(model)
    assert torch.equal(model(batch["input_ids"]).logits, wanted)
    assert model(**batch).logits is None


def test_z_loss_is_added_in_training_only() -> None:
    model, batch = make("llama"), rows()
    tile_loss(model, 4)
    plain = model(**batch).loss
    tile_loss(model, 4, z_loss=0.1)
    lse = model(batch["input_ids"]).logits.logsumexp(-1)
    valid = batch["labels"][:, 1:] != -100
    extra = 0.1 * lse[:, :-1][valid].square().mean()
    torch.testing.assert_close(model(**batch).loss - plain, extra, rtol=tolerance("fp64"), atol=tolerance("fp64"))
    model.eval()
    torch.testing.assert_close(model(**batch).loss, plain, rtol=tolerance("fp64"), atol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma2-capped", "llama-tied"])
def test_the_kernel_computes_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, tiles = make(kind).float(), rows(), []
    tile_loss(model, 5, z_loss=0.1, backend="torch")
    loss, wanted = gradients(model, **batch)
    plain, tile = model.eval()(**batch).loss, entropy._tile
    monkeypatch.setattr(entropy, "_tile", lambda *args: tiles.append(len(args[0])) or tile(*args))
    tile_loss(model.train(), 5, z_loss=0.1, backend="triton")
    ours, got = gradients(model, **batch)
    torch.testing.assert_close(ours, loss, rtol=tolerance("fp32"), atol=0)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= tolerance("fp32") * gradient.norm().clamp(min=1e-6), name
    torch.testing.assert_close(model.eval()(**batch).loss, plain, rtol=tolerance("fp32"), atol=0)
    assert tiles == 2 * [5, 5, 5, 5, 5, 5, 5, 5, 2]  # of 2 x 21 tokens, in training and in evaluation


def test_a_copy_has_a_loss_of_its_own() -> None:
    model = make("llama")
    tile_loss(model, 4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert twin.forward.__self__ is twin and twin.lm_head.forward.__self__ is twin.lm_head
    assert model(**rows()).loss != twin(**rows()).loss
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))


def test_what_cannot_be_tiled_is_named() -> None:
    bert = tiny_model(tiny_config("bert"), "longctx")
    with pytest.raises(ModelError, match="BertForMaskedLM is not one of"):
        tile_loss(bert)
    with pytest.raises(ModelError, match="'auto', 'torch', 'triton'"):
        tile_loss(make("llama"), backend="liger")  # type: ignore[arg-type]
    adapted = make("llama")
    adapted.lm_head = torch.nn.Sequential(adapted.lm_head)
    assert "Sequential, not a plain linear" in str(why_not_tiled(adapted))
    own = make("llama")
    own.loss_function = lambda **_: 0
    assert "loss function of its own" in str(why_not_tiled(own))


@pytest.mark.parametrize("keywords", [{"logits_to_keep": 1}, {"ignore_index": 3}, {"return_dict": False}])
def test_a_call_that_would_mean_something_else_is_refused(keywords: dict[str, Any]) -> None:
    model = make("llama")
    tile_loss(model)
    with pytest.raises(ModelError, match=next(iter(keywords))):
        model(**rows(), **keywords)
    with pytest.raises(ModelError, match="by keyword"):
        model(rows()["input_ids"], None, labels=rows()["labels"])
