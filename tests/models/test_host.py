"""HostStore: what layers keep leaves the device and comes back in time, and gradients do not notice."""

from __future__ import annotations

import itertools
import os
import weakref
from typing import Any

import pytest
import torch
from models.test_recompute import step
from models.zoo import CAUSAL, tiny_config, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from longctx.attention.passes import Passes
from longctx.errors import ModelError
from longctx.models.activations.host import HostStore, Offloaded
from longctx.models.activations.norms import recompute_norms
from longctx.models.activations.recompute import recompute_layers

from tolerances import tolerance


@pytest.mark.parametrize("policy", ["layer", "layer_keep_attention"])
@pytest.mark.parametrize("kind", [*CAUSAL, "bert"])
def test_gradients_are_the_same_to_the_last_bit(kind: str, policy: Any) -> None:
    model = tiny_model(tiny_config(kind), "longctx").train()
    wanted = step(model)
    store = HostStore(everything=True)
    recompute_layers(model, policy, store)
    got = step(model)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())
    assert not [ref for ref in store.order if ref() is not None], "nothing is left of a step"


def test_only_what_a_checkpoint_keeps_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    put = HostStore.put
    monkeypatch.setattr(HostStore, "put", lambda self, tensor: shapes.append(tuple(tensor.shape)) or put(self, tensor))  # type: ignore[func-returns-value]
    model = tiny_model(tiny_config("llama"), "longctx").train()
    recompute_layers(model, "layer_keep_attention", HostStore(everything=True))
    step(model)
    config = model.config
    heads, width = config.num_attention_heads, config.head_dim
    layer = [(2, 21, config.hidden_size), (2, heads, 21, width), (2, heads, 21)]
    assert shapes == layer * config.num_hidden_layers


def here(offloaded: list[Any]) -> list[int]:
    return [place for place, one in enumerate(offloaded) if one.on_device is not None]


def test_what_a_layer_has_kept_comes_together_and_is_handed_over() -> None:
    store, kept = HostStore(everything=True), []
    for layer in range(3):
        with store.layer():
            kept += [store.put(torch.full((2,), float(2 * layer + place))) for place in range(2)]
    assert all(isinstance(offloaded, Offloaded) for offloaded in kept) and here(kept) == []
    for index in (4, 5, 2, 3, 0, 1):
        assert torch.equal(store.take(kept[index]), torch.full((2,), float(index)))
        assert here(kept) == ([] if index % 2 else [index + 1])


