"""The model FLOPs of a training step and the hardware's peak, for model FLOPs utilization (MFU).

Model FLOPs are those of the matrix products: 6 per weight and token (2 forward, 4 backward), and in attention 12 per
head, head dimension and visible (query, key) pair. Pairs masked by causality, a window or a document border do not
count, and recomputation does not count.
"""

from __future__ import annotations

from typing import Any

import torch

from longctx.models.load.experts import experts_of
from longctx.nn.kinds import ABC, Kind, Ring, Window, read_layers

# Dense bf16 matrix throughput from the vendors' data sheets, FLOP/s; the first substring of the device name counts.
PEAKS = (
    ("B300", 2.25e15),
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return the device's dense bf16/fp16 peak in FLOP/s; None if it is unknown or the run is in fp32."""
    if device.type != "cuda" or dtype not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def idle_weights(config: Any) -> int:
    """Return the number of expert weights that are inactive for a given token."""
    experts = experts_of(config.to_dict())
    if experts is None:
        return 0
    return experts.layers * (experts.weights(config.hidden_size) - experts.used(config.hidden_size))


class FlopsModel:
    """FLOPs of a transformers decoder, from its configuration and its parameter count.

    Args:
        config: a transformers configuration.
        parameters: number of parameters; the input embedding's (a table lookup) are subtracted unless tied.
    """

    def __init__(self, config: Any, parameters: int) -> None:
        self.heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        embedding = config.vocab_size * config.hidden_size
        self.matrix_weights = parameters - (0 if config.tie_word_embeddings else embedding) - idle_weights(config)
        self.window: int | None = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            self.window = None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        self.others: list[Kind] = []  # layers that do not attend as the architecture does
        if getattr(config, "attention_layers", None):
            mixed = read_layers(config.attention_layers, config.num_hidden_layers)
            self.others = [kind for kind in mixed if not isinstance(kind, Ring)]
            kinds = [name for name, kind in zip(kinds, mixed, strict=True) if isinstance(kind, Ring)]
        self.shared = 1 + (getattr(config, "num_key_value_heads", None) or self.heads) / self.heads
        self.sliding_layers = kinds.count("sliding_attention") if self.window is not None else 0
        self.full_layers = config.num_hidden_layers - self.sliding_layers - len(self.others)

    def pairs(self, batch: dict[str, Any]) -> int:
        """Count the (query, key) pairs of this rank's tokens in causal attention, over all layers.

        Args:
            batch: ``position_ids`` (B, T), which restart at 0 in every document, so that a token attends to
                position + 1 keys; ``document_ids`` (B, T), -1 for padding.
        """
        seen = (batch["position_ids"] + 1)[batch["document_ids"] >= 0]
        total = self.full_layers * int(seen.sum())
        if self.window is not None:
            total += self.sliding_layers * int(seen.clamp(max=self.window).sum())
        for kind in self.others:
            if isinstance(kind, Window):
                total += int(seen.clamp(max=kind.size).sum())
            else:  # bounded state: one read per query head and one write per key head, each costing ``size`` pairs
                size = kind.slots if isinstance(kind, ABC) else self.head_dim // 2
                total += int(size * self.shared * seen.numel())
        return total

    def step(self, tokens: float, pairs: float) -> float:
        """Return the forward and backward FLOPs of ``tokens`` tokens with ``pairs`` visible pairs over all layers."""
        return 6.0 * self.matrix_weights * tokens + 12.0 * self.heads * self.head_dim * pairs
