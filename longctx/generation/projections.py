"""Find the q, k, v and output projections of an attention module, which EL-attention folds into queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from longctx.errors import ModelError


@dataclass(frozen=True, eq=False)
class Projections:
    """Views of a module's weights in torch.nn.Linear's layout, (out, in), without a copy."""

    w_q: torch.Tensor
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor
    b_q: torch.Tensor | None
    b_k: torch.Tensor | None
    b_v: torch.Tensor | None
    b_o: torch.Tensor | None


@dataclass(frozen=True)
class AttentionSpec:
    """How to read one class of attention modules.

    Attributes:
        projections: returns a module's weights.
        heads: name of the attribute with the number of heads.
        scaled: logits are multiplied by ``module.scaling``; T5's are not.
        crosses, decodes: f(module, path): whether it is cross attention, and whether it belongs to a decoder.
        hidden, mask, bias: names of forward's keywords for the encoder's output, the mask and the position bias.
        outputs: length of the tuple that forward returns.
    """

    projections: Callable[[Any], Projections]
    heads: str
    scaled: bool = True
    crosses: Callable[[Any, str], bool] = lambda module, name: False
    decodes: Callable[[Any, str], bool] = lambda module, name: True
    hidden: str = "key_value_states"
    mask: str = "attention_mask"
    bias: str | None = None
    outputs: int = 2


def _linear(*names: str) -> Callable[[Any], Projections]:
    def read(module: Any) -> Projections:
        layers = [getattr(module, name) for name in names]
        return Projections(*(layer.weight for layer in layers), *(layer.bias for layer in layers))

    return read


def _gpt2(module: Any) -> Projections:
    width = module.embed_dim
    if module.is_cross_attention:
        w_q, b_q = module.q_attn.weight.T, module.q_attn.bias
        (w_k, w_v), (b_k, b_v) = module.c_attn.weight.T.split(width), module.c_attn.bias.split(width)
    else:
        w_q, w_k, w_v = module.c_attn.weight.T.split(width)
        b_q, b_k, b_v = module.c_attn.bias.split(width)
    return Projections(w_q, w_k, w_v, module.c_proj.weight.T, b_q, b_k, b_v, module.c_proj.bias)


_BART = AttentionSpec(
    _linear("q_proj", "k_proj", "v_proj", "out_proj"),
    "num_heads",
    crosses=lambda module, name: name.endswith("encoder_attn"),
    decodes=lambda module, name: bool(module.is_decoder),
)
_T5 = AttentionSpec(
    _linear("q", "k", "v", "o"),
    "n_heads",
    scaled=False,
    crosses=lambda module, name: name.endswith("EncDecAttention"),
    decodes=lambda module, name: bool(module.is_decoder),
    mask="mask",
    bias="position_bias",
    outputs=3,
)
_GPT2 = AttentionSpec(
    _gpt2,
    "num_heads",
    crosses=lambda module, name: bool(module.is_cross_attention),
    hidden="encoder_hidden_states",
)
_SPECS = {
    **dict.fromkeys(("Bart", "MBart", "Marian", "Pegasus", "PLBart", "M2M100", "Blenderbot", "BlenderbotSmall"), _BART),
    "GPT2": _GPT2,
    "OPT": AttentionSpec(_linear("q_proj", "k_proj", "v_proj", "out_proj"), "num_heads"),
    **dict.fromkeys(("T5", "MT5"), _T5),
}


def spec_of(module: Any) -> AttentionSpec | None:
    """Return how to read ``module``, or None if EL-attention does not support its class."""
    name = type(module).__name__
    return _SPECS.get(name.removesuffix("Attention")) if name.endswith("Attention") else None


def unsupported(model: torch.nn.Module) -> ModelError:
    """Return the error that says why no layer of ``model`` can attend to hidden states."""
    rotary = sorted({type(m).__name__ for m in model.modules() if "Rotary" in type(m).__name__})
    if rotary:
        return ModelError(
            f"{type(model).__name__} rotates its keys by their positions ({rotary[0]}): RoPE is applied between the "
            "query and W_k, so W_k cannot be folded into queries and hidden states cannot replace the cache. Generate "
            "with keys and values (leave the model as it is)"
        )
    return ModelError(
        f"{type(model).__name__} has no attention module that EL-attention supports; it supports those of "
        f"{', '.join(sorted(_SPECS))}"
    )