@pytest.mark.parametrize("policy", ["layer", "layer_keep_attention"])
def test_a_layer_comes_when_attention_of_the_next_is_done(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a step holds less again; sooner would raise its peak, later would have backward wait."""
    events: list[str] = []
    take, fetch, backward = HostStore.take, HostStore._fetch, Passes.backward

    def taken(self: HostStore, kept: Any) -> torch.Tensor:
        events.append(f"take {kept.layer}")
        return take(self, kept)

    def fetched(self: HostStore, offloaded: Offloaded) -> None:
        if offloaded.on_device is None:
            events.append(f"fetch {offloaded.layer}")
        fetch(self, offloaded)

    def attended(self: Passes, *arguments: Any) -> Any:
        events.append("attention")
        return backward(self, *arguments)

    monkeypatch.setattr(HostStore, "take", taken)
    monkeypatch.setattr(HostStore, "_fetch", fetched)
    monkeypatch.setattr(Passes, "backward", attended)
    model = tiny_model(tiny_config("llama"), "longctx").train()
    recompute_layers(model, policy, HostStore(everything=True))
    step(model)
    layers, later = model.config.num_hidden_layers, [] if policy == "layer" else [2]
    wanted = [f"take {layers}", f"fetch {layers}", *(f"take {layers}" for _ in later), "attention"]
    for layer in range(layers - 1, 0, -1):
        wanted += [f"fetch {layer}", f"take {layer}", "attention"]
    assert [event for event, _ in itertools.groupby(events)] == wanted


@pytest.mark.parametrize("policy", ["layer", "layer_keep_attention"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "olmo2"])
def test_a_layers_input_is_gone_while_its_attention_has_its_backward(
    kind: str, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its first norm is recomputed: that gets it once more, fetched when attention is done; where there is none
    (OLMo 2), the projections get it."""
    inputs: list[StorageWeakRef] = []
    offloaded: list[Any] = []
    gone: list[bool] = []
    taken: list[int] = []
    take, backward = HostStore.take_input, Passes.backward

    def recording(self: HostStore, kept: Any) -> torch.Tensor:
        tensor = take(self, kept)
        inputs.append(StorageWeakRef(tensor.untyped_storage()))
        assert not [ref for ref in offloaded if ref() is not None and ref().layer > kept.layer], "done, and still held"
        offloaded.append(weakref.ref(kept))
        return tensor

    def attended(self: Passes, *arguments: Any) -> Any:
        gone.append(inputs[-1].expired())
        return backward(self, *arguments)

    def fetched(self: HostStore, layer: int) -> None:
        fetch_again(self, layer)
        taken.extend(one.layer for one in (ref() for ref in self.order) if one and one.on_device is not None)

    model = tiny_model(tiny_config(kind), "longctx").train()
    wanted = step(model)
    recompute_norms(model)
    recompute_layers(model, policy, HostStore(everything=True))
    monkeypatch.setattr(HostStore, "take_input", recording)
    monkeypatch.setattr(Passes, "backward", attended)
    fetch_again = HostStore.fetch_again
    monkeypatch.setattr(HostStore, "fetch_again", fetched)
    got = step(model)
    layers = model.config.num_hidden_layers
    assert gone == [True] * layers and taken == list(range(layers, 0, -1))
    for name, gradient in wanted.items():  # weights of norms are summed by tiles
        assert (got[name] - gradient).norm() <= tolerance("model") * gradient.norm().clamp(min=1e-6), name


def test_what_leaves_is_held_for_another_layer_and_no_longer_than_forward() -> None:
    """The compute stream frees it after the copy: earlier, compute would wait; later, a step would hold more."""
    store, leaving, kept = HostStore(everything=True), [], []
    for _ in range(4):
        with store.layer():
            kept.append(store.put(torch.ones(2)))
            leaving.append([layer for layer, *_ in store.leaving])
    assert leaving == [[1], [1, 2], [2, 3], [3, 4]]
    store.take(kept[-1])
    assert store.leaving == []


def test_a_dropped_graph_frees_what_it_kept_and_a_second_take_finds_it() -> None:
    store = HostStore(everything=True)
    first, second = store.put(torch.ones(2)), store.put(torch.zeros(2))
    del second
    assert torch.equal(store.take(first), torch.ones(2)) and torch.equal(store.take(first), torch.ones(2))
    assert [ref() for ref in store.order] == [first]


def test_the_hosts_own_tensors_stay() -> None:
    tensor = torch.ones(1 << 20)
    store = HostStore()
    assert store.put(tensor).data_ptr() == tensor.data_ptr()  # type: ignore[union-attr]


def test_a_store_without_checkpoints_is_refused() -> None:
    with pytest.raises(ModelError, match="no checkpoints; choose layer_keep_attention"):
        recompute_layers(tiny_model(tiny_config("llama"), "longctx"), "none", HostStore())


@pytest.mark.gpu
def test_on_a_gpu_the_copies_are_pinned_and_the_gradients_the_same() -> None:
    assert torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"
    weights = [torch.randn(256, 256, device="cuda", requires_grad=True) for _ in range(8)]

    def train(store: HostStore | None) -> list[torch.Tensor]:
        hidden = torch.linspace(-1, 1, 4096 * 256, device="cuda").view(4096, 256)
        for weight in weights:
            hidden = _checkpoint(lambda x, weight=weight: torch.tanh(x @ weight), hidden, store)
        return list(torch.autograd.grad(hidden.square().sum(), weights))

    wanted, got = train(None), train(HostStore())
    assert all(torch.equal(ours, truth) for ours, truth in zip(got, wanted, strict=True))
    offloaded = HostStore().put(weights[0])
    assert isinstance(offloaded, Offloaded) and offloaded.host.is_pinned()


def _checkpoint(function: Any, x: torch.Tensor, store: HostStore | None) -> torch.Tensor:
    from torch.utils.checkpoint import checkpoint

    if store is None:
        return checkpoint(function, x, use_reentrant=False)  # type: ignore[no-any-return]
    with torch.autograd.graph.saved_tensors_hooks(store.put, store.take):
        return checkpoint(function, x, use_reentrant=False)  # type: ignore[no-any-return]
