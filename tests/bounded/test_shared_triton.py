"""What calls of ABC's and Cottention's kernels share: packed documents by chunk, and gradients that may be absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bounded import direct

from longctx.bounded.shared_triton import empty_like, output_gradient, state_gradient, with_documents


@dataclass
class Call:
    """As a kernel call, with chunks of 4 tokens."""

    documents: Any
    chunk: int = 4


def test_documents_are_numbered_by_token_and_chunk() -> None:
    ids = direct.packed([[(7, 3), (5, 3), (-1, 2), (5, 2)], [(-1, 1), (2, 9)]])
    found = with_documents(Call, ids, torch.tensor([7, -1])).documents
    assert found.ids.tolist() == [[0, 0, 0, 1, 1, 1, -1, -1, 1, 1], [-1, *[1] * 9]]
    assert found.edges.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]  # before each chunk and after the last
    assert found.kept.tolist() == [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    assert with_documents(Call, None, None).documents is None


def test_absent_gradients_are_0() -> None:
    q, v, state = torch.randn(2, 4, 6, 5), torch.randn(2, 2, 6, 3), torch.randn(2, 2, 5, 3)
    assert output_gradient(None, q, v).equal(torch.zeros(2, 4, 6, 3))
    assert state_gradient(None, state).equal(torch.zeros_like(state))
    dout, dstate = torch.randn(2, 4, 3, 6).transpose(2, 3), torch.randn(2, 2, 3, 5).transpose(2, 3)
    assert output_gradient(dout, q, v).equal(dout) and output_gradient(dout, q, v).stride(3) == 1
    assert state_gradient(dstate, state).equal(dstate) and state_gradient(dstate, state).is_contiguous()


def test_buffers_are_contiguous() -> None:
    (found,) = empty_like(torch.zeros(3, 4, dtype=torch.bfloat16).T)
    assert found.shape == (4, 3) and found.dtype == torch.bfloat16 and found.is_contiguous()
