"""Saving: folders that plain transformers loads, and checkpoints read without executing code from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longctx.engine.zero.guard import correct_optimizer, report_fp32_zero0_norm
from longctx.hf.host import Host
from longctx.train.checkpoint.safe_load import make_safe


class Saving(Host):
    """Overrides of how Trainer saves models and DeepSpeed reads checkpoints."""

    _use_cache: bool | None = None

    def keep_config(self, model: Any) -> None:
        """Remember ``use_cache`` of the model's config, which Trainer sets to False."""
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's own; the saved config has ``use_cache`` as the model came. Collective over the world."""
        with self._original_config():
            super().save_model(output_dir, _internal_call)

    def load_safely(self, accelerator: Any) -> None:
        """Make the DeepSpeed engines that ``accelerator`` prepares gather ZeRO 3's weights for ``save_model`` and read
        checkpoints without full pickle, in place."""
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if plugin is None:
            return
        if plugin.zero_stage == 3:
            zero = plugin.deepspeed_config.setdefault("zero_optimization", {})
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        prepare = accelerator.prepare

        def safe(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            for part in prepared if isinstance(prepared, (tuple, list)) else (prepared,):
                if getattr(part, "checkpoint_engine", None) is not None:  # an engine for training
                    make_safe(part, {})
                    correct_optimizer(part)
                    report_fp32_zero0_norm(part)
            return prepared

        accelerator.prepare = safe

    @contextmanager
    def _original_config(self) -> Iterator[None]:
        config = getattr(self.model, "config", None)
        if self._use_cache is None or config is None:
            yield
            return
        in_training, config.use_cache = config.use_cache, self._use_cache
        try:
            yield
        finally:
            config.use_cache = in_training
