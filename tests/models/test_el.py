"""enable_el: transformers' own generate(), token for token, from hidden states instead of keys and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import longctx
from longctx.decode.caches.hidden import HiddenLayer
from longctx.decode.caches.prompt import use_layers
from longctx.decode.caches.size import cache_bytes
from longctx.decode.cost import Shape, el_bytes, kv_bytes
from longctx.errors import ModelError

from tolerances import tolerance

VOCABULARY, WIDTH, LAYERS, HEADS, PAD, END = 97, 32, 2, 4, 96, 95
SPECIAL = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END}
SEQ2SEQ = SPECIAL | {"decoder_start_token_id": PAD, "forced_eos_token_id": None}
BART = dict(
    vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
) | SEQ2SEQ  # fmt: skip
T5 = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=HEADS) | SEQ2SEQ
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel",
             dict(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS) | SPECIAL),
    "opt": ("OPTConfig", "OPTForCausalLM",
            dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, ffn_dim=64,
                 word_embed_proj_dim=WIDTH, num_attention_heads=HEADS, max_position_embeddings=64) | SPECIAL),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", BART),
    "marian": ("MarianConfig", "MarianMTModel", BART),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", BART),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", BART),
    "m2m": ("M2M100Config", "M2M100ForConditionalGeneration", BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", T5),
}  # fmt: skip
MAIN = ["gpt2", "opt", "bart", "marian", "t5"]


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config, model, arguments = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**(arguments | changes))).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from uniform, and no bias zero
    return made.to(dtype)


def prompts(encoder_decoder: bool) -> dict[str, torch.Tensor]:
    """Three of unequal length, padded where the model wants it."""
    torch.manual_seed(1)
    ids, mask = torch.randint(0, 90, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4], mask[2, :2] = 0, 0
    if encoder_decoder:
        mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def generate(model: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    longer = {"max_new_tokens": 10, "min_new_tokens": 4} | options
    return model.generate(
        **prompts(model.config.is_encoder_decoder), return_dict_in_generate=True, output_scores=True, **longer
    )


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "two of four beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "top_k": 7, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "no cache": {"use_cache": False, "num_beams": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAIN)
def test_the_same_tokens_as_generate(name: str, mode: str) -> None:
    model = make(name)
    weights = copy.deepcopy(model.state_dict())
    theirs = generate(model, **MODES[mode])
    longctx.enable_el(model)
    ours = generate(model, **MODES[mode])
    longctx.disable_el(model)
    again = generate(model, **MODES[mode])
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(again.sequences, theirs.sequences)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(MAIN)))
def test_relatives(name: str) -> None:
    model = make(name)
    theirs = generate(model, num_beams=3)
    longctx.enable_el(model)
    assert torch.equal(generate(model, num_beams=3).sequences, theirs.sequences)


@pytest.mark.parametrize(
    ("name", "implementation"), [("gpt2", "eager"), ("bart", "eager"), ("t5", "eager"), ("gpt2", "longctx")]
)
def test_masks_of_other_implementations(name: str, implementation: str) -> None:
    longctx.register()
    model = make(name)
    model.set_attn_implementation(implementation)
    theirs = generate(model, num_beams=2)
    longctx.enable_el(model)
    assert torch.equal(generate(model, num_beams=2).sequences, theirs.sequences)


@pytest.mark.parametrize("name", MAIN)
def test_trained_weights(name: str) -> None:
    """After some steps towards counting upwards; the greedy continuation then says something."""
    model = make(name).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    for _ in range(40):
        rows = (torch.randint(0, 80, (8, 1)) + torch.arange(10)) % 90
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    model.eval()
    theirs = [generate(model), generate(model, num_beams=4)]
    longctx.enable_el(model)
    for mode, expected in zip(({}, {"num_beams": 4}), theirs, strict=True):
        assert torch.equal(generate(model, **mode).sequences, expected.sequences)


@pytest.mark.parametrize("name", MAIN)
def test_steps_of_a_decoder_equal_its_full_forward(name: str) -> None:
    model = make(name, torch.float64)
    torch.manual_seed(4)
    rows = torch.randint(0, 90, (2, 12))
    given = {"input_ids": rows}
    if model.config.is_encoder_decoder:
        source = model.get_encoder()(input_ids=torch.randint(0, 90, (2, 7)))
        given = {"encoder_outputs": source, "decoder_input_ids": rows}
    ids = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    with torch.no_grad():
        whole = model(**given, use_cache=False).logits
        longctx.enable_el(model)
        cache, steps = None, []
        for start, stop in ((0, 3), (3, 4), (4, 8), *((t, t + 1) for t in range(8, 12))):
            out = model(**(given | {ids: rows[:, start:stop]}), past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits]
    limit = tolerance("model" if name == "t5" else "fp64")  # T5's norms are fp32 inside
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=limit, atol=limit)


def shape_of(model: Any, beams: int, generated: int) -> Shape:
    seq2seq = model.config.is_encoder_decoder
    return Shape(
        layers=LAYERS, heads=HEADS, key_heads=HEADS, head_dim=WIDTH // HEADS, width=WIDTH, batch=3, beams=beams,
        prompt=1 if seq2seq else 9, generated=generated, source=9 if seq2seq else 0, element_bytes=4,
    )  # fmt: skip


@pytest.mark.parametrize("name", MAIN)
def test_caches_hold_what_the_formulas_say(name: str) -> None:
    model = make(name)
    options = {"num_beams": 4, "max_new_tokens": 6, "min_new_tokens": 6}
    theirs = generate(model, **options)
    shape = shape_of(model, 4, 5)
    assert cache_bytes(theirs.past_key_values) == kv_bytes(shape)
    longctx.enable_el(model)
    ours = generate(model, **options)
    source = 3 * shape.source * WIDTH * 4  # the encoder's output lies outside the cache
    assert cache_bytes(ours.past_key_values) == el_bytes(shape) - source


def test_the_encoders_output_is_kept_once_for_all_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bart")
    seen = []

    def watch(*given: Any, **named: Any) -> Any:
        tensors = [x for x in (*given[1:], *named.values()) if torch.is_tensor(x)]
        seen.append(next(x.shape[0] for x in tensors if x.shape[1:] == (9, WIDTH)))
        return inner(*given, **named)

    layer = model.get_decoder().layers[0]
    inner = layer.forward
    monkeypatch.setattr(layer, "forward", watch)
    longctx.enable_el(model)
    generate(model, num_beams=4)
    assert set(seen) == {3}


def test_only_one_kind_of_attention() -> None:
    model = make("bart")
    assert all("encoder_attn" in name for name in longctx.enable_el(model, causal=False))
    assert all("self_attn" in name for name in longctx.enable_el(model, cross=False))
    theirs = generate(make("bart"), num_beams=2)
    assert torch.equal(generate(model, num_beams=2).sequences, theirs.sequences)


def test_layers_with_a_bounded_memory_keep_it() -> None:
    model = longctx.convert(make("gpt2"), {"1": {"abc": {"slots": 4}}})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = generate(model)
    (changed,) = longctx.enable_el(model)
    assert changed.endswith("0.attn") and torch.equal(generate(model).sequences, theirs.sequences)


def test_saving_while_enabled(tmp_path: Any) -> None:
    model = make("gpt2")
    longctx.enable_el(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(generate(loaded).sequences, generate(model).sequences)


def test_a_cache_can_be_cropped_repeated_and_selected() -> None:
    model = make("gpt2", torch.float64)
    rows = torch.randint(0, 90, (2, 6))
    with torch.no_grad():
        plain = model(input_ids=rows.repeat_interleave(3, 0)[[0, 4]]).logits[:, -1]
        longctx.enable_el(model)
        cache = transformers.DynamicCache()
        use_layers(cache, [0, 1], HiddenLayer, 1)
        model(input_ids=torch.cat((rows[:, :5], rows[:, :2]), 1), past_key_values=cache, use_cache=True)
        cache.crop(-2)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 4]))
        after = model(input_ids=rows[:, 5:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(after, plain, rtol=tolerance("fp64"), atol=tolerance("fp64"))


def test_rotary_models_are_refused_with_the_reason() -> None:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ModelError, match="RoPE is applied between the query"):
        longctx.enable_el(transformers.LlamaForCausalLM(config))
    with pytest.raises(ModelError, match="no attention module that EL-attention supports"):
        longctx.enable_el(torch.nn.Linear(2, 2))


def test_quantised_caches_are_refused() -> None:
    model = make("gpt2")
    longctx.enable_el(model)
    cache = transformers.DynamicCache()
    cache.layers = [transformers.cache_utils.DynamicSlidingWindowLayer(4) for _ in range(LAYERS)]
    with pytest.raises(ModelError, match="cannot hold hidden states"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)
