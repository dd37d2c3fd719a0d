"""ABC, attention with bounded-memory control, token by token in plain PyTorch: the oracle of the tests.

The state has M slots. Token t writes its key and value into slot m with weight phi_tm, and reads by softmax over slots:

    K_t[m] = sum_{j<=t} phi_jm k_j      V_t[m] = sum_{j<=t} phi_jm v_j      o_t = V_t^T softmax(scale K_t q_t)

The weights come from the control logits s in one of three ways ("normalizer"). z_t = log sum_{j<=t} e^{s_j} is each
slot's log mass, where the sum runs over the tokens of one document:

    prefix   K_t = sum_{j<=t} e^{s_j - z_t} k_j     a weighted mean of all tokens so far: earlier weights decay
    running  K_t = sum_{j<=t} e^{s_j - z_j} k_j     a token keeps the weight with which it was written
    sum      K_t = sum_{j<=t} s_j k_j               s are the weights

The state after a token is (z, K, V). A slot that was never written (z = -inf) is not read.
"""

from __future__ import annotations

import torch

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def empty(k: torch.Tensor, v: torch.Tensor, control: torch.Tensor) -> State:
    """Return the empty state: z (B, G, M) of -inf, K (B, G, M, D) and V (B, G, M, Dv) of 0."""
    shape = (*control.shape[:2], control.shape[3])
    zero = control.new_zeros
    return control.new_full(shape, -torch.inf), zero((*shape, k.shape[-1])), zero((*shape, v.shape[-1]))


def write(memory: torch.Tensor, mass: torch.Tensor, x: torch.Tensor, s: torch.Tensor, normalizer: str) -> State:
    """Write one token x (B, G, D) with control logits s (B, G, M) into memory (B, G, M, D), K or V; return (memory,
    log mass, log mass) after it."""
    if normalizer == "sum":
        return memory + s[..., None] * x[:, :, None], torch.logaddexp(mass, s.detach().abs().log()), mass
    after = torch.logaddexp(mass, s)
    some = after > -torch.inf
    weight = torch.where(some, s - after, -torch.inf).exp()
    kept = torch.where(some, mass - after, -torch.inf).exp() if normalizer == "prefix" else torch.ones_like(mass)
    return kept[..., None] * memory + weight[..., None] * x[:, :, None], after, mass


def read(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mass: torch.Tensor, scale: float) -> torch.Tensor:
    """Return q (B, H, D)'s attention over the written slots of (B, G, M, D) and (B, G, M, Dv): (B, H, Dv), 0 if none is
    written."""
    grouped = q.unflatten(1, (keys.shape[1], -1))
    logits = scale * grouped @ keys.transpose(-1, -2)
    written = (mass > -torch.inf)[:, :, None]
    p = logits.masked_fill(~written, -torch.inf).softmax(-1)
    p = torch.where(written.any(-1, keepdim=True), p, 0.0)
    return (p @ values).flatten(1, 2)


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    control: torch.Tensor,
    state: State | None = None,
    documents: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    *,
    normalizer: str = "prefix",
    scale: float = 1.0,
) -> tuple[torch.Tensor, State, torch.Tensor | None]:
    """Compute causal ABC token by token.

    Args:
        q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), control (B, G, T, M): fp32 or fp64.
        documents: (B, T) int64; the state is reset where the id changes; -1 is padding: not written, output 0.
        document: (B,) the document of the initial state.

    Returns:
        out (B, H, T, Dv), the state after the last token, and its document.
    """
    mass, keys, values = empty(k, v, control) if state is None else state
    outs = []
    for t in range(q.shape[2]):
        before = mass, keys, values
        if documents is not None:
            now = documents[:, t]
            valid = now >= 0
            same = valid & (now == document) if document is not None else torch.zeros_like(valid)
            mass = torch.where(same[:, None, None], mass, -torch.inf)
            keys, values = (torch.where(same[:, None, None, None], x, 0.0) for x in (keys, values))
        new_keys, after, _ = write(keys, mass, k[:, :, t], control[:, :, t], normalizer)
        values, _, _ = write(values, mass, v[:, :, t], control[:, :, t], normalizer)
        mass, keys = after, new_keys
        out = read(q[:, :, t], keys, values, mass, scale)
        if documents is not None:
            out = torch.where(valid[:, None, None], out, 0.0)
            mass = torch.where(valid[:, None, None], mass, before[0])
            keys, values = (
                torch.where(valid[:, None, None, None], x, old) for x, old in ((keys, before[1]), (values, before[2]))
            )
            document = torch.where(valid, now, -1 if document is None else document)
        outs.append(out)
    return torch.stack(outs, 2), (mass, keys, values), document
