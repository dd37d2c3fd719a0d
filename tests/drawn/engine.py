"""Random training steps on ranks: unequal rows, documents, padding, every ZeRO stage and memory setting.

One SGD step of a tiny Llama is compared with the same model in one process, under a dense mask written out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from drawn.definitions import documents
from drawn.draw import LAYOUTS, Draw
from engine_tiny import VOCABULARY, tiny_llama

from tolerances import tolerance

RATE = 100.0
"""Learning rate, so large that the change of a step, and an error in it, is far above the rounding of weights."""
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One row. ids: its documents, -1 at padding; labelled: the share of tokens that have labels."""

    length: int
    ids: tuple[int, ...]
    labelled: float


@dataclass(frozen=True)
class EngineCase:
    """One accumulation window.

    rows[replica][micro_batch]: two rows of one length. form: how documents and padding are given.
    """

    seed: int
    world: int
    ring: int
    ulysses: int
    layout: str
    stage: int
    overlap: bool
    scatter: bool
    form: str
    rows: tuple[tuple[tuple[Row, Row], ...], ...]
    memory: tuple[tuple[str, Any], ...]

    @property
    def accumulation(self) -> int:
        return len(self.rows[0])


def draw(seed: int, world: int = 2) -> EngineCase:
    d = Draw(seed)
    ring, ulysses = d.pick(*[(r, u) for r in (1, 2, 4) for u in (1, 2, 4) if world % (r * u) == 0])
    form = d.pick("documents", "documents", "mask", "positions", "plain")
    accumulation = d.whole(1, 3)
    rows = tuple(
        tuple(_pair(d, form, d.whole(3, 30)) for _ in range(accumulation)) for _ in range(world // (ring * ulysses))
    )
    recompute = d.pick("none", "none", "mlp", "layer", "layer_keep_attention")
    memory = {
        "loss_tile": d.pick(None, None, 5, 64), "mlp_tile": d.pick(None, None, 4, 9), "recompute": recompute,
        "recompute_norms": d.chance(0.3), "offload_checkpoints": recompute.startswith("layer") and d.chance(0.5),
    }  # fmt: skip
    return EngineCase(
        seed, world, ring, ulysses, d.pick(*LAYOUTS), d.whole(0, 3), d.chance(0.5), d.chance(0.7), form, rows,
        tuple(memory.items()),
    )  # fmt: skip


def _pair(d: Draw, form: str, length: int) -> tuple[Row, Row]:
    made = []
    for _ in range(2):
        ids = d.row(length) if form in ("documents", "positions") else (0,) * length
        if form == "positions":
            ids = tuple(max(name, 0) for name in ids)  # positions do not mark padding
        if form == "mask":
            hidden = d.row(length)
            ids = tuple(-1 if name < 0 else 0 for name in hidden)
        made.append(Row(length, ids, d.pick(1.0, 0.7, 0.1, 0.0)))
    return made[0], made[1]


def tensors(case: EngineCase, replica: int, micro: int) -> dict[str, torch.Tensor]:
    """Return (2, S) input_ids, labels and document ids."""
    g = torch.Generator().manual_seed(case.seed * 100 + replica * 10 + micro)
    pair = case.rows[replica][micro]
    tokens = torch.randint(0, VOCABULARY, (2, pair[0].length), generator=g)
    keep = torch.rand(tokens.shape, generator=g) < torch.tensor([[row.labelled] for row in pair])
    if replica == micro == 0:
        keep[0] = True  # at least one label
    return {
        "input_ids": tokens,
        "labels": tokens.masked_fill(~keep, IGNORED),
        "ids": torch.tensor([row.ids for row in pair]),
    }


def batch(case: EngineCase, replica: int, micro: int) -> dict[str, torch.Tensor]:
    """Return the batch that a user passes to `engine.shard`."""
    made = tensors(case, replica, micro)
    ids = made.pop("ids")
    if case.form == "documents":
        made["document_ids"] = ids
    elif case.form == "mask":
        made["attention_mask"] = (ids >= 0).long()
    elif case.form == "positions":
        made["position_ids"] = torch.zeros_like(ids)
        for row, own in zip(made["position_ids"], ids.tolist(), strict=True):
            for tokens in documents(tuple(own)):
                row[tokens] = torch.arange(len(tokens))
    return made


def expected(case: EngineCase) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of the window and every weight's change, by one process in fp64."""
    model = tiny_llama().double()
    total: Any = 0.0
    count = 0
    for replica in range(len(case.rows)):
        for micro in range(case.accumulation):
            loss, number = _sum_of_losses(model, tensors(case, replica, micro))
            total, count = total + loss, count + number
    loss = total / max(count, 1)
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()))
    return float(loss.detach()), {name: -RATE * g for name, g in zip(names, gradients, strict=True)}


def _sum_of_losses(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    tokens, labels, length = rows["input_ids"], rows["labels"], rows["ids"].shape[1]
    seen = torch.eye(length, dtype=torch.bool).repeat(2, 1, 1)  # padding sees itself: eager's softmax stays finite
    targets = torch.full_like(tokens, IGNORED)
    for row, ids in enumerate(rows["ids"].tolist()):
        for own in documents(tuple(ids)):
            for place, t in enumerate(own):
                seen[row, t, own[: place + 1]] = True
                if t + 1 in own:
                    targets[row, t] = labels[row, t + 1]
    mask = torch.zeros(2, 1, length, length, dtype=torch.float64).masked_fill(~seen[:, None], -1e300)
    positions = torch.arange(length).expand(2, -1)  # rotary embeddings depend on differences only
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((targets != IGNORED).sum())


def found(case: EngineCase) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the same from this rank's engine."""
    import deepspeed

    import longctx

    mesh = longctx.Mesh(ring=case.ring, ulysses=case.ulysses)
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero = {
        "stage": case.stage, "overlap_comm": case.overlap, "reduce_scatter": case.scatter, "reduce_bucket_size": 5000,
        "allgather_bucket_size": 5000, "stage3_prefetch_bucket_size": 5000, "stage3_param_persistence_threshold": 600,
    }  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero if case.stage else {"stage": 0},
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = longctx.initialize(
        model, settings, mesh, case.layout, optimizer=optimizer, memory=dict(case.memory)
    )  # fmt: skip
    try:
        rows = [batch(case, mesh.data_rank, micro) for micro in range(case.accumulation)]
        for shard in engine.shard(rows):
            engine.backward(engine(**shard).loss)
            engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            after = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        return float(engine.global_loss), {name: p - before[name] for name, p in after.items()}
    finally:
        engine.destroy()


def check(case: EngineCase) -> tuple[float, float]:
    """Return the largest error of the loss and of a weight's change, relative to its norm, and the tolerance."""
    (loss, changes), (true_loss, true) = found(case), expected(case)
    assert changes.keys() == true.keys()
    error = abs(loss - true_loss) / (abs(true_loss) or 1.0)  # the loss is 0 where no token has a target
    for name, change in changes.items():
        apart, norm = float((change - true[name]).norm()), float(true[name].norm())
        error = max(error, apart / (norm or 1.0) if apart == apart else float("inf"))
    return error, tolerance("training gradient")
