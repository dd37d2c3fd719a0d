"""What the kernels of ABC and of Cottention are given in common: documents per chunk, gradients that may be missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.bounded.shared_triton import empty_like, output_gradient, state_gradient, with_documents
from longctx.kernels.cosine.fused import Documents


@dataclass(frozen=True)
class FakeCall:
    documents: Documents | None
    chunk: int = 4


def test_documents_of_a_packed_row_by_chunk() -> None:
    ids = torch.tensor([[7, 7, 7, 9, 9, 9, -1, 9, 7]])  # three documents: the last 7 is a new one; -1 ends none
    documents = with_documents(FakeCall, ids, torch.tensor([7])).documents
    assert documents is not None
    assert documents.ids.tolist() == [[0, 0, 0, 1, 1, 1, -1, 1, 2]]
    assert documents.edges.tolist() == [[0, 1, 1, 2]]  # the document before each chunk of 4, and after the last
    assert documents.kept.tolist() == [[0.0, 1.0, 0.0]]


def test_a_row_of_one_document_needs_none() -> None:
    assert with_documents(FakeCall, None, None).documents is None


def test_missing_gradients_are_zero_and_others_become_dense() -> None:
    q, v = torch.randn(2, 3, 5, 4), torch.randn(2, 1, 5, 6)
    assert torch.equal(output_gradient(None, q, v), torch.zeros(2, 3, 5, 6))
    strided = torch.randn(2, 3, 6, 5).transpose(2, 3)
    found = output_gradient(strided, q, v)
    assert torch.equal(found, strided) and found.stride(-1) == 1
    state = torch.randn(2, 4, 3).transpose(1, 2)
    assert torch.equal(state_gradient(None, state), torch.zeros(2, 3, 4))
    assert state_gradient(state, state).is_contiguous() and torch.equal(state_gradient(state, state), state)


def test_gradients_are_allocated_contiguous() -> None:
    (found,) = empty_like(torch.randn(4, 3, dtype=torch.float64).T)
    assert found.shape == (3, 4) and found.is_contiguous() and found.dtype == torch.float64
