"""The decode kernels as an operator: its schema, tracing, compilation, and any dtype and strides of its inputs."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longctx.decode.attend import decode_attention
from longctx.decode.kernel import decode
from longctx.kernels.decode import reference
from longctx.kernels.decode.terms import Operands, Terms

from tolerances import tolerance

Tensor = torch.Tensor


def test_the_schema_is_the_fields_in_order() -> None:
    assert str(torch.ops.longctx.decode_attention.default._schema) == (
        "longctx::decode_attention(Tensor q, Tensor k, Tensor? v, SymInt value_width, SymInt heads, SymInt tokens, "
        "float scale, float? softcap, Tensor? constant, Tensor? factor, Tensor? shift, Tensor? slopes, Tensor? bias, "
        "Tensor? mask, Tensor? lengths, bool causal, SymInt offset, SymInt? splits) -> (Tensor, Tensor)"
    )


def test_as_an_operator() -> None:
    """opcheck, and compilation without a graph break, a change of length included."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, 1, 16, generator=g),
        torch.randn(1, 1, 20, 16, generator=g),
        torch.randn(1, 1, 20, 16, generator=g),
    )
    mask = torch.rand((2, 1, 1, 20), generator=g) < 0.5
    rows, pairs = q.view(1, 1, 4, 16), mask.view(1, 1, 2, 1, 1, 20).expand(1, 1, 2, 2, 1, 20)
    none = (None,) * 4
    torch.library.opcheck(
        torch.ops.longctx.decode_attention.default,
        (rows, k, v, 16, 2, 1, 0.25, 3.0, *none, None, pairs, None, True, 19, 2),
    )

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(q * 2, k, v, backend="triton")[0].square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=None)
    for keys in (20, 18):
        inputs = q, k[:, :, :keys], v[:, :, :keys]
        assert torch.equal(compiled(*inputs), function(*inputs))


def test_a_new_length_needs_no_compilation() -> None:
    """Sizes and the offset are symbolic integers of the schema."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def function(q: Tensor, k: Tensor) -> Tensor:
        return decode_attention(q, k, causal=True, backend="triton")[0]

    for keys in (20, 18, 16, 14):
        function(torch.ones(1, 2, 2, 16), torch.ones(1, 1, keys, 16))
    assert counter.frame_count == 1


def test_inputs_of_any_dtype_and_strides_as_the_reference() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, 2, n, 32, generator=g).half()[..., ::2] for n in (6, 40)
    )  # 6 rows: 1 beam, 3 heads, 2 tokens
    row = torch.randn(1, 2, 12, generator=g, dtype=torch.float64)[..., ::2]
    slopes = torch.rand(3, 2, generator=g).half().mT
    terms = Terms(0.3, 2.0, constant=row, shift=-row, slopes=slopes, causal=True, offset=38)
    operands = Operands(q, k, None, 10, 3, 2)
    exact = reference.decode(operands._replace(q=q.double(), k=k.double()), terms)
    for splits in (None, 2):
        for ours, truth in zip(decode(operands, terms, splits), exact, strict=True):
            assert ours.dtype == torch.float32 and ours.shape == truth.shape
            assert (ours - truth).abs().max() <= tolerance("fp16") * truth.abs().max()
