"""Engine: DeepSpeed's engine for sequences that are sharded over ranks.

**The objective is the sum of all ranks' losses divided by data_size.** ``shard`` adds ``num_items_in_batch`` to every
micro-batch, by which a model's loss divides its sum: it is then this rank's share of the mean over all valid tokens of
the accumulation window. ``backward`` multiplies by the factor by which the ZeRO stage divides gradients too much
(measured by ``probe``), so that gradients, norms and clipping are right on every stage. The reported loss does not
contain that factor.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from longctx.engine.dropout import add_seeds
from longctx.engine.evaluate import Evaluation, evaluate
from longctx.engine.exchange import reached
from longctx.engine.overrides import EngineOverrides
from longctx.engine.save import refuse_empty
from longctx.engine.step.accumulation import Accumulation, find_mark, size_problem
from longctx.engine.step.loss import check_model_loss, check_nothing_added, refuse_additions
from longctx.engine.step.lossmean import MistakeCounts, compare_loss, raise_if_all_wrong, token_mean
from longctx.engine.step.window import shard_window, weigh_window
from longctx.engine.zero import fp16, guard
from longctx.engine.zero.order import ReductionOrder, check_order
from longctx.errors import EngineError, NonFiniteError
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh
from longctx.models.hook.binding import binding_of
from longctx.models.hook.position_probe import position_rule
from longctx.models.hook.positions import PLAIN, PositionRule
from longctx.sharding import unshard

logger = logging.getLogger(__name__)
_CHECKED_WINDOWS = 3  # accumulation windows in which the model's loss and the loss given to backward are recomputed


class Engine(EngineOverrides):
    """DeepSpeedEngine with ``shard``, ``weigh``, ``unshard``, ``token_mean``, ``evaluate``, ``save_pretrained``,
    ``global_loss`` and ``grad_norm``.

    Returned by ``longctx.initialize`` (or ``longctx.attach``), never constructed directly: DeepSpeed builds its own
    engine, and ``adopt`` then changes the object's class, which works for ZeRO 0 to 3.
    """

    mesh: Mesh
    layout: Layout
    _gradient_factor: float
    _loss_sum: torch.Tensor  # of this rank's backward passes in this accumulation window, () fp64
    _mean_loss: float
    _true_norm: float | None  # None where DeepSpeed measures the norm
    _checked_windows_left: int  # accumulation windows left in which losses are recomputed
    _check_loss: bool
    _seed: int  # of attention dropout
    _order: ReductionOrder
    _accumulation: Accumulation
    _output: Any  # of the latest forward pass, in those windows
    _mistakes: MistakeCounts

    @classmethod
    def adopt(cls, engine: DeepSpeedEngine, mesh: Mesh, layout: str | Layout, factor: float, seed: int = 0) -> Engine:
        """Turn a DeepSpeed engine into this class, in place.

        Args:
            factor: of the loss in backward, from ``probe.gradient_factor``.
            seed: of attention dropout.
        """
        engine.__class__ = cls
        assert isinstance(engine, Engine)
        engine.mesh, engine.layout = mesh, get_layout(layout)
        engine._gradient_factor, engine._seed = factor, seed
        engine._loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        engine._mean_loss = math.nan
        engine._true_norm = None
        engine._checked_windows_left = _CHECKED_WINDOWS
        engine._begin_window()
        guard.correct_optimizer(engine)
        fp16.defer_scale_increase(engine)
        refuse_empty(engine.module)
        engine._order = ReductionOrder(engine.optimizer)
        engine._check_loss = mesh.world_size > 1 or engine.gradient_accumulation_steps() > 1
        return engine

    # -- input --------------------------------------------------------------------------------------------------

    def shard(self, window: Any, *, last: bool = False) -> Any:
        """Return this rank's shard of one accumulation window, weighted; see ``window.shard_window``.

        Args:
            window: the ``gradient_accumulation_steps`` micro-batches of one optimizer step, a list of dictionaries of
                full rows, the same on all ranks of a sequence group. Under ``torch.no_grad()`` any number is allowed.
            last: the window is the last of an epoch and may have fewer micro-batches, the same number on all ranks.

        Returns:
            a list for a list, a dict for a dict (one micro-batch); pass each element as ``engine(**batch)``.

        Raises:
            EngineError: on every rank, if the windows of the ranks do not match.
        """
        return shard_window(window, self.mesh, self.layout, **self._window_facts(window, last))

    def weigh(self, window: Any, *, last: bool = False) -> Any:
        """Return an accumulation window whose micro-batches are already sharded, with ``num_items_in_batch`` added.

        For loaders that read only their rank's shard; see ``window.weigh_window``. ``last`` as in ``shard``.
        """
        return weigh_window(window, self.mesh, **self._window_facts(window, last))

    def unshard(self, x: torch.Tensor, dim: int = 1, *, length: int | None = None) -> torch.Tensor:
        """Return the whole sequence (…, S, …) from this rank's shard (…, T, …); see ``longctx.unshard``."""
        return unshard(x, self.mesh, dim, length=length, layout=self.layout)

    def _window_facts(self, window: Any, last: bool) -> dict[str, Any]:
        """Return the keyword arguments that ``shard_window`` and ``weigh_window`` share."""
        trained = torch.is_grad_enabled()
        problem = size_problem(window, self.gradient_accumulation_steps(), last) if trained else None
        return {"rule": self.position_rule, "step": self.global_steps, "trained": trained, "problem": problem}

    # -- one step --------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model, with seeds for attention dropout. In the first accumulation windows, until one forward pass
        can tell, check that its loss is this rank's share of the mean."""
        mark, trained = find_mark(kwargs), torch.is_grad_enabled()
        if trained:
            self._accumulation.note_forward(mark)
        index = self._accumulation.backwards if mark is None else mark.index
        kwargs = add_seeds(self.module, kwargs, self.mesh, self._seed, self.global_steps, index)
        name, parts = type(self.module).__name__, self.mesh.world_size * self.gradient_accumulation_steps()
        refuse_additions(self.module, inputs, kwargs, parts)
        output = super().forward(*inputs, **kwargs)
        check_nothing_added(output, kwargs, parts, name)
        if trained and self._checked_windows_left > 0:
            self._output = output
            if self._check_loss and "num_items_in_batch" in kwargs:
                self._check_loss = not check_model_loss(output, kwargs, self.mesh, name)
        return output

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the latest forward pass was the last of its accumulation window: the optimizer step follows.

        ``set_gradient_accumulation_boundary`` decides if it was called; else the micro-batch's mark, if it comes from
        ``shard`` or ``weigh``; else DeepSpeed's count of ``step()`` calls.
        """
        last = self._accumulation.is_last() if self._is_gradient_accumulation_boundary is None else None
        return super().is_gradient_accumulation_boundary() if last is None else last

    def token_mean(self, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the mean of ``losses`` over the accumulation window, for ``backward``.

        Args:
            losses: (B, T), floating, one per token of the latest forward pass (``reduction="none"``).
            labels: (B, T) int64, ``shift_labels`` of the batch; tokens with −100 are left out.

        Returns:
            () fp32: the sum over this rank's valid tokens, divided by ``num_items_in_batch``.

        Raises:
            EngineError: shapes differ, or the latest forward pass had no batch with labels.
        """
        return token_mean(losses, labels, self._accumulation.current)

    def backward(
        self,
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = False,
        *,
        replicated: bool = False,
    ) -> torch.Tensor:
        """Accumulate gradients of this rank's share of the objective.

        Args:
            loss: scalar; the objective is the sum of all ranks' losses over ``data_size``.
            scale_wrt_gas: must be False: the loss is already divided over the whole accumulation window.
            replicated: the loss is the same on all ranks of the sequence group, computed from ``unshard``-ed values (a
                preference loss, say). Gradients do not change; the reported loss counts it once.

        Returns:
            the loss, detached, without the gradient factor.
        """
        if scale_wrt_gas:
            raise EngineError(
                "backward(scale_wrt_gas=True): a loss weighted over its accumulation window must not be divided by the "
                "number of micro-batches once more; leave the argument out"
            )
        share = loss.detach()
        mark = self._accumulation.current
        if mark is not None and not replicated and loss is not getattr(self._output, "loss", None):
            steps = self.gradient_accumulation_steps()
            self._mistakes += compare_loss(share, self._output, mark, self.mesh.sequence_size, steps)
        self._output = None
        self._accumulation.note_backward()
        self._loss_sum += share.double() / (self.mesh.sequence_size if replicated else 1)
        scaled = guard.scaled(loss, self._gradient_factor * fp16.manual_loss_scale(self))
        super().backward(scaled, retain_graph=retain_graph, scale_wrt_gas=False)
        return share

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Update the weights at the end of an accumulation window; earlier calls only count micro-batches.

        Raises:
            EngineError: on every rank, if the loss was a mean over one rank's tokens, or micro-batches were left out.
            NonFiniteError: on every rank, if the loss or a gradient of any rank is not finite. Weights and optimizer
                state are unchanged, gradients are dropped. (fp16 with loss scaling skips the step instead.)
        """
        if not self.is_gradient_accumulation_boundary():
            super().step(lr_kwargs)
            return
        self._accumulation.check_complete()
        self._mean_loss = self._reduce_loss()
        self._checked_windows_left = max(self._checked_windows_left - 1, 0)
        self._true_norm = guard.fp32_zero0_norm(self)
        if self._true_norm is not None and not math.isfinite(self._true_norm):
            guard.drop_fp32_zero0(self)  # the one case in which DeepSpeed would apply it
            self._begin_window()
        elif self._update(lr_kwargs):
            return
        raise NonFiniteError(
            f"step {self.global_steps + 1}: loss {self._mean_loss:g}, gradient norm {self.grad_norm:g}; a loss or "
            "gradient of some rank is not finite. Weights are unchanged on every rank. Look at the rows of this step, "
            "lower the learning rate or lengthen warm-up, or resume from the last checkpoint"
        )

    def _update(self, lr_kwargs: dict[str, Any] | None) -> bool:
        """Let DeepSpeed update the weights; return False if it skipped that because a number is not finite."""
        super().step(lr_kwargs)
        if self.fp16_enabled():
            self._true_norm = fp16.finish_step(self)
        self._begin_window()
        self._log_monitors({"train_loss": self._mean_loss, "grad_norm": self.grad_norm})
        # An overflow in fp16 lowers the loss scale; such a step counts as taken.
        if self.was_step_applied() or (self.fp16_enabled() and math.isfinite(self._mean_loss)):
            return True
        guard.uncount_step(self)
        return False

    def _begin_window(self) -> None:
        """Reset the accumulation window's state; round DeepSpeed's count of micro-batches up to whole windows."""
        self._accumulation, self._output, self._mistakes = Accumulation(), None, MistakeCounts()
        self.micro_steps += -self.micro_steps % self.gradient_accumulation_steps()

    def _reduce_loss(self) -> float:
        """Return the mean loss over the accumulation window's valid tokens. Collective over the world."""
        numbers = (*map(float, self._mistakes), *self._order.take(), 1.0)
        found = torch.stack([self._loss_sum, *map(self._loss_sum.new_tensor, numbers)])
        self._loss_sum = torch.zeros_like(self._loss_sum)
        if self.mesh.world_size > 1:
            with reached(f"engine.step after {self.global_steps} steps", self.mesh):
                dist.all_reduce(found, group=self.mesh.world_group)
        total, *mistakes, order, squares, ranks = found.tolist()  # ranks: 1 in a rehearsal, whatever the world size
        check_order(order, squares, round(ranks))
        raise_if_all_wrong(MistakeCounts(*map(round, mistakes)), self.mesh, last=self._checked_windows_left == 1)
        return total / self.mesh.data_size

    def _window_is_open(self) -> bool:
        return self._accumulation.backwards > 0

    def clip_fp32_gradients(self) -> None:
        """Clip by the reported norm; DeepSpeed calls this for ZeRO 0 in fp32 only."""
        guard.clip_fp32_zero0(self, self._true_norm)

    # -- results --------------------------------------------------------------------------------------------

    @property
    def position_rule(self) -> PositionRule:
        """How the model counts positions if a batch has none; measuring it may raise ModelError."""
        binding = binding_of(self.module)
        return PLAIN if binding is None else position_rule(self.module, binding)

    @property
    def global_loss(self) -> float:
        """Mean loss over all valid tokens of the last accumulation window, the same number on every rank.

        Raises:
            EngineError: no window has been finished yet.
        """
        if math.isnan(self._mean_loss) and self.global_steps == 0 and self.micro_steps == 0:
            raise EngineError("global_loss: no window has been finished yet; it is known after engine.step()")
        return self._mean_loss

    @property
    def grad_norm(self) -> float:
        """Norm of the last update's whole gradient before clipping, on every stage; NaN before the first step."""
        norm = self._true_norm if self._true_norm is not None else self.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def evaluate(self, batches: Any, *, sharded: bool = False) -> Evaluation:
        """Return the mean loss over all valid tokens of ``batches``, which may differ in number between replicas.

        Args:
            batches: iterable of dictionaries of full rows with labels, the same on all ranks of a sequence group; with
                ``sharded=True``, of this rank's shards.
        """
        return evaluate(self, batches, sharded=sharded)
