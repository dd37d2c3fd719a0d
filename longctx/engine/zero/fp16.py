"""fp16's loss scale, where DeepSpeed leaves it to its caller or changes it too early.

The smallest positive fp16 number is 6e-8, so losses are multiplied by a scale before backward and gradients divided by
it before the update. DeepSpeed multiplies on ZeRO 1 to 3 only, although it divides on all stages. It may double the
scale after backward and before that division, which halves the update. And at the smallest scale it either keeps
skipping every step or raises a bare exception.
"""

from __future__ import annotations

from typing import Any

from longctx.engine.settings import Settings
from longctx.errors import EngineError, NonFiniteError

_SETTINGS = ("scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis", "min_loss_scale")


def require_supported(settings: Settings) -> None:
    """Check, before a model is built, that DeepSpeed's accelerator supports fp16.

    Raises:
        EngineError: ``fp16.enabled`` on a device without fp16.
    """
    if not (settings.get("fp16") or {}).get("enabled"):
        return
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        name = get_accelerator().device_name()
        raise EngineError(
            f"fp16.enabled: true, but this {name} does not compute in fp16; use bf16 or fp32 (model.dtype in a YAML)"
        )


def manual_loss_scale(engine: Any) -> float:
    """Return the scale that the caller must apply to a loss: 1 except on ZeRO 0 in fp16, where DeepSpeed does not."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    if not engine.fp16_enabled() or isinstance(engine.optimizer, ZeROOptimizer):
        return 1.0
    return float(engine.optimizer.loss_scale)


def loss_scale(engine: Any) -> float | None:
    """Return the loss scale of the next step; None without fp16."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def defer_scale_increase(engine: Any) -> None:
    """Delay increases of an fp16 optimizer's loss scale until ``finish_step``, and raise NonFiniteError for an overflow
    at the smallest scale."""
    optimizer = engine.optimizer
    if not engine.fp16_enabled() or not hasattr(optimizer, "_update_scale"):
        return
    update = optimizer._update_scale

    def held(overflow: bool = False) -> None:
        if not overflow:
            optimizer.longctx_update = update
            return
        scale = float(optimizer.loss_scale)
        if _is_smallest(optimizer, scale):
            raise NonFiniteError(
                f"gradients overflow fp16 at the smallest loss scale, {scale:g} (fp16.min_loss_scale; fp16.min_scale "
                "in a YAML): no smaller scale is left to try. Weights are unchanged on every rank. Use bf16, lower the "
                "learning rate, or lengthen warm-up"
            )
        update(True)

    optimizer._update_scale = held


def finish_step(engine: Any) -> float | None:
    """Apply the delayed update of the loss scale; return the gradient norm unscaled if DeepSpeed's is scaled."""
    optimizer, norm = engine.optimizer, None
    if not engine.fp16_enabled():
        return None
    # ZeRO 0 with any other optimizer than DeepSpeed's fused Adam:
    if hasattr(optimizer, "fp32_groups") and optimizer._global_grad_norm is not None:
        norm = float(optimizer._global_grad_norm) / float(optimizer.loss_scale)
    update = vars(optimizer).pop("longctx_update", None)
    if update is not None:
        update(False)
    return norm


def scaler_settings(engine: Any) -> dict[str, Any]:
    """Return this run's settings of the loss scaler; loading a checkpoint overwrites them with the earlier run's."""
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _SETTINGS if hasattr(scaler, name)}


def restore_settings(engine: Any, settings: dict[str, Any]) -> None:
    """Restore what ``scaler_settings`` returned; the loaded scale itself is kept."""
    scaler = _scaler(engine)
    for name, value in settings.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _is_smallest(optimizer: Any, scale: float) -> bool:
    """Return whether a dynamic scale is at its minimum, with no hysteresis left."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None:
        dynamic, least = getattr(scaler, "dynamic", False), getattr(scaler, "min_scale", 0.0)
        patient = scaler.delayed_shift > 1 and scaler.cur_hysteresis > 1 if dynamic else False
        return bool(dynamic and scale <= least and not patient)
    config = optimizer.loss_scale_config
    return bool(config.dynamic_loss_scale and scale <= config.min_loss_scale)
