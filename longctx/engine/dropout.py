"""Seeds of attention dropout, per row: a function of the run's seed, the step and the row's index in the global batch.

The dropout of a row so does not depend on the number of ranks, on the split into replicas and micro-batches, or on a
resume.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longctx.data.order import mix
from longctx.mesh import Mesh
from longctx.models.hook.binding import binding_of

KEYWORD = "dropout_seeds"


def row_seeds(seed: int, step: int, first: int, rows: int) -> torch.Tensor:
    """Return (rows,) int64 seeds of rows ``first``, ``first`` + 1, … of the global batch of a step."""
    state = mix(np.array([seed % 2**64], dtype=np.uint64))
    state = mix(state + np.uint64(step))
    return torch.from_numpy(mix(state + np.arange(first, first + rows, dtype=np.uint64)).view(np.int64))


def add_seeds(
    model: torch.nn.Module, keywords: dict[str, Any], mesh: Mesh, seed: int, step: int, micro_step: int
) -> dict[str, Any]:
    """Return a forward's keywords with ``dropout_seeds`` if the model trains with attention dropout and has none yet.

    Args:
        micro_step: index of this micro-batch in its optimizer step. The row index is (micro-batch, replica, row) in
            row-major order, as in longctx's loaders.
    """
    binding = binding_of(model)
    inputs = keywords.get("input_ids", keywords.get("inputs_embeds"))
    if binding is None or not (binding.drops and model.training) or KEYWORD in keywords or inputs is None:
        return keywords
    rows = inputs.shape[0]
    first = (micro_step * mesh.data_size + mesh.data_rank) * rows
    return {**keywords, KEYWORD: row_seeds(seed, step, first, rows).to(inputs.device)}
