"""Seeds of attention dropout: a function of the run's seed, the step and the row's number in the global batch.

So a row drops the same probabilities on any number of ranks, whether replicas or micro-batches share the batch out, and
after a resume.
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
        micro_step: number of this micro-batch in its optimizer step. Rows count by micro-batch, replica, row, which is
            the order in which longctx's loaders deal them out.
    """
    binding = binding_of(model)
    inputs = keywords.get("input_ids", keywords.get("inputs_embeds"))
    if binding is None or not (binding.drops and model.training) or KEYWORD in keywords or inputs is None:
        return keywords
    rows = inputs.shape[0]
    first = (micro_step * mesh.data_size + mesh.data_rank) * rows
    return {**keywords, KEYWORD: row_seeds(seed, step, first, rows).to(inputs.device)}
