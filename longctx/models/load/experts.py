"""Mixture-of-experts sizes from a config.json: the number of weights, and how many are active per token.

Without torch: the planner and the FLOPs counter use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longctx.models.load.settings import text_settings, whole_number

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k")


@dataclass(frozen=True)
class Experts:
    """The sparse MLPs of a model: `layers` of them, the other layers being dense.

    Attributes:
        count, active: experts per layer, and experts per token.
        inner: width of one expert.
        shared: total width of the shared experts, which process every token.
        shared_gate: whether a scalar gate weights the shared expert.
    """

    layers: int
    count: int
    active: int
    inner: int
    shared: int = 0
    shared_gate: bool = False

    def weights(self, hidden: int) -> int:
        """Weights of one sparse MLP of gated experts, its router included."""
        return 3 * hidden * (self.count * self.inner + self.shared) + hidden * (self.count + self.shared_gate)

    def used(self, hidden: int) -> int:
        """Weights that are active per token."""
        return self.weights(hidden) - 3 * hidden * (self.count - self.active) * self.inner

    @property
    def width(self) -> int:
        """Intermediate activations per token."""
        return self.active * self.inner + self.shared


def experts_of(settings: dict[str, Any]) -> Experts | None:
    """Return the mixture of experts that a config.json describes; None for a dense model."""
    settings = text_settings(settings)
    count, active = whole_number(settings, *_COUNTS), whole_number(settings, *_CHOSEN)
    inner = whole_number(settings, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_dim")
    total = whole_number(settings, "num_hidden_layers", "n_layer", "n_layers")
    if count is None or inner is None or total is None or count == 1 or settings.get("enable_moe_block") is False:
        return None
    if settings.get("model_type") == "llama4_text":
        shared: int | None = inner  # one shared expert, as wide as the others
    else:
        number = whole_number(settings, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 0
        own = whole_number(settings, "shared_expert_intermediate_size", "shared_intermediate_size")
        shared = own or number * inner
    gate = settings.get("model_type") in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text")
    return Experts(_sparse_layers(settings, total), count, min(active or 1, count), inner, shared or 0, gate)


def _sparse_layers(settings: dict[str, Any], total: int) -> int:
    """Count the layers with experts."""
    kinds = settings.get("mlp_layer_types")
    if isinstance(kinds, list) and kinds:
        return sum(kind == "sparse" for kind in kinds)
    listed = settings.get("moe_layers")
    if isinstance(listed, list):
        return len(listed)
    frequency = settings.get("moe_layer_freq")
    if isinstance(frequency, list):
        return sum(map(bool, frequency))
    dense = settings.get("mlp_only_layers")
    skipped = set(dense) if isinstance(dense, list) else set()
    first = whole_number(settings, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") or 0
    every = whole_number(settings, "decoder_sparse_step", "interleave_moe_layer_step") or 1
    if isinstance(frequency, int) and frequency > 1:
        return sum(layer >= first and layer % frequency == 0 for layer in range(total))
    return sum(layer >= first and layer not in skipped and (layer + 1) % every == 0 for layer in range(total))
