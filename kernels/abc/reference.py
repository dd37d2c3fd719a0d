"""ABC, attention with bounded memory, one token after the other in plain PyTorch: the oracle.

A memory has M slots. Token t writes its key and value into slot m with the weight phi_tm, and reads by softmax:

    K_t[m] = sum_{j<=t} phi_jm k_j      V_t[m] = sum_{j<=t} phi_jm v_j      o_t = V_t^T softmax(scale K_t q_t)

The control logits s make the weights, in one of three ways ("normalizer"); z_t = log sum_{j<=t} e^{s_j} is each slot's
log mass, the sum running over the tokens of one document:

    prefix   K_t = sum_{j<=t} e^{s_j - z_t} k_j     a mean over all tokens so far: old content yields as mass arrives
    running  K_t = sum_{j<=t} e^{s_j - z_j} k_j     a token keeps the weight it had when it came
    sum      K_t = sum_{j<=t} s_j k_j               s are the weights themselves

The state after a token is (z, K, V). A slot that nothing was written to (z = -inf) is not read.
"""

from __future__ import annotations

import torch

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def empty(k: torch.Tensor, v: torch.Tensor, control: torch.Tensor) -> State:
    """A memory nobody has written to: z (B, G, M) of -inf, K (B, G, M, D), V (B, G, M, Dv) of 0."""
    shape = (*control.shape[:2], control.shape[3])
    zero = control.new_zeros
    return control.new_full(shape, -torch.inf), zero((*shape, k.shape[-1])), zero((*shape, v.shape[-1]))


def write(memory: torch.Tensor, mass: torch.Tensor, x: torch.Tensor, s: torch.Tensor, normalizer: str) -> State:
    """One token x (B, G, D) with the control s (B, G, M) into a memory (B, G, M, D): (memory, mass, mass) after it."""
    if normalizer == "sum":
        return memory + s[..., None] * x[:, :, None], torch.logaddexp(mass, s.detach().abs().log()), mass
    after = torch.logaddexp(mass, s)
    some = after > -torch.inf
    weight = torch.where(some, s - after, -torch.inf).exp()
    kept = torch.where(some, mass - after, -torch.inf).exp() if normalizer == "prefix" else torch.ones_like(mass)
    return kept[..., None] * memory + weight[..., None] * x[:, :, None], after, mass


def read(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mass: torch.Tensor, scale: float) -> torch.Tensor:
    """q (B, H, D) over the written slots of (B, G, M, D) and (B, G, M, Dv): (B, H, Dv); 0 where none is written."""
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
    """Causal ABC, token by token.

    Args:
        q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), control (B, G, T, M): fp32 or fp64.
        documents: (B, T) int64; the memory restarts where the id changes; -1 is padding: nothing written, 0 read.
        document: (B,) the document that the initial state belongs to.

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
