"""tile_loss: a transformers model whose loss never makes all logits, without a change to its code.

Its ``forward`` is replaced on the object by one that does what the family's own does, except that the head, asked for a
loss, returns that instead of logits. The head stays a module that is called once with all hidden states, so ZeRO-3
gathers its weight once in forward and once in backward and reduces its gradient once.
"""

from __future__ import annotations

from functools import cache, partial, wraps
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from longctx.errors import ModelError
from longctx.models.names import PREFIX
from longctx.nn.entropy import Backend, check_backend
from longctx.nn.loss import IGNORED, tiled_loss
from longctx.nn.tiling import Tile

TILED = frozenset(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt2 gpt_oss phi olmo olmo2".split()
)  # fmt: skip
"""Model types whose causal language model is body, linear head, at most a softcap, loss; every one is tested."""
_SETTINGS = "longctx_tiled_loss"


def why_not_tiled(model: Any) -> str | None:
    """Return why the loss of ``model`` cannot be tiled, or None if it can."""
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)).removeprefix(PREFIX)
    if kind not in TILED or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return f"{type(model).__name__} is none of the causal language models known: {', '.join(sorted(TILED))}"
    if type(model.get_output_embeddings()) is not torch.nn.Linear:
        return f"the head is a {type(model.get_output_embeddings()).__name__}, not a plain linear layer"
    if hasattr(model, "_loss_function"):
        return "the model has been given a loss function of its own"
    return None


def tile_loss(model: Any, tile: Tile = "auto", *, z_loss: float = 0.0, backend: Backend = "auto") -> None:
    """Have ``model`` compute its loss tile by tile whenever it is given labels, in place; its output's logits are None.

    Without labels it returns logits as always. Sharded or not; ``num_items_in_batch`` and ``shift_labels`` mean what
    they mean to transformers.

    Args:
        tile, backend: see ``longctx.nn.tiled_loss``.
        z_loss: of training; an evaluation is plain cross entropy.

    Raises:
        ModelError: the model is not one whose loss can be tiled.
    """
    reason = why_not_tiled(model)
    if reason is not None:
        raise ModelError(f"the loss cannot be tiled: {reason}. Leave loss_tile and z_loss out")
    check_backend(backend)
    head = model.get_output_embeddings()
    setattr(model, _SETTINGS, (tile, z_loss, backend))
    kind: Any = type(model)
    model.forward = MethodType(_tiled_forward(kind), model)
    head.forward = MethodType(_head_forward, head)


def _head_forward(head: torch.nn.Linear, hidden: torch.Tensor, *, loss: Any = None) -> torch.Tensor:
    """Logits, or what ``loss`` makes of the hidden states and the head's own (gathered) weight."""
    if loss is None:
        return F.linear(hidden, head.weight, head.bias)
    total: torch.Tensor = loss(hidden, head.weight, bias=head.bias)
    return total


@cache
def _tiled_forward(kind: Any) -> Any:
    plain = kind.forward

    @wraps(plain)  # transformers looks at its signature
    def forward(
        self: Any, *args: Any, labels: torch.Tensor | None = None, shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        if labels is None and shift_labels is None:
            return plain(self, *args, **keywords)
        _refuse(self, args, keywords)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        outputs = self.base_model(*args, **{**keywords, "return_dict": True})
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        tile, z_loss, backend = getattr(self, _SETTINGS)
        compute = partial(
            tiled_loss, labels=shift_labels.to(outputs[0].device), tile=tile, backend=backend,
            z_loss=z_loss if self.training else 0.0, softcap=getattr(self.config, "final_logit_softcapping", None),
        )  # fmt: skip
        loss = self.get_output_embeddings()(outputs[0], loss=compute)
        loss = loss / ((shift_labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    return forward


def _refuse(model: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Refuse, of a call with labels, what would mean something else here than in the model's own forward."""
    name = type(model).__name__
    if len(args) > 1:
        raise ModelError(f"{name} with a tiled loss: pass everything after input_ids by keyword")
    for keyword in ("ignore_index", "logits_to_keep", "output_router_logits"):
        if keywords.get(keyword):
            raise ModelError(f"{name} with a tiled loss: {keyword}= is not supported; leave it out")
    if keywords.get("return_dict") is False:
        raise ModelError(f"{name} with a tiled loss: return_dict=False would put the loss where logits are expected")
