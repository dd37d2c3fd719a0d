"""RingTrainer, the mixin that shards the rows of a transformers Trainer; and Trainer, the class made with it.

Hugging Face's own contract is kept: labels are counted over all ranks, each rank's loss is multiplied by the number of
ranks, and DDP, FSDP2 or DeepSpeed averages gradients over all of them. So no process group of the trainer, and nothing
in DeepSpeed's engine, is changed.
"""

from __future__ import annotations

from typing import Any

import transformers

from longctx.engine.activations import ActivationSettings, apply_settings, read_settings
from longctx.engine.attach import attach
from longctx.engine.exchange import control_group
from longctx.hf.evaluation import RowEvaluation
from longctx.hf.limits import check_trainer
from longctx.hf.loaders import Loaders
from longctx.hf.losses import Losses
from longctx.hf.saving import Saving
from longctx.hf.windows import WindowSharding
from longctx.layout import Layout, get_layout
from longctx.mesh import Mesh
from longctx.sameness import code_and_packages, compare_ranks

_COMPARED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_steps", "num_train_epochs",
    "seed", "data_seed", "max_grad_norm", "average_tokens_across_devices", "optim", "weight_decay",
)  # fmt: skip


class RingTrainer(WindowSharding, Loaders, Losses, RowEvaluation, Saving):
    """Mixin in front of a Trainer class, see ``ring``; batch sizes count rows per data replica."""

    def __init__(
        self,
        *args: Any,
        mesh: Mesh,
        layout: str | Layout = "zigzag",
        memory: ActivationSettings | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the trainer as its own class does, then attach its model to ``mesh``. Collective over the world.

        Args:
            mesh: the grid of ranks. The ranks of one sequence group read the same rows.
            layout: how rows are sharded: zigzag, striped or contiguous.
            memory: how the model saves activation memory, as for ``longctx.initialize``.
            args, kwargs: of the trainer's own class.

        Raises:
            EngineError: on every rank, if a setting would be wrong on a sharded sequence, or ranks differ.
            ModelError: on every rank, if the model would be.
        """
        self.mesh, self.layout, self.memory = mesh, get_layout(layout), read_settings(memory)
        super().__init__(*args, **kwargs)
        mesh.connect()
        control_group(mesh)
        facts = code_and_packages() | {"layout": self.layout.name, "memory": str(self.memory)}
        problem: Exception | None = None
        try:
            check_trainer(self)
            facts |= {name: str(getattr(self.args, name, None)) for name in _COMPARED}
            self.attach_models()
        except Exception as error:  # the other ranks wait in compare_ranks, so raise there
            problem = error
        compare_ranks(facts, problem)
        self.replace_losses()

    def attach_models(self) -> None:
        """Attach the trainer's model to the mesh. No communication."""
        self.attached = attach(self.model, self.mesh, self.layout)
        apply_settings(self.attached, self.memory, announce=self.mesh.rank == 0)

    def create_accelerator_and_postprocess(self) -> None:
        """As the trainer's own, and prepare what depends on the accelerator; called early in its ``__init__``."""
        super().create_accelerator_and_postprocess()
        self.keep_config(self.model)
        self.share_rows(self.accelerator)
        self.load_safely(self.accelerator)

    def call_model_init(self, trial: Any = None) -> Any:
        """As the trainer's own, for the model of each hyperparameter trial."""
        model = super().call_model_init(trial)
        self.keep_config(model)
        if hasattr(self, "attached"):  # not the first model, which __init__ attaches
            self.attached = attach(model, self.mesh, self.layout)
            apply_settings(model, self.memory, announce=False)
        return model


class Trainer(RingTrainer, transformers.Trainer):
    """transformers.Trainer with ``mesh=``: its rows are sharded over the ranks of the mesh's ring."""
