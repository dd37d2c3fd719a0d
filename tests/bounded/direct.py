"""ABC and Cottention from their definitions, every token against every earlier one: T x T, fp64, plain autograd.

Independent of the token-by-token references in kernels/: there is no state here.
"""

from __future__ import annotations

import torch

from tolerances import tolerance

Tensor = torch.Tensor
EXACT = tolerance("fp64")


def visible(length: int, documents: Tensor | None, causal: bool = True) -> Tensor:
    """(B or 1, T, T): whether token t reads token j; padding is not read."""
    seen = torch.ones(1, length, length, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if documents is None:
        return seen
    return seen & (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]


def write_weights(s: Tensor, seen: Tensor, normalizer: str) -> Tensor:
    """(B, G, T, T, M): the weight of token j in slot m when token t reads."""
    logits = s[:, :, None].masked_fill(~seen[:, None, :, :, None], -torch.inf)
    if normalizer == "sum":
        return torch.where(seen[:, None, :, :, None], s[:, :, None], 0.0)
    if normalizer == "prefix":
        none = (logits == -torch.inf).all(3, keepdim=True)
        return logits.masked_fill(none, 0.0).softmax(3).masked_fill(none, 0.0)
    none = (logits == -torch.inf).all(3)
    mass = torch.logsumexp(logits.masked_fill(none[:, :, :, None], 0.0), 3)  # that token j divides by
    phi = (s - mass).exp().masked_fill(none, 0.0)
    return torch.where(seen[:, None, :, :, None], phi[:, :, None], 0.0)


def abc(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, seen: Tensor, normalizer: str, scale: float
) -> Tensor:
    """(B, H, T, Dv). key, value (B, G, T, M): the controls of both."""
    heads = q.shape[1] // k.shape[1]
    for_keys = write_weights(key, seen, normalizer).repeat_interleave(heads, 1)
    for_values = write_weights(value, seen, normalizer).repeat_interleave(heads, 1)
    keys = torch.einsum("bhtjm,bhjd->bhtmd", for_keys, k.repeat_interleave(heads, 1))
    values = torch.einsum("bhtjm,bhjd->bhtmd", for_values, v.repeat_interleave(heads, 1))
    logits = scale * torch.einsum("bhtd,bhtmd->bhtm", q, keys)
    some = key.masked_fill(key.isfinite(), 0.0) if normalizer != "sum" else key.abs().log()
    written = (seen[:, None, :, :, None] & (some > -torch.inf)[:, :, None]).any(3).repeat_interleave(heads, 1)
    p = logits.masked_fill(~written, -torch.inf).softmax(-1)
    p = torch.where(written.any(-1, keepdim=True), p, 0.0)
    return torch.einsum("bhtm,bhtmd->bhtd", p, values)


def counts(seen: Tensor) -> Tensor:
    """(B or 1, T): how many tokens each token reads."""
    return seen.sum(-1)


def cosine(q: Tensor, k: Tensor, v: Tensor, m: Tensor, seen: Tensor, scale_on: str) -> Tensor:
    """(B, H, T, Dv); m (H,)."""
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    unit = [x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k)]
    scores = unit[0] @ unit[1].transpose(-1, -2) * seen[:, None]
    size = counts(seen).clamp_min(1)[:, None, :, None].to(v) ** -m.sigmoid()[:, None, None]
    return scores @ (v * size) if scale_on == "value" else size * (scores @ v)


def queue(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, extra: tuple[Tensor, ...] | None) -> Tensor:
    """Softmax over the tokens `seen` (B or 1, T, T), and over `extra` (keys, values, seen) in the same softmax."""
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    if extra is not None:
        more_k, more_v, more = extra
        k = torch.cat([k, more_k.repeat_interleave(heads, 1)], 2)
        v = torch.cat([v, more_v.repeat_interleave(heads, 1)], 2)
        seen = torch.cat([seen, more], 2)
    p = (scale * q @ k.transpose(-1, -2)).masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return p @ v


def differences(ours: list[Tensor | None], theirs: list[Tensor | None]) -> list[float]:
    """Return the largest difference of each pair; None is zero."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        if a is None and b is None:
            found.append(0.0)
            continue
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        found.append(float((a - b).detach().abs().max()))
    return found


def gradients(out: Tensor, weight: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True, allow_unused=True))


def check(ours: Tensor, expected: Tensor, weight: Tensor, leaves: list[Tensor], allowed: float = EXACT) -> None:
    """Assert that two outputs and their gradients are equal."""
    found, wanted = ([out, *gradients(out, weight, leaves)] for out in (ours, expected))
    assert max(differences(found, wanted)) <= allowed


def packed(rows: list[list[tuple[int, int]]]) -> Tensor:
    """Return document ids from each row's runs (id, tokens)."""
    return torch.tensor([[name for name, count in row for _ in range(count)] for row in rows])


def numbered(ids: Tensor) -> Tensor:
    """(B, T): number the runs of one id, row by row; padding does not end a run."""
    found = torch.full_like(ids, -1)
    for row, names in enumerate(ids.tolist()):
        number, last = 0, None
        for place, name in enumerate(names):
            if name >= 0:
                number += name != last
                found[row, place], last = number, name
    return found


def random_documents(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """(B, T): a few documents per row, with padding between them and at both ends."""
    rows = []
    for row in range(batch):
        cuts = sorted({0, *torch.randint(0, length, (4,), generator=generator).tolist()})
        names = torch.randint(0, 4, (len(cuts),), generator=generator)
        ids = torch.full((length,), -1)
        for place, cut in enumerate(cuts):
            ids[cut:] = -1 if names[place] == 0 else 10 * row + place
        rows.append(ids)
    return torch.stack(rows)
