"""WindowSharding: shard the micro-batches of one optimizer step, and count their labels over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from longctx.engine.dropout import add_seeds
from longctx.engine.step.accumulation import mark_batches
from longctx.engine.step.rows import IGNORED, Batch
from longctx.engine.step.window import Window, shard_compared, weigh
from longctx.engine.zero.trace import forget_order
from longctx.hf.host import Host
from longctx.layout import Layout
from longctx.mesh import Mesh
from longctx.models.hook.binding import binding_of
from longctx.models.hook.position_probe import position_rule
from longctx.models.hook.positions import PLAIN, PositionRule

logger = logging.getLogger(__name__)
AT = "longctx.hf"


class WindowSharding(Host):
    """Overrides of Trainer's methods that fetch batches and count their tokens."""

    mesh: Mesh
    layout: Layout
    attached: torch.nn.Module
    input_tokens: list[int]  # of each micro-batch of the current window, over all replicas
    valid_tokens: list[int]  # of them, those that are not padding

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the rows per optimizer step, over all data replicas."""
        return int(self._train_batch_size * args.gradient_accumulation_steps * self.mesh.data_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """Return this rank's shards of the next window and the count by which losses are divided. Collective.

        The count is over all ranks with ``average_tokens_across_devices``; otherwise over the ranks of one sequence, so
        that the average over ranks is the mean of the replicas' token means.

        Raises:
            EngineError: on every rank, if ranks of one sequence read different rows, or windows differ in length.
        """
        self.attached.train()  # seeds of dropout are added in training only; training_step comes later
        window, counted, count = self.shard_rows_of(islice(epoch_iterator, num_batches))
        if 0 < len(window) < num_batches:  # data without a length have ended: the trainer takes no step for these
            if self.mesh.rank == 0:
                logger.warning("the last %d micro-batches of the data fill no window and are dropped", len(window))
            window = []
        self.count_input(counted)
        step = self.state.global_step
        seed = self.args.seed
        window = [add_seeds(self.attached, batch, self.mesh, seed, step, i) for i, batch in enumerate(window)]
        return window, self._items(window, count)

    def shard_rows_of(self, batches: Any) -> tuple[Window, list[tuple[int, int]], int]:
        """Return the shards of full batches, each one's input and valid tokens, and the number of labels of all ranks.

        Collective over the world; every rank raises if one does.
        """
        window: Window = []
        counted: list[tuple[int, int]] = []
        checksum, problem = 0, None
        try:
            for batch in batches:
                full = self.readable(dict(batch))
                counted.append(self._tokens_of(full))
                checksum, shard = shard_compared(full, self.mesh, self.layout, self.rule, checksum)
                window.append(shard)
        except Exception as error:  # the other ranks wait in the exchange, so report it there
            problem = error
        count = weigh(window, self.mesh, checksum, problem, AT, self.state.global_step, 1)
        mark_batches(window)
        for batch in window:
            batch.pop("num_items_in_batch", None)  # the trainer passes it on by itself
        return window, counted, count

    @property
    def rule(self) -> PositionRule:
        """How the model counts positions if a batch has none. The first call runs the model: collective on ZeRO 3."""
        binding = binding_of(self.attached)
        if binding is None:
            return PLAIN
        if binding.rule is None:
            position_rule(self.attached, binding)
            forget_order(self.deepspeed)  # TRL does not call the head, and gathers its weight itself
        return position_rule(self.attached, binding)

    def readable(self, batch: Batch) -> Batch:
        """Return the batch with labels under the name that says whether they are shifted."""
        if not self.shifts_labels and "labels" in batch:
            batch.setdefault("shift_labels", batch["labels"])
        return batch

    @property
    def shifts_labels(self) -> bool:
        """Whether the model's loss compares a token's logits with the next token's label (causal language models)."""
        inner: Any = self.attached
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        name = getattr(inner, "loss_type", None) or type(inner).__name__
        return str(name).endswith(("ForCausalLM", "LMHeadModel"))

    def _items(self, window: Window, count: int) -> torch.Tensor | None:
        """Return what losses are divided by: the labels of all ranks, or of a sequence's ranks / sequence_size."""
        if not window or "shift_labels" not in window[0]:
            return None
        items = torch.tensor(float(max(count, 1)), device=self.mesh.device)
        if not self.args.average_tokens_across_devices:
            mine = sum((batch["shift_labels"] != IGNORED).sum() for batch in window)
            items = torch.as_tensor(mine, dtype=torch.float32, device=self.mesh.device)
            if self.mesh.sequence_size > 1:
                dist.all_reduce(items, group=self.mesh.sequence_group)
            items = items.clamp(min=1) / self.mesh.sequence_size
        return items

    def count_input(self, counted: list[tuple[int, int]]) -> None:
        """Keep the input and valid tokens of each micro-batch, summed over data replicas. Collective over the world."""
        total = torch.tensor(counted, dtype=torch.int64, device=self.mesh.device).reshape(-1, 2)
        if self.mesh.world_size > 1:
            dist.all_reduce(total, group=self.mesh.world_group)
        self.input_tokens, self.valid_tokens = (total // self.mesh.sequence_size).T.tolist()

    def _tokens_of(self, batch: Batch) -> tuple[int, int]:
        """Return the input tokens of a full batch, and how many of them are not padding."""
        tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
        pad = getattr(self.processing_class, "pad_token_id", None)
        if "attention_mask" in batch:
            return tokens.numel(), int(batch["attention_mask"].sum())
        return tokens.numel(), tokens.numel() if pad is None else int((tokens != pad).sum())

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Add the tokens of this micro-batch, over all replicas, to the trainer's state."""
        every, valid = self.input_tokens.pop(0), self.valid_tokens.pop(0)
        counts = {"no": 0, "all": every, "non_padding": valid}
        self.state.num_input_tokens_seen += counts[self.args.include_num_input_tokens_seen]
