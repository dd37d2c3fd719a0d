"""Every rule between keys, checked before any process starts; all that are broken are reported."""

from __future__ import annotations

from longctx.config import (
    attention_rules,
    data_rules,
    launch_rules,
    layer_rules,
    lora_rules,
    mesh_rules,
    model_rules,
    rope_rules,
    stages,
    train_rules,
    zero_rules,
)
from longctx.config.findings import Finding, Rule
from longctx.config.schema import RunConfig

_RULES: tuple[Rule, ...] = (
    *model_rules.RULES,
    *rope_rules.RULES,
    *lora_rules.RULES,
    *stages.RULES,
    *attention_rules.RULES,
    *layer_rules.RULES,
    *data_rules.RULES,
    *train_rules.RULES,
    *zero_rules.RULES,
    *launch_rules.RULES,
)


def broken(config: RunConfig, world: int | None) -> list[Finding]:
    """Return every rule that ``config`` breaks in a world of ``world`` ranks (None: the keys that decide it are
    unknown, and rules about sizes are left out)."""
    sizes = [] if world is None else mesh_rules.rules_of(world)
    return stages.judge_run([*_RULES, *sizes], config)
